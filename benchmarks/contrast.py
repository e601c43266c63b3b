"""SAMI's training step beside whole rows: every response after every prompt, as the reference does.

Processor time of the loss and its gradient for one query, LoRA on a random Llama, one thread.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, interleaved
from benchmarks.random_model import random_llama

CONSTITUTIONS, PROMPT, RESPONSE, ROUNDS = 4, 250, 100, 5
TOLERANCE = 1e-4


def sami_vs_whole_rows() -> Result:
    """One query of C = 4 constitutions; the same loss, by 4 rows or by 16."""
    import torch

    from models.training.adapter import AdapterSettings
    from models.training.bases import load_base
    from models.training.encoding import Group
    from models.training.updates import new_adapter

    torch.set_num_threads(1)
    draw = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 4096) for _ in range(length))

    def some(length: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tokens(length + draw.randrange(-20, 20)) for _ in range(CONSTITUTIONS))

    group = Group(some(PROMPT), some(RESPONSE))
    with tempfile.TemporaryDirectory() as folder:
        base, _ = load_base(
            random_llama(Path(folder) / "model"), quantization="none", dtype="float32", device="cpu"
        )
        model = new_adapter(base, AdapterSettings(), seed=0)
        losses = {"ours": _ours(model, group), "peer": _whole_rows(model, group)}
        if abs(losses["ours"] - losses["peer"]) > TOLERANCE:
            raise RuntimeError(f"the two losses differ: {losses}")
        ways: dict[str, Callable[[], object]] = {
            "ours": partial(_ours, model, group),
            "peer": partial(_whole_rows, model, group),
        }
        seconds = interleaved(ways, ROUNDS, time.process_time)
    return Result(
        ratio=seconds["peer"] / seconds["ours"],
        ours=1 / seconds["ours"],
        peer=1 / seconds["peer"],
        unit="queries/s",
        details={
            "clock": "processor time",
            "constitutions": CONSTITUTIONS,
            "prompt_tokens": PROMPT,
            "response_tokens": RESPONSE,
            "peer_package": "C x C whole rows, logits of every token",
            "parameters": base.num_parameters(),
            "threads": 1,
        },
    )


def _ours(model: Any, group: Any) -> float:
    from models.training.sami import Information

    (part,) = Information(budget=1 << 20).parts(model, {"group": group})
    return _stepped(model, part())


def _whole_rows(model: Any, group: Any) -> float:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from models.training.sami import sami_loss

    pairs = [(p, r) for p in group.prompts for r in group.responses]
    rows = [torch.tensor([*prompt, *response]) for prompt, response in pairs]
    ids = pad_sequence(rows, batch_first=True)
    logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    given = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    place = torch.arange(ids.shape[1] - 1)
    starts = torch.tensor([len(prompt) - 1 for prompt, _ in pairs])[:, None]
    lengths = torch.tensor([len(response) for _, response in pairs])[:, None]
    counted = (place >= starts) & (place < starts + lengths)
    matrix = (given * counted).sum(-1) / lengths[:, 0]
    return _stepped(model, sami_loss(matrix.view(len(group.prompts), -1)))


def _stepped(model: Any, loss: Any) -> float:
    model.zero_grad()
    loss.backward()
    return float(loss.item())
