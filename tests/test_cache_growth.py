"""A `CompressedKV` grows in its buffer, forks, and takes planes of its own."""

import pytest
import torch
from test_cache import EVERY_CODEC, FLOATS, SIZE, F, codes, grown, made, same

from tqcompile import CompressedKV, formats
from tqcompile.cache import storages

# ---- growing


def test_what_dynamo_marks_of_one_cache_of_a_buffer_leaves_the_others_alone():
    first = grown(made(), torch.randn(SIZE), 2)
    second = grown(first, torch.randn(SIZE), 2)
    first.buffer.forget_length(first)
    second.buffer.forget_length(second)
    marks = [name for name, mark in vars(first).items() if name.startswith("_dynamo") and isinstance(mark, set)]
    assert marks and first.buffer is second.buffer
    for name in marks:
        vars(first)[name].add("another")
        assert "another" not in vars(second)[name]
        third = grown(second, torch.randn(SIZE), 2)
        third.buffer.forget_length(third)
        assert "another" not in vars(third)[name]


@EVERY_CODEC
@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_a_cache_grows_in_its_buffer(codec, dim):
    tokens = [torch.randn([2 if at == dim % 4 else size for at, size in enumerate(SIZE)]) for _ in range(4)]
    cache = first = made(codec)
    expected = codes(cache)
    for at, more in enumerate(tokens):
        before = storages(cache).keys()
        cache = grown(cache, more, dim)
        assert at == 0 or storages(cache).keys() == before
        expected = torch.cat([expected, codes(CompressedKV.encode(more, cache.codec))], dim)
        assert isinstance(cache, CompressedKV) and torch.equal(codes(cache), expected)
        assert cache.is_contiguous()
    assert torch.equal(codes(first), expected.narrow(dim, 0, SIZE[dim]))


def test_a_buffer_moves_when_it_is_full_and_keeps_a_sixteenth():
    cache, addresses, capacities = made(size=(1, 2, 4, 32)), set(), []
    dense = codes(cache)
    for _ in range(100):
        token = torch.randn(1, 2, 1, 32)
        cache, dense = grown(cache, token), torch.cat([dense, codes(CompressedKV.encode(token, cache.codec))], 2)
        addresses |= storages(cache).keys()
        capacities.append(cache.buffer.capacity)
    assert torch.equal(codes(cache), dense)
    assert capacities[0] == 4 + 1 + 32 and sorted(set(capacities)) == [37, 70, 103, 136]
    long = made(size=(1, 1, 1600, 32)).room(1, 2)
    assert long.buffer.capacity == 1600 + 1 + 100
    assert cache.nbytes == sum(storage.nbytes() for storage in storages(cache).values())
    assert cache.nbytes == cache.buffer.capacity * 2 * (16 + 2)


@EVERY_CODEC
@pytest.mark.parametrize("prefix", [0, 1, 6])
def test_two_continuations_of_one_prefix_are_both_right(codec, prefix):
    base = grown(made(codec, (2, 3, prefix, 48)), torch.randn(2, 3, 1, 48))
    start = codes(base)
    tokens = [torch.randn(2, 3, 2, 48) for _ in range(3)]
    forks = [grown(base, more) for more in tokens]
    longer = [grown(fork, more) for fork, more in zip(forks, reversed(tokens))]
    encoded = [codes(CompressedKV.encode(more, base.codec)) for more in tokens]
    for fork, more in zip(forks, encoded):
        assert torch.equal(codes(fork), torch.cat([start, more], 2))
    for fork, more, last in zip(longer, encoded, reversed(encoded)):
        assert torch.equal(codes(fork), torch.cat([start, more, last], 2))
    assert torch.equal(codes(base), start)
    assert storages(forks[0]).keys() == storages(base).keys() != storages(forks[1]).keys()


def test_what_was_cropped_continues_without_touching_what_was_cut():
    long = grown(made(), torch.randn(2, 3, 4, 48))
    before, short = codes(long).clone(), long[:, :, :7]
    other = grown(short, torch.randn(2, 3, 1, 48))
    assert torch.equal(codes(long), before) and torch.equal(codes(other)[:, :, :7], before[:, :, :7])
    assert not torch.equal(codes(other)[:, :, 7], before[:, :, 7])


def test_a_window_slides_in_place():
    cache = grown(made(), torch.randn(2, 3, 1, 48))
    at, expected = storages(cache).keys(), codes(cache)
    for _ in range(5):
        token = torch.randn(2, 3, 1, 48)
        cache = grown(cache[:, :, 1:], token)
        expected = torch.cat([expected[:, :, 1:], codes(CompressedKV.encode(token, cache.codec))], 2)
        assert storages(cache).keys() == at and torch.equal(codes(cache), expected)


@pytest.mark.parametrize("view", [lambda x: x[:1], lambda x: x.transpose(0, 1), lambda x: x[:, :, ::2]], ids=range(3))
def test_a_view_that_is_no_run_of_tokens_grows_somewhere_else(view):
    cache = grown(made(), torch.randn(2, 3, 1, 48))
    before, part = codes(cache).clone(), view(cache)
    token = torch.randn(*part.shape[:2], 1, 48)
    other = grown(part, token)
    assert not storages(other).keys() & storages(cache).keys() and torch.equal(codes(cache), before)
    assert torch.equal(codes(other)[:, :, :-1], view(before))
    assert torch.equal(codes(other)[:, :, -1:], codes(CompressedKV.encode(token, cache.codec)))


def test_a_cache_that_another_continues_is_not_written_into():
    old = grown(made(), torch.randn(2, 3, 1, 48))
    old[:, :, 0] = torch.zeros(48)
    new = grown(old, torch.randn(2, 3, 1, 48))
    before = codes(new).clone()
    for cache in (old, new, old[:, :, :2], new.detach()):
        with pytest.raises(RuntimeError, match=r"another continues or shows; clone\(\) it first"):
            cache.zero_()
    assert torch.equal(codes(new), before)
    separate = new.clone()
    separate.zero_()
    assert torch.equal(codes(new), before) and not separate.decode().any()


def test_a_reshaped_buffer_reads_right_and_is_not_written_into():
    cache = grown(made(), torch.randn(2, 3, 2, 48))
    flat = cache.view(2, 24, 48)
    assert torch.equal(codes(flat), codes(cache).reshape(2, 24, 48)) and flat.buffer is None
    for view in (flat, flat[:, :3], flat.detach()):
        with pytest.raises(RuntimeError, match="tokens do not lie so"):
            view.zero_()
    with pytest.raises(RuntimeError, match="another continues or shows"):
        cache.zero_()
    assert torch.equal(codes(flat), codes(cache).reshape(2, 24, 48))
    assert same(cache.flatten(2) * 1, cache.decode().flatten(2))


def test_a_view_that_would_lie_outside_the_buffer_is_no_run_of_tokens():
    view = grown(made(size=(1, 36, 4, 32)), torch.randn(1, 36, 1, 32)).transpose(1, 2)
    assert view.start == -1 and grown(view, torch.randn(1, 5, 1, 32)).shape == (1, 5, 37, 32)


def test_growing_by_nothing():
    cache = grown(made(), torch.randn(2, 3, 1, 48))
    same_length = grown(cache, torch.randn(2, 3, 0, 48))
    left, right = grown(cache, torch.ones(2, 3, 1, 48)), grown(same_length, torch.zeros(2, 3, 1, 48))
    assert torch.equal(codes(same_length), codes(cache))
    assert left.decode()[:, :, -1].abs().min() > 0.5 and not right.decode()[:, :, -1].any()


def test_room_is_there_before_it_is_written():
    cache = made("identity")
    with_room = cache.room(2, 2)
    assert with_room.shape == (2, 3, 8, 48) and torch.equal(with_room.decode()[:, :, :6], cache.decode())
    torch.ops.tqcompile.append(with_room.planes, torch.ones(2, 3, 2, 48), torch.tensor([6, 7]), None, "identity")
    assert torch.equal(with_room.decode()[:, :, 6:], torch.ones(2, 3, 2, 48))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("head_dim", [32, 33, 48, 80])
@EVERY_CODEC
def test_growing_at_odd_head_dims_and_dtypes(codec, head_dim, dtype):
    parts = [torch.randn(2, 1, tokens, head_dim).to(dtype) for tokens in (3, 1, 2)]
    cache = CompressedKV.encode(parts[0], formats.codec(codec))
    for part in parts[1:]:
        cache = grown(cache, part)
    assert cache.dtype == dtype
    assert torch.equal(codes(cache), codes(CompressedKV.encode(torch.cat(parts, 2), cache.codec)))


# ---- planes of its own


def test_own_leaves_planes_that_are_fit_where_they_are():
    cache = made()
    planes = cache.planes
    assert cache.own() is None and cache.planes is planes


def test_own_takes_the_tokens_out_of_a_shared_buffer():
    old = grown(made(), torch.randn(2, 3, 1, 48))
    new = grown(old, torch.randn(2, 3, 1, 48))
    strides, before = tuple(plane.contiguous().stride() for plane in new.planes), codes(new)
    assert new.own() is None and tuple(plane.stride() for plane in new.planes) == strides
    assert torch.equal(codes(new), before) and not storages(new).keys() & storages(old).keys()
    new.zero_()
    assert torch.equal(codes(old), before[:, :, :7]) and not new.decode().any()


def test_own_takes_one_s_own_buffer_into_the_order_of_a_graph():
    cache = grown(made(), torch.randn(2, 3, 1, 48))
    before = codes(cache)
    assert cache.own() is None and cache.buffer is None and torch.equal(codes(cache), before)
    assert cache.nbytes == sum(plane.nbytes for plane in cache.planes)


def test_own_does_not_cut_a_view_off():
    cache = made()
    view = cache[:, :, :3]
    assert "view" in view.own()
    view.zero_()
    assert not cache.decode()[:, :, :3].any()


def test_a_compiled_write_into_a_view_reaches_the_cache():
    def step(keys, values, q, k, at):
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, k)
        return F.scaled_dot_product_attention(q, keys, values)

    compiled = torch.compile(step, backend="turboquant", options={"preset": "lossless", "inner": "eager"})
    ours = [CompressedKV.encode(torch.randn(2, 4, 8, 32), formats.codec("identity")) for _ in "kv"]
    twins = [cache.decode() for cache in ours]
    q, k, at = torch.randn(2, 4, 1, 32), torch.randn(2, 4, 2, 32), torch.tensor([1, 4])
    with torch.no_grad():
        found = compiled(*(cache[:, :, :5] for cache in ours), q, k, at)
        torch.testing.assert_close(found, step(*(twin[:, :, :5] for twin in twins), q, k, at))
    assert all(same(cache, twin) for cache, twin in zip(ours, twins))
