"""Calls on caches that others hold, show or continue, and calls that fail."""

import pytest
import torch
from conversations import fake_quantised
from test_runtime import CODECS, LENGTH, STEPS, Talk, append, compiled, in_place, new, numbers, quantised

import tqcompile
from tqcompile import cache as caches
from tqcompile.cache import CompressedKV


def held_by_a_view(keys, others):
    others.append(keys.view(2, -1))
    return keys


def held_by_an_alias(keys, others):
    others.append(keys.detach())
    return keys


def a_part(keys, others):
    whole = torch.cat([keys, keys])
    others.append(whole)
    return whole[:2]


def with_gradients(keys, others):
    return keys.requires_grad_()


@pytest.mark.parametrize(
    "how, reason",
    [
        (lambda keys, others: keys[:], "it is a view of another tensor"),
        (held_by_a_view, "other tensors share its memory"),
        (held_by_an_alias, "other tensors share its memory"),
        (a_part, "it is a view of another tensor"),
        (with_gradients, "it requires grad"),
    ],
    ids=["a view", "held by a view", "held by an alias", "a part", "requires grad"],
)
@pytest.mark.parametrize("late", [False, True], ids=["at compilation", "in a later call"])
def test_a_cache_that_others_see_stays_dense_and_says_so(how, reason, late):
    call = compiled(in_place)
    if late:
        talk = Talk(in_place)
        talk.feed(call), talk.feed(call)
        assert not tqcompile.report().refusals
    others, (keys, values) = [], new()
    keys = how(keys, others)
    twin, dense_so_far = [keys.detach().clone(), values.clone()], True
    for at in range(3):
        q, k, v = (numbers(1, seed=10 * at + place) for place in range(3))
        position = torch.tensor([at])
        with torch.no_grad():
            out = call(q, k, v, position, keys, values)[0]
            if isinstance(values, CompressedKV):
                twin[1] = fake_quantised(twin[1], CODECS[1]) if dense_so_far else twin[1]
                v, dense_so_far = fake_quantised(v, CODECS[1]), False
            torch.testing.assert_close(out, in_place(q, k, v, position, *twin)[0])
    assert type(keys) is torch.Tensor and isinstance(values, CompressedKV)
    assert torch.equal(keys.detach(), twin[0])
    assert all(torch.equal(other.reshape(-1)[: keys.numel()].view_as(keys), keys) for other in others)
    report = tqcompile.report()
    said = {refusal.reason for refusal in report.refusals} | {e for g in report.graphs for e in g.events.values()}
    assert reason in said or (reason == "it requires grad" and "gradients flow through it" in said), said


@STEPS
def test_a_call_that_fails_leaves_the_cache_as_it_was(step):
    def failing(q, k, v, at, keys, values, picked):
        out, keys, values = step(q, k, v, at, keys, values)
        return out.index_select(2, picked), keys, values

    call, talk = compiled(failing), Talk(step)
    good, bad = torch.tensor([0]), torch.tensor([7])
    talk.feed(lambda *args: call(*args, good)), talk.feed(lambda *args: call(*args, good))
    q, k, v = (numbers(1, seed=seed) for seed in (91, 92, 93))
    with torch.no_grad(), pytest.raises(IndexError):
        call(q, k, v, torch.tensor([talk.at]), *talk.held, bad)
    if step is in_place:
        # The write came before the failure, as it does in a dense model.
        step(q, *quantised(k, v, CODECS), torch.tensor([talk.at]), *talk.twin)
    talk.check()
    for _ in range(3):
        talk.feed(lambda *args: call(*args, good))


def test_a_position_outside_of_the_cache_raises_as_dense_does_and_writes_nothing():
    call, talk = compiled(in_place), Talk(in_place)
    talk.feed(call), talk.feed(call)
    q, k, v = (numbers(2, seed=seed) for seed in (91, 92, 93))
    outside = torch.tensor([2, LENGTH])
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
        call(q, k, v, outside, *talk.held)
    for cache, twin in zip(talk.held, talk.twin):
        left = [at for at in range(LENGTH) if at != 2]
        torch.testing.assert_close(cache.decode()[:, :, left], twin[:, :, left])
    talk.feed(call, tokens=2), talk.feed(call)


def test_a_failure_while_caches_are_encoded_leaves_each_of_them_whole(monkeypatch):
    call, talk, encode = compiled(in_place), Talk(in_place), caches.encode_dense
    left = [1]

    def failing(dense, codec):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("no room")
        return encode(dense, codec)

    monkeypatch.setattr(caches, "encode_dense", failing)
    arguments = (*(numbers(1, seed=seed) for seed in (91, 92, 93)), torch.tensor([0]))
    with torch.no_grad(), pytest.raises(MemoryError):
        call(*arguments, *talk.held)
    monkeypatch.undo()
    assert sorted(type(cache).__name__ for cache in talk.held) == ["CompressedKV", "Tensor"]
    for cache, dense, twin in zip(talk.held, new(), talk.twin):
        torch.testing.assert_close(cache * 1, twin if isinstance(cache, CompressedKV) else dense)
    talk.feed(call), talk.feed(call)


@pytest.mark.parametrize("length", [1, 40])
def test_two_continuations_of_one_cache_do_not_see_each_other(length):
    call, left, right = compiled(append), Talk(append), None
    left.feed(call)
    right = Talk(append)
    right.held, right.twin = list(left.held), list(left.twin)
    left.at, right.at = 100, 200
    for tokens in (length, 1, 1):
        left.feed(call, tokens), right.feed(call, tokens)
        left.check(), right.check()


def test_a_write_into_a_cache_that_another_one_continues_stays_its_own():
    grow, write = compiled(append), compiled(in_place)
    old = Talk(append)
    old.feed(grow), old.feed(grow)
    young = Talk(append)
    young.held, young.twin, young.at = list(old.held), list(old.twin), 50
    young.feed(grow)
    old.step, old.at = in_place, 3
    old.twin = [twin.clone() for twin in old.twin]
    old.feed(write), old.feed(write)
    young.check(), old.check()
    young.feed(grow)
    old.check()


def first_tokens(keys):
    return keys[:, :, :6]


def a_view_of_a_view(keys):
    return keys[:, :1].transpose(1, 2)[:, 2:]


@pytest.mark.parametrize("view", [first_tokens, a_view_of_a_view, torch.Tensor.detach])
def test_a_view_sees_a_compiled_write_into_a_cache_that_had_grown(view):
    grow, write = compiled(append), compiled(in_place)
    talk = Talk(append)
    talk.feed(grow), talk.feed(grow)
    shown = view(talk.held[0])
    talk.step, talk.at, talk.twin = in_place, 3, [twin.clone() for twin in talk.twin]
    for tokens in (1, 2):
        talk.feed(write, tokens)
        torch.testing.assert_close(shown.decode(), view(talk.twin[0]))
    assert any("a view of it is alive" in event for g in tqcompile.report().graphs for event in g.events.values())
    del shown
    for graph in tqcompile.report().graphs:
        graph.events.clear()
    talk.feed(write), talk.feed(write)
    assert not any(graph.events for graph in tqcompile.report().graphs)


def test_a_write_that_would_part_a_view_from_its_cache_raises_where_another_continues_that():
    grow, write = compiled(append), compiled(in_place)
    old = Talk(append)
    old.feed(grow)
    young = Talk(append)
    young.held, young.twin, young.at = list(old.held), list(old.twin), 50
    young.feed(grow)
    shown = old.held[0][:, :, :4]
    old.step, old.at = in_place, 3
    with pytest.raises(RuntimeError, match="another continues or shows; clone"):
        old.feed(write)
    young.check(), old.check()
    torch.testing.assert_close(shown.decode(), old.twin[0][:, :, :4])
