"""The train stage on a small random chat model: from labelled trajectories to an adapter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from chat_model import build_chat_model
from pydantic import ValidationError

from constitutions.errors import UserError
from models.policy import PolicySettings
from models.prompts import CHAT, ask_refinement
from tasks.rows import Labelled, Prompt
from tasks.train import (
    Training,
    TrainingSet,
    TrainResult,
    TrainSettings,
    conversations_of,
    demonstrations,
    encode,
    train,
    training_conversation,
)

POLICY = PolicySettings(templates="chat", quantization="nf4", dtype="float32", device="cpu")
SETTINGS = TrainSettings(learning_rate=1e-2, epochs=4, batch_size=4, lora_rank=8, max_tokens=700)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model"), "qwen2")


def labelled(number: int, **changes: Any) -> Labelled:
    values: dict[str, Any] = {
        "prompt_id": f"id{number}",
        "prompt": (
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Printer {number} is broken."},
        ),
        "gold": "gold",
        "source": f"prompts.jsonl:{number}",
        "sample": 1,
        "initial": "No idea.",
        "principle": "Tell what to do next.",
        "refined": "Restart the printer.",
        "initial_score": 0.1,
        "score": 0.4,
        "weight": 1.0,
        "label": "Say the next step.",
        "cluster": 0,
        "replaced": True,
    }
    return Labelled(**{**values, **changes})


ROWS = [labelled(i) for i in range(8)]


def run(model: Path, out: Path, rows: list[Labelled], **changes: Any) -> TrainResult:
    previous = changes.pop("previous_adapter", None)
    policy = changes.pop("policy", POLICY)
    progress = changes.pop("progress", None)
    settings = SETTINGS.model_copy(update=changes)
    training = Training(
        model=model, policy=policy, previous_adapter=previous, out=out, settings=settings, seed=0
    )
    encoder = training.encoder()
    asked = [each for row in rows for each in conversations_of(row, CHAT, settings)]
    encoded = [encode(each, encoder) for each in asked]
    with tempfile.TemporaryDirectory() as folder:
        return train(TrainingSet.of(encoded, Path(folder) / "examples.arrow"), training, progress)


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    out = tmp_path_factory.mktemp("first") / "adapter"
    return out, run(model, out, ROWS)


def test_an_adapter_and_its_curve_come_out(first: tuple[Path, TrainResult], model: Path) -> None:
    out, result = first
    assert (out / "adapter_model.safetensors").is_file()
    record = json.loads((out / "provenance.json").read_text())
    assert record["data_digest"] == result.data_digest and record["quantization"] == "nf4"
    assert result.counts["lessons"] == result.counts["trained"] == 8 and not result.skipped
    assert result.counts["steps"] == len(result.curve) == 8
    assert result.curve[-1].loss < 0.8 * result.curve[0].loss
    assert [p.name for p in out.parent.iterdir()] == ["adapter"]


def test_the_next_iteration_continues_the_adapter(
    first: tuple[Path, TrainResult], model: Path, tmp_path: Path
) -> None:
    previous, result = first
    second = run(model, tmp_path / "adapter", ROWS, previous_adapter=previous)
    assert second.curve[0].loss < 0.85 * result.curve[0].loss
    assert second.curve[-1].loss < second.curve[0].loss


def test_the_label_is_trained_not_the_original_principle() -> None:
    messages = training_conversation(ROWS[0], ROWS[0].label, CHAT, SETTINGS).messages
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    assert contents == ["No idea.", "Say the next step.", "Restart the printer."]
    assert not any("gold" in m["content"] for m in messages)


@pytest.mark.parametrize(
    ("loss_on", "texts"),
    [
        (("principle", "refined"), ["Say the next step.", "Restart the printer."]),
        (("refined",), ["Restart the printer."]),
        (("refined", "initial"), ["No idea.", "Restart the printer."]),
    ],
)
def test_loss_on_names_the_trained_turns(model: Path, loss_on: Any, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    from models.training.encoding import Encoder

    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = SETTINGS.model_copy(update={"loss_on": loss_on})
    row = labelled(1, weight=0.3)
    found = encode(training_conversation(row, row.label, CHAT, settings), Encoder(tokenizer, 700))
    (example,) = found.examples
    trained = [i for i, t in zip(example.ids, example.trained, strict=True) if t]
    assert tokenizer.decode(trained) == "".join(t + "<|im_end|>" for t in texts)
    assert example.weight == 0.3


def test_without_principles_the_loss_is_on_the_refinement_alone() -> None:
    found = training_conversation(ROWS[0], ROWS[0].principle, CHAT.unguided(), SETTINGS)
    assert [m["content"] for m in found.messages if m["role"] == "assistant"] == [
        "No idea.",
        "Restart the printer.",
    ]
    assert [found.messages[turn]["content"] for turn in found.turns] == ["Restart the printer."]
    assert not any(ROWS[0].principle in m["content"] for m in found.messages)


def test_first_answers_learn_the_refinement_where_they_are_asked_to() -> None:
    """Of the prompt alone: no word of y1, of the principle or of the gold."""
    row = labelled(1, weight=0.3)
    (usual,) = conversations_of(row, CHAT, SETTINGS)
    changes = {"first_answer": "refined", "first_answer_weight": 0.5}
    same, first = conversations_of(row, CHAT, SETTINGS.model_copy(update=changes))
    assert same == usual
    assert first.messages == (*row.prompt, {"role": "assistant", "content": row.refined})
    assert first.turns == (len(row.prompt),) and first.weight == pytest.approx(0.15)


def test_first_answers_are_distilled_from_the_policy_under_the_label() -> None:
    """The label is what a person may have edited; y1 is what the policy says unprompted."""
    row = labelled(1, weight=0.3, label="Edited by a person.")
    how = SETTINGS.model_copy(update={"first_answer": "distilled", "first_answer_weight": 0.5})
    _, kept, own = conversations_of(row, CHAT, how)
    for found, text in ((kept, row.refined), (own, row.initial)):
        assert found.messages == (*row.prompt, {"role": "assistant", "content": text})
        assert found.teacher == ask_refinement(CHAT, row.prompt, row.initial, row.label)
        assert found.weight == pytest.approx(0.15)


def test_a_distilled_answer_is_tokenised_after_both_prompts(model: Path) -> None:
    from transformers import AutoTokenizer

    from models.training.encoding import Encoder

    tokenizer = AutoTokenizer.from_pretrained(model)
    how = SETTINGS.model_copy(update={"first_answer": "distilled"})
    _, kept, own = conversations_of(labelled(1), CHAT, how)
    (example,) = encode(kept, Encoder(tokenizer, 700)).examples
    student, teacher = (str(tokenizer.decode(list(e.ids))) for e in (example, example.teacher))
    assert student.endswith("Restart the printer.<|im_end|>")
    assert "Say the next step." in teacher and "Say the next step." not in student
    for each in (example, example.teacher):
        learned = [i for i, t in zip(each.ids, each.trained, strict=True) if t]
        assert tokenizer.decode(learned) == "Restart the printer.<|im_end|>"
    assert example.tokens == len(example.ids) + len(example.teacher.ids)
    (refused,) = encode(own, Encoder(tokenizer, len(example.ids))).skipped
    assert "more than max_tokens" in refused.detail, "the teacher's prompt is the longer one"


def test_only_an_adapter_is_distilled() -> None:
    with pytest.raises(ValidationError, match="update: lora"):
        TrainSettings(first_answer="distilled", update="full")


@pytest.mark.parametrize("way", ["refined", "distilled"])
def test_first_answers_that_learned_are_likelier(
    way: str, model: Path, first: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    """log p(y2 | x) rises beyond what the method's own examples give it: the policy that goes on
    knows y2 from its principle already, so that there is something to distil."""
    from models.engine.local import load_policy

    pairs = [(row.prompt, row.refined) for row in ROWS]
    means = []
    for how in ("none", way):
        run(model, tmp_path / how, ROWS, first_answer=how, previous_adapter=first[0])
        scored = load_policy(POLICY, model, tmp_path / how).logprobs(pairs)
        means.append(sum(s.logprob for s in scored))
    assert means[1] > 0.7 * means[0]


def test_a_demonstration_is_the_prompt_and_one_of_its_golds() -> None:
    row = ROWS[0]
    prompt = Prompt(
        prompt_id="p", prompt=row.prompt, gold="A.", other_golds=("B.",), source="prompts.jsonl:1"
    )
    found = demonstrations(prompt)
    assert [each.messages[:-1] for each in found] == [row.prompt, row.prompt]
    assert [each.messages[-1] for each in found] == [
        {"role": "assistant", "content": text} for text in ("A.", "B.")
    ]
    assert all(each.turns == (len(row.prompt),) for each in found)


@pytest.mark.parametrize("budget", [90, 1_000])
def test_a_budget_of_tokens_decides_the_steps(model: Path, tmp_path: Path, budget: int) -> None:
    result = run(model, tmp_path / "adapter", ROWS, epochs=1, tokens=budget)
    step = result.curve[0].tokens
    assert abs(result.curve[-1].tokens - budget) <= max(step, budget - step if budget < step else 0)
    assert result.counts["tokens"] == result.curve[-1].tokens
    assert result.counts["steps"] == len(result.curve)


def test_what_cannot_be_trained_on_is_reported_and_counted(model: Path, tmp_path: Path) -> None:
    rows = [
        *ROWS[:3],
        labelled(8, refined="very " * 500, sample=2),
        labelled(9, label="say <|im_end|>"),  # stays text
    ]
    result = run(model, tmp_path / "adapter", rows, epochs=1)
    counts = result.counts
    assert (counts["lessons"], counts["trained"], counts["skipped"]) == (5, 4, 1)
    (long,) = result.skipped
    assert (long.prompt_id, long.sample, long.source) == ("id8", 2, "prompts.jsonl:8")
    assert "more than max_tokens" in long.detail


def test_nothing_to_train_on_is_the_users_to_mend(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trajectories"):
        run(model, tmp_path / "adapter", [])
    with pytest.raises(UserError, match=r"prompts.jsonl:0: none of the 8 .*max_tokens"):
        run(model, tmp_path / "adapter", ROWS, max_tokens=16)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_refused(
    first: tuple[Path, TrainResult], model: Path, tmp_path: Path
) -> None:
    other = build_chat_model(tmp_path / "other", "qwen2", seed=5)
    with pytest.raises(UserError, match="another base model"):
        run(other, tmp_path / "adapter", ROWS, previous_adapter=first[0])
    exact = POLICY.model_copy(update={"quantization": "none"})
    with pytest.raises(UserError, match="another quantisation"):
        run(model, tmp_path / "adapter", ROWS, previous_adapter=first[0], policy=exact)


def test_the_same_call_gives_the_same_bytes(
    first: tuple[Path, TrainResult], model: Path, tmp_path: Path
) -> None:
    again = run(model, tmp_path / "adapter", ROWS)
    assert again == first[1]
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (first[0] / name).read_bytes()


def test_a_training_killed_at_a_step_leaves_no_adapter(model: Path, tmp_path: Path) -> None:
    def kill(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "adapter", ROWS, progress=kill)
    assert not (tmp_path / "adapter").exists()
