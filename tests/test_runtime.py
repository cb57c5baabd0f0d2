"""Calls that a compiled graph was not made for: other codecs, other owners, other modes, and calls that fail."""

import pickle

import pytest
import torch
from models import fake_quantised
from torch import nn

import tqcompile
from tqcompile import cache as caches
from tqcompile import formats
from tqcompile.cache import CompressedKV

CODECS = ("turboquant:4", "q8_0")
LENGTH = 12


def in_place(q, k, v, at, keys, values):
    keys.index_copy_(2, at, k)
    values[:, :, at] = v
    return nn.functional.scaled_dot_product_attention(q, keys, values), keys, values


def append(q, k, v, at, keys, values):
    keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
    return nn.functional.scaled_dot_product_attention(q, keys, values), keys, values


STEPS = pytest.mark.parametrize("step", [in_place, append])


def compiled(step, codecs=CODECS, **options):
    options = {"keys": codecs[0], "values": codecs[1], "inner": "eager", **options}
    return torch.compile(step, backend="turboquant", options=options)


def numbers(tokens, batch=2, head_dim=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, tokens, head_dim, generator=generator).to(dtype)


def new(**like):
    return numbers(LENGTH, seed=1, **like), numbers(LENGTH, seed=2, **like)


def quantised(keys, values, codecs):
    return fake_quantised(keys, codecs[0]), fake_quantised(values, codecs[1])


class Talk:
    """A compressed pair of caches, and the dense pair that its codes stand for."""

    def __init__(self, step, codecs=CODECS, **like):
        self.step, self.codecs, self.like, self.at = step, codecs, like, 0
        self.held, self.twin = list(new(**like)), list(quantised(*new(**like), codecs))

    @torch.no_grad()
    def feed(self, call, tokens=1):
        """One call of `call` on the held pair, compared with the dense function on the twin."""
        q, k, v = (numbers(tokens, seed=10 * self.at + place, **self.like) for place in range(3))
        at = torch.arange(self.at, self.at + tokens)
        out, *self.held = call(q, k, v, at, *self.held)
        k, v = quantised(k, v, self.codecs)
        expected = self.step(*(x.float() for x in (q, k, v)), at, *(twin.float() for twin in self.twin))[0]
        self.twin[:] = self.step(q, k, v, at, *self.twin)[1:]
        self.at += tokens
        # Attention over codes adds up in float32 and is rounded once.
        torch.testing.assert_close(out, expected.to(out.dtype))
        self.check()

    def check(self):
        for cache, twin, codec in zip(self.held, self.twin, self.codecs):
            assert isinstance(cache, CompressedKV) and cache.codec is formats.codec(codec), cache
            torch.testing.assert_close(cache.decode(), twin)


@STEPS
def test_a_cache_keeps_its_codec_when_a_model_compiled_with_other_options_gets_it(step):
    first, second = compiled(step), compiled(step, ("q8_0", "turboquant:2"))
    talk = Talk(step)
    for call in (first, second, first, second, second):
        talk.feed(call)


@STEPS
def test_codecs_whose_planes_have_the_same_shapes_are_told_apart(step):
    """In 32 dimensions both keep 32 bytes and one scale: reading one as the other would raise nothing."""
    codecs = ("turboquant:8", "turboquant:8"), ("q8_0", "q8_0")
    calls = [compiled(step, pair) for pair in codecs]
    talk = Talk(step, codecs[0])
    for call in (*calls, *calls):
        talk.feed(call)
    other = Talk(step, codecs[1])
    for call in (calls[1], *calls, *calls):
        other.feed(call)


@STEPS
def test_a_cache_of_another_codec_in_the_middle_of_a_conversation(step):
    call, talk = compiled(step), Talk(step)
    talk.feed(call), talk.feed(call)
    talk.held[0] = CompressedKV.encode(talk.twin[0], formats.codec("q8_0"))
    talk.twin[0] = fake_quantised(talk.twin[0], "q8_0")
    talk.codecs = ("q8_0", "q8_0")
    talk.feed(call), talk.feed(call)


@pytest.mark.parametrize("codecs", [CODECS, ("q8_0", "turboquant:2")], ids="/".join)
@STEPS
def test_an_unpickled_cache_goes_on_in_its_own_codec(step, codecs):
    talk = Talk(step)
    talk.feed(compiled(step))
    talk.held = pickle.loads(pickle.dumps(talk.held))
    talk.check()
    call = compiled(step, codecs)
    talk.feed(call), talk.feed(call)


def test_a_graph_asserts_the_codec_it_was_made_for():
    """Dynamo's guards keep other codecs away; whoever calls the graph without them gets no garbage."""
    graphs = []

    def backend(gm, inputs, **_):
        graphs.append(tqcompile.turboquant(keys="q8_0", values="q8_0", inner="eager")(gm, inputs))
        return graphs[-1]

    call, talk = torch.compile(in_place, backend=backend), Talk(in_place, ("q8_0", "q8_0"))
    talk.feed(call)
    talk.feed(call)
    strangers = [CompressedKV.encode(dense, formats.codec("turboquant:8")) for dense in new()]
    others = {id(cache): stranger for cache, stranger in zip(talk.held, strangers)}
    seen = []
    original = graphs[-1].compiled
    graphs[-1].compiled = lambda *args: seen.append(args) or original(*args)
    arguments = {"keys": talk.held[0], "values": talk.held[1]}
    placeholders = [node for node in graphs[-1].original.graph.nodes if node.op == "placeholder"]
    q, k, v = (numbers(1, seed=seed) for seed in range(3))
    arguments |= {"q": q, "k": k, "v": v, "at": torch.tensor([0])}
    given = [next(arguments[name] for name in arguments if node.name == f"l_{name}_") for node in placeholders]
    with torch.no_grad(), pytest.raises(AssertionError, match="turboquant:8"):
        graphs[-1](*(others.get(id(argument), argument) for argument in given))
    assert not seen


def test_one_tensor_as_keys_and_values_has_one_codec_or_stays_dense():
    same, other = compiled(in_place, ("q8_0", "q8_0")), compiled(in_place)
    keys, twin = numbers(LENGTH, seed=1), fake_quantised(numbers(LENGTH, seed=1), "q8_0")
    dense, untouched = numbers(LENGTH, seed=1), numbers(LENGTH, seed=1)
    for place in range(3):
        q, k, at = numbers(1, seed=place), numbers(1, seed=place + 10), torch.tensor([place])
        stored = fake_quantised(k, "q8_0")
        with torch.no_grad():
            ours, theirs = same(q, k, k, at, keys, keys)[0], in_place(q, stored, stored, at, twin, twin)[0]
            torch.testing.assert_close(ours, theirs)
            assert torch.equal(other(q, k, k, at, dense, dense)[0], in_place(q, k, k, at, untouched, untouched)[0])
    assert isinstance(keys, CompressedKV) and torch.equal(dense, untouched)
    (refusal,) = tqcompile.report().refusals
    assert refusal.reason == "it is read as keys and as values, and the two have different codecs"


def test_one_tensor_that_is_appended_to_twice_goes_on_as_two():
    call, keys, twin = compiled(append, ("q8_0", "q8_0")), numbers(LENGTH, seed=1), numbers(LENGTH, seed=1)
    q, k, v, at = numbers(1, seed=3), numbers(1, seed=4), numbers(1, seed=5), torch.tensor([0])
    with torch.no_grad():
        results = call(q, k, v, at, keys, keys)
        for ours, theirs in zip(results, append(q, k, v, at, twin, twin)):
            torch.testing.assert_close(ours, theirs)
        keys = CompressedKV.encode(keys, formats.codec("q8_0"))
        twin = keys.decode()
        for _ in range(2):
            for ours, theirs in zip(call(q, k, v, at, keys, keys), append(q, k, v, at, twin, twin)):
                torch.testing.assert_close(ours * 1, theirs)
    assert {refusal.reason for refusal in tqcompile.report().refusals} == {"two appends to it in one graph make a fork"}


@STEPS
def test_other_sizes_and_dtypes_get_graphs_of_their_own(step):
    call = compiled(step, ("q8_0", "q8_0"))
    for like in ({"head_dim": 64, "batch": 3}, {"batch": 1, "head_dim": 33}):
        # As many as Dynamo keeps would otherwise run out, and the last of them would run dense.
        torch._dynamo.reset()
        talk = Talk(step, ("q8_0", "q8_0"))
        talk.feed(call)
        talk = Talk(step, ("q8_0", "q8_0"), **like)
        talk.feed(call), talk.feed(call, tokens=2)


@STEPS
def test_a_cache_that_moves_to_another_dtype(step):
    call, talk = compiled(step, ("identity", "identity")), Talk(step, ("identity", "identity"))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        talk.like = {"dtype": dtype}
        talk.held = [cache.to(dtype) for cache in talk.held]
        talk.twin = [cache.to(dtype) for cache in talk.twin]
        talk.feed(call), talk.feed(call)
        assert all(cache.dtype == dtype and cache.planes[0].dtype == dtype for cache in talk.held)


@STEPS
def test_an_eager_model_goes_on_with_a_compressed_cache(step):
    talk = Talk(step)
    for call in (compiled(step), step, torch.compile(step, backend="eager"), step, compiled(step)):
        talk.feed(call)


@STEPS
def test_another_backend_gets_right_numbers_or_an_error_and_never_garbage(step):
    talk = Talk(step)
    talk.feed(compiled(step))
    q, k, v = (numbers(1, seed=seed) for seed in (91, 92, 93))
    at, stored = torch.tensor([1]), quantised(k, v, CODECS)
    with torch.no_grad():
        before = [cache.decode() for cache in talk.held]
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            torch.compile(step, backend="inductor")(q, k, v, at, *talk.held)
        assert all(map(torch.equal, before, (cache.decode() for cache in talk.held)))
        out, *held = torch.compile(step, backend="aot_eager")(q, k, v, at, *talk.held)
        # AOTAutograd makes an indexed write a new tensor, and encodes all of that into the cache after attention.
        seen = (k, v) if step is in_place else stored
        expected, *twin = step(q, *seen, at, *talk.twin)
        torch.testing.assert_close(out, expected)
        talk.held, talk.twin = held, quantised(*twin, CODECS) if step is in_place else twin
        talk.check()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@STEPS
def test_inference_mode_and_no_grad_may_take_turns_on_one_cache(step, inner):
    call = compiled(step, inner=inner)
    talk = Talk(step)
    with torch.inference_mode():
        talk.held = new()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.inference_mode, torch.no_grad):
        with mode():
            talk.feed(call)
    assert not [graph.events for graph in tqcompile.report().graphs if graph.events]


@STEPS
def test_nothing_is_lost_when_dynamo_forgets(step):
    call, talk = compiled(step), Talk(step)
    for _ in range(2):
        talk.feed(call), talk.feed(call)
        torch._dynamo.reset()


@STEPS
def test_gradients_run_dense_and_leave_the_cache_compressed(step):
    call, talk = compiled(step, ("identity", "identity")), Talk(step, ("identity", "identity"))
    talk.feed(call), talk.feed(call)
    weight = torch.ones(32, requires_grad=True)
    twin_weight = torch.ones(32, requires_grad=True)
    q, k, v = (numbers(1, seed=seed) for seed in (91, 92, 93))

    def through(call, weight, held):
        out, *_ = call(q * weight, k, v, torch.tensor([2]), *held)
        out.square().sum().backward()
        return out

    torch.testing.assert_close(through(call, weight, talk.held), through(step, twin_weight, talk.twin))
    torch.testing.assert_close(weight.grad, twin_weight.grad)
    if step is in_place:
        talk.check()
    talk.at = 3
    talk.held, talk.twin = [c.detach() for c in talk.held], [c.detach() for c in talk.twin]
    talk.feed(call)


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
