"""Trellis-coded quantisation with a bitshift trellis (QTIP, arXiv 2406.11235), tail-biting, for vectors of any width.

The state is the last `STATE_BITS` bits of a vector's code and names a number of the codebook; each coordinate shifts
`width` new bits in. So a reader needs a shift, a mask and a look-up, and a writer needs Viterbi's algorithm.
"""

from functools import cache
from itertools import accumulate

import numpy as np
import torch
from scipy.special import ndtri
from simulation.coders import HALF_BITS, Coder, on_the_sphere

STATE_BITS = 10
# Numbers in one array of path costs: 128 MB of float32.
CHUNK_ELEMENTS = 2**25
TRAINING_VECTORS, TRAINING_ROUNDS = 2048, 8


def gaussian_codebook(state_bits: int, seed: int = 0) -> torch.Tensor:
    """Midpoints of 2^state_bits equal shares of a Gaussian, in random order."""
    count = 2**state_bits
    order = np.random.default_rng((seed, state_bits)).permutation(count)
    return torch.from_numpy(ndtri((np.arange(count) + 0.5) / count)[order]).float()


@cache
def trained_codebook(state_bits: int, width: int, device: str) -> torch.Tensor:
    """Lloyd's algorithm on the codebook: numbers become the means of what Viterbi gives them, on Gaussian vectors."""
    codebook = gaussian_codebook(state_bits).to(device)
    x = torch.randn(TRAINING_VECTORS, 64, generator=torch.Generator().manual_seed(width)).to(device)
    for _ in range(TRAINING_ROUNDS):
        states = viterbi(x, codebook, [width] * 64).flatten()
        count = torch.bincount(states, minlength=len(codebook))
        total = torch.zeros_like(codebook).index_add_(0, states, x.flatten())
        codebook = torch.where(count > 0, total / count.clamp_min(1), codebook)
    return codebook


def viterbi(
    x: torch.Tensor, codebook: torch.Tensor, widths: list[int], weights: torch.Tensor | None = None
) -> torch.Tensor:
    """x [N, T] -> states int64 [N, T] of a path round the trellis whose numbers are close to x.

    Errors count by `weights` [N, T], if any. Step t shifts widths[t] bits in, and the last state runs over into the
    first. The place where the ends meet is taken from a path through x rolled by half its length, the rest is the best
    path that passes there.
    """
    rows = max(1, CHUNK_ELEMENTS // len(codebook))
    weights = torch.ones_like(x) if weights is None else weights
    parts = zip(x.split(rows), weights.split(rows))
    return torch.cat([_tail_biting(part, codebook, widths, weight) for part, weight in parts])


def _tail_biting(x: torch.Tensor, codebook: torch.Tensor, widths: list[int], weights: torch.Tensor) -> torch.Tensor:
    middle = x.shape[1] // 2
    turned = [*widths[-middle:], *widths[:-middle]]
    rolled = _best_path(x.roll(middle, 1), codebook, turned, weights.roll(middle, 1), None)
    return _best_path(x, codebook, widths, weights, rolled[:, middle] >> widths[0])


def _best_path(
    x: torch.Tensor, codebook: torch.Tensor, widths: list[int], weights: torch.Tensor, meeting: torch.Tensor | None
) -> torch.Tensor:
    """The cheapest path; `meeting` [N] are the bits of its first state that its last state has, too."""
    count, states = len(x), len(codebook)
    everyone = torch.arange(count, device=x.device)
    before = torch.zeros(count, states >> widths[0], device=x.device)
    if meeting is not None:
        before = before.fill_(torch.inf).index_put_((everyone, meeting), before.new_zeros(()))
    costs, came_from = before, []
    for step, width in enumerate(widths):
        if step:
            # A state's oldest bits are forgotten: of the states that differ in them alone, the cheapest lives on.
            before, oldest = costs.unflatten(1, (2**width, states >> width)).min(1)
            came_from.append(oldest.to(torch.uint8))
        error = (
            (x[:, step, None] - codebook)
            .square_()
            .mul_(weights[:, step, None])
            .unflatten(1, (states >> width, 2**width))
        )
        costs = error.add_(before.unsqueeze(-1)).flatten(1)
    if meeting is None:
        state = costs.argmin(1)
    else:
        ends = costs.unflatten(1, (-1, states >> widths[0]))[everyone, :, meeting]
        state = (ends.argmin(1) * (states >> widths[0])) + meeting
    path = [state]
    for width, oldest in zip(reversed(widths[1:]), reversed(came_from)):
        kept = state >> width
        state = kept + oldest[everyone, kept].long() * (states >> width)
        path.append(state)
    return torch.stack(path[::-1], 1)


def widths_of(rate: float, count: int) -> list[int]:
    """Whole widths of mean `rate`, as even as they can be."""
    ends = [round(total) for total in accumulate([rate] * count)]
    return [end - start for start, end in zip([0, *ends], ends)]


def trellis(rate: float, scale_bits: int = HALF_BITS, state_bits: int = STATE_BITS, trained: bool = True) -> Coder:
    """Rotated vectors on a trellis at `rate` bits a coordinate, and the unbiased scalar."""

    def code(y: torch.Tensor, head_dim: int) -> torch.Tensor:
        if trained:
            codebook = trained_codebook(state_bits, round(rate), str(y.device))
        else:
            codebook = gaussian_codebook(state_bits).to(y.device)
        return codebook[viterbi(y.flatten(0, -2), codebook, widths_of(rate, head_dim))].view_as(y)

    return on_the_sphere(f"{rate:g}trellis{state_bits}{'' if trained else 'r'}", rate, scale_bits, code)
