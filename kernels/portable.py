"""Attention over compressed keys and values for any pair of codecs and any reader: the kernel, and its launcher.

The kernel is a skeleton: `key_scalars`, `key_numbers`, `value_scalars`, `value_numbers` and `read_scores` are printed
by `emit` for a pair of codecs and a reader, into a file that also holds the text of this kernel.

A program takes one KV head, a block of the rows (query head of the group, query) that read it, and one span of the
tokens; each token is decoded once for all rows of the block. Every reduction has a fixed order, so that equal inputs
give equal bits on one kind of device.
"""

import operator
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tqcompile import tables
from tqcompile.codec import Codec
from tqcompile.coding import Planes, split
from tqcompile.kernels import emit, launcher, tune
from tqcompile.kernels.combine import Sizes, maximum_of, sum_of
from tqcompile.kernels.emit import Reader

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
key_scalars = key_numbers = value_scalars = value_numbers = second_scalars = second_numbers = read_scores = None

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# fmt: off
@triton.jit(do_not_specialize=[
    "scale", "groups", "queries", "length", "span", "splits", "mask_b", "mask_h", "mask_t", "reach_b",
])
def attend_split(
    q, key_codes, key_scale, key_table, value_codes, value_scale, value_table, mask, reach, out, peaks, totals,
    second_q, second_codes, second_scale, second_table, scale, kv_heads, groups, queries, length, span, splits,
    q_b, q_h, q_t, q_d, key_b, key_h, key_s, key_scale_b, key_scale_h, key_scale_s,
    value_b, value_h, value_s, value_scale_b, value_scale_h, value_scale_s, mask_b, mask_h, mask_t, mask_s, reach_b,
    second_q_b, second_q_h, second_q_t, second_q_d, second_b, second_h, second_s,
    second_scale_b, second_scale_h, second_scale_s,
    REACH: tl.constexpr, SHARED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SECOND_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr, KEY_DOT: tl.constexpr, VALUE_DOT: tl.constexpr,
    SHRINK: tl.constexpr,
):
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    first = tl.program_id(2).to(tl.int64) * span
    if REACH:
        # The splits share the tokens that are seen, in whole tiles.
        begin = tl.load(reach + batch * reach_b)
        length = tl.load(reach + batch * reach_b + 1)
        span = (length - begin + splits * BLOCK_T - 1) // (splits * BLOCK_T) * BLOCK_T
        first = begin + tl.program_id(2).to(tl.int64) * span
    last = tl.minimum(first + span, length)

    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < groups * queries
    query = row % queries
    query_head = head * groups + row // queries
    d = tl.arange(0, BLOCK_K)
    address = q + batch * q_b + query_head[:, None] * q_h + query.to(tl.int64)[:, None] * q_t + d[None, :] * q_d
    asked = tl.load(address, mask=real[:, None] & (d[None, :] < KEY_DIM), other=0.0).to(KEY_TYPE).to(KEY_DOT)
    if SECOND_DIM:
        d = tl.arange(0, BLOCK_S)
        address = second_q + batch * second_q_b + query_head[:, None] * second_q_h + d[None, :] * second_q_d
        address += query.to(tl.int64)[:, None] * second_q_t
        beside = tl.load(address, mask=real[:, None] & (d[None, :] < SECOND_DIM), other=0.0).to(KEY_TYPE).to(KEY_DOT)
        second_codes += batch * second_b + head * second_h
        second_scale += batch * second_scale_b + head * second_scale_h
    mask_row = batch * mask_b + query_head * mask_h + query.to(tl.int64) * mask_t

    key_codes += batch * key_b + head * key_h
    key_scale += batch * key_scale_b + head * key_scale_h
    value_codes += batch * value_b + head * value_h
    value_scale += batch * value_scale_b + head * value_scale_h

    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.full([BLOCK_R], 0.0, tl.float32)
    mixed = tl.full([BLOCK_R, BLOCK_V], 0.0, tl.float32)
    for start in range(first, last, BLOCK_T):
        # Tokens count from the tile's first, whose address alone needs 64 bits.
        token = tl.arange(0, BLOCK_T)
        valid = token < last - start
        codes, scales = key_codes + start * key_s, key_scale + start * key_scale_s
        keys = key_numbers(codes, key_s, scales, key_scale_s, key_table, token, valid, BLOCK_K)
        scalars = key_scalars(codes, key_s, scales, key_scale_s, key_table, token, valid, BLOCK_K)
        keys = keys.to(KEY_TYPE).to(KEY_DOT)
        scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * scale * scalars[None, :]
        if SECOND_DIM:
            codes, scales = second_codes + start * second_s, second_scale + start * second_scale_s
            others = second_numbers(codes, second_s, scales, second_scale_s, second_table, token, valid, BLOCK_S)
            sizes = second_scalars(codes, second_s, scales, second_scale_s, second_table, token, valid, BLOCK_S)
            others = others.to(KEY_TYPE).to(KEY_DOT)
            scores += tl.dot(beside, tl.trans(others), input_precision="ieee") * sizes[None, :]
        inside = real[:, None] & valid[None, :]
        scores = read_scores(scores, mask + start * mask_s, mask_row, mask_s, query - start, token, inside)
        new_peak = tl.maximum(peak, maximum_of(scores, 1))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - pivot[:, None])
        rescale = tl.exp(peak - pivot)
        total = total * rescale + sum_of(weights, 1)
        peak = new_peak
        if SHARED:
            values = keys
        else:
            codes, scales = value_codes + start * value_s, value_scale + start * value_scale_s
            values = value_numbers(codes, value_s, scales, value_scale_s, value_table, token, valid, BLOCK_V)
            scalars = value_scalars(codes, value_s, scales, value_scale_s, value_table, token, valid, BLOCK_V)
            values = values.to(VALUE_TYPE).to(VALUE_DOT)
        weights = weights * scalars[None, :]
        mixed = mixed * rescale[:, None]
        if SHRINK:
            # float16 would flush the product of a small probability and a small scalar to zero.
            size = maximum_of(tl.abs(weights), 1)
            size = tl.where((size > 0.0) & (size < float("inf")), size, 1.0)[:, None]
            mixed += tl.dot((weights / size).to(VALUE_TYPE).to(VALUE_DOT), values, input_precision="ieee") * size
        else:
            mixed = tl.dot(weights.to(VALUE_TYPE).to(VALUE_DOT), values, mixed, input_precision="ieee")

    place = (tl.program_id(0).to(tl.int64) * splits + tl.program_id(2)) * (groups * queries) + row
    d = tl.arange(0, BLOCK_V)
    tl.store(out + place[:, None] * VALUE_DIM + d[None, :], mixed, mask=real[:, None] & (d[None, :] < VALUE_DIM))
    tl.store(peaks + place, peak, mask=real)
    tl.store(totals + place, total, mask=real)
# fmt: on


class Second(NamedTuple):
    """Keys in a cache of their own, whose scores with other queries are added: q [B, Hq, T, coordinates] in their
    basis, scaled, and planes [B, Hkv, S, width]."""

    q: torch.Tensor
    planes: Planes
    codec: Codec
    head_dim: int


def source(
    key_codec: Codec,
    value_codec: Codec,
    head_dims: tuple[int, int],
    reader: Reader,
    second: tuple[Codec, int] | None = None,
) -> str:
    """The text of the module that `launch` runs; `second` is the codec and the head_dim of more keys."""
    (key_dim, value_dim), keys, values = head_dims, key_codec.name, value_codec.name
    title = f"Attention over keys in {keys}, {key_dim} dims, and values in {values}, {value_dim} dims."
    helpers = (
        *emit.reading_helpers("key", key_codec, key_dim),
        *emit.reading_helpers("value", value_codec, value_dim),
        *(emit.reading_helpers("second", *second) if second else ()),
        emit.score_helper(reader),
    )
    return emit.module_text(title, helpers, (maximum_of, sum_of, attend_split))


@cache
def module(
    key_codec: Codec,
    value_codec: Codec,
    head_dims: tuple[int, int],
    reader: Reader,
    folder: str | None,
    interpreted: bool,
    second: tuple[Codec, int] | None = None,
) -> ModuleType:
    """The imported module of `source`."""
    return emit.build(source(key_codec, value_codec, head_dims, reader, second), folder, interpreted)


@cache
def table_of(codec: Codec, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers of a codec's tables, or one unused zero where numbers are computed.

    In `dtype` where a number is one entry, and in float32 where it is a product of some.
    """
    numbers = tables.all_numbers(codec, head_dim)
    return torch.tensor(numbers, dtype=dtype if codec.is_plain else torch.float32, device=device)


def launch(
    built: ModuleType, q, keys, values, mask, reach, scale: float, codecs, place, second: Second | None = None
) -> tuple[tuple[torch.Tensor, ...], Sizes]:
    """Run the kernel, and return what it leaves; `keys` and `values` are codes and scale, `mask` None or a mask and its
    strides."""
    heads, rows, value_dim = place
    key_dim, queries = q.shape[-1], q.shape[2]
    beside, others, other = q, keys, codecs[0]
    if second is not None:
        beside, others, other = second.q, split(second.codec, second.planes), second.codec
    width = beside.shape[-1]
    types = [product_dtype(q.dtype, codes) for codes, _ in (keys, values, others)]
    types[0] = torch.promote_types(types[0], types.pop())
    shared = types[0] == types[1] and is_shared(codecs, (key_dim, value_dim), keys, values)
    kv_heads, length = keys[0].shape[1], keys[0].shape[2]
    how = (max(key_dim, value_dim), torch.float32 in types, q.device)
    small = {
        "crowded": any(map(crowded, (*codecs, other))),
        "latent": shared and is_latent(q.dtype, codecs[0], key_dim),
    }
    plan = tune.attend_plan(rows, heads, length, *how, **small)
    sizes = Sizes(heads, plan.splits, rows, value_dim)
    left = sizes.parts(q)
    part, strides = mask if mask is not None else (q, (0, 0, 0, 0))
    sides = [_side(keys, codecs[0], key_dim, types[0]), _side(values, codecs[1], value_dim, types[1])]
    others = _side(others, other, width, types[0])
    # The interpreter multiplies bfloat16 by its bits; there the rounded numbers go to the product as float32.
    products = [torch.float32 if q.device.type == "cpu" else dtype for dtype in types]
    launcher.launch(
        built,
        "attend_split",
        (heads, -(-rows // plan.block_rows), plan.splits),
        (q, *sides[0], *sides[1], part, q if reach is None else reach, *left, beside, *others),
        (
            *(scale, kv_heads, rows // queries, queries, length, plan.span, plan.splits, *q.stride()),
            *(*_strides(sides[0]), *_strides(sides[1]), *strides, 0 if reach is None else reach.stride(0)),
            *(*beside.stride(), *_strides(others)),
        ),
        (
            *(reach is not None, shared, key_dim, value_dim, 0 if second is None else width),
            *(plan.block_rows, plan.block_tokens, *map(tune.extent, (key_dim, value_dim, width))),
            *(TRITON_DTYPES[dtype] for dtype in (*types, *products)),
            types[1] == torch.float16,
        ),
        num_warps=plan.warps,
        num_stages=1,
        maxnreg=plan.registers,
    )
    return left, sizes


def _side(planes: tuple[torch.Tensor, torch.Tensor | None], codec: Codec, dim: int, dtype: torch.dtype) -> tuple:
    """Codes, scales (codes again where a codec has none) and the table of numbers."""
    codes, scales = planes
    return codes, codes if scales is None else scales, table_of(codec, codec.head_dim(dim), dtype, codes.device)


def _strides(side: tuple) -> tuple[int, ...]:
    return (*side[0].stride()[:3], *side[1].stride()[:3])


def is_shared(codecs: tuple[Codec, Codec], dims: tuple[int, int], keys: Planes, values: Planes) -> bool:
    """Whether keys and values are the same codes in memory."""
    places = ([(plane.data_ptr(), plane.stride()) for plane in side if plane is not None] for side in (keys, values))
    return codecs[0] == codecs[1] and dims[0] == dims[1] and operator.eq(*places)


def is_latent(dtype: torch.dtype, codec: Codec, dim: int) -> bool:
    """Whether keys that are values, too, have tiles of their own: wide ones in half precision, of a scalar a token."""
    if crowded(codec) or dtype.itemsize != 2 or not tune.FUSED_DIMS < dim <= tune.LATENT_DIMS:
        return False
    # Codes in several pieces, as of 3 bits, take more registers: they are slower so.
    return codec.is_exact or (codec.scale.plane.per is None and codec.codes.plane.bits.bit_count() == 1)


def crowded(codec: Codec) -> bool:
    """Whether a number takes more than the load of a byte, and a scalar of its token."""
    if not codec.is_plain or codec.is_exact:
        return not codec.is_exact
    return codec.scale.plane.per is not None and codec.codes.plane.bits < 8


def product_dtype(query: torch.dtype, codes: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product: the query's, unless the cache holds floats of another, which it may not hold."""
    return query if codes.dtype in (query, torch.uint8) else torch.float32
