"""A small record in which stages run with a policy and its adapter, in any pool."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from chat_model import build_chat_model
from scripted import ENGINE

from models.policy import PolicySettings, PoolSettings
from models.settings import Settings
from tasks.corpus.prompts import CorpusSettings
from tasks.mine import MineSettings, mine_stage
from tasks.policies.opening import PolicySource
from tasks.prompts import PromptSettings, prompts_stage
from tasks.record.record import Attempt, Record
from tasks.record.slot import Slot
from tasks.record.work import Metrics, Workspace

LOCAL = PoolSettings()


class NoSettings(Settings):
    pass


@dataclass(frozen=True)
class Place:
    """A record with prompts, and a policy with an adapter."""

    at: Slot
    model: Path
    prompts: Attempt
    held_out: Attempt
    adapter: Attempt

    def source(self, pool: PoolSettings = LOCAL) -> PolicySource:
        settings = PolicySettings(model=str(self.model), pool=pool, **ENGINE)
        return PolicySource(settings, str(self.model), "digest", self.adapter)

    def mine(self, pool: PoolSettings = LOCAL) -> Attempt:
        """Ten prompts in shards of two, whatever the record has."""
        how = MineSettings(
            samples=2,
            max_response_tokens=12,
            max_principle_tokens=6,
            max_critique_tokens=6,
        )
        return mine_stage(self.at, how, self.source(pool), self.prompts)


def make_place(folder: Path) -> Place:
    """In an empty folder that is the working directory."""
    rows = [{"prompt": f"What is {i}?", "gold": f"It is {i}, of course."} for i in range(16)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    slots = [
        Slot(Record("pools", folder / ".staple"), t, 0, mode=lambda _: "force", shard_size=2)
        for t in (0, 1)
    ]
    settings = PromptSettings(
        sources=(CorpusSettings(path="rows.jsonl"),), first=10, later=1, held_out=5
    )
    held_out, prompts = (prompts_stage(slot, settings) for slot in slots)
    model = build_chat_model(folder / "disk" / "small", "llama")
    return Place(slots[1], model, prompts, held_out, _adapter(slots[1], model))


def _adapter(at: Slot, model: Path) -> Attempt:
    """One that makes a difference."""

    def compute(work: Workspace) -> Metrics:
        import torch

        from models.training.adapter import AdapterSettings
        from models.training.bases import load_base
        from models.training.updates import new_adapter, save_adapter

        base, _ = load_base(model, quantization="none", dtype="float32", device="cpu")
        adapted = new_adapter(base, AdapterSettings(lora_rank=2), seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        save_adapter(adapted, work.outputs / "adapter", data_digest="none")
        return {}

    return at.attempt("train", NoSettings(), {}, compute)
