"""Attention over compressed keys and values: the kernels, and their launcher.

The kernels are a skeleton: `key_scalars`, `key_numbers`, `value_scalars`, `value_numbers` and `read_scores` are printed
by `emit` for a pair of codecs and a reader, into a file that also holds the text of these kernels.

A program takes one KV head, a block of the rows (query head of the group, query) that read it, and one span of the
tokens; each token is decoded once for all rows of the block. Every reduction has a fixed order, so that equal inputs
give equal bits on one kind of device.
"""

from functools import cache, partial
from types import ModuleType

import torch
import triton
import triton.language as tl

from tqcompile import tables
from tqcompile.codec import Codec
from tqcompile.coding import Planes, split
from tqcompile.kernels import decoded, emit, exact, integer, tune
from tqcompile.kernels.combine import combine, maximum_of, parts, sum_of
from tqcompile.kernels.emit import Reader
from tqcompile.reference import rotate_back

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
key_scalars = key_numbers = value_scalars = value_numbers = read_scores = None

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# fmt: off
@triton.jit(do_not_specialize=[
    "scale", "groups", "queries", "length", "span", "splits", "mask_b", "mask_h", "mask_t", "reach_b",
])
def attend_split(
    q, key_codes, key_scale, key_table, value_codes, value_scale, value_table, mask, reach, out, peaks, totals,
    scale, kv_heads, groups, queries, length, span, splits,
    q_b, q_h, q_t, q_d, key_b, key_h, key_s, key_scale_b, key_scale_h, key_scale_s,
    value_b, value_h, value_s, value_scale_b, value_scale_h, value_scale_s, mask_b, mask_h, mask_t, mask_s, reach_b,
    REACH: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
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
        inside = real[:, None] & valid[None, :]
        scores = read_scores(scores, mask + start * mask_s, mask_row, mask_s, query - start, token, inside)
        new_peak = tl.maximum(peak, maximum_of(scores, 1))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - pivot[:, None])
        rescale = tl.exp(peak - pivot)
        total = total * rescale + sum_of(weights, 1)
        peak = new_peak
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


def source(key_codec: Codec, value_codec: Codec, head_dims: tuple[int, int], reader: Reader) -> str:
    """The text of the module that `attend` launches."""
    (key_dim, value_dim), keys, values = head_dims, key_codec.name, value_codec.name
    title = f"Attention over keys in {keys}, {key_dim} dims, and values in {values}, {value_dim} dims."
    helpers = (
        *emit.reading_helpers("key", key_codec, key_dim),
        *emit.reading_helpers("value", value_codec, value_dim),
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
) -> ModuleType:
    """The imported module of `source`."""
    return emit.build(source(key_codec, value_codec, head_dims, reader), folder, interpreted)


@cache
def table_of(codec: Codec, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers of a codec's tables, or one unused zero where numbers are computed.

    In `dtype` where a number is one entry, and in float32 where it is a product of some.
    """
    numbers = tables.all_numbers(codec, head_dim)
    return torch.tensor(numbers, dtype=dtype if codec.is_plain else torch.float32, device=device)


def reader_of(mask: torch.Tensor | None, causal: bool, score_mod: str = "") -> Reader:
    """The reader that a score function, a mask and `causal` ask for."""
    if mask is None:
        return Reader("none", causal, score_mod)
    return Reader("bool" if mask.dtype == torch.bool else "additive", causal, score_mod)


def attend(
    q: torch.Tensor,
    keys: Planes,
    values: Planes,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    key_codec: Codec,
    value_codec: Codec,
    head_dims: tuple[int, int],
    folder: str | None = None,
    reach: torch.Tensor | None = None,
    basis: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    score_mod: str = "",
    sinks: torch.Tensor | None = None,
    known: tuple[torch.Tensor, ...] = (),
    asked: torch.Tensor | None = None,
    first: int = 0,
    owned: bool = False,
) -> torch.Tensor:
    """`reference.attend`, on a GPU, or in Triton's interpreter where the tensors are on a CPU.

    q [B, Hq, T, D] float32, float16 or bfloat16 in the key basis, any strides; planes [B, Hkv, S, width], any strides
    but contiguous in the last; mask broadcasts to [B, Hq, T, S], bool (True keeps) or additive. `reach`, int32 [B or 1,
    2], says that `mask` hides all tokens but those from the first number to before the second: no other is read then.
    `known` are the numbers [B, Hkv, slots, D] and the index of keys and of values that `recent` keeps, `first` slots of
    them for the first tokens, and `asked` is q in the model's basis: they take the place of their tokens' codes. An
    `owned` mask, of float32 over all queries and tokens, may be written.
    Returns [B, Hq, T, Dv] in `dtype`, rotated back by `basis`. On a GPU, up to 128 rows a KV head over
    codes of two to five bits, or signed bytes in blocks of 32, run on int8 units (`integer`), with 15 bits of q and of
    the probabilities, and more rows of any codec on decoded heads (`decoded`). Elsewhere matrix products run in q's
    dtype (float32: without tf32) and accumulate in float32; a plane of native numbers in another dtype than q's is read
    as float32. Nothing waits for the device, and after a call with like arguments (codecs, dtypes, reader, strides) a
    CUDA graph can capture it. Generated files go to `folder`.

    Raises:
        ValueError: q has a dtype that no cache holds, or its heads are no multiple of the planes'.
    """
    batch, query_heads, queries, _ = q.shape
    key_codes, key_scale = split(key_codec, keys)
    value_codes, value_scale = split(value_codec, values)
    kv_heads, length = key_codes.shape[1], key_codes.shape[2]
    if q.dtype not in TRITON_DTYPES or query_heads % max(1, kv_heads):
        raise ValueError(
            f"q is {q.dtype} with {query_heads} heads over {kv_heads} KV heads; want a float, and a multiple"
        )
    rows = query_heads // max(1, kv_heads) * queries
    place = (batch * kv_heads, rows, value_codec.coordinates(head_dims[1]))
    shape = (batch, query_heads, queries, place[2] if basis is None else head_dims[1])
    if not batch * kv_heads * rows * length:
        return q.new_zeros(shape, dtype=dtype)
    reader, codecs = reader_of(mask, causal, score_mod), (key_codec, value_codec)
    widths = q.shape[3], place[2]
    if rows > tune.most_rows(max(widths)) and q.device.type == "cuda":
        tables = [table_of(codec, dim, q.dtype, q.device) for codec, dim in zip(codecs, head_dims)]
        how = mask, causal, scale, codecs, head_dims, tables, folder, score_mod, sinks
        if known:
            return decoded.attend(asked, keys, values, *how, known).to(dtype)
        return rotate_back(decoded.attend(q, keys, values, *how), basis, dtype)
    spread, others = partial(_spread, sizes=(batch, query_heads, queries, length)), None
    if known:
        beside = exact.attend(asked, known, spread(mask), scale, kv_heads, length, reader, folder)
        others = (beside[1], beside[2], torch.empty_like(beside[1]))
        mask = exact.hidden(mask, known, length, first, folder, owned)
        reader = reader_of(mask, causal, score_mod)
    mask = spread(mask)
    reach = None if reach is None else reach.expand(batch, 2)
    if integer.takes(q, keys, values, codecs, head_dims):
        allocate = partial(parts, q, *place)
        left = integer.launch(q, keys, values, mask, reach, scale, codecs, head_dims, reader, folder, allocate)
    else:
        built = module(*codecs, head_dims, reader, folder, q.device.type == "cpu")
        left = launch(built, q, (key_codes, key_scale), (value_codes, value_scale), mask, reach, scale, codecs, place)
    sinks = None if sinks is None else sinks.float().expand(batch, query_heads, queries, 1).contiguous()
    final = torch.float32 if known else dtype
    if basis is None or value_codec.is_plain:
        out = combine(left, place, folder, basis, final, sinks, others)
    else:
        # The last kernel rotates by square matrices.
        out = rotate_back(combine(left, place, folder, sinks=sinks, others=others), basis, final)
    if known:
        out = torch.addcmul(out, beside[0].squeeze(1), others[2].view(*place[:2], 1)).to(dtype)
    return out.view(shape)


def _spread(mask: torch.Tensor | None, sizes: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]] | None:
    """A mask as kernels take it, and its strides over all queries and tokens."""
    if mask is None:
        return None
    mask = mask.broadcast_to(sizes)
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), mask.stride()


def launch(built: ModuleType, q, keys, values, mask, reach, scale: float, codecs, place) -> tuple[torch.Tensor, ...]:
    """Run the portable kernel; `keys` and `values` are codes and scale, `mask` None or a mask and its strides."""
    heads, rows, value_dim = place
    key_dim, queries = q.shape[-1], q.shape[2]
    types = [product_dtype(q.dtype, codes) for codes, _ in (keys, values)]
    kv_heads, length = keys[0].shape[1], keys[0].shape[2]
    how = (max(key_dim, value_dim), torch.float32 in types, q.device)
    plan = tune.attend_plan(rows, heads, length, *how, crowded=any(map(crowded, codecs)))
    left = parts(q, *place, plan.splits)
    part, strides = mask if mask is not None else (q, (0, 0, 0, 0))
    sides = []
    for (codes, scales), codec, dim, dtype in zip((keys, values), codecs, (key_dim, value_dim), types):
        numbers = table_of(codec, codec.head_dim(dim), dtype, q.device)
        sides += [codes, codes if scales is None else scales, numbers]
    # The interpreter multiplies bfloat16 by its bits; there the rounded numbers go to the product as float32.
    products = [torch.float32 if q.device.type == "cpu" else dtype for dtype in types]
    built.attend_split[(heads, triton.cdiv(rows, plan.block_rows), plan.splits)](
        *(q, *sides, part, q if reach is None else reach, *left),
        *(scale, kv_heads, rows // queries, queries, length, plan.span, plan.splits),
        *(*q.stride(), *sides[0].stride()[:3], *sides[1].stride()[:3], *sides[3].stride()[:3], *sides[4].stride()[:3]),
        *(*strides, 0 if reach is None else reach.stride(0), reach is not None),
        *(key_dim, value_dim, plan.block_rows, plan.block_tokens, tune.extent(key_dim), tune.extent(value_dim)),
        *(TRITON_DTYPES[dtype] for dtype in (*types, *products)),
        types[1] == torch.float16,
        num_warps=plan.warps,
        num_stages=1,
        maxnreg=plan.registers,
    )
    return left


def crowded(codec: Codec) -> bool:
    """Whether a number takes more than the load of a byte, and a scalar of its token."""
    if not codec.is_plain or codec.is_exact:
        return not codec.is_exact
    return codec.scale.plane.per is not None and codec.codes.plane.bits < 8


def product_dtype(query: torch.dtype, codes: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product: the query's, unless the cache holds floats of another, which it may not hold."""
    return query if codes.dtype in (query, torch.uint8) else torch.float32
