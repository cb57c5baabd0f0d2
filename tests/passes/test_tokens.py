"""Which writes by an index along a dimension put whole tokens into a cache."""

import pytest
import torch
from test_sites import AT, Cache, K, Q, V, attend, found, write

import tqcompile

PLACES = torch.rand(2, 4, 9).argsort(-1)[..., :3, None].expand(2, 4, 3, 8)
SCATTERS = {
    "by arguments": lambda cache, k: cache.scatter_(2, PLACES, k),
    "by keywords": lambda cache, k: cache.scatter_(
        dim=-2, index=PLACES.contiguous()[..., :1].repeat(1, 1, 1, 8), src=k
    ),
    "of some sequences": lambda cache, k: cache.scatter_(2, PLACES[:1], k[:1]),
    "into a new tensor": lambda cache, k: cache.copy_(cache.scatter(2, PLACES, k)),
    "into a new tensor, by keywords": lambda cache, k: cache.copy_(torch.scatter(cache, dim=2, index=PLACES, src=k)),
}
OTHER_SCATTERS = {
    "of a number": lambda cache, k: cache.scatter_(2, PLACES, 1.0),
    "of sums": lambda cache, k: cache.scatter_(2, PLACES, k, reduce="add"),
    "of fewer than are given": lambda cache, k: cache.scatter_(2, PLACES[:1], k),
    "of its own tokens": lambda cache, k: cache.scatter_(2, PLACES, cache[:, :, :3].clone()),
    "by channels": lambda cache, k: cache.scatter_(2, PLACES.contiguous(), k),
    "along channels": lambda cache, k: cache.scatter_(3, torch.zeros(2, 4, 3, 8, dtype=torch.int64), k),
}


@pytest.mark.filterwarnings("ignore:The reduce argument")
@pytest.mark.parametrize("name", [*SCATTERS, *OTHER_SCATTERS])
def test_whole_tokens_can_be_scattered(name):
    def step(kc, vc, q, k, v, at):
        (SCATTERS | OTHER_SCATTERS)[name](kc, k), write(vc, v, at)
        return attend(q, kc, vc)

    context = found(Cache(step), Q, K, V, AT)
    assert [site.role for site in context.sites] == ["keys", "values"][name in OTHER_SCATTERS :]
    assert [refusal.reason for refusal in context.refusals] == [
        "scatter_ writes it in a way that no rule follows" for _ in range(name in OTHER_SCATTERS)
    ]


def as_the_model(step):
    """The report of a compiled model that says what the model says."""
    model, twin = Cache(step), Cache(step)
    compiled = torch.compile(model, backend=tqcompile.turboquant(preset="lossless", inner="eager", strict=True))
    with torch.no_grad():
        for start in (0, 2, 5):
            given = Q, K + start, V, AT + start
            torch.testing.assert_close(compiled(*given), twin(*given))
    return tqcompile.report(model)


@pytest.mark.parametrize("name", SCATTERS)
def test_scattered_tokens_are_read_at_their_places(name):
    def step(kc, vc, q, k, v, at):
        SCATTERS[name](kc, k), SCATTERS[name](vc, v)
        return attend(q, kc, vc)

    assert not as_the_model(step).fallbacks


def test_an_index_that_is_written_into_is_read_channel_by_channel():
    def step(kc, vc, q, k, v, at):
        write(kc, k, at), write(vc, v, at)
        places = PLACES[..., :1].repeat(1, 1, 1, 8)
        places[..., 1] = 0
        return attend(q, kc, vc) + attend(q, kc.gather(2, places), vc.gather(2, places))

    assert {fallback.operator for fallback in as_the_model(step).fallbacks} == {"gather"}


def test_tokens_that_an_index_names_are_a_copy():
    def step(kc, vc, q, k, v, at):
        before = kc.gather(2, PLACES), vc.gather(2, PLACES)
        write(kc, k, at), write(vc, v, at)
        return attend(q, kc, vc) + attend(q, *before)

    assert not as_the_model(step).fallbacks
