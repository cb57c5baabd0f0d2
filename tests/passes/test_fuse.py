"""Which writes are joined with the rotation of the query that follows them, and which may not be."""

import pytest
import torch
from graphs import operators, passed
from test_sites import AT, Cache, K, Q, V, attend, write

CODECS = {"keys": "turboquant:4", "values": "turboquant:3"}


def in_place(kc, vc, q, k, v, at):
    write(kc, k, at), write(vc, v, at)
    return attend(q, kc, vc)


def values_first(kc, vc, q, k, v, at):
    write(vc, v, at), write(kc, k, at)
    return attend(q, kc, vc)


def slices(kc, vc, q, k, v, at):
    kc[:, :, 2:5] = k
    vc[:, :, 2:5] = v
    return attend(q, kc, vc)


def query_last(kc, vc, q, k, v, at):
    write(kc, k, at), write(vc, v, at)
    return attend((q * 2).contiguous(), kc, vc)


def positions_counted_on(kc, vc, q, k, v, at):
    places = at + 1
    write(kc, k, places), write(vc, v, places)
    at.add_(3)
    return attend(q, kc, vc)


def two_layers(kc, vc, q, k, v, at):
    first = in_place(kc, vc, q, k, v, at)
    return in_place(kc, vc, first, k + first, v, at)


JOINED = {in_place: 1, slices: 1, values_first: 1, query_last: 1, positions_counted_on: 1, two_layers: 2}


def keys_read_between(kc, vc, q, k, v, at):
    write(kc, k, at)
    total = kc.sum()
    write(vc, v, at)
    return attend(q, kc, vc) + total


def another_read_after_the_writes(kc, vc, q, k, v, at):
    write(kc, k, at), write(vc, v, at)
    return attend(q, kc, vc), attend(q + kc.mean(), kc, vc)


def other_positions(kc, vc, q, k, v, at):
    write(kc, k, at), write(vc, v, at + 1)
    return attend(q, kc, vc)


def keys_changed_after_they_were_written(kc, vc, q, k, v, at):
    write(kc, k, at)
    k.zero_()
    write(vc, v, at)
    return attend(q, kc, vc)


def positions_changed_after_a_write(kc, vc, q, k, v, at):
    places = at.clone()
    write(kc, k, places), write(vc, v, places)
    places.zero_()
    return attend(q, kc, vc) + places[0]


def written_twice(kc, vc, q, k, v, at):
    write(kc, k, at), write(kc, k + 1, at), write(vc, v, at)
    return attend(q, kc, vc)


def zeroed_after_a_write(kc, vc, q, k, v, at):
    write(kc, k, at), write(vc, v, at)
    vc.zero_()
    return attend(q, kc, vc)


def zeroed_under_a_narrow_view(kc, vc, q, k, v, at):
    kn, vn = kc.narrow(2, 0, 6), vc.narrow(2, 0, 6)
    write(kn, k, at), write(vn, v, at)
    kc.zero_()
    return attend(q, kn, vn)


def whole_cache_read_before_a_narrow_view(kc, vc, q, k, v, at):
    kn, vn = kc.narrow(2, 0, 6), vc.narrow(2, 0, 6)
    write(kn, k, at), write(vn, v, at)
    return attend(q + attend(q, kc, vc), kn, vn)


def part_read_after_a_write(kc, vc, q, k, v, at):
    write(kc, k, at), write(vc, v, at)
    return attend(q, kc[:, :, :6], vc[:, :, :6])


def written_again_through_a_narrow_view(kc, vc, q, k, v, at):
    kn = kc.narrow(2, 0, 6)
    write(kc, k, at), write(vc, v, at), write(kn, k + 1, at)
    return attend(q, kc, vc)


def rows_picked_by_a_tensor(kc, vc, q, k, v, at):
    write(kc, k, at), write(vc, v, at)
    picked = kc[torch.tensor([1, 0])]
    return attend(q, kc, vc) + picked[:, :, :3]


APART = {
    written_again_through_a_narrow_view: 0,
    rows_picked_by_a_tensor: 0,
    zeroed_under_a_narrow_view: 0,
    whole_cache_read_before_a_narrow_view: 1,
    part_read_after_a_write: 1,
    keys_read_between: 0,
    another_read_after_the_writes: 1,
    other_positions: 0,
    keys_changed_after_they_were_written: 0,
    positions_changed_after_a_write: 0,
    written_twice: 1,
    zeroed_after_a_write: 0,
}


@pytest.mark.parametrize("step", [*JOINED, *APART], ids=lambda step: step.__name__)
def test_writes_are_joined_where_nothing_happens_between_them_and_attention(step):
    after, _, _ = passed(Cache(step), Q, K.clone(), V, AT.clone(), **CODECS)
    counted = operators(after)
    assert counted["append_step.default"] + counted["append_step"] == {**JOINED, **APART}[step]


@pytest.mark.parametrize("step", [*JOINED, *APART], ids=lambda step: step.__name__)
def test_a_joined_step_returns_what_the_single_ones_do(step):
    torch._dynamo.reset()
    results = []
    for disable in ((), "fuse"):
        model = Cache(step)
        options = {**CODECS, "inner": "aot_eager", "disable": disable}
        compiled = torch.compile(model, backend="turboquant", options=options)
        with torch.no_grad():
            results.append([compiled(Q, K.clone(), V, AT.clone()) for _ in range(2)])
        results[-1].append(model.k.clone())
        torch._dynamo.reset()
    torch.testing.assert_close(*results)


def test_a_growing_cache_is_joined_too():
    def step(pk, pv, q, k, v):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k, v

    after, _, _ = passed(step, torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), Q, K, V, **CODECS)
    counted = operators(after)
    assert counted["append_step.default"] + counted["append_step"] == 1


def test_keys_without_a_rotation_are_written_alone():
    after, _, _ = passed(Cache(in_place), Q, K, V, AT, keys="q8_0", values="turboquant:4")
    counted = operators(after)
    assert counted["append.default"] + counted["append"] == 2
