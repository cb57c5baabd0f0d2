"""`CompressedKV` as other code reads it: encoded, printed, indexed, and decoded for what computes."""

import numpy as np
import pytest
import torch
from conversations import fake_quantised

from tqcompile import CompressedKV, coding, formats, reference

F = torch.nn.functional
CODECS = ("identity", "q8_0", "turboquant:3", "turboquant_prod:2")
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
    return coding.decode(cache.codec, cache.planes, cache.shape[-1])


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
    # Sums of up to 96 numbers in float32, in an order that depends on the CPU.
    torch.testing.assert_close(found * 1, dense, atol=4e-6, rtol=0)
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
