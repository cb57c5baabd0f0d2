"""Every derived number, held to an integral that shares no formula with the code that made it."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch

from tqcompile import coding, tables
from tqcompile.codec import Lookup, Plane
from tqcompile.formats import REGISTRY

# Exact Lloyd-Max distortions of a coordinate on the sphere, 1 to 4 bits; None is the Gaussian limit.
PUBLISHED = {
    64: (0.3584, 0.1145, 0.0334, 0.00913),
    128: (0.3609, 0.1160, 0.0340, 0.00931),
    None: (0.3634, 0.11748, 0.03455, 0.00950),
}
CASES = [(bits, head_dim) for head_dim in (3, 48, 64, 128) for bits in (1, 2, 3, 4)] + [(5, 80), (8, 128)]


def density(head_dim):
    """The density of one coordinate of a uniform point on the unit sphere, by numerical normalisation."""
    power = mpmath.mpf(head_dim - 3) / 2
    total = mpmath.quad(lambda x: (1 - x * x) ** power, mpmath.linspace(-1, 1, 9))
    return lambda x: (1 - x * x) ** power / total


def upper_cells(bits, head_dim):
    """(centroid, low edge, high edge) of the positive cells, on the unit sphere."""
    codebook = [mpmath.mpf(c) / mpmath.sqrt(head_dim) for c in tables.sphere_codebook(bits, head_dim)]
    edges = [(low + high) / 2 for low, high in itertools.pairwise(codebook)] + [mpmath.mpf(1)]
    half = len(codebook) // 2
    return list(zip(codebook[half:], edges[half - 1 :], edges[half:]))


@pytest.mark.parametrize(("bits", "head_dim"), CASES)
def test_distortion_is_that_of_an_integral_of_the_beta_density(bits, head_dim):
    f = density(head_dim)
    error = sum(
        mpmath.quad(lambda x, c=c: (x - c) ** 2 * f(x), [low, high]) for c, low, high in upper_cells(bits, head_dim)
    )
    assert tables.sphere_distortion(bits, head_dim) == pytest.approx(float(2 * head_dim * error), rel=1e-7)


@pytest.mark.parametrize(("bits", "head_dim"), CASES)
def test_each_centroid_is_the_mean_of_its_cell(bits, head_dim):
    f = density(head_dim)
    for centroid, low, high in upper_cells(bits, head_dim):
        mean = mpmath.quad(lambda x: x * f(x), [low, high]) / mpmath.quad(f, [low, high])
        assert float(centroid) == pytest.approx(float(mean), abs=1e-9)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_distortion_is_within_one_percent_of_the_published_figure(bits, head_dim):
    assert tables.sphere_distortion(bits, head_dim) == pytest.approx(PUBLISHED[head_dim][bits - 1], rel=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_large_sphere_has_the_codebook_of_a_gaussian(bits):
    assert tables.sphere_distortion(bits, 4096) == pytest.approx(PUBLISHED[None][bits - 1], rel=0.01)


@pytest.mark.parametrize("bits", range(1, 9))
def test_distortion_lies_between_the_bounds_of_rate_distortion_theory(bits):
    assert 4.0**-bits < tables.sphere_distortion(bits, 128) < math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("head_dim", [2, 3, 4, 7, 32, 80, 96, 256, 576])
def test_a_codebook_of_any_width_ascends_is_odd_and_stays_on_the_sphere(head_dim):
    for bits in range(1, 9):
        codebook = np.array(tables.sphere_codebook(bits, head_dim))
        assert len(codebook) == 2**bits
        assert (np.diff(codebook) > 0).all()
        assert (codebook == -codebook[::-1]).all()
        assert codebook[-1] < math.sqrt(head_dim)


@pytest.mark.parametrize(("bits", "head_dim", "word"), [(0, 64, "bits=0"), (9, 64, "bits=9"), (4, 1, "head_dim=1")])
def test_a_codebook_that_does_not_exist_is_refused_with_a_sentence(bits, head_dim, word):
    with pytest.raises(ValueError, match=word):
        tables.sphere_codebook(bits, head_dim)


def look_up(bits):
    return Lookup(Plane("codes", bits), "codebook")


@pytest.mark.parametrize(("bits", "head_dim"), CASES)
def test_the_numbers_in_use_lose_little_to_the_best_codebook(bits, head_dim):
    f = density(head_dim)
    numbers = [mpmath.mpf(c) / mpmath.sqrt(head_dim) for c in tables.numbers(look_up(bits), head_dim)]
    edges = [*tables.boundaries(tables.numbers(look_up(bits), head_dim)), mpmath.sqrt(head_dim)]
    edges = [mpmath.mpf(edge) / mpmath.sqrt(head_dim) for edge in edges[2 ** (bits - 1) - 1 :]]
    cells = zip(numbers[2 ** (bits - 1) :], edges, edges[1:])
    error = sum(mpmath.quad(lambda x, c=c: (x - c) ** 2 * f(x), [low, high]) for c, low, high in cells)
    best = tables.sphere_distortion(bits, head_dim)
    assert best * (1 - 1e-6) <= float(2 * head_dim * error) <= best * (1.009 if bits == 5 else 1.002)


@pytest.mark.parametrize("head_dim", [2, 3, 4, 7, 32, 80, 96, 256, 576])
def test_the_numbers_in_use_ascend_and_are_odd(head_dim):
    for bits in range(1, 9):
        numbers = np.array(tables.numbers(look_up(bits), head_dim))
        assert (np.diff(numbers) > 0).all()
        assert np.abs(numbers + numbers[::-1]).max() < 1e-12
        # A whole number is half a unit off at most, and what it rounds a polynomial that is close.
        apart = 0.012 if bits > 5 else tables.unit(look_up(bits), head_dim) / 2 + 0.012
        assert np.abs(numbers - tables.sphere_codebook(bits, head_dim)).max() < apart


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [32, 128])
def test_the_reference_computes_the_numbers_that_the_kernels_look_up(bits, head_dim):
    codes = torch.arange(2**bits, dtype=torch.int32)
    expected = torch.tensor(tables.numbers(look_up(bits), head_dim))
    found = coding.lookup(look_up(bits), codes, head_dim) * tables.unit(look_up(bits), head_dim)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_boundaries_give_each_number_its_nearest_centroid():
    codebook = tables.sphere_codebook(3, 64)
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    nearest = (x.unsqueeze(-1) - torch.tensor(codebook, dtype=torch.float64)).abs().argmin(-1)
    assert torch.equal(torch.bucketize(x, torch.tensor(tables.boundaries(codebook), dtype=torch.float64)), nearest)


@pytest.mark.parametrize("head_dim", [1, 2, 48, 80, 128, 256])
def test_a_rotation_is_orthogonal(head_dim):
    r = tables.rotation(head_dim).double()
    assert torch.allclose(r @ r.T, torch.eye(head_dim, dtype=torch.float64), atol=1e-6)


def test_a_rotation_is_the_same_in_every_process_and_release():
    """Stored caches can only be read with the rotation that wrote them, so these numbers may never change."""
    fresh = tables.rotation.__wrapped__(64)
    assert torch.equal(fresh, tables.rotation(64))
    golden = [
        [-0.7969018, -0.4883488, 0.3556165],
        [-0.5106599, 0.8590556, 0.0353555],
        [0.3227601, 0.1534242, 0.9339630],
    ]
    assert torch.allclose(tables.rotation(3), torch.tensor(golden), atol=1e-6)


def test_rotations_differ_between_seeds_and_are_not_leading_blocks_of_each_other():
    assert not torch.allclose(tables.rotation(16, 1), tables.rotation(16, 2))
    assert not torch.allclose(tables.rotation(16)[:8, :8], tables.rotation(8))


def test_rotations_are_haar_distributed():
    """The trace of a Haar orthogonal matrix has mean 0 and variance 1; QR without its sign fix fails this."""
    traces = torch.stack([tables.rotation.__wrapped__(6, seed).trace() for seed in range(3000)]).double()
    assert abs(traces.mean().item()) < 4 / math.sqrt(3000)
    assert traces.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 3000))


@pytest.mark.parametrize("codec", REGISTRY.values(), ids=REGISTRY)
def test_only_a_rotated_codec_has_a_basis_matrix(codec):
    matrix = tables.basis_matrix(codec, 64)
    assert (matrix is None) == (codec.basis == "standard")
    assert matrix is None or torch.equal(matrix, tables.rotation(64))


@pytest.mark.parametrize("codec", REGISTRY.values(), ids=REGISTRY)
def test_a_codebook_look_up_has_one_number_for_each_code(codec):
    for term in codec.terms:
        for factor in term.factors:
            if factor.table == "codebook":
                assert len(tables.numbers(factor, 64)) == 2**factor.plane.bits
            else:
                with pytest.raises(AssertionError, match="computed, not tabled"):
                    tables.numbers(factor, 64)
