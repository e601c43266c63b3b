"""What an attempt's outputs depend on; its digest is the attempt's fingerprint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from models.files import text_sha256


class Source(NamedTuple):
    """An attempt that another one read, and the digest that its outputs had then."""

    stage: str
    iteration: int
    digest: str

    @property
    def tag(self) -> str:
        """The source as the value of a tag."""
        return f"{self.stage}:{self.iteration}:{self.digest}"

    @classmethod
    def read(cls, tag: str) -> Source:
        """A source from its tag."""
        stage, iteration, digest = tag.split(":")
        return cls(stage, int(iteration), digest)


@dataclass(frozen=True)
class Provenance:
    """Everything that an attempt's outputs depend on."""

    stage: str
    iteration: int
    seed: int
    code: Mapping[str, str] | str
    """Module → sha256 of its syntax tree; an earlier version of staple wrote one sha256 of all."""
    settings: Mapping[str, Any]
    inputs: Mapping[str, Source]
    notes: Mapping[str, str]

    @property
    def code_digest(self) -> str:
        """sha256 (hex) of all code."""
        return self.code if isinstance(self.code, str) else text_sha256(json.dumps(self.code))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex); of the inputs their content counts, not where it came from."""
        parts = asdict(self) | {"inputs": {k: v.digest for k, v in self.inputs.items()}}
        return text_sha256(json.dumps(parts, sort_keys=True))

    @classmethod
    def read(cls, text: bytes) -> Provenance:
        """A provenance from its JSON; one of `models.files.UNREADABLE` if it is damaged."""
        found = json.loads(text)
        found["inputs"] = {name: Source(*source) for name, source in found["inputs"].items()}
        return cls(**found)

    @property
    def place(self) -> tuple[str, int]:
        """(stage, iteration)."""
        return self.stage, self.iteration


class Acceptance(NamedTuple):
    """Who declared that a change of code leaves an attempt valid."""

    by: str
    when: str
    """ISO 8601, in UTC."""
    modules: list[str]

    @classmethod
    def read(cls, tag: str) -> Acceptance | None:
        """An acceptance from its tag; None: another program wrote the tag."""
        with suppress(ValueError, TypeError):
            return cls(**json.loads(tag))
        return None
