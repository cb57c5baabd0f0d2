"""Bits for the principal components of a head: where they lower the error most, scalars charged."""

from collections.abc import Sequence
from functools import cache
from math import inf

from tqcompile import tables

# Mean energy of eight equal bands of the principal components of SmolLM2's keys, mean taken off and balanced, largest
# first: of tokens behind the 128 that the components are taken from, in 90 heads (`examples/spectrum.py`). In those 128
# themselves the last band has a twelfth of this: what a few tokens do not show is not absent.
SPECTRUM = (0.373, 0.132, 0.104, 0.090, 0.082, 0.077, 0.073, 0.069)
# A head of so many dimensions has bands of 16, whose float16 scalar takes as many bits as one bit of their coordinates.
NOMINAL_DIM = 128
MOST_BITS = 6


def distortion(bits: int, head_dim: int) -> float:
    """The share of its energy that a coordinate loses to Lloyd-Max codes of so many bits."""
    return tables.sphere_distortion(bits, head_dim) if bits else 1.0


@cache
def allocate(
    total: int, spectrum: Sequence[float] = SPECTRUM, band_cost: int = 1, head_dim: int = NOMINAL_DIM
) -> tuple[tuple[int, int], ...]:
    """Runs (bands, bits) of neighbouring bands of one width, first to last, of the least error for `total` bits.

    One bit of all coordinates of a band counts 1, and the scalar that each run has counts `band_cost`; bands of 0 bits
    have none, and are the last. By dynamic programming, band by band, over the bits that are left and those of the band
    before (as KVTC, arXiv 2511.01815, does over groups of components).

    Raises:
        ValueError: a total that is negative, or no spectrum.
    """
    if total < 0 or not spectrum:
        raise ValueError(f"total={total}, spectrum={spectrum}; give 0 or more bits, and one band at least")
    loss = [distortion(bits, head_dim) for bits in range(MOST_BITS + 1)]

    @cache
    def best(band: int, left: int, before: int) -> tuple[float, tuple[int, ...]]:
        if band == len(spectrum):
            return 0.0, ()
        found = inf, ()
        # Behind a band without bits none has any: components of less variance deserve no more.
        for bits in range(MOST_BITS + 1) if before else (0,):
            spent = bits + band_cost * (bits not in (0, before))
            if spent <= left:
                error, others = best(band + 1, left - spent, bits)
                found = min(found, (error + spectrum[band] * loss[bits], (bits, *others)))
        return found

    widths, runs = best(0, total, -1)[1], []
    for bits in widths:
        if runs and runs[-1][1] == bits:
            runs[-1] = runs[-1][0] + 1, bits
        else:
            runs.append((1, bits))
    return tuple(runs)
