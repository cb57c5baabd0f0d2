"""Attention of a chunk of queries against the reference: on Hopper, and without a device by its own text, emulated."""

import re
from functools import partial
from types import SimpleNamespace

import emulate
import pytest
import torch
from cases import TOLERANCE, close, compressed, numbers_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reaching import SPANS, hidden_case, lie_of

from tqcompile import formats, reference
from tqcompile.coding import split
from tqcompile.kernels import attend, bfloats, chunks, integer, ptx, tune
from tqcompile.kernels.emit import Reader

BITS = (1, 2, 3, 4, 5)
WORD = st.integers(0, 2**32 - 1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Have all calls taken, on a CPU by the emulator."""
    if request.param == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("no Hopper")
    calls, compiled = [], chunks.module

    def module(keys, values, reader, folder):
        calls.append((keys, values))
        if request.param == "cuda":
            return compiled(keys, values, reader, folder)
        return SimpleNamespace(attend_chunk=emulate.Kernel(chunks.source(keys, values, reader), "attend_chunk"))

    monkeypatch.setattr(chunks, "takes", lambda *a: True)
    monkeypatch.setattr(chunks, "prepared", chunks.prepared.__wrapped__)
    monkeypatch.setattr(chunks, "module", module)
    # A weight has eight bits; q is exact, and so are products with integers.
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 2**-8)
    yield request.param
    assert calls


def both(q, keys, values, mask, causal, bits, dims, **options):
    names = [formats.codec(f"turboquant:{each}") for each in bits]
    arguments = (q, keys, values, mask, causal, dims[0] ** -0.5, *names, dims)
    return attend.attend(*arguments, **options), reference.attend(*arguments, **options)


def case(device, bits, dims, length, rows, queries, heads=2, batch=1, growing=False):
    q = torch.randn(batch, heads * rows // queries, queries, dims[0]).bfloat16().to(device)
    dense = [torch.randn(batch, heads, length, dim).to(device) for dim in dims]
    return q, *(compressed(formats.codec(f"turboquant:{each}"), x, growing) for each, x in zip(bits, dense))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("bits", [*((each, each) for each in BITS), (5, 3), (1, 4)], ids=str)
@pytest.mark.parametrize(("dims", "rows"), [((64, 64), 20), ((96, 128), 70), ((128, 32), 3)], ids=str)
@pytest.mark.parametrize("length", [1, 77, 144])
def test_a_ragged_cache_attends_like_the_reference(device, bits, dims, rows, length):
    torch.manual_seed(0)
    close(*both(*case(device, bits, dims, length, rows, rows), None, False, bits, dims), torch.bfloat16)


@pytest.mark.parametrize("dim", [63, 127])
def test_dims_that_fill_no_run_attend_like_the_reference(device, dim):
    torch.manual_seed(8)
    close(*both(*case(device, (4, 3), (dim, dim), 77, 20, 5), None, False, (4, 3), (dim, dim)), torch.bfloat16)


OTHERS = [("qjl:1", "turboquant:3"), ("qjl:2", "turboquant:4"), ("turboquant:3:norm",) * 2]
OTHERS = [(names, (128, 64)) for names in OTHERS] + [(("kvtc:1",) * 2, (105, 70))]


@pytest.mark.parametrize(("names", "dims"), OTHERS, ids=str)
def test_codes_of_other_codecs_attend_like_the_reference(device, names, dims):
    torch.manual_seed(7)
    codecs = tuple(map(formats.codec, names))
    assert chunks.pieces_of(codecs, dims)
    q = numbers_of(codecs[0], 1, 6, 9, dims[0]).bfloat16().to(device)
    planes = [compressed(codec, numbers_of(codec, 1, 2, 90, dim).to(device)) for codec, dim in zip(codecs, dims)]
    arguments = (q, *planes, None, False, 0.1, *codecs, dims)
    close(attend.attend(*arguments), reference.attend(*arguments), torch.bfloat16)


@pytest.mark.parametrize("bits", [(4, 4), (2, 3), (1, 2)], ids=str)
def test_wide_heads_attend_like_the_reference(device, bits):
    torch.manual_seed(1)
    close(*both(*case(device, bits, (256, 192), 70, 24, 12), None, False, bits, (256, 192)), torch.bfloat16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "bfloat16"])
def test_every_reader_sees_what_the_reference_sees(device, kind, causal):
    torch.manual_seed(2)
    keep = torch.rand(2, 6, 9, 150, device=device) < 0.7
    added = torch.where(keep, torch.randn(keep.shape, device=device), -torch.inf)
    mask = {"none": None, "bool": keep, "additive": added, "bfloat16": added.bfloat16()}[kind]
    options = {"score_mod": "tanh(score / 3.0) * 3.0", "sinks": torch.randn(2, 6, 9, 1, device=device)}
    given = case(device, (4, 3), (64, 64), 150, 27, 9, batch=2)
    close(*both(*given, mask, causal, (4, 3), (64, 64)), torch.bfloat16)
    close(*both(*given, mask, causal, (4, 3), (64, 64), **options), torch.bfloat16)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape_attends_like_the_reference(device, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dims = draw(st.tuples(*2 * [st.sampled_from([31, 39, 48, 63, 64, 80, 95, 96, 112, 127, 128, 192, 255, 256])]))
    bits = draw(st.tuples(*2 * [st.sampled_from(BITS[: 5 if max(dims) <= 128 else 4])]))
    codecs = [formats.codec(f"turboquant:{each}") for each in bits]
    assume(chunks.pieces_of(tuple(codecs), dims))
    groups, queries, batch, heads = (
        draw(st.sampled_from(sizes)) for sizes in ([1, 3, 4, 7], [1, 6, 41], [1, 2], [1, 2])
    )
    length = draw(st.sampled_from([1, 2, 63, 64, 65, 127, 129, 300]))
    shape = {"length": length, "rows": groups * queries, "queries": queries, "heads": heads, "batch": batch}
    given = case(device, bits, dims, **shape, growing=draw(st.booleans()))
    keep = torch.rand(batch, 1, queries, length, device=device) < 0.7
    added = torch.where(keep, torch.randn(keep.shape, device=device), -torch.inf)
    mask = draw(st.sampled_from([None, keep, added]))
    out, expected = both(*given, mask, draw(st.booleans()), bits, dims)
    close(out, expected, torch.bfloat16)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, None])
def test_rows_that_see_nothing_and_rows_of_nothing_but_low_scores(device, hidden):
    """The first are zeros; to the others all tokens are alike, which the least number of a dtype does not hide."""
    torch.manual_seed(6)
    keep = torch.rand(1, 1, 8, 100, device=device) < 0.5
    keep[:, :, 3] = False
    mask = keep if hidden is None else torch.where(keep, 0.0, hidden)
    out, expected = both(*case(device, (4, 4), (64, 64), 100, 24, 8), mask, False, (4, 4), (64, 64))
    assert bool((expected[:, :, 3] == 0).all()) == (hidden != torch.finfo(torch.float32).min)
    close(out, expected, torch.bfloat16)


@pytest.mark.parametrize("clear", [0, 63, 129, 300])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_tokens_out_of_reach_are_not_read_nor_is_a_mask_that_changes_nothing(device, spans, kind, clear):
    q, planes, arguments, reach, basis, _ = hidden_case("turboquant:4", spans, kind, device, clear=clear)
    q = q.bfloat16()
    whole = [[plane.nan_to_num(1.0) if plane.is_floating_point() else plane for plane in side] for side in planes]
    expected = reference.rotate_back(reference.attend(q, *whole, *arguments), basis, torch.float32)
    out = attend.attend(q, *planes, *arguments, reach=reach, basis=basis)
    close(out, expected, torch.bfloat16)
    if clear == 300:
        arguments = lie_of(arguments[0]), *arguments[1:]
        close(attend.attend(q, *planes, *arguments, reach=reach, basis=basis), expected, torch.bfloat16)


def test_what_is_no_number_reaches_what_the_reference_lets_it_reach(device):
    torch.manual_seed(4)
    q, *sides = case(device, (4, 4), (64, 64), 90, 18, 6)
    codec, keep = formats.codec("turboquant:4"), torch.arange(90, device=device).view(1, 1, 1, 90) != 40
    for side in sides:
        scales = split(codec, side)[1]
        for wrong in (float("nan"), float("inf")):
            kept, scales[0, 0, 40] = scales[0, 0, 40].clone(), wrong
            for mask in (None, keep):
                out, expected = both(q, *sides, mask, False, (4, 4), (64, 64))
                close(out, expected, torch.bfloat16)
            scales[0, 0, 40] = kept


@pytest.mark.parametrize(("bits", "fields"), [(5, 1), (4, 1), (3, 2), (2, 2), (1, 4)])
@given(word=WORD, high=WORD)
def test_a_word_of_codes_becomes_its_numbers(bits, fields, word, high):
    numbers = chunks.numbers_of(formats.codec(f"turboquant:{bits}"), 128)
    block, tables = bfloats.look_up(bits, fields), bfloats.table_words(numbers)
    assert len(tables) == block.tables
    inputs = [word, high] if ptx.has_high(bits) else [word]
    words = [torch.tensor(each & 0xFFFFFFFF) for each in (*inputs, *tables)]
    found = torch.stack(emulate.assembled(block.text(), words, block.outputs))
    found = emulate.signed(found).view(torch.bfloat16).view(2 * fields, 4).tolist()
    for nibble in range(2):
        for field in range(fields):
            codes = [
                _code(bits, word >> 8 * column + 4 * nibble, high >> 8 * column + 4 * nibble, field)
                for column in range(4)
            ]
            assert found[fields * nibble + field] == [numbers[code] for code in codes]


def _code(bits, word, high, field):
    if bits in (4, 5):
        return word & 15 | (high & 1) << 4 if bits == 5 else word & 15
    low = word >> min(bits, 2) * field & (1 if bits == 1 else 3)
    return low | (high >> 2 * field & 1) << 2 if bits == 3 else low


@pytest.mark.gpu
def test_equal_inputs_give_equal_bits_also_in_a_graph():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper")
    torch.manual_seed(5)
    codec = formats.codec("turboquant:4")
    q, *planes = case("cuda", (4, 4), (128, 128), 5000, 80, 20, heads=8, batch=2)
    codes = [split(codec, each)[0] for each in planes]
    assert chunks.takes(q, codes, (codec, codec), (128, 128), False)
    run = partial(attend.attend, q, *planes, None, False, 0.1, codec, codec, (128, 128))
    out = run()
    close(out, reference.attend(q, *planes, None, False, 0.1, codec, codec, (128, 128)), torch.bfloat16)
    assert torch.equal(run(), out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, out)


def test_which_calls_are_chunks(monkeypatch):
    monkeypatch.setattr(tune, "capability_of", lambda device: (9, 0))
    names = ("turboquant:4",) * 2

    def taken(names=names, rows=40, dtype=torch.bfloat16, dims=(128, 128), is_masked=False):
        codecs = [formats.codec(name) for name in names]
        planes = [compressed(codec, torch.randn(1, 2, 40, dim)) for codec, dim in zip(codecs, dims)]
        codes = [split(codec, each)[0] for codec, each in zip(codecs, planes)]
        return chunks.takes(torch.randn(1, 2, rows, dims[0]).to(dtype), codes, tuple(codecs), dims, is_masked)

    assert taken() and taken(("turboquant:5", "turboquant:3")) and taken(dims=(64, 256))
    assert not taken(rows=32) and taken(rows=33) and not taken(dtype=torch.float16) and not taken(dims=(16, 128))
    assert not taken(("q8_0", "turboquant:4")) and not taken(("turboquant:4", "turboquant:2.5"))
    assert not taken(("turboquant:5", "turboquant:4"), dims=(256, 128))
    assert taken(rows=512) and not taken(rows=513) and taken(rows=513, is_masked=True)
    assert taken(("turboquant:5",) * 2, 256) and not taken(("turboquant:4", "turboquant:5"), 257)
    assert tune.chunk_least_rows(63) == 33 and tune.chunk_least_rows(64) == 25
    monkeypatch.setattr(tune, "CHUNK_BYTES", 4 * 2 * 40 * 128 - 1)
    assert not taken() and taken(rows=39)
    monkeypatch.setattr(tune, "capability_of", lambda device: (10, 0))
    assert not taken(rows=39)


def test_the_text_names_what_it_is_for():
    pieces = chunks.pieces_of((formats.codec("turboquant:5"), formats.codec("turboquant:3")), (128, 64))
    text = chunks.source(*pieces, Reader("bool"))
    assert "keys of 5 bits, 128 dims, values of 3, 64 dims" in text and integer.score_helper(Reader("bool")) in text
    assert re.search(r"VALUE_TABLES = gl.constexpr\(4\)", text)
