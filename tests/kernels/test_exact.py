"""Tokens kept as they are, in the kernels: as the reference writes, hides and reads them."""

import pytest
import torch
from cases import TOLERANCE, distance, planes_of
from representatives import REPRESENTATIVES
from test_attend import mask_of

from tqcompile import formats, recent, reference, tables
from tqcompile.kernels import attend, decoded, exact, portable

SINKS, WINDOW, LENGTH = 3, 37, 150


@pytest.fixture
def device(attending_device):
    return attending_device


def kept(x, hole=None):
    """What is kept of caches [B, H, S, D], keys and values; `hole` is a token that keys have void."""
    sides = [recent.first_and_last(side, 2, SINKS, WINDOW) for side in x]
    index = sides[0][1]
    index[index == hole] = -1
    return [tensor for side in sides for tensor in side]


def case(device, dtype, codecs, queries=2, length=LENGTH, groups=3):
    q = torch.randn(2, 2 * groups, queries, 64).to(dtype)
    caches = [torch.randn(2, 2, length, 64).to(dtype) for _ in range(2)]
    planes = []
    for name, x in zip(codecs, caches):
        basis = tables.basis_matrix(formats.codec(name), 64)
        planes.append(planes_of(formats.codec(name), x.shape, dtype, device))
        places = torch.arange(length, device=device)
        reference.append(formats.codec(name), planes[-1], reference.rotate(x, basis).to(device), places)
    return q.to(device), planes, [x.to(device) for x in caches]


def both(q, planes, known, mask, causal, codecs, score_mod="", sinks=None, through=attend.attend):
    """Ours and the reference, [B, Hq, T, D] in the model's basis."""
    codecs = tuple(map(formats.codec, codecs))
    bases = [tables.basis_matrix(codec, 64, q.device) for codec in codecs]
    asked = reference.rotate(q, bases[0])
    how = mask, causal, 0.125, *codecs, (64, 64)
    beside = {"known": known, "asked": q, "first": SINKS, "score_mod": score_mod, "sinks": sinks, "basis": bases[1]}
    ours = through(asked, *planes, *how, **beside)
    found = recent.exact(known, q, 0, planes[0][0].shape[2])
    codes, theirs = reference.attend_beside(asked, *planes, *how, score_mod, sinks, found)
    codes = reference.rotate_back(codes, bases[1], torch.float32)
    return ours, codes if theirs is None else codes + theirs


def close(ours, expected, dtype):
    error = distance(ours, expected)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVES if formats.codec(name).for_values])
def test_every_codec_reads_exact_tokens_beside_its_codes(device, name):
    torch.manual_seed(1)
    q, planes, caches = case(device, torch.float32, (name, name))
    close(*both(q, planes, kept(caches), None, False, (name, name)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_of_half_precision(device, dtype):
    torch.manual_seed(2)
    q, planes, caches = case(device, dtype, ("turboquant:4", "q8_0"))
    close(*both(q, planes, kept(caches), None, False, ("turboquant:4", "q8_0")), dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float32", "bfloat16"])
def test_every_reader_hides_from_them_what_it_hides_from_codes(device, mask, causal):
    torch.manual_seed(3)
    codecs = ("turboquant:5", "turboquant:3")
    q, planes, caches = case(device, torch.float32, codecs, queries=4)
    known = kept(caches, hole=120)
    close(*both(q, planes, known, mask_of(mask, (2, 1, 4, LENGTH), device), causal, codecs), torch.float32)


def test_a_cap_and_sinks_go_with_them(device):
    torch.manual_seed(4)
    codecs = ("turboquant:4", "turboquant:2")
    q, planes, caches = case(device, torch.float32, codecs)
    sinks = torch.randn(2, 6, 2, 1, device=device)
    close(*both(q, planes, kept(caches), None, False, codecs, "tanh(score / 2) * 2", sinks), torch.float32)


@pytest.mark.parametrize("length", [1, 2, SINKS + WINDOW])
def test_a_cache_of_nothing_else(device, length):
    torch.manual_seed(5)
    codecs = ("turboquant:2", "turboquant:2")
    q, planes, caches = case(device, torch.float32, codecs, length=length)
    ours, _ = both(q, planes, kept(caches), None, False, codecs)
    k, v = caches
    close(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), torch.float32)


def test_a_mask_that_is_owned_is_written_itself_and_hides_the_same(device):
    torch.manual_seed(3)
    _, _, caches = case(device, torch.float32, ("q8_0", "q8_0"))
    known, mask = kept(caches, hole=120), torch.randn(2, 6, 2, LENGTH, device=device)
    expected = exact.hidden(mask, known, LENGTH, SINKS, None)
    assert expected.isinf().any() and exact.hidden(mask, known, LENGTH, SINKS, None, owned=True) is mask
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("mask", ["none", "bool", "float32"])
@pytest.mark.parametrize("name", ["turboquant:4", "q8_0"])
def test_many_rows_read_them_among_decoded_ones(device, name, mask):
    torch.manual_seed(6)
    q, planes, caches = case(device, torch.float32, (name, name), queries=9)
    mask = mask_of(mask, (2, 1, 9, LENGTH), device)

    def through(_, keys, values, mask, causal, scale, *others, known, **beside):
        codecs, dims = others[:2], others[2]
        look_ups = [portable.table_of(codec, 64, q.dtype, q.device) for codec in codecs]
        return decoded.attend(q, keys, values, mask, causal, scale, codecs, dims, look_ups, known=known)

    for known in (kept(caches), kept(caches, hole=0), [torch.full_like(t, -1) for t in kept(caches)]):
        close(*both(q, planes, known, mask, mask is None, (name, name), through=through), torch.float32)


@pytest.mark.parametrize("sinks, window", [(3, 5), (0, 8), (4, 0)])
@pytest.mark.parametrize("positioned", [True, False])
@pytest.mark.parametrize("dim", [1, 2])
def test_tokens_are_remembered_as_the_reference_does(device, dim, positioned, sinks, window):
    torch.manual_seed(7)
    like = torch.zeros(2, 30, 3, 24) if dim == 1 else torch.zeros(2, 3, 30, 24)
    ours, theirs = (recent.empty(like.to(device), recent.Regions(dim, sinks, window)) for _ in range(2))
    place = 0
    for count in (2, 1, 6, 11, 1, 3):
        sizes = list(like.shape)
        sizes[dim] = count
        tokens = torch.randn(sizes).to(device).transpose(1, 2).contiguous().transpose(1, 2)
        start = 0 if positioned else place
        positions = torch.arange(place, place + count, device=device) if positioned else None
        exact.remember(*ours.tensors, tokens, positions, start, dim, sinks)
        recent.remember(*theirs.tensors, tokens, positions, start, dim, sinks)
        # The last slot is for what is not kept.
        assert torch.equal(ours.index[:-1], theirs.index[:-1])
        for mine, yours in zip(ours.numbers.unbind(dim)[:-1], theirs.numbers.unbind(dim)[:-1]):
            assert torch.equal(mine, yours)
        place = 5 if count == 11 else place + count
