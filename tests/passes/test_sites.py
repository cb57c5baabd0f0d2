"""Which tensors are found to be caches, what they are used for, and what is refused."""

import pytest
import torch
from graphs import passed

import tqcompile
from tqcompile.backend import _copy
from tqcompile.options import Options
from tqcompile.passes.context import Context
from tqcompile.passes.pipeline import run
from tqcompile.passes.sites import sites

F = torch.nn.functional
Q, K, V = (torch.randn(2, 4, 3, 8) for _ in range(3))
AT = torch.arange(3)


class Cache(torch.nn.Module):
    """Two buffers; `step` says what a call does with them."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.register_buffer("k", torch.zeros(2, 4, 9, 8))
        self.register_buffer("v", torch.zeros(2, 4, 9, 8))

    def forward(self, q, k, v, at):
        return self.step(self.k, self.v, q, k, v, at)


def write(cache, tokens, at):
    cache[:, :, at] = tokens


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def found(function, *args, **options):
    _, context, _ = passed(function, *args, until=sites, **options)
    return context


def test_buffers_that_are_written_and_read_are_two_sites():
    def step(kc, vc, q, k, v, at):
        write(kc, k, at), write(vc, v, at)
        return attend(q, kc, vc)

    context = found(Cache(step), Q, K, V, AT)
    assert [(site.kind, site.role) for site in context.sites] == [("in_place", "keys"), ("in_place", "values")]
    assert not context.refusals


def test_a_past_that_is_continued_and_returned_is_an_append():
    def step(pk, pv, q, k, v):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k, v

    context = found(step, torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), Q, K, V)
    assert [(site.kind, site.role, site.append.dim) for site in context.sites] == [
        ("append", "keys", 2),
        ("append", "values", 2),
    ]


def test_keys_that_leave_the_graph_are_a_cache_that_it_creates():
    def step(q, x, w):
        k, v = x @ w, x @ w * 3
        return attend(q, k, v), k, v, x * 4

    context = found(step, Q, K, torch.randn(8, 8))
    assert [(site.kind, site.role, site.token_dim) for site in context.sites] == [
        ("create", "keys", 2),
        ("create", "values", 2),
    ]


@pytest.mark.parametrize("writes", ["index_copy_", "setitem"])
def test_a_cache_made_inside_is_found_by_its_tensor_whichever_name_it_leaves_under(writes):
    def step(q, k, v, at):
        kc, vc = torch.zeros(2, 4, 9, 8), torch.zeros(2, 4, 9, 8)
        if writes == "index_copy_":
            return attend(q, kc.index_copy_(2, at, k), vc), kc, vc.index_copy_(2, at, v)
        write(kc, k, at), write(vc, v, at)
        return attend(q, kc, vc), kc, vc

    context = found(step, Q, K, V, AT)
    assert sorted(site.role for site in context.sites) == ["keys", "values"]


def test_no_cache_is_seen_where_nothing_is_kept():
    context = found(lambda q, k, v: attend(q, k, v), Q, K, V)
    assert not context.sites and not any(refusal.stands for refusal in context.refusals)


def test_one_tensor_for_keys_and_values_gets_the_codec_of_keys():
    def step(kc, vc, q, k, v, at):
        write(kc, k, at)
        return attend(q, kc, kc)

    assert [site.role for site in found(Cache(step), Q, K, V, AT).sites] == ["both"]
    torch._dynamo.reset()
    (site,) = found(Cache(step), Q, K, V, AT, keys="q8_0", values="identity").sites
    assert site.codec.name == "q8_0"


def test_a_refusal_says_which_cache_why_and_where():
    def step(kc, vc, q, k, v, at):
        write(kc, k, at), write(vc, v, at)
        kc.mul_(0.5)
        return attend(q, kc, vc)

    context = found(Cache(step), Q, K, V, AT)
    (refusal,) = context.refusals
    assert "k" in refusal.name and "mul_" in refusal.reason and "test_sites.py" in refusal.where and refusal.remedy
    assert [site.role for site in context.sites] == ["values"]


def test_two_appends_to_one_past_are_a_fork_and_make_planes_of_their_own():
    def step(pk, pv, q, k, v):
        one, two, values = torch.cat([pk, k], 2), torch.cat([pk, v], 2), torch.cat([pv, v], 2)
        return attend(q, one, values) + attend(q, two, values), one, two, values

    context = found(step, torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), Q, K, V)
    assert [site.kind for site in context.sites] == ["read", "append"] and not context.refusals


def test_a_past_that_is_read_beside_its_continuation_is_copied():
    def step(pk, pv, q, k, v):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v) + attend(q, pk, pv), k, v

    context = found(step, torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), Q, K, V)
    assert [(site.kind, site.role) for site in context.sites] == [("read", "keys"), ("read", "values")]
    assert not context.refusals


def test_a_past_whose_continuation_stays_in_the_graph_is_no_cache():
    def step(pk, pv, q, k, v):
        return attend(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2))

    context = found(step, torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), Q, K, V)
    assert not context.sites and not context.refusals


WINDOWS = {
    "a slice": lambda x: x[:, :, -5:],
    "an ellipsis": lambda x: x[..., -5:, :],
    "from the front": lambda x: x[:, :, 1:],
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_window_that_slides_over_a_past_is_an_append(window):
    def step(pk, pv, q, k, v):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), window(k), window(v)

    context = found(step, torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), Q, K, V)
    assert [(site.kind, site.role) for site in context.sites] == [("append", "keys"), ("append", "values")]


def test_a_window_that_is_made_in_the_graph_is_created_by_what_attention_reads():
    def step(q, x, w):
        k, v = x @ w, x @ w * 3
        return attend(q, k, v), k[:, :, -2:], v[:, :, -2:]

    context = found(step, Q, K, torch.randn(8, 8))
    assert [(site.kind, site.role) for site in context.sites] == [("create", "keys"), ("create", "values")]
    assert all(site.root.meta["example_value"].shape[2] == 2 and site.token_dim is None for site in context.sites)


def test_a_roll_with_a_token_written_and_copied_back_is_a_write_in_place():
    def step(kc, vc, q, k, v, at):
        for cache, token in ((kc, k), (vc, v)):
            rolled = cache.roll(-1, dims=-2)
            rolled[:, :, torch.tensor([-1])] = token[:, :, :1]
            cache.copy_(rolled)
        return attend(q, kc, vc)

    context = found(Cache(step), Q, K, V, AT)
    assert [(site.kind, site.role) for site in context.sites] == [("in_place", "keys"), ("in_place", "values")]


def test_rows_that_a_list_names_are_written_by_no_rule():
    def step(kc, vc, q, k, v, at):
        kc[[1, 0]] = kc + k[:, :, :1]
        write(vc, v, at)
        return attend(q, kc, vc)

    context = found(Cache(step), Q, K, V, AT)
    assert [site.role for site in context.sites] == ["values"] and "setitem" in context.refusals[0].reason


def test_a_cache_that_is_copied_onto_itself_stays_dense():
    def step(kc, vc, q, k, v, at):
        kc[:, :, :-1] = kc[:, :, 1:]
        write(vc, v, at)
        return attend(q, kc, vc)

    context = found(Cache(step), Q, K, V, AT)
    assert [site.role for site in context.sites] == ["values"] and "setitem" in context.refusals[0].reason


def test_scores_that_no_softmax_follows_are_no_attention():
    def step(kc, vc, q, k, v, at):
        write(kc, k, at), write(vc, v, at)
        best = (q @ kc.mT).relu().sum(2).topk(2).indices
        return attend(q, vc, vc).sum() + best

    context = found(Cache(step), Q, K, V, AT)
    assert [site.role for site in context.sites] == ["both"] and "_buffers['k']" in context.refusals[0].name


def test_scores_that_leave_the_graph_are_read_by_the_next():
    def step(kc, vc, q, k, v, at):
        write(kc, k, at)
        return q @ kc.mT * 0.5

    assert [site.role for site in found(Cache(step), Q, K, V, AT).sites] == ["keys"]


def test_a_tensor_that_is_computed_from_one_of_its_size_is_not_encoded_anew():
    def step(q, cache, k, v, here):
        cache = torch.where(here, k, cache)
        return attend(q, cache, cache), cache

    context = found(step, Q, K, K + 1, V, torch.rand(3, 1) < 0.5, strict=True)
    assert not context.sites and "codes of codes" in context.refusals[0].reason


def test_a_state_that_a_graph_makes_and_multiplies_with_is_no_cache():
    def step(q, k, v):
        state = k.mT @ v
        return q @ state, state

    context = found(step, Q, K, V)
    assert not context.sites and not context.refusals


def test_a_dimension_that_is_an_input_of_the_graph_is_no_trouble():
    graphs = []

    def backend(gm, example_inputs):
        after, context = _copy(gm), Context(Options(preset="lossless"))
        run(after, context)
        graphs.append(context)
        return gm.forward

    with torch.no_grad():
        torch.compile(lambda q, cos, dim: q * cos.unsqueeze(dim), backend=backend, dynamic=True)(Q, V[:, 0], 1)
    assert len(graphs) == 1


def test_features_that_grow_along_heads_or_lie_on_a_map_are_no_caches():
    def grown(skip, q, x):
        h = torch.cat([skip, x], 1)
        return attend(q, h, h), h

    assert not found(grown, K, torch.randn(2, 8, 3, 8), K).sites
    torch._dynamo.reset()

    def pooled(image, w, q):
        features = image.permute(0, 2, 3, 1) @ w
        places = features.flatten(1, 2)
        return attend(q, places, places), features

    assert not found(pooled, torch.randn(2, 8, 4, 4), torch.randn(8, 8), torch.randn(2, 1, 8)).sites


def test_a_state_that_is_written_by_parts_is_no_cache():
    def step(kc, vc, q, k, v, at):
        write(kc, k, at)
        vc[:1] = vc[:1] * 0.9 + v[:1, :, :1]
        return attend(q, kc, vc)

    context = found(Cache(step), Q, K, V, AT)
    assert [site.role for site in context.sites] == ["keys"] and "recurrent" in context.refusals[0].reason


def _two_regions(q, k, v, at, state):
    """A cache of four places that stay and eight that are written anew: both are views of the tensor that is read."""
    if state is None:
        state = []
        for tokens in (k, v):
            whole = tokens.new_zeros(2, 4, 12, 8)
            whole[:, :, :4].index_copy_(2, at, tokens)
            state += [whole, whole[:, :, 4:]]
    else:
        state[1].index_copy_(2, at - 4, k)
        state[3].index_copy_(2, at - 4, v)
    mask = torch.arange(12) <= at.unsqueeze(-1)
    return torch.nn.functional.scaled_dot_product_attention(q, state[0], state[2], mask), state


def test_tensors_that_leave_a_graph_beside_a_part_of_them_stay_dense():
    torch.compiler.reset()
    compiled = torch.compile(_two_regions, backend=tqcompile.turboquant(preset="lossless", inner="eager"))
    ours = theirs = None
    with torch.no_grad():
        for start, tokens in ((0, 4), (4, 1), (5, 2), (7, 1)):
            given = *torch.randn(3, 2, 4, tokens, 8).unbind(), torch.arange(start, start + tokens)
            found, ours = compiled(*given, ours)
            expected, theirs = _two_regions(*given, theirs)
            torch.testing.assert_close(found, expected)
    assert not any(isinstance(cache, tqcompile.CompressedKV) for cache in ours)
    assert "it is returned beside a part of it" in str(tqcompile.report())
