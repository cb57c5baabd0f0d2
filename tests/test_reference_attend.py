"""Attention over codes in plain torch is dense attention over what they decode to."""

import math

import pytest
import torch
from vectors import EVERY_CODEC, HEAD_DIMS, normal, rows

from tqcompile import coding, reference, tables
from tqcompile.formats import PRESETS, codec

# --- attend


def dense(q, k, v, mask=None, causal=False, scale=1.0, change=lambda scores: scores, sinks=None):
    """Attention in float64, with zeros for a query that sees nothing."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = change(q.double() @ k.transpose(-1, -2) * scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().expand(*scores.shape[:-1], 1)], -1)
    return torch.nan_to_num(scores.softmax(-1), 0.0)[..., : k.shape[2]] @ v


class Case:
    """Random compressed keys and values, a query, and both sides of the comparison."""

    def __init__(self, pair=PRESETS["balanced"].pair, shape=(2, 4, 2, 3, 37), dims=(64, 64), dtype=torch.float32):
        batch, heads, kv_heads, queries, length = shape
        self.codecs = tuple(codec(name) for name in pair)
        self.dims, self.shape = dims, (batch, heads, queries, length)
        self.q = rows(self.codecs[0], batch, heads, queries, dims[0], seed=1, dtype=dtype)
        self.keys, self.values = (
            coding.encode(c, rows(c, batch, kv_heads, length, dim, seed=seed, dtype=dtype))
            for c, dim, seed in zip(self.codecs, dims, (2, 3))
        )
        self.scale = dims[0] ** -0.5

    def attend(self, mask=None, causal=False, **more):
        operands = (self.q, self.keys, self.values, mask, causal, self.scale, *self.codecs, self.dims)
        return reference.attend(*operands, **more)

    def truth(self, mask=None, causal=False, **more):
        k, v = (coding.decode(*each) for each in zip(self.codecs, (self.keys, self.values), self.dims))
        return dense(self.q, k, v, mask, causal, self.scale, **more)

    def check(self, mask=None, causal=False):
        out = self.attend(mask, causal)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), self.truth(mask, causal), rtol=1e-4, atol=2e-6)


@pytest.fixture(params=["whole", "blocks"])
def path(request, monkeypatch):
    """Both ways through `attend`: all scores at once, and a running softmax over blocks of 64 tokens."""
    if request.param == "blocks":
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1)
    return request.param


@EVERY_CODEC
@pytest.mark.parametrize("causal", [False, True])
def test_attend_is_dense_attention_on_what_decodes(codec, causal, path):
    Case((codec.name, codec.name), shape=(1, 4, 2, 70, 70), dims=(48, 48)).check(causal=causal)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 7, 8])
def test_attend_serves_any_number_of_query_heads_to_a_key_head(groups, path):
    Case(shape=(2, 2 * groups, 2, 2, 70)).check()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attend_takes_any_head_dim(head_dim, path):
    Case(shape=(1, 4, 2, 2, 70), dims=(head_dim, head_dim)).check()


@pytest.mark.parametrize("dims", [(192, 128), (48, 80), (80, 32)])
def test_keys_and_values_may_differ_in_head_dim_and_codec(dims, path):
    Case(("q8_0", "turboquant:4"), dims=dims, shape=(1, 4, 2, 2, 70)).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["identity", "q8_0", "turboquant:4"])
def test_a_half_precision_query_loses_nothing_to_the_scale(name, dtype, path):
    Case((name, name), dims=(80, 80), dtype=dtype, shape=(1, 4, 2, 2, 70)).check()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_are_capped_before_masks_and_sinks_join_the_softmax(causal, masked, path):
    case = Case(shape=(2, 4, 2, 3, 70))
    mask = normal(2, 1, 3, 70, seed=5) if masked else None
    for sinks in (None, normal(2, 4, 3, 1, seed=6), normal(1, 4, 1, 1, seed=7) * 20):
        out = case.attend(mask, causal, score_mod="tanh(score / 0.3) * 0.3", sinks=sinks)
        truth = case.truth(mask, causal, change=lambda scores: torch.tanh(scores / 0.3) * 0.3, sinks=sinks)
        torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=2e-6)


def test_a_query_that_sees_nothing_but_its_sink_gets_zeros(path):
    case = Case(shape=(1, 4, 2, 3, 130))
    keep = torch.ones(3, 130, dtype=torch.bool)
    keep[1] = False
    for logit in (0.0, -math.inf):
        sinks = torch.full((1, 4, 1, 1), logit)
        out = case.attend(keep, sinks=sinks)
        assert torch.equal(out[:, :, 1], torch.zeros(1, 4, 64))
        torch.testing.assert_close(out.double(), case.truth(keep, sinks=sinks), rtol=1e-4, atol=2e-6)


BROADCASTS = [(), (1,), (2, 4), (2, 1), (1, 4), (1, 1)]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("leading", BROADCASTS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "half"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_any_kind_and_broadcast_are_honoured(queries, leading, kind, causal, path):
    case = Case(shape=(2, 4, 2, 3, 70))
    keep = normal(*leading[-2:], queries, 70, seed=5) > -0.5
    bias = normal(*keep.shape, seed=6).masked_fill(~keep, -math.inf)
    case.check({"bool": keep, "float": bias, "half": bias.half()}[kind], causal)


@pytest.mark.parametrize("mask_shape", [(2, 1, 1, 1), (1, 1, 3, 1), (70,), (1,)])
def test_a_mask_may_broadcast_over_the_keys_or_have_one_dimension(mask_shape, path):
    case = Case(shape=(2, 4, 2, 3, 70))
    keep = torch.arange(math.prod(mask_shape)).reshape(mask_shape) % 3 != 1
    case.check(keep)
    case.check(normal(*mask_shape))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_nothing_gets_zeros_and_its_neighbours_do_not_notice(kind, path):
    case = Case(shape=(1, 4, 2, 3, 130))
    keep = torch.ones(3, 130, dtype=torch.bool)
    keep[1] = False
    mask = keep if kind == "bool" else torch.zeros(3, 130).masked_fill(~keep, -math.inf)
    case.check(mask)
    assert torch.equal(case.attend(mask)[:, :, 1], torch.zeros(1, 4, 64))


def test_the_smallest_finite_mask_means_what_it_means_to_softmax(path):
    case = Case(shape=(1, 4, 2, 3, 130))
    mask = torch.zeros(3, 130)
    mask[0, :100] = torch.finfo(torch.float32).min
    mask[1] = torch.finfo(torch.float32).min
    out = case.attend(mask)
    torch.testing.assert_close(out[:, :, 0].double(), case.truth(mask)[:, :, 0], rtol=1e-4, atol=2e-6)
    assert out.isfinite().all()


def test_no_keys_give_zeros(path):
    case = Case(shape=(2, 4, 2, 3, 0))
    for mask in (None, torch.ones(3, 0, dtype=torch.bool)):
        assert torch.equal(case.attend(mask), torch.zeros(2, 4, 3, 64))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_block_boundaries_leave_no_trace(length, causal, monkeypatch):
    case = Case(shape=(1, 4, 2, 150, length))
    whole = case.attend(causal=causal)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(case.attend(causal=causal), whole, rtol=1e-4, atol=2e-6)
    case.check(causal=causal)


def test_a_first_block_that_nobody_sees_does_not_spoil_the_next(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1)
    keep = torch.arange(200) >= 130
    Case(shape=(1, 4, 2, 2, 200)).check(keep)


def test_scores_far_beyond_the_range_of_exp_stay_finite(path):
    case = Case(shape=(1, 4, 2, 3, 130))
    case.q = case.q * 1e4
    out = case.attend()
    assert out.isfinite().all()
    # A winner takes all, and float32 scores of 1e4 are known to about 1e-2.
    torch.testing.assert_close(out.double(), case.truth(), rtol=2e-2, atol=2e-2)


def test_a_poisoned_key_poisons_the_queries_that_see_it_and_no_other(path):
    case = Case(("q8_0", "q8_0"), shape=(1, 4, 2, 130, 130))
    k = normal(1, 2, 130, 64, seed=2)
    k[:, :, 100] = math.nan
    case.keys = coding.encode(case.codecs[0], k)
    out = case.attend(causal=True)
    assert out[:, :, :100].isfinite().all()
    assert out[:, :, 100:].isnan().all()


def test_no_more_than_a_block_of_the_cache_is_ever_decoded(path, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 64 * 64 * 2)
    case = Case(shape=(1, 4, 2, 70, 300))
    seen = []

    def watched(codec, planes, head_dim):
        rows = coding.decode(codec, planes, head_dim)
        seen.append(rows.shape[2])
        return rows

    torch.testing.assert_close(case.attend(row_decoder=watched), case.attend())
    assert set(seen) == {60}, "300 tokens in even parts of at most 64"
    assert sum(seen) == 2 * 300


def test_attention_in_the_rotated_space_is_attention_in_the_model_s_own():
    """Rotate q once and the output once, never K or V."""
    case = Case(shape=(1, 4, 2, 3, 70), dims=(80, 48))
    bases = [tables.basis_matrix(c, dim) for c, dim in zip(case.codecs, case.dims)]
    k, v = (
        reference.rotate_back(coding.decode(c, planes, dim), basis, torch.float32)
        for c, planes, dim, basis in zip(case.codecs, (case.keys, case.values), case.dims, bases)
    )
    expected = dense(case.q, k, v, scale=case.scale)
    case.q = reference.rotate(case.q, bases[0])
    out = reference.rotate_back(case.attend(), bases[1], torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@EVERY_CODEC
@pytest.mark.parametrize("length", [0, 1, 64, 65, 200])
def test_logits_and_mix_are_the_two_dense_products(codec, length, path):
    case = Case((codec.name, codec.name), shape=(2, 6, 2, 3, length), dims=(48, 80))
    k = coding.decode(codec, case.keys, 48).double().repeat_interleave(3, 1)
    v = coding.decode(codec, case.values, 80).double().repeat_interleave(3, 1)
    scores = reference.logits(case.q, case.keys, codec, 48)
    torch.testing.assert_close(scores.double(), case.q.double() @ k.transpose(-1, -2), rtol=1e-4, atol=1e-5)
    weights = normal(2, 6, 3, length, seed=9)
    mixed = reference.mix(weights, case.values, codec, 80)
    torch.testing.assert_close(mixed.double(), weights.double() @ v, rtol=1e-4, atol=1e-4)
