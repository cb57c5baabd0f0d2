"""A dense tensor becomes a `CompressedKV` where it stands, and memory is freed with its last holder."""

import gc
import pickle
import weakref

import pytest
import torch
from test_cache import EVERY_CODEC, FLOATS, SIZE, grown, made, same

from tqcompile import CompressedKV, formats
from tqcompile.adopt import adopt
from tqcompile.cache import storages

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
    # Told from every other tensor of the process by its size.
    tensor = torch.randn(4, 8, 61, 32)
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
