"""A write that the codes cannot follow leaves its cache dense, with right values and a reason; never garbage."""

import pytest
import torch

import tqcompile

F = torch.nn.functional
LOSSLESS = {"preset": "lossless", "inner": "eager"}
SIZE = (2, 4, 8, 32)


class Layer(torch.nn.Module):
    """Writes k and v into two buffers, lets `touch` at the key cache, and attends."""

    def __init__(self, touch=None, before=None):
        super().__init__()
        self.touch, self.before = touch, before
        self.register_buffer("k_cache", torch.zeros(SIZE))
        self.register_buffer("v_cache", torch.zeros(SIZE))

    def forward(self, q, k, v, at):
        seen = self.before(self.k_cache) if self.before else None
        self.k_cache[:, :, at] = k
        self.v_cache[:, :, at] = v
        if self.touch:
            self.touch(self.k_cache, k)
        out = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache)
        return (
            out if seen is None else out + F.scaled_dot_product_attention(q, seen, self.v_cache[:, :, : seen.shape[2]])
        )


def augmented(cache, k):
    cache *= 0.5


def part_of_a_head(cache, k):
    cache[..., :4] = 0


def by_a_boolean_mask(cache, k):
    cache[:, :, torch.arange(8) == 3] = 1.0


def one_number(cache, k):
    cache[:, :, 0] = 1.0


def through_an_unknown_view(cache, k):
    cache.unflatten(2, (2, 4))[:, :, 0].copy_(torch.ones(2, 4, 4, 32))


HOSTILE = {
    "scaled": lambda cache, k: cache.mul_(0.5),
    "augmented": augmented,
    "out": lambda cache, k: torch.mul(k.repeat(1, 1, 4, 1), 0.5, out=cache),
    "in place by an option": lambda cache, k: F.relu(cache, inplace=True),
    "a list of tensors": lambda cache, k: torch._foreach_mul_([cache], [0.5]),
    "filled": lambda cache, k: cache.fill_(1.0),
    "part of a head": part_of_a_head,
    "a boolean mask": by_a_boolean_mask,
    "one number": one_number,
    "index_add_": lambda cache, k: cache.index_add_(2, torch.tensor([1, 2]), k),
    "scatter_": lambda cache, k: cache.scatter_(2, torch.ones(2, 4, 2, 32, dtype=torch.int64), k),
    "masked_fill_": lambda cache, k: cache.masked_fill_(torch.ones(8, 1, dtype=torch.bool), 0.5),
    "a reshaped view": lambda cache, k: cache.view(2, 32, 32)[:, :2].copy_(k[:, 0]),
    "a transposed view": lambda cache, k: cache.transpose(2, 3)[..., 0].copy_(k[:, :, 0]),
    "an unknown view": through_an_unknown_view,
    "as_strided": lambda cache, k: cache.as_strided((2, 2), (1, 1)).zero_(),
    "itself": lambda cache, k: cache[:, :, 1:3].copy_(cache[:, :, 4:6]),
}


def calls(steps=2):
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        q, k, v = (torch.randn(2, 4, 2, 32, generator=generator) for _ in range(3))
        yield q, k, v, torch.arange(2 * step, 2 * step + 2)


@pytest.mark.parametrize("name", HOSTILE)
def test_an_unknown_write_leaves_the_cache_dense_and_right(name):
    model, twin = Layer(HOSTILE[name]), Layer(HOSTILE[name])
    compiled = torch.compile(model, backend="turboquant", options=LOSSLESS)
    for arguments in calls():
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), twin(*arguments))
    torch.testing.assert_close(model.k_cache, twin.k_cache)
    assert type(model.k_cache) is torch.Tensor and isinstance(model.v_cache, tqcompile.CompressedKV)
    (refusal,) = {refusal.reason for refusal in tqcompile.report(model).refusals}
    assert refusal and "k_cache" in str(tqcompile.report(model))


def test_strict_raises_instead():
    compiled = torch.compile(Layer(HOSTILE["scaled"]), backend="turboquant", options={**LOSSLESS, "strict": True})
    with torch.no_grad(), pytest.raises(Exception, match=r"strict=True, and .*k_cache.* cannot be compressed: mul_"):
        compiled(*next(calls()))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_cache_that_is_compressed_already_gets_an_unknown_write_too(name):
    model, twin = Layer(), Layer()
    compiled = torch.compile(model, backend="turboquant", options=LOSSLESS)
    for step, arguments in enumerate(calls(4)):
        model.touch = twin.touch = HOSTILE[name] if step in (1, 3) else None
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), twin(*arguments))
            torch.testing.assert_close(model.k_cache * 1, twin.k_cache)


COPIES = {
    "clone": lambda cache: cache.clone(),
    "contiguous": lambda cache: cache.transpose(1, 2).contiguous().transpose(1, 2),
    "cast": lambda cache: cache.half().float(),
    "slice": lambda cache: cache[:, :, :4],
    "permuted": lambda cache: cache.transpose(1, 2).transpose(1, 2),
    "gathered": lambda cache: cache.index_select(2, torch.tensor([0, 1, 2])),
    "repeated": lambda cache: cache[:, :1, None].expand(2, 1, 4, 8, 32).reshape(2, 4, 8, 32),
    "rolled": lambda cache: cache.roll(1, 2),
    "unknown view": lambda cache: cache.unflatten(2, (2, 4)).flatten(2, 3),
    "unknown copy": lambda cache: cache.flip(2),
    "unbound": lambda cache: torch.stack(cache.unbind(2), 2),
}


@pytest.mark.parametrize("codec", ["identity", "q8_0"])
@pytest.mark.parametrize("name", COPIES)
def test_what_was_taken_from_a_cache_before_a_write_shows_what_dense_would(name, codec):
    model, twin = Layer(before=COPIES[name]), Layer(before=COPIES[name])
    options = {"keys": codec, "values": "identity", "inner": "eager"}
    compiled = torch.compile(model, backend="turboquant", options=options)
    for arguments in calls(3):
        with torch.no_grad():
            ours, dense = compiled(*arguments), twin(*arguments)
            torch.testing.assert_close(ours, dense, atol=0.05 if codec == "q8_0" else 1e-3, rtol=0)


def test_a_roll_by_codes_and_a_copy_back_slide_a_window():
    def step(cache, values, q, k):
        cache.copy_(cache.roll(-1, 2))
        cache[:, :, -1:] = k
        return F.scaled_dot_product_attention(q, cache, values)

    model = torch.compile(step, backend="turboquant", options=LOSSLESS)
    ours, dense, values = torch.randn(SIZE), None, torch.randn(SIZE)
    dense = ours.clone()
    for q, k, _, _ in calls(3):
        with torch.no_grad():
            torch.testing.assert_close(model(ours, values, q, k[:, :, :1]), step(dense, values, q, k[:, :, :1]))


WRITERS = {
    "index_copy_": lambda cache, k, at: cache.index_copy_(2, at, k),
    "setitem": lambda cache, k, at: cache.__setitem__((slice(None), slice(None), at), k),
    "setitem with an ellipsis": lambda cache, k, at: cache.__setitem__((..., at, slice(None)), k),
    "slice": lambda cache, k, at: cache.__setitem__((slice(None), slice(None), slice(2, 4)), k),
    "narrow copy_": lambda cache, k, at: cache.narrow(2, 2, 2).copy_(k),
    "broadcast": lambda cache, k, at: cache.__setitem__((slice(None), slice(None), at), k[:1]),
    "one position": lambda cache, k, at: cache.__setitem__((slice(None), slice(None), 2), k[:, :, 0]),
    "one sequence": lambda cache, k, at: cache.__setitem__((0, slice(None), slice(2, 4)), k[0]),
    "a pair of indices": lambda cache, k, at: cache.__setitem__(
        (torch.arange(2)[:, None], slice(None), at), k.mT.mT[:, :, :2].transpose(1, 2)
    ),
    "all of it": lambda cache, k, at: cache.copy_(k.repeat(1, 1, 4, 1)),
    "cleared first": lambda cache, k, at: cache.zero_().index_copy_(2, at, k),
    "a chunk": lambda cache, k, at: cache.chunk(4, 2)[1].copy_(k),
    "one of what it is split into": lambda cache, k, at: cache.split([2, 2, 4], 2)[1].copy_(k),
    "from the end": lambda cache, k, at: cache.__setitem__((slice(None), slice(None), at - 8), k),
    "through what has nothing to cast": lambda cache, k, at: cache.to(k).detach().contiguous().index_copy_(2, at, k),
    "permuted": lambda cache, k, at: cache.transpose(1, 2).index_copy_(1, at, k.transpose(1, 2)),
}


@pytest.mark.parametrize("codec", ["identity", "turboquant:4"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_known_write_lands_where_dense_puts_it(name, codec):
    class Written(Layer):
        def forward(self, q, k, v, at):
            for cache, tokens in ((self.k_cache, k), (self.v_cache, v)):
                WRITERS[name](cache, tokens, at)
            return F.scaled_dot_product_attention(q, self.k_cache, self.v_cache)

    model, twin = Written(), Written()
    options = {"keys": codec, "values": codec, "inner": "eager"}
    compiled = torch.compile(model, backend="turboquant", options=options)
    for arguments in calls():
        with torch.no_grad():
            compiled(*arguments), twin(*arguments)
    assert isinstance(model.k_cache, tqcompile.CompressedKV), tqcompile.report(model)
    assert not tqcompile.report(model).fallbacks
    expected = tqcompile.CompressedKV.encode(twin.k_cache, model.k_cache.codec)
    torch.testing.assert_close(model.k_cache.decode(), expected.decode())


def test_a_cache_that_an_in_place_write_returns_is_the_same_object():
    def step(cache, values, q, k, at):
        written = cache.index_copy_(2, at, k)
        return F.scaled_dot_product_attention(q, written, values.index_copy_(2, at, k)), written

    cache, values = torch.zeros(SIZE), torch.zeros(SIZE)
    compiled = torch.compile(step, backend="turboquant", options=LOSSLESS)
    q, k, _, at = next(calls())
    with torch.no_grad():
        assert compiled(cache, values, q, k, at)[1] is cache
    assert isinstance(cache, tqcompile.CompressedKV)


def test_a_source_of_another_dtype_is_cast_as_an_assignment_casts():
    def step(cache, values, q, k):
        cache[:, :, 1:3] = k
        values.narrow(2, 1, 2).copy_(k)
        return F.scaled_dot_product_attention(q, cache, values)

    ours = torch.zeros(SIZE, dtype=torch.float16), torch.zeros(SIZE, dtype=torch.float16)
    dense = tuple(cache.clone() for cache in ours)
    compiled = torch.compile(step, backend="turboquant", options={"preset": "quality", "inner": "eager"})
    q, k, _, _ = next(calls())
    with torch.no_grad():
        compiled(*ours, q.half(), k), step(*dense, q.half(), k)
    for cache, twin in zip(ours, dense):
        assert torch.equal(cache.decode(), tqcompile.CompressedKV.encode(twin, cache.codec).decode())
