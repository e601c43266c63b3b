"""The methods: one module each, listed here, and named in `flows.schema.MethodName`."""

from __future__ import annotations

from collections.abc import Mapping

from flows.methods.base import Method
from flows.methods.sami import SAMI
from flows.methods.sft import SFT
from flows.methods.staple import STAPLE
from flows.methods.star import STAR
from flows.schema import ExperimentSettings

METHODS: Mapping[str, Method] = {m.name: m for m in (STAPLE, STAR, SFT, SAMI)}


def method_of(settings: ExperimentSettings) -> Method:
    """The method that an experiment's settings name."""
    return METHODS[settings.method]
