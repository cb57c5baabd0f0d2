"""Lanes share the words of a row out: every coordinate is somebody's, and padding is what it has to be."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tqcompile import formats
from tqcompile.kernels import sides
from tqcompile.kernels.address import power_of_two

NAMES = [name for name, codec in formats.REGISTRY.items() if isinstance(sides.side_of(codec, 128, 8), sides.Side)]


def pieces_of(name, head_dim, lanes=8):
    side = sides.side_of(formats.codec(name), head_dim, lanes)
    return side.pieces if isinstance(side, sides.Side) else ()


@given(name=st.sampled_from(NAMES), head_dim=st.integers(1, 64).map(lambda count: 4 * count))
def test_sums_hold_every_coordinate_once(name, head_dim):
    assume(pieces_of(name, head_dim))
    side = sides.side_of(formats.codec(name), head_dim, 8)
    real = [coordinate for coordinate in side.order if coordinate != sides.PADDING]
    assert sorted(real) == list(range(side.head_dim)) and len(side.order) == side.width
    assert side.head_dim == formats.codec(name).coordinates(head_dim)


@given(
    name=st.sampled_from(NAMES), head_dim=st.integers(1, 64).map(lambda count: 4 * count), lanes=st.sampled_from([4, 8])
)
def test_pieces_follow_each_other_in_powers_of_two_of_32_numbers(name, head_dim, lanes):
    pieces = pieces_of(name, head_dim, lanes)
    assume(pieces)
    for piece, before in zip(pieces, (None, *pieces)):
        is_next = before is not None and before.packed == piece.packed
        assert piece.first == (before.first + before.room if is_next else 0)
        assert piece.room == power_of_two(piece.room) and piece.width % 32 == 0
        assert piece.lanes * piece.words * piece.nibbles * piece.fields == piece.width
    for term in {piece.packed for piece in pieces}:
        held = sum(term.rooms) * 8 * term.fields
        # No more than one power of two would hold, and all of the run.
        assert 4 * sum(term.rooms) >= term.run and held <= max(32, 8 * term.fields * power_of_two(-(-term.run // 4)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("head_dim", "widths"), [(32, [32]), (64, [64]), (96, [64, 32]), (192, [128, 64]), (224, [256])]
)
def test_heads_are_held_as_one_power_of_two_or_as_two(bits, head_dim, widths):
    """224 are three powers of two, which is one piece too many."""
    for lanes in (4, 8):
        assert [piece.width for piece in pieces_of(f"turboquant:{bits}", head_dim, lanes)] == widths


def test_heads_of_80_hold_a_sixth_of_padding():
    assert [piece.width for piece in pieces_of("turboquant:4", 80)] == [64, 32]
