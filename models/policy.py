"""The interface between the method and whatever generates text.

A stage makes `Request`s and reads `Completion`s. `models/engine/local.py` implements `Policy` in
this process, `models/endpoint/server.py` behind a server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypedDict
from urllib.parse import urlsplit

import numpy as np
from pydantic import (
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from constitutions.constitution import principle_key
from models.settings import Settings
from models.template_file import TemplateFile


class Message(TypedDict):
    """One chat turn. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Messages = tuple[Message, ...]
"""A conversation, oldest turn first."""


def user(content: str) -> Message:
    """A user's turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant's turn."""
    return {"role": "assistant", "content": content}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to sample from it.

    `key` seeds the noise: completion i of a request depends only on (policy, messages, sampling
    settings, key, i), not on the batch, the shard or earlier requests.
    """

    messages: Messages | str
    """Chat turns, or a text that is continued as it stands, without a chat template."""
    key: str
    n: int = 1
    """Number of completions, at least 1."""
    temperature: float = 1.0
    """At least 0; 0 is greedy."""
    top_p: float = 1.0
    """In (0, 1]."""
    max_tokens: int = 512
    """Most tokens of a completion; a policy adds its `thought_tokens`."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion: it is cut before the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A sampled response."""

    text: str
    """The answer alone; empty where its thoughts are not closed."""
    tokens: int
    """Number of sampled tokens, thoughts included."""
    logprob: float
    """Sum over its tokens (nats, at temperature 1); NaN where it is unknown."""
    finish: str
    """"stop", "length" (cut at max_tokens, or inside its thoughts), or why there is no text:
    "overflow" (the prompt left no room), "invalid" (the model's logits were not finite) or
    "refused" (the prompt, by the chat template or by a server)."""
    thoughts: str = ""
    """The sampled text before the answer, with tags and line breaks: thoughts + text is the whole
    sampled text. A server may send it without tags."""


NO_ANSWER = {
    "overflow": "the prompt left no room for it",
    "invalid": "the model's logits were not finite",
    "refused": "its prompt was refused, by the chat template or by the server",
}
"""Why a completion has no text, by its finish."""
UNFINISHED = "its thoughts were not finished"
"""Why a completion with thoughts has no text."""


def no_answer(finish: str) -> Completion:
    """A completion without text; `finish` is a key of `NO_ANSWER`."""
    return Completion(text="", tokens=0, logprob=0.0, finish=finish)


def before(stops: Iterable[str], text: str) -> str:
    """The text before its first stop string; the whole text where it has none."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def vote(said: Sequence[Completion]) -> Completion:
    """What more than half of a request's completions say, apart from spelling (`principle_key`).

    Returns:
        The first of those that say it, or a completion without text where nothing has a majority;
        either with the tokens of all. The first of all where the prompt left no room, or was
        refused.
    """
    if said[0].finish in NO_ANSWER:  # then all are alike
        return said[0]
    keys = [principle_key(completion.text) for completion in said]
    key, count = Counter(keys).most_common(1)[0]
    won = said[keys.index(key)] if 2 * count > len(said) else no_answer("stop")
    return replace(won, tokens=sum(completion.tokens for completion in said))


def finish_of(parts: Iterable[Completion]) -> str:
    """The finish of an answer in several parts: the most serious finish among them."""
    found = {part.finish for part in parts}
    return next((f for f in ("refused", "invalid", "overflow", "length") if f in found), "stop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """The log-probability of a given response."""

    logprob: float
    """log p(response | messages): sum over the response's tokens and its end of turn, in nats."""
    tokens: int
    """Number of these tokens."""


Progress = Callable[[int], None]
"""Called with the number of units that have just been finished."""


class Policy(Protocol):
    """A chat model. Answers come in the order of the requests."""

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        """`n` completions of each request; `progress` counts completions.

        Raises:
            UserError: the policy cannot answer at all.
        """

    def logprobs(self, pairs: Sequence[tuple[Messages, str]]) -> list[Scoring]:
        """The log-probability of each response as the assistant's next turn after its messages."""

    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        """The mean last-layer hidden state of each text: (texts, hidden size), float32."""


class PoolSettings(Settings):
    """Where the shards of a stage are computed: a bare word, "local" or "ray", will do."""

    kind: Literal["local", "ray"] = "local"
    """In this process, or by Ray actors: one engine each, and a GPU where there are any."""
    address: str | None = Field(None, pattern=r"^(auto|[^/\s]+:\d{1,5})$")
    """Of a Ray cluster that this machine is a node of: "host:port", or "auto" for the one that
    runs here. Unset: a Ray of our own, on this machine and its loopback interface alone."""
    workers: int | None = Field(None, ge=1, le=4096)
    """Actors. Unset: as many as the cluster has GPUs; without any, one."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given


FINGERPRINT = {"for": "fingerprint"}
"""The context of a `model_dump` that keeps only the settings on which results depend."""
PLACING = frozenset(
    {"device", "batch_rows", "threads", "engine", "pool", "endpoint", "key_variable"}
)
"""Settings that say where and how fast a policy runs; results do not depend on them."""


Argument = bool | int | float | str
TAKEN = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding"),
        *("add_generation_prompt", "continue_final_message", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        "sanitize_control_tokens",
    )
)
"""Arguments of a chat template that settings cannot set."""


class PolicySettings(Settings):
    """The policy that is improved, and how it is held in memory."""

    model: str = "planted"
    """A transformers model directory, a GGUF file (or a directory with one), a hub name, a packaged
    model that `staple fetch` keeps ("smollm2-135m-instruct"), or a model of an embedded world:
    "planted", "planted-misled" (benchmarks/greedy.md), and for SAMI "planted-sami" and the smaller
    "planted-sami-small"."""
    revision: str | None = None
    """Commit of a hub model; needed for a repeatable run."""
    templates: str | TemplateFile = "chat"
    """The wording of the turns that ask for principles and refinements: "chat", "terse", an
    embedded world's by its name, or the path of a YAML file of your own (docs/templates.md), which
    becomes part of the settings."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How the base weights are held: 4-bit NormalFloat (QLoRA) or as they are."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. float32 on a CPU without bfloat16 units."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPU when there is one."""
    engine: Literal["auto", "shared", "plain"] = "auto"
    """What generates here: the fast engine, which computes shared prompts once, or transformers'
    own `generate`. Auto takes the fast one where its numbers are those of a plain forward pass,
    which is tried once for each model. Both give the same samples, up to rounding."""
    batch_rows: int | None = Field(None, ge=1, le=4096)
    """Samples that are decoded together. Unset: as many as the free memory holds. Behind an
    endpoint, requests in flight; unset: 32."""
    threads: int | None = Field(None, ge=1, le=512)
    """CPU threads. Unset: as many as there are physical cores, whatever OMP_NUM_THREADS says. For
    very small models 1 is as fast, and steadier."""
    chat_template: str | None = Field(None, min_length=1)
    """Which of the tokenizer's named chat templates is used. Unset: "default", or the only one."""
    template_arguments: dict[str, Argument] = Field(default_factory=dict)
    """Variables of the chat template beside the conversation, as `{enable_thinking: false}`; an
    endpoint gets them as `chat_template_kwargs`."""
    thought_tags: Literal["auto", "none"] | tuple[str, str] = "auto"
    """The tags around thoughts, [open, close], by which answers are told from thoughts. "auto":
    those of the usual tags, such as "<think>", that the chat template or the vocabulary has."""
    thought_tokens: int = Field(0, ge=0, le=131_072)
    """Tokens that an answer may take beyond its own limit where the model thinks first."""
    endpoint: str | None = Field(None, pattern=r"^https?://[^@?#\s]+$")
    """An OpenAI-compatible server that answers for the model; it is still trained in process, and
    the server loads each iteration's adapter (vLLM does). Unset: answers in process, too."""
    key_variable: str | None = Field(None, pattern=r"^[A-Za-z_]\w*$")
    """Name of the environment variable that holds the endpoint's key. The key itself is never a
    setting, because settings are recorded."""
    served_model: str | None = Field(None, min_length=1)
    """What the server calls the model. Unset: `model`."""

    pool: PoolSettings = PoolSettings()
    """Where its shards are computed; results do not depend on it."""

    @field_validator("template_arguments")
    @classmethod
    def _names_of_variables(cls, given: dict[str, Argument]) -> dict[str, Argument]:
        for name in given:
            if name in TAKEN or not name.isidentifier():
                raise ValueError(f"'{name}' is not a variable that a chat template can be given")
        return given

    @field_validator("thought_tags")
    @classmethod
    def _tags_are_texts(cls, given: str | tuple[str, str]) -> str | tuple[str, str]:
        if isinstance(given, tuple) and not all(tag.strip() for tag in given):
            raise ValueError('a tag is empty: set two texts, "auto" or "none"')
        return given

    @field_validator("endpoint")
    @classmethod
    def _has_a_port(cls, endpoint: str | None) -> str | None:
        """A port from 1 to 65535, where there is any."""
        if endpoint and urlsplit(endpoint).port == 0:
            raise ValueError("Port out of range 1-65535")
        return endpoint

    @property
    def served_name(self) -> str:
        """The model's name at the endpoint."""
        return self.served_model or self.model

    @property
    def answered_by(self) -> str:
        """The name of the module that answers for the policy."""
        return "models.endpoint.server" if self.endpoint else "models.engine.local"

    @property
    def in_ray(self) -> bool:
        """Whether the workers of a Ray cluster answer."""
        return self.pool.kind == "ray" and not self.endpoint

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `models.training.bases.load_base`."""
        names = ("quantization", "dtype", "device", "revision")
        return {name: getattr(self, name) for name in names}

    @property
    def answers_on(self) -> str:
        """The device that answering takes on this machine: no GPU behind an endpoint."""
        return "cpu" if self.endpoint else self.device

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        dropped = PLACING if info.context == FINGERPRINT else ()
        found: dict[str, Any] = dump(self)
        return {name: value for name, value in found.items() if name not in dropped}
