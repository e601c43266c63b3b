"""What many tests share: quiet, offline libraries, and folders that one worker makes for all."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from pathlib import Path

import durations
import pytest
from filelock import FileLock

from models.engine import threads

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # two threads each, and several processes, slow a small machine down
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_LEVEL="CRITICAL",
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="120",
    DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_LOGGING_LEVEL="WARNING",
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
    TOKENIZERS_PARALLELISM="false",
    COLUMNS="160",  # tables that do not wrap
)
with suppress(ImportError), redirect_stderr(sys.__stderr__):
    # its handler closes the stream of its import where a server sets logging up: not pytest's, then
    import absl.logging  # noqa: F401
threads.cores = lambda: 1  # type: ignore[assignment]  # for the same reason
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs aside
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of tests would inherit it
ROOT = Path(__file__).parent.parent
GIVEN_SERVERS = os.environ.get("STAPLE_TEST_SERVERS") == "1"
"""Whether flows and records go to the servers that the environment names (`make test-servers`)."""
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile all modules anew
sys.dont_write_bytecode = False
if not GIVEN_SERVERS:
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def pytest_configure(config: pytest.Config) -> None:
    if out := os.environ.get("STAPLE_TEST_DURATIONS"):
        config.pluginmanager.register(durations.Durations(Path(out).absolute()))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-quick` does not import slow files: what they import takes longer than its tests."""
    if config.getoption("markexpr") != "not slow" or collection_path.suffix != ".py":
        return None
    quick = "pytest.mark.quick" in collection_path.read_text("utf-8")
    return True if is_slow(collection_path) and not quick else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: a worker that ends with one works alone."""
    items.sort(key=lambda item: durations.seconds(item.path), reverse=True)
    for item in items:
        if is_slow(item.path) and not item.get_closest_marker("quick"):
            item.add_marker(pytest.mark.slow)


def is_slow(path: Path) -> bool:
    """Whether a file of tests took longer than `durations.SLOW`, or was not measured yet."""
    return path.name.startswith("test_") and durations.seconds(path) > durations.SLOW


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """A pool that closes collects garbage: half a second each time among all that is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_cache(once: Once) -> None:
    """What a user's experiments share is shared by all tests, and by nothing else."""
    os.environ["XDG_CACHE_HOME"] = str(once("cache", lambda folder: None))


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)` is a folder that `make` filled, one time for all workers of this run.

    The first who asks makes it while the others wait. Nobody may change it: copy it instead.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        shared.mkdir(exist_ok=True)
        place, made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                make(place)
                made.touch()
        return place

    return folder


@pytest.fixture(scope="session")
def migrated_database(once: Once) -> Path:
    """An empty MLflow database with its tables: creating them takes seconds, copying does not."""

    def make(folder: Path) -> None:
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}").search_experiments()

    return once("mlflow", make) / "mlflow.db"


@pytest.fixture(scope="session")
def prefect_home(once: Once) -> Path:
    """A folder for PREFECT_HOME with an empty database: creating its tables takes half a minute."""

    def make(folder: Path) -> None:
        subprocess.run(
            [sys.executable, "-c", "from flows.server.prefect_database import make; make()"],
            env={**os.environ, "PREFECT_HOME": str(folder), "PYTHONPATH": str(ROOT)},
            check=True,
        )

    return once("prefect", make)


@pytest.fixture(scope="session")
def lineage(once: Once, migrated_database: Path) -> Path:
    """A folder with a model, rows and the record of "lineage", for all modules to copy."""
    import small_loop

    return once("lineage", lambda folder: small_loop.make_finished(folder, migrated_database))


@pytest.fixture(scope="session")
def planted_writer(once: Once) -> Path:
    """The folder of a planted model that was taught little but to write (`planted_writer.WRITER`)."""
    from planted_writer import WRITER

    from models.planted.pretrain import planted_model

    return once("writer", lambda folder: planted_model(folder, 0, None, WRITER))


@pytest.fixture
def workplace(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty working directory with a database of its own; the project's home is inside."""
    if not GIVEN_SERVERS:
        shutil.copy(request.getfixturevalue("migrated_database"), tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAPLE_HOME", str(tmp_path / ".staple"))
    return tmp_path


@pytest.fixture(scope="session")
def prefect_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A real Prefect server on a temporary database, once for all tests that run flows."""
    if GIVEN_SERVERS:
        yield
        return
    from prefect.testing import utilities

    folder = tmp_path_factory.mktemp("prefect")
    shutil.copy(request.getfixturevalue("prefect_home") / "prefect.db", folder / "prefect-test.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilities, "mkdtemp", lambda: str(folder))
        with utilities.prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The folder of real corpora; tests that need it are skipped where it is absent."""
    return real_data("corpora")


@pytest.fixture(scope="session")
def sami_reference() -> Path:
    """The folder of SAMI's published constitutions and responses; skipped where it is absent."""
    return real_data("sami")


@pytest.fixture(scope="session")
def sami_responses() -> tuple[Path, Path]:
    """The response files that SAMI's authors published: the trained policy's, and the base's."""
    folder = real_data("sami") / "responses"
    name = "mistral-opus-constitution-temperature-0.0.json"
    return folder / f"iteration-1-epoch-0.12-{name}", folder / f"base-{name}"


def real_data(name: str) -> Path:
    """A folder of real data; a test that needs it is skipped where it is absent."""
    default = Path(__file__).parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("STAPLE_TEST_DATA", default)) / name
    if not folder.is_dir():
        pytest.skip(f"real data are not at {folder}; set STAPLE_TEST_DATA to the folder above")
    return folder
