"""The kernel on int8 units without a device: its own text, emulated, against the reference."""

import pytest
import torch
from cases import close, compressed
from triton.experimental.gluon import language as gl

from tqcompile import formats, reference
from tqcompile.coding import split
from tqcompile.kernels import attend, integer, placement, sides, stretch, tune, tuned

pytestmark = pytest.mark.usefixtures("emulated")
NAMES = ["q8_0", *(f"turboquant:{bits}" for bits in (2, 3, 4, 5))]
PAIRS = [(name, name) for name in NAMES] + [("q8_0", "turboquant:3"), ("turboquant:5", "q8_0")]


def attends_like_the_reference(q, keys, values, mask, causal, names, dims):
    arguments = (q, keys, values, mask, causal, dims[0] ** -0.5, *map(formats.codec, names), dims)
    close(attend.attend(*arguments), reference.attend(*arguments), q.dtype)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("names", PAIRS, ids=str)
@pytest.mark.parametrize(("dims", "rows"), [((64, 64), 4), ((96, 128), 8), ((256, 32), 3), ((192, 96), 2)], ids=str)
@pytest.mark.parametrize("length", [77, 144])
def test_a_ragged_cache_attends_like_the_reference(names, dims, rows, length):
    torch.manual_seed(0)
    q = torch.randn(1, 2 * rows, 1, dims[0])
    planes = [compressed(formats.codec(name), torch.randn(1, 2, length, dim)) for name, dim in zip(names, dims)]
    attends_like_the_reference(q, *planes, None, False, names, dims)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("names", [("q4_0", "q4_0"), ("q4_0", "q8_0"), ("turboquant:3", "q4_0")], ids=str)
@pytest.mark.parametrize(("dims", "rows"), [((64, 64), 4), ((128, 128), 3), ((192, 256), 8), ((256, 192), 2)], ids=str)
@pytest.mark.parametrize("length", [13, 160])
def test_nibbles_in_blocks_attend_like_the_reference(names, dims, rows, length):
    """Of whole blocks of bytes: what has none is not taken."""
    torch.manual_seed(6)
    planes = [compressed(formats.codec(name), torch.randn(2, 1, length, dim)) for name, dim in zip(names, dims)]
    attends_like_the_reference(torch.randn(2, rows, 1, dims[0]), *planes, None, False, names, dims)
    assert all(integer.sides_of((formats.codec("q4_0"),) * 2, (dim, 64)) is None for dim in (32, 96))


# Codes of one bit, and of terms that share dims out, or add up; the last are of a side that is wider than the other.
IN_PIECES = [(name, name) for name in ("turboquant:1", "turboquant:2.5", "turboquant_prod:2", "turboquant_prod:5")]
IN_PIECES += [("kvtc:3", "kvtc:4"), ("qjl:2", "turboquant:3.5"), ("turboquant:3.5", "q8_0"), ("kvtc:2", "turboquant:5")]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("names", IN_PIECES, ids=str)
@pytest.mark.parametrize("rows", [4, 7])
@pytest.mark.parametrize("length", [1, 77, 144])
def test_codes_in_pieces_attend_like_the_reference(names, rows, length):
    torch.manual_seed(10)
    codecs, q = list(map(formats.codec, names)), torch.randn(1, 2 * rows, 1, formats.codec(names[0]).coordinates(128))
    planes = [compressed(codec, torch.randn(1, 2, length, codec.coordinates(128))) for codec in codecs]
    attends_like_the_reference(q, *planes, None, False, names, (128, 128))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["turboquant:3.5", "turboquant_prod:3"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_piece_that_is_no_number_reaches_what_the_reference_lets_it_reach(name, side, place, wrong):
    torch.manual_seed(11)
    codec = formats.codec(name)
    planes = [list(compressed(codec, torch.randn(1, 1, 48, codec.coordinates(128)))) for _ in range(2)]
    split(codec, planes[side])[1][0, 0, 40, place] = wrong
    q, keep = torch.randn(1, 4, 1, codec.coordinates(128)), torch.arange(48).view(1, 1, 1, 48) != 40
    for mask in (None, keep):
        attends_like_the_reference(q, *planes, mask, False, (name, name), (128, 128))


def reads_as_if(gathers, monkeypatch):
    """Read stretches by either way, of which each release of Triton has one."""
    monkeypatch.setattr(stretch, "GATHERS", gl.constexpr(gathers))
    monkeypatch.setattr(integer, "source", integer.source.__wrapped__)
    for module in (integer, placement):
        monkeypatch.setattr(module, "in_sectors", sides.in_sectors.__wrapped__)
    monkeypatch.setattr(sides, "in_stretches", sides.in_stretches.__wrapped__)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize(
    ("names", "dims"),
    [((3, 5), (128, 64)), ((5, 3), (32, 32)), ((3, 3), (256, 128)), ((3, 3), (96, 96)), ((4, 2), (96, 192))]
    + [((2, 4), (80, 160)), ((3, 3), (192, 192)), ((4, 2), (192, 96))],
    ids=str,
)
@pytest.mark.parametrize("length", [16, 208])
def test_rows_of_two_runs_or_pieces_are_read_where_they_lie_in_a_stretch(gathers, names, dims, length, monkeypatch):
    """By either way of reading them, of which each release of Triton has one."""
    torch.manual_seed(8)
    reads_as_if(gathers, monkeypatch)
    names = [f"turboquant:{bits}" for bits in names]
    planes = [compressed(formats.codec(name), torch.randn(2, 2, length, dim)) for name, dim in zip(names, dims)]
    codes, scales = zip(*(split(formats.codec(name), plane) for name, plane in zip(names, planes)))
    pair = integer.sides_of(tuple(map(formats.codec, names)), dims)
    assert placement.in_ring(pair, codes, scales, torch.device("cpu"))
    attends_like_the_reference(torch.randn(2, 8, 1, dims[0]), *planes, None, False, names, dims)


def test_top_bits_of_a_later_piece_are_read_at_several_turns(monkeypatch):
    """Rows with so many reads are not copied as it is."""
    torch.manual_seed(13)
    reads_as_if(True, monkeypatch)
    monkeypatch.setattr(sides, "MOST_READS", 5)
    codec = formats.codec("turboquant:5")
    planes = [compressed(codec, torch.randn(1, 1, 80, 96)) for _ in range(2)]
    codes, scales = zip(*(split(codec, plane) for plane in planes))
    assert placement.in_ring(integer.sides_of((codec, codec), (96, 96)), codes, scales, torch.device("cpu"))
    attends_like_the_reference(torch.randn(1, 4, 1, 96), *planes, None, False, (codec.name, codec.name), (96, 96))


@pytest.mark.parametrize("name", ["turboquant:2", "turboquant:4", "turboquant_prod:4"])
@pytest.mark.parametrize("large", range(0, 96, 8))
def test_the_largest_number_of_a_query_may_lie_in_any_piece(name, large):
    torch.manual_seed(14)
    codec = formats.codec(name)
    q = torch.randn(1, 4, 1, codec.coordinates(96))
    q[..., large : large + 8] *= 5
    planes = [compressed(codec, torch.randn(1, 1, 40, codec.coordinates(96))) for _ in range(2)]
    attends_like_the_reference(q, *planes, None, False, (name, name), (96, 96))


GATHERED = [("turboquant:3.5", 128), ("kvtc:3", 128), ("turboquant_prod:4", 128)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize(
    ("name", "dim"),
    [*GATHERED, ("turboquant_prod:4", 96)]
    + [(f"turboquant_prod:{bits}", dim) for bits in (2, 3, 5) for dim in (64, 128)],
)
def test_pieces_are_read_where_they_lie_in_a_stretch(gathers, name, dim, monkeypatch):
    """Rows of some lengths by one of the ways alone."""
    torch.manual_seed(12)
    reads_as_if(gathers, monkeypatch)
    codec = formats.codec(name)
    planes = [compressed(codec, torch.randn(2, 2, 208, codec.coordinates(dim))) for _ in range(2)]
    codes, scales = zip(*(split(codec, plane) for plane in planes))
    ring = placement.in_ring(integer.sides_of((codec, codec), (dim, dim)), codes, scales, torch.device("cpu"))
    # Triton 3.6 looks at rows whose gaps are powers of two.
    assert ring == (gathers or (name, dim) not in GATHERED)
    attends_like_the_reference(
        torch.randn(2, 8, 1, codec.coordinates(dim)), *planes, None, False, (name, name), (dim, dim)
    )


@pytest.mark.parametrize("name", ["turboquant:2", "turboquant:4"])
@pytest.mark.parametrize("length", [1, 31, 77, 130])
def test_tokens_are_read_wherever_they_lie(name, length):
    """Of any number, and of caches that grow, whose tokens hold all sequences and heads."""
    torch.manual_seed(3)
    planes = [compressed(formats.codec(name), torch.randn(length, 2, 2, 128)) for _ in range(2)]
    growing = [[plane.permute(1, 2, 0, 3) for plane in each] for each in planes]
    for keys, values in (growing, [[plane.contiguous() for plane in each] for each in growing]):
        attends_like_the_reference(torch.randn(2, 6, 1, 128), keys, values, None, False, (name, name), (128, 128))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "causal"])
@pytest.mark.parametrize("names", [(4, 4), (3, 5), (2, 3)], ids=str)
@pytest.mark.parametrize(("length", "splits"), [(17, 1), (77, 2), (191, 3), (194, 3), (130, 2), (255, 4)], ids=str)
def test_heads_begin_anywhere_in_a_row_of_tokens(names, kind, length, splits, monkeypatch):
    """And what is no number in the head before reaches none of this one."""
    torch.manual_seed(9)
    tokens = 32 * -(-length // (32 * splits))
    plan = tune.AttendPlan(4, 32, -(-length // tokens), tokens, 1, 255)
    monkeypatch.setattr(integer, "plan_of", lambda *a: plan)
    codecs = [formats.codec(f"turboquant:{bits}") for bits in names]
    dense = [torch.randn(2, 4, length, 64) for _ in names]
    for x in dense:
        x[0, 1, -15:] = float("nan")
    planes = [compressed(codec, x) for codec, x in zip(codecs, dense)]
    codes, scales = zip(*(split(codec, plane) for codec, plane in zip(codecs, planes)))
    assert placement.in_one_row(integer.sides_of(tuple(codecs), (64, 64)), codes, scales)
    q, keep = torch.randn(2, 8, 2, 64), torch.rand(2, 1, 2, length) < 0.8
    mask = {"bool": keep, "additive": torch.where(keep, 0.0, -1e4)}.get(kind)
    names = [codec.name for codec in codecs]
    attends_like_the_reference(q, *planes, mask, kind == "causal", names, (64, 64))


@pytest.mark.parametrize(("bits", "dim"), [(3, 32), (4, 64), (3, 64), (3, 96)])
@pytest.mark.parametrize("sizes", [(1, 3, 17), (1, 1, 77), (3, 1, 45), (2, 3, 17), (2, 2, 77)], ids=str)
def test_nothing_is_read_behind_the_last_token(bits, dim, sizes):
    """The emulator refuses what is: the rest of a copy's words."""
    torch.manual_seed(5)
    name = f"turboquant:{bits}"
    planes = [compressed(formats.codec(name), torch.randn(*sizes, dim)) for _ in range(2)]
    q = torch.randn(sizes[0], 2 * sizes[1], 1, dim)
    attends_like_the_reference(q, *planes, None, False, (name, name), (dim, dim))


@pytest.mark.parametrize("tile", sorted({(s.block_rows, s.block_tokens) for s in tune.SETTINGS["attend"]}))
@pytest.mark.parametrize(
    ("name", "dim", "length"),
    [("turboquant:5", 96, 230), ("turboquant:2", 96, 240), ("turboquant:3", 64, 240), ("q8_0", 64, 230)],
)
def test_any_setting_of_a_search_attends_like_the_reference(name, dim, length, tile, monkeypatch):
    torch.manual_seed(4)
    rows, tokens = tile
    plan = tune.AttendPlan(rows, tokens, -(-length // (3 * tokens)), 3 * tokens, 1, 255)
    monkeypatch.setattr(integer, "plan_of", lambda *a: plan)
    planes = [compressed(formats.codec(name), torch.randn(1, 1, length, dim)) for _ in range(2)]
    attends_like_the_reference(torch.randn(1, 6, 1, dim), *planes, None, False, (name, name), (dim, dim))


@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_masks_and_strides(kind):
    torch.manual_seed(1)
    codec = formats.codec("q8_0")
    keys, values = (compressed(codec, torch.randn(2, 2, 150, 64), growing=True) for _ in range(2))
    keys, values = ([plane[:, :, 3:] for plane in planes] for planes in (keys, values))
    q = torch.randn(2, 5, 6, 64).transpose(1, 2)
    keep = torch.rand(2, 1, 5, 147) < 0.8
    mask = {"bool": keep, "additive": torch.where(keep, 0.0, -1e4), "causal": None}[kind]
    attends_like_the_reference(q, keys, values, mask, kind == "causal", ("q8_0", "q8_0"), (64, 64))


@pytest.mark.parametrize("name", ["turboquant:4", "q8_0"])
def test_a_cap_and_sinks(name):
    torch.manual_seed(7)
    codec = formats.codec(name)
    keys, values = (compressed(codec, torch.randn(1, 2, 77, 64)) for _ in range(2))
    q, sinks = torch.randn(1, 4, 2, 64), torch.randn(1, 4, 2, 1) * 4
    arguments = (q, keys, values, None, True, 1.5, codec, codec, (64, 64))
    options = {"score_mod": "tanh(score / 3.0) * 3.0", "sinks": sinks}
    close(attend.attend(*arguments, **options), reference.attend(*arguments, **options), q.dtype)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e7])
@pytest.mark.parametrize(("name", "dim"), [("q8_0", 96), ("q4_0", 64)])
@pytest.mark.parametrize("length", [40, 64])
def test_a_block_that_is_no_number_reaches_what_the_reference_lets_it_reach(side, wrong, name, dim, length):
    """Nor is one whose scale is too large for half precision, whose codes may be any."""
    torch.manual_seed(2)
    tokens = [torch.randn(1, 1, length, dim) for _ in range(2)]
    tokens[side][0, 0, length - 1, 40] = wrong
    planes = [compressed(formats.codec(name), x) for x in tokens]
    attends_like_the_reference(torch.randn(1, 4, 1, dim), *planes, None, False, (name, name), (dim, dim))


@pytest.mark.parametrize(
    ("name", "dim"), [("turboquant:4", 128), ("turboquant:3", 128), ("q4_0", 128), ("turboquant:2", 128)]
)
def test_tiles_are_small_where_a_program_has_few_tokens(name, dim, monkeypatch):
    sides, length = integer.sides_of((formats.codec(name),) * 2, (dim, dim)), 208
    device, planes = torch.device("cpu"), [compressed(formats.codec(name), torch.randn(1, 1, length, dim))] * 2
    q = torch.randn(1, 4, 1, dim)
    for span, tokens in ((256, 64), (0, 128)) if name == "turboquant:2" else ((256, 32), (0, 64)):
        monkeypatch.setattr(tune, "SHORT_SPAN", span)
        tuned.forget()
        assert integer.plan_of((sides, True), 4, 1, length, device).block_tokens == tokens
        attends_like_the_reference(q, *planes, None, False, (name, name), (dim, dim))
    tuned.forget()


def test_sizes_that_differ_from_block_to_block_cost_no_digits():
    """Each block of the output is as good by itself, whatever the sizes of its neighbours."""
    torch.manual_seed(3)
    sizes = torch.tensor([1e-3, 100.0, 1.0, 1e-2]).repeat_interleave(32)
    codec = formats.codec("q8_0")
    keys, values = (compressed(codec, torch.randn(1, 1, 90, 128) * size) for size in (sizes.flip(0), sizes))
    q = torch.randn(1, 4, 1, 128) / sizes.flip(0)
    arguments = (q, keys, values, None, False, 128**-0.5, codec, codec, (128, 128))
    out, expected = attend.attend(*arguments), reference.attend(*arguments)
    for block in range(4):
        close(out[..., 32 * block : 32 * block + 32], expected[..., 32 * block : 32 * block + 32], q.dtype)
