"""Eager writes into a compressed cache: whole tokens are encoded, and no write is ever lost."""

import pytest
import torch
from conversations import fake_quantised
from test_dispatch import EVERY_CODEC, SIZE, F, Recorder, aten, made

from tqcompile import CompressedKV, dispatch_writes, formats

# ---- writes


def assign(*index):
    return lambda cache, value: cache.__setitem__(index, value)


AT = torch.tensor([4, 1])
CHOSEN = torch.tensor([[[4, 1], [0, 5], [2, 3]], [[5, 4], [1, 0], [3, 0]]])


def each(places):
    return places.unsqueeze(-1).expand(*places.shape, 48)


WRITES = {
    "copy_": (aten.copy_.default, lambda c, v: c.copy_(v), SIZE),
    "copy_ broadcast": (aten.copy_.default, lambda c, v: c.copy_(v), (1, 6, 48)),
    "copy_ of a column": (aten.copy_.default, lambda c, v: c.copy_(v), (2, 3, 6, 1)),
    "copy_ of a number": (aten.copy_.default, lambda c, v: c.copy_(v), ()),
    "copy_ into a slice": (aten.copy_.default, lambda c, v: c[:, :, 1:3].copy_(v), (2, 3, 2, 48)),
    "copy_ into a transposed": (aten.copy_.default, lambda c, v: c.transpose(1, 2).copy_(v), (2, 6, 3, 48)),
    "copy_ into a chunk": (aten.copy_.default, lambda c, v: c.chunk(3, 2)[1].copy_(v), (2, 3, 2, 48)),
    "set a slice": (aten.copy_.default, assign(slice(None), slice(None), slice(1, 3)), (2, 3, 2, 48)),
    "set steps": (aten.copy_.default, assign(slice(None), slice(None), slice(0, None, 2)), (3, 1, 48)),
    "set a place": (aten.copy_.default, assign(slice(None), slice(None), 3), (2, 3, 48)),
    "set a token": (aten.copy_.default, assign(1, 2, 3), (48,)),
    "set all": (aten.copy_.default, assign(...), SIZE),
    "set tokens": (aten.index_put_.default, assign(slice(None), slice(None), AT), (2, 3, 2, 48)),
    "set tokens alike": (aten.index_put_.default, assign(..., AT, slice(None)), (48,)),
    "set rows": (aten.index_put_.default, assign(torch.tensor([1])), (1, 3, 6, 48)),
    "set a grid": (aten.index_put_.default, assign(torch.tensor([[0], [1]]), slice(None), AT), (2, 2, 3, 48)),
    "set a slice at places": (aten.index_put_.default, assign(0, slice(1, 3), AT), (2, 2, 48)),
    "set a mask": (aten.index_put_.default, assign(slice(None), slice(None), torch.arange(6) > 3), (2, 3, 2, 48)),
    "set a mask of tokens": (aten.index_put_.default, assign(torch.arange(36).view(2, 3, 6) > 33), (2, 48)),
    "index_put_": (aten.index_put_.default, lambda c, v: c.index_put_((torch.tensor([0]),), v), (1, 3, 6, 48)),
    "index_copy_": (aten.index_copy_.default, lambda c, v: c.index_copy_(2, AT, v), (2, 3, 2, 48)),
    "index_copy_ from behind": (aten.index_copy_.default, lambda c, v: c.index_copy_(-2, AT, v), (2, 3, 2, 48)),
    "index_copy_ of rows": (
        aten.index_copy_.default,
        lambda c, v: c.index_copy_(0, torch.tensor([1]), v),
        (1, 3, 6, 48),
    ),
    "scatter_": (aten.scatter_.src, lambda c, v: c.scatter_(2, each(CHOSEN), v), (2, 3, 2, 48)),
    "scatter_ from behind": (aten.scatter_.src, lambda c, v: c.scatter_(-2, each(CHOSEN), v), (2, 3, 2, 48)),
    "scatter_ of some heads": (aten.scatter_.src, lambda c, v: c.scatter_(2, each(CHOSEN[:, :1]), v), (2, 1, 2, 48)),
    "index_copy_ into a view": (
        aten.index_copy_.default,
        lambda c, v: c[:, :, 1:].index_copy_(2, AT, v),
        (2, 3, 2, 48),
    ),
}


@pytest.mark.parametrize("source", ["dense", "same codec", "other codec", "not contiguous", "grown"])
@EVERY_CODEC
@pytest.mark.parametrize("name", WRITES)
def test_a_write_of_tokens_is_the_dense_write_of_quantised_tokens(name, codec, source):
    operator, write, size = WRITES[name]
    cache = made(codec) if source != "grown" else torch.cat([made(codec)[:, :, :4], torch.randn(2, 3, 2, 48)], 2)
    twin, value = cache.decode(), torch.randn(size)
    given, seen = value, value
    if source in ("same codec", "other codec") and size and size[-1] == 48:
        given = CompressedKV.encode(value, formats.codec(codec if source == "same codec" else "q8_0"))
        seen = given.decode()
    elif source == "not contiguous" and size:
        given = torch.stack([value, value], -1)[..., 0]
    stored = seen if size and size[-1] == 48 else seen.expand(*size[:-1], 48)
    if source != "same codec" or given is value:
        stored = fake_quantised(stored.contiguous(), codec)
    recorder = Recorder()
    with recorder:
        write(cache, given)
    assert operator in recorder.seen
    write(twin, stored)
    assert isinstance(cache, CompressedKV)
    torch.testing.assert_close(cache.decode(), twin, atol=1e-6 if codec != "identity" else 0.0, rtol=0)


def test_every_write_of_the_table_has_a_case():
    fills = {aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor}
    assert set(dispatch_writes.WRITES) == {operator for operator, _, _ in WRITES.values()} | fills


FILLS = {
    "zero_": lambda x: x.zero_(),
    "zero_ of a view": lambda x: x[:, :, 1:3].zero_(),
    "fill_": lambda x: x.fill_(-2),
    "fill_ by a tensor": lambda x: x.fill_(torch.tensor(0.25)),
    "fill_ of a view": lambda x: x[1].fill_(0.5),
    "set a number": assign(slice(None), slice(None), 2),
    "set places to a number": assign(slice(None), slice(None), AT),
}


@EVERY_CODEC
@pytest.mark.parametrize("name", FILLS)
def test_a_fill_is_the_dense_fill(name, codec):
    cache = made(codec)
    twin = cache.decode()
    for tensor in (cache, twin):
        FILLS[name](tensor) if "number" not in name else FILLS[name](tensor, 1.5)
    changed = twin != cache.decode()
    torch.testing.assert_close(
        cache.decode(), torch.where(changed, fake_quantised(twin, codec), twin), atol=1e-6, rtol=0
    )


def test_a_write_gives_back_the_cache_itself():
    cache = made()
    assert cache.zero_() is cache and cache.copy_(torch.ones(SIZE)) is cache and cache.fill_(0) is cache
    assert cache.index_copy_(2, AT, torch.ones(2, 3, 2, 48)) is cache


def test_a_write_in_another_dtype_is_cast_where_dense_casts_and_refused_where_dense_refuses():
    cache, value = made("identity", dtype=torch.float16), torch.randn(SIZE)
    cache.copy_(value)
    assert torch.equal(cache.decode(), value.half())
    cache[:, :, AT] = value[:, :, :2]
    assert torch.equal(cache.decode()[:, :, AT], value[:, :, :2].half())
    for tensor in (cache, cache.decode()):
        with pytest.raises(RuntimeError, match=r"index_copy_"):
            tensor.index_copy_(2, AT, value[:, :, :2])


@pytest.mark.parametrize("size", [(2, 3, 6, 47), (2, 3, 5, 48), (3, 3, 6, 48), (1, 2, 3, 6, 49)], ids=str)
@EVERY_CODEC
def test_a_source_of_another_shape_is_refused_and_changes_nothing(codec, size):
    cache = made(codec)
    before = [plane.clone() for plane in cache.planes]
    for source in (torch.randn(size), made(codec, size)):
        with pytest.raises(RuntimeError):
            cache.copy_(source)
        with pytest.raises((RuntimeError, IndexError)):
            cache.index_copy_(2, torch.arange(6), source)
        if size[0] != 1:
            with pytest.raises(RuntimeError, match=r"size"):
                torch.cat([cache, source], 1)
    assert all(map(torch.equal, cache.planes, before))


# ---- lost writes


def inplace(name, *arguments):
    return lambda cache: getattr(cache, name)(*arguments)


ONES = torch.ones(SIZE)
PLACES = torch.ones(2, 3, 1, 48, dtype=torch.int64)

LOST = {
    "add_": inplace("add_", 1),
    "mul_": inplace("mul_", 2),
    "a sum": lambda c: c.__iadd__(1),
    "relu_": lambda c: F.relu(c, inplace=True),
    "out": lambda c: torch.add(ONES, 1, out=c),
    "out of cat": lambda c: torch.cat([ONES[:, :, :3], ONES[:, :, 3:]], 2, out=c),
    "masked_fill_": inplace("masked_fill_", torch.ones(6, 1, dtype=torch.bool), 0.0),
    "masked_scatter_": inplace("masked_scatter_", torch.ones(6, 1, dtype=torch.bool), ONES),
    "index_add_": inplace("index_add_", 2, AT, torch.ones(2, 3, 2, 48)),
    "index_fill_": inplace("index_fill_", 2, AT, 0.0),
    "scatter_": inplace("scatter_", 2, PLACES, 1.0),
    "scatter_ of tokens": inplace("scatter_", 2, PLACES, torch.ones(2, 3, 1, 48)),
    "scatter_add_": inplace("scatter_add_", 2, PLACES, torch.ones(2, 3, 1, 48)),
    "accumulate": inplace("index_put_", (torch.tensor([1]),), torch.ones(48), True),
    "index_copy_ along a head": inplace("index_copy_", 3, torch.tensor([1]), torch.ones(2, 3, 6, 1)),
    "normal_": inplace("normal_"),
    "clamp_": inplace("clamp_", 0, 1),
    "resize_": inplace("resize_", 2, 3),
    "set_": inplace("set_", torch.ones(3)),
    "transpose_": inplace("transpose_", 0, 1),
    "unsqueeze_": inplace("unsqueeze_", 0),
    "a list": lambda c: torch._foreach_mul_([c, torch.ones(2)], 2.0),
    "part of a head": lambda c: c.__setitem__((..., slice(0, 4)), 0.0),
    "one number": lambda c: c.__setitem__((0, 0, 0, 0), 1.0),
    "coordinates": lambda c: c.__setitem__((..., torch.tensor([1])), 1.0),
    "a mask of numbers": lambda c: c.__setitem__(ONES > 0, 1.0),
    "a byte mask of numbers": lambda c: c.index_put_(((ONES > 0).byte(),), torch.tensor(1.0)),
    "of mT": lambda c: c.mT.zero_(),
    "of a squeezed": lambda c: c.squeeze().zero_(),
    "of a flattened": lambda c: c.flatten(2)[:, 1].fill_(0),
    "of a view": lambda c: c.view(-1).add_(1),
    "of a diagonal": lambda c: c.diagonal(0, 1, 2).zero_(),
    "of a window": lambda c: c.unfold(2, 2, 2).zero_(),
    "of strides": lambda c: c.as_strided((2, 2), (1, 1)).zero_(),
    "of a view of a view": lambda c: c.mT[0].transpose(0, 1).mul_(2),
    "of a split head": lambda c: c.split(24, -1)[0].copy_(torch.zeros(2, 3, 6, 24)),
    "out into a view": lambda c: torch.mul(ONES[..., 0], 2, out=c[..., 0]),
    "a list of views": lambda c: torch._foreach_zero_(list(c.unbind(-1))),
    "a reshaped buffer": lambda c: torch.cat([c, ONES], 2).view(2, -1, 48).zero_(),
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("codec", ["identity", "turboquant:3"])
@pytest.mark.parametrize("name", LOST)
def test_a_write_that_codes_cannot_follow_raises_a_sentence(name, codec, grad):
    cache = made(codec)
    before = [plane.clone() for plane in cache.planes]
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"compressed cache.*decode\(\)"):
        LOST[name](cache)
    assert cache.shape == SIZE and all(map(torch.equal, cache.planes, before))


def test_strides_over_a_view_have_nothing_to_go_by():
    with pytest.raises(RuntimeError, match=r"as_strided.*decode\(\)"):
        made().transpose(1, 2).as_strided((2, 2), (1, 1))
