"""Where each bit lives: the stated addresses, and that packing does what they say."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import EVERY_CODEC, into

from tqcompile import coding
from tqcompile.codec import Codec, Lookup, Plane, Term
from tqcompile.formats import REGISTRY
from tqcompile.layout import COORDINATE, layout_of

COUNTS = (1, 2, 3, 5, 7, 8, 9, 31, 48, 80, 96, 100, 128, 255, 256)


def plane_layout(bits, count):
    """The layout of a plane of `bits`-bit codes for `count` coordinates, whatever format may use it."""
    codec = Codec("probe", (Term("standard", (Lookup(Plane("codes", bits), "signed"),), "absmax"),), False, "")
    return layout_of(codec, count, torch.float32, "cpu").plane("codes")


def addresses(layout):
    """(section, code, byte, lowest bit) as the sympy expressions state them."""
    for section in layout.sections:
        byte, bit = (sympy.lambdify(COORDINATE, expr, {"floor": math.floor}) for expr in (section.byte, section.bit))
        for code in range(layout.count):
            yield section, code, byte(code), bit(code)


def random_codes(bits, shape, seed=0):
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", COUNTS)
def test_stated_addresses_give_every_bit_of_every_code_a_place_of_its_own(bits, count):
    layout = plane_layout(bits, count)
    taken = set()
    for section, _, byte, bit in addresses(layout):
        assert 0 <= byte < layout.width
        assert 0 <= bit <= 8 - section.bits
        taken |= {(byte, place) for place in range(bit, bit + section.bits)}
    assert len(taken) == bits * count


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", COUNTS)
def test_pack_puts_each_bit_where_the_addresses_say(bits, count):
    layout = plane_layout(bits, count)
    codes = random_codes(bits, (count,))
    packed = layout.pack(codes).tolist()
    found = [0] * count
    for section, code, byte, bit in addresses(layout):
        found[code] |= (packed[byte] >> bit & 2**section.bits - 1) << section.shift
    assert found == codes.tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(1, 8),
    count=st.integers(1, 300),
    leading=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 99),
)
def test_unpack_inverts_pack(bits, count, leading, seed):
    layout = plane_layout(bits, count)
    codes = random_codes(bits, (*leading, count), seed)
    packed = layout.pack(codes)
    assert packed.shape == (*leading, layout.width)
    assert packed.dtype == layout.dtype == torch.uint8
    assert torch.equal(layout.unpack(packed), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_two_pairs_of_codes_share_their_packed_bytes(bits):
    layout = plane_layout(bits, 2)
    pairs = torch.cartesian_prod(torch.arange(2**bits), torch.arange(2**bits))
    assert len(layout.pack(pairs).unique(dim=0)) == 4**bits


def test_pack_takes_negative_codes_as_two_s_complement_and_drops_no_sign():
    layout = plane_layout(8, 5)
    assert layout.unpack(layout.pack(torch.tensor([-128, -1, 0, 1, 127]))).tolist() == [128, 255, 0, 1, 127]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 80, 128])
def test_pieces_cover_the_coordinates_once_and_in_order(bits, count):
    layout = plane_layout(bits, count)
    codes = random_codes(bits, (4, count))
    at = 0
    for coordinates, piece in layout.pieces(layout.pack(codes)):
        assert coordinates.start == at
        assert torch.equal(piece, codes[:, coordinates])
        at = coordinates.stop
    assert at == count


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_wastes_less_than_a_byte_a_section(bits):
    for count in COUNTS:
        layout = plane_layout(bits, count)
        assert bits * count <= 8 * layout.bytes_per_token < bits * count + 8 * len(layout.sections)


def test_planes_of_numbers_are_not_packed():
    codec = next(codec for codec in REGISTRY.values() if codec.is_plain and codec.scale is not None)
    layout = layout_of(codec, 64, torch.float32, "cpu").plane(codec.scale.plane.name)
    with pytest.raises(AssertionError, match="stores numbers, not codes"):
        layout.pack(torch.zeros(1, dtype=torch.int32))


@EVERY_CODEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_allocated_planes_have_the_bytes_the_layout_states_and_decode_to_zeros(codec, dtype):
    layout = layout_of(codec, 80, dtype, "cpu")
    planes = layout.allocate((2, 3, 5), "cpu")
    assert sum(plane.nbytes for plane in planes) == 2 * 3 * 5 * layout.bytes_per_token
    assert torch.equal(coding.decode(codec, planes, 80).float(), torch.zeros(2, 3, 5, codec.coordinates(80)))


@EVERY_CODEC
@pytest.mark.parametrize("head_dim", [8, 33, 64, 80, 128])
def test_planes_of_a_store_lie_side_by_side_and_leave_nothing_free(codec, head_dim):
    layout = layout_of(codec, max(head_dim, codec.minimum_head_dim), torch.float32, "cpu")
    for store in layout.stores:
        planes = [layout.plane(factor.plane.name) for factor in codec.factors if factor.store == store.name]
        taken = sorted((plane.offset, plane.offset + plane.width) for plane in planes)
        assert [start for start, _ in taken] == [0, *(stop for _, stop in taken[:-1])]
        assert taken[-1][1] == store.width
        assert {plane.dtype for plane in planes} == {store.dtype}
        for plane in planes:
            sections = [(section.offset, section.offset + section.run) for section in plane.sections]
            edges = [plane.offset, *(stop for _, stop in sections)]
            assert [start for start, _ in sections] == edges[:-1] and (
                not sections or edges[-1] == plane.offset + plane.width
            )


@EVERY_CODEC
def test_each_plane_of_a_store_is_unpacked_from_its_own_bytes(codec):
    layout = layout_of(codec, 80, torch.float32, "cpu")
    planes = [plane for plane in layout.planes if plane.sections]
    codes = [random_codes(plane.plane.bits, (7, plane.count), seed) for seed, plane in enumerate(planes)]
    if planes:
        store = torch.cat([plane.pack(code) for plane, code in zip(planes, codes)], -1)
        assert all(torch.equal(plane.unpack(store), code) for plane, code in zip(planes, codes))


@EVERY_CODEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_encoder_fills_the_planes_that_the_layout_allocates(codec, dtype):
    for head_dim in (codec.minimum_head_dim, 33, 48, 80, 256):
        planes = layout_of(codec, head_dim, dtype, "cpu").allocate((4,), "cpu")
        encoded = coding.encode(codec, into(codec, torch.ones(4, head_dim)).to(dtype))
        assert [(p.shape, p.dtype) for p in encoded] == [(p.shape, p.dtype) for p in planes]


@EVERY_CODEC
def test_a_layout_refuses_what_it_cannot_hold(codec):
    with pytest.raises(ValueError, match=r"float64.*float32, float16 or bfloat16"):
        layout_of(codec, 64, torch.float64, "cpu")
    with pytest.raises(ValueError, match="at least"):
        layout_of(codec, codec.minimum_head_dim - 1, torch.float32, "cpu")
