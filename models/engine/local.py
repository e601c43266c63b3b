"""The policy in this process: a transformers model, optionally in NF4, with one LoRA adapter.

Stages call `load_policy`. `models/chat.py` turns conversations into tokens, and
`models/engine/exact.py` opens the engine that samples from the model exactly.
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
from models.chat import Chat
from models.chat_template import ChatError
from models.engine import threads
from models.engine.base import Decoding, Engine, Sample, free_bytes
from models.engine.exact import open_engine
from models.policy import (
    NO_ANSWER,
    Completion,
    Messages,
    PolicySettings,
    Progress,
    Request,
    Scoring,
    before,
    no_answer,
)
from models.thoughts import SplitText
from models.training.bases import load_base
from models.training.updates import attach_adapter

STATES = 1 << 15
"""Tokens in one pass for hidden states, padding included."""


def load_policy(settings: PolicySettings, model: Path | str, adapter: Path | None) -> LocalPolicy:
    """The policy of an iteration: the base model and, from iteration 1 on, its adapter.

    On a CPU an NF4 base is dequantised and the adapter merged into it: the function is the same up
    to rounding, and no token has to unpack four-bit weights. On a GPU the base is dequantised, for
    the same reason, where it then takes at most half of the free memory.

    Raises:
        UserError: the base or the adapter cannot be loaded, the adapter belongs to another base, or
            no engine is exact.
    """
    threads.use(settings.threads)
    base, tokenizer = load_base(model, **settings.loading)
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
    """Whether the 4-bit base, dequantised, leaves half of the free memory to the samples."""
    whole = base.num_parameters() * base.dtype.itemsize
    return whole <= free_bytes(base.device) / 2


class LocalPolicy:
    """`Policy` over a transformers causal language model and its chat template.

    Args:
        settings: the engine, how many samples it decodes together, the chat template with its
            arguments, and the tags of thoughts.
        digest: identifies the model's files, so that the engine is checked once; see `open_engine`.

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
        decoding = Decoding(self.stop, self.settings.batch_rows, self._spell)
        self.decoder = self._open(decoding)

    def _open(self, decoding: Decoding) -> Engine:
        return open_engine(
            self.model,
            decoding,
            choice=self.settings.engine,
            special=self.tokenizer.all_special_ids,
            digest=self._digest,
        )

    def use(self, adapter: Path | None) -> None:
        """Answer with another adapter, or with none, on the same base, which stays in memory.

        Raises:
            ValueError: the last adapter was merged into the base, as on CPUs.
            UserError: the adapter was trained on another base.
        """
        base = cast(Any, self.model)
        if hasattr(base, "peft_config"):
            base = base.unload()
        if not hasattr(base, "identity"):
            raise ValueError("an adapter was merged into this base")
        base.set_attn_implementation(self._attention)
        self.model = (attach_adapter(base, adapter) if adapter else base).eval()
        self.decoder = self._open(self.decoder.decoding)

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See `Policy.generate`. A prompt that leaves no room for `max_tokens` finishes as
        "overflow", one that the chat template refuses (two user turns in a row, say) as "refused".

        Raises:
            UserError: the model's logits are finite for none of the requests.
        """
        requests = [self._with_room(request) for request in requests]
        found = [self._prompt(request) for request in requests]
        asked = [i for i, (_, finish) in enumerate(found) if not finish]
        prompts = {i: found[i][0] for i in asked}
        opened = {i: self._opened(requests[i], prompts[i]) for i in asked}
        answers = [[no_answer(f)] * r.n for r, (_, f) in zip(requests, found, strict=True)]

        def ended(sample: Sample) -> None:
            i = asked[sample.request]
            answers[i][sample.number] = self._completion(sample, requests[i], opened[i])
            if progress:
                progress(1)

        if progress and len(asked) < len(requests):
            progress(sum(r.n for r, (_, finish) in zip(requests, found, strict=True) if finish))
        self.decoder.sample(list(prompts.values()), [requests[i] for i in asked], ended)
        self._check_finite([completion for i in asked for completion in answers[i]])
        return answers

    def logprobs(self, pairs: Sequence[tuple[Messages, str]]) -> list[Scoring]:
        """See `Policy.logprobs`. A response has the tokens that training gives it, end included.

        Raises:
            ChatError: the chat template refuses a conversation.
        """
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
        """The request with room for thoughts; an end of turn that is text becomes a stop string."""
        if isinstance(request.messages, str):
            return request
        room, ends = request.max_tokens + self.thought_tokens, self.chat.stop_texts
        return replace(request, max_tokens=room, stop=(*request.stop, *ends))

    def _opened(self, request: Request, prompt: Sequence[int]) -> bool | None:
        """Whether the prompt ends inside a thought; None where the sample has no thoughts."""
        raw = isinstance(request.messages, str)
        return None if raw or not self.chat.tags else self.chat.opens_thought(prompt)

    def _prompt(self, request: Request) -> tuple[list[int], str]:
        """The prompt's tokens, and "" or the finish of a prompt that gets no completion."""
        try:
            prompt = self.chat.prompt(request.messages)
        except ChatError:
            return [], "refused"
        fits = 0 < len(prompt) <= self.context - request.max_tokens
        return prompt, "" if fits else "overflow"

    def _spell(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _completion(self, sample: Sample, request: Request, opened: bool | None) -> Completion:
        if sample.finish in NO_ANSWER:
            return no_answer(sample.finish)
        parts = SplitText("", self._spell(sample.tokens))
        if opened is not None:
            parts = self.chat.split(sample.tokens, opened=opened)
        return Completion(
            text=before(request.stop, parts.answer).strip(),
            thoughts=parts.thoughts,
            tokens=len(sample.tokens),
            logprob=sample.logprob,
            finish=sample.finish if parts.whole else "length",
        )

    def _check_finite(self, completions: Sequence[Completion]) -> None:
        if completions and all(c.finish == "invalid" for c in completions):
            raise UserError(
                f"{NO_ANSWER['invalid']}, for any of {len(completions):,} samples",
                where=f"policy.model ({type(self.model).__name__}, {self.model.dtype})",
                fix="check the weights and the adapter; try policy.dtype: float32",
            )


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens with which the generation configuration and the tokenizer end a text."""
    found = getattr(model.generation_config, "eos_token_id", None)
    ids = {*found} if isinstance(found, list | tuple) else {found}
    return frozenset(int(i) for i in {*ids, tokenizer.eos_token_id} if i is not None)
