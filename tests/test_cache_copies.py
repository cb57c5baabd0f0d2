"""Copies of a `CompressedKV`, casts, pickles, and views that share its planes."""

import copy
import io
import pickle

import pytest
import torch
from conversations import fake_quantised
from test_cache import EVERY_CODEC, FLOATS, SIZE, codes, grown, made, same

from tqcompile import CompressedKV
from tqcompile.cache import storages

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
    written = fake_quantised(torch.ones(2, 3, 48), codec)
    torch.testing.assert_close(cache[:, :, 2].decode(), written, atol=1e-6, rtol=0)
    assert same(other, cache.decode())


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
    # As wide as a cache each: views name its sizes, and some codecs have more numbers than that.
    for shown, whole in zip(codes(view).split(48, -1), codes(cache).split(48, -1)):
        assert torch.equal(shown, VIEWS[name](whole))
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
