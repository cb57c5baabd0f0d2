"""Attention over compressed keys and values on a GPU: which kernels take a call, and what goes to them."""

from functools import lru_cache
from types import ModuleType

import torch

from tqcompile.codec import Codec
from tqcompile.coding import Planes, split
from tqcompile.kernels import chunks, decoded, exact, integer, launches, placement, portable, tune
from tqcompile.kernels.combine import combine
from tqcompile.kernels.emit import Reader
from tqcompile.kernels.placement import Laid
from tqcompile.kernels.portable import Second
from tqcompile.reference import rotate_back


def reader_of(mask: torch.Tensor | None, causal: bool, score_mod: str = "") -> Reader:
    """The reader that a score function, a mask and `causal` ask for."""
    if mask is None:
        return _reader("none", causal, score_mod)
    return _reader("bool" if mask.dtype == torch.bool else "additive", causal, score_mod)


# A reader checks its text when it is made, which each call would.
_reader = lru_cache(maxsize=4096)(Reader)


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
    2 or 3], says that `mask` hides all tokens but those from the first number to before the second: no other is read
    then. A third number says that it changes nothing before that token, from the first one on: there it is not read.
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
        ValueError: q has a dtype that no cache holds, its heads are no multiple of the planes', or a mask does not
            broadcast.
    """
    batch, query_heads, queries, _ = q.shape
    sides = split(key_codec, keys), split(value_codec, values)
    kv_heads, length = sides[0][0].shape[1], sides[0][0].shape[2]
    if q.dtype not in portable.TRITON_DTYPES or query_heads % max(1, kv_heads):
        raise ValueError(
            f"q is {q.dtype} with {query_heads} heads over {kv_heads} KV heads; want a float, and a multiple"
        )
    place = (batch * kv_heads, query_heads // max(1, kv_heads) * queries, value_codec.coordinates(head_dims[1]))
    shape = (batch, query_heads, queries, place[2] if basis is None else head_dims[1])
    if not place[0] * place[1] * length:
        return q.new_zeros(shape, dtype=dtype)
    codecs, sizes = (key_codec, value_codec), (batch, query_heads, queries, length)
    spread = _spread(mask, sizes)
    planes = [codes if plane is None else plane for codes, scale in sides for plane in (codes, scale)]
    laid = placement.laid((q, *planes))
    shared = q.shape[3] > tune.FUSED_DIMS and portable.is_shared(codecs, (q.shape[3], place[2]), *sides)
    kernel = kernel_of(codecs, head_dims, laid, shared, second is None, mask is not None and not known)
    if kernel is decoded:
        assert second is None, "of so many rows the scores of a second cache are to be a mask"
        tables = [portable.table_of(codec, dim, q.dtype, q.device) for codec, dim in zip(codecs, head_dims)]
        how = mask, causal, scale, codecs, head_dims, tables, folder, score_mod, sinks
        if known:
            return decoded.attend(asked, keys, values, *how, known).to(dtype)
        return rotate_back(decoded.attend(q, keys, values, *how), basis, dtype)
    others = order = None
    if known:
        reader = reader_of(mask, causal, score_mod)
        beside = exact.attend(asked, known, spread, scale, kv_heads, length, reader, folder)
        others = (beside[1], beside[2], torch.empty_like(beside[1]))
        mask = exact.hidden(mask, known, length, first, folder, owned)
        reach = None if reach is None else reach[:, :2]
        spread = _spread(mask, sizes)
    reader = reader_of(mask, causal, score_mod)
    if reach is not None and reach.shape[0] != batch:
        reach = reach.expand(batch, -1)
    if kernel is portable:
        more = None if second is None else (second.codec, second.head_dim)
        built = portable.module(*codecs, head_dims, reader, folder, q.device.type == "cpu", more)
        left, left_sizes = portable.launch(built, q, *sides, spread, reach, scale, codecs, place, second)
    else:
        how = scale, reader, folder
        left, left_sizes, order = launches.launched(
            kernel.prepared, q, planes, spread, reach, codecs, head_dims, how, laid
        )
    sinks = None if sinks is None else sinks.float().expand(batch, query_heads, queries, 1).contiguous()
    out = combine(left, left_sizes, shape, folder, basis, torch.float32 if known else dtype, sinks, others, order)
    if known:
        sums, shares = beside[0][: out.numel()].view(shape), others[2][: out.numel() // shape[3]].view(*shape[:3], 1)
        out = torch.addcmul(out, sums, shares).to(dtype)
    return out


@lru_cache(maxsize=4096)
def kernel_of(
    codecs: tuple[Codec, Codec],
    head_dims: tuple[int, int],
    laid: tuple[tuple, ...],
    shared: bool,
    alone: bool,
    is_masked: bool,
) -> ModuleType:
    """What attends for a query and codes and scales of keys and of values that lie as `placement.laid` says: `chunks`,
    `integer`, `decoded` or `portable`. They are `shared` where keys are the values, and not `alone` beside a second
    cache."""
    q, key_codes, _, value_codes, _ = (Laid(*each) for each in laid)
    codes, widths = (key_codes, value_codes), (q.shape[3], codecs[1].coordinates(head_dims[1]))
    if alone and chunks.takes(q, codes, codecs, head_dims, is_masked):
        return chunks
    rows = q.shape[1] // key_codes.shape[1] * q.shape[2]
    if rows > most_rows(q, codecs[0], widths, shared) and q.device.type == "cuda":
        return decoded
    return integer if alone and integer.takes(q, codes, codecs, head_dims) else portable


def most_rows(q, key_codec: Codec, widths: tuple[int, int], shared: bool) -> int:
    """Rows a KV head up to which no tokens are decoded for all of them at once; keys may be the values."""
    latent = shared and portable.is_latent(q.dtype, key_codec, widths[0])
    return tune.most_rows(max(widths), latent and tune.overlaps(q.device))


def joins(q, keys: Planes, values: Planes, codecs: tuple[Codec, Codec], head_dims: tuple[int, int], second) -> bool:
    """Whether a kernel reads a `second` cache of keys itself: where none on int8 units takes the first one and the
    values, rows are few, and both caches have as many heads."""
    heads, rows = keys[0].shape[1], q.shape[1] * q.shape[2]
    codes = split(codecs[0], keys)[0], split(codecs[1], values)[0]
    if second.planes[0].shape[1] != heads or integer.takes(q, codes, codecs, head_dims):
        return False
    widths = q.shape[3], codecs[1].coordinates(head_dims[1])
    shared = portable.is_shared(codecs, widths, keys, values)
    return q.device.type != "cuda" or rows <= heads * most_rows(q, codecs[0], widths, shared)


def _spread(mask: torch.Tensor | None, sizes: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]] | None:
    """A mask, and its strides over all queries and tokens."""
    if mask is None:
        return None
    strides = (0,) * (len(sizes) - mask.dim()) + mask.stride()
    shape = (1,) * (len(sizes) - mask.dim()) + mask.shape
    if len(shape) > len(sizes) or any(size not in (1, whole) for size, whole in zip(shape, sizes)):
        raise ValueError(f"mask is {list(mask.shape)}, which does not broadcast to {list(sizes)}")
    return mask, tuple([0 if size == 1 else stride for size, stride in zip(shape, strides)])
