"""What centring adds to scores, and a mask, as one additive mask: the kernel, its text and its launcher.

It is a product of rows and waves on matrix units, which have no float32: of high halves, of low and high ones, and of
high and low ones. What is left out is 2^-22 of a row's largest number. A program makes the halves of its rows once, and
goes over as many tiles of tokens as there are for each.
"""

from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl

from tqcompile.kernels import emit, launcher, tune
from tqcompile.kernels.combine import maximum_of

BLOCK_R, WARPS, STAGES = 64, 4, 3
# Halves of a tile of waves.
TILE = 4096


# fmt: off
@triton.jit(do_not_specialize=["rows", "length", "heads", "queries", "mask_b", "mask_h", "mask_t"])
def shift_scores(
    waved, waves, mask, out, rows, length, heads, queries, mask_b, mask_h, mask_t, mask_s,
    COLUMNS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, HALF: tl.constexpr, STAGES: tl.constexpr,
):
    row, column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    real, some, place = row < rows, (column < COLUMNS)[None, :], row.to(tl.int64)
    x = tl.load(waved + place[:, None] * (COLUMNS + 1) + column[None, :], mask=real[:, None] & some, other=0.0)
    still = tl.load(waved + place * (COLUMNS + 1) + COLUMNS, mask=real, other=0.0)
    size = maximum_of(tl.abs(x), 1)
    size = tl.where((size > 0.0) & (size < float("inf")), size, 1.0)
    x = x / size[:, None]
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16).to(HALF)
    high = high.to(HALF)
    start = place // (heads * queries) * mask_b + place // queries % heads * mask_h + place % queries * mask_t
    out += place[:, None] * length
    mask += start[:, None]
    for tile in tl.range(tl.program_id(0), (length + BLOCK_T - 1) // BLOCK_T, tl.num_programs(0), num_stages=STAGES):
        token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (token < length)[:, None] & some
        near = waves + token.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        far = waves + (length + token).to(tl.int64)[:, None] * COLUMNS + column[None, :]
        near = tl.trans(tl.load(near, mask=inside, other=0.0).to(HALF))
        far = tl.trans(tl.load(far, mask=inside, other=0.0).to(HALF))
        shift = tl.dot(high, near, tl.dot(low, near, tl.dot(high, far)))
        shift = shift * size[:, None] + still[:, None]
        inside = real[:, None] & (token < length)[None, :]
        if KIND != "none":
            given = tl.load(mask + token.to(tl.int64)[None, :] * mask_s, mask=inside, other=0)
            shift = tl.where(given != 0, shift, float("-inf")) if KIND == "bool" else shift + given.to(tl.float32)
        tl.store(out + token[None, :], shift, mask=inside)
# fmt: on


def source() -> str:
    """The text of the module that `shifted` launches, which is the same for all codecs."""
    return emit.module_text("What centring adds to scores.", (), (maximum_of, shift_scores))


@cache
def module(folder: str | None, interpreted: bool) -> ModuleType:
    """The imported module of `source`."""
    return emit.build(source(), folder, interpreted)


def tile_of(columns: int) -> tuple[int, int]:
    """Tokens and columns of a tile of waves."""
    extent = tune.extent(columns)
    return max(16, min(64, TILE // extent)), extent


def shifted(
    waved: torch.Tensor, waves: torch.Tensor, mask: torch.Tensor | None, folder: str | None = None
) -> torch.Tensor:
    """`reference.shifted`, on a GPU or in Triton's interpreter, to 2^-22 of the largest number of each row of `waved`.

    `waves` are `centre.halves` [2, S, columns] of what the reference takes. The mask that is returned is nobody else's.
    """
    batch, heads, queries, _ = waved.shape
    _, length, columns = waves.shape
    out = torch.empty(batch, heads, queries, length, dtype=torch.float32, device=waved.device)
    if not out.numel():
        return out
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    given, strides = out, (0, 0, 0, 0)
    if mask is not None:
        given = mask.broadcast_to(out.shape)
        strides = given.stride()
    interpreted, rows, (tokens, extent) = waved.device.type == "cpu", batch * heads * queries, tile_of(columns)
    blocks = -(-rows // BLOCK_R)
    held = max(1, tune.processors_of(waved.device) * tune.PROGRAMS_PER_PROCESSOR // blocks)
    # The interpreter has no product of halves that adds in float32.
    half = tl.float32 if interpreted else tl.float16
    launcher.launch(
        module(folder, interpreted),
        "shift_scores",
        (min(held, -(-length // tokens)), blocks),
        (waved.contiguous(), waves.contiguous(), given, out),
        (rows, length, heads, queries, *strides),
        (columns, kind, BLOCK_R, tokens, extent, half, STAGES),
        num_warps=WARPS,
    )
    return out
