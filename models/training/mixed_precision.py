"""Training in bfloat16: two costs that autocast leaves.

- PEFT casts a LoRA matrix's input to float32, the matrix's own type, and autocast casts it back.
- On a CPU, the backward pass of torch's fused attention is slower in bfloat16 than in float32.

Of a training step of a model of 135M parameters on a CPU with AMX they took a fifth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT32_ATTENTION = "sdpa_float32"


@contextmanager
def mixed_precision(model: Any, *, active: bool) -> Iterator[None]:
    """While the model is trained under autocast, spare it the two costs.

    Without the casts results stay the same in every bit; attention becomes more exact.

    Args:
        active: whether it is trained under autocast; nothing happens otherwise.
    """
    from peft.helpers import disable_input_dtype_casting

    with disable_input_dtype_casting(model, active):
        given = model.config._attn_implementation
        if not (active and model.device.type == "cpu" and given == "sdpa"):
            yield
            return
        model.set_attn_implementation(FLOAT32_ATTENTION)
        try:
            yield
        finally:
            model.set_attn_implementation(given)


def _in_float32(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    with torch.autocast("cpu", enabled=False):
        q, k, v = query.float(), key.float(), value.float()
        found, _ = sdpa_attention_forward(module, q, k, v, mask, **how)
    return found.to(query.dtype), None


AttentionInterface.register(FLOAT32_ATTENTION, _in_float32)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)
