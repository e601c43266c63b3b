"""Finds out what an OpenAI-compatible server can do, by asking it.

Servers silently ignore n, seed, temperature, stop strings or log-probabilities, so each of them is
tried. `models.endpoint.server` probes a server before it generates, `flows.preflight` asks it for a
token before a run.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from constitutions.foreign_text import without_control_tokens
from models.endpoint.client import Connection, Limits, open_endpoint, run_async
from models.endpoint.faults import Fault
from models.endpoint.replies import Reply
from models.endpoint.served_adapter import MISSING, no_adapters
from models.policy import Message, Messages, PolicySettings

PROBE: Message = {"role": "user", "content": "Write a random number between one and a million."}
PROBE_TOKENS = 16
MOST_STOPS = 4
"""Most stop strings that OpenAI accepts; this client cuts answers at the others."""

Limit = Literal["max_tokens", "max_completion_tokens"]
"""The field that limits an answer's tokens: OpenAI's later models accept the second only."""
LIMITS: tuple[Limit, ...] = get_args(Limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What a server did when it was asked, one request at a time."""

    n: bool
    """It gives several different completions in one reply; else each takes its own request."""
    seed: bool
    """It gives the same completion for the same seed, and another one for another seed."""
    varies: bool
    """It gives different completions at temperature 1; some servers ignore the temperature."""
    stop: bool
    """It ends at a stop string; else none is sent, and this client cuts the answer."""
    logprobs: bool
    """It sends the log-probabilities of its completions."""
    limit: Limit

    def body(
        self,
        model: str,
        asked: Messages | str,
        max_tokens: int,
        *,
        n: int = 1,
        stop: Sequence[str] = (),
        **more: int | float,
    ) -> dict[str, Any]:
        """A request's body without superfluous fields, which some servers refuse.

        Control tokens in messages are broken, because the server's tokenizer would obey them.
        """
        if isinstance(asked, str):
            body: dict[str, Any] = {"model": model, "prompt": asked, "max_tokens": max_tokens}
        else:
            safe = [{**m, "content": without_control_tokens(m["content"])} for m in asked]
            body = {"model": model, "messages": safe, self.limit: max_tokens}
        if n > 1:
            body["n"] = n
        if stop and self.stop:
            body["stop"] = list(stop[:MOST_STOPS])
        if self.logprobs:
            body["logprobs"] = 1 if isinstance(asked, str) else True
        return body | more


async def probe(connection: Connection, model: str) -> Support:
    """What the server supports: it answers twice with one seed and once with another.

    Raises:
        UserError: it does not answer, or refuses every form of the request.
    """
    refused: Fault | None = None
    ask = partial(_sample, connection, model)
    for several, limit in itertools.product((True, False), LIMITS):
        plain = Support(
            n=several, seed=False, varies=False, stop=False, logprobs=False, limit=limit
        )
        try:
            first, again, other = [(await ask(plain, seed=seed)).texts for seed in (1, 1, 2)]
        except Fault as fault:
            refused = refused or fault
            if not fault.bad_request:
                break
            continue
        found = replace(
            plain,
            n=several and len(first) == 2 and len(set(first)) == 2,
            seed=first == again != other,
            varies=len({*first, *again, *other}) > 1,
        )
        return await _probe_extras(ask, found)
    assert refused is not None
    raise connection.endpoint.explain(refused)


async def _probe_extras(ask: Callable[..., Awaitable[Reply]], found: Support) -> Support:
    """Whether log-probabilities and stop strings work; a server may refuse either."""

    async def greedy(support: Support, stop: Sequence[str] = ()) -> Reply | None:
        try:
            return await ask(support, temperature=0.0, stop=stop)
        except Fault:
            return None

    with_logprobs, with_stop = replace(found, logprobs=True), replace(found, stop=True)
    reply = await greedy(with_logprobs)
    values = reply.choices[0].token_logprobs if reply else []
    plain = reply or await greedy(found)
    text = plain.texts[0] if plain else ""
    mark = re.search(r"[^\s\ufffd]{1,4}", text[len(text) // 2 :])
    cut = await greedy(with_stop, [mark[0]]) if mark else None
    return replace(
        found,
        logprobs=bool(values) and all(map(math.isfinite, values)),
        stop=cut is not None and len(cut.texts[0]) < len(text),
    )


async def _sample(
    connection: Connection,
    model: str,
    support: Support,
    *,
    seed: int = 1,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
) -> Reply:
    body = support.body(
        model,
        (PROBE,),
        PROBE_TOKENS,
        n=2 if support.n and temperature else 1,
        stop=stop,
        seed=seed,
        temperature=temperature,
        top_p=1.0,
    )
    return await connection.ask(body)


def check_server(settings: PolicySettings, *, adapters: bool, limits: Limits | None = None) -> None:
    """Ask the server for one token and, with `adapters`, whether it loads adapters while it runs.

    Raises:
        UserError: the address or the key cannot be used, the server does not answer, or it loads no
            adapters.
    """

    async def look() -> None:
        endpoint = open_endpoint(settings, limits)
        async with endpoint.connect(endpoint.limits.start) as connection:
            try:
                await _first_answer(connection, settings.served_name)
                if adapters:
                    await _takes_adapters(connection)
            except Fault as fault:
                raise endpoint.explain(fault) from None

    run_async(look())


async def _first_answer(connection: Connection, model: str) -> None:
    for limit in LIMITS:
        body = {"model": model, "messages": [PROBE], limit: 1}
        try:
            await connection.ask(body)
            return
        except Fault as fault:
            if not fault.bad_request or limit == LIMITS[-1]:
                raise


async def _takes_adapters(connection: Connection) -> None:
    """Send an empty request: a server that knows the address refuses it as incomplete."""
    try:
        await connection.load_adapter({})
    except Fault as fault:
        if fault.status in MISSING:
            raise no_adapters(connection.endpoint, fault.reason) from None
        if fault.again or fault.unauthorised:
            raise
