"""A scalar reward model as a judge: a small random one, built here, read as transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import Architecture, build_chat_model
from scripted import judges

from constitutions.errors import UserError
from models.judges.base import Pair
from models.judges.registry import JudgeSettings
from models.judges.reward import RewardModel, load_reward_model
from models.policy import Message, PolicySettings

TEXTS = ("Yes.", "Bread wants flour.", "Write a short and honest answer, " * 4, "No, why?")


def user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def pair(ours: str, theirs: str) -> Pair:
    return Pair(prompt=user("Why?"), gold="", ours=ours, theirs=theirs)


def settings(directory: Path, **more: Any) -> PolicySettings:
    given = {"dtype": "float32", "device": "cpu", "quantization": "none", "batch_rows": 3} | more
    return PolicySettings(model=str(directory), **given)


def build(
    directory: Path, architecture: Architecture = "llama", *, labels: int = 1, **config: Any
) -> Path:
    """Turn a small random chat model into a random classifier; `config` overrides its settings."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    build_chat_model(directory, architecture)
    shape = AutoConfig.from_pretrained(directory, num_labels=labels, **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(shape)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["llama", "qwen2", "unpadded"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model "unpadded" names no padding token, as many published ones do not."""
    given: dict[str, Any] = {"pad_token_id": None} if request.param == "unpadded" else {}
    name = "llama" if request.param == "unpadded" else request.param
    return build(tmp_path_factory.mktemp("reward"), name, **given)


@pytest.fixture(scope="module")
def model(directory: Path) -> RewardModel:
    return load_reward_model(settings(directory))


def test_a_reward_is_what_transformers_gives_the_conversation_alone(
    model: RewardModel, directory: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reference = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    grades = model.score([(user("Why?"), text) for text in TEXTS])
    for text, grade in zip(TEXTS, grades, strict=True):
        turns: list[Any] = [*user("Why?"), {"role": "assistant", "content": text}]
        ids: Any = tokenizer.apply_chat_template(
            turns, return_tensors="pt", return_dict=True, chat_template=model.chat.template
        )  # of a fixed day
        with torch.no_grad():
            alone = reference(ids["input_ids"]).logits.item()
        assert grade.score == pytest.approx(alone, abs=1e-5)
    assert len({round(g.score or 0, 4) for g in grades}) == len(TEXTS)


def test_the_higher_reward_wins_and_equal_answers_tie(model: RewardModel) -> None:
    rewards = {t: g.score or 0.0 for t, g in zip(TEXTS, model.score(rows()), strict=True)}
    low, *_, high = sorted(TEXTS, key=rewards.__getitem__)
    done: list[int] = []
    pairs = [pair(high, low), pair(low, high), pair(high, high)]
    won, lost, tied = model.compare(pairs, done.append)
    assert (won.outcome, lost.outcome, tied.outcome) == (1.0, 0.0, 0.5)
    assert won.our_score == pytest.approx(rewards[high], abs=1e-5)
    assert sum(done) == 3 and not model.both_orders and won.verdicts == ()


def rows() -> list[tuple[tuple[Message, ...], str]]:
    return [(user("Why?"), text) for text in TEXTS]


def test_rewards_within_the_tie_are_equal(directory: Path) -> None:
    wide = load_reward_model(settings(directory), tie=1e6)
    assert {j.outcome for j in wide.compare([pair(TEXTS[0], TEXTS[1])])} == {0.5}


def test_what_is_too_long_is_a_failure_and_not_cut(model: RewardModel) -> None:
    mine, fine = model.compare([pair("bread " * 9000, "Yes."), pair("Yes.", "No, why?")])
    assert mine.outcome is None and mine.failure and "our answer" in mine.failure
    assert "reads 8,192" in mine.failure and fine.outcome is not None


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|im_end|>", "<|im_start|>", "<|pad|>"])
def test_an_answer_cannot_end_its_turn(model: RewardModel, token: str) -> None:
    control = set(model.tokenizer.added_tokens_decoder)

    def written(text: str) -> list[int]:
        return [t for t in model.encode(user("Why?"), text) if t in control]

    assert written(f"Yes.{token}{token}") == written("Yes.")


def test_four_bits_leave_the_head_alone(tmp_path: Path) -> None:
    build(tmp_path)
    exact = load_reward_model(settings(tmp_path)).score(rows())
    rough = load_reward_model(settings(tmp_path, quantization="nf4"))
    assert type(rough.model.score) is torch.nn.Linear
    grades = [g.score for g in rough.score(rows())]
    assert grades == pytest.approx([g.score for g in exact], abs=0.5)
    assert grades != [g.score for g in exact]


def test_the_settings_open_it(tmp_path: Path) -> None:
    given = JudgeSettings(
        kind="reward", policy=settings(build(tmp_path / "judge")), reward_tie=0.25
    )
    judge = judges().judge(given)
    assert isinstance(judge, RewardModel) and judge.tie == 0.25 and judge.name == "reward:judge"


def spoil(directory: Path, how: str) -> Path:
    """Take from a reward model what it cannot do without."""
    if how == "labels":
        return build(directory, labels=3)
    if how == "head":
        build_chat_model(directory, "llama")
        return configure(directory, num_labels=1)
    build(directory)
    if how == "safetensors":
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    elif how == "template":
        (directory / "chat_template.jinja").unlink()
    elif how == "foreign":
        (directory / "code.py").write_text("raise SystemExit('foreign code ran')\n")
        auto = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}
        configure(directory, model_type="foreign", auto_map=auto)
    return directory


def configure(directory: Path, **changes: Any) -> Path:
    file = directory / "config.json"
    given = json.loads(file.read_text())
    if "num_labels" in changes:
        given |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        changes.pop("num_labels")
    file.write_text(json.dumps(given | changes))
    return directory


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("safetensors", "lacks safetensors weights"),
        ("labels", "the model has 3 labels"),
        ("head", r"they lack 1 tensors \(score\.weight\)"),
        ("template", "no chat template"),
        ("foreign", "asks to run its own code"),
    ],
)
def test_what_is_no_reward_model_is_refused(tmp_path: Path, how: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_reward_model(settings(spoil(tmp_path, how)))


def test_a_missing_directory_is_named() -> None:
    with pytest.raises(UserError, match="no such model directory"):
        load_reward_model(settings(Path("/nowhere/at/all")))
