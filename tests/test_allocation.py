"""Bits go where they lower the error most: no other way to spend them is better."""

import itertools

import pytest

from tqcompile.allocation import MOST_BITS, SPECTRUM, allocate, distortion

STEEP = (0.9, 0.05, 0.03, 0.02)
FLAT = (0.25,) * 4


def widths_of(runs):
    return [bits for bands, bits in runs for _ in range(bands)]


def error(widths, spectrum):
    return sum(energy * distortion(bits, 128) for energy, bits in zip(spectrum, widths))


def price(widths, band_cost):
    """Bits of the codes, and a scalar for each run of one width that has any."""
    return sum(widths) + band_cost * sum(bits > 0 for bits, _ in itertools.groupby(widths))


@pytest.mark.parametrize("spectrum", [STEEP, FLAT, (0.5, 0.3, 0.15, 0.05)])
@pytest.mark.parametrize("band_cost", [0, 1, 3])
def test_no_other_widths_of_that_price_err_less(spectrum, band_cost):
    every = [
        widths
        for widths in itertools.product(range(MOST_BITS + 1), repeat=len(spectrum))
        if all(later == 0 for first, later in itertools.pairwise(widths) if first == 0)
    ]
    for total in (0, 1, 3, 6, 9, 13):
        found = widths_of(allocate(total, spectrum, band_cost))
        assert len(found) == len(spectrum) and price(found, band_cost) <= total
        best = min(error(widths, spectrum) for widths in every if price(widths, band_cost) <= total)
        assert error(found, spectrum) == pytest.approx(best, rel=1e-12)


def test_a_steep_spectrum_gets_bands_and_a_flat_one_none():
    assert len(set(widths_of(allocate(9, STEEP)))) > 1
    assert allocate(9, FLAT) == ((4, 2),)


def test_what_has_no_bits_comes_last_and_costs_nothing():
    assert widths_of(allocate(5, STEEP))[-1] == 0
    assert allocate(0, STEEP) == ((4, 0),)


def test_the_nominal_spectrum_is_whole_and_falls():
    assert sum(SPECTRUM) == pytest.approx(1, abs=1e-3) and sorted(SPECTRUM, reverse=True) == list(SPECTRUM)


@pytest.mark.parametrize("total, spectrum", [(-1, STEEP), (4, ())])
def test_nonsense_is_refused(total, spectrum):
    with pytest.raises(ValueError, match=f"total={total}.*0 or more"):
        allocate(total, spectrum)


def test_bands_without_bits_are_the_last_whatever_the_spectrum():
    widths = [bits for _, bits in allocate(4, (0.05, 0.05, 0.9))]
    assert any(widths) and 0 not in widths[:-1]
