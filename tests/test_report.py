"""The report: what was compressed and what was not, where, and bytes read off the caches that are alive."""

import gc
import re

import pytest
import torch
from conversations import conversations
from models import EMBED, Shape
from test_mutations import LOSSLESS, SIZE, Layer, calls

import tqcompile
from tqcompile import CompressedKV
from tqcompile.cache import storages

F = torch.nn.functional
CODECS = ("turboquant:4", "q8_0")


def spoken(kind="counter", lengths=(4, 1), layers=2, codecs=CODECS, seed=0):
    ours, _ = conversations(kind, Shape(layers=layers), codecs, seed=seed)
    for tokens in lengths:
        ours.feed(torch.randn(2, tokens, EMBED))
    return ours


def bytes_of(caches):
    found = {}
    for cache in caches:
        found.update(storages(cache))
    return sum(storage.nbytes() for storage in found.values())


def tables(text):
    """The tables in a report: lists of lines, each of a header, a rule and rows."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    found = []
    for lines in blocks:
        rules = [at for at, line in enumerate(lines) if re.fullmatch(r"-[- ]*", line)]
        found += [lines[at - 1 :] for at in rules]
    return found


def cells(line, rule):
    return [line[match.start() : match.end()].strip() for match in re.finditer("-+", rule)]


@pytest.mark.parametrize("kind", ["tuples", "buffers", "slices", "counter", "made"])
def test_bytes_are_those_of_the_live_storages(kind):
    ours = spoken(kind)
    report, caches = tqcompile.report(ours.model), ours.caches()
    assert {id(cache) for cache in report.caches} == {id(cache) for cache in caches} and len(report.caches) == 4
    assert report.compressed_bytes == bytes_of(caches)
    assert report.dense_bytes == sum(cache.numel() * 4 for cache in caches)
    elements = sum(cache.numel() for cache in caches)
    assert report.bits_per_element == pytest.approx(8 * bytes_of(caches) / elements)
    assert f"live caches: 4, {bytes_of(caches):,} bytes measured, {report.dense_bytes:,} as dense" in str(report)
    assert f"({report.dense_bytes / report.compressed_bytes:.2f} x), {report.bits_per_element:.2f} bits" in str(report)


def test_bits_of_a_static_cache_are_those_of_its_codecs():
    ours = spoken("counter")
    assert tqcompile.report(ours.model).bits_per_element == pytest.approx((4.5 + 8.5) / 2)


def test_half_precision_is_counted_as_what_dense_would_take():
    ours, _ = conversations("counter", Shape(layers=1, dtype=torch.bfloat16), CODECS)
    ours.feed(torch.randn(2, 2, EMBED, dtype=torch.bfloat16))
    assert tqcompile.report(ours.model).dense_bytes == sum(cache.numel() * 2 for cache in ours.caches())


def test_a_growing_cache_shows_its_spare_room():
    ours = spoken("tuples", (4, 1))
    report, caches = tqcompile.report(ours.model), ours.caches()
    tokens = sum(plane.numel() * plane.itemsize for cache in caches for plane in cache.planes)
    assert report.compressed_bytes > tokens and report.compressed_bytes == bytes_of(caches)
    before = report.compressed_bytes
    del caches
    ours.feed(torch.randn(2, 1, EMBED))
    assert tqcompile.report(ours.model).compressed_bytes == before and len(report.caches) == 4


def test_two_conversations_of_one_model_both_count():
    ours = spoken("tuples")
    first = ours.caches()
    held = ours.state
    ours.again()
    ours.feed(torch.randn(2, 4, EMBED)), ours.feed(torch.randn(2, 1, EMBED))
    second = ours.caches()
    report = tqcompile.report(ours.model)
    assert {id(cache) for cache in report.caches} == {id(cache) for cache in (*first, *second)}
    assert report.compressed_bytes == bytes_of([*first, *second]) == bytes_of(first) + bytes_of(second)
    del first, held
    gc.collect()
    assert {id(cache) for cache in report.caches} == {id(cache) for cache in second}


def test_forks_in_one_buffer_count_it_once():
    ours = spoken("tuples", (4, 1))
    prefix = ours.state
    ours.feed(torch.randn(2, 1, EMBED))
    both = [*ours.caches(), *(cache for kv in prefix for cache in kv)]
    report = tqcompile.report(ours.model)
    assert len(report.caches) == len(both) == 8
    assert report.compressed_bytes == bytes_of(both) == bytes_of(ours.caches())


@pytest.mark.parametrize("kind", ["tuples", "made"])
def test_caches_that_died_are_gone(kind):
    ours = spoken(kind)
    report = tqcompile.report(ours.model)
    assert report.compressed_bytes > 0
    ours.again()
    gc.collect()
    assert report.caches == [] and report.compressed_bytes == report.dense_bytes == 0
    assert report.bits_per_element == 0 and "live caches" not in str(report)
    assert "4 cache sites compressed" in str(report) or "8 cache sites compressed" in str(report)


def test_what_was_compressed():
    ours = spoken("counter", (4,))
    report = tqcompile.report(ours.model)
    assert str(report).startswith("turboquant: 1 graphs, 4 cache sites compressed, 2 attention reads rewritten\n")
    ((header, rule, *rows),) = tables(str(report))
    assert cells(header, rule) == ["graph", "cache", "role", "codec", "sites"]
    name = report.graphs[0].name
    assert [cells(row, rule) for row in rows] == [
        [name, "in_place", "keys", "turboquant:4", "2"],
        [name, "in_place", "values", "q8_0", "2"],
    ]
    assert not report.refusals and not report.fallbacks and "left dense" not in str(report)


def touched(cache, k):
    cache.mul_(0.5)


class Odd(Layer):
    def forward(self, q, k, v, at):
        return super().forward(q, k, v, at) + self.k_cache.cos().sum()


def run(model, **options):
    with torch.no_grad():
        torch.compile(model, backend="turboquant", options={**LOSSLESS, **options})(*next(calls()))
    return tqcompile.report(model)


def line_of(function):
    return function.__code__.co_firstlineno + 1


def test_what_was_refused_with_its_name_reason_and_line():
    report = run(Layer(touched))
    (refusal,) = report.refusals
    assert "k_cache" in refusal.name and refusal.reason.startswith("mul_") and refusal.remedy
    assert __file__ in refusal.where and f"line {line_of(touched)}, in touched" in refusal.where
    compressed, refused, decoded = tables(str(report))
    assert "v_cache" in decoded[2] and "scaled_dot_product_attention" in decoded[2]
    assert [cells(row, compressed[1])[2] for row in compressed[2:]] == ["values"]
    assert cells(refused[0], refused[1]) == ["cache", "why", "where", "remedy"]
    assert cells(refused[2], refused[1]) == [refusal.name, refusal.reason, refusal.where, refusal.remedy]
    assert "left dense:\n" in str(report)


def test_a_reason_is_told_once_whatever_the_number_of_graphs():
    model = Layer(touched)
    compiled = torch.compile(model, backend="turboquant", options=LOSSLESS, dynamic=False)
    for tokens in (2, 1):
        q, k, v, at = next(calls())
        with torch.no_grad():
            compiled(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens], at[:tokens])
    report = tqcompile.report(model)
    assert len(report.graphs) == 2 and len(report.refusals) == 1


def test_what_was_decoded_in_front_of_a_reader():
    model = Odd()
    report = run(model)
    (fallback,) = report.fallbacks
    assert "k_cache" in fallback.name and "cos" in fallback.operator
    assert f"line {line_of(Odd.forward)}, in forward" in fallback.where
    decoded = tables(str(report))[-1]
    assert cells(decoded[0], decoded[1]) == ["cache", "reader", "where"]
    assert cells(decoded[2], decoded[1]) == [fallback.name, fallback.operator, fallback.where]
    assert isinstance(model.k_cache, CompressedKV)


def test_every_table_lines_up():
    model = Odd(touched)
    text = str(run(model)) + "\n\n" + str(run(Odd())) + "\n\n" + str(tqcompile.report(spoken("tuples").model))
    found = tables(text)
    assert len(found) >= 4
    for header, rule, *rows in found:
        starts = [match.start() for match in re.finditer("-+", rule)]
        assert rows and len(cells(header, rule)) == len(starts) and all(cells(header, rule))
        for row in rows:
            assert all(start == 0 or row[start - 2 : start] == "  " for start in starts), row
            assert all(cells(row, rule))


def test_a_call_that_ran_dense_is_told():
    def step(keys, values, q, k, at):
        keys[:, :, at] = k
        return F.scaled_dot_product_attention(q, keys, values)

    compiled = torch.compile(step, backend="turboquant", options=LOSSLESS)
    q, k, _, at = next(calls())
    first, second, values = torch.zeros(SIZE), torch.zeros(SIZE), torch.randn(SIZE)
    alias = second.detach()
    with torch.no_grad():
        compiled(first, values, q, k, at)
        assert "ran dense" not in str(tqcompile.report()) and isinstance(first, CompressedKV)
        torch.testing.assert_close(compiled(second, values, q, k, at), step(first.decode(), values, q, k, at))
    assert type(second) is torch.Tensor and alias[:, :, at].equal(k)
    text = str(tqcompile.report())
    assert "calls that ran dense, by the original graph:" in text
    ((name, cache, why),) = [cells(row, tables(text)[-1][1]) for row in tables(text)[-1][2:]]
    assert name == tqcompile.report().graphs[0].name and "keys" in cache and why == "other tensors share its memory"


def test_a_model_that_nothing_was_compiled_for():
    spoken()
    model = torch.nn.Linear(2, 2)
    report = tqcompile.report(model)
    assert str(report) == "turboquant: no graph was compiled for this model yet" and report.graphs == ()
    assert report.caches == [] and report.refusals == [] and report.fallbacks == [] and report.bits_per_element == 0


def test_a_model_without_a_cache():
    model = torch.nn.Linear(4, 4)
    torch.compile(model, backend="turboquant", options={"inner": "eager"})(torch.ones(2, 4))
    report = tqcompile.report(model)
    assert str(report) == "turboquant: 1 graphs, 0 cache sites compressed, 0 attention reads rewritten"


def test_models_do_not_mix():
    one, other = spoken("counter", layers=1), spoken("tuples", (3, 1, 1), layers=2, codecs=("identity", "identity"))
    layer = Layer(touched)
    run(layer)
    reports = [tqcompile.report(model) for model in (one.model, other.model, layer)]
    everything = tqcompile.report()
    assert [len(report.caches) for report in reports] == [2, 4, 1]
    assert sum(len(report.graphs) for report in reports) == len(everything.graphs)
    assert sum(report.compressed_bytes for report in reports) == everything.compressed_bytes
    assert [{site.codec.name for graph in report.graphs for site in graph.sites} for report in reports] == [
        set(CODECS),
        {"identity"},
        {"identity"},
    ]
    assert [len(report.refusals) for report in reports] == [0, 0, 1]


def test_two_layers_of_buffers_without_a_parameter_do_not_mix():
    one, other = Layer(), Layer(touched)
    run(one), run(other)
    assert len(tqcompile.report(one).graphs) == len(tqcompile.report(other).graphs) == 1
    assert not tqcompile.report(one).refusals and tqcompile.report(other).refusals
    assert [id(cache) for cache in tqcompile.report(other).caches] == [id(other.v_cache)]


def test_a_compiled_model_reports_as_the_model_it_wraps():
    ours = spoken("counter", (2,))
    assert tqcompile.report(ours.call).graphs == tqcompile.report(ours.model).graphs != ()


def test_a_part_of_a_model_reports_its_graphs():
    ours = spoken("counter", (2,))
    assert tqcompile.report(ours.model.blocks[0]).graphs == tqcompile.report(ours.model).graphs


@pytest.mark.parametrize("model", ["gpt2", 3, torch.ones(2)], ids=str)
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"model=.*takes a torch\.nn\.Module"):
        tqcompile.report(model)


def test_the_kernels_that_read_codes_are_told():
    model = Layer()
    compiled = torch.compile(model, backend="turboquant", options=LOSSLESS)
    with torch.no_grad():
        compiled(*next(calls()))
    assert "kernel" not in str(tqcompile.report(model))
    (graph,) = tqcompile.report(model).graphs
    graph.readers = {("attention", "turboquant:4 / turboquant:3", "int8 units"): 32}
    assert re.search(r"attention +turboquant:4 / turboquant:3 +int8 units +32", str(tqcompile.report(model)))
