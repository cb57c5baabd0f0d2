"""Launches of the kernels that have the parameters of `fragment.attend_fragments`: what each is found of once for all
layers that lie alike, and what it is given at each call.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from tqcompile.kernels import launcher, tune
from tqcompile.kernels.combine import Sizes
from tqcompile.kernels.placement import Laid


class Prepared(NamedTuple):
    """A launch but for its tensors, the look-up operands of keys and of values, what it leaves, and in which order
    (`combine.combine`)."""

    call: launcher.Call
    tables: tuple[torch.Tensor, torch.Tensor]
    sizes: Sizes
    order: torch.Tensor | None


def call_of(
    built: ModuleType,
    name: str,
    plan: tune.AttendPlan,
    scale: float,
    laid: tuple[Laid, ...],
    mask: tuple[int, ...],
    reach: tuple[int, int],
    device: torch.device,
    more: tuple = (),
) -> launcher.Call:
    """The launch of a kernel that has the parameters of `attend_fragments`, and `more` constants behind them, for a
    query and planes that lie so, a mask of such strides, and a reach: its first stride, and how many numbers it has."""
    (q, *planes), (reach_stride, reach_numbers), early = laid, reach, tune.overlaps(device)
    (batch, query_heads, queries, _), (kv_heads, length) = q.shape, planes[0].shape[1:3]
    groups = query_heads // kv_heads
    return launcher.Call(
        built,
        name,
        (batch * kv_heads, -(-groups * queries // plan.block_rows), plan.splits),
        (
            *(scale, kv_heads, groups, queries, length, plan.span, plan.splits, *q.strides),
            *(stride for plane in planes for stride in plane.strides[:2]),
            *(*mask, reach_stride),
        ),
        (*(plane.strides[2] for plane in planes), reach_numbers, plan.block_tokens, plan.block_rows, early, *more),
        num_warps=plan.warps,
        maxnreg=plan.registers,
        **({"launch_pdl": True} if early else {}),
    )


def launched(
    prepared: Callable[..., Prepared], q, planes, mask, reach: torch.Tensor | None, codecs, head_dims, how, laid
) -> tuple[tuple[torch.Tensor, ...], Sizes, torch.Tensor | None]:
    """Run what `prepared` finds for a call whose query and planes lie so, and return what it leaves, sums, peaks and
    totals, how much, and in which order. `planes` are codes and scales of keys, and of values; `mask` is None or a mask
    and its strides."""
    part, strides = mask if mask is not None else (q, (0, 0, 0, 0))
    kinds = None if mask is None else launcher.kind_of(part), launcher.kind_of(reach)
    numbers = (0, 0) if reach is None else (reach.stride(0), reach.shape[1])
    call, tables, sizes, order = prepared(codecs, head_dims, how, laid, strides, numbers, kinds)
    left = sizes.parts(q)
    call((q, *planes, *tables, part, q if reach is None else reach, *left))
    return left, sizes, order
