"""A scalar reward model as a judge: the answer with the higher reward wins.

A sequence-classification model with one label reads a prompt and a response in its chat template.
Its scores are unbounded and only comparable within one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from constitutions.errors import UserError
from constitutions.foreign_text import control_strings, disarm
from models.chat import Chat
from models.engine import threads
from models.judges.base import (
    Grade,
    Judge,
    Judgement,
    KindSettings,
    Pair,
    Resources,
    decide,
    per_pair,
)
from models.policy import Message, PolicySettings, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Conversation = tuple[tuple[Message, ...], str]
"""A prompt and the response to it."""


class RewardSettings(KindSettings):
    """How rewards are compared."""

    reward_tie: float = Field(default=1e-4, ge=0)
    """Rewards nearer than this are equal."""


def load_reward_model(settings: PolicySettings, *, tie: float = 1e-4) -> RewardModel:
    """The reward model that the settings name, from safetensors, without running foreign code.

    Raises:
        UserError: no model there, no safetensors weights, more than one label, no trained head
            for the label, or a tokenizer without a chat template.
    """
    from models.training.bases import find_base  # torch

    directory = find_base(settings.model, settings.revision)
    model, tokenizer = _load(directory, settings)
    threads.use(settings.threads)
    name = settings.model.rstrip("/").rsplit("/", 1)[-1]
    chat = Chat(tokenizer, settings)
    rows = settings.batch_rows or 64
    return RewardModel(model, tokenizer, chat=chat, name=name, tie=tie, batch_rows=rows)


def _load(
    directory: Path, settings: PolicySettings
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        _check_labels(config, settings.model)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            directory,
            config=config,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_placement(settings),
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the reward model cannot be loaded: {(str(error).splitlines() or ['?'])[0]}",
            where=settings.model,
            expected="a sequence-classification model that transformers knows",
        ) from error
    _check_head(loading["missing_keys"], settings.model)
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template",
            where=settings.model,
            expected="a reward model that reads conversations",
        )
    return model.eval(), tokenizer


def _placement(settings: PolicySettings) -> dict[str, Any]:
    import torch

    from models.training.bases import nf4_config

    wanted = settings.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    placed: dict[str, Any] = {"device_map": "auto" if wanted == "cuda" else {"": "cpu"}}
    if settings.quantization == "nf4":  # of all linear layers but the head
        placed["quantization_config"] = nf4_config(getattr(torch, settings.dtype))
    return placed


def _check_labels(config: Any, where: str) -> None:
    if config.num_labels != 1:
        raise UserError(
            f"the model has {config.num_labels} labels",
            where=where,
            expected="a scalar reward model: a sequence classifier with one label",
        )


def _check_head(missing: Sequence[str], where: str) -> None:
    """transformers fills missing weights with random ones, and only warns."""
    if missing:
        raise UserError(
            f"weights are missing ({', '.join(sorted(missing)[:3])})",
            where=where,
            expected="a trained reward model, not a language model without the head",
        )


class RewardModel(Judge):
    """A scalar reward model as a judge. Rewards within `tie` of each other are equal."""

    kind = "reward"
    needs_model = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: Chat,
        name: str,
        tie: float,
        batch_rows: int,
    ) -> None:
        self.model, self.tokenizer, self.tie, self.batch_rows = model, tokenizer, tie, batch_rows
        self.chat, self.name = chat, f"reward:{name}"
        self.context = int(getattr(model.config, "max_position_embeddings", 1 << 30))
        self._control = control_strings(tokenizer)
        self._pad_given = model.config.pad_token_id

    @classmethod
    def title(cls, settings: RewardSettings) -> str:
        """See `Judge.title`."""
        return f"{cls.kind}:{settings.model_name}"

    @classmethod
    def open(cls, settings: RewardSettings, given: Resources) -> RewardModel:
        """See `Judge.open`."""
        assert settings.policy is not None, "its settings see to it"
        return load_reward_model(settings.policy, tie=settings.reward_tie)

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """See `Judge.compare`."""
        rows = [(p.prompt, answer) for p in pairs for answer in (p.ours, p.theirs)]
        grades = iter(self.score(rows, per_pair(advance, len(pairs), len(rows))))
        return [decide(next(grades), next(grades), self.tie) for _ in pairs]

    def score(self, rows: Sequence[Conversation], progress: Progress | None = None) -> list[Grade]:
        """The reward of each response, on an unbounded scale, or None with the reason.

        A conversation that is longer than the model's context is not cut: half an answer would be
        judged. Like conversations share a batch and one reward; `progress` counts rows.
        """
        ids = [tuple(self.encode(prompt, response)) for prompt, response in rows]
        rewards: dict[tuple[int, ...], Grade] = {}
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self.batch_rows):
            batch = order[start : start + self.batch_rows]
            new = sorted({ids[i] for i in batch} - rewards.keys(), key=len)
            fitting = [row for row in new if len(row) <= self.context]
            rewards |= {row: self._too_long(row) for row in new}
            rewards |= dict(zip(fitting, self._rewards(fitting), strict=True))
            if progress:
                progress(len(batch))
        return [rewards[row] for row in ids]

    def encode(self, prompt: Sequence[Message], response: str) -> list[int]:
        """Token ids of the conversation; control tokens in its texts are broken (`disarm`)."""
        turns: list[Message] = [*prompt, {"role": "assistant", "content": response}]
        safe = [{**t, "content": disarm(t["content"], self._control)} for t in turns]
        text = cast(Any, self.tokenizer).apply_chat_template(
            safe, tokenize=False, chat_template=self.chat.template, **self.chat.arguments
        )
        return list(self.tokenizer(cast(str, text), add_special_tokens=False)["input_ids"])

    def _too_long(self, row: tuple[int, ...]) -> Grade:
        return Grade(None, f"{len(row):,} tokens, and the reward model reads {self.context:,}")

    def _rewards(self, rows: Sequence[tuple[int, ...]]) -> list[Grade]:
        import torch

        if not rows:
            return []
        pad, width = self._pad(rows), max(map(len, rows))
        tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = self.model.device
        with torch.inference_mode():
            logits = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
        return [Grade(float(reward)) for reward in logits.squeeze(-1).float()]

    def _pad(self, rows: Sequence[tuple[int, ...]]) -> int:
        """The padding token: a decoder pools the last token that is another one.

        Where the model names none, a token that no row has: any other could cut a row short.
        """
        if self._pad_given is None:
            used = {token for row in rows for token in row}
            self.model.config.pad_token_id = next(t for t in count() if t not in used)
        return int(cast(int, self.model.config.pad_token_id))
