"""Launches of the kernels that have the parameters of `fragment.attend_fragments`: what each is found of once for all
layers that lie alike, and what it is given at each call.
"""

from types import ModuleType
from typing import NamedTuple

import torch

from tqcompile.coding import Planes, split
from tqcompile.kernels import launcher, placement, tune
from tqcompile.kernels.emit import Reader
from tqcompile.kernels.placement import Laid


class Prepared(NamedTuple):
    """A launch but for its tensors, and what it leaves of each row: `splits` parts of so many sums."""

    call: launcher.Call
    width: int
    splits: int


def call_of(
    built: ModuleType,
    name: str,
    plan: tune.AttendPlan,
    scale: float,
    laid: tuple[Laid, ...],
    mask: tuple[int, ...],
    reach: int | None,
    device: torch.device,
    more: tuple = (),
) -> launcher.Call:
    """The launch of a kernel that has the parameters of `attend_fragments`, and `more` constants behind them, for a
    query and planes that lie so."""
    (q, *planes), early = laid, tune.overlaps(device)
    (batch, query_heads, queries, _), (kv_heads, length) = q.shape, planes[0].shape[1:3]
    groups = query_heads // kv_heads
    return launcher.Call(
        built,
        name,
        (batch * kv_heads, -(-groups * queries // plan.block_rows), plan.splits),
        (
            *(scale, kv_heads, groups, queries, length, plan.span, plan.splits, *q.strides),
            *(stride for plane in planes for stride in plane.strides[:2]),
            *(*mask, reach or 0),
        ),
        (*(plane.strides[2] for plane in planes), reach is not None, plan.block_tokens, plan.block_rows, early, *more),
        num_warps=plan.warps,
        maxnreg=plan.registers,
        **({"launch_pdl": True} if early else {}),
    )


def launched(
    prepared, table_of, q, keys: Planes, values: Planes, mask, reach, scale: float, codecs, head_dims, reader: Reader,
    folder, parts,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Run what `prepared` finds for a call, and return what `parts`, a function of a width and the number of splits,
    allocated for it to write: sums, peaks and totals. `table_of` are the look-up operands of a codec."""
    planes = *split(codecs[0], keys), *split(codecs[1], values)
    part, strides = mask if mask is not None else (q, (0, 0, 0, 0))
    how, lie = (scale, reader, folder), placement.laid((q, *planes))
    beyond = None if reach is None else reach.stride(0)
    call, width, splits = prepared(codecs, head_dims, how, lie, strides, beyond, q.device)
    left = parts(width, splits)
    tables = [table_of(codec, dim, q.device) for codec, dim in zip(codecs, head_dims)]
    call((q, *planes, *tables, part, q if reach is None else reach, *left))
    return left
