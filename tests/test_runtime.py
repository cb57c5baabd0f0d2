"""Calls that a compiled graph was not made for: other codecs, other sizes, other modes and other compilers."""

import pickle

import pytest
import torch
from conversations import fake_quantised
from test_mutations import Layer, calls
from torch import nn

import tqcompile
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


def test_a_graph_looks_again_at_a_cache_that_keeps_other_tensors():
    """Which lie otherwise than those that it was compiled for."""
    talk, call = Talk(in_place), compiled(in_place)
    for _ in range(3):
        talk.feed(call)
    for cache in talk.held:
        cache.planes = tuple(plane.mT.contiguous().mT for plane in cache.planes)
    talk.feed(call)
    assert all(plane.is_contiguous() for cache in talk.held for plane in cache.planes)


@pytest.mark.parametrize("name", ["planes", "buffer", "centre", "recent"])
def test_a_cache_that_keeps_other_tensors_has_another_stamp(name):
    cache = CompressedKV.encode(numbers(4), formats.codec("q8_0"))
    stamp = cache.stamp
    cache.counted = None
    assert cache.stamp is stamp
    setattr(cache, name, getattr(cache, name))
    assert cache.stamp is not stamp


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


@pytest.mark.parametrize("values", ["q8_0", "turboquant:2"])
def test_one_tensor_as_keys_and_values_has_the_codec_of_keys(values):
    same = compiled(in_place, ("q8_0", values))
    keys, twin = numbers(LENGTH, seed=1), fake_quantised(numbers(LENGTH, seed=1), "q8_0")
    for place in range(3):
        q, k, at = numbers(1, seed=place), numbers(1, seed=place + 10), torch.tensor([place])
        stored = fake_quantised(k, "q8_0")
        with torch.no_grad():
            ours, theirs = same(q, k, k, at, keys, keys)[0], in_place(q, stored, stored, at, twin, twin)[0]
            torch.testing.assert_close(ours, theirs)
    assert isinstance(keys, CompressedKV) and keys.codec.name == "q8_0" and not tqcompile.report().refusals


@STEPS
def test_one_tensor_as_keys_and_values_stays_dense_where_its_codec_serves_keys_alone(step):
    same, keys, twin = compiled(step, ("qjl:1", "q8_0")), numbers(LENGTH, seed=1), numbers(LENGTH, seed=1)
    for place in range(3):
        q, k, at = numbers(1, seed=place), numbers(1, seed=place + 10), torch.tensor([place])
        with torch.no_grad():
            torch.testing.assert_close(same(q, k, k, at, keys, keys)[0], step(q, k, k, at, twin, twin)[0])
    assert type(keys) is torch.Tensor
    assert any("serves keys alone" in refusal.reason for refusal in tqcompile.report().refusals)


def test_one_tensor_that_is_appended_to_twice_goes_on_as_two():
    call, dense = compiled(append, ("q8_0", "q8_0")), numbers(LENGTH, seed=1)
    q, k, v, at = numbers(1, seed=3), numbers(1, seed=4), numbers(1, seed=5), torch.tensor([0])
    twin, stored = fake_quantised(dense, "q8_0"), [fake_quantised(x, "q8_0") for x in (k, v)]
    with torch.no_grad():
        for keys in (dense, CompressedKV.encode(dense, formats.codec("q8_0")).room(0, 2)):
            results = call(q, k, v, at, keys, keys)
            assert all(isinstance(grown, CompressedKV) for grown in results[1:])
            for ours, theirs in zip(results, append(q, *stored, at, twin, twin)):
                torch.testing.assert_close(ours * 1, theirs)
    assert not tqcompile.report().refusals


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


def test_planes_that_lie_otherwise_are_looked_at_again():
    """A graph that has seen its caches before takes them as they are; these are no longer as they were."""
    model, twin = Layer(), Layer()
    step = torch.compile(model, backend="turboquant", options={"preset": "lossless"})
    with torch.no_grad():
        for i, arguments in enumerate(calls(4)):
            if i == 3:
                planes = model.k_cache.planes
                model.k_cache.planes = tuple(p.transpose(1, 2).contiguous().transpose(1, 2) for p in planes)
            torch.testing.assert_close(step(*arguments), twin(*arguments))
    assert all(plane.is_contiguous() for plane in model.k_cache.planes)


BESIDE = {
    "put behind it": lambda other, keys: torch.cat([other, keys], 2),
    "copied into it": lambda other, keys: other.mul_(2).copy_(keys),
    "written into it by positions": lambda other, keys: other.mul_(2).index_copy_(2, torch.arange(LENGTH), keys),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_compressed_cache_that_goes_into_a_tensor_that_is_none_is_decoded(name):
    """Attention reads the cache; the other tensor stays as it is, dense."""

    def step(q, other, keys):
        return torch.nn.functional.scaled_dot_product_attention(q, keys, keys), BESIDE[name](other, keys)

    other, q = numbers(LENGTH, seed=2), numbers(1, seed=3)
    keys, twin = CompressedKV.encode(numbers(LENGTH, seed=1), formats.codec("q8_0")), other.clone()
    with torch.no_grad():
        ours, theirs = compiled(step, ("q8_0", "q8_0"))(q, other, keys), step(q, twin, keys.decode())
    for mine, expected in zip((*ours, other), (*theirs, twin)):
        torch.testing.assert_close(mine * 1, expected)
