"""The policy of a stage: the base model, the adapter of an earlier iteration, templates.

The flow makes one `PolicySource` for each iteration; `mine`, `cluster` and `evaluate` load it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

from models.policy import Policy, PolicySettings
from models.pools.base import Pool, Where
from models.pools.local import LocalPool
from models.pools.opening import open_pool
from models.prompts import ConstitutionWording, Templates
from models.templates import constitution_wording_of, templates_of
from tasks.record.record import Attempt
from tasks.record.slot import Slot

TEMPLATE = ("chat_template", "template_arguments", "thought_tags", "thought_tokens")
"""Settings that say how the chat template is used."""


@dataclass(frozen=True)
class PolicySource:
    """A reference to a policy: nothing is loaded before `load`.

    `base_digest` identifies the base model's files; `adapter` is a finished train or teach attempt.
    """

    settings: PolicySettings
    model: str
    base_digest: str
    adapter: Attempt | None = None
    guided: bool = True
    """Whether a principle stands between the policy's two responses."""
    constitutional: bool = False
    """Whether its prompts hold a constitution instead (SAMI)."""
    taught: Attempt | None = None
    """The teach attempt whose adapter the initial policy has."""
    gated: bool = False
    """Whether it has learned to keep first answers."""

    @property
    def templates(self) -> Templates:
        """The wording of the turns."""
        templates = templates_of(self.settings.templates)
        if not self.guided:
            return templates.unguided()
        return replace(templates, gated=self.gated)

    @property
    def wording(self) -> ConstitutionWording:
        """The wording of prompts with a constitution, and of those that ask for principles."""
        return constitution_wording_of(self.settings.templates)

    @property
    def adapter_path(self) -> Path | None:
        """The adapter's local folder; None is the initial policy."""
        return self.adapter.path("adapter") if self.adapter else None

    @property
    def taught_path(self) -> Path | None:
        """The folder of the initial policy's adapter; None where it was taught nothing."""
        return self.taught.path("adapter") if self.taught else None

    @property
    def local(self) -> PolicySource:
        """The same policy in this process, which is trained, even if a server answers for it."""
        return replace(self, settings=self.settings.model_copy(update={"endpoint": None}))

    def load(self) -> Policy:
        """The policy: at its endpoint where it has one, else in this process.

        Raises:
            UserError: it cannot be loaded, or the endpoint cannot be used.
        """
        if self.settings.endpoint:
            from models.endpoint.server import open_server

            return open_server(self.settings, self.adapter_path)
        from models.engine.local import load_policy

        return load_policy(self.settings, self.model, self.adapter_path)

    def pool(self) -> Pool[Policy]:
        """Engines of the policy, in this process or on Ray's workers.

        Raises:
            UserError: Ray is asked for and not installed.
        """
        if not self.settings.in_ray:
            return LocalPool(self.load)
        models = [self.model, *([str(self.adapter_path)] if self.adapter else [])]
        return open_pool(self.settings, partial(_load_there, self.settings, models), models=models)

    def trained(self, adapter: Attempt, *, gated: bool = False) -> PolicySource:
        """The same base model with the adapter of a finished train attempt; `gated`: it was taught
        to keep first answers."""
        return replace(self, adapter=adapter, gated=gated)

    def inputs(self, **others: Attempt) -> Mapping[str, Attempt]:
        """The attempts that a stage reads, with the adapter among them."""
        return {**others, **({"adapter": self.adapter} if self.adapter else {})}

    def begun(self, start: str, **others: Attempt) -> Mapping[str, Attempt]:
        """The attempts that a training reads: as `inputs`, and the adapter that it starts at."""
        taught = {"taught": self.taught} if self.taught and start == "base" else {}
        return {**self.inputs(**others), **taught}

    def noted(self, at: Slot) -> Slot:
        """The slot with everything else that this policy's answers depend on, and their device.

        Behind an endpoint they depend on the server's model, not on the server's address.
        """
        texts = astuple(self.wording) if self.constitutional else self.templates.texts
        wording = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        if self.settings.endpoint:
            held: Mapping[str, object] = {"served_model": self.settings.served_name}
        else:
            held = self.settings.model_dump(include={"quantization", "dtype", "revision"})
        notes = {"base": self.base_digest, "templates": wording, **_texts(held)}
        notes |= _texts(self.settings.model_dump(include=set(TEMPLATE), exclude_defaults=True))
        at = replace(at, device=self.settings.answers_on)
        return at.using(self.settings.answered_by, **notes)


def _load_there(settings: PolicySettings, models: Sequence[str], where: Where) -> Policy:
    """`PolicySource.load` on a node that may have the base model and the adapter elsewhere."""
    from models.engine.local import load_policy

    base, *adapter = map(where, models)
    return load_policy(settings, base, Path(adapter[0]) if adapter else None)


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}
