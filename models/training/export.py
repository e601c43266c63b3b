"""Writes a trained policy as a directory that other programs load, and checks it.

`flows/commands/export.py` calls `export`. It reads the weights back with plain `transformers` and
`peft`, as a user does, and compares their logits with those of the policy that was evaluated.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from constitutions.errors import UserError
from models.chat import Chat
from models.policy import Messages, PolicySettings
from models.training.bases import find_base, keep_unpacked, load_base, nf4_config
from models.training.updates import ADAPTER_WEIGHTS, PROVENANCE, attach_adapter

Kind = Literal["adapter", "merged", "full"]
"""A PEFT adapter; the base with the adapter added; the weights of a full fine-tuning."""
CHECKED_PROMPTS = 8
CHECKED_TOKENS = 128
"""Limits of the check, which keeps the logits after every token."""
AGREEMENT = "agreement.json"
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class ExportAgreement:
    """Next-token distributions of an exported policy beside those of the evaluated one."""

    loaded: str
    """How the export was loaded."""
    largest: float
    """The largest absolute difference of a logit."""
    kl: float
    """The mean KL(evaluated ‖ exported) over the tokens, in nats."""
    same_top: float
    """Share of the tokens, in [0, 1], after which both have the same most probable token."""
    tokens: int
    """Number of compared tokens."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The directory that was written, and how closely it agrees with the evaluated policy."""

    path: Path
    kind: Kind
    agreements: tuple[ExportAgreement, ...]


def export(
    model: str,
    policy: PolicySettings,
    adapter: Path,
    out: Path,
    *,
    merge: bool,
    prompts: Sequence[Messages],
) -> Exported:
    """Write a policy to `out`, read it back and compare it; write all of it or nothing.

    A merged adapter is added to the dequantised NF4 base and written in bfloat16. After a full
    fine-tuning the weights are written as they are.

    Args:
        model: directory or hub name of the base, as it is loaded here.
        policy: the evaluated policy's settings; `policy.model` names the base in the export.
        adapter: the folder that the train stage wrote.
        out: a directory that is absent or empty.
        merge: write a complete model instead of an adapter.
        prompts: at least one; the agreement is measured on the first `CHECKED_PROMPTS`.

    Raises:
        UserError: `out` is not empty, or the base or the adapter cannot be loaded.
    """
    check_free(out)
    unfinished = out.absolute().with_name(f"{out.absolute().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    base, tokenizer = load_base(model, **policy.loading)
    tokens = _tokens(tokenizer, policy, prompts)
    wanted = _logits(attach_adapter(base, adapter), tokens)
    del base
    kind: Kind = "full"
    if (adapter / ADAPTER_WEIGHTS).is_file():
        kind = "merged" if merge else "adapter"
    _write(kind, model, policy, adapter, unfinished)
    found = []
    for how, loaded in _read_back(kind, model, policy, unfinished):
        found.append(_compared(how, wanted, _logits(loaded, tokens)))
        del loaded
    (unfinished / AGREEMENT).write_text(json.dumps([asdict(a) for a in found], indent=1), "utf-8")
    if out.is_dir():
        out.rmdir()
    os.replace(unfinished, out)
    return Exported(out, kind, tuple(found))


def check_free(out: Path) -> None:
    """Check that an export overwrites nothing.

    Raises:
        UserError: `out` is a file, or a directory that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "the directory is not empty",
            where=str(out),
            expected="a directory that is absent or empty",
            fix="choose another with --out, or delete it",
        )


def _write(kind: Kind, model: str, policy: PolicySettings, adapter: Path, out: Path) -> None:
    if kind == "full":
        shutil.copytree(adapter, out, dirs_exist_ok=True)
        return
    shutil.copy(adapter / PROVENANCE, out / PROVENANCE)
    if kind == "merged":
        base, tokenizer = load_base(model, **policy.loading)
        merged = attach_adapter(base, adapter, merge=True)
        cast(Any, merged).to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
        return
    shutil.copy(adapter / ADAPTER_WEIGHTS, out / ADAPTER_WEIGHTS)
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    config |= {"base_model_name_or_path": policy.model, "revision": policy.revision}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")


def _read_back(
    kind: Kind, model: str, policy: PolicySettings, out: Path
) -> Iterator[tuple[str, Any]]:
    """The export in every way that others load it: a description, and the loaded model.

    One model at a time is in memory, if the caller lets go of each before it takes the next.
    """
    gc.collect()  # of the base, which hooks of its own may hold
    if kind != "adapter":
        dtype = "bfloat16" if kind == "merged" else policy.dtype
        yield "transformers", _load_plain(str(out), policy.model_copy(update={"dtype": dtype}))
        return
    from peft import PeftModel

    directory = str(find_base(model, policy.revision))
    ways = {"the base as it was trained on": policy.quantization}
    if policy.quantization == "nf4":
        ways["the base not quantised"] = "none"
    for how, quantization in ways.items():
        plain = _load_plain(directory, policy, quantization)
        yield f"transformers and peft, {how}", PeftModel.from_pretrained(plain, str(out))
        del plain
        gc.collect()


def _load_plain(directory: str, policy: PolicySettings, quantization: str = "none") -> Any:
    """A model as any user loads it, with transformers alone."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, policy.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=nf4_config(dtype) if quantization == "nf4" else None,
        dtype=dtype,
        device_map="auto" if policy.device != "cpu" and torch.cuda.is_available() else None,
    )
    keep_unpacked(model)  # the packed kernel of some CPUs rounds far more than any GPU's
    return model


def _tokens(tokenizer: Any, policy: PolicySettings, prompts: Sequence[Messages]) -> list[list[int]]:
    """Token ids of the prompts, cut to `CHECKED_TOKENS`."""
    chat = Chat(tokenizer, policy)
    return [chat.prompt(p)[:CHECKED_TOKENS] for p in prompts[:CHECKED_PROMPTS]]


@torch.no_grad()
def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits after every token, one prompt at a time: (tokens, vocabulary), float32."""
    model.eval()
    rows = [
        model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].float().cpu()
        for ids in prompts
    ]
    return torch.cat(rows)


def _compared(how: str, wanted: torch.Tensor, found: torch.Tensor) -> ExportAgreement:
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    return ExportAgreement(
        loaded=how,
        largest=(wanted - found).abs().max().item(),
        kl=max(0.0, (p.exp() * (p - q)).sum(-1).mean().item()),
        same_top=(wanted.argmax(-1) == found.argmax(-1)).float().mean().item(),
        tokens=len(wanted),
    )
