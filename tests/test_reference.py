"""Encode, decode and attend, held to theory and to dense attention in float64, for every codec in the registry."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import erf

from tqcompile import coding, reference, tables
from tqcompile.codec import Codec, Lookup, Plane, Term
from tqcompile.formats import REGISTRY
from tqcompile.layout import layout_of

EVERY_CODEC = pytest.mark.parametrize("codec", REGISTRY.values(), ids=REGISTRY)
LOSSY = pytest.mark.parametrize(
    "codec",
    [c for c in REGISTRY.values() if c.fit != "exact"],
    ids=[c.name for c in REGISTRY.values() if c.fit != "exact"],
)
SPHERICAL = [c for c in REGISTRY.values() if c.fit == "sphere"]
HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 192, 256)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def round_trip(codec, y):
    return coding.decode(codec, coding.encode(codec, y), y.shape[-1])


def error_in_theory(codec, head_dim):
    """Bounds of the expected |x - x'|^2 / |x|^2 for a Gaussian vector."""
    if codec.is_exact:
        return 0.0, 0.0
    if codec.fit == "sphere":
        # The scalar |x|^2 / <x, c> makes <x', x> = |x|^2: the error is D / (1 - D), less the part of it along x that
        # varies from vector to vector. The cells of a fine quantiser are wide in the tails (their error has the
        # density's cube root as its weight, of three times the variance), so that part is up to 3 / head_dim.
        distortion = tables.sphere_distortion(codec.codes.plane.bits, head_dim)
        most = distortion / (1 - distortion)
        return most * (1 - 3 / head_dim), most
    if codec.fit == "absmax":
        # A uniform error of one step for all of a block but its largest, which is a code exactly.
        block, limit = codec.scale.plane.per, 2 ** (codec.codes.plane.bits - 1) - 1
        largest = quad(lambda x: 2 * x * (1 - erf(x / math.sqrt(2)) ** block), 0, 12)[0]
        error = largest / limit**2 / 12 * (block - 1) / block
        return error, error
    raise AssertionError(f"fit {codec.fit!r} needs its theory here")


def relative_errors(decoded, x):
    return (decoded.double() - x).square().sum(-1) / x.double().square().sum(-1)


def four_standard_errors(samples):
    return 4 * samples.std().item() / math.sqrt(len(samples))


@EVERY_CODEC
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_error_on_gaussian_vectors_is_the_theoretical_one(codec, head_dim):
    x = normal(6000, head_dim)
    errors = relative_errors(round_trip(codec, x), x)
    least, most = error_in_theory(codec, head_dim)
    # 0.2 % more for the rounding of the scales to float16.
    assert least * 0.998 - four_standard_errors(errors) <= errors.mean().item()
    assert errors.mean().item() <= most * 1.002 + four_standard_errors(errors)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("block", [16, 32])
def test_codes_cut_into_several_runs_meet_the_scales_of_their_own_blocks(bits, block):
    """No format in the registry has both narrow codes and blocks, so this one is made here."""
    factors = Lookup(Plane("scale", 16, per=block), "half"), Lookup(Plane("codes", bits), "signed")
    small = Codec("small blocks", (Term("standard", factors),), "absmax", unbiased=False, source="this test")
    x = normal(200, 4, block) * torch.tensor([[1.0], [10.0], [100.0], [0.1]])
    decoded = round_trip(small, x.flatten(1)).unflatten(1, (4, block))
    steps = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((decoded - x).abs() <= steps * 0.51).all()


def plain_centroids(codec, x):
    """The decoded vectors, had the encoder stored the plain norm as its scalar."""
    head_dim = x.shape[-1]
    codes, _ = coding.split(codec, coding.encode(codec, x))
    plane = layout_of(codec, head_dim, torch.float32, "cpu").plane(codec.codes.plane.name)
    centroids = coding.lookup(codec.codes, plane.unpack(codes), head_dim).double()
    centroids *= tables.unit(codec.codes, head_dim)
    return centroids * x.double().norm(dim=-1, keepdim=True) / math.sqrt(head_dim)


@pytest.mark.parametrize("codec", SPHERICAL, ids=lambda codec: codec.name)
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_the_codes_alone_have_exactly_the_distortion_of_their_codebook(codec, head_dim):
    x = normal(6000, head_dim)
    errors = relative_errors(plain_centroids(codec, x), x)
    theory = tables.sphere_distortion(codec.codes.plane.bits, head_dim)
    assert errors.mean().item() == pytest.approx(theory, abs=four_standard_errors(errors))


@pytest.mark.parametrize("codec", SPHERICAL, ids=lambda codec: codec.name)
def test_a_rotation_makes_spikes_as_cheap_as_gaussian_vectors(codec):
    basis = tables.basis_matrix(codec, 128)
    spikes = 5 * torch.eye(128)
    back = reference.rotate_back(round_trip(codec, reference.rotate(spikes, basis)), basis, torch.float32)
    errors = relative_errors(back, spikes)
    least, most = error_in_theory(codec, 128)
    assert least - four_standard_errors(errors) <= errors.mean().item() <= most + four_standard_errors(errors)


def z_score(samples, truth):
    return abs(samples.mean().item() - truth) / (samples.std().item() / math.sqrt(len(samples)))


def over_rotations(count, head_dim):
    """A vector and a query, in each of `count` random bases, and their inner product."""
    x, q = normal(head_dim, seed=1).double(), normal(head_dim, seed=2).double()
    q = x / x.norm() + q / q.norm()
    bases = torch.stack([tables.rotation.__wrapped__(head_dim, seed) for seed in range(count)]).double()
    return bases @ x, bases @ q, (q @ x).item()


@pytest.mark.parametrize("codec", [c for c in REGISTRY.values() if c.unbiased], ids=lambda codec: codec.name)
def test_an_unbiased_codec_keeps_inner_products_on_average_over_random_bases(codec):
    x, q, truth = over_rotations(4000, 16)
    if codec.basis == "standard":
        assert torch.equal(round_trip(codec, x), x)
        return
    assert z_score((round_trip(codec, x.float()).double() * q).sum(-1), truth) < 4


@pytest.mark.parametrize("codec", [c for c in SPHERICAL if c.codes.plane.bits <= 5], ids=lambda codec: codec.name)
def test_the_plain_norm_as_scalar_would_fail_the_test_of_bias(codec):
    x, q, truth = over_rotations(4000, 16)
    assert z_score((plain_centroids(codec, x.float()) * q).sum(-1), truth) > 5


@EVERY_CODEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_vectors_decode_to_zeros_beside_others_that_do_not(codec, dtype):
    y = normal(3, 80, dtype=dtype)
    y[1] = 0
    decoded = round_trip(codec, y).float()
    assert torch.equal(decoded[1], torch.zeros(80))
    assert (decoded[[0, 2]].norm(dim=-1) > 1).all()


@EVERY_CODEC
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_token_is_poisoned_alone(codec, poison):
    y = normal(5, 80)
    clean = coding.encode(codec, y)
    y[2, 7] = poison
    dirty = coding.encode(codec, y)
    others = [0, 1, 3, 4]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, dirty))
    decoded = coding.decode(codec, dirty, 80)
    assert not decoded[2].isfinite().all()
    assert decoded[others].isfinite().all()


@pytest.mark.parametrize("codec", SPHERICAL, ids=lambda codec: codec.name)
@pytest.mark.parametrize("power", [-120, -60, 60, 120])
def test_codes_depend_on_the_direction_alone_from_the_tiniest_to_the_hugest(codec, power):
    y = normal(50, 64)
    codes, _ = coding.split(codec, coding.encode(codec, y))
    scaled, _ = coding.split(codec, coding.encode(codec, y * 2.0**power))
    assert torch.equal(codes, scaled)


@LOSSY
@pytest.mark.parametrize("power", [-6, 8])
def test_decoding_scales_with_the_vector_where_float16_can_hold_the_scale(codec, power):
    y = normal(50, 64)
    assert torch.allclose(round_trip(codec, y * 2.0**power), round_trip(codec, y) * 2.0**power, rtol=2e-3)


@LOSSY
def test_numbers_too_small_for_the_scale_become_zeros_and_numbers_too_large_are_not_hidden(codec):
    y = normal(4, 64)
    assert torch.equal(round_trip(codec, y * 1e-30), torch.zeros(4, 64))
    assert not round_trip(codec, y * 1e30).isfinite().any(-1).all()


@LOSSY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_vector_is_encoded_as_its_float32_value(codec, dtype):
    y = normal(20, 96, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(coding.encode(codec, y), coding.encode(codec, y.float())))


@EVERY_CODEC
@settings(max_examples=25, deadline=None, derandomize=True)
@given(leading=st.lists(st.integers(0, 4), max_size=3), head_dim=st.integers(2, 160), seed=st.integers(0, 9))
def test_any_shape_is_encoded_token_by_token(codec, leading, head_dim, seed):
    y = normal(*leading, head_dim, seed=seed)
    decoded = round_trip(codec, y)
    assert decoded.shape == y.shape
    alone = [round_trip(codec, token) for token in y.reshape(-1, head_dim)]
    if alone:
        assert torch.allclose(decoded.reshape(-1, head_dim), torch.stack(alone), rtol=1e-3, atol=1e-6)


@EVERY_CODEC
def test_strides_do_not_matter_to_encode_or_decode(codec):
    y = normal(2, 7, 3, 80).transpose(1, 2)[..., ::2]
    planes, straight = coding.encode(codec, y), coding.encode(codec, y.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(planes, straight))
    strided = [plane.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 1:5] for plane in straight]
    assert torch.equal(coding.decode(codec, strided, 40), coding.decode(codec, straight, 40)[:, :, 1:5])


@EVERY_CODEC
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_program_changes_no_code_and_no_number(codec, default):
    y = normal(50, 64)
    planes, numbers = coding.encode(codec, y), round_trip(codec, y)
    torch.set_default_dtype(default)
    try:
        again, same = coding.encode(codec, y), round_trip(codec, y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(planes, again))
    assert same.dtype == torch.float32
    assert torch.equal(numbers, same)


@EVERY_CODEC
def test_rotating_there_and_back_leaves_a_vector_in_its_dtype(codec):
    x = normal(5, 80, dtype=torch.bfloat16)
    basis = tables.basis_matrix(codec, 80)
    back = reference.rotate_back(reference.rotate(x, basis), basis, x.dtype)
    assert back.dtype == x.dtype
    assert torch.allclose(back.float(), x.float(), rtol=1e-2, atol=1e-3)


# --- append


def empty(codec, leading, head_dim):
    return layout_of(codec, head_dim, torch.float32, "cpu").allocate(leading, "cpu")


@EVERY_CODEC
def test_append_writes_the_given_positions_and_no_others(codec):
    planes = empty(codec, (2, 3, 9), 48)
    y = normal(2, 3, 4, 48)
    reference.append(codec, planes, y, torch.tensor([7, 0, 8, 3]))
    decoded = coding.decode(codec, planes, 48)
    assert torch.equal(decoded[:, :, [7, 0, 8, 3]], round_trip(codec, y))
    assert torch.equal(decoded[:, :, [1, 2, 4, 5, 6]], torch.zeros(2, 3, 5, 48))


@EVERY_CODEC
def test_append_replaces_what_a_position_held(codec):
    planes = empty(codec, (1, 1, 4), 48)
    for seed in (1, 2):
        reference.append(codec, planes, normal(1, 1, 1, 48, seed=seed), torch.tensor([2]))
    assert torch.equal(coding.decode(codec, planes, 48)[:, :, 2:3], round_trip(codec, normal(1, 1, 1, 48, seed=2)))


@EVERY_CODEC
def test_append_of_no_tokens_changes_nothing(codec):
    planes = empty(codec, (1, 2, 3), 48)
    reference.append(codec, planes, normal(1, 2, 0, 48), torch.empty(0, dtype=torch.int64))
    assert torch.equal(coding.decode(codec, planes, 48).float(), torch.zeros(1, 2, 3, 48))


@EVERY_CODEC
def test_append_without_positions_fills_and_equals_token_by_token(codec):
    y = normal(2, 2, 6, 48)
    at_once, in_turn = empty(codec, (2, 2, 6), 48), empty(codec, (2, 2, 6), 48)
    reference.append(codec, at_once, y, None)
    for token in range(6):
        reference.append(codec, in_turn, y[:, :, token : token + 1], torch.tensor([token]))
    assert torch.allclose(coding.decode(codec, at_once, 48), coding.decode(codec, in_turn, 48), rtol=1e-3)


@EVERY_CODEC
@pytest.mark.parametrize("position", [5, -1, 2**40])
def test_append_outside_the_planes_raises(codec, position):
    planes = empty(codec, (1, 1, 5), 48)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        reference.append(codec, planes, normal(1, 1, 1, 48), torch.tensor([position]))


@EVERY_CODEC
def test_append_writes_through_a_view_into_a_longer_buffer(codec):
    buffer = empty(codec, (1, 2, 10), 48)
    y = normal(1, 2, 3, 48)
    reference.append(codec, [plane.narrow(2, 4, 3) for plane in buffer], y, None)
    assert torch.equal(coding.decode(codec, buffer, 48)[:, :, 4:7], round_trip(codec, y))
