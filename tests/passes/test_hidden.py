"""Scores that are written in place and weights that are set to zero go into attention, where nothing else sees them."""

import pytest
import torch
from conversations import fake_quantised
from graphs import operators, passed
from test_compress import stepping
from test_sites import AT, Cache, K, Q, V

import tqcompile

LEAST, NEVER = torch.finfo(torch.float32).min, float("-inf")
BIAS = torch.randn(2, 4, 3, 9)
KEPT = torch.ones(2, 9, dtype=torch.int64)
KEPT[0, 5:] = 0
FUTURE = torch.ones(3, 9, dtype=torch.bool).triu(4)
# The middle query of each head sees nothing.
HIDDEN = FUTURE.clone()
HIDDEN[1] = True
CODECS = ("identity", "identity"), ("turboquant:4", "q8_0")


def by_its_old_name(q, k, v):
    scores = q / 2 @ k.mT
    scores.masked_fill_((KEPT == 0).view(2, 1, 1, -1).expand_as(scores), LEAST)
    return scores.float().softmax(-1).type_as(scores) @ v


def again_and_again(q, k, v):
    scores = q @ k.mT
    scores.mul_(0.3)
    scores.add_(BIAS)
    scores.masked_fill_(HIDDEN, LEAST)
    return scores.softmax(-1) @ v


def a_name_beside_it(q, k, v):
    scores = kept = q @ k.mT
    scores /= 3
    kept += BIAS
    return scores.softmax(-1) @ v


def biases_of_its_dtype(q, k, v):
    scores = q @ k.mT
    return (scores + BIAS.double().type_as(scores) + BIAS[0].double().to(scores)).softmax(-1) @ v


def zero_by_the_same_mask(q, k, v):
    return (q @ k.mT + BIAS).masked_fill(HIDDEN, NEVER).softmax(-1).masked_fill(HIDDEN, 0) @ v


def zero_by_a_mask_made_anew(q, k, v):
    scores = (q @ k.mT).masked_fill(KEPT.view(2, 1, 1, 9) == torch.tensor(0), torch.scalar_tensor(NEVER))
    return scores.softmax(-1).masked_fill(KEPT.view(2, 1, 1, 9) == torch.tensor(0), torch.scalar_tensor(0)) @ v


def zero_behind_the_least(q, k, v):
    return (q @ k.mT * 0.4).masked_fill(HIDDEN, LEAST).softmax(-1).masked_fill(HIDDEN, 0.0) @ v


def zero_in_place(q, k, v):
    weights = (q @ k.mT).masked_fill_(HIDDEN, LEAST).softmax(-1)
    weights.masked_fill_(HIDDEN, 0.0)
    return weights @ v


def zero_where_nothing_is_kept(q, k, v):
    seen = ~HIDDEN
    weights = torch.where(seen, q @ k.mT, LEAST).softmax(-1)
    return torch.where(seen, weights, 0.0) @ v


def zero_and_a_bias_behind(q, k, v):
    return (torch.where(HIDDEN, NEVER, q @ k.mT) + BIAS).softmax(-1).masked_fill(HIDDEN, 0) @ v


def zero_beside_a_logit(q, k, v):
    scores = torch.cat([(q @ k.mT).masked_fill(HIDDEN, LEAST), q[..., :1]], -1)
    return scores.softmax(-1)[..., :-1].masked_fill(HIDDEN, 0) @ v


TAKEN = [
    by_its_old_name,
    again_and_again,
    a_name_beside_it,
    biases_of_its_dtype,
    zero_by_the_same_mask,
    zero_by_a_mask_made_anew,
    zero_behind_the_least,
    zero_in_place,
    zero_where_nothing_is_kept,
    zero_and_a_bias_behind,
    zero_beside_a_logit,
]


def compare(read, codecs, inner="eager"):
    model, twin = stepping(read), stepping(read)
    backend = tqcompile.turboquant(keys=codecs[0], values=codecs[1], inner=inner, strict=True)
    with torch.no_grad():
        ours, stored = torch.compile(model, backend=backend)(Q, K, V, AT), map(fake_quantised, (K, V), codecs)
        torch.testing.assert_close(ours, twin(Q, *stored, AT), rtol=1e-4, atol=1e-5)
    return tqcompile.report(model)


@pytest.mark.parametrize("codecs", CODECS, ids="/".join)
@pytest.mark.parametrize("read", TAKEN, ids=lambda read: read.__name__)
def test_hidden_tokens_go_into_attention(read, codecs):
    report = compare(read, codecs)
    assert sum(graph.reads for graph in report.graphs) == 1 and not report.fallbacks


@pytest.mark.parametrize("read", TAKEN, ids=lambda read: read.__name__)
def test_nothing_is_left_of_how_they_were_hidden(read):
    after, _, _ = passed(stepping(read), Q, K, V, AT)
    counted = operators(after)
    assert counted["attend"] == 1 and not {"softmax", "masked_fill_", "logits", "mix"} & counted.keys()


def a_view_from_before(q, k, v):
    scores = q @ k.mT
    shown = scores.view(8, 3, 9)
    scores.masked_fill_(HIDDEN, LEAST)
    return shown.softmax(-1).view(2, 4, 3, 9) @ v


def a_cast_from_before(q, k, v):
    """Which is the tensor itself in float32, and would not be in another dtype."""
    scores = q @ k.mT
    shown = scores.float()
    scores.masked_fill_(HIDDEN, LEAST)
    return shown.softmax(-1) @ v


def a_view_that_is_written(q, k, v):
    scores = q @ k.mT
    scores[:, 1:].mul_(2)
    return scores.softmax(-1) @ v


def a_view_that_is_read_last(q, k, v):
    scores = q @ k.mT
    shown = scores[:, :, :, 2:]
    scores.mul_(2)
    return scores.softmax(-1) @ v + shown.sum()


def scores_from_before(q, k, v):
    scores = q @ k.mT
    weights = scores.softmax(-1)
    scores.mul_(2)
    return weights @ v + scores.sum()


def scores_that_are_read_last(q, k, v):
    scores = q @ k.mT
    scores.mul_(2)
    return scores.softmax(-1) @ v + scores.sum()


def a_sum_from_before(q, k, v):
    scores = q @ k.mT
    total = scores.sum()
    scores.mul_(2)
    return scores.softmax(-1) @ v + total


def a_bias_that_is_written(q, k, v):
    scores = q @ k.mT
    bias = BIAS * 2
    bias.add_(scores)
    return bias.softmax(-1) @ v + bias.sum()


def zero_by_another_mask(q, k, v):
    return (q @ k.mT).masked_fill(FUTURE, NEVER).softmax(-1).masked_fill(BIAS > 0, 0) @ v


def zero_by_the_other_half(q, k, v):
    return torch.where(HIDDEN, 0.0, torch.where(HIDDEN, q @ k.mT, NEVER).softmax(-1)) @ v


def zero_by_a_mask_that_changed(q, k, v):
    places = torch.arange(9) + 0
    scores = (q @ k.mT).masked_fill(places.view(1, 9) > 4, NEVER)
    places[:3] = 8
    return scores.softmax(-1).masked_fill(places.view(1, 9) > 4, 0) @ v


def zero_behind_two_masks(q, k, v):
    """A row whose tokens the two of them hide has weights for all, and those of one of them are set to zero."""
    scores = (q @ k.mT).masked_fill(~HIDDEN.roll(1, 0), LEAST).masked_fill(HIDDEN, LEAST)
    return scores.softmax(-1).masked_fill(HIDDEN, 0) @ v


def zero_below_a_floor(q, k, v):
    scores = (q @ k.mT).masked_fill(HIDDEN, NEVER).clamp(min=LEAST)
    return scores.softmax(-1).masked_fill(HIDDEN, 0) @ v


def another_number(q, k, v):
    return (q @ k.mT).masked_fill(HIDDEN, LEAST).softmax(-1).masked_fill(HIDDEN, 0.5) @ v


LEFT = [
    a_view_from_before,
    a_cast_from_before,
    a_view_that_is_written,
    a_view_that_is_read_last,
    scores_from_before,
    scores_that_are_read_last,
    a_sum_from_before,
    a_bias_that_is_written,
    zero_by_another_mask,
    zero_by_the_other_half,
    zero_by_a_mask_that_changed,
    zero_behind_two_masks,
    zero_below_a_floor,
    another_number,
]


@pytest.mark.parametrize("read", LEFT, ids=lambda read: read.__name__)
def test_what_something_else_sees_stays_two_products(read):
    after, _, _ = passed(stepping(read), Q, K, V, AT)
    counted = operators(after)
    assert counted["logits"] == counted["mix"] == 1 and not counted["attend"]
    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compare(read, CODECS[0], inner)


def test_a_mask_that_chance_makes_is_another_one_each_time():
    def read(q, k, v):
        scores = (q @ k.mT).masked_fill(torch.rand(9) > 0.5, NEVER)
        return scores.softmax(-1).masked_fill(torch.rand(9) > 0.5, 0) @ v

    after, _, _ = passed(stepping(read), Q, K, V, AT)
    assert not operators(after)["attend"]


def test_a_size_that_was_compared_while_tracing_reads_no_scores():
    def step(kc, vc, q, k, v, at):
        kc[:, :, at], vc[:, :, at] = k, v
        scores = q @ kc.mT
        if scores.size() != (2, 4, q.shape[2], 9):
            raise ValueError("scores of another shape")
        # From here on the symbol is a number, and no input of the graph.
        return (scores * 0.5 if q.shape[2] == 2 else scores).softmax(-1) @ vc

    for count in (3, 2):
        model = Cache(step)
        backend = tqcompile.turboquant(preset="lossless", inner="eager")
        compiled = torch.compile(model, backend=backend, dynamic=True)
        given = (*(x[:, :, :count] for x in (Q, K, V)), AT[:count])
        with torch.no_grad():
            torch.testing.assert_close(compiled(*given), Cache(step)(*given), rtol=1e-4, atol=1e-5)
        assert [dict(graph.kinds) for graph in tqcompile.report(model).graphs] == [{"attend": 1}]
