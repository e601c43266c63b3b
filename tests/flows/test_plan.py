"""`staple plan`: its tokens against what the stages really ask, and what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from chat_model import build_chat_model
from command import staple

from constitutions.constitution import Principle
from flows.experiment import record_of
from flows.methods import method_of
from flows.plan.constitution import clusters_of, covered_by, foreseen
from flows.plan.plan import like, plan
from flows.plan.sami import SamiWorkload
from flows.plan.workload import CHARACTERS, MARKS, Assumed, Lengths, SampledTurn, Workload, lengths
from flows.schema import ExperimentSettings
from flows.settings import PRESETS, load_settings, presets
from models.engine.local import load_policy
from models.packaged import PACKAGED
from models.policy import Completion, Message, PolicySettings, Request
from models.prompts import CHAT_CONSTITUTION, TEMPLATES, ask_refinement, under_constitution
from models.templates import templates_of
from models.training.encoding import Group
from models.worlds.registry import WORLD_MODELS
from tasks.cluster import ClusterSettings
from tasks.corpus.prompts import CorpusSettings
from tasks.judging.pairs import answer_pairs
from tasks.mine import mine
from tasks.policies.answers import Generation
from tasks.prompts import PromptSettings
from tasks.rows import Answer, Prompt, Response, Trajectory, fields
from tasks.sami.draw import PrinciplePool
from tasks.sami.evaluate import asks
from tasks.sami.evaluate import response_pairs as met_under
from tasks.sami.sample import sample
from tasks.teach import lessons, skill_examples
from tasks.train import training_conversation

LARGE = [n for n in presets() if load_settings(n).policy.model not in {*WORLD_MODELS, *PACKAGED}]


@pytest.mark.parametrize("name", [*LARGE, *(n for n in presets() if n.startswith("planted"))])
def test_every_preset_is_planned(
    name: str, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    ran = staple(capsys, "plan", name)
    assert ran.code == 0, ran.err
    where = "processor" if name.startswith("planted") else "hours"
    words = (where, "prefill", "at most", "weights", "KV cache", "disk", "estimate", "assumed")
    assert all(word in ran.out for word in words)
    assert "too much" not in ran.out


def test_a_preset_whose_packaged_model_is_not_fetched_says_so(
    capsys: pytest.CaptureFixture[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    for command in ("plan", "run"):
        ran = staple(capsys, command, "house-style")
        assert ran.code == 2
        assert "; run: staple fetch smollm2-135m-instruct\n" in ran.err


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_says_what_it_takes(name: str) -> None:
    text = (PRESETS / f"{name}.yaml").read_text("utf-8")
    said = re.search(r"# About ([\d.]+) hours on one H100, an estimate; a GPU with 24 GiB is", text)
    assert said is not None and f"# staple plan {name}\n" in text
    settings = load_settings(name)
    assert plan(settings).total("hours") == pytest.approx(float(said[1]), rel=0.05)
    assert not any(memory.remedy for memory in plan(settings, "rtx-4090").memory)


def test_nothing_heavy_is_imported_and_nothing_is_made(workplace: Path) -> None:
    before = sorted(workplace.rglob("*"))
    code = (
        "import sys; sys.argv = ['staple', 'plan', 'qwen2.5-7b']\n"
        "import flows.commands.cli\n"
        "flows.commands.cli.main()\n"
        "assert not {'torch', 'transformers', 'mlflow', 'datasets'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(root), "PATH": ""}, check=False
    )
    assert done.returncode == 0
    assert sorted(workplace.rglob("*")) == before


# Tokens -------------------------------------------------------------------------------------


class Verbose:
    """Takes every turn to its limit, at `CHARACTERS` a token; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request], progress: Any = None) -> list[list[Completion]]:
        self.asked += requests
        return [
            [
                Completion(
                    text="x" * CHARACTERS * r.max_tokens,
                    tokens=r.max_tokens,
                    logprob=0.0,
                    finish="stop",
                )
            ]
            * r.n
            for r in requests
        ]

    def turns(self) -> dict[str, list[Request]]:
        found = defaultdict(list)
        for request in self.asked:
            found[request.key.rsplit("/", 1)[-1]].append(request)
        return found


def tokens(messages: Sequence[Message] | str) -> float:
    assert not isinstance(messages, str)
    return sum(MARKS + len(m["content"]) / CHARACTERS for m in messages)


PROMPT = Prompt(
    prompt_id="p",
    prompt=(Message(role="user", content="q" * 80),),
    gold="g" * 60,
    source="s:1",
)
KNOWN = Lengths(prompt=tokens(PROMPT.prompt), gold=15, longest=tokens(PROMPT.prompt))


LIMITS = ["max_response_tokens=20", "max_principle_tokens=6"]
SMALL = ["mine.samples=3", "mine.max_critique_tokens=9"]
SMALL += [f"{stage}.{limit}" for stage in ("mine", "evaluate") for limit in LIMITS]


def workload(*changes: str) -> Workload:
    settings = load_settings("llama-3.1-8b", [*SMALL, *changes])
    return Workload(settings, KNOWN, Assumed(filled=1.0, accepted=1.0))


def check(turns: list[SampledTurn], asked: dict[str, list[Request]]) -> None:
    """A turn's samples, limits and prompts are those of the requests, role by role."""
    assert len(turns) == len(asked)
    for turn, requests in zip(turns, asked.values(), strict=True):
        assert turn.samples == sum(r.n for r in requests)
        assert {turn.limit} == {r.max_tokens for r in requests}
        for request in requests:  # the hint's length counts its "{gold}"
            assert turn.shared + turn.own == pytest.approx(tokens(request.messages), abs=2)


@pytest.mark.parametrize("changes", [[], ["mine.critique=false"], ["method=star"]])
def test_the_turns_of_mine_are_what_it_asks(changes: list[str]) -> None:
    work, policy = workload(*changes), Verbose()
    templates = TEMPLATES["chat"] if work.guided else TEMPLATES["chat"].unguided()
    mine(work.settings.mine, templates, "0/1", policy, [PROMPT])  # type: ignore[arg-type]
    check(work.mined(), policy.turns())


@pytest.mark.parametrize("alike", [True, False])
def test_what_samples_share_is_prefilled_once(tmp_path: Path, alike: bool) -> None:
    """The real engine's count of prompt tokens; it shares what is half of the prompts, or more."""
    policy = load_policy(
        PolicySettings(dtype="float32", device="cpu", threads=1),
        build_chat_model(tmp_path, "llama"),
        None,
    )
    critique = "It lacks a source. " * (1 if alike else 80)
    asked = [
        ask_refinement(TEMPLATES["chat"], PROMPT.prompt, "An answer.", f"Be {how}.", critique)
        for how in ("brief", "honest", "kind")
    ]
    texts = [policy.chat.prompt(messages) for messages in asked]
    shared = next(i for i, some in enumerate(zip(*texts, strict=False)) if len({*some}) > 1)
    own = fmean(len(text) - shared for text in texts)
    requests = [Request(messages=m, key=str(i), max_tokens=2) for i, m in enumerate(asked)]
    policy.generate(requests)
    turn = SampledTurn(samples=3, limit=2, shared=shared, own=own)
    assert turn.alike == alike
    assert policy.decoder.prompt_tokens == turn.prefilled


@pytest.mark.parametrize(
    "changes", [[], ["method=star"], ["evaluate.votes=3", "evaluate.temperature=1"]]
)
def test_the_turns_of_evaluate_are_what_it_asks(changes: list[str]) -> None:
    work, policy = workload(*changes), Verbose()
    templates = TEMPLATES["chat"] if work.guided else TEMPLATES["chat"].unguided()
    settings = work.settings.evaluate
    generation = Generation(templates=templates, settings=settings, seed=0, iteration=0)
    generation.ask(policy, [PROMPT])  # type: ignore[arg-type]
    check(work.answered(), policy.turns())


@pytest.mark.parametrize("changes", [[], ["method=star"], ["train.loss_on=[refined]"]])
def test_a_conversation_to_learn_is_as_long_as_it_is(changes: list[str]) -> None:
    work = workload(*changes)
    templates = TEMPLATES["chat"] if work.guided else TEMPLATES["chat"].unguided()
    row = Trajectory(
        **fields(PROMPT),
        sample=0,
        initial="x" * CHARACTERS * 20,
        principle="x" * CHARACTERS * 6,
        refined="x" * CHARACTERS * 20,
        initial_score=0.0,
        score=1.0,
        weight=1.0,
    )
    learned = training_conversation(row, row.principle, templates, work.settings.train)
    trained = tuple(learned.messages[i] for i in learned.turns)
    whole, loss = work.learned()
    assert whole == pytest.approx(tokens(learned.messages))
    assert loss == tokens(trained)


@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_judges_are_asked_about_every_pair(iteration: int) -> None:
    judge = "{kind: pairwise, policy: {model: prometheus-eval/prometheus-7b-v2.0}}"
    work = workload(f"evaluate.judge={judge}", "prompts.held_out=40")
    answers = {
        t: [Answer(prompt_id="p", iteration=t, initial="a", principle="b", refined="c",
                   finish="stop", tokens=3)]
        for t in {0, max(iteration - 1, 0), iteration}
    }  # fmt: skip
    met = [
        m for theirs in answers.values() for m in answer_pairs(answers[iteration], theirs, [PROMPT])
    ]
    (asked,) = work.judged(iteration)
    assert (asked.prompts, asked.turn.samples) == (40, 2 * len(met))  # in both orders


# SAMI ---------------------------------------------------------------------------------------

OPPOSED = tuple(Principle(text="p" * 20 + n, antithesis="a" * 20 + n) for n in "1234")


def taught_workload(*changes: str) -> SamiWorkload:
    small = ["sample.max_response_tokens=20", "evaluate.max_response_tokens=20"]
    settings = load_settings("sami-tldr", ["write.held_out=0.5", *small, *changes])
    given = MARKS + (len(CHAT_CONSTITUTION.given) + 2 * (4 + 21)) / CHARACTERS
    return SamiWorkload(settings, KNOWN, Assumed(filled=1.0, given=given))


@pytest.mark.parametrize("size", [2, 4])
def test_the_turns_of_sample_are_what_it_asks(size: int) -> None:
    work, policy = taught_workload(f"sample.constitutions={size}"), Verbose()
    how = work.settings.sample
    sample(how, CHAT_CONSTITUTION, OPPOSED, "0/1", policy, [PROMPT])  # type: ignore[arg-type]
    _, (turn,) = work.explored()
    assert turn.samples == sum(r.n for r in policy.asked) == size
    assert {turn.limit} == {r.max_tokens for r in policy.asked}
    for request in policy.asked:  # what a constitution is told counts its "{principles}"
        assert turn.context == pytest.approx(tokens(request.messages), abs=4)


@pytest.mark.parametrize(("share", "kinds"), [(0.5, 5), (0, 3)])
def test_held_out_prompts_meet_every_kind_of_constitution(share: float, kinds: int) -> None:
    work = taught_workload(f"write.held_out={share}")
    pool = PrinciplePool(OPPOSED[2:], OPPOSED[:2] if share else ())
    asked = asks([PROMPT], pool, work.settings.sample.principles, 0)
    told, plain = work.answered()
    assert told.samples + plain.samples == len(asked) == kinds
    for ask in asked:
        under = under_constitution(CHAT_CONSTITUTION, ask.constitution.principles, PROMPT.prompt)
        turn, messages = (told, under) if ask.constitution.principles else (plain, PROMPT.prompt)
        assert turn.context == pytest.approx(tokens(messages), abs=4)


@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_judges_are_asked_about_every_response(iteration: int) -> None:
    work = taught_workload("prompts.held_out=40")
    pool = PrinciplePool(OPPOSED[2:], OPPOSED[:2])
    responses = {
        t: [
            Response(prompt_id="p", iteration=t, arm=ask.arm, identifiers=ask.constitution.identifiers,
                     principles=ask.constitution.principles, response=f"{t}", finish="stop", tokens=1)
            for ask in asks([PROMPT], pool, 2, 0)
        ]
        for t in {0, max(iteration - 1, 0), iteration}
    }  # fmt: skip
    earlier = [rows for t, rows in responses.items() if t != iteration]
    met = [m for rows in earlier for m in met_under(responses[iteration], rows, [PROMPT])]
    asked = list(work.judged(iteration))
    assert sum(a.turn.samples for a in asked) == 2 * len(met), "in both orders"
    assert all(a.prompts == 40 for a in asked)


@pytest.mark.parametrize("size", [2, 4])
def test_a_query_is_learned_in_rows_of_all_its_responses(size: int) -> None:
    work = taught_workload(f"sample.constitutions={size}")
    _, (turn,) = work.explored()
    group = Group(((0,) * round(turn.context),) * size, ((0,) * 20,) * size)
    row, loss = work.learned()
    assert work.rows * row == pytest.approx(group.tokens, abs=size * (size + 1))
    assert loss == size * 20


def test_four_constitutions_take_memory_for_longer_rows_only(
    capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    model = "policy.model=meta-llama/Llama-3.1-8B-Instruct"
    two, four = (
        plan(load_settings("sami-tldr", [model, f"sample.constitutions={size}"])) for size in (2, 4)
    )
    (rows, length), (same_rows, longer) = (
        p.memory[1].title.removeprefix("training ").replace(",", "").split(" × ")
        for p in (two, four)
    )
    assert rows == same_rows == "2" and float(longer) - float(length) == 2 * 350
    assert two.memory[1].bytes < four.memory[1].bytes < 24 * 2**30
    assert four.total("trained") > 2 * two.total("trained")
    said = staple(capsys, "plan", "sami-tldr", "--set", "sample.constitutions=4")
    out = " ".join(said.out.split())
    assert said.code == 0 and "C = 4: a query is trained on in 4 rows" in out
    assert "2 at a time, in two passes" in out and "training 2 ×" in out


@pytest.mark.parametrize(("changes", "passes"), [([], 3), (["train.kl=0.1"], 4)])
def test_rows_that_do_not_fit_together_take_a_forward_pass_more(
    changes: list[str], passes: int
) -> None:
    """Beside forward, backward and checkpoints' forward; the KL term's reference is a fourth."""
    plain = ["policy.quantization=none", "sample.constitutions=4", *changes]
    whole, split = (
        plan(load_settings("sami-tldr", [*plain, f"train.micro_batch_tokens={tokens}"]))
        for tokens in (8192, 1024)
    )
    assert whole.total("trained") == split.total("trained")
    hours = [
        next(w.hours or 0.0 for w in p.iterations[1].work if w.stage == "train")
        for p in (whole, split)
    ]
    assert hours[1] / hours[0] == pytest.approx((passes + 1) / passes)


def test_the_experiment_that_follows_is_planned_with_it(
    capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    shown = staple(capsys, "plan", "staple-then-sami")
    assert shown.code == 0 and shown.out.count("An estimate: planted-sami") == 2
    first, then = shown.out.split("An estimate: planted-sami")[1:]
    assert "\nmine " in first and "\nsample " not in first
    assert "\nsample " in then and "\nmine " not in then


def test_a_taught_experiment_is_planned_again(
    taught: ExperimentSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of("taught")
    sampled, trained = (record.needs(s, 1).metrics for s in ("sample", "train"))
    done = {w.stage: w for part in plan(taught).iterations for w in part.work if part.first == 1}
    assert done["sample"].samples == sampled["sampled_responses"]
    assert sampled["generated_tokens"] <= done["sample"].at_most
    responses = record.needs("evaluate", 1).read("responses", Response)
    assert done["evaluate"].samples == len(responses)
    known = plan(taught, "h100", like("taught"))
    again = {w.stage: w for part in known.iterations for w in part.work if part.first == 1}
    assert again["sample"].generated == pytest.approx(sampled["generated_tokens"])
    assert again["train"].prompts == pytest.approx(trained["train/trained"])
    assert again["train"].trained == pytest.approx(trained["train/tokens"], rel=0.01)
    shown = staple(capsys, "plan", "taught.yaml", "--like", "taught")
    assert shown.code == 0 and "as in taught" in shown.out


def test_a_judge_behind_an_endpoint_takes_tokens_but_no_hours_here() -> None:
    grades = "{kind: absolute, policy: {model: gpt-5}, endpoint: 'http://127.0.0.1:1/v1'}"
    changes = ["score.similarity=judge", f"score.judge={grades}", "iterations=1"]
    found = plan(load_settings("llama-3.1-8b", changes))
    (score,) = [w for part in found.iterations for w in part.work if w.stage == "score"]
    assert score.hours is None and score.samples == 50_000 * 17
    assert score.at_most == 50_000 * 17 * 1024


# A real run ---------------------------------------------------------------------------------


def test_the_bound_bounds_and_what_was_recorded_is_planned_again(
    at_home: ExperimentSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(at_home.experiment)
    mined, kept, trained = (record.needs(s, 1).metrics for s in ("mine", "filter", "train"))
    done = {w.stage: w for part in plan(at_home).iterations for w in part.work if part.first == 1}
    assert done["mine"].prompts == mined["mined_prompts"]
    assert done["mine"].samples == 6 * (1 + 3 * 3)
    assert mined["generated_tokens"] <= done["mine"].at_most

    known = plan(at_home, "h100", like(at_home.experiment))
    again = {w.stage: w for part in known.iterations for w in part.work if part.first == 1}
    assert again["mine"].generated == pytest.approx(mined["generated_tokens"])
    assert again["mine"].at_most == done["mine"].at_most
    assert again["train"].prompts == pytest.approx(kept["trajectories"])
    assert again["train"].trained == pytest.approx(trained["train/tokens"], rel=0.01)

    clusters = like(at_home.experiment).clusters
    clustered = record.needs("cluster", 1)
    assert sum(clusters) == kept["trajectories"]
    assert len(clusters) == clustered.metrics["constitution_size"]

    shown = staple(capsys, "plan", "lineage.yaml", "--like", at_home.experiment)
    assert shown.code == 0 and "as in lineage" in shown.out
    said = " ".join(shown.out.split())
    assert "which label about 100% of" in said and "if their clusters are as in lineage" in said
    bounded = ("--like", at_home.experiment, "--set", "cluster.constitution_size=1")
    said = " ".join(staple(capsys, "plan", "lineage.yaml", *bounded).out.split())
    share = max(clusters) / sum(clusters) if max(clusters) > 1 else 0
    assert f"1 principles, which label about {share:.0%} of" in said


def test_an_experiment_that_never_ran_tells_nothing(
    capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    ran = staple(capsys, "plan", "planted", "--like", "nobody")
    assert ran.code == 2 and "nothing is recorded" in ran.err


# The constitution ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "cluster.constitution_size=120",
            "at most 120 principles of 35,000 trajectories; how many",
        ),
        ("cluster.constitution_size=null", "at most 35,000 principles of 35,000 trajectories; clu"),
        ("prompts.first=100", "at most 70 principles of 70 trajectories; how many"),
        ("cluster.max_principles=90", "at most 90 principles of 35,000 trajectories; how many"),
    ],
)
def test_before_anything_ran_the_bound_tells_the_constitutions_size(change: str, said: str) -> None:
    (first, later) = [
        note
        for note in plan(load_settings("llama-3.1-8b", [change])).notes
        if note.startswith("constitution")
    ]
    assert said in first and first.startswith("constitution of iteration 1: ")
    assert later.startswith("constitution of iteration 2–4: ")


def test_golds_are_learned_one_by_one(workplace: Path) -> None:
    rows = [{"prompt": f"q {n}", "gold": ["a", "b", "c"] if n % 2 else "a"} for n in range(4)]
    Path("golds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = PromptSettings(sources=[CorpusSettings(path="golds.jsonl")], first=2, held_out=2)
    assert lengths(prompts, seed=0).golds == 2
    work = replace(workload("method=sft"), lengths=replace(KNOWN, golds=2.0))
    assert work.accepted == 2


@pytest.mark.parametrize("keep_first", [True, False])
def test_a_lesson_is_as_long_as_it_is(keep_first: bool) -> None:
    settings = load_settings("house-style", [f"teach.keep_first={keep_first}", "teach.examples=20"])
    work = Workload(settings, KNOWN, Assumed())
    examples = skill_examples(settings.teach, settings.prompts.world)
    given = list(lessons(examples, settings.teach, templates_of("house-style")))
    trained = [tokens([lesson.messages[turn] for turn in lesson.turns]) for lesson in given]
    number, whole, loss = work.taught()
    assert number == 20 and whole == pytest.approx(fmean(tokens(g.messages) for g in given))
    assert loss == pytest.approx(fmean(trained))


def test_no_constitution_is_foreseen_where_none_is_found() -> None:
    for name in ("method=sft", "method=star"):
        notes = plan(load_settings("planted", [name])).notes
        assert not any(note.startswith("constitution") for note in notes)


def test_a_small_sample_of_clusters_foretells_those_of_a_large_one() -> None:
    """A thousand clusters whose sizes fall as in language; each figure is the mean of 20 draws."""
    shares = 1 / (np.arange(1000) + 3)
    rng = np.random.default_rng(0)

    def drawn(trajectories: int) -> list[int]:
        return [int(n) for n in rng.multinomial(trajectories, shares / shares.sum()) if n]

    large = [sorted(drawn(20_000), reverse=True) for _ in range(20)]
    small = [drawn(1_000) for _ in range(20)]
    coverage = np.mean([sum(sizes[:50]) for sizes in large]) / 20_000
    assert np.mean([covered_by(sizes, 50) for sizes in small]) == pytest.approx(coverage, rel=0.05)
    found = np.mean([clusters_of(sizes, 2_000) for sizes in small])
    assert found == pytest.approx(np.mean([len(drawn(2_000)) for _ in range(20)]), rel=0.05)
    assert np.mean([clusters_of(s, 20_000) for s in small]) <= np.mean([len(s) for s in large])


def test_what_is_foreseen_stays_within_the_bounds() -> None:
    bounded, free = ClusterSettings(constitution_size=2), ClusterSettings()
    found = foreseen(bounded, 1_000, [5, 3, 1, 1])
    assert (found.principles, found.at_most, found.coverage) == (2, 2, 0.8)
    assert foreseen(free, 1_000, [5, 3, 1, 1]).principles == pytest.approx(5, abs=0.01)
    assert foreseen(free, 1_000, [5, 3]).principles == 2, "none was seen once only"
    assert foreseen(free, 3, [5, 3, 1, 1]).principles == 3
    assert foreseen(free, 1_000).coverage == 1 and foreseen(bounded, 1_000).coverage is None


# Presets ------------------------------------------------------------------------------------


def test_the_constitution_of_every_large_preset_is_bounded() -> None:
    for name in presets():
        settings = load_settings(name)
        large = method_of(settings).guided and settings.prompts.first > 1_000
        assert not large or (settings.cluster.constitution_size or 1_000) <= 300, name


# One GPU or another -------------------------------------------------------------------------


def flags(remedy: str) -> list[str]:
    return [word for word in remedy.split() if "=" in word]


@pytest.mark.parametrize(
    ("gpu", "changes"),
    [
        ("rtx-4090", ["policy.quantization=none", "policy.batch_rows=256"]),
        ("l4", ["train.micro_batch_tokens=65536", "policy.batch_rows=512"]),
        ("a100-40", ["train.gradient_checkpointing=false", "policy.batch_rows=512"]),
    ],
)
def test_what_is_advised_fits(gpu: str, changes: list[str]) -> None:
    first = plan(load_settings("llama-3.1-8b", changes), gpu)
    assert any(m.remedy for m in first.memory)
    advised = [flag for m in first.memory for flag in flags(m.remedy)]
    then = plan(load_settings("llama-3.1-8b", [*changes, *advised]), gpu)
    assert not any(m.remedy for m in then.memory)
    assert all(m.bytes <= then.gpu.room for m in then.memory)


def test_all_weights_take_more_memory_and_more_work_than_an_adapter() -> None:
    plain = ["policy.quantization=none"]
    lora, full = (
        plan(load_settings("llama-3.1-8b", [*plain, f"train.update={how}"]), "b200")
        for how in ("lora", "full")
    )
    assert not any(m.remedy for m in full.memory)
    assert full.memory[1].bytes > 10 * full.parameters > lora.memory[1].bytes
    assert full.total("trained") == lora.total("trained")
    assert full.total("hours") > lora.total("hours")
    advice = plan(load_settings("llama-3.1-8b", [*plain, "train.update=full"]), "h100").memory[1]
    assert advice.remedy == "--set train.update=lora"


def test_answers_of_an_endpoint_take_no_hours_here() -> None:
    served = plan(load_settings("llama-3.1-8b", ["policy.endpoint=http://127.0.0.1:1"]))
    hours = {w.stage: w.hours for part in served.iterations for w in part.work}
    assert hours["mine"] is None and hours["evaluate"] is None and hours["train"]
    assert [m.title.split()[0] for m in served.memory] == ["training"]
    assert served.total("generated") == plan(load_settings("llama-3.1-8b")).total("generated")


def test_a_gpu_that_is_too_small_is_named_and_another_with_it(
    capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    model = "policy.model=meta-llama/Llama-3.1-70B-Instruct"
    ran = staple(capsys, "plan", "llama-3.1-8b", "--gpu", "rtx-4090", "--set", model)
    assert ran.code == 0
    assert ran.out.count("too much for one rtx-4090; no setting helps") == 2
    larger = ran.out.split("so --gpu ")[-1].split()[0]
    least = ["policy.batch_rows=1"]
    then = plan(load_settings("llama-3.1-8b", [model, *least]), larger)
    assert not any(m.remedy for m in then.memory)


def test_unset_rows_are_those_that_fit() -> None:
    free = plan(load_settings("llama-3.1-8b"))
    few = plan(load_settings("llama-3.1-8b", ["policy.batch_rows=16"]))
    assert few.memory[0].bytes < 0.8 * free.gpu.room < free.memory[0].bytes <= free.gpu.room
    assert free.total("hours") < few.total("hours")


def test_a_faster_gpu_takes_fewer_hours() -> None:
    settings = load_settings("qwen2.5-7b")
    hours = [plan(settings, gpu).total("hours") for gpu in ("l4", "a100-80", "h100", "b200")]
    assert hours == sorted(hours, reverse=True)
    assert plan(settings).total("generated") < plan(settings).total("at_most")


@pytest.mark.parametrize("changes", [["method=sft"], ["method=star"], ["iterations=0"]])
def test_baselines_are_planned_too(changes: list[str]) -> None:
    found, whole = plan(load_settings("qwen2.5-7b", changes)), plan(load_settings("qwen2.5-7b"))
    assert 0 < found.total("hours") < whole.total("hours")
    assert len(found.memory) == (1 if "iterations=0" in changes else 2)


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    gpu = staple(capsys, "plan", "planted", "--gpu", "h800")
    assert gpu.code == 2 and "one of cpu, rtx-4090" in gpu.err
    model = staple(capsys, "plan", "planted", "--set", "policy.model=owner/unheard-of")
    assert model.code == 2 and "nothing is downloaded to plan" in model.err
    for option in ("--filled", "--accepted"):
        assert staple(capsys, "plan", "planted", option, "-1").code == 2


def test_what_one_knows_takes_the_place_of_what_is_assumed(
    capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    given = ("--filled", "0.5", "--accepted", "0.25", "--set", "iterations=1")
    ran = staple(capsys, "plan", "llama-3.1-8b", *given)
    assert "turns fill 50%" in ran.out and "0.25 trajectories" in ran.out
    (train,) = [line.split() for line in ran.out.splitlines() if line.split()[:1] == ["train"]]
    assert train[2] == "12.5k"


def test_local_rows_are_measured(workplace: Path) -> None:
    rows = [{"prompt": f"{i:04} " + "q" * 395, "gold": "g" * 120} for i in range(30)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = ["prompts.sources=[{path: rows.jsonl}]", "prompts.first=10", "prompts.later=5"]
    found = lengths(load_settings("llama-3.1-8b", changes).prompts, 0)
    assert (found.prompt, found.gold, found.longest) == (100 + 2 * MARKS, 30, 100 + 2 * MARKS)
