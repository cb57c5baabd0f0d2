"""Attention over compressed keys and values on a GPU: which kernels take a call, and what goes to them."""

from functools import partial

import torch

from tqcompile.codec import Codec
from tqcompile.coding import Planes, split
from tqcompile.kernels import chunks, decoded, exact, integer, portable, tune
from tqcompile.kernels.combine import combine, parts
from tqcompile.kernels.emit import Reader
from tqcompile.kernels.portable import Second
from tqcompile.reference import rotate_back


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
    second: Second | None = None,
) -> torch.Tensor:
    """`reference.attend`, on a GPU, or in Triton's interpreter where the tensors are on a CPU.

    q [B, Hq, T, D] float32, float16 or bfloat16 in the key basis, any strides; planes [B, Hkv, S, width], any strides
    but contiguous in the last; mask broadcasts to [B, Hq, T, S], bool (True keeps) or additive. `reach`, int32 [B or 1,
    2], says that `mask` hides all tokens but those from the first number to before the second: no other is read then.
    `known` are the numbers [B, Hkv, slots, D] and the index of keys and of values that `recent` keeps, `first` slots of
    them for the first tokens, and `asked` is q in the model's basis: they take the place of their tokens' codes. An
    `owned` mask, of float32 over all queries and tokens, may be written. The scores of a `second` cache of keys, where
    `joins` takes it, are added to the others before the mask.
    Returns [B, Hq, T, Dv] in `dtype`, rotated back by `basis`. On a GPU, up to 128 rows a KV head over codes of one to
    five bits, in several pieces or not, or signed bytes or nibbles in blocks of 32, run on int8 units (`integer`), with
    15 bits of q and of the probabilities; but where `chunks` takes rows of q in bfloat16, on Hopper, from 25 or 33 on,
    these are multiplied as bfloat16, and so are the probabilities. More rows, of any codec, attend to decoded heads
    (`decoded`). Elsewhere products run in the dtype of q (float32: without tf32) and accumulate in float32; a plane of
    native numbers in another dtype than q's is read as float32. Nothing waits for the device, and after a call with
    like arguments (codecs, dtypes, reader, strides) a CUDA graph can capture it. Generated files go to `folder`.

    Raises:
        ValueError: q has a dtype that no cache holds, or its heads are no multiple of the planes'.
    """
    batch, query_heads, queries, _ = q.shape
    key_codes, key_scale = split(key_codec, keys)
    value_codes, value_scale = split(value_codec, values)
    kv_heads, length = key_codes.shape[1], key_codes.shape[2]
    if q.dtype not in portable.TRITON_DTYPES or query_heads % max(1, kv_heads):
        raise ValueError(
            f"q is {q.dtype} with {query_heads} heads over {kv_heads} KV heads; want a float, and a multiple"
        )
    rows = query_heads // max(1, kv_heads) * queries
    place = (batch * kv_heads, rows, value_codec.coordinates(head_dims[1]))
    shape = (batch, query_heads, queries, place[2] if basis is None else head_dims[1])
    if not batch * kv_heads * rows * length:
        return q.new_zeros(shape, dtype=dtype)
    reader, codecs = reader_of(mask, causal, score_mod), (key_codec, value_codec)
    widths, masked = (q.shape[3], place[2]), mask is not None and not known
    chunked = second is None and chunks.takes(q, keys, values, codecs, head_dims, masked)
    if not chunked and rows > most_rows(q, keys, values, codecs, widths) and q.device.type == "cuda":
        assert second is None, "of so many rows the scores of a second cache are to be a mask"
        tables = [portable.table_of(codec, dim, q.dtype, q.device) for codec, dim in zip(codecs, head_dims)]
        how = mask, causal, scale, codecs, head_dims, tables, folder, score_mod, sinks
        if known:
            return decoded.attend(asked, keys, values, *how, known).to(dtype)
        return rotate_back(decoded.attend(q, keys, values, *how), basis, dtype)
    spread, others, order = partial(_spread, sizes=(batch, query_heads, queries, length)), None, None
    if known:
        beside = exact.attend(asked, known, spread(mask), scale, kv_heads, length, reader, folder)
        others = (beside[1], beside[2], torch.empty_like(beside[1]))
        mask = exact.hidden(mask, known, length, first, folder, owned)
        reader = reader_of(mask, causal, score_mod)
    mask = spread(mask)
    reach = None if reach is None else reach.expand(batch, 2)
    given = q, keys, values, mask, reach, scale, codecs, head_dims, reader, folder, partial(parts, q, *place[:2])
    if chunked:
        left = chunks.launch(*given)
    elif second is None and integer.takes(q, keys, values, codecs, head_dims):
        left, order = integer.launch(*given), integer.order_of(codecs[1], head_dims[1], q.device)
    else:
        more = None if second is None else (second.codec, second.head_dim)
        built = portable.module(*codecs, head_dims, reader, folder, q.device.type == "cpu", more)
        sides = (key_codes, key_scale), (value_codes, value_scale)
        left = portable.launch(built, q, *sides, mask, reach, scale, codecs, place, second)
    sinks = None if sinks is None else sinks.float().expand(batch, query_heads, queries, 1).contiguous()
    final = torch.float32 if known else dtype
    if basis is None or basis.shape[0] == basis.shape[1]:
        out = combine(left, place, folder, basis, final, sinks, others, order)
    else:
        # The last kernel rotates by square matrices.
        out = rotate_back(combine(left, place, folder, sinks=sinks, others=others, order=order), basis, final)
    if known:
        out = torch.addcmul(out, beside[0].squeeze(1), others[2].view(*place[:2], 1)).to(dtype)
    return out.view(shape)


def most_rows(q: torch.Tensor, keys: Planes, values: Planes, codecs: tuple[Codec, Codec], dims: tuple[int, int]) -> int:
    """Rows a KV head up to which no tokens are decoded for all of them at once."""
    latent = portable.is_latent(q.dtype, codecs[0], dims[0]) and portable.is_shared(codecs, dims, keys, values)
    return tune.most_rows(max(dims), latent and tune.overlaps(q.device))


def joins(q, keys: Planes, values: Planes, codecs: tuple[Codec, Codec], head_dims: tuple[int, int], second) -> bool:
    """Whether a kernel reads a `second` cache of keys itself: where none on int8 units takes the first one and the
    values, rows are few, and both caches have as many heads."""
    heads, rows = keys[0].shape[1], q.shape[1] * q.shape[2]
    if second.planes[0].shape[1] != heads or integer.takes(q, keys, values, codecs, head_dims):
        return False
    widths = q.shape[3], codecs[1].coordinates(head_dims[1])
    return q.device.type != "cuda" or rows <= heads * most_rows(q, keys, values, codecs, widths)


def _spread(mask: torch.Tensor | None, sizes: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]] | None:
    """A mask as kernels take it, and its strides over all queries and tokens."""
    if mask is None:
        return None
    mask = mask.broadcast_to(sizes)
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), mask.stride()
