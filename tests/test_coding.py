"""Encode and decode, held to theory and to the rules of the papers, for every codec in the registry."""

import math
from functools import partial

import pytest
import theory
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import EVERY_CODEC, every, into, normal, rebuilt, round_trip, rows

from tqcompile import coding, tables
from tqcompile.codec import Codec, Lookup, Plane, Term
from tqcompile.formats import REGISTRY
from tqcompile.layout import layout_of

LOSSY = every(lambda codec: not codec.is_exact)
# Codes of a direction: all of them where terms do not read each other's scalars, which are rounded to float16.
DIRECTED = every(
    lambda codec: (
        all(term.fit in ("sphere", "norm", "path", "sign", "polar") for term in codec.terms)
        and (len(codec.terms) == 1 or sum(term.share for term in codec.terms) == 1)
    )
)
SPHERICAL = every(lambda codec: codec.is_plain and codec.terms[0].fit == "sphere")


def relative_errors(decoded, x):
    return (decoded.double() - x).square().sum(-1) / x.double().square().sum(-1)


def four_standard_errors(samples):
    return 4 * samples.std().item() / math.sqrt(len(samples))


def z_score(samples, truth):
    return abs(samples.mean().item() - truth) / (samples.std().item() / math.sqrt(len(samples)))


# --- errors


@EVERY_CODEC
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_error_on_gaussian_vectors_is_the_theoretical_one(codec, head_dim):
    x = normal(6000, head_dim)
    errors = relative_errors(rebuilt(codec, x), x)
    if codec.terms[0].fit == "extreme":
        # The step of a block goes with its norm, so theory speaks of the error alone.
        errors = errors * x.double().square().mean(-1)
    least, most = theory.error(codec, head_dim)
    # 0.2 % more for the rounding of the scales to float16, and for numbers that are whole multiples of a unit.
    assert least * 0.998 - four_standard_errors(errors) <= errors.mean().item()
    assert errors.mean().item() <= most * 1.002 + four_standard_errors(errors)


@every(lambda codec: codec.terms[-1].fit == "sign" and len(codec.terms) == 2)
def test_signs_of_a_residual_cost_two_or_five_times_what_a_bit_would_have(codec):
    """Of the error across x: the norm as scalar, with one bit more, leaves D^2 of it along x, which is bias."""
    bits = codec.terms[0].codes.plane.bits + 1
    x = normal(4000, 128)
    errors = relative_errors(rebuilt(codec, x), x)
    distortion = tables.sphere_distortion(bits, 128)
    ratio = errors.mean().item() / (distortion * (1 - distortion))
    assert (
        (4.9 if codec.terms[1].basis == "gaussian" else 1.9)
        < ratio
        < (5.8 if codec.terms[1].basis == "gaussian" else 2.2)
    )


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("fit", ["absmax", "extreme"])
def test_codes_cut_into_several_runs_meet_the_scales_of_their_own_blocks(bits, block, fit):
    """No format in the registry has narrow codes that lie in several sections, and blocks, so this one is made here."""
    factors = Lookup(Plane("scale", 16, per=block), "half"), Lookup(Plane("codes", bits), "signed")
    small = Codec("small blocks", (Term("standard", factors, fit),), unbiased=False, source="this test")
    x = normal(200, 4, block) * torch.tensor([[1.0], [10.0], [100.0], [0.1]])
    decoded = round_trip(small, x.flatten(1)).unflatten(1, (4, block))
    levels, furthest = (2 ** (bits - 1) - 1, 0.51) if fit == "absmax" else (2 ** (bits - 1), 1.01)
    steps = x.abs().amax(-1, keepdim=True) / levels
    assert ((decoded - x).abs() <= steps * furthest).all()


def plain_centroids(codec, x):
    """The decoded vectors, had the encoder stored the plain norm as its scalar."""
    head_dim = x.shape[-1]
    codes, _ = coding.split(codec, coding.encode(codec, x))
    plane = layout_of(codec, head_dim, torch.float32, "cpu").plane(codec.codes.plane.name)
    centroids = coding.lookup(codec.codes, plane.unpack(codes), head_dim).double()
    centroids *= tables.unit(codec.codes, head_dim)
    return centroids * x.double().norm(dim=-1, keepdim=True) / math.sqrt(head_dim)


@SPHERICAL
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_the_codes_alone_have_exactly_the_distortion_of_their_codebook(codec, head_dim):
    x = normal(6000, head_dim)
    errors = relative_errors(plain_centroids(codec, x), x)
    theory = tables.sphere_distortion(codec.codes.plane.bits, head_dim)
    assert errors.mean().item() == pytest.approx(theory, abs=four_standard_errors(errors))


@every(lambda codec: codec.unbiased and not codec.is_exact)
def test_a_basis_makes_spikes_as_cheap_as_gaussian_vectors(codec):
    spikes = 5 * torch.eye(128)
    errors = relative_errors(rebuilt(codec, spikes), spikes)
    least, most = theory.error(codec, 128)
    slack = four_standard_errors(errors) + 0.02 * most
    assert least - slack <= errors.mean().item() <= most + slack


# --- inner products over random bases


@pytest.fixture
def random_bases(monkeypatch):
    """A function of a seed that makes every rotation and every sketch another one, independently of each other."""
    draw, own, sketch = tables.rotation.__wrapped__, tables.ROTATION_SEED, tables.SKETCH_SEED
    cached = tables.basis_matrix, tables.overlap

    def reseed(seed: int) -> None:
        monkeypatch.setattr(tables, "SKETCH_SEED", sketch + (2 * seed + 1) * 10**12)
        monkeypatch.setattr(tables, "rotation", lambda head_dim, seed=own + 2 * seed * 10**12: draw(head_dim, seed))
        for function in cached:
            function.cache_clear()

    yield reseed
    for function in cached:
        function.cache_clear()


BASES, PAIRS, SMALL = 250, 32, 16


def pairs():
    """Vectors and queries that have something in common, [PAIRS, SMALL] each."""
    x, q = normal(PAIRS, SMALL, seed=1), normal(PAIRS, SMALL, seed=2)
    return x, x / x.norm(dim=-1, keepdim=True) + q / q.norm(dim=-1, keepdim=True)


def products_over_bases(codec, x, q, random_bases):
    """<q, x'> [BASES, PAIRS] in as many random bases."""
    found = []
    for seed in range(BASES):
        random_bases(seed)
        found.append((rebuilt(codec, x) * q).sum(-1).double())
    return torch.stack(found)


@every(lambda codec: codec.unbiased)
def test_an_unbiased_codec_keeps_inner_products_on_average_over_random_bases(codec, random_bases):
    x, q = pairs()
    truth = (x * q).sum(-1).double()
    if codec.is_exact:
        assert torch.equal(rebuilt(codec, x), x)
        return
    # Vectors that share a basis are no independent samples; the means of bases are.
    errors = (products_over_bases(codec, x, q, random_bases) - truth).mean(1)
    assert z_score(errors, 0.0) < 4


@every(lambda codec: not codec.unbiased and all(term.fit in ("norm", "polar") for term in codec.terms))
def test_a_biased_codec_of_random_bases_shrinks_inner_products_by_what_theory_says(codec, random_bases):
    x, q = pairs()
    terms = torch.zeros(PAIRS, dtype=torch.float64)
    matrix, factors = tables.basis_matrix(codec, SMALL), theory.shrinkage(codec, SMALL)
    for band, kept in zip(codec.bands(SMALL), factors):
        channels = (matrix[band] != 0).any(0)
        terms += kept * (x * q)[:, channels].sum(-1).double()
    found = products_over_bases(codec, x, q, random_bases)
    assert z_score((found - terms).mean(1), 0.0) < 4
    assert z_score((found - (x * q).sum(-1)).mean(1), 0.0) > 5, "a bias that this test cannot see"


@every(lambda codec: codec.terms[-1].fit == "sign")
def test_the_variance_of_inner_products_by_signs_is_that_of_theory(codec, random_bases):
    """Given the residual r that the signs are of, errors of <q, x'> have mean zero and the variance of <q, r'>."""
    x, q = pairs()
    term, band = codec.terms[-1], codec.bands(SMALL)[-1]
    excess, expected = [], []
    for seed in range(BASES):
        random_bases(seed)
        basis = tables.basis_matrix(codec, SMALL)
        numbers = round_trip(codec, into(codec, x))
        left = x - numbers[:, : band.start] @ basis[: band.start]
        errors = ((numbers @ basis - x) * q).sum(-1).double()
        variance = theory.sign_variance(term, band.stop - band.start, q.double(), left.double())
        excess.append((errors**2 - variance).mean())
        expected.append(variance.mean())
    excess = torch.stack(excess)
    assert z_score(excess, 0.0) < 4
    # And the test can see a variance that is a tenth off.
    assert four_standard_errors(excess) < 0.2 * torch.stack(expected).mean()


@every(
    lambda codec: (
        len(codec.terms) == 1 and codec.is_plain and codec.terms[0].fit == "sphere" and codec.codes.plane.bits <= 5
    )
)
def test_the_plain_norm_as_scalar_would_fail_the_test_of_bias(codec):
    x, q = normal(16, seed=1).double(), normal(16, seed=2).double()
    q = x / x.norm() + q / q.norm()
    bases = torch.stack([tables.rotation.__wrapped__(16, seed) for seed in range(4000)]).double()
    assert z_score((plain_centroids(codec, (bases @ x).float()) * (bases @ q)).sum(-1), (q @ x).item()) > 5


# --- terms


def planes_by_name(codec, y):
    """The codes, or the scalars, of each plane."""
    stored = dict(zip(codec.stores, coding.encode(codec, y)))
    layout, found = layout_of(codec, codec.head_dim(y.shape[-1]), torch.float32, "cpu"), {}
    for factor in codec.factors:
        plane = layout.plane(factor.plane.name)
        own = stored[factor.store]
        packed = plane.sections and factor.store == "codes"
        found[factor.plane.name] = plane.unpack(own) if packed else own[..., plane.offset : plane.offset + plane.width]
    return found


@every(lambda codec: len(codec.terms) == 2 and codec.terms[0].share < 1)
def test_terms_that_share_the_channels_out_are_two_whole_codecs(codec):
    y = rows(codec, 40, 96)
    found = list(planes_by_name(codec, y).values())
    for term, band in zip(codec.terms, codec.bands(96)):
        whole = Codec("whole", (Term(term.basis, term.factors, term.fit),), codec.unbiased, "")
        for plane in planes_by_name(whole, y[:, band]).values():
            assert torch.equal(found.pop(0), plane)
    assert not found


@every(lambda codec: codec.terms[-1].fit == "sign" and len(codec.terms) == 2)
def test_signs_and_norm_are_those_of_what_the_first_term_leaves(codec):
    x = normal(200, 64)
    planes, first = planes_by_name(codec, into(codec, x)), replaced(codec, codec.terms[:1])
    alone = planes_by_name(first, into(first, x))
    assert all(torch.equal(planes[name], plane) for name, plane in alone.items())
    left = x.double() - rebuilt(first, x)
    check_signs(codec, planes, left)


@every(lambda codec: codec.terms[0].fit == "sign")
@pytest.mark.parametrize("head_dim", [7, 64, 80])
def test_a_sketch_keeps_signs_of_projections_and_the_norm(codec, head_dim):
    x = normal(200, head_dim) * 3
    check_signs(codec, planes_by_name(codec, into(codec, x)), x.double())


def replaced(codec, terms):
    return Codec("terms of another", terms, codec.unbiased, codec.source)


def check_signs(codec, planes, left):
    """The last term's planes against the definition, for vectors `left` in the model's own basis."""
    term, band = codec.terms[-1], codec.bands(left.shape[-1])[-1]
    sketch = tables.basis_matrix(codec, left.shape[-1])[band].double()
    projected = left @ sketch.T
    clear = projected.abs() > 1e-5 * left.norm(dim=-1, keepdim=True)
    signs = planes[term.codes.plane.name]
    assert clear.double().mean() > 0.99
    assert torch.equal(signs[clear] == 1, projected[clear] > 0)
    gain = tables.sign_gain(term.basis, *sketch.shape)
    expected = left.norm(dim=-1, keepdim=True) * gain
    torch.testing.assert_close(planes[term.scale.plane.name].double(), expected, rtol=6e-4, atol=0)


@pytest.mark.parametrize("head_dim", [16, 33, 64, 80])
def test_a_polar_transform_of_fine_angles_is_undone_by_its_inverse(head_dim):
    angles = tuple(Lookup(Plane(f"angles_{2**level}", 8, 2**level), "angle") for level in (1, 2, 3, 4))
    factors = Lookup(Plane("radius", 16, per=16), "half"), *angles
    fine = Codec("fine angles", (Term("standard", factors, "polar"),), unbiased=False, source="this test")
    x = normal(300, head_dim)
    assert relative_errors(round_trip(fine, x), x).max() < 2e-3


def test_the_radii_of_a_polar_transform_are_the_norms_of_its_blocks():
    codec = REGISTRY["polarquant"]
    y = rows(codec, 50, 40)
    norms = torch.stack([block.norm(dim=-1) for block in y.split(16, -1)], -1)
    torch.testing.assert_close(planes_by_name(codec, y)["radius"].float(), norms, rtol=6e-4, atol=0)


def q4_0_of_one_block(numbers):
    """llama.cpp's rule for a block, number by number in float32: (scale as float16 bits, codes 0 to 15).

    Of two numbers of the same largest magnitude it takes the first; here the negative one counts.
    """
    single = partial(torch.tensor, dtype=torch.float32)
    most, largest = single(0.0), single(0.0)
    for number in numbers:
        if abs(number) > largest or (abs(number) == largest and number < 0):
            largest, most = abs(number), number
    scale = most / -8
    inverse = 1 / scale if scale != 0 else single(0.0)
    codes = [min(15, int(number * inverse + single(8.5))) for number in numbers]
    return scale.half().view(torch.int16).item(), codes


def blocks_of_ties():
    """Rows of 64 numbers halfway between two codes, where it counts how a number is divided by the step."""
    largest = (2 * normal(40, 1, seed=3).abs().mul(50).round() + 1) * torch.tensor([[1.0], [-1.0]]).repeat(20, 1)
    halves = torch.arange(-15, 16, 2).repeat(2)[:31] / 16
    return torch.cat([largest, largest * halves, largest * halves, largest], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_q4_0_is_llama_cpp_s_bit_for_bit(head_dim, dtype):
    codec = REGISTRY["q4_0"]
    x = normal(60, head_dim, dtype=dtype)
    x[0], x[1, 5], x[2], x[3, :32] = 0, -100.0, x[2] * 1e-4, -x[3, :32].abs()
    x[20:, :64] = blocks_of_ties()
    planes = planes_by_name(codec, x)
    scales = planes["scale"].contiguous().view(torch.int16).tolist()
    codes = (planes["codes"] ^ 8).tolist()
    for row, numbers in enumerate(x.float()):
        blocks = [q4_0_of_one_block(block) for block in numbers.split(32)]
        assert scales[row] == [scale for scale, _ in blocks]
        assert codes[row] == [code for _, block in blocks for code in block]


# --- every vector


@EVERY_CODEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_vectors_decode_to_zeros_beside_others_that_do_not(codec, dtype):
    y = rows(codec, 3, 80, dtype=dtype)
    y[1] = 0
    decoded = round_trip(codec, y).float()
    assert torch.equal(decoded[1], torch.zeros(codec.coordinates(80)))
    assert (decoded[[0, 2]].norm(dim=-1) > 1).all()


@EVERY_CODEC
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_token_is_poisoned_alone(codec, poison):
    x = normal(5, 80)
    clean = coding.encode(codec, into(codec, x))
    x[2, 7] = poison
    # Row by row: a product of matrices may treat rows together.
    dirty = coding.encode(codec, into(codec, x))
    others = [0, 1, 3, 4]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, dirty))
    decoded = coding.decode(codec, dirty, 80)
    assert not decoded[2].isfinite().all()
    assert decoded[others].isfinite().all()
    if codec.basis != "standard":
        back = decoded @ tables.basis_matrix(codec, 80)
        assert not back[2].isfinite().any() and back[others].isfinite().all()


@every(lambda codec: sum(term.share for term in codec.terms) == 1)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, 31, 32, 79])
def test_one_poisoned_coordinate_shows_wherever_it_is(codec, poison, place):
    y = rows(codec, 3, 80)
    y[1, place] = poison
    decoded = round_trip(codec, y)
    assert not decoded[1].isfinite().all() and decoded[[0, 2]].isfinite().all()


@DIRECTED
@pytest.mark.parametrize("power", [-120, -60, 60, 120])
def test_codes_depend_on_the_direction_alone_from_the_tiniest_to_the_hugest(codec, power):
    y = rows(codec, 50, 64)
    codes, _ = coding.split(codec, coding.encode(codec, y))
    scaled, _ = coding.split(codec, coding.encode(codec, y * 2.0**power))
    assert torch.equal(codes, scaled)


@LOSSY
@pytest.mark.parametrize("power", [-6, 8])
def test_decoding_scales_with_the_vector_where_float16_can_hold_the_scale(codec, power):
    y = rows(codec, 50, 64)
    assert torch.allclose(round_trip(codec, y * 2.0**power), round_trip(codec, y) * 2.0**power, rtol=2e-3)


@LOSSY
def test_numbers_too_small_for_the_scale_become_zeros_and_numbers_too_large_are_not_hidden(codec):
    y = rows(codec, 4, 64)
    assert torch.equal(round_trip(codec, y * 1e-30), torch.zeros(4, codec.coordinates(64)))
    assert not round_trip(codec, y * 1e30).isfinite().any(-1).all()


@LOSSY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_vector_is_encoded_as_its_float32_value(codec, dtype):
    y = rows(codec, 20, 96, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(coding.encode(codec, y), coding.encode(codec, y.float())))


def near_a_sign(codec, y):
    """Rows [...] in which a residual's projection is so near zero that its sign is a matter of rounding."""
    if len(codec.terms) == 1 or codec.terms[-1].fit != "sign":
        return torch.zeros(y.shape[:-1], dtype=torch.bool)
    head_dim = codec.head_dim(y.shape[-1])
    first, second = codec.bands(head_dim)
    left = y[..., second] - round_trip(codec, y)[..., first] @ torch.tensor(tables.overlap(codec, head_dim, 0, 1))
    return (left.abs() < 1e-5 * y[..., first].norm(dim=-1, keepdim=True)).any(-1)


@EVERY_CODEC
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_is_encoded_token_by_token(codec, data):
    leading = data.draw(st.lists(st.integers(0, 4), max_size=3))
    head_dim = data.draw(st.integers(max(2, codec.minimum_head_dim), 100))
    y = rows(codec, *leading, head_dim, seed=data.draw(st.integers(0, 9)))
    decoded = round_trip(codec, y)
    assert decoded.shape == y.shape
    clear = ~near_a_sign(codec, y).flatten()
    alone = [round_trip(codec, token) for token in y.reshape(-1, y.shape[-1])]
    if alone:
        found = decoded.reshape(-1, y.shape[-1])
        assert torch.allclose(found[clear], torch.stack(alone)[clear], rtol=1e-3, atol=1e-6)


@EVERY_CODEC
def test_strides_do_not_matter_to_encode_or_decode(codec):
    y = rows(codec, 2, 7, 3, 40)
    strided = torch.stack([y, y + 1], -1).transpose(1, 2)[..., 0].transpose(1, 2)
    assert not strided.is_contiguous()
    planes, straight = (
        coding.encode(codec, strided.transpose(1, 2)),
        coding.encode(codec, y.transpose(1, 2).contiguous()),
    )
    assert all(torch.equal(a, b) for a, b in zip(planes, straight))
    strided = [plane.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 1:5] for plane in straight]
    assert torch.equal(coding.decode(codec, strided, 40), coding.decode(codec, straight, 40)[:, :, 1:5])


@EVERY_CODEC
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_program_changes_no_code_and_no_number(codec, default):
    y = rows(codec, 50, 64)
    planes, numbers = coding.encode(codec, y), round_trip(codec, y)
    for function in (tables.basis_matrix, tables.overlap):
        function.cache_clear()
    torch.set_default_dtype(default)
    try:
        again, same, basis = coding.encode(codec, y), round_trip(codec, y), tables.basis_matrix(codec, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(planes, again))
    assert same.dtype == torch.float32
    assert torch.equal(numbers, same)
    assert basis is None or torch.equal(basis, tables.basis_matrix.__wrapped__(codec, 64))


@EVERY_CODEC
def test_pieces_are_decoded_coordinates_once_and_in_order(codec):
    if codec.is_exact:
        return
    for head_dim in (33, 80, 128):
        planes = coding.encode(codec, rows(codec, 4, head_dim))
        found, at = coding.pieces(codec, planes, head_dim), 0
        for span, numbers in found:
            assert span.start == at and numbers.shape == (4, span.stop - span.start)
            at = span.stop
        assert at == codec.coordinates(head_dim)
        whole = coding.decode(codec, planes, head_dim)
        assert torch.equal(whole, torch.cat([numbers for _, numbers in found], -1))


@LOSSY
@pytest.mark.parametrize("size", [1e-3, 1e4, 1e5, 1e6, 1e8])
def test_tokens_are_as_close_as_ever_or_no_numbers_where_scalars_overflow(codec, size):
    x = normal(20, 64)
    usual = relative_errors(rebuilt(codec, x), x.double())
    found = relative_errors(rebuilt(codec, x * size).double() / size, x.double())
    lost = ~found.isfinite() if size > 1e4 else torch.zeros(20, dtype=torch.bool)
    assert (found[~lost] < 1.1 * usual[~lost]).all()
