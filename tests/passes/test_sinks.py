"""A logit beside the scores that is spelled behind the values goes into attention, and no other factor does."""

import pytest
import torch
from conversations import fake_quantised
from graphs import operators, passed
from test_compress import stepping
from test_sites import AT, Cache, K, Q, V, attend, write

import tqcompile

SINKS, BIAS = torch.linspace(-2, 3, 4), torch.randn(2, 4, 3, 9)
CODECS = ("identity", "identity"), ("turboquant:4", "q8_0")


def scores_of(q, k):
    return q @ k.mT * 0.4 + BIAS


def a_logit_of_each_head(q, k, v):
    scores = scores_of(q, k)
    factor = (torch.logsumexp(scores, dim=-1) - SINKS.view(1, -1, 1)).to(torch.float32).sigmoid()
    return (torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v) * factor.unsqueeze(-1).to(q.dtype)


def a_column(q, k, v):
    scores = scores_of(q, k)
    factor = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - SINKS.view(4, 1, 1))
    return factor * (scores.softmax(-1) @ v)


def a_column_in_between(q, k, v):
    scores = scores_of(q, k)
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-1)[..., None] - SINKS[:, None, None]).sigmoid()


def a_logit_of_each_query(q, k, v):
    scores = scores_of(q, k)
    return (scores.softmax(-1) @ v).mul_((scores.logsumexp(3) - q[..., 0]).sigmoid().unsqueeze(3))


def in_place(q, k, v):
    scores = scores_of(q, k)
    out = scores.float().softmax(-1) @ v
    out *= (scores.logsumexp(-1) - SINKS[:, None]).sigmoid().unsqueeze(-1)
    return out


def hidden_tokens(q, k, v):
    scores = scores_of(q, k).masked_fill(BIAS > 0, torch.finfo(q.dtype).min)
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-1) - SINKS[:, None]).sigmoid().unsqueeze(-1)


def all_hidden(q, k, v):
    scores = scores_of(q, k).masked_fill(torch.ones(3, 1, dtype=torch.bool), torch.finfo(q.dtype).min)
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-1) - SINKS[:, None]).sigmoid().unsqueeze(-1)


def heads_and_sequences_in_one(q, k, v):
    scores = scores_of(q, k).flatten(0, 1) if q.dim() == 3 else q.flatten(0, 1) @ k.flatten(0, 1).mT
    factor = (scores.logsumexp(-1) - SINKS.repeat(2)[:, None]).sigmoid().unsqueeze(-1)
    return ((scores.softmax(-1) @ v.flatten(0, 1)) * factor).unflatten(0, (2, 4))


def heads_apart_for_a_mask(q, k, v):
    scores = (q.flatten(0, 1) @ k.flatten(0, 1).mT).unflatten(0, (2, 4)) + BIAS
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-1) - SINKS[:, None]).sigmoid().unsqueeze(-1)


TAKEN = [
    a_logit_of_each_head,
    a_column,
    a_column_in_between,
    a_logit_of_each_query,
    in_place,
    hidden_tokens,
    all_hidden,
    heads_and_sequences_in_one,
    heads_apart_for_a_mask,
]


@pytest.mark.parametrize("codecs", CODECS, ids="/".join)
@pytest.mark.parametrize("read", TAKEN, ids=lambda read: read.__name__)
def test_a_logit_spelled_behind_the_values_is_one_beside_the_scores(read, codecs):
    model, twin = stepping(read), stepping(read)
    compiled = torch.compile(
        model, backend=tqcompile.turboquant(keys=codecs[0], values=codecs[1], inner="eager", strict=True)
    )
    with torch.no_grad():
        stored = map(fake_quantised, (K, V), codecs)
        torch.testing.assert_close(compiled(Q, K, V, AT), twin(Q, *stored, AT), rtol=1e-4, atol=1e-5)
    report = tqcompile.report(model)
    assert sum(graph.reads for graph in report.graphs) == 1 and not report.fallbacks


@pytest.mark.parametrize("read", TAKEN, ids=lambda read: read.__name__)
def test_nothing_is_left_of_how_it_was_spelled(read):
    after, _, _ = passed(stepping(read), Q, K, V, AT)
    counted = operators(after)
    assert counted["attend"] == 1 and not {"softmax", "logsumexp", "sigmoid", "logits", "mix"} & counted.keys()


def factor_of(scores, sinks=SINKS[:, None]):
    return (scores.logsumexp(-1) - sinks).sigmoid().unsqueeze(-1)


def other_scores(q, k, v):
    """Those without the mask."""
    scores = q @ k.mT
    return ((scores + BIAS).softmax(-1) @ v) * factor_of(scores)


def scores_that_are_scaled_again(q, k, v):
    scores = scores_of(q, k)
    return ((scores * 2).softmax(-1) @ v) * factor_of(scores)


def the_other_sign(q, k, v):
    scores = scores_of(q, k)
    return (scores.softmax(-1) @ v) * (SINKS[:, None] - scores.logsumexp(-1)).sigmoid().unsqueeze(-1)


def over_the_queries(q, k, v):
    scores = scores_of(q, k)[..., :3]
    factor = (scores.logsumexp(-2) - SINKS[:, None]).sigmoid().unsqueeze(-1)
    return (scores.softmax(-1) @ v[:, :, :3]) * factor


def a_factor_of_each_channel(q, k, v):
    scores = scores_of(q, k)
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-1, keepdim=True) - q).sigmoid()


def a_factor_that_is_used(q, k, v):
    factor = factor_of(scores := scores_of(q, k))
    return (scores.softmax(-1) @ v) * factor + factor


def a_mix_that_is_used(q, k, v):
    mixed = (scores := scores_of(q, k)).softmax(-1) @ v
    return mixed * factor_of(scores) + mixed


def two_logits(q, k, v):
    """Both beside the scores, one in their softmax."""
    scores = scores_of(q, k)
    weights = torch.cat([scores, q[..., :1]], -1).softmax(-1)[..., :-1]
    return (weights @ v) * factor_of(scores)


def another_function(q, k, v):
    scores = scores_of(q, k)
    return (scores.softmax(-1) @ v) * (scores.logsumexp(-1) - SINKS[:, None]).tanh().unsqueeze(-1)


LEFT = [
    other_scores,
    scores_that_are_scaled_again,
    the_other_sign,
    over_the_queries,
    a_factor_of_each_channel,
    a_factor_that_is_used,
    a_mix_that_is_used,
    two_logits,
    another_function,
]


@pytest.mark.parametrize("read", LEFT, ids=lambda read: read.__name__)
def test_any_other_factor_stays_where_it_is(read):
    after, _, before = passed(stepping(read), Q, K, V, AT)
    assert not operators(after)["attend"]
    assert operators(after)["logsumexp"] == operators(before)["logsumexp"] == 1
    torch._dynamo.reset()
    model, twin = stepping(read), stepping(read)
    compiled = torch.compile(model, backend=tqcompile.turboquant(preset="lossless", inner="eager"))
    with torch.no_grad():
        torch.testing.assert_close(compiled(Q, K, V, AT), twin(Q, K, V, AT), rtol=1e-4, atol=1e-5)


def test_a_factor_of_another_softmax_is_one_behind_attention():
    def read(q, k, v):
        return ((q @ k.mT).softmax(-1) @ v) * factor_of(q @ q.mT)

    after, _, _ = passed(stepping(read), Q, K, V, AT)
    assert operators(after)["attend"] == operators(after)["logsumexp"] == operators(after)["mul"] == 1


def test_values_that_are_written_before_the_factor_keep_the_products_apart():
    def step(kc, vc, q, k, v, at):
        write(kc, k, at), write(vc, v, at)
        scores = scores_of(q, kc)
        out = scores.softmax(-1) @ vc
        write(vc, v * 2, at)
        return out * factor_of(scores) + attend(q, kc, vc)

    after, _, _ = passed(Cache(step), Q, K, V, AT)
    assert operators(after)["logits"] == operators(after)["mix"] == operators(after)["attend"] == 1
