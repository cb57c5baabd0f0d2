"""Which caches keep first and last tokens as they are, and why others do not."""

import pytest
import torch
from graphs import operators, passed
from test_sites import AT, Cache, F, K, Q, V, attend, write

from tqcompile import ops
from tqcompile.dump import kernel_sources
from tqcompile.recent import Regions

KEPT = {"sinks": 2, "window": 3, "disable": ()}


def after(function, *args, **options):
    with torch.no_grad():
        gm, context, _ = passed(function, *args, **{**KEPT, **options})
    return gm, context


def positioned(k_cache, v_cache, q, k, v, at):
    write(k_cache, k, at), write(v_cache, v, at)
    return attend(q, k_cache, v_cache)


def grown(past_k, past_v, q, k, v):
    keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    return attend(q, keys, values), keys, values


def test_positions_say_which_tokens_are_the_last():
    gm, context = after(Cache(positioned), Q, K, V, AT)
    assert list(context.regions.values()) == [Regions(2, 2, 3)] * 2
    assert operators(gm)["remember"] == 2
    (read,) = gm.graph.find_nodes(op="call_function", target=ops.attend)
    assert len(read.kwargs["exact"]) == 4 and read.kwargs["first"] == 2
    assert [said for _, said in context.kept] == ["first 2 and last 3 tokens"] * 2


def test_a_cache_that_grows_keeps_them_where_it_did_not_slide():
    _, context = after(grown, K.clone(), V.clone(), Q, K, V)
    assert list(context.regions.values()) == [Regions(2, 2, 3)] * 2

    def slides(past_k, past_v, q, k, v):
        out, keys, values = grown(past_k, past_v, q, k, v)
        return out, keys[:, :, -4:], values[:, :, -4:]

    _, context = after(slides, K.clone(), V.clone(), Q, K, V)
    assert not context.regions and {said for _, said in context.kept} == {"what is kept of it slides"}


def test_what_a_graph_makes_is_kept_in_it():
    def made(q, k, v):
        return attend(q, k, v), k * 1, v * 1

    gm, context = after(made, Q, K, V)
    assert operators(gm)["first_and_last"] == len(context.regions)


def rolled(k_cache, v_cache, q, k, v, at):
    for cache, tokens in ((k_cache, k), (v_cache, v)):
        cache.copy_(cache.roll(-3, 2))
        write(cache, tokens, at)
    return attend(q, k_cache, v_cache)


def sliced(k_cache, v_cache, q, k, v, at):
    k_cache[:, :, 2:5], v_cache[:, :, 2:5] = k, v
    return attend(q, k_cache, v_cache)


def by_sequence(k_cache, v_cache, q, k, v, at):
    k_cache.index_copy_(0, at[:2], k_cache.new_ones(2, 4, 9, 8))
    v_cache.index_copy_(0, at[:2], v_cache.new_ones(2, 4, 9, 8))
    return attend(q, k_cache, v_cache)


REASONS = {
    rolled: "copy_ writes it elsewhere than at positions along one dimension",
    sliced: "setitem writes it elsewhere than at positions along one dimension",
    by_sequence: "its reads do not say which tokens are the last",
}


@pytest.mark.parametrize("step", REASONS, ids=lambda step: step.__name__)
def test_other_writes_leave_codes_alone_and_the_report_says_why(step):
    gm, context = after(Cache(step), Q, K, V, AT)
    assert len(context.sites) == 2 and not context.regions
    assert {said for _, said in context.kept} == {REASONS[step]}
    assert not operators(gm)["remember"]
    (read,) = gm.graph.find_nodes(op="call_function", target=ops.attend)
    assert not read.kwargs


@pytest.mark.parametrize("options", [{"disable": ("regions",)}, {"sinks": 0, "window": 0}], ids=["disabled", "none"])
def test_nothing_is_kept_unless_asked(options):
    gm, context = after(Cache(positioned), Q, K, V, AT, **options)
    assert not context.regions and not context.kept and not operators(gm)["remember"]


def test_a_read_of_the_first_tokens_reads_them_and_one_of_the_last_reads_codes():
    def reads(k_cache, v_cache, q, k, v, at):
        write(k_cache, k, at), write(v_cache, v, at)
        first = F.scaled_dot_product_attention(q, k_cache[:, :, :6], v_cache[:, :, :6])
        return first, F.scaled_dot_product_attention(q, k_cache[:, :, 3:], v_cache[:, :, 3:])

    gm, _ = after(Cache(reads), Q, K, V, AT)
    first, last = gm.graph.find_nodes(op="call_function", target=ops.attend)
    assert first.kwargs["exact"] and not last.kwargs


READS = {
    "heads cut": (lambda x: x.narrow(1, 1, 2), 4),
    "heads cut and repeated": (lambda x: x.narrow(1, 0, 2).repeat(1, 2, 1, 1), 4),
    "heads cut, then tokens": (lambda x: x.narrow(1, 0, 2).narrow(2, 1, 5), 0),
    "tokens cut": (lambda x: x.narrow(2, 2, 5), 0),
    "tokens repeated": (lambda x: x.repeat(1, 1, 2, 1), 0),
}


@pytest.mark.parametrize("name", READS)
def test_a_view_that_has_all_tokens_where_they_were_has_those_that_are_kept(name):
    view, kept = READS[name]

    def step(k_cache, v_cache, q, k, v, at):
        write(k_cache, k, at), write(v_cache, v, at)
        keys = view(k_cache)
        return attend(q[:, : keys.shape[1]], keys, view(v_cache)) + attend(q, k_cache, v_cache).mean()

    gm, _ = after(Cache(step), Q, K, V, AT)
    first, second = gm.graph.find_nodes(op="call_function", target=ops.attend)
    assert len(first.kwargs.get("exact", ())) == kept and len(second.kwargs["exact"]) == 4


def test_a_step_that_is_fused_hands_on_its_query_as_it_is():
    gm, _ = after(Cache(positioned), Q, K, V, AT, keys="turboquant:4", values="turboquant:3")
    (read,) = gm.graph.find_nodes(op="call_function", target=ops.attend)
    (step,) = gm.graph.find_nodes(op="call_function", target=ops.append_step)
    assert read.kwargs["asked"] is step.args[4] and read.args[0] is step


def test_a_gpu_launches_what_reads_them_and_hides_them_from_codes():
    gm, context = after(Cache(positioned), Q, K, V, AT, keys="turboquant:4", values="turboquant:3")
    sources = kernel_sources(gm, context.sites)
    assert "exact_none_mask" in sources and "attend_turboquant_4_turboquant_3_8_8_bool_mask" in sources
