"""The same bytes whatever OMP_NUM_THREADS says and whatever ran before in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import small_job
import torch
from chat_model import build_chat_model
from threadpoolctl import threadpool_info, threadpool_limits

from models.engine import threads
from models.training.adapter import AdapterSettings
from models.training.encoding import EncodedExample
from models.training.job import run
from tasks.clustering.agglomeration import group
from tasks.clustering.features import block_features
from tasks.clustering.picture import map_principles

ROOT = Path(__file__).parents[2]


def blas() -> set[int]:
    return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}


def test_a_block_has_its_threads_and_gives_them_back() -> None:
    np.ones((2, 2)) @ np.ones((2, 2))
    torch.set_num_threads(1)
    with threads.pinned(2):
        assert torch.get_num_threads() == 2
        with threads.pinned():
            assert torch.get_num_threads() == 1
            assert blas() == {1}
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_the_number_is_the_machines_not_the_environments() -> None:
    script = (
        "import torch; from models.engine import threads; threads.use(None)\n"
        "print(torch.get_num_threads() == threads.cores(), threads.cores())"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": number},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for number in ("1", "3")
    ]
    assert said[0] == said[1]
    assert said[0][0] == "True"


@contextmanager
def something_ran_before(count: int) -> Iterator[None]:
    """Torch, BLAS and numba as another part of the program might have left them."""
    import numba

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    with threadpool_limits(count):
        yield
    torch.set_num_threads(before)


def test_a_training_does_not_depend_on_threads(tmp_path: Path) -> None:
    build_chat_model(tmp_path / "model", "llama3", hidden=256)
    settings = AdapterSettings(batch_size=8, micro_batch_tokens=4096, lora_rank=16)
    ids = tuple(range(3, 203))
    examples = [EncodedExample(ids[n:], (False, *(True,) * (199 - n)), 1.0) for n in range(16)]

    def trained(threads: int) -> bytes:
        with something_ran_before(threads):
            done = small_job.job(tmp_path / "model", tmp_path / str(threads), settings)
            run(done, examples)
        return (done.out / "adapter_model.safetensors").read_bytes()

    assert trained(1) == trained(2)


def test_the_map_and_the_clusters_do_not_depend_on_threads() -> None:
    rng = np.random.default_rng(0)
    block = rng.normal(size=(300, 700)).astype(np.float32)

    def drawn(threads: int) -> tuple[bytes, bytes, bytes]:
        with something_ran_before(threads):
            features = block_features(block)
            places = map_principles(features, "umap", seed=1)
            return features.vectors.tobytes(), places.tobytes(), group(features, 0.95).tobytes()

    assert drawn(1) == drawn(2)
