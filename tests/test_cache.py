"""`CompressedKV` as other code meets it: printed, indexed, copied, saved, cast, grown, taken over and freed."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from models import fake_quantised

from tqcompile import CompressedKV, formats, reference
from tqcompile.cache import adopt, storages

F = torch.nn.functional
CODECS = ("identity", "q8_0", "turboquant:3")
SIZE = (2, 3, 6, 48)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

EVERY_CODEC = pytest.mark.parametrize("codec", CODECS)


def made(codec="turboquant:4", size=SIZE, dtype=torch.float32):
    return CompressedKV.encode(torch.randn(size).to(dtype), formats.codec(codec))


def same(found, expected):
    """Equal to the last bit, in shape and dtype too."""
    dense = found.decode() if isinstance(found, CompressedKV) else found
    return dense.shape == expected.shape and dense.dtype == expected.dtype and torch.equal(dense, expected)


def codes(cache):
    """The numbers behind a cache in its own basis, where moving tokens is exact: a matrix product rounds by shape."""
    return reference.decode(cache.codec, cache.planes, cache.shape[-1])


def grown(cache, tokens, dim=2):
    return torch.cat([cache, tokens], dim)


# ---- what it is


@EVERY_CODEC
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "size", [SIZE, (1, 1, 1, 32), (2, 1, 5, 80), (4, 33), (7,), (3, 0, 32), (0, 2, 5, 32)], ids=str
)
def test_a_round_trip_is_the_reference_s(codec, dtype, size):
    dense = torch.randn(size).to(dtype)
    cache = CompressedKV.encode(dense, formats.codec(codec))
    assert cache.shape == dense.shape and cache.dtype == dtype and cache.device == dense.device
    assert len(cache) == len(dense) and cache.numel() == dense.numel() and cache.dim() == dense.dim()
    assert cache.stride() == dense.stride() and not cache.requires_grad
    decoded = cache.decode()
    assert decoded.shape == dense.shape and decoded.dtype == dtype and decoded.is_contiguous()
    expected = fake_quantised(dense, codec) if dense.numel() else dense
    assert torch.equal(decoded, dense if codec == "identity" else expected)


def test_encoding_in_blocks_gives_the_codes_of_encoding_at_once(monkeypatch):
    dense = torch.randn(2, 3, 37, 32)
    whole = CompressedKV.encode(dense, formats.codec("turboquant:4"))
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1000)
    for cache in (CompressedKV.encode(dense, whole.codec), CompressedKV.encode(dense.mT.contiguous().mT, whole.codec)):
        assert all(map(torch.equal, cache.planes, whole.planes))


def test_a_block_of_a_long_cache_is_written_at_its_own_place(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 64)
    dense = torch.randn(2, 11, 2, 32)
    assert torch.equal(CompressedKV.encode(dense, formats.codec("identity")).decode(), dense)


@pytest.mark.parametrize(
    "dense, codec, error, words",
    [
        ([1.0, 2.0], "q8_0", TypeError, "dense is list; give a tensor"),
        (torch.tensor(1.0), "q8_0", TypeError, "without dimensions"),
        (torch.zeros(2, 32, dtype=torch.float64), "q8_0", ValueError, "float64.*float32, float16 or bfloat16"),
        (torch.zeros(2, 32, dtype=torch.int64), "identity", ValueError, "int64"),
        (torch.zeros(2, 1), "turboquant:4", ValueError, "head_dim=1; .* at least 2"),
    ],
)
def test_what_cannot_be_encoded_is_said(dense, codec, error, words):
    with pytest.raises(error, match=words):
        CompressedKV.encode(dense, formats.codec(codec))


def test_a_codec_is_no_name():
    with pytest.raises(TypeError, match=r"codec='q8_0' is no codec; tqcompile\.formats\.codec"):
        CompressedKV.encode(torch.zeros(2, 32), "q8_0")


def test_encoding_does_not_carry_gradients():
    dense = torch.randn(2, 32, requires_grad=True)
    cache = CompressedKV.encode(dense, formats.codec("identity"))
    assert not cache.requires_grad and not cache.decode().requires_grad and torch.equal(cache.decode(), dense)


def test_encoding_a_compressed_cache_again_reads_its_values():
    cache = made("q8_0")
    assert same(CompressedKV.encode(cache, formats.codec("identity")), cache.decode())


@EVERY_CODEC
def test_it_prints_what_it_is(codec):
    cache = made(codec)
    words = f"CompressedKV({codec}, shape={SIZE}, dtype=torch.float32, {cache.nbytes} bytes)"
    assert repr(cache) == str(cache) == f"{cache}" == words


@EVERY_CODEC
def test_it_is_smaller_than_dense_and_counts_its_planes(codec):
    cache = made(codec)
    assert cache.nbytes == sum(plane.numel() * plane.itemsize for plane in cache.planes)
    assert cache.nbytes == cache.numel() * 4 if codec == "identity" else cache.nbytes < cache.numel() * 1.2


# ---- reading


INDICES = {
    "first": 0,
    "last": -1,
    "pair": (0, 1),
    "slice": (slice(None), slice(None), slice(1, 4)),
    "steps": (slice(None), slice(None), slice(None, None, 2)),
    "ellipsis": (..., 2, slice(None)),
    "new axis": (slice(None), None),
    "token": (1, 2, 3),
    "number": (1, 2, 3, 4),
    "part of a head": (..., slice(0, 4)),
    "trailing axis": (..., None),
    "list": [1, 0],
    "tensor": torch.tensor([1, 0, 1]),
    "positions": (slice(None), slice(None), torch.tensor([1, 1, 5])),
    "apart": (torch.tensor([0, 1]), slice(None), torch.tensor([0, 2])),
    "grid": (torch.tensor([[0], [1]]), torch.tensor([2, 0])),
    "coordinates": (..., torch.tensor([3, 1])),
    "mask": torch.tensor([True, False]),
    "mask of tokens": torch.arange(36).view(2, 3, 6) % 2 == 0,
    "mask of numbers": torch.arange(1728).view(SIZE) % 5 == 0,
    "byte mask of numbers": (torch.arange(1728).view(SIZE) % 5 == 0).byte(),
    "true": True,
    "nothing": (slice(None), slice(None), slice(3, 3)),
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@EVERY_CODEC
@pytest.mark.parametrize("name", INDICES)
def test_indexing_reads_what_dense_has(name, codec):
    cache = made(codec)
    found, dense = cache[INDICES[name]], cache.decode()[INDICES[name]]
    torch.testing.assert_close(found * 1, dense, atol=1e-6, rtol=0)
    assert found.dtype == dense.dtype and found.stride() == dense.stride()
    if isinstance(found, CompressedKV):
        assert torch.equal(codes(found), codes(cache)[INDICES[name]])


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def test_whole_tokens_stay_compressed_and_parts_do_not():
    kept = {name for name, index in INDICES.items() if isinstance(made()[index], CompressedKV)}
    parts = {"number", "part of a head", "trailing axis", "coordinates", "mask of numbers", "byte mask of numbers"}
    assert set(INDICES) - kept == parts


@pytest.mark.parametrize("index", [7, (0, 3), (0, 0, 6), (0, 0, 0, 48), (0, 0, 0, 0, 0), torch.tensor([2])], ids=str)
def test_indexing_past_the_end_is_dense_s_error(index):
    cache = made()
    for tensor in (cache, cache.decode()):
        with pytest.raises(IndexError):
            tensor[index]


@EVERY_CODEC
def test_iteration_gives_compressed_rows(codec):
    cache = made(codec)
    rows = list(cache)
    assert len(rows) == len(cache) == 2 and all(isinstance(row, CompressedKV) for row in rows)
    assert all(map(torch.equal, map(codes, rows), codes(cache)))


@EVERY_CODEC
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_come_out_as_from_the_decoded_tensor(codec, dtype):
    cache = made(codec, dtype=dtype)
    dense = cache.decode()
    assert cache.tolist() == dense.tolist()
    assert cache[0, 0, 0].sum().item() == pytest.approx(dense[0, 0, 0].sum().item(), abs=1e-2)
    if dtype != torch.bfloat16:
        for array in (cache.numpy(), np.asarray(cache), np.array(cache, dtype=np.float64)):
            assert np.array_equal(array, dense.numpy())
    assert torch.equal(cache, dense) and torch.equal(dense, cache) and torch.equal(cache, cache)
    assert not torch.equal(cache, dense + 1)


@EVERY_CODEC
def test_arithmetic_and_reductions_read_decoded_values(codec):
    cache, other = made(codec), torch.randn(SIZE)
    dense = cache.decode()
    for compute in (
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x * other,
        lambda x: other / (x.abs() + 1),
        lambda x: x @ x.mT,
        lambda x: x @ x.transpose(-1, -2),
        lambda x: -x,
        lambda x: x == dense,
        lambda x: x.sum((1, 3)),
        lambda x: x.softmax(-1),
        lambda x: x.amax(-1),
        lambda x: x.norm(),
        lambda x: torch.einsum("bhsd,bhtd->bhst", x, x),
        lambda x: torch.where(x > 0, x, other),
        lambda x: torch.zeros_like(x),
        lambda x: x.new_ones(3),
        lambda x: F.pad(x, (0, 0, 0, 2)),
        lambda x: x.to(torch.float64),
        lambda x: x.double(),
        lambda x: x.int(),
        lambda x: torch.stack([x, other]),
        lambda x: x.gather(2, torch.ones(2, 3, 1, 48, dtype=torch.int64)),
    ):
        found = compute(cache)
        assert not isinstance(found, CompressedKV) and same(found, compute(dense))


def test_it_has_no_memory_to_hand_out():
    cache = made()
    with pytest.raises(RuntimeError):
        cache.data_ptr()
    with pytest.raises(RuntimeError, match="no dense memory"):
        np.from_dlpack(cache)
    with pytest.raises(RuntimeError, match="no dense memory"):
        torch.from_dlpack(cache)
    with pytest.raises(RuntimeError, match=r"\.data.*copy_"):
        cache.data = torch.zeros(SIZE)
    with pytest.raises(ValueError, match="read-only"):
        cache.numpy()[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(cache)[:] = 0


# ---- copies


def saved(cache, **arguments):
    file = io.BytesIO()
    torch.save({"cache": cache}, file)
    file.seek(0)
    return torch.load(file, **arguments)["cache"]


COPIES = {
    "clone": lambda cache: cache.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "save": lambda cache: saved(cache, weights_only=False),
    "save, weights only": lambda cache: saved(cache, weights_only=True),
    "save, mapped": lambda cache: saved(cache, weights_only=True, map_location="cpu"),
    "to, copied": lambda cache: cache.to("cpu", copy=True),
    "contiguous of a permuted": lambda cache: cache.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "cat of one": lambda cache: torch.cat([cache]),
}


@pytest.mark.parametrize("of", ["cache", "slice", "grown", "transposed"])
@EVERY_CODEC
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_has_the_same_codes_and_storage_of_its_own(name, codec, of):
    cache = made(codec)
    cache = {
        "cache": lambda: cache,
        "slice": lambda: cache[:, 1:, 2:],
        "grown": lambda: grown(cache, torch.randn(2, 3, 2, 48)),
        "transposed": lambda: cache.transpose(1, 2),
    }[of]()
    before = [plane.clone() for plane in cache.planes]
    taken = COPIES[name](cache)
    assert type(taken) is CompressedKV and taken.codec is cache.codec and taken.dtype == cache.dtype
    assert all(map(torch.equal, taken.planes, before)) and torch.equal(taken.decode(), cache.decode())
    assert not storages(taken).keys() & storages(cache).keys()
    taken.zero_()
    assert not taken.decode().any() and all(map(torch.equal, cache.planes, before))


def test_a_pickle_of_a_small_view_does_not_carry_the_whole_buffer():
    view = grown(made(size=(1, 1, 500, 32)), torch.randn(1, 1, 1, 32))[:, :, :1]
    assert pickle.loads(pickle.dumps(view)).nbytes == made(size=(1, 1, 1, 32)).nbytes < view.nbytes


def test_a_deepcopy_of_a_structure_keeps_shared_objects_shared():
    cache = made()
    first, second = copy.deepcopy([cache, cache])
    assert first is second and first is not cache


@pytest.mark.parametrize("alias", [copy.copy, lambda c: c.detach(), lambda c: c.data, lambda c: c[:]], ids=range(4))
@EVERY_CODEC
def test_an_alias_shares_the_planes(alias, codec):
    cache = made(codec)
    other = alias(cache)
    assert other is not cache and same(other, cache.decode()) and storages(other).keys() == storages(cache).keys()
    other[:, :, 2] = torch.ones(48)
    assert cache[:, :, 2].decode().sub(1).abs().max() < 0.5 and same(other, cache.decode())


@EVERY_CODEC
def test_casting_to_what_it_is_gives_itself(codec):
    cache = made(codec)
    for found in (cache.to("cpu"), cache.cpu(), cache.float(), cache.to(torch.float32), cache.contiguous()):
        assert found is cache
    assert cache.to(torch.ones(1)) is cache


@EVERY_CODEC
@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_a_cast_stays_compressed_and_decodes_in_the_new_dtype(codec, source, target):
    cache = made(codec, dtype=source)
    cast = cache.to(target)
    assert isinstance(cast, CompressedKV) and cast.codec is cache.codec
    exact = cache.decode() if codec == "identity" else fake_float(cache)
    assert same(cast, exact.to(target))
    assert same(cache, exact.to(source))


def fake_float(cache):
    return CompressedKV(cache.planes, cache.codec, cache.shape[-1], torch.float32).decode()


def test_casts_by_name():
    cache = made("identity")
    assert same(cache.half(), cache.decode().half()) and same(cache.bfloat16(), cache.decode().bfloat16())
    assert same(cache.half().float(), cache.decode().half().float())
    assert same(cache.type_as(torch.ones(1, dtype=torch.float16)), cache.decode().half())
    assert same(cache.to("cpu", torch.float16), cache.decode().half())


def test_moving_to_a_device_without_memory():
    moved = made("q8_0").to("meta")
    assert isinstance(moved, CompressedKV) and moved.device.type == "meta" and moved.shape == SIZE
    assert moved.nbytes == made("q8_0").nbytes


# ---- views


VIEWS = {
    "slice": lambda x: x[:, :, 1:3],
    "steps": lambda x: x[:, :, ::2],
    "select": lambda x: x[1],
    "token": lambda x: x[1, 2, 3],
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1, 3),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "view": lambda x: x.view(6, 6, 48),
    "view of the rest": lambda x: x.view(-1, 48),
    "view of the last": lambda x: x.view(2, 18, -1),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 3)),
    "reshape": lambda x: x.reshape(2, 3, 2, 3, 48),
    "split": lambda x: x.split(2, 2)[1],
    "split by sizes": lambda x: x.split([1, 5], 2)[1],
    "chunk": lambda x: x.chunk(3, -2)[2],
    "tensor_split": lambda x: x.tensor_split(2, 2)[1],
    "unbind": lambda x: x.unbind(2)[4],
    "narrow": lambda x: x.narrow(2, 2, 2),
    "movedim": lambda x: x.movedim(2, 0),
    "detach": lambda x: x.detach(),
    "view_as": lambda x: x.view_as(x),
    "chain": lambda x: x.transpose(1, 2)[1, 2:4].unsqueeze(0)[:, 1],
}


@EVERY_CODEC
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_the_same_memory_both_ways(name, codec):
    cache = made(codec)
    twin = cache.decode()
    view, expected = VIEWS[name](cache), VIEWS[name](twin)
    assert isinstance(view, CompressedKV) and view.shape == expected.shape and view.stride() == expected.stride()
    assert view.is_contiguous() == expected.is_contiguous() and storages(view).keys() == storages(cache).keys()
    assert torch.equal(codes(view), VIEWS[name](codes(cache)))
    tokens = torch.randn(expected.shape)
    view.copy_(tokens)
    expected.copy_(fake_quantised(tokens, codec))
    torch.testing.assert_close(cache.decode(), twin, atol=1e-6, rtol=0)
    cache.zero_()
    assert not view.decode().any()


@EVERY_CODEC
def test_contiguous_of_a_view_is_a_copy_where_dense_copies(codec):
    cache = made(codec)
    before = cache.decode()
    cache.transpose(1, 2).contiguous().zero_()
    cache[:, :, None].expand(2, 3, 4, 6, 48).contiguous().zero_()
    cache[:, :, :4].reshape(2, 12, 48).zero_()
    assert torch.equal(cache.decode(), before)
    assert cache[:1].contiguous().zero_() is not None and not cache[0].decode().any()


def test_a_view_that_dense_refuses_is_refused():
    cache = made()
    for tensor in (cache.transpose(1, 2), cache.decode().transpose(1, 2)):
        with pytest.raises(RuntimeError, match="view"):
            tensor.view(2, 18, 48)
    for tensor in (cache, cache.decode()):
        for call in (lambda x: x.view(5, 48), lambda x: x.select(4, 0), lambda x: x.narrow(2, 5, 3)):
            with pytest.raises((RuntimeError, IndexError)):
                call(tensor)


def test_an_expanded_cache_is_no_larger():
    cache = made(size=(1, 2, 6, 32))
    expanded = cache.expand(5, 2, 6, 32)
    assert expanded.nbytes == cache.nbytes and torch.equal(codes(expanded), codes(cache).expand(5, 2, 6, 32))
    with pytest.raises(RuntimeError, match="more than one element"):
        expanded.copy_(torch.randn(5, 2, 6, 32))


@EVERY_CODEC
def test_planes_that_are_not_contiguous(codec):
    cache = made(codec)
    odd = tuple(torch.stack([plane, plane], -1)[..., 0] for plane in cache.planes)
    assert not any(plane.is_contiguous() for plane in odd)
    strange = CompressedKV(odd, cache.codec, 48, torch.float32)
    assert torch.equal(codes(strange), codes(cache)) and torch.equal(strange.decode(), cache.decode())
    tokens = torch.randn(2, 3, 1, 48)
    for each in (strange, cache):
        each[:, :, 3:4] = tokens
    assert torch.equal(strange.decode(), cache.decode())
    assert torch.equal(grown(strange, tokens).decode(), grown(cache, tokens).decode())
    assert strange.flatten(2).shape == (2, 3, 288) and same(strange.flatten(2) * 1, cache.decode().flatten(2))


# ---- growing


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
    torch.ops.tqcompile.append(with_room.planes, torch.ones(2, 3, 2, 48), torch.tensor([6, 7]), "identity")
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
    assert cache.own(tuple(plane.stride() for plane in planes)) is None and cache.planes is planes


def test_own_takes_the_tokens_out_of_a_shared_buffer():
    old = grown(made(), torch.randn(2, 3, 1, 48))
    new = grown(old, torch.randn(2, 3, 1, 48))
    strides, before = tuple(plane.contiguous().stride() for plane in new.planes), codes(new)
    assert new.own(strides) is None and tuple(plane.stride() for plane in new.planes) == strides
    assert torch.equal(codes(new), before) and not storages(new).keys() & storages(old).keys()
    new.zero_()
    assert torch.equal(codes(old), before[:, :, :7]) and not new.decode().any()


def test_own_takes_one_s_own_buffer_into_the_order_of_a_graph():
    cache = grown(made(), torch.randn(2, 3, 1, 48))
    strides, before = tuple(plane.contiguous().stride() for plane in cache.planes), codes(cache)
    assert cache.own(strides) is None and cache.buffer is None and torch.equal(codes(cache), before)
    assert cache.nbytes == sum(plane.nbytes for plane in cache.planes)


def test_own_does_not_cut_a_view_off():
    cache = made()
    view = cache[:, :, :3]
    assert "view" in view.own(tuple(plane.contiguous().stride() for plane in view.planes))
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


# ---- taking over


@EVERY_CODEC
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_adopt_turns_the_same_object(codec, dtype, inference):
    with torch.inference_mode(inference):
        tensor = torch.randn(SIZE).to(dtype)
        tensor.label, tensor._dynamo_static_input_type = "mine", "guarded"
        twin = CompressedKV.encode(tensor, formats.codec(codec))
        module = torch.nn.Module()
        module.register_buffer("cache", tensor)
        storage = weakref.ref(tensor.untyped_storage())
        assert adopt(tensor, formats.codec(codec)) is None
    assert module.cache is tensor and type(tensor) is CompressedKV and same(tensor, twin.decode())
    assert tensor.label == "mine" and tensor._dynamo_static_input_type == "guarded"
    gc.collect()
    assert storage() is None
    assert module.state_dict()["cache"].shape == SIZE and same(module.half().cache, twin.half().decode())
    tensor[:, :, 1] = torch.zeros(48, dtype=dtype)
    assert not tensor[:, :, 1].decode().any()


def dense_storages():
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def test_adopt_frees_the_dense_memory():
    tensor = torch.randn(4, 8, 64, 32)
    dense = tensor.untyped_storage().nbytes()
    assert dense in dense_storages().values()
    assert adopt(tensor, formats.codec("turboquant:4")) is None
    assert dense not in dense_storages().values()
    assert tensor.nbytes == dense * 18 // 128


class Odd(torch.Tensor):
    """Some other library's tensor."""


def refused():
    """Tensors that are not taken over, with the reason, and whatever has to stay alive for it."""
    base = torch.randn(3, *SIZE)
    yield base[0], "it is a view of another tensor", base
    whole = torch.randn(SIZE)
    yield whole, "other tensors share its memory", whole[0]
    detached = torch.randn(SIZE)
    yield detached, "other tensors share its memory", detached.detach()
    shown = torch.randn(SIZE)
    yield shown, "other tensors share its memory", shown.numpy()
    yield torch.randn(SIZE, requires_grad=True), "it requires grad", None
    yield torch.nn.Parameter(torch.randn(SIZE), requires_grad=False), "it is a Parameter, not a plain tensor", None
    yield torch.randn(SIZE).as_subclass(Odd), "it is a Odd, not a plain tensor", None
    yield torch.empty(2, 0, 32), "it is empty", None
    part = torch.randn(100)
    yield torch.empty(0).set_(part.untyped_storage(), 0, (2, 32)), None, None
    larger = torch.empty(0)
    larger.resize_(4, 32).resize_(2, 32).normal_()
    yield larger, "it covers a part of its memory only", None


@pytest.mark.parametrize("at", range(10))
def test_a_refusal_leaves_the_tensor_as_it_was(at):
    tensor, reason, keep = list(refused())[at]
    before, kind, memory = tensor.detach().clone(), type(tensor), tensor.untyped_storage().data_ptr()
    found = adopt(tensor, formats.codec("q8_0"))
    assert found == reason if reason is not None else found in ("other tensors share its memory", PART)
    assert type(tensor) is kind and tensor.untyped_storage().data_ptr() == memory
    assert torch.equal(tensor.detach(), before) and not hasattr(tensor, "planes")
    del keep


PART = "it covers a part of its memory only"


def test_a_codec_that_does_not_fit_leaves_the_tensor_as_it_was():
    for tensor, codec in ((torch.randn(2, 1), "turboquant:4"), (torch.randn(2, 32).double(), "q8_0")):
        before = tensor.clone()
        with pytest.raises(ValueError, match=r"head_dim=1|float64"):
            adopt(tensor, formats.codec(codec))
        assert type(tensor) is torch.Tensor and torch.equal(tensor, before)


def test_a_tensor_that_autograd_saved_keeps_its_gradient_right():
    held, leaf = torch.randn(SIZE), torch.randn(SIZE, requires_grad=True)
    expected, product = held.clone(), (leaf * held).sum()
    adopt(held, formats.codec("turboquant:3"))
    product.backward()
    assert torch.equal(leaf.grad, expected)


def test_a_state_dict_goes_into_an_adopted_buffer_and_comes_back():
    source, target = torch.nn.Module(), torch.nn.Module()
    for module in (source, target):
        module.register_buffer("cache", torch.randn(SIZE))
        assert adopt(module.cache, formats.codec("q8_0")) is None
    state = pickle.loads(pickle.dumps(source.state_dict()))
    target.load_state_dict(state)
    assert all(map(torch.equal, target.cache.planes, source.cache.planes))
    target.load_state_dict({"cache": torch.zeros(SIZE)})
    assert not target.cache.decode().any() and source.cache.decode().any()


# ---- dying


def test_nothing_lives_on_after_the_last_cache():
    gc.collect()
    gc.disable()
    try:
        cache = grown(made(), torch.randn(2, 3, 1, 48))
        longer, copied = grown(cache, torch.randn(2, 3, 1, 48)), cache.index_select(0, torch.tensor([1, 0]))
        buffer = weakref.ref(cache.buffer)
        dead = [weakref.ref(item) for item in (cache, longer, *cache.buffer.storage)]
        del cache
        assert dead[0]() is None and buffer() is not None and longer.decode().shape == (2, 3, 8, 48)
        del longer
        assert buffer() is None and all(ref() is None for ref in dead) and copied.decode().any()
        view = grown(copied, torch.randn(2, 3, 1, 48))[:, :, 1:]
        dead = [weakref.ref(item) for item in (view, view.buffer, *view.buffer.storage)]
        assert view.decode().any()
        del view
        assert all(ref() is None for ref in dead)
    finally:
        gc.enable()


def test_an_outgrown_buffer_dies():
    cache = grown(made(size=(1, 1, 1, 32)), torch.randn(1, 1, 1, 32))
    first = weakref.ref(cache.buffer)
    cache = grown(cache, torch.randn(1, 1, 100, 32))
    assert first() is None and cache.shape[2] == 102


def test_bytes_of_views_are_those_of_the_storage_they_keep_alive():
    cache = grown(made(), torch.randn(2, 3, 1, 48))
    view, other = cache[:, :, :1], cache.clone()
    assert view.nbytes == cache.nbytes > other.nbytes
    together = {**storages(cache), **storages(view), **storages(other)}
    assert sum(storage.nbytes() for storage in together.values()) == cache.nbytes + other.nbytes
    assert storages(torch.ones(4)).popitem()[1].nbytes() == 16
