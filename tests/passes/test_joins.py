"""Tokens of several caches that are joined to be read: their codes are joined, where all are of one codec."""

import pytest
import torch
from conversations import fake_quantised
from graphs import operators, passed
from test_sites import K, Q, V, attend

import tqcompile
from tqcompile import CompressedKV

F = torch.nn.functional
CODECS = ("identity", "identity"), ("turboquant:4", "q8_0")
NAMES = ("k", "v", "other_k", "other_v")
GIVEN = K, V, K * 0.5 - 1, V.roll(1, 2)
AT, LATER = torch.arange(3), torch.arange(3) + 4


class Two(torch.nn.Module):
    """Two caches of 9 and 6 places that a call writes into before `read` has all four tensors."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        for name in NAMES:
            size = (2, 4, 6 if "other" in name else 9, 8)
            self.register_buffer(name, torch.randn(size, generator=torch.Generator().manual_seed(len(name))))

    def forward(self, q, k, v, other_k, other_v, at):
        self.k[:, :, at], self.v[:, :, at] = k, v
        self.other_k[:, :, :3], self.other_v[:, :, :3] = other_k, other_v
        return self.read(q, self.k, self.v, self.other_k, self.other_v)


def joined(q, k, v, ck, cv):
    return attend(q, torch.cat([k, ck], 2), torch.cat([v, cv], 2))


def the_other_in_front(q, k, v, ck, cv):
    return attend(q, torch.cat([ck, k], 2), torch.cat([cv, v], dim=-2))


def three_times(q, k, v, ck, cv):
    return attend(q, torch.cat([k, ck, k], 2), torch.cat([v, cv, v], 2))


def one_after_the_other(q, k, v, ck, cv):
    k, v = torch.cat([torch.cat([k, ck], 2), ck], 2), torch.cat([cv, torch.cat([v, cv], 2)], 2)
    return attend(q, k, v)


def parts(q, k, v, ck, cv):
    return attend(q, torch.cat([k[:, :, 2:7], ck[:, :, 1:]], 2), torch.cat([v[:, :, :5], cv[:, :, 1:]], 2))


def keys_of_one_alone(q, k, v, ck, cv):
    return attend(q, torch.cat([k, ck], 2), torch.cat([v, v[:, :, :6]], 2)) + attend(q, ck, cv)


def with_heads_repeated(q, k, v, ck, cv):
    k, v = (
        x[:, :2, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (torch.cat([k, ck], 2), torch.cat([v, cv], 2))
    )
    return F.scaled_dot_product_attention(q, k, v, torch.ones(3, 15, dtype=torch.bool).tril(5))


def in_two_products(q, k, v, ck, cv):
    scores = q @ torch.cat([k, ck], 2).mT * 0.3
    return scores.softmax(-1) @ torch.cat([v, cv], 2)


def tokens_in_front_of_heads(q, k, v, ck, cv):
    k, v = (torch.cat([x.transpose(1, 2), y.transpose(1, 2)], 1) for x, y in ((k, ck), (v, cv)))
    return attend(q, k.transpose(1, 2), v.transpose(1, 2))


def heads_of_both(q, k, v, ck, cv):
    k, v = torch.cat([k[:, :1, :6], ck[:, 1:]], 1), torch.cat([v[:, :1, :6], cv[:, 1:]], 1)
    return attend(q, k, v)


def written_afterwards(q, k, v, ck, cv):
    before_k, before_v = torch.cat([k, ck], 2), torch.cat([v, cv], 2)
    k[:, :, 6:], cv[:, :, :3] = k[:, :, :3].clone(), cv[:, :, 3:].clone()
    return attend(q, before_k, before_v) - attend(q, k, v)


TAKEN = [
    joined,
    the_other_in_front,
    three_times,
    one_after_the_other,
    parts,
    keys_of_one_alone,
    with_heads_repeated,
    in_two_products,
    tokens_in_front_of_heads,
    heads_of_both,
    written_afterwards,
]
EVERY_CODEC = pytest.mark.parametrize("codecs", CODECS, ids="/".join)


def compare(read, codecs):
    """Both calls of the compiled model and of its twin, whose caches hold decoded codes; returns the report."""
    model, twin = Two(read), Two(read)
    for name in NAMES:
        held = getattr(twin, name)
        held.copy_(fake_quantised(held, codecs["v" in name]))
    compiled = torch.compile(model, backend=tqcompile.turboquant(keys=codecs[0], values=codecs[1], inner="eager"))
    for at in (AT, LATER):
        stored = [fake_quantised(tokens, codec) for tokens, codec in zip(GIVEN, (*codecs, *codecs))]
        with torch.no_grad():
            torch.testing.assert_close(compiled(Q, *GIVEN, at), twin(Q, *stored, at), rtol=1e-4, atol=1e-5)
    return tqcompile.report(model), model


@EVERY_CODEC
@pytest.mark.parametrize("read", TAKEN, ids=lambda read: read.__name__)
def test_tokens_of_several_caches_are_read_as_codes(read, codecs):
    report, model = compare(read, codecs)
    assert not report.fallbacks and not report.refusals and sum(graph.reads for graph in report.graphs)
    assert all(isinstance(getattr(model, name), CompressedKV) for name in NAMES)


@pytest.mark.parametrize("read", TAKEN, ids=lambda read: read.__name__)
def test_codes_are_joined_and_nothing_is_decoded(read):
    after, _, before = passed(Two(read), Q, *GIVEN, AT, keys="turboquant:4", values="q8_0")
    assert operators(after)["attend"] >= 1 and not operators(after)["decode"]
    # A codec has a plane of codes and one of scalars: as many tensors are joined as there are planes.
    assert operators(after)["cat"] == 2 * operators(before)["cat"]


def beside_numbers_of_no_cache(q, k, v, ck, cv):
    return attend(q, torch.cat([k, q], 2), torch.cat([v, q * 2], 2)) + attend(q, ck, cv)


def changed_after_it_was_joined(q, k, v, ck, cv):
    keys, values = torch.cat([k, ck], 2), torch.cat([v, cv], 2)
    keys[:, :, :3] = q
    values.mul_(2)
    return attend(q, keys, values)


def beside_a_cache_that_stays_dense(q, k, v, ck, cv):
    ck.mul_(0.5), cv.mul_(0.5)
    return joined(q, k, v, ck, cv)


DECODED = {
    beside_numbers_of_no_cache: ("k", "v"),
    changed_after_it_was_joined: ("k", "v", "other_k", "other_v"),
    beside_a_cache_that_stays_dense: ("k", "v"),
}


@pytest.mark.parametrize("read", DECODED, ids=lambda read: read.__name__)
def test_what_codes_cannot_be_joined_for_is_decoded(read):
    # What stays dense is not what the twin quantises.
    report, model = compare(read, CODECS[read is not beside_a_cache_that_stays_dense])
    assert {(fall.name.split("'")[-2], fall.operator) for fall in report.fallbacks} == {
        (name, "cat") for name in DECODED[read]
    }
    dense = {name for name in NAMES if not isinstance(getattr(model, name), CompressedKV)}
    assert dense == ({"other_k", "other_v"} if read is beside_a_cache_that_stays_dense else set())


@pytest.mark.parametrize("codecs", [("q8_0", "turboquant:4"), ("turboquant:4", "q8_0")], ids="/".join)
def test_caches_of_two_codecs_are_decoded_before_they_are_joined(codecs):
    """The other cache was encoded by a model that was compiled with other options."""
    k, v = (torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    given = [CompressedKV.encode(x, tqcompile.formats.codec(codec)) for x, codec in zip((k, v), codecs)]
    dense = [fake_quantised(x, codec) for x, codec in zip((k, v), codecs)]
    model, twin = (OneAndGiven() for _ in range(2))
    compiled = torch.compile(model, backend=tqcompile.turboquant(keys="turboquant:4", values="q8_0", inner="eager"))
    with torch.no_grad():
        stored = [fake_quantised(x, codec) for x, codec in zip((K, V), ("turboquant:4", "q8_0"))]
        torch.testing.assert_close(compiled(Q, K, V, *given), twin(Q, *stored, *dense), rtol=1e-4, atol=1e-5)
    alike = codecs == ("turboquant:4", "q8_0")
    report = tqcompile.report(model)
    assert bool(report.fallbacks) != alike and sum(graph.reads for graph in report.graphs) == alike


class OneAndGiven(torch.nn.Module):
    """A cache of its own, and one that the caller holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("k", torch.zeros(2, 4, 3, 8))
        self.register_buffer("v", torch.zeros(2, 4, 3, 8))

    def forward(self, q, k, v, given_k, given_v):
        self.k[:, :, AT], self.v[:, :, AT] = k, v
        return attend(q, torch.cat([self.k, given_k], 2), torch.cat([self.v, given_v], 2))


def grows(q, k, v, pk, pv, given_k, given_v):
    """A window of 5 that slides, and another cache behind it."""
    k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
    out = attend(q, torch.cat([k, given_k], 2), torch.cat([v, given_v], 2))
    return out, k[:, :, -5:], v[:, :, -5:]


@pytest.mark.parametrize("codecs", CODECS, ids="/".join)
def test_what_is_made_together_is_compressed_and_joined_from_then_on(codecs):
    """An encoder's keys and values are read only behind those that grow."""

    def first(q, k, v, w):
        k, v, given_k, given_v = k @ w, v @ w, q @ w, q @ w - 1
        return attend(q, torch.cat([k, given_k], 2), torch.cat([v, given_v], 2)), k, v, given_k, given_v

    how = tqcompile.turboquant(keys=codecs[0], values=codecs[1], inner="eager")
    call, step = torch.compile(first, backend=how), torch.compile(grows, backend=how)
    w = torch.eye(8) * 1.5
    with torch.no_grad():
        out, *caches = call(Q, K, V, w)
        expected, *dense = first(Q, K, V, w)
        torch.testing.assert_close(out, expected)
        assert all(isinstance(cache, CompressedKV) for cache in caches)
        dense = [fake_quantised(x, codec) for x, codec in zip(dense, (*codecs, *codecs))]
        for _ in range(3):
            out, *caches[:2] = step(Q, K, V, *caches)
            stored = [fake_quantised(x, codec) for x, codec in zip((K, V), codecs)]
            expected, *dense[:2] = grows(Q, *stored, *dense)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    report = tqcompile.report()
    assert not report.fallbacks and [graph.reads for graph in report.graphs][-1] == 1


def test_caches_whose_codes_are_joined_keep_no_tokens_beside_them_and_are_not_centred():
    options = {"keys": "turboquant:4", "values": "q8_0", "sinks": 2, "window": 3, "centre": True}
    after, context, _ = passed(Two(joined), Q, *GIVEN, AT, **options)
    assert {reason for _, reason in context.kept} == {"codes of it are joined with others"} and len(context.kept) == 4
    assert len(context.uncentred) == 2 and not context.centres and operators(after)["attend"] == 1


def test_numbers_that_nobody_keeps_are_joined_as_they_are():
    def step(pk, pv, q, k, v, x, y):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v) + attend(q, torch.cat([x, y], 2), torch.cat([y, x], 2)), k, v

    given = [torch.randn(2, 4, 3, 8) for _ in range(7)]
    after, context, _ = passed(step, *given, keys="turboquant:4", values="q8_0")
    assert not context.fallbacks and operators(after)["scaled_dot_product_attention"] == 1
    assert [site.kind for site in context.sites] == ["append", "append"]


@EVERY_CODEC
def test_what_is_joined_to_be_decoded_is_not_encoded_first(codecs):
    """As tokens of a stream of its own, behind those of a cache, that leave the graph in a tensor of all streams."""

    def read(q, k, v, own, other):
        streams = [torch.cat([v, each], 2).unsqueeze(2) for each in (own, other)]
        return attend(q, k, v), torch.cat(streams, 2)

    class Streams(torch.nn.Module):
        def forward(self, q, k, v, own, other, keys, values):
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            return *read(q, keys, values, own, other), keys, values

    given = Q, K, V, V * 0.7, V + 1, torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    gm, context, _ = passed(Streams(), *given, keys=codecs[0], values=codecs[1])
    assert len(context.sites) == 2 and not operators(gm)["encode"]
    model = torch.compile(Streams(), backend=tqcompile.turboquant(keys=codecs[0], values=codecs[1], inner="eager"))
    with torch.no_grad():
        caches = [CompressedKV.encode(x, tqcompile.formats.codec(c)) for x, c in zip(given[-2:], codecs)]
        _, ours, *_ = model(*given[:-2], *caches)
        held = [fake_quantised(x, codecs[1]) for x in (given[-1], V)]
        expected = torch.stack([torch.cat([*held, own], 2) for own in given[3:5]], 2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
