"""The softmax over the splits of a cache: what programs of `attend` leave behind becomes attention.

Its program is launched while the splits still run where the device allows it, and waits there for what they write.
"""

from functools import cache, lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from tqcompile.kernels import emit, launcher, tune
from tqcompile.reference import rotate_back

# The import that the printed text of `attend_combine` needs.
WAIT = "from triton.language.extra.cuda import gdc_wait"


@triton.jit
def maximum_of(x, axis: tl.constexpr):
    # Not tl.max and tl.sum: those are compiled functions even where this file is interpreted.
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@triton.jit
def sum_of(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit(do_not_specialize=["rows", "splits"])
def attend_combine(
    parts,
    peaks,
    totals,
    sinks,
    other_peaks,
    other_totals,
    shares,
    basis,
    order,
    out,
    rows,
    splits,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ORDERED: tl.constexpr,
    SINKS: tl.constexpr,
    OTHERS: tl.constexpr,
    EARLY: tl.constexpr,
):
    head = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    place = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = place
    if ORDERED:
        d = tl.load(order + place, mask=place < WIDTH, other=VALUE_DIM)
    if BLOCK_J:
        j = tl.arange(0, BLOCK_J)
        turns = basis + d[:, None] * VALUE_DIM + j[None, :]
        part = tl.load(turns, mask=(d < VALUE_DIM)[:, None] & (j < VALUE_DIM)[None, :], other=0.0)
    if EARLY:
        # Launched while the splits still run: until here nothing of theirs is read.
        gdc_wait()
    peak = float("-inf")
    total = 0.0
    if SINKS:
        # One more token: its logit, whose exponential is one of the sum already, and no value.
        peak = tl.load(sinks + tl.program_id(0))
        total = 1.0
    if OTHERS:
        # Tokens whose values are summed elsewhere.
        other = tl.load(other_peaks + tl.program_id(0))
        most = tl.maximum(peak, other)
        least = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(peak - least) + tl.load(other_totals + tl.program_id(0)) * tl.exp(other - least)
        peak = most
    mixed = tl.full([BLOCK_V], 0.0, tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        left = (head * splits + s) * rows + row
        high = tl.load(peaks + left, mask=s < splits, other=float("-inf"))
        sizes = tl.load(totals + left, mask=s < splits, other=0.0)
        inside = (s < splits)[:, None] & (place < WIDTH)[None, :]
        sums = tl.load(parts + left[:, None] * WIDTH + place[None, :], mask=inside, other=0.0)
        new_peak = tl.maximum(peak, maximum_of(high, 0))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        rescale = tl.exp(peak - pivot)
        share = tl.exp(high - pivot)
        total = total * rescale + sum_of(sizes * share, 0)
        mixed = mixed * rescale + sum_of(sums * share[:, None], 0)
        peak = new_peak
    mixed = tl.where(total == 0.0, 0.0, mixed / tl.where(total == 0.0, 1.0, total))
    if OTHERS:
        pivot = tl.where(peak == float("-inf"), 0.0, peak)
        share = tl.where(total == 0.0, 0.0, tl.exp(other - pivot) / tl.where(total == 0.0, 1.0, total))
        tl.store(shares + tl.program_id(0), share)
    out += (head * rows + row) * VALUE_DIM
    if BLOCK_J == 0:
        tl.store(out + d, mixed.to(out.dtype.element_ty), mask=d < VALUE_DIM)
    for start in tl.static_range(0, BLOCK_V if BLOCK_J else 0, BLOCK_J if BLOCK_J else 1):
        if start > 0:
            inside = (d < VALUE_DIM)[:, None] & (start + j < VALUE_DIM)[None, :]
            part = tl.load(turns + start, mask=inside, other=0.0)
        turned = sum_of(mixed[:, None] * part.to(tl.float32), 0)
        tl.store(out + start + j, turned.to(out.dtype.element_ty), mask=start + j < VALUE_DIM)


class Sizes(NamedTuple):
    """What programs leave of their rows: `splits` times `width` sums of each, in `heads` KV heads."""

    heads: int
    splits: int
    rows: int
    width: int

    def parts(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Memory for sums [heads, splits, rows, width], peaks and totals [heads, splits, rows], float32, flat; each
        begins at a multiple of 16 bytes."""
        each = self.heads * self.splits * self.rows
        sums, others = (-(-count // 4) * 4 for count in (each * self.width, each))
        return like.new_empty(sums + 2 * others, dtype=torch.float32).split_with_sizes((sums, others, others))


def combine(
    left: tuple[torch.Tensor, ...],
    sizes: Sizes,
    shape: tuple[int, ...],
    folder: str | None,
    basis: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    sinks: torch.Tensor | None = None,
    others: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """The softmax over all splits of what `parts` holds, of the `shape` [.., value_dim] of heads times rows in `dtype`,
    rotated back by `basis`.

    `sinks`, float32, contiguous, has a logit for each row that adds to the sum and has no value. `others` are peaks and
    totals [heads, rows] of tokens that are summed elsewhere, and what their sums are to be multiplied by is written to
    the third. `order`, int32 [width], says which dim each number of a row of sums is, or value_dim and more for
    padding; without it they lie in the order of dims.

    Few rows are rotated in the kernel, with products in float32; many by a matrix product in the dtype of `basis`.
    """
    if basis is not None and (sizes.heads * sizes.rows > tune.TURNED_ROWS or basis.shape[0] != basis.shape[1]):
        # The kernel rotates by square matrices.
        shape = *shape[:-1], basis.shape[0]
        return rotate_back(combine(left, sizes, shape, folder, None, torch.float32, sinks, others, order), basis, dtype)
    out = left[0].new_empty(shape, dtype=dtype)
    has = order is not None, sinks is not None, others is not None
    kinds = dtype, *map(launcher.kind_of, (basis, sinks))
    call = _call(sizes, shape[-1], kinds, has, folder, out.device)
    given = (sinks, *(left if others is None else others), basis, order)
    call((*left, *[left[0] if tensor is None else tensor for tensor in given], out))
    return out


@lru_cache(maxsize=4096)
def _call(
    sizes: Sizes,
    value_dim: int,
    kinds: tuple,
    has: tuple[bool, bool, bool],
    folder: str | None,
    device: torch.device,
) -> launcher.Call:
    """The launch for what so many splits leave; `kinds` are the dtype of what is returned and those of a basis and of
    sinks (`launcher.kind_of`), and it `has` an order, sinks, others."""
    heads, splits, rows, width = sizes
    *blocks, warps = tune.combine_blocks(splits, width, heads * rows, kinds[1][0].itemsize if kinds[1] else 0)
    early = tune.overlaps(device)
    return launcher.Call(
        combine_module(folder, device.type == "cpu"),
        "attend_combine",
        (heads * rows, -(-width // blocks[1])),
        (rows, splits),
        (value_dim, width, *blocks, *has, early),
        num_warps=warps,
        **({"launch_pdl": True} if early else {}),
    )


@cache
def combine_module(folder: str | None, interpreted: bool) -> ModuleType:
    """The imported module of `attend_combine`, which is the same for all codecs."""
    text = emit.module_text("The softmax over the splits of a cache.", (WAIT,), (maximum_of, sum_of, attend_combine))
    return emit.build(text, folder, interpreted)
