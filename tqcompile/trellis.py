"""A bitshift trellis that bites its tail: the states that codes make, and the codes whose numbers are nearest to rows.

A state is `STATE_BITS` bits, and names a number; a step shifts `bits` new ones in, which are a coordinate's code. The
trellis is that of QTIP (arXiv 2406.11235). Its states are windows of the codes, so that a reader needs no order: it
shifts neighbours together and looks up. A writer looks for the cheapest path, coordinate by coordinate.
"""

import math
from collections.abc import Callable

import torch

from tqcompile.codec import STATE_BITS

# Coordinates on either side of the place where the ends meet, by which that place's state is chosen.
OVERLAP = 32
# Bytes of the costs of all states of the rows that are worked on at once: on a CPU what its cache holds, elsewhere
# what makes up for starting a thousand kernels.
COST_BYTES = {"cpu": 2**24}
MOST_COST_BYTES = 2**28
# What searches rows of `2 * OVERLAP` coordinates or more, by the type of their device, in place of `path`.
SEARCHES: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {}


def window(bits: int) -> int:
    """How many codes a state has bits of."""
    return -(-STATE_BITS // bits)


def states(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., n] -> the states int32 [..., n] that each makes with those behind it, the first behind the last."""
    width, more = codes.shape[-1], window(bits) - 1
    # As bytes end to end, of which neighbours are a shifted view: what Inductor makes of a roll takes number by number.
    codes = codes.to(torch.uint8)
    codes = torch.cat([codes, codes[..., :more]], -1)
    state = codes[..., :width].to(torch.int32)
    for ahead in range(1, more + 1):
        state = (state << bits) | codes[..., ahead : ahead + width]
    return state & (2**STATE_BITS - 1)


@torch.no_grad()
def path(x: torch.Tensor, numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows x [..., n], finite -> codes uint8 [..., n] whose states' `numbers`, [2^STATE_BITS], are near to them.

    A path round the trellis ends where it began. That place is taken from the best path through the `OVERLAP`
    coordinates on either side of it; the rest is the best path that passes there. A narrow row, of which one place is
    a large part, is turned and improved from other places, in as many steps as the first look took.
    """
    rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
    if width >= 2 * OVERLAP and x.device.type in SEARCHES:
        return SEARCHES[x.device.type](x, numbers, bits)
    each = max(width, 2 * OVERLAP) * numbers.numel()
    most = max(1, COST_BYTES.get(x.device.type, MOST_COST_BYTES) // (each * numbers.element_size()))
    # Allocated once: between blocks that come and go, results would hold on to a hundred times as much.
    held = x.new_empty(min(most, len(rows)) * each)
    turns, turn = max(0, 2 * OVERLAP // width - 1), width // 3 + 1
    near = torch.arange(-OVERLAP, OVERLAP, device=x.device) % width
    found = torch.empty_like(rows, dtype=torch.uint8)
    for part, codes in zip(rows.split(most), found.split(most)):
        steps = part.T.contiguous()
        meeting = _best(steps[near], numbers, bits, None, held)[OVERLAP] >> bits
        way = _best(steps, numbers, bits, meeting, held)
        for _ in range(turns):
            steps = steps.roll(-turn, 0)
            way = _best(steps, numbers, bits, way[turn] >> bits, held)
        # The code of a coordinate is the oldest of its state's, where a step shifts in the newest.
        codes.copy_((way.T & (2**bits - 1)).roll(turns * turn + window(bits) - 1, -1))
    return found.view(x.shape)


def _best(
    x: torch.Tensor, numbers: torch.Tensor, bits: int, meeting: torch.Tensor | None, held: torch.Tensor
) -> torch.Tensor:
    """x [steps, rows] -> states [steps, rows] of the cheapest path (Viterbi).

    `meeting` [rows] are the bits that its last state leaves to its first one; without, both ends are free. Costs of all
    states at all steps are written to `held`.
    """
    steps, rows = x.shape
    count, kept = 2**bits, 2 ** (STATE_BITS - bits)
    costs = held[: x.numel() * len(numbers)].view(steps, rows, len(numbers))
    torch.sub(x.unsqueeze(-1), numbers, out=costs).square_()
    # A state is (kept, code) to the one before it, and (code, kept) to the one behind it, which forgets that code.
    after, before = costs.view(steps, rows, kept, count), costs.view(steps, rows, count, kept)
    everyone = torch.arange(rows, device=x.device)
    if meeting is not None:
        free = x.new_full((rows, kept), math.inf).scatter_(1, meeting.unsqueeze(1), 0.0)
        after[0].add_(free.unsqueeze(-1))
    for step in range(1, steps):
        after[step].add_(before[step - 1].amin(1).unsqueeze(-1))
    state = costs[-1].argmin(1) if meeting is None else before[-1][everyone, :, meeting].argmin(1) * kept + meeting
    found = [state]
    # Costs, not choices, are kept on the way: what a path comes from is looked up for its own states alone.
    for step in range(steps - 2, -1, -1):
        left = state >> bits
        state = before[step][everyone, :, left].argmin(1) * kept + left
        found.append(state)
    return torch.stack(found[::-1])
