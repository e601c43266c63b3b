"""A policy in process: a transformers model directory, optionally NF4, with one LoRA adapter.

Each request's prompt is prefilled once and its cache expanded to the n samples. Noise comes from a
hash of (request key, sample, step, token), so a sample does not depend on its batch.
`load_policy` in this module is what the stages call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from models.policy import Completion, Message, PolicySettings, Progress, Request, Scoring
from models.qlora import attach_adapter, load_base

Tensor = torch.Tensor


def load_policy(settings: PolicySettings, model: Path | str, adapter: Path | None) -> LocalPolicy:
    """The policy of an iteration: the base model and, from iteration 1 on, its adapter.

    On a CPU the NF4 base is dequantised and the adapter merged into the fp32 copy: the same
    function up to rounding, without unpacking four-bit weights at every token.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    base, tokenizer = load_base(
        model,
        quantization=settings.quantization,
        dtype=settings.dtype,
        device=settings.device,
        revision=settings.revision,
    )
    on_cpu = next(base.parameters()).device.type == "cpu"
    held: Any = base
    if adapter is not None:
        held = attach_adapter(base, adapter, merge=on_cpu)
    elif on_cpu and settings.quantization == "nf4":
        held = base.dequantize()
    return LocalPolicy(held.eval(), tokenizer, batch_rows=settings.batch_rows)


class LocalPolicy:
    """`Policy` over a transformers causal language model and its chat template."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_rows: int
    ) -> None:
        self.model, self.tokenizer, self.batch_rows = model, tokenizer, batch_rows
        self.stop = _stop_tokens(model, tokenizer)
        self.context = int(getattr(model.config, "max_position_embeddings", 1 << 30))

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See `Policy.generate`. A prompt that leaves no room for `max_tokens` is "overflow"."""
        prompts = [self._encode(r.messages) for r in requests]
        answers: list[list[Completion]] = [[] for _ in requests]
        for batch in self._batches(requests, prompts):
            if self._overflows(requests[batch[0]], prompts[batch[0]]):
                done = [[Completion(text="", tokens=0, logprob=0.0, finish="overflow")] * r.n
                        for r in (requests[i] for i in batch)]  # fmt: skip
            else:
                done = self._decode([requests[i] for i in batch], [prompts[i] for i in batch])
            for i, completions in zip(batch, done, strict=True):
                answers[i] = completions
            if progress:
                progress(len(batch))
        return answers

    @torch.inference_mode()
    def logprobs(self, pairs: Sequence[tuple[tuple[Message, ...], str]]) -> list[Scoring]:
        """See `Policy.logprobs`. Prompt and response are tokenised as one conversation."""
        rows = [self._encode_pair(messages, response) for messages, response in pairs]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        scorings: dict[int, Scoring] = {}
        for start in range(0, len(order), self.batch_rows):
            batch = order[start : start + self.batch_rows]
            for i, scoring in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                scorings[i] = scoring
        return [scorings[i] for i in range(len(rows))]

    @torch.inference_mode()
    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        """See `Policy.hidden_states`."""
        vectors = []
        for start in range(0, len(texts), self.batch_rows):
            ids = [
                self.tokenizer(t, add_special_tokens=False)["input_ids"] or [self.pad]
                for t in texts[start : start + self.batch_rows]
            ]
            tokens, mask = self._pad(ids, left=False)
            out = self.model(
                input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
            )
            weight = mask[..., None].float()
            mean = (out.hidden_states[-1].float() * weight).sum(1) / weight.sum(1)
            vectors.append(mean.cpu().numpy())
        return np.concatenate(vectors) if vectors else np.zeros((0, 0), dtype=np.float32)

    @property
    def pad(self) -> int:
        """A token for the padded positions; the mask hides it."""
        found = self.tokenizer.pad_token_id
        return int(found) if found is not None else min(self.stop, default=0)

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            cast(list[dict[str, str]], list(messages)), add_generation_prompt=True, tokenize=False
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_pair(self, messages: Sequence[Message], response: str) -> tuple[list[int], int]:
        """Token ids of the conversation with the response, and where the response starts."""
        prompt = self._encode(messages)
        ids = list(self.tokenizer(response, add_special_tokens=False)["input_ids"])
        return [*prompt, *ids, *sorted(self.stop)[:1]], len(prompt)

    def _overflows(self, request: Request, prompt: list[int]) -> bool:
        return len(prompt) + request.max_tokens > self.context

    def _batches(
        self, requests: Sequence[Request], prompts: Sequence[list[int]]
    ) -> Iterator[list[int]]:
        """Indices of requests that decode together: of like length, at most `batch_rows` rows."""
        order = sorted(
            range(len(requests)),
            key=lambda i: (self._overflows(requests[i], prompts[i]), len(prompts[i])),
        )
        batch: list[int] = []
        rows = 0
        for i in order:
            parted = batch and self._overflows(requests[i], prompts[i]) != self._overflows(
                requests[batch[0]], prompts[batch[0]]
            )
            if batch and (parted or rows + requests[i].n > self.batch_rows):
                yield batch
                batch, rows = [], 0
            batch.append(i)
            rows += requests[i].n
        if batch:
            yield batch

    def _decode(
        self, requests: Sequence[Request], prompts: Sequence[list[int]]
    ) -> list[list[Completion]]:
        rows = _Rows.of(requests, self.model.device)
        tokens, mask = self._pad(prompts, left=True)
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        repeats = torch.tensor([r.n for r in requests], device=tokens.device)
        source = torch.arange(len(requests), device=tokens.device).repeat_interleave(repeats)
        cache.batch_select_indices(source)
        mask, position = mask[source], positions[source, -1:]
        logits = out.logits[source, -1].float()
        for step in range(int(rows.limit.max())):
            chosen = rows.choose(logits, step)
            alive = rows.append(chosen, step, self.stop)
            if not alive.any():
                break
            if not alive.all():
                keep = alive.nonzero().squeeze(1)
                rows.keep(keep)
                cache.batch_select_indices(keep)
                mask, position, chosen = mask[keep], position[keep], chosen[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = position + 1
            logits = self.model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1].float()  # fmt: skip
        return self._completions(requests, rows)

    def _completions(self, requests: Sequence[Request], rows: _Rows) -> list[list[Completion]]:
        texts = self.tokenizer.batch_decode(rows.texts, skip_special_tokens=True)
        flat = iter(
            Completion(text=text.strip(), tokens=len(ids), logprob=logprob, finish=finish)
            for text, ids, logprob, finish in zip(
                texts, rows.texts, rows.logprobs, rows.finish, strict=True
            )
        )
        return [[next(flat) for _ in range(r.n)] for r in requests]

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[Scoring]:
        tokens, mask = self._pad([ids for ids, _ in rows], left=False)
        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        steps = torch.log_softmax(logits[:, :-1].float(), -1)
        chosen = steps.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return [
            Scoring(
                logprob=float(chosen[r, start - 1 : len(ids) - 1].sum()), tokens=len(ids) - start
            )
            for r, (ids, start) in enumerate(rows)
        ]

    def _pad(self, rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        tokens = torch.full((len(rows), width), self.pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for r, ids in enumerate(rows):
            place = slice(width - len(ids), width) if left else slice(0, len(ids))
            tokens[r, place] = torch.tensor(ids)
            mask[r, place] = 1
        return tokens.to(self.model.device), mask.to(self.model.device)


@dataclass
class _Rows:
    """The samples that are being decoded, one row each; finished ones leave the batch."""

    keys: Tensor
    temperature: Tensor
    top_p: Tensor
    limit: Tensor
    where: list[int]
    """Row in the batch → index in the lists below."""
    texts: list[list[int]]
    logprobs: list[float]
    finish: list[str]
    _last_logprob: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> _Rows:
        each = [(r, i) for r in requests for i in range(r.n)]

        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            keys=column([_seed(r.key, i) for r, i in each], torch.int64),
            temperature=column([r.temperature for r, _ in each], torch.float32),
            top_p=column([r.top_p for r, _ in each], torch.float32),
            limit=column([r.max_tokens for r, _ in each], torch.int64),
            where=list(range(len(each))),
            texts=[[] for _ in each],
            logprobs=[0.0] * len(each),
            finish=["length"] * len(each),
        )

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """The next token of every row: argmax of logits / T + Gumbel noise, within top-p."""
        sampled = self.temperature > 0
        scaled = logits / torch.where(sampled, self.temperature, 1.0)[:, None]
        if bool((self.top_p < 1).any()):
            scaled = _nucleus(scaled, self.top_p)
        noise = gumbel(self.keys, step, logits.shape[-1]) if bool(sampled.any()) else 0.0
        chosen = (scaled + noise * sampled[:, None]).argmax(-1)
        self._last_logprob = logits.gather(-1, chosen[:, None]).squeeze(-1) - logits.logsumexp(-1)
        return chosen

    def append(self, chosen: Tensor, step: int, stop: frozenset[int]) -> Tensor:
        """Write the chosen tokens down; True for the rows that go on."""
        alive = []
        limits = self.limit.tolist()
        pairs = zip(chosen.tolist(), self._last_logprob.tolist(), strict=True)
        for row, (token, logprob) in enumerate(pairs):
            at = self.where[row]
            self.logprobs[at] += logprob
            if token in stop:
                self.finish[at] = "stop"
            else:
                self.texts[at].append(token)
            alive.append(token not in stop and step + 1 < limits[row])
        return torch.tensor(alive, device=chosen.device)

    def keep(self, rows: Tensor) -> None:
        """Drop the finished rows."""
        self.keys, self.temperature = self.keys[rows], self.temperature[rows]
        self.top_p, self.limit = self.top_p[rows], self.limit[rows]
        self.where = [self.where[r] for r in rows.tolist()]


def gumbel(keys: Tensor, step: int, vocabulary: int) -> Tensor:
    """Gumbel noise of shape (rows, vocabulary), a pure function of (key, step, token).

    A counter-based generator (the SplitMix64 finaliser) in wrapping int64 arithmetic: the same
    numbers on every device, whatever the batch.
    """
    tokens = torch.arange(vocabulary, dtype=torch.int64, device=keys.device)
    bits = _mix(keys + _signed((step + 1) * _GOLDEN))[:, None] + tokens * _GOLDEN
    # 23 bits and a half: exact in float32, never 0 and never 1
    uniform = ((_shift(_mix(bits), 41)).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _signed(x: int) -> int:
    """An integer modulo 2^64, as int64 holds it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _seed(key: str, sample: int) -> int:
    digest = hashlib.blake2b(f"{key}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the smallest set of tokens whose probability reaches top_p."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    outside = (before >= top_p[:, None]).scatter(-1, order, before >= top_p[:, None])
    return logits.masked_fill(outside, float("-inf"))


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a turn: the generation configuration's and the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    ids = {*found} if isinstance(found, list | tuple) else {found}
    return frozenset(int(i) for i in {*ids, tokenizer.eos_token_id} if i is not None)
