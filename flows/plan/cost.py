"""What a model costs on a GPU: bytes and seconds of sampling and of training, by arithmetic.

`flows.plan.plan` adds them up over an experiment. Every constant that is not a datasheet's or a sum
of tensors' sizes is in `Efficiency`, `MEASURED`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.checkpoints.shapes import NF4_BYTES, WIDTH, Shape

GIB = 2**30
RESERVED = 1.0
"""GiB that CUDA, its libraries and the driver take."""
FRAGMENTED = 0.05
"""Share of the memory that the allocator cannot use."""
PASS_TOKENS = 8192
"""Tokens of prompts in one forward pass, as in `models.engine.base`."""
MEMORY_SHARE = 0.8
"""Share of the memory beside the weights that rows may fill, as in `models.engine.base`."""
LOGIT_BYTES = 32
"""Bytes per row and vocabulary entry while a token is sampled, as in `models.engine.base`."""
LOSS_BYTES = 12
"""Bytes per trained token and vocabulary entry: logits, float32 log-probabilities, and the
gradients of both."""
MASTER_BYTES = 4
"""Bytes per trained parameter, which is held in float32."""
OPTIMISER_BYTES = 4 + 2
"""Bytes per trained parameter for its gradient and two 8-bit moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """The shares of a datasheet's rates that are reached, and the fixed cost of a step."""

    decode: float
    """Of the bandwidth, or of the FLOP/s where they limit, in a decoding step."""
    prefill: float
    """Of the FLOP/s, in prompts."""
    training: float
    """Of the FLOP/s, forward and backward."""
    layer_seconds: float
    """Seconds per layer of a decoding step for launching kernels, at any batch size."""


MEASURED = Efficiency(decode=0.235, prefill=0.4, training=0.432, layer_seconds=0.155e-3)
"""On an H100: benchmarks/gpu.md has the run, in which `python -m benchmarks.efficiency` finds them.
The share in prompts is a guess: that run has too few of them to tell."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's datasheet: dense rates, without sparsity. `flows.plan.machine` measures a processor
    in its terms."""

    name: str
    memory: float
    """GiB, as the driver reports them."""
    bandwidth: float
    """GB/s."""
    bfloat16: float
    """TFLOP/s of matrix products."""
    float32: float
    """TFLOP/s, without TF32."""
    efficiency: Efficiency = MEASURED
    most_rows: int = 512
    """Samples that are decoded together at most, as in `models.engine.base`."""

    @property
    def room(self) -> float:
        """Bytes that tensors can have."""
        return (self.memory * (1 - FRAGMENTED) - RESERVED) * GIB

    def rate(self, dtype: str) -> float:
        """FLOP/s."""
        return 1e12 * float(getattr(self, dtype))


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx-4090", 24.0, 1008, 165, 83),
        Gpu("l4", 22.5, 300, 121, 30),
        Gpu("l40s", 45.0, 864, 362, 92),
        Gpu("a100-40", 40.0, 1555, 312, 19.5),
        Gpu("a100-80", 80.0, 2039, 312, 19.5),
        Gpu("h100", 79.6, 3350, 989, 67),
        Gpu("h200", 140.4, 4800, 989, 67),
        Gpu("b200", 179.0, 8000, 2250, 75),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A model on a GPU: how its weights are held, and the rank of its adapter.

    Without an adapter (rank 0) it is all weights that are trained.
    """

    shape: Shape
    quantization: str
    dtype: str
    rank: int
    gpu: Gpu

    @property
    def efficiency(self) -> Efficiency:
        """What of the device's rates is reached."""
        return self.gpu.efficiency

    @property
    def weights(self) -> float:
        """Bytes of the base, with one matrix at a time unpacked where it is in NF4."""
        unpacked = max(a * b for a, b in self.shape.linears) * WIDTH[self.dtype]
        held = self.shape.weight_bytes(self.quantization, self.dtype)
        return held + unpacked * (self.quantization == "nf4")

    # Sampling

    @property
    def sampled(self) -> Held:
        """As `models.engine.local` samples: where the GPU has room, NF4 weights are unpacked."""
        free = (self.gpu.memory - RESERVED) * GIB - self.shape.weight_bytes("nf4", self.dtype)
        roomy = self.shape.parameters * WIDTH[self.dtype] <= free / 2
        return replace(self, quantization="none") if roomy else self

    def sampling_memory(self, rows: int, tokens: float) -> dict[str, float]:
        """Bytes while `rows` samples are decoded together, each with `tokens` in the cache."""
        shape, width = self.shape, WIDTH[self.dtype]
        prefill = PASS_TOKENS * (4 * shape.hidden + 3 * shape.intermediate) * width
        return {
            "weights": self.weights + MASTER_BYTES * shape.adapter(self.rank),
            "activations": float(prefill),
            "logits": float(rows * shape.vocabulary * LOGIT_BYTES),
            "KV cache": rows * tokens * shape.cache_bytes(self.dtype),
        }

    def rows_that_fit(self, tokens: float) -> int:
        """How many samples are decoded together by default, as in `models.engine.base`; 0: not
        even one fits."""
        parts = self.sampling_memory(1, tokens)
        each = parts["KV cache"] + parts["logits"]
        free = (self.gpu.memory - RESERVED) * GIB - parts["weights"]
        left = self.gpu.room - (sum(parts.values()) - each)
        return max(0, min(self.gpu.most_rows, int(MEMORY_SHARE * free / each), int(left / each)))

    def step_seconds(self, rows: float, context: float, read: float) -> float:
        """Seconds in which each of `rows` samples gets one more token.

        NF4 weights are unpacked in every step: read, written in `dtype`, and read again.

        Args:
            rows: samples.
            context: tokens that each attends to, on average.
            read: of these, how many are read for each row: what rows share is read once.
        """
        shape, width = self.shape, WIDTH[self.dtype]
        each = NF4_BYTES + 2 * width if self.quantization == "nf4" else width
        moved = (
            shape.matrices * each
            + shape.output * width
            + shape.adapter(self.rank) * 4
            + rows * read * shape.cache_bytes(self.dtype)
            + rows * shape.vocabulary * LOGIT_BYTES
        )
        weights = shape.matrices + shape.output + shape.adapter(self.rank)
        operations = rows * (2 * weights + context * self._attention)
        least = max(moved / (self.gpu.bandwidth * 1e9), operations / self.gpu.rate(self.dtype))
        return least / self.efficiency.decode + shape.layers * self.efficiency.layer_seconds

    def prefill_seconds(self, tokens: float, length: float) -> float:
        """Seconds for `tokens` of prompts, each of `length`."""
        operations = self.prefill_operations(tokens, length)
        return operations / (self.gpu.rate(self.dtype) * self.efficiency.prefill)

    def prefill_operations(self, tokens: float, length: float) -> float:
        """FLOP; a token attends to half of the sequence, on average."""
        weights = self.shape.matrices + self.shape.adapter(self.rank)
        return tokens * (2 * weights + length / 2 * self._attention)

    # Training

    def training_memory(
        self, rows: int, tokens: float, trained: float, *, checkpointing: bool
    ) -> dict[str, float]:
        """Bytes while `rows` conversations of `tokens` are learned, `trained` of each with loss."""
        trained_numbers = self.shape.adapter(self.rank) or self.shape.parameters
        base = self.weights if self.rank else 0.0
        return {
            "weights": base + MASTER_BYTES * trained_numbers,
            "optimiser": float(OPTIMISER_BYTES * trained_numbers),
            "activations": rows * tokens * self._saved(checkpointing),
            "logits": rows * trained * self.shape.vocabulary * LOSS_BYTES,
        }

    def _saved(self, checkpointing: bool) -> float:
        """Bytes that a token leaves for the backward pass.

        Per layer: six float32 states of the norms and residuals; keys and values; the four states
        of the gated part; the adapter's inner states. With checkpointing each layer keeps its
        input, and one at a time is computed again.
        """
        shape, width = self.shape, WIDTH[self.dtype]
        keys_and_values = 2 * shape.kv_heads * shape.head_size
        inner = keys_and_values + 4 * shape.intermediate + len(shape.linears) * self.rank
        layer = 24 * shape.hidden + width * inner
        last = 4 * shape.hidden  # the norm after the layers
        if checkpointing:
            return shape.layers * shape.hidden * width + layer + last
        return float(shape.layers * layer + last)

    def training_seconds(
        self, tokens: float, trained: float, *, rows: int, length: float, checkpointing: bool
    ) -> float:
        """Seconds for `tokens` in conversations of `length`, `rows` at once; `trained` have loss.

        NF4 weights are unpacked in each pass over the layers.
        """
        operations = self.training_operations(tokens, trained, length, checkpointing=checkpointing)
        seconds = operations / (self.gpu.rate(self.dtype) * self.efficiency.training)
        if self.quantization == "nf4":
            passes = tokens / (rows * length) * (2 + checkpointing)
            moved = self.shape.matrices * (NF4_BYTES + 2 * WIDTH[self.dtype])
            seconds += passes * moved / (self.gpu.bandwidth * 1e9 * self.efficiency.decode)
        return seconds

    def training_operations(
        self, tokens: float, trained: float, length: float, *, checkpointing: bool
    ) -> float:
        """FLOP. The base of an adapter is frozen: its backward pass costs as much as its forward
        pass, not twice that. Fused attention needs five products backward for two forward.
        """
        shape, again = self.shape, int(checkpointing)
        backward = 1 if self.rank else 2
        return (
            tokens * 2 * shape.matrices * (1 + backward + again)
            + tokens * 2 * shape.adapter(self.rank) * (3 + again)
            + tokens * length / 2 * self._attention * (3.5 + again)
            + trained * 2 * shape.output * (1 + backward)
        )

    @property
    def _attention(self) -> int:
        """FLOP of one query for each token that it attends to."""
        return 4 * self.shape.layers * self.shape.heads * self.shape.head_size
