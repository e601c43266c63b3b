"""The judge "reward": a scalar reward model, for which the answer with the higher reward wins.

A sequence-classification model with one label reads a prompt and a response in its chat template.
Its rewards are unbounded, and comparable only among themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
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
    """Rewards that differ by at most this much are a tie."""


def load_reward_model(settings: PolicySettings, *, tie: float = 1e-4) -> RewardModel:
    """The reward model that the settings name, from safetensors, without running foreign code.

    Raises:
        UserError: there is no such model, it has no safetensors weights, more than one label, no
            trained head for the label, or a tokenizer without a chat template.
    """
    from transformers import AutoModelForSequenceClassification

    from models.training.bases import load_tokenizer, load_weights

    tokenizer = load_tokenizer(settings.model, settings.revision)
    model = load_weights(AutoModelForSequenceClassification, settings.model, **settings.loading)
    if model.config.num_labels != 1:
        raise UserError(
            f"the model has {model.config.num_labels} labels",
            where=settings.model,
            expected="a scalar reward model: a sequence classifier with one label",
        )
    threads.use(settings.threads)
    return RewardModel(
        model.eval(),
        tokenizer,
        chat=Chat(tokenizer, settings),
        name=settings.model.rstrip("/").rsplit("/", 1)[-1],
        tie=tie,
        batch_rows=settings.batch_rows or 64,
    )


class RewardModel(Judge):
    """A scalar reward model as a judge; rewards that differ by at most `tie` are a tie."""

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
        assert settings.policy is not None, "JudgeSettings refuses it otherwise"
        return load_reward_model(settings.policy, tie=settings.reward_tie)

    def compare(self, pairs: Sequence[Pair], advance: Progress | None = None) -> list[Judgement]:
        """See `Judge.compare`."""
        rows = [(p.prompt, answer) for p in pairs for answer in (p.ours, p.theirs)]
        grades = iter(self.score(rows, per_pair(advance, len(pairs), len(rows))))
        return [decide(next(grades), next(grades), self.tie) for _ in pairs]

    def score(self, rows: Sequence[Conversation], progress: Progress | None = None) -> list[Grade]:
        """The reward of each response, on an unbounded scale, or None with the reason.

        A conversation that is longer than the model's context gets none: it is not cut, because the
        model would then judge half an answer. Equal conversations get the same reward. `progress`
        counts rows.
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
        """The padding token: a decoder's reward is read at the last token that is not padding.

        Where the model names none, it is a token that occurs in no row: any other could end a row
        too early.
        """
        if self._pad_given is None:
            used = {token for row in rows for token in row}
            self.model.config.pad_token_id = next(t for t in count() if t not in used)
        return int(cast(int, self.model.config.pad_token_id))
