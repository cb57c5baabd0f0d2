import math
import re

import pytest
import torch
from cases import close, compressed, numbers_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reaching import SPANS, hidden_case
from representatives import REPRESENTATIVES

from tqcompile import formats, reference, tables
from tqcompile.kernels import attend, tune

CODECS = REPRESENTATIVES
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def device(attending_device):
    return attending_device


def both(q, keys, values, mask, causal, codecs, head_dims):
    arguments = (q, keys, values, mask, causal, head_dims[0] ** -0.5, *map(formats.codec, codecs), head_dims)
    return attend.attend(*arguments), reference.attend(*arguments)


def random_case(
    device, dtype, codecs, batch=2, heads=2, groups=3, queries=2, length=70, head_dims=(64, 64), growing=False
):
    keys, values = map(formats.codec, codecs)
    q = numbers_of(keys, batch, heads * groups, queries, head_dims[0]).to(dtype)
    caches = [numbers_of(c, batch, heads, length, dim).to(dtype) for c, dim in zip((keys, values), head_dims)]
    planes = [compressed(c, x.to(device), growing) for c, x in zip((keys, values), caches)]
    return q.to(device), *planes


def mask_of(kind, shape, device):
    if kind == "none":
        return None
    keep = torch.rand(shape) < 0.7
    if kind == "bool":
        return keep.to(device)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    return torch.where(keep, torch.randn(shape), torch.finfo(dtype).min).to(dtype).to(device)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_every_codec_attends_like_the_reference(device, name, dtype):
    torch.manual_seed(1)
    case = random_case(device, dtype, (name, name))
    close(*both(*case, None, False, (name, name), (64, 64)), dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float32", "bfloat16"])
def test_every_reader_sees_what_the_reference_sees(device, mask, causal):
    torch.manual_seed(2)
    codecs = ("turboquant:5", "turboquant:3")
    case = random_case(device, torch.float32, codecs, queries=4)
    close(*both(*case, mask_of(mask, (2, 6, 4, 70), device), causal, codecs, (64, 64)), torch.float32)


@pytest.mark.parametrize("mask", ["none", "bool", "float32"])
@pytest.mark.parametrize("codecs", [("turboquant:4", "turboquant:4"), ("turboquant:8", "identity")], ids="/".join)
def test_a_cap_and_sinks_are_those_of_the_reference(device, codecs, mask):
    torch.manual_seed(12)
    q, keys, values = random_case(device, torch.float32, codecs, queries=4)
    sinks = torch.randn(2, 6, 4, 1, device=device) * 4
    how = (mask_of(mask, (2, 6, 4, 70), device), mask == "none", 1.5, *map(formats.codec, codecs), (64, 64))
    for options in ({"sinks": sinks}, {"score_mod": "tanh(score / 3.0) * 3.0"}, {"sinks": sinks[:1, :, :1]}):
        out = attend.attend(q, keys, values, *how, **options)
        close(out, reference.attend(q, keys, values, *how, **options), torch.float32)


@pytest.mark.parametrize("shape", [(70,), (4, 70), (1, 1, 1, 70), (2, 1, 4, 1), (1, 6, 1, 70), (2, 1, 4, 70)])
def test_a_mask_broadcasts_over_any_dimension(device, shape):
    torch.manual_seed(3)
    codecs = ("q8_0", "turboquant:4")
    case = random_case(device, torch.float32, codecs, queries=4)
    close(*both(*case, mask_of("bool", shape, device), False, codecs, (64, 64)), torch.float32)
    expanded = mask_of("float32", shape, device).expand(2, 6, 4, 70)
    close(*both(*case, expanded, False, codecs, (64, 64)), torch.float32)


@pytest.mark.parametrize("shape", [(70, 1), (2, 6, 4, 69), (1, 2, 6, 4, 70), (3, 1, 1, 70), (6, 3, 70)])
def test_a_mask_that_does_not_broadcast_is_named(device, shape):
    case, codecs = random_case(device, torch.float32, ("q8_0", "q8_0"), queries=4), [formats.codec("q8_0")] * 2
    with pytest.raises(ValueError, match=re.escape(f"mask is {list(shape)}")):
        attend.attend(*case, mask_of("bool", shape, device), False, 0.1, *codecs, (64, 64))


@settings(max_examples=16)
@given(data=st.data())
def test_any_shape_attends_like_the_reference(device, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    codecs = draw(st.sampled_from(CODECS)), draw(st.sampled_from(CODECS))
    dims = st.sampled_from([2, 3, 16, 31, 33, 48, 64, 80, 96, 112, 128, 256])
    head_dims, dtype = (draw(dims), draw(dims)), draw(st.sampled_from(DTYPES))
    assume(all(dim >= formats.codec(name).minimum_head_dim for name, dim in zip(codecs, head_dims)))
    groups, queries = draw(st.sampled_from([1, 2, 3, 4, 6, 7, 8])), draw(st.sampled_from([1, 1, 2, 5, 19]))
    length = draw(st.sampled_from([1, 2, 63, 64, 65, 130, 200]))
    size = {"batch": draw(st.sampled_from([1, 2])), "heads": draw(st.sampled_from([1, 2])), "length": length}
    case = random_case(
        device, dtype, codecs, groups=groups, queries=queries, head_dims=head_dims, growing=draw(st.booleans()), **size
    )
    mask = mask_of(draw(st.sampled_from(["none", "bool", "float32"])), (size["batch"], 1, queries, length), device)
    close(*both(*case, mask, draw(st.booleans()), codecs, head_dims), dtype)


def test_strided_queries_and_planes_are_read_in_place(device):
    torch.manual_seed(5)
    codecs = ("turboquant:4", "q8_0")
    q, keys, values = random_case(device, torch.float32, codecs, batch=1, queries=3, length=40)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = [torch.cat([plane.flip(2), plane], 2)[:, :, 40:] for plane in keys]
    close(*both(q, wide, values, None, False, codecs, (64, 64)), torch.float32)


def test_splits_without_a_visible_token_make_no_nan(device, monkeypatch):
    torch.manual_seed(6)
    monkeypatch.setattr(tune, "DEFAULT_PROCESSORS", 64)
    tune.processors_of.cache_clear()
    tune.attend_plan.cache_clear()
    codecs = ("turboquant:4", "turboquant:4")
    q, keys, values = random_case(device, torch.float32, codecs, batch=1, heads=1, queries=1, length=300)
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool, device=device)
    mask[..., 130] = True
    try:
        assert tune.attend_plan(3, 1, 300, 64, True, q.device).splits > 4
        close(*both(q, keys, values, mask, False, codecs, (64, 64)), torch.float32)
    finally:
        tune.processors_of.cache_clear()
        tune.attend_plan.cache_clear()


def test_a_query_that_sees_nothing_gets_zeros(device):
    torch.manual_seed(7)
    codecs = ("turboquant:3", "turboquant:3")
    q, keys, values = random_case(device, torch.bfloat16, codecs)
    mask = torch.ones(2, 1, 2, 70, dtype=torch.bool, device=device)
    mask[:, :, 1] = False
    out, expected = both(q, keys, values, mask, False, codecs, (64, 64))
    assert (out[:, :, 1] == 0).all()
    close(out, expected, torch.bfloat16)
    # The least number of a dtype hides nothing from a row that is full of it: every token weighs the same.
    uniform = torch.full((1, 1, 1, 70), torch.finfo(torch.float32).min, device=device)
    close(*both(q, keys, values, uniform, False, codecs, (64, 64)), torch.bfloat16)


@pytest.mark.parametrize("name", ["turboquant:4", "turboquant_prod:2"])
def test_an_empty_cache_gives_zeros(device, name):
    codec = formats.codec(name)
    q, keys, values = random_case(device, torch.float32, (name, name), length=0)
    arguments = (q, keys, values, None, False, 0.125, codec, codec, (64, 64))
    assert torch.equal(attend.attend(*arguments), torch.zeros(2, 6, 2, codec.coordinates(64), device=device))
    back = attend.attend(*arguments, basis=tables.basis_matrix(codec, 64, device), dtype=torch.float16)
    assert torch.equal(back, torch.zeros(2, 6, 2, 64, device=device, dtype=torch.float16))


def test_an_unwritten_cache_gives_zeros(device):
    codecs = ("turboquant:4", "q8_0")
    q, keys, values = random_case(device, torch.float16, codecs)
    for plane in (*keys, *values):
        plane.zero_()
    assert (both(q, keys, values, None, False, codecs, (64, 64))[0] == 0).all()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_token_behind_a_mask_behaves_like_the_reference(device, name, side, bad):
    torch.manual_seed(8)
    q, keys, values = random_case(device, torch.float32, (name, name), batch=1, queries=2, length=70)
    planes = keys if side == "keys" else values
    floats = next(plane for plane in planes if plane.dtype != torch.uint8)
    floats[:, 0, 33, -1] = bad
    mask = torch.ones(1, 1, 1, 70, dtype=torch.bool, device=device)
    mask[..., 33] = False
    close(*both(q, keys, values, mask, False, (name, name), (64, 64)), torch.float32)
    close(*both(q, keys, values, None, True, (name, name), (64, 64)), torch.float32)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", [name for name in CODECS if name != "identity"])
@pytest.mark.parametrize("size", [1e-4, 3e3])
def test_float16_products_neither_overflow_nor_vanish(device, name, size):
    torch.manual_seed(9)
    q, keys, _ = random_case(device, torch.float16, (name, name), length=200)
    values = compressed(formats.codec(name), (numbers_of(formats.codec(name), 2, 2, 200, 64) * size).to(device))
    close(*both(q, keys, values, None, False, (name, name), (64, 64)), torch.float16)


def test_a_huge_hidden_value_does_not_drown_the_others_in_float16(device):
    torch.manual_seed(10)
    codecs = ("turboquant:4", "turboquant:4")
    q, keys, _ = random_case(device, torch.float16, codecs, length=70)
    x = torch.randn(2, 2, 70, 64) * 1e-3
    x[:, :, 5] *= 3e7
    values = compressed(formats.codec("turboquant:4"), x.to(device))
    mask = torch.arange(70, device=device) != 5
    close(*both(q, keys, values, mask, False, codecs, (64, 64)), torch.float16)


def test_planes_of_another_float_than_the_query_are_read_as_float32(device):
    torch.manual_seed(11)
    q, keys, values = random_case(device, torch.float32, ("identity", "identity"), length=70)
    values = tuple(plane * 1e5 for plane in values)
    close(*both(q.half(), keys, values, None, False, ("identity", "identity"), (64, 64)), torch.float16)


def test_attend_gives_equal_bits_twice(device):
    torch.manual_seed(12)
    codecs = ("turboquant:5", "turboquant:3")
    case = random_case(device, torch.bfloat16, codecs, length=300)
    assert torch.equal(*(both(*case, None, False, codecs, (64, 64))[0] for _ in range(2)))


def test_heads_that_do_not_divide_are_refused(device):
    q, keys, values = random_case(device, torch.float32, ("q8_0", "q8_0"))
    with pytest.raises(ValueError, match="multiple"):
        both(q[:, :5], keys, values, None, False, ("q8_0", "q8_0"), (64, 64))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("spans", SPANS, ids=str)
@pytest.mark.parametrize("name", ["turboquant:4", "turboquant:3", "q8_0"])
@pytest.mark.parametrize("length", [300, 304])
def test_what_a_mask_hides_from_all_is_not_read(device, name, spans, kind, length):
    q, planes, arguments, reach, basis, expected = hidden_case(name, spans, kind, device, length)
    assert reach[:, :2].tolist() == [list(span) for span in spans]
    close(attend.attend(q, *planes, *arguments, reach=reach, basis=basis), expected, torch.float32)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("spans", SPANS[:3], ids=str)
@pytest.mark.parametrize("name", ["turboquant:4", "turboquant:3", "q8_0"])
@pytest.mark.parametrize("length", [300, 304])
@pytest.mark.parametrize("clear", [1, 63, 129, 300])
def test_a_mask_that_changes_nothing_of_the_first_tokens(device, name, spans, kind, length, clear):
    q, planes, arguments, reach, basis, expected = hidden_case(name, spans, kind, device, length, clear)
    assert reach.tolist() == [[first, stop, min(stop, first + clear)] for first, stop in spans]
    close(attend.attend(q, *planes, *arguments, reach=reach, basis=basis), expected, torch.float32)


def test_one_reach_serves_all_sequences(device):
    q, planes, arguments, reach, basis, expected = hidden_case("turboquant:4", SPANS[2][:1] * 2, "bool", device)
    # What lies behind it in memory is no reach.
    reach = torch.cat([reach[:1], torch.zeros_like(reach[:1])])[:1]
    close(attend.attend(q, *planes, *arguments, reach=reach, basis=basis), expected, torch.float32)


ROTATED = [("turboquant:3", dim) for dim in (32, 48, 128, 256)]
ROTATED += [(name, 48) for name in ("turboquant:2.5", "turboquant_prod:2", "qjl:2", "polarquant")]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "head_dim"), ROTATED)
def test_attention_rotates_back_into_any_dtype(device, name, head_dim, dtype):
    torch.manual_seed(5)
    codec = formats.codec(name)
    q, keys, values = random_case(device, torch.float32, (name, name), head_dims=(head_dim, head_dim))
    basis = tables.basis_matrix(codec, head_dim, device)
    arguments = (q, keys, values, None, False, 0.125, codec, codec, (head_dim, head_dim))
    out = attend.attend(*arguments, basis=basis, dtype=dtype)
    expected = reference.rotate_back(reference.attend(*arguments), basis, torch.float32)
    assert out.dtype == dtype
    close(out.float(), expected, dtype)
