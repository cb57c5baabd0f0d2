"""Choose what stands behind each semantic operator on the device it runs on."""

import torch
from torch import fx

from tqcompile import formats, ops, reference
from tqcompile.passes.canonicalize import tensor_of
from tqcompile.passes.context import Context


def lower(gm: fx.GraphModule, context: Context) -> int:
    """On a CPU an append becomes the reference itself, which the inner compiler fuses; returns how many did.

    On CUDA it stays an operator with a Triton kernel behind it. `attend` stays an operator on both: its loop over
    blocks of tokens has a length that only the call knows.
    """
    devices = {value.device.type for value in map(tensor_of, gm.graph.nodes) if value is not None}
    if "cuda" in devices:
        return 0
    lowered = 0
    for node in gm.graph.nodes:
        if node.target is ops.append:
            node.target = append_inline
            lowered += 1
    return lowered


def append_inline(planes: list[torch.Tensor], y: torch.Tensor, positions: torch.Tensor | None, codec: str) -> None:
    """`ops.append` as plain PyTorch."""
    reference.append(formats.codec(codec), planes, y, positions)
