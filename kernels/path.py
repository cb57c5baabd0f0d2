"""The cheapest path round a trellis, on a GPU: a program for a row, costs of all states in its registers.

What `trellis.path` does in a thousand launches. Costs are added in the same order, so that paths are the same wherever
a compiler does not fuse a square and a sum.
"""

from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl

from tqcompile.codec import STATE_BITS
from tqcompile.kernels import emit, launcher
from tqcompile.trellis import OVERLAP, window

WARPS = 4
# Of the rows that are searched at once.
CHOICES_BYTES = 2**28


@triton.jit
def least_of(x, index):
    """The smallest along the first dimension, and the first index it has."""
    # Not tl.min: that is a compiled function even where this file is interpreted.
    return tl.reduce((x, index), 0, tl.standard._argmin_combine_tie_break_left)


@triton.jit
def spread_costs(x, cost, table, choices, step, BITS: tl.constexpr, STATES: tl.constexpr):
    """Costs of states [STATES] with a coordinate more; which code each of them forgot goes to `choices`."""
    COUNT: tl.constexpr = 1 << BITS
    KEPT: tl.constexpr = STATES // COUNT
    forgotten = tl.broadcast_to(tl.arange(0, COUNT)[:, None], (COUNT, KEPT))
    least, which = least_of(tl.reshape(cost, (COUNT, KEPT)), forgotten)
    tl.store(choices + step * KEPT + tl.arange(0, KEPT), which.to(tl.uint8))
    before = tl.reshape(tl.broadcast_to(least[:, None], (KEPT, COUNT)), (STATES,))
    return before + (x - table) * (x - table)


@triton.jit
def state_before(here, choices, step, BITS: tl.constexpr, KEPT: tl.constexpr):
    """The state that the cheapest path comes from to the one it is in at `step`."""
    left = here >> BITS
    return tl.load(choices + step * KEPT + left).to(tl.int32) * KEPT + left


@triton.jit
def find_paths(
    x, numbers, choices, codes, DIM: tl.constexpr, BITS: tl.constexpr, STATES: tl.constexpr,
    OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = 1 << BITS
    KEPT: tl.constexpr = STATES // COUNT
    row = tl.program_id(0).to(tl.int64)
    x += row * DIM
    codes += row * DIM
    choices += row * DIM * KEPT
    state = tl.arange(0, STATES)
    table = tl.load(numbers + state)

    first = tl.load(x + DIM - OVERLAP)
    cost = (first - table) * (first - table)
    for step in range(1, 2 * OVERLAP):
        at = tl.load(x + (DIM - OVERLAP + step) % DIM)
        cost = spread_costs(at, cost, table, choices, step, BITS, STATES)
    _, here = least_of(cost, state)
    tl.debug_barrier()
    for back in range(1, OVERLAP):
        here = state_before(here, choices, 2 * OVERLAP - back, BITS, KEPT)
    meeting = here >> BITS
    tl.debug_barrier()

    first = tl.load(x)
    cost = tl.where(state >> BITS == meeting, (first - table) * (first - table), float("inf"))
    for step in range(1, DIM):
        cost = spread_costs(tl.load(x + step), cost, table, choices, step, BITS, STATES)
    ends = tl.where(state % KEPT == meeting, cost, float("inf"))
    _, here = least_of(ends, state)
    tl.debug_barrier()
    # The code of a coordinate is the oldest of its state's, where a step shifts in the newest.
    tl.store(codes + (DIM - 1 + AHEAD) % DIM, (here % COUNT).to(tl.uint8))
    for back in range(1, DIM):
        here = state_before(here, choices, DIM - back, BITS, KEPT)
        tl.store(codes + (DIM - back - 1 + AHEAD) % DIM, (here % COUNT).to(tl.uint8))


@cache
def module(folder: str | None, interpreted: bool) -> ModuleType:
    """The imported module of `find_paths`, which is the same for all codecs."""
    kernels = least_of, spread_costs, state_before, find_paths
    text = emit.module_text("The cheapest path round a trellis.", (), kernels)
    return emit.build(text, folder, interpreted)


def search(x: torch.Tensor, numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """`trellis.path` of rows x [..., n], n >= 2 * OVERLAP, float32, finite, on a GPU or in Triton's interpreter.

    Scratch is n * 2^(STATE_BITS - bits) bytes for each of the rows that are searched at once.
    """
    rows, width = x.reshape(-1, x.shape[-1]).contiguous(), x.shape[-1]
    each = width << STATE_BITS - bits
    most = max(1, CHOICES_BYTES // each)
    found = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
    choices = torch.empty(min(most, len(rows)) * each, dtype=torch.uint8, device=x.device)
    built = module(None, x.device.type == "cpu")
    for part, codes in zip(rows.split(most), found.split(most)):
        if len(part):
            constants = width, bits, 1 << STATE_BITS, OVERLAP, window(bits) - 1
            tensors = part, numbers, choices, codes
            launcher.launch(built, "find_paths", (len(part),), tensors, (), constants, num_warps=WARPS)
    return found.view(x.shape)
