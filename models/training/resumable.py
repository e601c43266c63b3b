"""Keeps a training's newest checkpoint, with digests that show damage.

`models/training/loop.py` keeps and resumes checkpoints; `models/training/job.py` first drops
damaged ones.
"""

from __future__ import annotations

from pathlib import Path

from models.files import Damaged, file_sha256, read_sealed, remove, write_sealed
from models.notices import say

SEAL = "sealed.json"
"""The file that is written last, with all files' digests: without it a checkpoint is unfinished."""


def keep(checkpoint: Path) -> None:
    """Seal a checkpoint that has just been written, and then remove the earlier ones."""
    write_sealed(checkpoint / SEAL, _digests(checkpoint))
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other != checkpoint:
            remove(other)


def newest(checkpoints: Path) -> Path | None:
    """The newest finished checkpoint; None where there is none."""
    done = [seal.parent for seal in checkpoints.glob(f"checkpoint-*/{SEAL}")]
    return max(done, key=lambda folder: int(folder.name.split("-")[1])) if done else None


def drop_damaged(checkpoints: Path) -> None:
    """Remove damaged checkpoints, and say where the training resumes."""
    while found := newest(checkpoints):
        try:
            if read_sealed(found / SEAL) == _digests(found):
                return
        except (Damaged, OSError):
            pass
        remove(found)
        left = newest(checkpoints)
        on = f"after step {left.name.split('-')[1]}" if left else "at the first step"
        say(f"{found} was damaged; the training goes on {on}")


def _digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != SEAL)
    return {str(p.relative_to(folder)): file_sha256(p) for p in files}
