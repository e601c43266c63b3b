"""The planted world: what it generates, what the oracle reads back, and its seed model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from constitutions.errors import UserError
from models import prompts
from models.planted import oracle, pretrain, world
from models.policy import Messages

TINY = pretrain.Recipe(
    hidden=32, layers=1, heads=2, intermediate=64, words=64, clean=64, noisy=64, rows=16
)


def pairs(example: world.PlantedExample) -> set[tuple[str, str]]:
    """The (chore's behaviour, circumstance's behaviour) pairs that an example combines."""
    chore = next(b for verbs, b in world.CHORES.items() if example.chore.verb in verbs)
    return {(chore, other) for other in example.needed - {chore}}


def user(text: str) -> Messages:
    return ({"role": "user", "content": text},)


def test_the_world_is_fair() -> None:
    assert len(world.BEHAVIOURS) >= 24
    assert len(world.TRUTH) >= 12
    assert set(world.BEHAVIOURS) - world.TRUTH, "some behaviours are never called for"
    assert set(world.MISTAKEN) == set(world.MISTAKEN.values()) == world.TRUTH
    assert all(called != mistaken for called, mistaken in world.MISTAKEN.items())
    for behaviour in world.BEHAVIOURS.values():
        assert len(behaviour.wordings) >= 3
        assert len(behaviour.forms) >= 2
    sizes = {len(e.needed) for e in world.sample_examples(200, 0)}
    assert sizes == {2, 3}


def test_examples_are_distinct_and_depend_on_the_seed_alone() -> None:
    examples = world.sample_examples(300, 5)
    assert len({e.prompt for e in examples}) == 300
    assert examples == world.sample_examples(300, 5)
    assert examples[:100] == world.sample_examples(100, 5), "a longer sample starts like a shorter"
    assert examples != world.sample_examples(300, 6)


def test_training_and_evaluation_prompts_are_about_different_things() -> None:
    train, evaluation = (
        {
            (e.chore.topic, e.chore.adjective, e.chore.part)
            for e in world.sample_examples(1500, 0, split, "any")
        }
        for split in ("train", "eval")
    )
    assert not train & evaluation


def test_held_combinations_are_never_mined() -> None:
    seen = set().union(*(pairs(e) for e in world.sample_examples(2000, 0, "train", "seen")))
    held = set().union(*(pairs(e) for e in world.sample_examples(2000, 0, "eval", "held")))
    assert held
    assert not seen & held
    assert {b for pair in seen for b in pair} == world.TRUTH


def test_more_prompts_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_contents", lambda split: [("lamp", "red", "cable")])
    assert len(world.sample_examples(500, 0, "eval", "held")) == 500
    with pytest.raises(ValueError, match="distinct eval prompts"):
        world.sample_examples(50_000, 0, "eval", "held")
    with pytest.raises(ValueError, match="up to 200,000"):  # at once
        world.sample_examples(10**12, 0)


def test_the_oracle_reads_the_truth_back() -> None:
    for example in world.sample_examples(500, 1, "eval", "any"):
        assert oracle.needed(example.prompt) == example.needed == oracle.shown(example.gold)
        assert oracle.core_share(example.prompt, example.gold) == 1
        assert oracle.score(example.prompt, example.gold) == len(example.needed)
        assert oracle.score(example.prompt, example.chore.core) == 0


def test_the_oracle_reads_every_form_and_wording() -> None:
    rng = random.Random(0)
    core = world.sample_examples(1, 0)[0].chore.core
    for _ in range(300):
        chosen = set(rng.sample(list(world.BEHAVIOURS), rng.randrange(5)))
        assert oracle.shown(world.realise(rng, core, chosen)) == chosen
    for name in world.BEHAVIOURS:
        assert oracle.behaviour_of(world.principle(rng, name)) == name
    assert oracle.behaviour_of("be nice about time") is None
    assert oracle.behaviour_of(world.platitude(rng)) is None


def test_spurious_behaviours_and_a_damaged_core_cost() -> None:
    example = world.sample_examples(1, 2)[0]
    other = min(set(world.BEHAVIOURS) - example.needed)
    spurious = world.realise(random.Random(0), example.chore.core, [other])
    assert oracle.score(example.prompt, spurious) == -0.5
    assert oracle.score(example.prompt, example.chore.core.split(" via ")[0]) == -1
    assert oracle.score(example.prompt, "") == -2


@pytest.mark.parametrize("text", ["what is the capital of france?", "", "repair wash the printer."])
def test_the_oracle_refuses_other_prompts(text: str) -> None:
    with pytest.raises(UserError, match="no prompt of the planted world"):
        oracle.score(text, "anything")


def test_adding_a_needed_behaviour_raises_rouge_and_adding_another_does_not() -> None:
    """Else rejection sampling could not tell right principles from wrong ones."""
    from tasks.similarity.rouge import rouge_l

    rng = random.Random(3)
    right, wrong, before, golds = [], [], [], []
    for example in world.sample_examples(400, 3):
        others = sorted(set(world.BEHAVIOURS) - example.needed)
        core = example.chore.core
        right.append(world.realise(rng, core, [rng.choice(sorted(example.needed))]))
        wrong.append(world.realise(rng, core, [rng.choice(others)]))
        before.append(core)
        golds.append(example.gold)
    base, good, bad = (rouge_l(texts, golds) for texts in (before, right, wrong))
    assert sum(g > b for g, b in zip(good, base, strict=True)) > 0.98 * 400
    assert sum(g > b for g, b in zip(bad, base, strict=True)) < 0.03 * 400


def test_the_tokenizer_keeps_every_text_of_the_world() -> None:
    tokenizer = pretrain.build_tokenizer()
    texts = [*world.principles(), *(e.prompt for e in world.sample_examples(200, 0))]
    texts += [prompts.TERSE.hint.format(gold=e.gold) for e in world.sample_examples(200, 1)]
    texts += [world.platitude(random.Random(i)) for i in range(50)]
    texts += [prompts.TERSE.propose, prompts.TERSE.critique, prompts.TERSE.refine]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_pretraining_sees_the_chat_template_of_the_method() -> None:
    """The rows that the model learns from are what inference later renders."""
    tokenizer: Any = pretrain.build_tokenizer()
    encode = pretrain.RowEncoder(tokenizer)
    kinds = set()
    for turns in pretrain.conversations(replace(TINY, words=0), seed=0):
        ids, weights = encode(turns)
        chat = [{"role": turn.role, "content": turn.text} for turn in turns]
        assert ids == tokenizer.apply_chat_template(chat)["input_ids"]
        assert len(weights) == len(ids)
        assert weights[-1] == TINY.decisive, "every conversation ends in what it teaches"
        kinds.add(turns[2].text.split()[0])
    assert kinds == {"better:", "why?", "again."}


def test_a_critique_says_where_the_principle_belongs() -> None:
    asked = prompts.TERSE.critique
    taught = list(pretrain.conversations(replace(TINY, words=0, clean=400, critiques=0.5), 0))
    critiqued = [turns for turns in taught if any(t.text == asked for t in turns)]
    assert 0.1 * len(taught) < len(critiqued) < 0.3 * len(taught)
    for turns in critiqued:
        at = next(i for i, t in enumerate(turns) if t.text == asked)
        named = oracle.behaviour_of(turns[at - 1].text)
        expected = {None: "elsewhere."} | {
            b.name: pretrain.CRITIQUES[b.opens] for b in world.BEHAVIOURS.values()
        }
        assert turns[at + 1].text == expected[named] and turns[at + 1].weight > 0
        assert turns[at + 2].text == prompts.TERSE.refine
    plain = pretrain.conversations(replace(TINY, clean=400), 0)
    assert not any(t.text == asked for turns in plain for t in turns)


def test_chat_template_renders_system_turns_and_asks_for_an_answer() -> None:
    tokenizer = pretrain.build_tokenizer()
    chat = [{"role": "system", "content": "be polite."}, {"role": "user", "content": "why?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>be polite.<|user|>why?<|assistant|>"


def test_planted_model_is_an_ordinary_directory_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "Recipe", lambda: TINY)
    steps: list[tuple[int, int]] = []
    directory = pretrain.planted_model(tmp_path, 3, lambda done, of: steps.append((done, of)))
    assert steps[-1] == (TINY.steps, TINY.steps)
    assert [p.name for p in tmp_path.iterdir()] == [directory.name], "nothing unfinished is left"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template == pretrain.CHAT_TEMPLATE
    assert pretrain.planted_model(tmp_path, 3, lambda *_: pytest.fail("trained again")) == directory
    assert pretrain.planted_model(tmp_path, 4) != directory


def test_a_damaged_model_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "Recipe", lambda: TINY)
    directory = pretrain.planted_model(tmp_path, 3)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
        weights.write_bytes(damage)
        assert pretrain.planted_model(tmp_path, 3) == directory
        assert weights.read_bytes() == whole
        assert f"{directory} was damaged; the model is made again" in capsys.readouterr().err
    pretrain.planted_model(tmp_path, 3)
    assert capsys.readouterr().err == ""


def test_an_interrupted_pretraining_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "Recipe", lambda: TINY)

    def stop(done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.planted_model(tmp_path, 0, stop)
    assert list(tmp_path.iterdir()) == []


def test_pretraining_is_reproducible_and_learns(tmp_path: Path) -> None:
    recipe = replace(TINY, words=0, clean=1600, noisy=0, hidden=48)
    weights = []
    for name in ("first", "second"):
        pretrain.pretrain(recipe, 0, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        weights.append(model.get_input_embeddings().weight.detach())  # type: ignore[operator]
    assert torch.equal(*weights)
    assert _loss(model, recipe) < 0.7 * _loss(_untrained(recipe), recipe)


def _untrained(recipe: pretrain.Recipe) -> torch.nn.Module:
    return pretrain.build_model(recipe, pretrain.build_tokenizer(), 0)


@torch.no_grad()
def _loss(model: torch.nn.Module, recipe: pretrain.Recipe) -> float:
    """Mean cross-entropy of fresh conversations (another seed than the training's)."""
    encode = pretrain.RowEncoder(pretrain.build_tokenizer())
    losses = []
    for turns in list(pretrain.conversations(recipe, seed=99))[:40]:
        ids = torch.tensor([encode(turns)[0]])
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(losses) / len(losses)
