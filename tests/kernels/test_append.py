import math

import pytest
import torch
from cases import close, planes_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tqcompile import coding, formats, reference, tables
from tqcompile.kernels import append, attend, writers
from tqcompile.layout import layout_of

# Each plain way to fit has a kernel; the bits of a rotated codebook are printed into it.
CODECS = [name for name, codec in formats.REGISTRY.items() if writers.writes(codec, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TIE = 1e-5


def dims_of(codec, head_dim):
    """`head_dim`, or 64 where it is too small, or bytes of narrow codes would cross blocks, which no kernel writes."""
    return head_dim if writers.writes(codec, head_dim) else 64


def both(codec, y, length, positions, growing=False):
    """The planes that the kernel writes, and those that the reference writes, from zeros."""
    shape = (y.shape[0], y.shape[1], length, y.shape[3])
    planes = [planes_of(codec, shape, y.dtype, y.device, growing) for _ in range(2)]
    append.append(codec, planes[0], y, positions)
    reference.append(codec, planes[1], y, positions)
    return planes


def near_a_tie(codec, y):
    """Which numbers of y [A, B, T, D] lie within TIE of a place where their code changes."""
    y = y.float()
    if codec.terms[0].codes.table == "codebook":
        bands = codec.bands(codec.head_dim(y.shape[-1]))
        return torch.cat([near_an_edge(term, y[..., band]) for term, band in zip(codec.terms, bands)], -1)
    scale = coding.split(codec, coding.encode(codec, y))[1].float()
    ratio = y / scale.repeat_interleave(codec.scale.plane.per, -1)[..., : y.shape[-1]]
    return ((ratio - ratio.floor() - 0.5).abs() < TIE * ratio.abs().clamp_min(1)) | ~ratio.isfinite()


def near_an_edge(term, y):
    edges = torch.tensor(tables.boundaries(tables.numbers(term.codes, y.shape[-1])), device=y.device)
    unit = y / y.norm(dim=-1, keepdim=True) * math.sqrt(y.shape[-1])
    return ((unit.unsqueeze(-1) - edges).abs() < TIE).any(-1)


def agree(codec, planes, y, positions):
    """Codes equal save at ties; scalars within one step of float16; a codec without codes equal bit for bit."""
    (mine, scale), (theirs, expected) = (coding.split(codec, side) for side in planes)
    if scale is None:
        assert torch.equal(mine.nan_to_num(1.5), theirs.nan_to_num(1.5))
        return
    layout = layout_of(codec, codec.head_dim(y.shape[-1]), torch.float32, y.device.type)
    each = [layout.plane(term.codes.plane.name) for term in codec.terms]
    differ = torch.cat([plane.unpack(mine) != plane.unpack(theirs) for plane in each], -1)
    rows = positions if positions is not None else torch.arange(y.shape[2], device=y.device)
    allowed = torch.zeros_like(differ).index_copy_(2, rows, near_a_tie(codec, y))
    assert not (differ & ~allowed).any()
    steps = (scale.contiguous().view(torch.int16).int() - expected.contiguous().view(torch.int16).int()).abs()
    assert (steps[expected.isfinite()] <= 1 + differ.any()).all()
    assert torch.equal(scale.isnan(), expected.isnan()) and torch.equal(scale.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_every_codec_is_written_as_the_reference_writes_it(device, name, dtype):
    torch.manual_seed(1)
    codec, y = formats.codec(name), torch.randn(2, 2, 5, 64).to(dtype).to(device)
    positions = torch.tensor([7, 0, 3, 8, 2], device=device)
    agree(codec, both(codec, y, 9, positions), y, positions)
    agree(codec, both(codec, y, 5, None), y, None)


@pytest.mark.parametrize("head_dim", [31, 80, 96, 112, 124, 127])
@pytest.mark.parametrize("name", [f"turboquant:{bits}" for bits in (2, 3, 4, 5)])
def test_bytes_are_those_of_the_reference_where_codes_fill_a_part_of_them(device, name, head_dim):
    torch.manual_seed(3)
    codec, y = formats.codec(name), torch.randn(1, 2, 3, head_dim, device=device)
    (mine, _), (theirs, _) = (coding.split(codec, side) for side in both(codec, y, 3, None))
    assert torch.equal(mine, theirs)


@settings(max_examples=20)
@given(data=st.data())
def test_any_shape_is_written_as_the_reference_writes_it(device, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    codec = formats.codec(draw(st.sampled_from(CODECS)))
    head_dim = draw(st.sampled_from([2, 3, 16, 31, 33, 48, 64, 80, 96, 112, 128, 256]))
    tokens, length = draw(st.sampled_from([(1, 1), (1, 40), (3, 40), (17, 17), (33, 40)]))
    y = torch.randn(draw(st.integers(1, 2)), draw(st.integers(1, 3)), tokens, dims_of(codec, head_dim))
    y = (y * 10.0 ** draw(st.integers(-4, 4))).to(draw(st.sampled_from(DTYPES))).to(device)
    if draw(st.booleans()):
        y = y.transpose(1, 2).contiguous().transpose(1, 2)
    positions = None if tokens == length else torch.randperm(length)[:tokens].to(device)
    agree(codec, both(codec, y, length, positions, draw(st.booleans())), y, positions)


@pytest.mark.parametrize("name", CODECS)
def test_zeros_huge_numbers_and_broken_tokens_are_written_as_the_reference_does(device, name):
    torch.manual_seed(2)
    codec = formats.codec(name)
    y = torch.randn(1, 1, 8, dims_of(codec, 48), device=device)
    y[:, :, 0] = 0
    y[:, :, 1] = 1e30
    y[:, :, 2, 5] = math.nan
    y[:, :, 3, 5] = math.inf
    y[:, :, 4] *= 1e-30
    y[:, :, 5, :] = 0
    y[:, :, 5, 7] = -3.0
    agree(codec, both(codec, y, 8, None), y, None)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
def test_there_is_a_kernel_for_what_is_said_to_be_written_and_none_for_the_rest(head_dim):
    written = {name for name, codec in formats.REGISTRY.items() if writers.writes(codec, head_dim)}
    plain = {name for name, codec in formats.REGISTRY.items() if codec.is_plain}
    shared_out = {f"turboquant:{bits}{end}" for bits in ("2.5", "3.5") for end in ("", ":norm")}
    shared_out |= {f"kvtc:{bits}" for bits in (2, 3, 4)}
    assert written <= plain | shared_out
    # A byte of two nibbles would hold pieces of two blocks.
    assert (plain | shared_out) - written == (set() if head_dim in (64, 128, 256) else {"q4_0", "q4_0:hadamard"})
    for name in written:
        assert "tl.store" in writers.writer(formats.codec(name), head_dim)


def test_a_strided_last_dimension_is_read_in_place(device):
    torch.manual_seed(3)
    codec, y = formats.codec("turboquant:5"), torch.randn(2, 2, 64, 6, device=device).transpose(2, 3)
    agree(codec, both(codec, y, 6, None), y, None)


@pytest.mark.parametrize("name", CODECS)
def test_only_the_named_positions_change(device, name):
    torch.manual_seed(4)
    codec = formats.codec(name)
    y = torch.randn(1, 2, 2, dims_of(codec, 33), device=device)
    planes = planes_of(codec, (1, 2, 20, y.shape[-1]), torch.float32, device)
    for plane in planes:
        plane.copy_(torch.randint(1, 9, plane.shape))
    before = [plane.clone() for plane in planes]
    append.append(codec, planes, y, torch.tensor([4, 11], device=device))
    rest = [i for i in range(20) if i not in (4, 11)]
    assert all(torch.equal(plane[:, :, rest], old[:, :, rest]) for plane, old in zip(planes, before))


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_outside_the_planes_never_writes(device, position):
    codec, y = formats.codec("q8_0"), torch.ones(1, 1, 2, 64, device=device)
    planes = planes_of(codec, (1, 1, 11, 64), torch.float32, device)
    inner = tuple(plane[:, :, 1:10] for plane in planes)
    positions = torch.tensor([position, 4], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match="outside the 9 tokens"):
            append.append(codec, inner, y, positions)
    else:
        append.append(codec, inner, y, positions)
        assert all((plane[:, :, [0, 10]] == 0).all() and (plane[:, :, 5] != 0).all() for plane in planes)


def test_tokens_that_do_not_fill_the_planes_need_positions(device):
    codec, y = formats.codec("q8_0"), torch.ones(1, 1, 2, 64, device=device)
    with pytest.raises(ValueError, match="without positions"):
        append.append(codec, planes_of(codec, (1, 1, 3, 64), torch.float32, device), y, None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CODECS)
def test_a_cuda_graph_of_append_and_attend_replays_on_new_contents(name):
    torch.manual_seed(5)
    codec, generator = formats.codec(name), torch.Generator("cuda").manual_seed(5)
    planes = [planes_of(codec, (2, 2, 200, 64), torch.bfloat16, "cuda") for _ in range(4)]
    k, v, q = (torch.zeros(2, heads, 1, 64, dtype=torch.bfloat16, device="cuda") for heads in (2, 2, 8))
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    mask = torch.zeros(1, 1, 1, 200, dtype=torch.bool, device="cuda")

    def step(write, read, keys, values):
        write(codec, keys, k, position)
        write(codec, values, v, position)
        return read(q, keys, values, mask, False, 0.125, codec, codec, (64, 64))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(append.append, attend.attend, planes[0], planes[1])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(append.append, attend.attend, planes[0], planes[1])
    for token in (3, 150, 0):
        for tensor in (k, v, q):
            tensor.normal_(generator=generator)
        position.fill_(token)
        mask[..., token] = True
        graph.replay()
        close(out, step(reference.append, reference.attend, planes[2], planes[3]), torch.bfloat16)
