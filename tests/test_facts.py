"""The facts of a graph's record: where each cache is written and read, over what, and what became of it."""

import dataclasses
import linecache
import re

import pytest
import torch
from conversations import conversations
from models import EMBED, Shape
from test_mutations import LOSSLESS, SIZE, Layer, calls

import tqcompile
from tqcompile import CompressedKV
from tqcompile.formats import codec

F = torch.nn.functional
CODECS = ("turboquant:4", "q8_0")
FORMS = {"tuples": "append", "buffers": "in_place", "slices": "in_place", "counter": "in_place", "made": "in_place"}
WRITTEN = {
    "tuples": ("append", "cat", "cat("),
    "buffers": ("write", "setitem", "] = k"),
    "slices": ("write", "setitem", "] = k"),
    "counter": ("write", "index_copy_", "index_copy_("),
    "made": ("write", "setitem", "] = k"),
}


def run(call, *args, **options):
    with torch.no_grad():
        torch.compile(call, backend="turboquant", options={**LOSSLESS, **options})(*args)
    return {facts.name: facts for graph in tqcompile.report().graphs for facts in graph.facts}


def named(facts, part):
    return next(one for name, one in facts.items() if part in name)


def source(place):
    """The line of code that a place points at."""
    path, line = re.fullmatch(r"(.*), line (\d+), in \w+", place.where).groups()
    return linecache.getline(path, int(line))


@pytest.mark.parametrize("kind", FORMS)
def test_every_way_to_keep_a_cache_says_where_it_is_written_and_read(kind):
    ours, _ = conversations(kind, Shape(layers=2), CODECS)
    for tokens in (4, 1):
        ours.feed(torch.randn(2, tokens, EMBED))
    first, last = tqcompile.report(ours.model).graphs[0], tqcompile.report(ours.model).graphs[-1]
    shape = Shape(layers=2)
    assert [facts.role for facts in last.facts].count("keys") == 2 and len(last.facts) == 4
    for facts in last.facts:
        assert (facts.form, facts.codec) == (FORMS[kind], CODECS[facts.role == "values"])
        assert (facts.heads, facts.head_dim) == (shape.kv_heads, shape.head_dim)
        assert (facts.dtype, facts.device, facts.reason) == (torch.float32, "cpu", "")
        (write,), (read,) = facts.writes, facts.reads
        what, operator, code = WRITTEN[kind]
        assert (write.kind, write.operator, write.over) == (what, operator, "")
        assert (code if facts.role == "keys" else code.replace("= k", "= v")) in source(write)
        reader = "matmul" if kind == "slices" else "scaled_dot_product_attention"
        assert (read.kind, read.operator, read.over) == ("attend", reader, "codes")
        assert f"{reader}(" in source(read)
    if kind in ("tuples", "made"):
        assert {facts.form for facts in first.facts} == {"create"} and len(first.facts) == 4
        assert {place.over for facts in first.facts for place in facts.reads} == {"dense"}
        assert all(facts.writes[0].kind == "create" and facts.heads == shape.kv_heads for facts in first.facts)


def test_logits_and_weights_are_readers_of_their_own():
    def step(q, k, v, at, keys, values):
        keys[:, :, at] = k
        values[:, :, at] = v
        return torch.matmul(torch.matmul(q, keys.transpose(2, 3)).square().softmax(-1), values)

    found = run(step, *next(calls()), torch.zeros(SIZE), torch.zeros(SIZE))
    keys, values = found["L['keys']"], found["L['values']"]
    assert [(place.kind, place.over) for place in keys.reads] == [("logits", "codes")]
    assert [(place.kind, place.over) for place in values.reads] == [("mix", "codes")]
    assert keys.heads == values.heads == SIZE[1] and keys.head_dim == SIZE[3]


def test_a_cache_with_its_dimensions_in_another_order_has_the_heads_that_attention_reads():
    def step(q, k, v, at, keys, values):
        keys[:, at] = k.transpose(1, 2)
        values[:, at] = v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2))

    batch, heads, tokens, head_dim = SIZE
    found = run(step, *next(calls()), *(torch.zeros(batch, tokens, heads, head_dim) for _ in "kv"))
    assert {(one.heads, one.head_dim, one.shape) for one in found.values()} == {
        (heads, head_dim, (batch, tokens, heads, head_dim))
    }


def scaled(cache, k):
    cache.mul_(0.5)


class Odd(Layer):
    def forward(self, q, k, v, at):
        return super().forward(q, k, v, at) + self.k_cache.cos().sum()


def test_a_refused_cache_says_its_reason_and_the_write_that_no_rule_follows():
    found = run(Layer(scaled), *next(calls()))
    keys, values = named(found, "k_cache"), named(found, "v_cache")
    (refusal,) = tqcompile.report().refusals
    assert (keys.form, keys.codec, keys.role) == ("dense", None, "keys")
    assert (keys.reason, keys.remedy, keys.refused_at) == (refusal.reason, refusal.remedy, refusal.where)
    assert [place.operator for place in keys.writes] == ["setitem", "mul_"] and "mul_(0.5)" in source(keys.writes[1])
    assert [(place.kind, place.over) for place in keys.reads] == [("attend", "dense")]
    # Its partner is compressed, and attention over the two is given decoded values.
    assert (values.form, values.codec) == ("in_place", "identity")
    assert [(place.operator, place.over) for place in values.reads] == [("scaled_dot_product_attention", "decoded")]


def test_a_read_that_no_rule_knows_stands_beside_those_over_codes():
    keys = named(run(Odd(), *next(calls())), "k_cache")
    assert [(place.kind, place.operator, place.over) for place in keys.reads] == [
        ("attend", "scaled_dot_product_attention", "codes"),
        ("other", "cos", "decoded"),
    ]
    assert "self.k_cache.cos()" in source(keys.reads[1])


def test_a_compressed_cache_that_a_graph_cannot_follow_is_decoded_and_keeps_its_codec():
    model = Layer(scaled)
    model.k_cache = CompressedKV.encode(torch.randn(SIZE), codec("q8_0"))
    keys = named(run(model, *next(calls())), "k_cache")
    assert (keys.form, keys.codec) == ("decoded", "q8_0") and keys.reason.startswith("mul_")
    assert [place.over for place in keys.reads] == ["decoded"]


def test_a_cache_of_three_dimensions_has_sequences_among_its_heads():
    def step(latent, x, at):
        latent[:, at] = x
        return torch.matmul(x, latent.transpose(1, 2)).softmax(-1) @ latent

    (facts,) = run(step, torch.zeros(2, 8, 32), torch.randn(2, 1, 32), torch.tensor([0])).values()
    assert (facts.form, facts.role, facts.folded) == ("in_place", "both", True)
    assert (facts.heads, facts.head_dim, facts.shape) == (2, 32, (2, 8, 32))


def test_a_cache_that_no_attention_reads_has_no_heads():
    def step(cache, x, at):
        cache[:, at] = x
        return cache.sum()

    (facts,) = run(step, torch.zeros(2, 8, 32), torch.randn(2, 1, 32), torch.tensor([0])).values()
    assert (facts.form, facts.heads, facts.head_dim, facts.folded) == ("dense", None, None, False)
    assert facts.reason and facts.dtype is torch.float32 and facts.shape == (2, 8, 32)


def test_two_continuations_of_one_past_join_codes_and_write_nothing_into_it():
    def step(keys, values, q):
        one, two, values = torch.cat([keys, q], 2), torch.cat([keys, 2 * q], 2), torch.cat([values, q], 2)
        outs = [F.scaled_dot_product_attention(q, each, values) for each in (one, two)]
        return sum(outs), one, two, values

    found = run(step, torch.randn(SIZE), torch.randn(SIZE), torch.randn(2, 4, 1, 32))
    keys, values = found["L['keys']"], found["L['values']"]
    assert keys.form == "read" and [(place.kind, place.operator) for place in keys.writes] == [("join", "cat")] * 2
    assert values.form == "append" and [place.kind for place in values.writes] == ["append"]
    assert [(place.kind, place.over) for place in keys.reads] == [("attend", "codes")] * 2


def test_facts_hold_words_and_no_node_or_tensor():
    run(Odd(scaled), *next(calls()))
    plain = (str, int, type(None), torch.dtype, tuple)

    def check(value):
        if dataclasses.is_dataclass(value):
            value = tuple(vars(value).values())
        assert isinstance(value, plain), value
        for part in value if isinstance(value, tuple) else ():
            check(part)

    (graph,) = tqcompile.report().graphs
    assert graph.facts
    check(graph.facts)


def test_a_symbolic_size_is_told_by_name_and_makes_no_guard():
    ours, _ = conversations("tuples", Shape(layers=1), CODECS)
    for tokens in (4, 1, 1, 1, 1):
        ours.feed(torch.randn(2, tokens, EMBED))
    graphs = tqcompile.report(ours.model).graphs
    keys = graphs[-1].facts[0]
    assert len(graphs) <= 3 and any(isinstance(size, str) for size in keys.shape) and keys.heads == Shape().kv_heads


@pytest.mark.parametrize("disable", ["canonicalize", "sites", "compress"])
def test_a_pass_that_was_left_out_leaves_no_compressed_cache(disable):
    found = run(Layer(), *next(calls()), disable=disable)
    assert not any(facts.codec for facts in found.values())
