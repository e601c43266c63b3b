"""Has a server load a LoRA adapter while it runs, as vLLM can.

vLLM must be started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and must see
the adapter under the same path. Adapters are never unloaded here: another process may need them,
and vLLM itself drops the least recently used ones.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from constitutions.errors import UserError
from models.endpoint.client import Card, Connection, Endpoint
from models.endpoint.faults import Fault
from models.endpoint.replies import ReplyChoice

MISSING = frozenset({404, 405, 501})
"""The status codes of a server that does not know the address."""
HOW = (
    "start vLLM with --enable-lora --max-lora-rank (train.lora_rank) and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; or serve a merged model (staple export --merge); or "
    "unset policy.endpoint to run in process"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter as a server knows it."""

    path: Path
    """The adapter's folder."""
    base: str
    """The server's name for the base to which the adapter belongs."""
    name: str
    """The server's name for the adapter."""

    @classmethod
    def of(cls, folder: Path, base: str) -> ServedAdapter:
        """The adapter in a folder; its name is a digest of its content, so that no two share it."""
        digest = hashlib.sha256()
        for file in (folder / "adapter_config.json", _weights(folder)):
            digest.update(file.read_bytes())
        return cls(folder.resolve(), base, f"staple-{digest.hexdigest()[:16]}")

    async def load(self, connection: Connection) -> None:
        """Have the server load the adapter, unless it has done so, and check that it lists it.

        Raises:
            UserError: the server is away, has no such endpoint, cannot load the adapter (it may
                not see its path), or lists it under another base.
        """
        try:
            cards = await connection.models()
            if self.name not in cards:
                await self._load(connection)
                cards = await connection.models()
        except Fault as fault:
            raise connection.endpoint.explain(fault) from None
        self._check_listed(connection.endpoint, cards)

    async def _load(self, connection: Connection) -> None:
        try:
            await connection.load_adapter({"lora_name": self.name, "lora_path": str(self.path)})
        except Fault as fault:
            if fault.status == 400 and "already" in fault.reason:
                return  # another request has loaded it meanwhile
            if fault.again or fault.unauthorised:
                raise
            if fault.status in MISSING and self.name not in fault.reason:
                raise no_adapters(connection.endpoint, fault.reason) from None
            raise UserError(
                f"the server cannot load the adapter ({fault.reason})",
                where=connection.endpoint.base,
                expected=f"that it sees {self.path} under the same path",
                fix="share the folder with it; its --max-lora-rank must reach train.lora_rank",
            ) from None

    def _check_listed(self, endpoint: Endpoint, cards: Mapping[str, Card]) -> None:
        card = cards.get(self.name)
        if card is None:
            raise UserError(
                f"the server does not list the adapter {self.name} that it has just loaded",
                where=endpoint.base,
                expected="the adapter among the models at /v1/models",
            )
        parent, base = cards.get(card.parent or self.base), cards.get(self.base)
        same = parent is base or (parent and base and parent.root and parent.root == base.root)
        if card.parent and not same:
            raise UserError(
                f"the server has loaded the adapter onto {endpoint.clean(card.parent)}",
                where=endpoint.base,
                expected=f"its base {self.base}",
                fix="set policy.served_model to what the server calls the base",
            )

    def check_acts(
        self, endpoint: Endpoint, base: ReplyChoice, again: ReplyChoice, tuned: ReplyChoice
    ) -> None:
        """Check by greedy answers to one question that the adapter changes the base's answer.

        An untrained adapter, which changes nothing, gets a warning.

        Args:
            base, again: two answers of the base, which differ where its arithmetic varies.
            tuned: the answer with the adapter.

        Raises:
            UserError: a trained adapter gives the base's own answer.
        """
        noise = _gap(base, again)
        if math.isinf(noise) or _gap(base, tuned) > noise:
            return
        if not self.is_trained():
            _log.warning(
                "%s: the adapter %s changes nothing: it is untrained", self.path, self.name
            )
            return
        raise UserError(
            f"the server answers as {self.name} exactly what it answers as {self.base}",
            where=endpoint.base,
            expected="other log-probabilities with the adapter than without",
            fix="read the server's log: it lists the adapter but does not use it",
        )

    def is_trained(self) -> bool:
        """Whether any B matrix is not zero; before the first step of training all are."""
        from safetensors import deserialize

        tensors = deserialize(_weights(self.path).read_bytes())
        return any(any(tensor["data"]) for name, tensor in tensors if "lora_B" in name)


def no_adapters(endpoint: Endpoint, reason: str) -> UserError:
    """The error for a server that cannot load an adapter while it runs."""
    return UserError(
        f"the server loads no adapters while it runs ({reason})", where=endpoint.base, fix=HOW
    )


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def _gap(one: ReplyChoice, other: ReplyChoice) -> float:
    """The largest difference of a token's log-probability; infinite for different answers."""
    pairs = list(zip(one.token_logprobs, other.token_logprobs, strict=False))
    if one.answer != other.answer or len(one.token_logprobs) != len(other.token_logprobs):
        return math.inf
    return max((abs(a - b) for a, b in pairs), default=0.0)
