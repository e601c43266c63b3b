"""The base model's files: a world's made when missing, a directory checked, a hub name noted.

A GGUF file is identified by its own content, whether or not its dequantised model is there.

Everything that the model's answers depend on is in its digest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from constitutions.errors import UserError
from models.checkpoints.architecture import Use
from models.checkpoints.check import check_directory, located
from models.checkpoints.gguf import CONVERTER, content, gguf_file, place_of
from models.checkpoints.headers import check_listing
from models.embedders import embedder_directory
from models.files import Damaged, text_sha256
from models.packaged import PACKAGED
from models.policy import PolicySettings
from models.pools.weights import file_hashes
from models.worlds.registry import WORLD_MODELS
from tasks.record.code import code_version
from tasks.record.progress import progress, say
from tasks.record.record import SUMMARY, Record
from tasks.record.slot import Slot


@dataclass(frozen=True)
class BaseModelFiles:
    """`path` is what transformers loads (a directory or a hub name); `digest` identifies it."""

    path: str
    digest: str


def resolve_model(
    settings: PolicySettings, seed: int, home: Path, record: Record
) -> BaseModelFiles:
    """Find or make the base model, before any other compute is spent.

    A world's model is made once for an experiment and kept in its record: another machine's
    arithmetic might make another one.

    Raises:
        UserError: the model cannot be sampled from exactly; see `open_model`.
    """
    open_model(settings, "sampled")
    kept = kept_model(settings, seed, home, record)
    if kept.path:
        return kept
    model = settings.model
    made, name = make_world_model(model, seed, home), _recorded_name(model, seed)
    record.client.log_artifacts(record.iteration_run(SUMMARY), str(made), name)
    record.log_text(f"{name}.digest", folder_digest(made, home))  # last: the copy is whole
    return kept_model(settings, seed, home, record)


def kept_model(settings: PolicySettings, seed: int, home: Path, record: Record) -> BaseModelFiles:
    """The base model where it is; a world's that was never made has an empty path.

    Raises:
        UserError: the directory lacks what transformers needs.
    """
    check_model(settings)
    if settings.model in WORLD_MODELS:
        return _kept_world_model(settings.model, seed, home, record)
    return files_of(settings, home)


def files_of(settings: PolicySettings, home: Path) -> BaseModelFiles:
    """The files of a model that is no world's, and what identifies them.

    Raises:
        UserError: a directory holds several GGUF files.
    """
    if file := gguf_file(settings.model):
        digest = text_sha256(f"{content(file)} {code_version(CONVERTER)}")
        return BaseModelFiles(str(place_of(file)), digest)
    directory = Path(settings.model).expanduser()
    if directory.is_dir():
        return BaseModelFiles(str(directory.resolve()), folder_digest(directory, home))
    return BaseModelFiles(settings.model, f"{settings.model}@{settings.revision or 'main'}")


def check_model(settings: PolicySettings) -> str:
    """What the model is, in words; makes and loads nothing.

    Raises:
        UserError: there is no such directory, or it lacks what transformers needs.
    """
    if settings.model in WORLD_MODELS:
        world = WORLD_MODELS[settings.model].name
        return f"the {world} world's, pretrained here the first time (a few minutes at most)"
    if file := gguf_file(settings.model):
        return f"GGUF file {file}"
    directory = Path(settings.model).expanduser()
    if directory.is_dir():
        check_listing(directory)
        return f"directory {directory}"
    if directory.is_absolute() or settings.model.startswith((".", "~")):
        raise UserError(
            "there is no such directory",
            where=f"setting 'policy.model' = {settings.model}",
            expected="a transformers model directory, a GGUF file, a hub name such as owner/model, "
            "or one of " + ", ".join(WORLD_MODELS),
        )
    return f"{settings.model} from the hub, revision {settings.revision or 'main'}"


def open_model(settings: PolicySettings, use: Use = "trained") -> str:
    """`check_model`, with the model's files looked into where they are on this machine.

    It takes some seconds the first time, in a process of its own; what was found good is
    remembered for this user. The worlds' models are our own: they are not looked into.

    Raises:
        UserError: as `check_model`, `models.checkpoints.check.check_directory` and
            `models.checkpoints.gguf.dequantised`.
    """
    found = check_model(settings)
    if settings.model in WORLD_MODELS:
        return found
    file = gguf_file(settings.model)
    try:
        directory = located(settings)
        return f"{found}: {check_directory(directory, settings, use)}" if directory else found
    except UserError as error:
        if file is None:
            raise
        raise UserError(
            error.what, where=f"GGUF file {file}", expected=error.expected, fix=error.fix
        ) from None


def folder_digest(folder: Path, home: Path) -> str:
    """sha256 over the names and contents of a folder's files; see `file_hashes`."""
    return text_sha256(json.dumps(file_hashes(folder, home), sort_keys=True))


def noted_embedder(at: Slot, model: str) -> Slot:
    """The slot with what an embedding model's vectors depend on: the code and a directory's files;
    a packaged model's name stands for them."""
    directory = None if model in PACKAGED else embedder_directory(model)
    files = {"embedder": folder_digest(directory, at.record.home)} if directory else {}
    return at.using("models.embedders", **files)


def _kept_world_model(model: str, seed: int, home: Path, record: Record) -> BaseModelFiles:
    """A world's model as the record has it."""
    name = _recorded_name(model, seed)
    try:
        digest = record.read_text(f"{name}.digest")
    except Damaged as error:
        say(f"{error}; the model is recorded again")
        digest = None
    if digest is None:
        return BaseModelFiles("", "not made yet")
    folder = record.fetch_folder(name)
    if folder_digest(folder, home) != digest:
        raise UserError(
            f"the model {model} in the record is damaged",
            where=str(folder),
            expected=f"files with the digest {digest[:12]}…",
            fix="delete it if it is a copy of the record, below the home; else start again under "
            "another name: --set experiment=NAME",
        )
    return BaseModelFiles(str(folder.resolve()), digest)


def _recorded_name(model: str, seed: int) -> str:
    world = WORLD_MODELS[model]
    version = text_sha256(code_version(world.pretraining) + world.wording)
    return f"{model}-{seed}-{version[:12]}"


def make_world_model(model: str, seed: int, home: Path) -> Path:
    """The directory of a world's model in this machine's cache, pretrained the first time."""
    done = 0
    with progress(f"pretrain {model}", 100, "%") as tick:

        def advance(step: int, steps: int) -> None:
            nonlocal done
            percent = 100 * step // steps
            tick(percent - done)
            done = percent

        return WORLD_MODELS[model].pretrain(model, seed, home, advance)
