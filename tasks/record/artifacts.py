"""The files of MLflow runs: found on this machine or fetched, and held against their digests."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from constitutions.errors import UserError
from models.files import UNREADABLE, file_sha256, remove
from tasks.record.work import manifest_digest

if TYPE_CHECKING:
    from tasks.record.connection import RecordConnection

MANIFEST = "manifest.json"


class Artifacts:
    """The files of an experiment's runs.

    Args:
        cache: where files are copied to that MLflow keeps elsewhere.
    """

    def __init__(self, record: RecordConnection, cache: Path) -> None:
        self._record, self._cache = record, cache
        self._verified: dict[Path, tuple[int, int]] = {}
        """File → its size and time of change when its digest was last found right."""

    def folder(self, run_id: str) -> Path | None:
        """The folder of a run's files; None: MLflow keeps them elsewhere."""
        return local_folder(self._record.reader.run(run_id).artifact_uri)

    def put(self, run_id: str, outputs: Path) -> None:
        """Keep a folder's files with a run: as links, where the store is on the same disk."""
        folder = self.folder(run_id)
        if folder is None:
            self._record.client.log_artifacts(run_id, str(outputs))
        else:
            link_files(outputs, folder)

    def path(self, run_id: str, name: str) -> Path:
        """Where a file or folder of a run lies, or its copy in the cache."""
        if folder := self.folder(run_id):
            return folder / name
        copy = self._cache / run_id / name
        if not copy.exists():
            scratch = self._cache / f".{run_id}-{os.getpid()}"
            scratch.mkdir(parents=True, exist_ok=True)
            copy.parent.mkdir(parents=True, exist_ok=True)
            fetched = self._record.client.download_artifacts(run_id, name, str(scratch))
            if not copy.exists():
                Path(fetched).replace(copy)
            shutil.rmtree(scratch, ignore_errors=True)
        return copy

    def newest(self, run_id: str, name: str) -> Path:
        """As `path`, of a file that is replaced from time to time: a copy is fetched again."""
        remove(self._cache / run_id / name)
        return self.path(run_id, name)

    def verified(self, run_id: str, name: str, digest: str) -> Path:
        """As `path`, when every byte is as the attempt wrote it.

        Args:
            digest: of the attempt's manifest.

        Raises:
            UserError: a file differs.
        """
        path = self.path(run_id, name)
        bad = self._first_damaged(run_id, name, path, digest)
        if bad and path.is_relative_to(self._cache):  # perhaps only the copy is damaged
            remove(path)
            path = self.path(run_id, name)
            bad = self._first_damaged(run_id, name, path, digest)
        if bad:
            raise self.damage(run_id, bad, path)
        return path

    def damage(self, run_id: str, file: str, path: Path) -> UserError:
        """The error for a file that is not what its attempt wrote."""
        tags = self._record.reader.run(run_id).tags
        stage, iteration, experiment = tags["stage"], tags["iteration"], self._record.experiment
        return UserError(
            f"the artefact {file} is not what the stage wrote: its sha256 differs",
            where=f"stage {stage} of iteration {iteration}, MLflow run {run_id}, {path}",
            expected="the bytes whose digest is in the run's record",
            fix=f"restore the file, or: staple stage {stage} --experiment {experiment} "
            f"--iteration {iteration} --force",
        )

    def _first_damaged(self, run_id: str, name: str, path: Path, digest: str) -> str | None:
        """The first file under `name` that differs from the manifest; None: all are right."""
        try:
            listed = json.loads(self.path(run_id, MANIFEST).read_bytes())
            if manifest_digest(listed) != digest:
                return MANIFEST
        except UNREADABLE:
            return MANIFEST
        for file, facts in listed.items():
            below = Path(file).is_relative_to(name)
            if below and not self._is_intact(path / Path(file).relative_to(name), facts["sha256"]):
                return str(file)
        return None

    def _is_intact(self, path: Path, sha256: str) -> bool:
        if not path.is_file():
            return False
        stat = path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if self._verified.get(path) == state:
            return True
        if file_sha256(path) != sha256:
            return False
        self._verified[path] = state
        return True


def local_folder(uri: str) -> Path | None:
    """The folder that an artifact URI of MLflow names; None: it is elsewhere."""
    if not uri.startswith(("/", "file:")):
        return None
    return Path(url2pathname(urlsplit(uri).path if uri.startswith("file:") else uri))


def link_files(outputs: Path, folder: Path) -> None:
    """Copy a folder's files: as links, where both are on the same disk."""
    shutil.copytree(outputs, folder, dirs_exist_ok=True, copy_function=_linked)


def _linked(source: str, target: str) -> str:
    """Link a file, or copy it where the disk cannot do that; nobody changes either of them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
