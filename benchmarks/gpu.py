"""`python -m benchmarks.gpu`: an 8B Llama in NF4 on this machine's GPU, against the card's limits.

The model has random weights and goes the way of a real one: safetensors, NF4 base, adapter. First
the card's own limits are measured (a large copy, a large matrix product), then sampling (N = 16)
and QLoRA training beside them. Everything is printed as it comes, and kept as JSON. `--shape tiny
--device cpu` tries the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from models.engine.base import Decoding, Sample, key_value_bytes
from models.engine.decoding import Decoder
from models.policy import Request
from models.training import bases, updates
from models.training import loop as training_loop
from models.training.adapter import AdapterSettings
from models.training.encoding import EncodedExample

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama-3.1-8B
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500_000.0,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
WORK = {  # prompts, their tokens, new tokens; trajectories and their tokens
    "8b": {"prompts": 32, "length": 512, "new": 256, "trajectories": 64, "tokens": 1024},
    "tiny": {"prompts": 4, "length": 32, "new": 8, "trajectories": 32, "tokens": 64},
}
SAMPLES = 16
TRAINED = 0.5
"""Share of a trajectory that has loss: z and y2."""


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "gpu.json")
    chosen = parser.parse_args()
    found: dict[str, Any] = {}

    def note(name: str, value: dict[str, Any]) -> None:
        found[name] = value
        print(name, json.dumps(value), flush=True)
        chosen.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")

    note("recorded_steps", recorded_steps(chosen.device))
    card, work = limits(chosen.device), WORK[chosen.shape]
    note("card", card)
    with tempfile.TemporaryDirectory() as folder:
        base, loading = timed_base(Path(folder), chosen.shape, chosen.device)
        note("loading", loading)
        note("sampling_nf4", sampling(base, work, card))
        note("training_nf4", training(base, work, card, Path(folder)))
        whole = base.dequantize()
        note("sampling", sampling(whole, work, card))
        few = {**work, "prompts": max(1, work["prompts"] // 8), "new": work["new"] // 2}
        note("sampling_few_rows", sampling(whole, few, card))
        note("sampling_few_rows_launched", sampling(whole, few, card, recorded=False))
        adapter = Path(folder) / "adapter"
        updates.save_adapter(
            updates.new_adapter(whole, AdapterSettings(), seed=0), adapter, data_digest=""
        )
        note("sampling_adapter", sampling(updates.attach_adapter(whole, adapter), work, card))


def recorded_steps(device: str) -> dict[str, Any]:
    """The same samples whether steps are recorded or launched: a tiny float32 model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {**SHAPES["tiny"], "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(device).eval()  # type: ignore[arg-type]
    prompts = [list(range(3, 3 + length)) for length in (4, 9, 30, 31, 60)]
    said = []
    for recorded in (True, False):
        done: list[Sample] = []
        decoder = Decoder(model, Decoding((5, 6), 24))
        decoder.recorded.possible &= recorded
        requests = [
            Request(messages="", key=str(i), n=SAMPLES, max_tokens=150) for i in range(len(prompts))
        ]
        decoder.sample(prompts, requests, done.append)
        said.append({(s.request, s.number): s.tokens for s in done})
        if recorded and device == "cuda" and not decoder.recorded.possible:
            raise AssertionError("no step could be recorded")
    if said[0] != said[1]:
        raise AssertionError("recorded steps give other samples")
    return {"samples": len(said[0]), "equal": True}


def limits(device: str) -> dict[str, Any]:
    """What the card can do: bytes/s of a copy (read and written), FLOP/s of a bf16 product."""
    large = device == "cuda"
    size, side = (1 << 31, 8192) if large else (1 << 24, 512)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    copy = best(lambda: source.clone(), device)
    product = best(lambda: a @ a, device)
    return {
        "name": torch.cuda.get_device_name() if large else "cpu",
        "torch": torch.__version__,
        "bandwidth": 2 * size / copy,
        "flops": 2 * side**3 / product,
    }


def best(call: Callable[[], object], device: str, rounds: int = 10) -> float:
    """Seconds of the fastest of some calls, after a warm-up."""
    call()
    seconds = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def wait(device: str) -> None:
    """Until the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed_base(folder: Path, shape: str, device: str) -> tuple[Any, dict[str, Any]]:
    """The random model as a directory, and how long `load_base` takes to hold it in NF4."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder / "model")
    del model
    _tokenizer().save_pretrained(folder / "model")
    start = time.perf_counter()
    base, _ = bases.load_base(
        folder / "model",
        quantization="nf4",
        dtype="bfloat16",
        device=device,  # type: ignore[arg-type]
    )
    seconds = time.perf_counter() - start
    return base, {"parameters": parameters, "seconds": seconds, "bytes": held(base)}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", chat_template=template)


def held(model: Any) -> int:
    """Bytes of the weights as they are held."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def sampling(
    base: Any, work: dict[str, int], card: dict[str, Any], *, recorded: bool = True
) -> dict[str, Any]:
    """N = 16 samples of every prompt; none of them ends by itself."""
    draw = random.Random(0)
    vocabulary = base.config.vocab_size
    prompts = [draw.choices(range(vocabulary), k=work["length"]) for _ in range(work["prompts"])]
    decoder = Decoder(base)
    decoder.recorded.possible &= recorded
    _sample(decoder, prompts[:2], 4)  # kernels are loaded
    forget(base)
    wait(base.device.type)
    start = time.perf_counter()
    steps = _sample(decoder, prompts, work["new"])
    wait(base.device.type)
    seconds = time.perf_counter() - start
    samples = work["prompts"] * SAMPLES
    token = key_value_bytes(base.config, 2)
    read = steps * held(base) + token * work["new"] * (
        work["prompts"] * work["length"] + samples * work["new"] / 2
    )
    computed = 2 * (samples * work["new"] + work["prompts"] * work["length"]) * parameters(base)
    return {
        "samples_per_second": samples / seconds,
        "new_tokens_per_second": samples * work["new"] / seconds,
        "rows": decoder.fitted,
        "played": decoder.recorded.played,
        "steps": steps,
        "seconds": seconds,
        "seconds_per_step": seconds / steps,
        "peak_bytes": peak(base),
        "of_bandwidth": read / seconds / card["bandwidth"],
        "of_flops": computed / seconds / card["flops"],
        **work,
    }


def _sample(decoder: Decoder, prompts: Sequence[Sequence[int]], new: int) -> int:
    done: list[Sample] = []
    requests = [
        Request(messages="", key=str(i), n=SAMPLES, max_tokens=new) for i in range(len(prompts))
    ]
    before = decoder.steps
    decoder.sample(prompts, requests, done.append)
    if sum(len(s.tokens) for s in done) != len(prompts) * SAMPLES * new:
        raise AssertionError("the engine made another number of tokens")
    return decoder.steps - before


def training(base: Any, work: dict[str, int], card: dict[str, Any], folder: Path) -> dict[str, Any]:
    """QLoRA steps over trajectories of one length, with gradient checkpointing."""
    draw = random.Random(1)
    base.set_attn_implementation("sdpa")
    settings = AdapterSettings(
        batch_size=16, micro_batch_tokens=4 * work["tokens"], gradient_checkpointing=True
    )
    trained = tuple(i > work["tokens"] * (1 - TRAINED) for i in range(work["tokens"]))
    examples = [
        EncodedExample(
            tuple(draw.choices(range(base.config.vocab_size), k=work["tokens"])), trained
        )
        for _ in range(work["trajectories"])
    ]
    model = updates.new_adapter(base, settings, seed=0)
    forget(base)
    ends: list[float] = []

    def tick(_: int) -> None:
        wait(base.device.type)
        ends.append(time.perf_counter())

    curve = training_loop.train(
        model,
        examples,
        settings,
        objective=training_loop.Likelihood(settings.micro_batch_tokens),
        seed=0,
        checkpoints=folder / "checkpoints",
        progress=tick,
    )
    step = (ends[-1] - ends[0]) / (len(ends) - 1)  # the first one loads kernels
    model.unload()
    base.gradient_checkpointing_disable()
    base.eval()
    tokens = settings.batch_size * work["tokens"]
    # forward, forward again, backward through frozen weights: 2 FLOP a parameter and token each
    computed = 6 * tokens * parameters(base)
    return {
        "tokens_per_second": tokens / step,
        "seconds_per_step": step,
        "first_loss": curve[0].loss,
        "last_loss": curve[-1].loss,
        "peak_bytes": peak(base),
        "of_flops": computed / step / card["flops"],
        "batch_size": settings.batch_size,
        "micro_batch_tokens": settings.micro_batch_tokens,
        "gradient_checkpointing": True,
        **work,
    }


def parameters(base: Any) -> int:
    """Of the matrix products of one token: all but the input embedding."""
    shape = base.config
    size = shape.hidden_size // shape.num_attention_heads
    attention = (
        2 * shape.hidden_size * size * (shape.num_attention_heads + shape.num_key_value_heads)
    )
    feed = 3 * shape.hidden_size * shape.intermediate_size
    layers = shape.num_hidden_layers * (attention + feed)
    return int(layers + shape.vocab_size * shape.hidden_size)


def forget(base: Any) -> None:
    """Start the count of the peak anew."""
    gc.collect()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(base: Any) -> int:
    """Most bytes that tensors took on the GPU since `forget`."""
    return torch.cuda.max_memory_allocated() if base.device.type == "cuda" else 0


if __name__ == "__main__":
    main()
