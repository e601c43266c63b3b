"""A training job on a small model: what tests of trainings have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.policy import PolicySettings
from models.training.adapter import AdapterSettings
from models.training.job import Job

POLICY = PolicySettings(quantization="none", dtype="float32", device="cpu", threads=1)


def job(model: Path, folder: Path, settings: AdapterSettings, **changes: Any) -> Job:
    """Trains into `folder`/adapter, from the base on."""
    values: dict[str, Any] = {
        "model": str(model),
        "policy": POLICY,
        "previous": None,
        "seed": 0,
        "data_digest": "d",
        "out": folder / "adapter",
        "checkpoints": folder / "checkpoints",
    }
    return Job(settings=settings, **{**values, **changes})
