"""Keys that lie in two caches: where attention adds up both scores itself, and where a mask of scores stays."""

import re

import pytest
import torch
from graphs import operators, passed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sites import AT, Cache, K, Q, V, write

from tqcompile import ops
from tqcompile.dump import kernel_sources
from tqcompile.options import Options
from tqcompile.passes import rewrite
from tqcompile.passes.second import second
from tqcompile.reads import kernels_of

F = torch.nn.functional
SEEN = torch.rand(2, 1, 3, 9, generator=torch.Generator().manual_seed(1)) < 0.7
SEEN[..., 0] = True
HIDDEN = torch.zeros(SEEN.shape).masked_fill(~SEEN, -torch.inf)


def products(kc, rc, q, k, v, at):
    write(kc, k, at), write(rc, v, at)
    return q @ kc.transpose(2, 3), (q + 1) @ rc.transpose(2, 3)


def beside(kc, rc, q, k, v, at):
    """The scores of the second cache alone."""
    write(kc, k, at), write(rc, v, at)
    return (q + 1) @ rc.transpose(2, 3)


def spelled_out(kc, rc, *new):
    scores, others = products(kc, rc, *new)
    return ((scores + others) * 0.3).softmax(-1) @ kc


def behind_a_mask(kc, rc, *new):
    scores, others = products(kc, rc, *new)
    return (scores + HIDDEN + others).softmax(-1) @ kc


def in_front_of_a_mask(kc, rc, *new):
    scores, others = products(kc, rc, *new)
    return (scores + others).masked_fill(~SEEN, -torch.inf).softmax(-1) @ kc


def mask_of_a_call(kc, rc, *new):
    others = beside(kc, rc, *new)
    return F.scaled_dot_product_attention(new[0], kc, kc, attn_mask=others)


def part_of_a_mask(kc, rc, *new):
    others = beside(kc, rc, *new)
    return F.scaled_dot_product_attention(new[0], kc, kc, attn_mask=others + HIDDEN, scale=0.4)


def one_layer_after_the_other(kc, rc, q, *new):
    return spelled_out(kc, rc, spelled_out(kc, rc, q, *new), *new)


JOINED = {
    spelled_out: 1,
    behind_a_mask: 1,
    in_front_of_a_mask: 1,
    mask_of_a_call: 1,
    part_of_a_mask: 1,
    one_layer_after_the_other: 2,
}


def scaled_apart(kc, rc, *new):
    scores, others = products(kc, rc, *new)
    return (scores * 0.5 + others * 0.2).softmax(-1) @ kc


def capped(kc, rc, *new):
    scores, others = products(kc, rc, *new)
    return ((scores / 3).tanh() * 3 + others).softmax(-1) @ kc


def both_capped(kc, rc, *new):
    scores, others = products(kc, rc, *new)
    return (((scores + others) / 3).tanh() * 3).softmax(-1) @ kc


def kept_from_below(kc, rc, *new):
    scores, others = products(kc, rc, *new)
    return torch.clamp(scores + others + HIDDEN, min=torch.finfo(torch.float32).min).softmax(-1) @ kc


def returned_too(kc, rc, *new):
    scores, others = products(kc, rc, *new)
    return (scores + others).softmax(-1) @ kc, others.mean()


def in_two_masks(kc, rc, *new):
    others = beside(kc, rc, *new)
    first = F.scaled_dot_product_attention(new[0], kc, kc, attn_mask=others)
    return F.scaled_dot_product_attention(first, kc, kc, attn_mask=others)


def written_after_its_scores(kc, rc, q, k, v, at):
    others = beside(kc, rc, q, k, v, at)
    write(rc, v * 2, at)
    return F.scaled_dot_product_attention(q, kc, kc, attn_mask=others)


def zeroed_after_its_scores(kc, rc, *new):
    others = beside(kc, rc, *new)
    rc.zero_()
    return F.scaled_dot_product_attention(new[0], kc, kc, attn_mask=others)


APART = [
    scaled_apart,
    capped,
    both_capped,
    kept_from_below,
    returned_too,
    in_two_masks,
    written_after_its_scores,
    zeroed_after_its_scores,
]


@pytest.mark.parametrize("step", [*JOINED, *APART], ids=lambda step: step.__name__)
def test_scores_are_added_up_by_attention_where_nothing_else_sees_them(step):
    after, context, _ = passed(Cache(step), Q, K.clone(), V, AT.clone())
    assert not context.fallbacks and len(context.sites) == 2
    joined = [node.kwargs.get("second") for node in after.graph.find_nodes(op="call_function", target=ops.attend)]
    found = operators(after)
    assert sum(map(bool, joined)) == JOINED.get(step, 0)
    assert bool(found["logits.default"] + found["logits"]) == (step in APART)


@pytest.mark.parametrize("codec", ["turboquant:4", "identity"])
@pytest.mark.parametrize("step", [*JOINED, *APART], ids=lambda step: step.__name__)
def test_the_same_comes_out_as_of_a_mask_of_scores(step, codec):
    results = []
    for disable in ((), ("second",)):
        torch._dynamo.reset()
        model = Cache(step)
        options = {"keys": codec, "values": codec, "inner": "aot_eager", "disable": disable}
        compiled = torch.compile(model, backend="turboquant", options=options)
        with torch.no_grad():
            outs = [compiled(Q + turn, K.clone() + turn, V, AT.clone() + 3 * turn) for turn in range(3)]
        results.append(outs)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def assert_as_the_model(step, turns=3, **options):
    """What a compiled model says, call after call, against the same model."""
    torch._dynamo.reset()
    ours, theirs = Cache(step), Cache(step)
    compiled = torch.compile(ours, backend="turboquant", options=options)
    with torch.no_grad():
        for turn in range(turns):
            new = Q + turn, K + turn, V, AT + 3 * turn
            torch.testing.assert_close(compiled(*new), theirs(*new), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [*JOINED, *APART], ids=lambda step: step.__name__)
def test_what_is_lossless_equals_the_model(step):
    assert_as_the_model(step, preset="lossless", inner="aot_eager")


CHANGES = {
    "scaled": lambda scores, others: scores * 0.7,
    "others": lambda scores, others: scores + others,
    "half of the others": lambda scores, others: scores + others * 0.5,
    "added": lambda scores, others: scores + HIDDEN,
    "filled": lambda scores, others: scores.masked_fill(~SEEN, -torch.inf),
    "filled with a number": lambda scores, others: scores.masked_fill(~SEEN, -1e9),
    "chosen": lambda scores, others: torch.where(SEEN, scores, torch.finfo(torch.float32).min),
    "capped": lambda scores, others: (scores / 4).tanh() * 4,
    "kept from below": lambda scores, others: scores.clamp(min=torch.finfo(torch.float32).min),
    "cast": lambda scores, others: scores.float(),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(list(CHANGES)), min_size=1, max_size=5), st.sampled_from(["others", "cast"]))
def test_whatever_comes_between_the_products_stays_in_its_order(names, last):
    def step(kc, rc, *new):
        scores, others = products(kc, rc, *new)
        for name in (*names, last):
            scores = CHANGES[name](scores, others)
        return scores.softmax(-1) @ kc

    assert_as_the_model(step, turns=2, preset="lossless", inner="eager")


@pytest.mark.parametrize("extra", [{"sinks": 2}, {"window": 4}])
def test_tokens_that_are_kept_as_they_are_look_their_scores_up_in_the_mask(extra):
    options = {"keys": "identity", "values": "identity", "inner": "aot_eager", **extra}
    assert_as_the_model(spelled_out, **options)
    _, context, _ = passed(Cache(spelled_out), Q, K, V, AT, **options)
    assert context.counts["second"] == (0 if context.regions else 1)


@pytest.mark.parametrize("codec, kernels", [("turboquant:4", 2), ("turboquant:8", 1)])
def test_the_report_says_which_kernels_a_gpu_would_run(codec, kernels):
    model = Cache(spelled_out)
    model.k, model.v = torch.zeros(2, 4, 9, 64), torch.zeros(2, 4, 9, 64)
    new = [torch.randn(2, 4, 3, 64) for _ in range(3)]
    after, context, _ = passed(model, *new, AT.clone(), keys=codec, values=codec)
    assert context.counts["second"] == 1
    # Where the first cache is read on int8 units, the second is by the kernel of its own that there is.
    found = kernels_of(after)
    assert len(found) == kernels and sum(found.values()) == kernels
    assert {what for what, _, _ in found} == {"attention", "query x keys"} if kernels == 2 else {"attention"}
    sources = kernel_sources(after, ())
    portable = [text for name, text in sources.items() if re.match("attend(?!.*_(int8|chunk)$)", name)]
    assert len(portable) == 1 and "def second_numbers" in portable[0]
    assert ("logits_turboquant_4_64_int8" in sources) == (kernels == 2)


def test_a_left_out_pass_leaves_the_mask():
    after, context, _ = passed(Cache(spelled_out), Q, K, V, AT, disable=("second",))
    assert "second" not in context.counts and operators(after)["logits.default"] + operators(after)["logits"] == 1
    assert "second" in Options(disable="second").disable and second.__name__ == "second"


def test_scores_in_a_mask_are_read_of_tokens_that_need_none_of_the_rest():
    after, _, _ = passed(Cache(behind_a_mask), Q, K, V, AT, disable=("second",))
    assert operators(after)["reach"] == operators(after)["bounds"] == 1
    (call,) = after.graph.find_nodes(op="call_function", target=ops.attend)
    assert call.args[4].target is rewrite.bounds
