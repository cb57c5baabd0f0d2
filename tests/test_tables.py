"""Every derived number, held to an integral that shares no formula with the code that made it."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from vectors import EVERY_CODEC, every

from tqcompile import coding, tables
from tqcompile.codec import STATE_BITS, Lookup, Plane
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


# --- bases


@EVERY_CODEC
@pytest.mark.parametrize("head_dim", [8, 33, 64, 80])
def test_a_basis_has_a_row_for_each_coordinate_and_none_where_it_is_the_model_s_own(codec, head_dim):
    matrix = tables.basis_matrix(codec, head_dim)
    assert (matrix is None) == (codec.basis == "standard")
    assert matrix is None or matrix.shape == (codec.coordinates(head_dim), head_dim)


@EVERY_CODEC
@pytest.mark.parametrize("head_dim", [8, 33, 64, 80, 96])
def test_terms_that_share_the_channels_out_have_one_orthonormal_basis(codec, head_dim):
    """And each term of as many coordinates as channels has one of its own; independent rows have none."""
    matrix = tables.basis_matrix(codec, head_dim)
    if matrix is None:
        return
    matrix = matrix.double()
    if sum(term.share for term in codec.terms) <= 1:
        assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-6)
        return
    for term, band in zip(codec.terms, codec.bands(head_dim)):
        for part in matrix[band].split(head_dim):
            orthonormal = torch.allclose(part @ part.T, torch.eye(head_dim, dtype=torch.float64), atol=1e-6)
            assert orthonormal == (term.basis != "gaussian")


@every(lambda codec: codec.principal)
@pytest.mark.parametrize("head_dim", [16, 33, 64, 128])
def test_terms_of_principal_components_read_neighbours_from_the_first_on(codec, head_dim):
    matrix = tables.basis_matrix(codec, head_dim)
    for band in codec.bands(head_dim):
        channels = (matrix[band] != 0).any(0).nonzero().flatten()
        assert channels.tolist() == list(range(head_dim))[band]


@every(lambda codec: any(term.share < 1 for term in codec.terms) and not codec.principal)
@pytest.mark.parametrize("head_dim", [8, 33, 64, 128])
def test_terms_that_share_channels_read_each_channel_once_and_lie_evenly(codec, head_dim):
    matrix, taken = tables.basis_matrix(codec, head_dim), []
    for band in codec.bands(head_dim):
        channels = (matrix[band] != 0).any(0).nonzero().flatten()
        assert len(channels) == band.stop - band.start
        # A term of a share of the channels has one in each run of 1 / share of them.
        edges = torch.tensor([-1]), channels, torch.tensor([head_dim])
        assert torch.cat(edges).diff().max() <= -(-head_dim // len(channels)) + 1
        taken += channels.tolist()
    assert sorted(taken) == list(range(head_dim))


@pytest.mark.parametrize("head_dim", [1, 2, 6, 20, 64, 80, 96, 128])
def test_a_hadamard_basis_is_signs_in_blocks_of_the_largest_power_of_two(head_dim):
    codec, size = REGISTRY["q4_0:hadamard"], head_dim & -head_dim
    matrix = tables.basis_matrix(codec, head_dim)
    expected = torch.ones(1, 1)
    while len(expected) < size:
        expected = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), expected) / math.sqrt(2)
    blocks = torch.block_diag(*[expected] * (head_dim // size))
    torch.testing.assert_close(matrix, blocks)


def test_the_blocks_of_a_sketch_are_haar_distributed_and_independent():
    codec = REGISTRY["qjl:4"]
    blocks = tables.basis_matrix(codec, 64).view(4, 64, 64)
    assert torch.equal(blocks, torch.stack([tables.rotation(64, tables.SKETCH_SEED + place) for place in range(4)]))
    products = (blocks[0] @ blocks[1].T).flatten().double()
    # Products of independent Haar matrices are Haar: entries of variance 1 / 64 that sum to nothing.
    assert abs(products.mean()) < 4 / 64**1.5
    assert not torch.allclose(blocks[0], tables.rotation(64))


def test_a_gaussian_sketch_has_independent_standard_normal_entries():
    codec = REGISTRY["turboquant_prod:4:gaussian"]
    entries = tables.basis_matrix(codec, 128)[128:].double()
    count = entries.numel()
    assert abs(entries.mean()) < 4 / math.sqrt(count)
    assert entries.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / count))
    assert entries.pow(4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / count))
    rows = entries @ entries.T / 128 - torch.diag((entries**2).mean(1))
    assert rows.square().sum().item() / (128 * 127) == pytest.approx(1 / 128, rel=4 * math.sqrt(4 / 128**2))


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        (
            "qjl:1",
            [
                [0.9021853, -0.0912330, -0.4215901],
                [-0.4199677, -0.4088167, -0.8102444],
                [0.0984320, -0.9080449, 0.4071433],
            ],
        ),
        (
            "turboquant_prod:4:gaussian",
            [[1.0275292, 0.4233467, -1.1959832], [0.3786919, 0.9485058, 0.9642954], [0.3247253, 0.3983090, -0.3868982]],
        ),
    ],
)
def test_sketches_are_the_same_in_every_process_and_release(name, golden):
    assert torch.allclose(tables.basis_matrix(REGISTRY[name], 3)[-3:], torch.tensor(golden), atol=1e-6)


@every(lambda codec: sum(term.share for term in codec.terms) > 1 and len(codec.terms) > 1)
def test_an_overlap_is_what_a_later_term_sees_of_an_earlier_one(codec):
    first, second = codec.bands(48)
    matrix = tables.basis_matrix(codec, 48)
    numbers = torch.randn(5, 48)
    seen = (numbers @ matrix[first]) @ matrix[second].T
    torch.testing.assert_close(numbers @ torch.tensor(tables.overlap(codec, 48, 0, 1)), seen, rtol=1e-4, atol=1e-5)


@every(lambda codec: len(codec.terms) > 1 and sum(term.share for term in codec.terms) == 1)
def test_terms_that_share_the_channels_out_see_nothing_of_each_other(codec):
    assert not torch.tensor(tables.overlap(codec, 48, 0, 1)).any()


@pytest.mark.parametrize("head_dim", [2, 3, 16, 64, 128])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_gain_of_signs_is_that_of_an_integral(head_dim, rows):
    """1 / (rows * E|s_1|) for s on the unit sphere; sqrt(pi / 2) / rows for normal rows, whatever their length is."""
    if head_dim > 2:
        f = density(head_dim)
        mean = 2 * mpmath.quad(lambda x: x * f(x), [0, 1])
    else:
        mean = mpmath.quad(lambda angle: abs(mpmath.cos(angle)), mpmath.linspace(0, 2 * mpmath.pi, 5)) / (2 * mpmath.pi)
    assert tables.sign_gain("sketch", rows * head_dim, head_dim) == pytest.approx(float(1 / mean) / (rows * head_dim))
    mean = 2 * mpmath.quad(lambda x: x * mpmath.npdf(x), [0, mpmath.inf])
    assert tables.sign_gain("gaussian", rows, head_dim) == pytest.approx(float(1 / mean) / rows)


# --- angles


def angle_density(level):
    """The density of the angle of two independent norms of 2^(level - 1) normal numbers, from those norms alone.

    The angle is under psi where the second norm is under the first's tan(psi): with u = r2^2 / (r1^2 + r2^2), which is
    Beta(n / 2, n / 2) for n = 2^(level - 1) numbers a side, the density of psi = asin(sqrt(u)) follows.
    """
    half = mpmath.mpf(2 ** (level - 1)) / 2
    beta = mpmath.beta(half, half)
    return lambda psi: (
        mpmath.sin(psi) ** (2 * half - 2)
        * mpmath.cos(psi) ** (2 * half - 2)
        / beta
        * 2
        * mpmath.sin(psi)
        * mpmath.cos(psi)
    )


ANGLES = [(level, bits) for level in (2, 3, 4) for bits in (1, 2, 3)]


@pytest.mark.parametrize(("level", "bits"), ANGLES)
def test_each_angle_is_the_mean_of_its_cell(level, bits):
    f, found = angle_density(level), tables.angles(level, bits)
    edges = [0.0, *tables.boundaries(found), math.pi / 2]
    assert float(mpmath.quad(f, [0, mpmath.pi / 4, mpmath.pi / 2])) == pytest.approx(1)
    for angle, low, high in zip(found, edges, edges[1:]):
        mean = mpmath.quad(lambda psi: psi * f(psi), [low, high]) / mpmath.quad(f, [low, high])
        assert angle == pytest.approx(float(mean), abs=1e-8)


@pytest.mark.parametrize(("level", "bits"), ANGLES)
def test_angles_ascend_and_mirror_each_other_about_an_eighth_of_a_turn(level, bits):
    found = np.array(tables.angles(level, bits))
    assert len(found) == 2**bits and (np.diff(found) > 0).all() and found[0] > 0
    assert np.abs(found + found[::-1] - np.pi / 2).max() < 1e-9


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_angles_of_two_coordinates_divide_the_turn_evenly(bits):
    found = np.array(tables.angles(1, bits))
    assert len(found) == 2**bits and found[0] == pytest.approx(np.pi / 2**bits)
    assert np.allclose(np.diff(found), 2 * np.pi / 2**bits)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_angles_have_the_density_of_a_gaussian_vector_s(level):
    """Lemma 2 of arXiv 2502.02617, against angles that were made: their means by cell, within four standard errors."""
    count = 20000
    x = np.random.default_rng(level).standard_normal((count, 2, 2 ** (level - 1)))
    radius = np.linalg.norm(x, axis=-1) if level > 1 else x[..., 0]
    psi = np.arctan2(radius[:, 1], radius[:, 0]) % (2 * np.pi)
    edges = tables.boundaries(tables.angles(level, 2))
    shares = np.bincount(np.searchsorted(edges, psi), minlength=4) / count
    f = angle_density(level) if level > 1 else lambda psi: 1 / (2 * mpmath.pi)
    bounds = [0.0, *edges, math.pi / 2 if level > 1 else 2 * math.pi]
    for share, low, high in zip(shares, bounds, bounds[1:]):
        truth = float(mpmath.quad(f, [low, high]))
        assert abs(share - truth) < 4 * math.sqrt(truth * (1 - truth) / count)


# --- look-ups


@EVERY_CODEC
def test_a_look_up_with_a_table_has_numbers_for_each_code(codec):
    for term in codec.terms:
        for factor in term.factors:
            if factor.table == "trellis":
                assert len(tables.numbers(factor, 64)) == 2**STATE_BITS
            elif factor.table == "codebook":
                assert len(tables.numbers(factor, 64)) == 2**factor.plane.bits
            elif factor.table == "angle":
                pairs = np.array(tables.numbers(factor, 64)).reshape(-1, 2)
                assert len(pairs) == 2**factor.plane.bits
                assert np.allclose((pairs**2).sum(1), 1)
            else:
                with pytest.raises(AssertionError, match="computed, not tabled"):
                    tables.numbers(factor, 64)


@EVERY_CODEC
def test_the_tables_of_a_codec_lie_end_to_end(codec):
    whole, offsets = tables.all_numbers(codec, 64), tables.table_offsets(codec, 64)
    at = 0
    for term, band in zip(codec.terms, codec.bands(64)):
        for factor in term.factors:
            if factor.table in ("codebook", "trellis", "angle"):
                expected = tables.numbers(factor, band.stop - band.start)
                assert offsets[factor.plane.name] == at
                assert whole[at : at + len(expected)] == expected
                at += len(expected)
    assert len(whole) == max(at, 1)
    assert len(offsets) == len(tables.tabled(codec))
