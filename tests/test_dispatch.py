"""Eager operators on a compressed cache: moves are exact, and the rest reads decoded numbers."""

import copy
import pickle

import pytest
import torch
from conversations import conversations, fake_quantised
from models import EMBED, Shape

from tqcompile import CompressedKV, coding, dispatch, formats
from tqcompile.readonly import ReadOnly

F = torch.nn.functional
aten = torch.ops.aten
CODECS = ("identity", "q8_0", "turboquant:3", "turboquant:2.5")
SIZE = (2, 3, 6, 48)

EVERY_CODEC = pytest.mark.parametrize("codec", CODECS)


def made(codec="turboquant:3", size=SIZE, dtype=torch.float32):
    return CompressedKV.encode(torch.randn(size).to(dtype), formats.codec(codec))


def codes(cache):
    """Numbers in the codec's basis: there a move of tokens is exact, where a rotation rounds by its shape."""
    return coding.decode(cache.codec, cache.planes, cache.shape[-1])


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The ATen operators that run while a compressed cache is handled."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


# ---- moves: operator -> call


EACH = torch.tensor([[[4, 1], [0, 5], [2, 2]], [[5, 4], [1, 0], [3, 0]]]).unsqueeze(-1).expand(2, 3, 2, 48)

MOVES = {
    "slice": (aten.slice.Tensor, lambda x: x[:, :, 1:4]),
    "slice in steps": (aten.slice.Tensor, lambda x: x[:, :, 1::2]),
    "slice from the end": (aten.slice.Tensor, lambda x: x[:, :, -3:-1]),
    "slice past the end": (aten.slice.Tensor, lambda x: x[:, :, 4:99]),
    "narrow": (aten.slice.Tensor, lambda x: x.narrow(-2, 1, 4)),
    "select": (aten.select.int, lambda x: x.select(1, -1)),
    "squeeze": (aten.squeeze.dim, lambda x: x[:, :1].squeeze(-3)),
    "squeeze of more than one": (aten.squeeze.dim, lambda x: x.squeeze(1)),
    "unbind": (aten.unbind.int, lambda x: x.unbind(-2)),
    "unsqueeze": (aten.unsqueeze.default, lambda x: x.unsqueeze(0)),
    "unsqueeze before the last": (aten.unsqueeze.default, lambda x: x.unsqueeze(-2)),
    "split": (aten.split.Tensor, lambda x: x.split(4, -2)),
    "split by sizes": (aten.split_with_sizes.default, lambda x: x.split([1, 2, 3], 2)),
    "chunk": (aten.split.Tensor, lambda x: x.chunk(3, 1)),
    "permute": (aten.permute.default, lambda x: x.permute(2, 0, 1, 3)),
    "permute by negatives": (aten.permute.default, lambda x: x.permute(-3, -2, -4, -1)),
    "transpose": (aten.transpose.int, lambda x: x.transpose(-3, 2)),
    "expand": (aten.expand.default, lambda x: x[:, :1].expand(-1, 4, -1, -1)),
    "expand in front": (aten.expand.default, lambda x: x.expand(5, 2, 3, 6, 48)),
    "view": (aten.view.default, lambda x: x.view(6, -1, 48)),
    "view of tokens": (aten.view.default, lambda x: x.view(36, 48)),
    "reshape of a transposed": (aten._unsafe_view.default, lambda x: x.transpose(1, 2).reshape(2, 18, 48)),
    "repeat_kv": (aten._unsafe_view.default, lambda x: x[:, :, None].expand(2, 3, 4, 6, 48).reshape(2, 12, 6, 48)),
    "detach": (aten.detach.default, lambda x: x.detach()),
    "alias": (aten.alias.default, lambda x: aten.alias(x)),
    "lift_fresh": (aten.lift_fresh.default, lambda x: aten.lift_fresh(x)),
    "index_select": (aten.index_select.default, lambda x: x.index_select(0, torch.tensor([1, 1, 0]))),
    "index_select of tokens": (aten.index_select.default, lambda x: x.index_select(-2, torch.tensor([5, 0]))),
    "gather": (aten.gather.default, lambda x: x.gather(2, EACH)),
    "gather from behind": (aten.gather.default, lambda x: torch.gather(x, -2, EACH[:1, :2])),
    "index": (aten.index.Tensor, lambda x: x[torch.tensor([1, 0])]),
    "index of tokens": (aten.index.Tensor, lambda x: x[:, :, torch.tensor([[5], [0]])]),
    "index with a mask": (aten.index.Tensor, lambda x: x[:, :, torch.arange(6) > 2]),
    "repeat": (aten.repeat.default, lambda x: x.repeat(1, 2, 1, 1)),
    "repeat in front": (aten.repeat.default, lambda x: x.repeat(2, 1, 1, 1, 1)),
    "repeat_interleave": (aten.clone.default, lambda x: x.repeat_interleave(3, dim=0)),
    "repeat_interleave by counts": (
        aten.index_select.default,
        lambda x: x.repeat_interleave(torch.tensor([2, 0, 1]), dim=1),
    ),
    "flip": (aten.flip.default, lambda x: x.flip(2, -4)),
    "roll": (aten.roll.default, lambda x: x.roll(-1, 2)),
    "roll of two": (aten.roll.default, lambda x: x.roll((1, 2), (0, -2))),
    "clone": (aten.clone.default, lambda x: x.clone()),
    "copy to a dtype": (aten._to_copy.default, lambda x: x.to(torch.float32, copy=True)),
    "cat": (aten.cat.default, lambda x: torch.cat([x, x[:, :, :2], x], 2)),
    "cat of batches": (aten.cat.default, lambda x: torch.cat((x[1:], x), dim=-4)),
    "stack": (aten.stack.default, lambda x: torch.stack([x, x.flip(2)], 1)),
    "stack before the last": (aten.stack.default, lambda x: torch.stack([x, x], -2)),
}


@EVERY_CODEC
@pytest.mark.parametrize("name", MOVES)
def test_a_move_is_exact(name, codec):
    operator, move = MOVES[name]
    cache = made(codec)
    before, recorder = codes(cache).clone(), Recorder()
    with recorder:
        moved = move(cache)
    assert operator in recorder.seen
    expected, decoded = move(before), move(cache.decode())
    found = moved if isinstance(moved, (list, tuple)) else [moved]
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    decoded = decoded if isinstance(decoded, (list, tuple)) else [decoded]
    assert len(found) == len(expected)
    for ours, numbers, dense in zip(found, expected, decoded):
        assert type(ours) is CompressedKV and ours.shape == dense.shape and ours.dtype == dense.dtype
        assert torch.equal(codes(ours), numbers)
        torch.testing.assert_close(ours.decode(), dense, atol=1e-6, rtol=0)
    assert torch.equal(codes(cache), before)


def test_every_move_of_the_tables_has_a_case():
    assert {*dispatch._VIEWS, *dispatch._COPIES} == {operator for operator, _ in MOVES.values()}


def test_a_move_does_not_decode(monkeypatch):
    cache = made()
    monkeypatch.setattr(CompressedKV, "decode", lambda self: pytest.fail("decoded"))
    for _, move in MOVES.values():
        move(cache)


BEYOND = {
    "mT": lambda x: x.mT,
    "transpose": lambda x: x.transpose(1, -1),
    "permute": lambda x: x.permute(3, 0, 1, 2),
    "slice": lambda x: x[..., ::2],
    "select": lambda x: x[..., 3],
    "split": lambda x: x.split(20, -1),
    "split by sizes": lambda x: x.split([40, 8], 3),
    "unbind": lambda x: x.unbind(-1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "squeeze": lambda x: x.squeeze(-1),
    "squeeze of all": lambda x: x.squeeze(),
    "view": lambda x: x.view(2, 3, -1),
    "view of two": lambda x: x.view(2, 3, 6, 2, 24),
    "view of all": lambda x: x.view(-1),
    "view as another dtype": lambda x: x.view(torch.int32),
    "flatten": lambda x: x.flatten(),
    "expand": lambda x: x[..., :1].expand(-1, -1, -1, 7),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "unfold": lambda x: x.unfold(2, 2, 2),
    "as_strided": lambda x: x.as_strided((3, 4), (5, 2), 7),
    "flatten of a grown": lambda x: torch.cat([x, torch.ones(2, 3, 1, 48)], 2).flatten(2),
    "view of a transposed": lambda x: x.transpose(0, 1).view(3, 2, -1),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "roll of all": lambda x: x.roll(5),
    "index_select": lambda x: x.index_select(-1, torch.tensor([3, 1])),
    "index": lambda x: x[..., torch.tensor([3, 1])],
    "repeat": lambda x: x.repeat(1, 1, 1, 2),
    "cat": lambda x: torch.cat([x, x], -1),
    "cat with another dtype": lambda x: torch.cat([x, torch.ones(2, 3, 1, 48, dtype=torch.float64)], 2),
    "cat in front": lambda x: torch.cat([torch.ones(2, 3, 1, 48), x], 2),
    "cat with nothing": lambda x: torch.cat([x, torch.empty(0)], 2),
    "stack": lambda x: torch.stack([x, torch.ones(SIZE)]),
    "stack behind": lambda x: torch.stack([x, x], -1),
    "gather": lambda x: x.gather(2, torch.full((2, 3, 2, 48), 4)),
    "masked_fill": lambda x: x.masked_fill(torch.ones(6, 1, dtype=torch.bool), 2.0),
    "index_copy": lambda x: x.index_copy(2, torch.tensor([1]), torch.ones(2, 3, 1, 48)),
    "index_put": lambda x: x.index_put((torch.tensor([1]),), torch.ones(48)),
    "scatter": lambda x: x.scatter(2, torch.ones(2, 3, 1, 48, dtype=torch.int64), 1.0),
    "slice_scatter": lambda x: x.slice_scatter(torch.ones(2, 3, 2, 48), 2, 1, 3),
    "tril": lambda x: x.tril(),
    "sort": lambda x: x.sort(2).values,
    "cumsum": lambda x: x.cumsum(2),
    "pad": lambda x: F.pad(x, (0, 0, 1, 0)),
    "topk": lambda x: x.topk(2).indices,
    "matmul of an operand": lambda x: torch.ones(4, 6) @ x,
    "out of it": lambda x: torch.add(x, 1, out=torch.empty(SIZE)),
    "into dense": lambda x: torch.zeros(SIZE).copy_(x),
    "part of dense": lambda x: torch.zeros(2, 3, 9, 48).index_copy_(2, torch.arange(6), x),
    "assigned to dense": lambda x: torch.zeros(3, *SIZE).index_put_((torch.tensor([1]),), x),
    "added to dense": lambda x: torch.ones(SIZE).add_(x),
    "a list": lambda x: torch._foreach_add([x, torch.ones(3)], 1.0)[0],
    "a keyword": lambda x: torch.add(torch.ones(SIZE), other=x),
    "equal": lambda x: torch.tensor(torch.equal(x, torch.ones(SIZE))),
    "allclose": lambda x: torch.tensor(torch.allclose(x, x + 1e-9)),
}


@EVERY_CODEC
@pytest.mark.parametrize("name", BEYOND)
def test_any_other_operator_reads_decoded_values(name, codec):
    cache = made(codec)
    dense, before = cache.decode(), codes(cache).clone()
    found, expected = BEYOND[name](cache), BEYOND[name](dense.clone())
    found = found if isinstance(found, (list, tuple)) else [found]
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    if codec != "identity" and name == "flatten of a grown":
        expected = [torch.cat([dense, fake_quantised(torch.ones(2, 3, 1, 48), codec)], 2).flatten(2)]
    assert len(found) == len(expected)
    for ours, values in zip(found, expected):
        assert not isinstance(ours, CompressedKV) and ours.shape == values.shape and ours.dtype == values.dtype
        torch.testing.assert_close(ours.clone(), values, atol=2e-6, rtol=0)
    assert torch.equal(codes(cache), before)


# ---- decoded views


def test_a_decoded_view_reads_like_any_tensor():
    cache = made()
    view, dense = cache[..., :24], cache.decode()[..., :24]
    assert type(view) is ReadOnly and torch.equal(view, dense) and view.tolist() == dense.tolist()
    assert (
        repr(view) == repr(dense)
        and (view.numpy() == dense.numpy()).all()
        and view[0, 0, 0, 0].item() == dense[0, 0, 0, 0]
    )
    assert type(view[0]) is type(view.mT) is ReadOnly and torch.equal(view.mT, dense.mT)
    for plain in (view + 1, view.clone(), copy.deepcopy(view), pickle.loads(pickle.dumps(view)), view.float() * 1):
        assert type(plain) is torch.Tensor
    assert torch.equal(pickle.loads(pickle.dumps(view)), dense) and torch.equal(copy.deepcopy(view), dense)
    with pytest.raises(ValueError, match="read-only"):
        view.numpy()[:] = 0


def test_a_decoded_view_goes_through_a_compiled_function():
    cache = made()
    compiled = torch.compile(lambda x, y: x.transpose(0, 1) * 2 + y, backend="turboquant", options={"inner": "eager"})
    view = cache[..., :24]
    torch.testing.assert_close(compiled(view, torch.ones(24)), cache.decode()[..., :24].transpose(0, 1) * 2 + 1)


# ---- attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codecs", [("identity", "identity"), ("turboquant:3", "q8_0")], ids="/".join)
def test_eager_attention_reads_both_caches(codecs, dtype):
    keys, values = (made(codec, dtype=dtype) for codec in codecs)
    q, mask = torch.randn(2, 6, 2, 48, dtype=dtype), torch.ones(2, 6, dtype=torch.bool).tril(3)
    k, v = keys.decode(), values.decode()

    def attentions(k, v):
        yield F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        yield F.scaled_dot_product_attention(q[:, :3], k, v)
        yield F.scaled_dot_product_attention(q[:, :3], k[:, :, :2], v[:, :, :2], is_causal=True)
        yield F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask)
        yield (q[:, :3] @ k.mT).softmax(-1) @ v
        yield torch.matmul(torch.matmul(q[:, :3], k.transpose(2, 3)).softmax(-1), v)
        yield torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q[:, :3], k).softmax(-1), v)

    for ours, expected in zip(attentions(keys, values), attentions(k, v)):
        assert type(ours) is torch.Tensor
        torch.testing.assert_close(ours, expected, atol=2e-6 if dtype == torch.float32 else 2e-2, rtol=0)


def test_gradients_reach_a_query_that_reads_a_cache():
    cache, q = made(), torch.randn(2, 3, 1, 48, requires_grad=True)
    F.scaled_dot_product_attention(q, cache, cache).sum().backward()
    ours, q.grad = q.grad, None
    F.scaled_dot_product_attention(q, cache.decode(), cache.decode()).sum().backward()
    torch.testing.assert_close(ours, q.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("codecs", [("identity", "identity"), ("turboquant:4", "q8_0")], ids="/".join)
@pytest.mark.parametrize("kind", ["tuples", "buffers", "slices", "counter", "made"])
def test_eager_steps_continue_what_compiled_ones_began(kind, codecs):
    ours, twin = conversations(kind, Shape(layers=1), codecs)
    for at, eager in enumerate([False, True, True, False, True]):
        x = torch.randn(2, 4 if at == 0 else 1, EMBED)
        exact = at == 0 and kind in ("tuples", "made")
        torch.testing.assert_close(ours.feed(x, eager=eager), twin.feed(x, exact=exact), atol=5e-6, rtol=0)
    assert all(isinstance(cache, CompressedKV) for cache in ours.caches())


# ---- two codecs


def test_codecs_mix_by_the_first():
    keys, values = made("turboquant:3"), made("q8_0")
    joined = torch.cat([keys, values], 2)
    assert joined.codec is keys.codec and torch.equal(codes(joined)[:, :, :6], codes(keys))
    expected = fake_quantised(values.decode(), "turboquant:3")
    torch.testing.assert_close(joined.decode()[:, :, 6:], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(keys + values, keys.decode() + values.decode(), atol=0, rtol=0)
    keys.copy_(values)
    torch.testing.assert_close(keys.decode(), expected, atol=1e-6, rtol=0)


def test_a_half_cache_takes_codes_of_a_float_one():
    cache, source = made("q8_0", dtype=torch.float16), made("q8_0")
    cache.copy_(source)
    assert all(map(torch.equal, cache.planes, source.planes)) and cache.dtype == torch.float16
    lossless = made("identity", dtype=torch.float16)
    lossless.copy_(made("identity"))
    assert lossless.planes[0].dtype == torch.float16
