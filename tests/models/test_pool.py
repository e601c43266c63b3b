"""The same bytes from this process and from Ray's workers, on two nodes that share no disk.

Both nodes are processes of this machine; one of them cannot see the driver's model (it is told so
by tests/hidden_disk), and every piece of it travels through Ray.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pool_jobs
import psutil
import pytest
from pool_place import LOCAL, Place, make_place
from scripted import ENGINE

from constitutions.errors import UserError
from models.judges.registry import JudgeSettings, judge_pool
from models.policy import PolicySettings, PoolSettings
from models.pools import ray_cluster as cluster
from models.pools.local import LocalPool
from models.pools.opening import open_pool
from tasks.evaluate import EvaluateSettings, evaluate_stage
from tasks.record.record import Attempt
from tasks.score import ScoreSettings, score_stage

TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Nodes:
    """A cluster of two: the driver's, and one that cannot see `disk`."""

    pool: PoolSettings
    far_home: Path


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def nodes(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    far = tmp_path_factory.mktemp("far")
    hidden = {
        "STAPLE_HOME": str(far),
        "HIDDEN_DISK": str(disk),
        "PYTHONPATH": f"{TESTS / 'hidden_disk'}:{TESTS.parent}:{TESTS}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        own: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100 << 20}
        made = Cluster(initialize_head=True, head_node_args={**own, "include_dashboard": False})
        made.add_node(**own, env_vars=hidden)
        try:
            yield Nodes(PoolSettings(kind="ray", address=made.address, workers=2), far)
        finally:
            ray.shutdown()
            made.shutdown()
            cluster._addresses.clear()


@pytest.fixture(scope="module")
def place(disk: Path, migrated_database: Path) -> Iterator[Place]:
    (disk / "mlflow.db").write_bytes(migrated_database.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(disk)
        patch.delenv("STAPLE_HOME", raising=False)
        yield make_place(disk)


def file(attempt: Attempt, name: str) -> bytes:
    return attempt.path(name).read_bytes()


# Byte for byte -------------------------------------------------------------------------------


def test_mined_by_two_workers_of_which_one_is_killed(
    place: Place, nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    here, killed, ended = place.mine(), set[int](), threading.Event()

    def kill_one_at_work() -> None:
        while not killed and not ended.wait(0.01):
            for pid in sorted(workers(".run"))[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)

    thread = threading.Thread(target=kill_one_at_work)
    thread.start()
    try:
        far = place.mine(nodes.pool)
    finally:
        ended.set()
        thread.join()
    assert killed and "a worker was lost at shard" in caplog.text
    assert file(far, "mined.parquet") == file(here, "mined.parquet")
    assert far.fingerprint == here.fingerprint, "where it runs is no part of it"
    assert sorted(p.name for p in copies(nodes.far_home)) == ["adapter", "small"]
    assert not copies(place.at.record.home), "the driver's node uses what is there"


def copies(home: Path) -> dict[Path, int]:
    """Folders that travelled to a node, and their weights' inodes."""
    found = [path for path in (home / "models").glob("*/*") if path.is_dir()]
    return {path: next(path.glob("*.safetensors")).stat().st_ino for path in found}


def workers(doing: str = "") -> set[int]:
    """Process ids of Ray's workers: all of them, or those that are at one of our methods."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name().startswith(f"ray::Worker{doing}"):
                found.add(process.pid)
    return found


def judge(model: Path, pool: PoolSettings, **how: Any) -> JudgeSettings:
    policy = PolicySettings(model=str(model), pool=pool, **ENGINE)
    given = {"kind": "pairwise", "max_tokens": 12, "retries": 1, "temperature": 0.9} | how
    return JudgeSettings(policy=policy, **given)


def test_scored_by_a_judge_in_two_workers(place: Place, nodes: Nodes) -> None:
    mined = place.at.record.needs("mine", 1)

    def scored(where: PoolSettings) -> Attempt:
        asked = judge(place.model, where, kind="absolute")
        how = ScoreSettings(similarity="judge", judge=asked, max_unscored=1.0)
        return score_stage(replace(place.at, shard_size=3), how, mined)

    here, before, far = scored(LOCAL), copies(nodes.far_home), scored(nodes.pool)
    assert file(here, "scored.parquet") == file(far, "scored.parquet")
    assert here.fingerprint == far.fingerprint
    assert before and copies(nodes.far_home) == before, "the model reached the node once"


def test_answered_and_judged_in_two_workers(place: Place, nodes: Nodes) -> None:
    """A random judge says nothing that counts: the stage ends as it must, with all parts kept."""
    here, far = evaluated(place, LOCAL), evaluated(place, nodes.pool)
    assert here == far
    assert {name.rsplit("-", 2)[0] for name in here} == {
        "answers",
        "mt_bench-answers",
        "comparisons",
        "mt_bench-single",
    }
    assert len(here) == 3 + 2 + 6 + 2


def evaluated(place: Place, where: PoolSettings) -> dict[str, bytes]:
    """Every finished shard of a whole evaluation."""
    questions = [
        {"question_id": i, "category": "writing", "turns": [f"What is {i}?", "Why?"]}
        for i in range(4)
    ]
    text = "[Q] {question} [A] {answer}"
    dialogue = "{question_1} {answer_1} {question_2} {answer_2}"
    prompts = [
        {"name": name, "type": "single", "system_prompt": "Judge.", "prompt_template": template}
        for name, template in (("single-v1", text), ("single-v1-multi-turn", dialogue))
    ]
    for name, rows in (("questions", questions), ("prompts", prompts)):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    llm = judge(place.model, where)
    settings = EvaluateSettings(
        judge="similarity",
        also=[llm],
        max_failed=0.9,
        resamples=200,
        max_response_tokens=10,
        max_principle_tokens=5,
        benchmarks={
            "mt_bench": {
                "questions": "questions.jsonl",
                "judge_prompts": "prompts.jsonl",
                "judge": llm,
            }
        },
    )
    at = replace(place.at, record=replace_home(place, f"evaluated-{where.kind}"))
    with pytest.raises(UserError, match="MT-Bench's ratings, judge small: all 8 judgements failed"):
        evaluate_stage(at, settings, ScoreSettings(), place.source(where), place.held_out)
    parts = at.record.home.glob("work/*/parts/*.parquet")
    return {part.stem: part.read_bytes() for part in parts}


def replace_home(place: Place, name: str) -> Any:
    """The same record with another place to work."""
    record = place.at.record
    return type(record)(record.experiment, record.home.parent / name)


# Losses and errors ---------------------------------------------------------------------------

NUMBERS = {n: [n] for n in range(5)}


def run(where: PoolSettings, compute: Any, opener: Any = pool_jobs.open_nothing) -> list[str]:
    policy = PolicySettings(pool=where, **ENGINE)
    with open_pool(policy, opener, models=["owner/on-the-hub"]) as opened:
        done = sorted(opened.map(compute, NUMBERS, lambda _: None))
    return [row for finished in done for row in finished.rows]


def test_a_shard_that_kills_its_workers_is_given_up(nodes: Nodes) -> None:
    assert run(nodes.pool, pool_jobs.describe) == run(LOCAL, pool_jobs.describe)
    with pytest.raises(UserError, match=r"3 workers were lost at shard 2; the last one: .*died"):
        run(nodes.pool, pool_jobs.die_at_two)


def test_errors_of_a_worker_come_out_as_they_are(nodes: Nodes) -> None:
    with pytest.raises(ZeroDivisionError, match=r"(?s)pool_jobs\.py.*two is too much") as raised:
        run(nodes.pool, pool_jobs.raise_at_two)
    assert "raise_at_two" in str(raised.value), "the worker's traceback"
    wrong = "engine: it has no wheels; expected four; buy some"
    with pytest.raises(UserError) as told:
        run(nodes.pool, pool_jobs.describe, pool_jobs.open_badly)
    assert (type(told.value), str(told.value)) == (UserError, wrong)


def test_workers_end_with_the_pool_and_none_starts_for_nothing(nodes: Nodes) -> None:
    policy, ticks = PolicySettings(pool=nodes.pool, **ENGINE), list[int]()
    wait_for_their_end()
    with open_pool(policy, pool_jobs.open_nothing, models=[]) as opened:
        assert list(opened.map(pool_jobs.describe, {}, ticks.append)) == []
        assert not workers()
        list(opened.map(pool_jobs.describe, NUMBERS, ticks.append))
        first = wait_for(2)  # one may have done all five before the other was up
        list(opened.map(pool_jobs.describe, NUMBERS, ticks.append))
        assert workers() == first, "two jobs, the same engines"
    wait_for_their_end()
    assert sum(ticks) == 10


def wait_for_their_end() -> None:
    """Those of the other node end in their own time."""
    wait_for(0)


def wait_for(count: int) -> set[int]:
    """The workers, as soon as there are so many."""
    deadline = time.monotonic() + 60
    while len(found := workers()) != count:
        assert time.monotonic() < deadline, f"{len(found)} workers, not {count}"
        time.sleep(0.05)
    return found


def test_what_a_cluster_cannot_give_is_said(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = PolicySettings(pool=nodes.pool, **ENGINE | {"device": "cuda"})
    with (
        pytest.raises(UserError, match="the Ray cluster has no GPU"),
        open_pool(on_gpu, pool_jobs.open_nothing, models=[]) as opened,
    ):
        list(opened.map(pool_jobs.describe, NUMBERS, lambda _: None))
    with pytest.raises(UserError, match="one process cannot join two Ray clusters"):
        run(PoolSettings(kind="ray", address="127.0.0.1:1"), pool_jobs.describe)
    monkeypatch.setattr(cluster, "identity", lambda: {"torch": "1.0"})
    with pytest.raises(UserError, match=r"Ray node .*: torch is .* there, but 1.0 where the stage"):
        run(nodes.pool, pool_jobs.describe)


def test_settings() -> None:
    assert PolicySettings(pool="ray").pool == PoolSettings(kind="ray")
    assert isinstance(open_pool(PolicySettings(), pool_jobs.open_nothing, models=[]), LocalPool)
    for address in ("ray://head:10001", "head", "http://head:6379"):
        with pytest.raises(ValueError, match="address"):
            PoolSettings(kind="ray", address=address)
    settings = judge(Path("m"), PoolSettings(kind="ray"))
    assert settings.policy is not None
    policy = settings.policy.model_copy(update={"endpoint": "http://127.0.0.1:1"})
    elsewhere = settings.model_copy(update={"policy": policy})
    assert isinstance(judge_pool(elsewhere, pool_jobs.open_nothing), LocalPool), "a client"


# A Ray of our own ----------------------------------------------------------------------------

OWN = """
import threading, psutil, pool_jobs
from pathlib import Path
from models.policy import PolicySettings
from models.pools.opening import open_pool

done = []

def work():
    settings = PolicySettings(device="cpu", pool="ray")
    with open_pool(settings, pool_jobs.open_nothing, models=[]) as opened:
        for finished in opened.map(pool_jobs.describe, {0: [1, 2]}, done.append):
            done.extend(finished.rows)
            for process in psutil.Process().children(recursive=True):
                for connection in process.net_connections("tcp"):
                    if connection.status == "LISTEN":
                        print("listens", process.name(), connection.laddr.ip)

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(done, Path("~/.ray").expanduser().exists())
"""


NOBODY = """
from models.pools.ray_cluster import join
from models.policy import PoolSettings
join(PoolSettings(kind="ray", address="127.0.0.1:1"), cpus=1)
"""


def alone(script: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that has joined no Ray."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=home,
        env={**clean, "HOME": str(home), "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_address_that_nobody_answers(tmp_path: Path) -> None:
    told = alone(NOBODY, tmp_path).stderr.splitlines()[-1]
    assert "'pool.address' = 127.0.0.1:1: the Ray cluster cannot be joined: " in told
    assert "refused" in told


def test_a_ray_of_our_own(tmp_path: Path) -> None:
    """In a thread, as Prefect runs tasks. Nothing but loopback listens."""
    done = alone(OWN, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    *heard, last = done.stdout.splitlines()
    assert last == "[2, 'an engine: 1', 'an engine: 2'] False", "and no token is on the disk"
    assert any("gcs_server" in line for line in heard) and any("ray::Worker" in h for h in heard)
    addresses = {line.split()[-1].removeprefix("::ffff:") for line in heard}
    assert addresses == {"127.0.0.1"}
