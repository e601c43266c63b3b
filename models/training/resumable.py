"""A training's checkpoints: the newest is kept, with digests that show damage.

`models/training/loop.py` keeps and resumes them; `models/training/job.py` drops damaged ones first.
"""

from __future__ import annotations

from pathlib import Path

from models.files import Damaged, file_sha256, read_sealed, remove, write_sealed
from models.notices import say

SEAL = "sealed.json"
"""Written last, with the digest of every file: a checkpoint without one is not finished."""


def keep(checkpoint: Path) -> None:
    """Seal a checkpoint that was just written, and only then remove those before it."""
    write_sealed(checkpoint / SEAL, _digests(checkpoint))
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other != checkpoint:
            remove(other)


def newest(checkpoints: Path) -> Path | None:
    """The newest finished checkpoint."""
    done = [seal.parent for seal in checkpoints.glob(f"checkpoint-*/{SEAL}")]
    return max(done, key=lambda folder: int(folder.name.split("-")[1])) if done else None


def drop_damaged(checkpoints: Path) -> None:
    """Remove damaged checkpoints, and say from where the training resumes."""
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
