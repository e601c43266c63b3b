"""A policy in process: a transformers model directory, optionally NF4, with one LoRA adapter.

`load_policy` in this module is what the stages call. Conversations become tokens in
`models/chat.py`; `models/engine/exact.py` opens the engine that samples from the model exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from constitutions.errors import UserError
from models.chat import Chat, ChatError
from models.engine import threads
from models.engine.base import Engine, Sample, free_bytes
from models.engine.exact import open_engine
from models.policy import (
    NO_ANSWER,
    Completion,
    Messages,
    PolicySettings,
    Progress,
    Request,
    Scoring,
)
from models.thoughts import SplitText
from models.training.bases import attach_adapter, load_base

STATES = 1 << 15
"""Tokens in one pass for hidden states, padding included."""


def load_policy(settings: PolicySettings, model: Path | str, adapter: Path | None) -> LocalPolicy:
    """The policy of an iteration: the base model and, from iteration 1 on, its adapter.

    On a CPU the NF4 base is dequantised and the adapter merged into the fp32 copy: the same
    function up to rounding, without unpacking four-bit weights at every token. On a GPU it is
    dequantised where its 16 bits take at most half of the free memory, for the same reason.
    """
    threads.use(settings.threads)
    base, tokenizer = load_base(
        model,
        quantization=settings.quantization,
        dtype=settings.dtype,
        device=settings.device,
        revision=settings.revision,
    )
    on_cpu = base.device.type == "cpu"
    digest = f"{cast(Any, base).identity.base_digest} {settings.quantization}"
    if adapter and on_cpu:
        held = attach_adapter(base, adapter, merge=True)
    else:
        whole = settings.quantization == "nf4" and (on_cpu or _has_room(base))
        held = cast(Any, base).dequantize() if whole else base
        held = attach_adapter(held, adapter) if adapter else held
    return LocalPolicy(held.eval(), tokenizer, settings, digest)


def _has_room(base: PreTrainedModel) -> bool:
    """Whether the 4-bit base, dequantised, leaves at least half of the free memory to the rows."""
    whole = base.num_parameters() * base.dtype.itemsize
    return whole <= free_bytes(base.device) / 2


class LocalPolicy:
    """`Policy` over a transformers causal language model and its chat template.

    Args:
        settings: the engine, how many samples it decodes together, which chat template is used and
            what it is told, and what stands around thoughts.
        digest: of the model's files, by which the check of the engine is remembered.

    Raises:
        UserError: no engine, or not the one asked for, gives the numbers of a plain forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: PolicySettings | None = None,
        digest: str | None = None,
    ) -> None:
        self.settings, self._digest = settings or PolicySettings(), digest
        self.model, self.tokenizer = model, tokenizer
        self.chat = Chat(tokenizer, self.settings)
        self.thought_tokens = self.settings.thought_tokens if self.chat.tags else 0
        self.stop = self.chat.stop_tokens | _stop_tokens(model, tokenizer)
        self.context = int(getattr(model.config, "max_position_embeddings", 1 << 30))
        self._attention = model.config._attn_implementation
        self.decoder = self._open(self.settings.batch_rows)

    def _open(self, rows: int | None) -> Engine:
        return open_engine(
            self.model,
            self.stop,
            rows,
            self._spell,
            choice=self.settings.engine,
            special=self.tokenizer.all_special_ids,
            digest=self._digest,
        )

    def use(self, adapter: Path | None) -> None:
        """Answer with another adapter, or with none, on the same base, which stays in memory.

        Raises:
            ValueError: the last adapter was merged into the base, as on CPUs.
            UserError: the adapter is of another base.
        """
        base = cast(Any, self.model)
        if hasattr(base, "peft_config"):
            base = base.unload()
        if not hasattr(base, "identity"):
            raise ValueError("an adapter was merged into this base")
        base.set_attn_implementation(self._attention)
        self.model = (attach_adapter(base, adapter) if adapter else base).eval()
        self.decoder = self._open(self.decoder.rows)

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See `Policy.generate`. A prompt that leaves no room for `max_tokens` is "overflow", one
        that the chat template will not take (two user turns in a row, say) "refused".

        Raises:
            UserError: the model's logits are finite for none of the requests.
        """
        requests = [self._with_room(request) for request in requests]
        prompts = [self._prompt(request) for request in requests]
        fitting = [i for i, prompt in enumerate(prompts) if isinstance(prompt, list)]
        answers: list[list[Completion | None]] = [
            [None if isinstance(prompt, list) else prompt] * request.n
            for request, prompt in zip(requests, prompts, strict=True)
        ]

        inside = {i: self._opened(requests[i], cast("list[int]", prompts[i])) for i in fitting}

        def ended(sample: Sample) -> None:
            owner = fitting[sample.request]
            opened = inside[owner]
            answers[owner][sample.number] = self._completion(sample, requests[owner], opened)
            if progress and None not in answers[owner]:
                progress(1)

        if progress and len(fitting) < len(requests):
            progress(len(requests) - len(fitting))
        asked = [cast("list[int]", prompts[i]) for i in fitting]
        self.decoder.sample(asked, [requests[i] for i in fitting], ended)
        done = [[c for c in some if c is not None] for some in answers]
        self._check_finite([c for i in fitting for c in done[i]])
        return done

    def logprobs(self, pairs: Sequence[tuple[Messages, str]]) -> list[Scoring]:
        """See `Policy.logprobs`. The response is tokenised as training has it, its end included."""
        scored = self.decoder.score([self.chat.answered(*pair) for pair in pairs])
        return [Scoring(logprob=sum(steps), tokens=len(steps)) for steps in scored]

    @torch.inference_mode()
    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        """See `Policy.hidden_states`."""
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] or [0] for text in texts]
        found: dict[int, np.ndarray] = {}
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
        while order:
            rows = max(1, STATES // len(ids[order[0]]))
            part, order = order[:rows], order[rows:]
            found |= zip(part, self.decoder.states([ids[i] for i in part]), strict=True)
        return np.stack([found[i] for i in range(len(ids))])

    def _with_room(self, request: Request) -> Request:
        """The request with room for thoughts, and with the end of a turn that no token is."""
        if isinstance(request.messages, str):
            return request
        room, ends = request.max_tokens + self.thought_tokens, self.chat.stop_texts
        return replace(request, max_tokens=room, stop=(*request.stop, *ends))

    def _opened(self, request: Request, prompt: Sequence[int]) -> bool | None:
        """Whether the prompt has opened a thought; None where thoughts are not told apart."""
        raw = isinstance(request.messages, str)
        return None if raw or not self.chat.tags else self.chat.opens_thought(prompt)

    def _prompt(self, request: Request) -> list[int] | Completion:
        """The prompt's tokens, or why there will be no text."""
        try:
            prompt = self.chat.prompt(request.messages)
        except ChatError:
            return _silent("refused")
        fits = 0 < len(prompt) <= self.context - request.max_tokens
        return prompt if fits else _silent("overflow")

    def _spell(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _completion(self, sample: Sample, request: Request, opened: bool | None) -> Completion:
        if sample.finish in NO_ANSWER:
            return _silent(sample.finish)
        told = SplitText("", self._spell(sample.tokens))
        if opened is not None:
            told = self.chat.tell_apart(sample.tokens, opened=opened)
        text = told.answer
        for stop in request.stop:
            text = text.partition(stop)[0]
        return Completion(
            text=text.strip(),
            thoughts=told.thoughts,
            tokens=len(sample.tokens),
            logprob=sample.logprob,
            finish=sample.finish if told.whole else "length",
        )

    def _check_finite(self, completions: Sequence[Completion]) -> None:
        if completions and all(c.finish == "invalid" for c in completions):
            raise UserError(
                f"{NO_ANSWER['invalid']}, for any of {len(completions):,} samples",
                where=f"policy.model ({type(self.model).__name__}, {self.model.dtype})",
                fix="check the weights and the adapter; try policy.dtype: float32",
            )


def _silent(finish: str) -> Completion:
    return Completion(text="", tokens=0, logprob=0.0, finish=finish)


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What else ends a turn: the generation configuration's tokens and the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    ids = {*found} if isinstance(found, list | tuple) else {found}
    return frozenset(int(i) for i in {*ids, tokenizer.eos_token_id} if i is not None)
