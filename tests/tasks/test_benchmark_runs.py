"""Benchmarks inside `evaluate`: tiny files in the standard formats, and the published ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import Place, Script, longer, pairwise, read_annotations, talker

from constitutions.errors import UserError
from models.judges.registry import JudgeSettings
from models.policy import Message, Policy
from tasks.benchmarks.alpaca_eval.data import read_outputs
from tasks.benchmarks.ifeval.data import read_examples
from tasks.benchmarks.mt_bench.data import Game, Rating, read_answers
from tasks.benchmarks.mt_bench.run import TEMPERATURES, MTBenchSettings
from tasks.benchmarks.registry import BenchmarkSettings, columns
from tasks.benchmarks.rows import read_records, read_rows, spread
from tasks.judging.panel import Panel
from tasks.record.record import Attempt
from tasks.record.work import Workspace
from tasks.rows import Answer, DialogueAnswer
from tasks.score import ScoreSettings

RATED = "[Question]\n{question}\n\n[The Start of Answer]\n{answer}\n[The End of Answer]"
RATED_TWICE = "{question_1}\n{answer_1}\n{question_2}\n{answer_2}"
PLAYED = "{question}\n[A]\n{answer_a}\n[B]\n{answer_b}"
PLAYED_TWICE = (
    "{question_1}\n{question_2}\n[A]\n{answer_a_1}\n{answer_a_2}\n[B]\n{answer_b_1}\n{answer_b_2}"
)
PROMPTS = {
    "single-v1": ("single", RATED),
    "single-math-v1": ("single", "Reference: {ref_answer_1}\n" + RATED),
    "single-v1-multi-turn": ("single", RATED_TWICE),
    "single-math-v1-multi-turn": ("single", "Reference: {ref_answer_2}\n" + RATED_TWICE),
    "pair-v2": ("pairwise", PLAYED),
    "pair-math-v1": ("pairwise", "Reference: {ref_answer_1}\n" + PLAYED),
    "pair-v2-multi-turn": ("pairwise", PLAYED_TWICE),
    "pair-math-v1-multi-turn": ("pairwise", "Reference: {ref_answer_2}\n" + PLAYED_TWICE),
}
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now another."]},
    {"question_id": 82, "category": "roleplay", "turns": ["Be a cat.", "Be a dog."]},
    {"question_id": 111, "category": "math", "turns": ["What is 1+1?", "And times 3?"]},
]
INSTRUCTIONS = [
    {"instruction": f"Tell me about {thing}.", "output": "o" * (20 + 9 * i), "generator": "base"}
    for i, thing in enumerate(("cats", "dogs", "owls", "eels", "ants", "bees", "cows"))
]
EXAMPLES: list[dict[str, Any]] = [
    {
        "key": 1,
        "prompt": "No commas please.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    {
        "key": 2,
        "prompt": "Say why, twice.",
        "instruction_id_list": ["keywords:frequency", "punctuation:no_comma"],
        "kwargs": [{"keyword": "why", "frequency": 2, "relation": "at least"}, {}],
    },
]


def lines(name: str, rows: Sequence[Any]) -> str:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def answer_rows(model: str, turns: Callable[[int], Sequence[str]]) -> list[Any]:
    return [
        {
            "question_id": q["question_id"],
            "model_id": model,
            "choices": [{"index": 0, "turns": turns(i)}],
        }
        for i, q in enumerate(QUESTIONS)
    ]


@pytest.fixture
def files(workplace: Path) -> dict[str, dict[str, Any]]:
    """The settings of each benchmark, its files written."""
    prompts = [
        {"name": n, "type": kind, "system_prompt": "You judge.", "prompt_template": text}
        for n, (kind, text) in PROMPTS.items()
    ]
    references = answer_rows("ref", lambda i: ("REF-1", "REF-2"))[2:]
    against = answer_rows("other", lambda i: ("short", "a much longer answer " * 9))
    Path("alpaca.json").write_text(json.dumps(INSTRUCTIONS))
    return {
        "alpaca_eval": {"prompts": "alpaca.json"},
        "mt_bench": {
            "questions": lines("question.jsonl", QUESTIONS),
            "judge_prompts": lines("judge_prompts.jsonl", prompts),
            "references": lines("references.jsonl", references),
            "against": lines("against.jsonl", against),
        },
        "ifeval": {"prompts": lines("ifeval.jsonl", EXAMPLES)},
    }


def reader(judgement: Callable[[str], str] = lambda asked: "[[7]]") -> Script:
    """A judge for all benchmarks: rates and plays as MT-Bench asks, compares by length."""

    def say(messages: Sequence[Message]) -> str:
        asked = messages[-1]["content"]
        if "###Response A:" in asked:
            return pairwise(longer).say(messages)
        if "\n[A]\n" in asked:
            a, _, b = asked.partition("\n[A]\n")[2].partition("\n[B]\n")
            return f"Compared. [[{longer(a, b)}]]"
        return f"Read. Rating: {judgement(asked)}"

    return Script(say)


def run(
    at: Place,
    benchmarks: dict[str, Any],
    judge: Policy | None = None,
    script: Policy | None = None,
    **how: Any,
) -> Attempt:
    guided = how.pop("guided", True)
    settings = at.settings(benchmarks=benchmarks, **how)
    return at.evaluate(settings, lambda _: judge or reader(), script, guided=guided)


def figures(done: Attempt, name: str) -> dict[str, float]:
    return {k: v for k, v in done.metrics.items() if k.startswith(f"{name}/")}


# --- AlpacaEval


def test_alpaca_eval_by_hand(place: Place, files: dict[str, Any]) -> None:
    """The policy's answers have 36 to 52 characters; the reference's 20, 29, … 74."""
    done = run(place, {"alpaca_eval": files["alpaca_eval"]})
    found = figures(done, "alpaca_eval")
    outputs = done.path("alpaca_eval")
    annotations = read_annotations(outputs / "annotations.json")
    wins = sum(len(a.output_2) >= len(a.output_1) for a in annotations)
    assert 0 < wins < 7
    assert found["alpaca_eval/win_rate"] == pytest.approx(wins / 7)
    assert found["alpaca_eval/win_rate_low"] < wins / 7 < found["alpaca_eval/win_rate_high"]
    assert found["alpaca_eval/standard_error"] > 0
    assert 0 <= found["alpaca_eval/length_controlled"] <= 1
    assert found["alpaca_eval/bias"] == 0.0
    assert [a.preference for a in annotations] == [
        2.0 if len(a.output_2) >= len(a.output_1) else 1.0 for a in annotations
    ]
    written = read_outputs(outputs / "model_outputs.json")
    assert [row.instruction for row in written] == [row["instruction"] for row in INSTRUCTIONS]
    assert {row.generator for row in written} == {"stage-iteration-0"}
    assert all(row.output.endswith("And here is why.") for row in written)
    assert {a.generator_1 for a in annotations} == {"base"}
    assert {a.annotator for a in annotations} == {"pairwise:helpfulness:small"}


def test_the_first_answer_another_reference_and_a_part_can_be_measured(
    place: Place,
    files: dict[str, Any],
) -> None:
    other = [row | {"output": "x", "generator": "tiny"} for row in INSTRUCTIONS[::-1]]
    chosen = {"reference": lines("other.jsonl", other), "limit": 3, "answer": "initial"}
    done = run(place, {"alpaca_eval": files["alpaca_eval"] | chosen})
    assert done.metrics["alpaca_eval/win_rate"] == 1.0
    assert "alpaca_eval/length_controlled" not in done.metrics, "every answer is longer"
    written = read_annotations(done.path("alpaca_eval") / "annotations.json")
    things = [row.instruction.split()[-1] for row in written]
    assert things == ["cats.", "owls.", "ants."]
    assert {row.generator_1 for row in written} == {"tiny"}
    assert not any(row.output_2.endswith("why.") for row in written)


def test_difficulties_and_gamed_baselines_enter_the_fit(
    place: Place,
    files: dict[str, Any],
) -> None:
    rows = "\n".join(f"{i},{i / 3 - 1}" for i in range(7))
    Path("hard.csv").write_text(f"index,instruction_difficulty\n{rows}\n")
    with_them = files["alpaca_eval"] | {"difficulties": "hard.csv"}
    plain = run(place, {"alpaca_eval": files["alpaca_eval"]}).metrics
    hard = run(place, {"alpaca_eval": with_them}).metrics
    assert hard["alpaca_eval/win_rate"] == plain["alpaca_eval/win_rate"]
    assert "alpaca_eval/length_controlled_error" not in plain
    Path("hard.csv").write_text("index,instruction_difficulty\n0,1.0\n")
    with pytest.raises(UserError, match="row 2: this instruction has no difficulty"):
        run(place, {"alpaca_eval": with_them}, unasked_judge(), unasked_judge())


def test_the_published_file_gives_the_published_win_rate(
    place: Place,
    corpora: Path,
) -> None:
    """A policy that says what alpaca-7b said, and a judge that says what the annotator said."""
    annotations = read_annotations(corpora.parent / "alpaca_eval" / "alpaca-7b.json")[:120]
    base = [
        {"instruction": a.instruction, "output": a.output_1, "generator": a.generator_1}
        for a in annotations
    ]
    Path("base.json").write_text(json.dumps(base))
    answers = {a.instruction: a.output_2 for a in annotations}
    done = run(
        replace(place, at=replace(place.at, shard_size=64)),
        {"alpaca_eval": {"prompts": "base.json"}},
        pairwise(longer),
        talker(lambda asked: answers.get(asked, "none"), lambda first: first),
    )
    written = read_annotations(done.path("alpaca_eval") / "annotations.json")
    assert [a.output_2 for a in written] == [a.output_2 for a in annotations]
    assert [a.output_1 for a in written] == [a.output_1 for a in annotations]
    known = done.metrics["alpaca_eval/win_rate"]
    assert known == pytest.approx(sum((a.outcome or 0) for a in written) / len(written))


# --- MT-Bench


def test_mt_bench_by_hand(place: Place, files: dict[str, Any]) -> None:
    judge = reader(lambda asked: "[[4]]" if "Be a" in asked else "[[8]]")
    done = run(place, {"mt_bench": files["mt_bench"]}, judge)
    found = figures(done, "mt_bench")
    assert found["mt_bench/score"] == pytest.approx((8 + 4 + 8) / 3)
    assert found["mt_bench/turn_1"] == found["mt_bench/turn_2"] == found["mt_bench/score"]
    assert (found["mt_bench/writing"], found["mt_bench/roleplay"]) == (8.0, 4.0)
    assert found["mt_bench/failed"] == 0
    assert found["mt_bench/win_rate/turn_1"] == 1.0 and found["mt_bench/win_rate/turn_2"] == 0.0
    assert found["mt_bench/win_rate"] == 0.5 and found["mt_bench/bias"] == 0.0
    folder = done.path("mt_bench")
    ratings = read_rows(folder / "model_judgment_single.jsonl", Rating)
    assert [(r.question_id, r.turn) for r in ratings] == [
        (q, turn) for q in (81, 82, 111) for turn in (1, 2)
    ]
    assert {r.judge for r in ratings if r.question_id == 111} == {
        ("small", "single-math-v1"),
        ("small", "single-math-v1-multi-turn"),
    }
    assert "Reference: REF-2" in ratings[-1].user_prompt
    games = read_rows(folder / "model_judgment_pair.jsonl", Game)
    assert [g.outcome for g in games] == [1.0, 0.0] * 3


def test_the_second_turn_follows_the_answer_that_is_measured(
    place: Place,
    files: dict[str, Any],
) -> None:
    for which in ("refined", "initial"):
        speaker = talker()
        done = run(place, {"mt_bench": files["mt_bench"] | {"answer": which}}, None, speaker)
        rows = done.read("mt_bench-answers", DialogueAnswer)
        first = {r.question_id: getattr(r, which) for r in rows if r.turn == 1}
        second = [
            r for r in speaker.asked if [m["role"] for m in r.messages].count("assistant") == 1
        ]
        seen = {
            r.messages[0]["content"]: r.messages[1]["content"]
            for r in second
            if r.messages[-1]["content"] in {q["turns"][1] for q in QUESTIONS}
        }
        assert seen == {q["turns"][0]: first[q["question_id"]] for q in QUESTIONS}
        written = read_answers(done.path("mt_bench") / "model_answer.jsonl")
        texts = {(r.question_id, r.turn): getattr(r, which) for r in rows}
        assert written == {q: (texts[q, 1], texts[q, 2]) for q in (81, 82, 111)}


def test_finished_judgements_open_no_pool(
    place: Place, files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the last judgement and the record of the stage."""
    bench = MTBenchSettings.model_validate(files["mt_bench"]).load(place.judge())
    answers = run(place, {"mt_bench": files["mt_bench"]}).read("mt_bench-answers", DialogueAnswer)

    def measured() -> dict[str, float]:
        panel = Panel(
            oracle=None,
            scoring=ScoreSettings(),
            model="m",
            work=Workspace(tmp_path / "work"),
            iteration=0,
            seed=0,
            resamples=100,
            max_failed=0.0,
            open_policy=lambda _: reader(),
        )
        with panel:
            return bench.measure(answers, panel)

    first = measured()

    def opened(*_: object) -> None:
        raise AssertionError("a pool was opened")

    monkeypatch.setattr("tasks.judging.panel.judge_pool", opened)
    assert measured() == first
    (next((tmp_path / "work/parts").glob("mt_bench-pair-*"))).unlink()
    with pytest.raises(AssertionError, match="a pool was opened"):
        measured()


@pytest.mark.parametrize("own", [True, False])
def test_each_category_has_its_temperature(
    place: Place,
    files: dict[str, Any],
    own: bool,
) -> None:
    speaker = talker()
    chosen = files["mt_bench"] | {"category_temperatures": own, "limit": 2}
    run(place, {"mt_bench": chosen}, None, speaker)
    at = {r.messages[0]["content"]: r.temperature for r in speaker.asked}
    asked = {q["turns"][0]: TEMPERATURES[q["category"]] if own else 0.0 for q in QUESTIONS[:2]}
    assert {text: at[text] for text in asked} == asked


def test_failed_ratings_beyond_the_accepted_share_are_an_error(
    place: Place,
    files: dict[str, Any],
) -> None:
    judge = reader(lambda asked: "none" if "Be a cat" in asked else "[[5]]")
    alone = {k: v for k, v in files["mt_bench"].items() if k != "against"}
    with pytest.raises(UserError, match=r"MT-Bench's ratings, judge small: 2 of 6 .* failed"):
        run(place, {"mt_bench": alone}, judge)
    done = run(place, {"mt_bench": alone}, judge, max_failed=0.5)
    assert done.metrics["mt_bench/failed"] == 2
    assert "mt_bench/win_rate" not in done.metrics and "mt_bench/roleplay" not in done.metrics


def test_the_published_questions_are_answered_and_rated(
    place: Place,
    corpora: Path,
) -> None:
    folder = corpora.parent / "mt_bench"
    settings = {
        "questions": str(folder / "question.jsonl"),
        "judge_prompts": str(folder / "judge_prompts.jsonl"),
        "references": str(folder / "gpt-4.jsonl"),
        "limit": 8,
    }
    done = run(place, {"mt_bench": settings})
    found = figures(done, "mt_bench")
    assert found["mt_bench/score"] == 7.0
    categories = {
        *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
    }
    assert all(found[f"mt_bench/{name}"] == 7.0 for name in categories)


# --- IFEval


def test_ifeval_by_hand(place: Place, files: dict[str, Any]) -> None:
    """ "A plain answer to Say why, twice. And here is why." has both whys, and a comma."""
    done = run(place, {"ifeval": files["ifeval"]})
    found = figures(done, "ifeval")
    assert found["ifeval/prompt_strict"] == 1 / 2
    assert found["ifeval/instruction_strict"] == 2 / 3
    assert found["ifeval/prompt_loose"] == 1 / 2
    assert found["ifeval/instruction_loose"] == 2 / 3
    assert found["ifeval/principle_win_rate"] == 1.0
    written = done.path("ifeval") / "input_response_data.jsonl"
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [e["prompt"] for e in EXAMPLES]
    assert rows[1]["response"] == "A plain answer to Say why, twice. And here is why."
    first = run(place, {"ifeval": files["ifeval"] | {"answer": "initial"}}).metrics
    assert first["ifeval/instruction_strict"] == 1 / 3


def test_principles_are_judged_where_there_are_any_and_somebody_can(
    place: Place,
    files: dict[str, Any],
) -> None:
    unguided = run(place, {"ifeval": files["ifeval"]}, guided=False)
    assert "ifeval/prompt_strict" in unguided.metrics
    assert "ifeval/principle_win_rate" not in unguided.metrics
    settings = place.settings(judge="similarity", benchmarks={"ifeval": files["ifeval"]})
    nobody = place.evaluate(settings, lambda _: unasked_judge())
    assert "ifeval/principle_win_rate" not in nobody.metrics
    own = files["ifeval"] | {"judge": place.judge()}
    settings = place.settings(judge="similarity", benchmarks={"ifeval": own})
    asked = place.evaluate(settings, lambda _: reader())
    assert asked.metrics["ifeval/principle_win_rate"] == 1.0


def test_the_published_prompts_are_answered_and_checked(
    place: Place,
    corpora: Path,
) -> None:
    folder = corpora.parent / "ifeval"
    responses = [json.loads(line) for line in (folder / "responses_gpt4_first200.jsonl").open("r")][
        :60
    ]
    known = {row["prompt"]: row["response"] for row in responses}
    rows = [
        json.loads(line)
        for line in (folder / "input_data.jsonl").open("r")
        if json.loads(line)["prompt"] in known
    ]
    path = lines("first.jsonl", rows)
    speaker = talker(lambda asked: known.get(asked, "none"), lambda first: first)
    whole = replace(place, at=replace(place.at, shard_size=64))
    done = run(whole, {"ifeval": {"prompts": path}}, None, speaker)
    official = [
        json.loads(line)["follow_all_instructions"]
        for line in (folder / "results_strict_first200.jsonl").open("r")
    ][:60]
    assert done.metrics["ifeval/prompt_strict"] == pytest.approx(sum(official) / 60)


# --- all of them


def unasked_judge() -> Script:
    def say(messages: Sequence[Message]) -> str:
        raise AssertionError("no judge must be asked")

    return Script(say)


def test_a_benchmarks_answers_do_not_depend_on_the_others(
    place: Place,
    files: dict[str, Any],
) -> None:
    together = run(place, files)
    for name, chosen in files.items():
        alone = run(place, {name: chosen})
        table = f"{name}-answers.parquet"
        assert alone.path(table).read_bytes() == together.path(table).read_bytes()
        assert figures(alone, name) == figures(together, name) != {}
        file = alone.path("answers.parquet").read_bytes()
        assert file == together.path("answers.parquet").read_bytes()
    held_out = {k for k in together.metrics if k.startswith("win_rate/")}
    assert {k: together.metrics[k] for k in held_out} == {k: alone.metrics[k] for k in held_out}


@pytest.mark.parametrize("after", [1, 9, 20, 33])
def test_a_killed_attempt_asks_nobody_twice(
    place: Place,
    files: dict[str, Any],
    after: int,
) -> None:
    judge, answerer = reader(), talker()
    whole = run(place, files, judge, answerer)

    class Killed(Script):
        def generate(self, requests: Any, progress: Any = None) -> Any:
            if len(self.asked) >= after:
                raise KeyboardInterrupt
            return super().generate(requests, progress)

    first, second, speaker = Killed(judge.say), reader(), talker()
    with pytest.raises(KeyboardInterrupt):
        run(place, files, first, speaker)
    again = run(place, files, second, speaker)
    for once, all_of_them in (
        (answerer.asked, speaker.asked),
        (judge.asked, first.asked + second.asked),
    ):
        assert sorted(r.key for r in all_of_them) == sorted(r.key for r in once)
    assert again.digest == whole.digest


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("alpaca_eval", {"prompts": "nowhere.json"}, "nowhere.json: there is no such file"),
        ("alpaca_eval", {"reference": "one.json"}, "no answer to instruction 2"),
        ("mt_bench", {"questions": "broken.jsonl"}, "broken.jsonl, row 1"),
        ("mt_bench", {"judge_prompts": "few.jsonl"}, "no judge prompt pair-v2"),
        ("mt_bench", {"against": "one.jsonl"}, r"one.jsonl: questions without an answer: \[82"),
        ("ifeval", {"prompts": "broken.jsonl"}, "broken.jsonl, row 1.*no instruction type"),
        ("ifeval", {"prompts": "hub:a:b:c:d"}, "no data set's name"),
    ],
)
def test_bad_files_end_with_one_message_before_anything_is_answered(
    place: Place,
    files: dict[str, Any],
    name: str,
    change: dict[str, str],
    named: str,
) -> None:
    Path("one.json").write_text(json.dumps(INSTRUCTIONS[:1]))
    lines("one.jsonl", answer_rows("other", lambda i: ("a", "b"))[:1])
    lines("broken.jsonl", [EXAMPLES[0] | {"instruction_id_list": ["punctuation:none"]}])
    few = {"name": "single-v1", "type": "single", "system_prompt": "s", "prompt_template": "t"}
    lines("few.jsonl", [few])
    with pytest.raises(UserError, match=named):
        run(place, {name: files[name] | change}, unasked_judge(), unasked_judge())


def test_another_file_is_another_fingerprint(place: Place, files: dict[str, Any]) -> None:
    chosen = {"ifeval": files["ifeval"]}
    first = run(place, chosen).fingerprint
    assert run(place, chosen).fingerprint == first
    lines("ifeval.jsonl", EXAMPLES[:1])
    assert run(place, chosen).fingerprint != first


def test_benchmarks_are_read_by_the_name_of_a_data_set(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` finds a folder by the same call as a name on the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (folder := tmp_path / "data").mkdir()
    (folder / "train.jsonl").write_text(Path(files["ifeval"]["prompts"]).read_text())
    for source in (f"hub:{folder}", f"hub:{folder}:train", f"hub:{folder}:default:train"):
        assert read_examples(source) == read_examples(files["ifeval"]["prompts"])
    with pytest.raises(UserError, match="cannot be loaded"):
        read_records(f"hub:{folder}:test", dict)


def test_a_part_of_a_benchmark_is_spread_over_all_of_it() -> None:
    assert spread(range(80), 8) == list(range(0, 80, 10))
    assert spread(range(5), 3) == [0, 1, 3]
    assert spread(range(5), 9) == spread(range(5), None) == [0, 1, 2, 3, 4]


def test_a_random_chat_model_goes_through_all_of_it(
    place: Place,
    files: dict[str, Any],
) -> None:
    """A real model answers; IFEval needs no judge, and judging by a real one ends as it must."""
    from tasks.evaluate import evaluate_stage
    from tasks.policies.opening import PolicySource

    source = place.source()
    real = PolicySource(source.settings, source.model, source.base_digest)
    chosen = {"ifeval": files["ifeval"]}
    settings = place.settings(judge="similarity", max_failed=1.0, benchmarks=chosen)
    done = evaluate_stage(place.at, settings, ScoreSettings(), real, place.held_out)
    assert set(figures(done, "ifeval")) >= {"ifeval/prompt_strict", "ifeval/instruction_loose"}
    assert len(done.read("ifeval-answers", Answer)) == 2
    judged = {"mt_bench": files["mt_bench"] | {"judge": place.judge()}}
    settings = place.settings(judge="similarity", max_failed=0.5, benchmarks=judged)
    with pytest.raises(UserError, match="failed"):
        evaluate_stage(place.at, settings, ScoreSettings(), real, place.held_out)


def test_what_is_chosen_and_who_judges() -> None:
    judge = {"kind": "pairwise", "policy": {"model": "m"}}
    own = judge | {"temperature": 0.5}
    chosen = BenchmarkSettings.model_validate(
        {"alpaca_eval": {"prompts": "a"}, "ifeval": {"prompts": "i", "judge": own}}
    )
    default = JudgeSettings.model_validate(judge)
    found = dict(chosen.judges(default))
    assert found["alpaca_eval"] == default
    assert found["ifeval"].temperature == 0.5 and found["ifeval"].rubric == "principle"


def test_every_benchmark_declares_what_it_asks_for() -> None:
    chosen = BenchmarkSettings.model_validate(
        {
            "mt_bench": {"questions": "q", "judge_prompts": "p", "against": "a", "limit": 3},
            "alpaca_eval": {"prompts": "a", "limit": 900},
            "ifeval": {"prompts": "i"},
        }
    )
    turns = {name: run.turns_asked for name, run in chosen.chosen.items()}
    assert turns == {"mt_bench": 6, "alpaca_eval": 805, "ifeval": 541}
    judge = JudgeSettings.model_validate({"kind": "pairwise", "policy": {"model": "m"}})
    asked = {name: run.judge_questions(judge) for name, run in chosen.chosen.items()}
    assert asked == {"mt_bench": (3, 1), "alpaca_eval": (2, 2), "ifeval": (2, 2)}
    assert dict(chosen.judges(judge, guided=False)).keys() == {"mt_bench", "alpaca_eval"}
    assert chosen.chosen["mt_bench"].sources == ["a", "p", "q"]
    assert [column.metric for column in columns()][:2] == ["mt_bench/score", "mt_bench/turn_2"]
