"""A dense tensor becomes the planes of a codec, a block of it at a time."""

from collections.abc import Callable

import torch

from tqcompile import coding, reference, tables
from tqcompile.buffer import Planes
from tqcompile.codec import Codec
from tqcompile.layout import layout_of


@reference.as_stored
def encode_dense(dense: torch.Tensor, codec: Codec) -> Planes:
    """Planes [..., width] of a dense tensor [..., head_dim], encoded a block at a time."""
    head_dim = dense.shape[-1]
    layout = layout_of(codec, head_dim, dense.dtype, dense.device.type)
    basis = tables.basis_matrix(codec, head_dim, dense.device)
    with torch.inference_mode(False), torch.no_grad():
        planes = layout.allocate(tuple(dense.shape[:-1]), dense.device)
    if dense.numel() == 0:
        return planes
    longest = max(range(dense.dim() - 1), key=lambda dim: dense.shape[dim]) if dense.dim() > 1 else None
    if longest is None:
        parts: list[Callable] = [lambda x: x]
    else:
        step = max(1, reference.BLOCK_ELEMENTS * dense.shape[longest] // dense.numel())
        starts = range(0, dense.shape[longest], step)
        parts = [lambda x, at=at: x.narrow(longest, at, min(step, x.shape[longest] - at)) for at in starts]
    with torch.no_grad():
        for part in parts:
            block = coding.encode(codec, reference.rotate(part(dense.detach()), basis))
            for plane, code in zip(planes, block):
                part(plane).copy_(code)
    return planes
