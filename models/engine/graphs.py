"""Decoding steps as CUDA graphs, which are launched as a whole instead of kernel by kernel.

A step of a large model launches thousands of small kernels, and Python takes longer to launch them
than the GPU takes to run them. Between two changes of the batch all steps have the same shapes: one
step is recorded and then replayed, on the tensors of the cache that it was recorded with.
`models/engine/decoding.py` uses it on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from models.engine.shared_prefix import PrefixCache

Tensor = torch.Tensor
Forward = Callable[[PrefixCache, Tensor], Tensor]
"""(cache, the last tokens (rows,)) to the next logits (rows, vocabulary)."""
SETTLED = 2
"""Steps with the same rows before one is recorded: recording takes as long as several steps."""

_log = logging.getLogger(__name__)


class Steps:
    """Computes decoding steps; records and replays them where that works and saves time.

    Args:
        forward: computes a step.
        devices: those of the model; a recording needs a single GPU.
    """

    def __init__(self, forward: Forward, devices: set[torch.device]) -> None:
        self.forward = forward
        self.possible = {device.type for device in devices} == {"cuda"} and len(devices) == 1
        self.played = 0
        """Number of replayed steps so far."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._of: tuple[int, int, int] | None = None
        self._steps = 0
        self._tokens = self._logits = torch.empty(0)

    def step(self, cache: PrefixCache, tokens: Tensor) -> Tensor:
        """The next logits, (rows, vocabulary); the next step overwrites them."""
        if not self.possible:
            return self.forward(cache, tokens)
        if self._graph and self._of == cache.shape and cache.room:
            self._tokens.copy_(tokens)
            self._graph.replay()
            cache.moved()
            self.played += 1
            return self._logits
        logits = self.forward(cache, tokens)
        self._steps = self._steps + 1 if self._of == cache.shape else 0
        self._graph, self._of = None, cache.shape
        if self._steps >= SETTLED and cache.room:
            self._record(cache, tokens)
        return logits

    def forget(self) -> None:
        """Drop the recording, whose shapes no longer hold."""
        self._graph, self._of = None, None
        self._tokens = self._logits = torch.empty(0)

    def _record(self, cache: PrefixCache, tokens: Tensor) -> None:
        graph = torch.cuda.CUDAGraph()
        self._tokens = tokens.clone()
        try:
            with cache.recording(), torch.cuda.graph(graph):
                self._logits = self.forward(cache, self._tokens)
        except torch.OutOfMemoryError:
            self.forget()
            raise
        except RuntimeError as error:  # something in the model waits for the GPU
            _log.info("decoding without CUDA graphs: %s", error)
            self.possible = False
            self.forget()
            return
        self._graph = graph
