"""A trained policy as a directory that other programs load, and how closely it agrees.

`flows/commands/export.py` calls `export`. Weights are read back with plain `transformers` and
`peft`, as a user would, and their logits compared with those of the policy that was trained and
evaluated.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from constitutions.errors import UserError
from models.chat import Chat
from models.policy import Messages, PolicySettings
from models.training.bases import find_base, keep_unpacked, load_base, nf4_config
from models.training.updates import ADAPTER_WEIGHTS, PROVENANCE, attach_adapter

if TYPE_CHECKING:
    pass

Kind = Literal["adapter", "merged", "full"]
"""A PEFT adapter; the base with the adapter added; the weights of a full fine-tuning."""
CHECKED_PROMPTS = 8
CHECKED_TOKENS = 128
"""Limits of the check, which keeps all logits of a large vocabulary."""
AGREEMENT = "agreement.json"
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class ExportAgreement:
    """Next-token distributions of an exported policy beside those of the evaluated one."""

    loaded: str
    """How the export was loaded."""
    largest: float
    """Largest absolute difference of a logit."""
    kl: float
    """Mean KL(evaluated ‖ exported) over the tokens, in nats."""
    same_top: float
    """Share of the tokens, in [0, 1], after which both have the same most probable token."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Exported:
    """The directory that was written, and how closely it agrees."""

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
    """Write a policy to `out`, read it back, and compare; all of it or nothing.

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
        UserError: `out` holds something; a base or an adapter that cannot be loaded.
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
    _WRITE[kind](model, policy, adapter, unfinished)
    found = []
    for how, load in _ways(kind, model, policy, unfinished).items():
        gc.collect()  # one model at a time in memory
        found.append(_compared(how, wanted, _logits(load(), tokens)))
    (unfinished / AGREEMENT).write_text(json.dumps([asdict(a) for a in found], indent=1), "utf-8")
    if out.is_dir():
        out.rmdir()
    os.replace(unfinished, out)
    return Exported(out, kind, tuple(found))


def check_free(out: Path) -> None:
    """See that an export overwrites nothing.

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


# What is written ---------------------------------------------------------------------------


def _write_adapter(model: str, policy: PolicySettings, adapter: Path, out: Path) -> None:
    for name in (ADAPTER_WEIGHTS, PROVENANCE):
        shutil.copy(adapter / name, out / name)
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = policy.model
    config["revision"] = policy.revision
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")


def _write_merged(model: str, policy: PolicySettings, adapter: Path, out: Path) -> None:
    base, tokenizer = load_base(model, **policy.loading)
    merged = attach_adapter(base, adapter, merge=True)
    cast(Any, merged).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copy(adapter / PROVENANCE, out / PROVENANCE)


def _write_full(model: str, policy: PolicySettings, adapter: Path, out: Path) -> None:
    shutil.copytree(adapter, out, dirs_exist_ok=True)


_WRITE: dict[Kind, Callable[[str, PolicySettings, Path, Path], None]] = {
    "adapter": _write_adapter,
    "merged": _write_merged,
    "full": _write_full,
}


# Whether it is the same policy -------------------------------------------------------------


def _ways(
    kind: Kind, model: str, policy: PolicySettings, out: Path
) -> dict[str, Callable[[], Any]]:
    """Ways in which others load the export: a description and a loader of each."""
    if kind != "adapter":
        dtype = "bfloat16" if kind == "merged" else policy.dtype
        held = policy.model_copy(update={"dtype": dtype})
        return {"transformers": lambda: _load_plain(str(out), held, "none")}
    directory = str(find_base(model, policy.revision))
    exact = {"transformers and peft, the base as it was trained on": policy.quantization}
    if policy.quantization == "nf4":
        exact["transformers and peft, the base not quantised"] = "none"
    return {
        how: lambda q=quantization: _on_base(directory, policy, q, out)  # type: ignore[misc]
        for how, quantization in exact.items()
    }


def _on_base(directory: str, policy: PolicySettings, quantization: str, out: Path) -> Any:
    from peft import PeftModel

    base = _load_plain(directory, policy, quantization)
    return PeftModel.from_pretrained(base, str(out))


def _load_plain(directory: str, policy: PolicySettings, quantization: str) -> Any:
    """Load a model with transformers alone, as any user would."""
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
