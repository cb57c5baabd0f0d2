"""Attention of many rows: keys and values are decoded once, a bounded part of the heads at a time, and read densely.

Where hundreds of rows share a token, its product with them costs more than reading it in full precision does.
"""

import math
import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from tqcompile import tables
from tqcompile.codec import Codec
from tqcompile.coding import Planes, split
from tqcompile.kernels import emit, launcher, tune
from tqcompile.kernels.combine import maximum_of
from tqcompile.recent import counting
from tqcompile.reference import rotate_back, softmax
from tqcompile.scores import apply as scores_of

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
token_scalars = token_numbers = None

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# Bytes of decoded keys and values that are held at once, unless one head has more.
DECODED_BYTES = 2**28


# fmt: off
@triton.jit(do_not_specialize=["heads", "length"])
def decode_tokens(
    codes, scale, table, out, heads, length,
    codes_b, codes_h, codes_s, scale_b, scale_h, scale_s,
    DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * BLOCK_T
    codes += row // heads * codes_b + row % heads * codes_h + start * codes_s
    scale += row // heads * scale_b + row % heads * scale_h + start * scale_s
    token, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    valid = token < length - start
    numbers = token_numbers(codes, codes_s, scale, scale_s, table, token, valid, BLOCK_D)
    scalars = token_scalars(codes, codes_s, scale, scale_s, table, token, valid, BLOCK_D)
    number = (numbers * scalars[:, None]).to(out.dtype.element_ty)
    place = out + (row * length + start) * DIM + token[:, None] * DIM + d[None, :]
    tl.store(place, number, mask=valid[:, None] & (d < DIM)[None, :])
# fmt: on


def source(codec: Codec, head_dim: int) -> str:
    """The text of the module that `decode` launches."""
    helpers = emit.reading_helpers("token", codec, head_dim)
    return emit.module_text(f"Decodes tokens of {head_dim} dims in {codec.name}.", helpers, (maximum_of, decode_tokens))


@cache
def module(codec: Codec, head_dim: int, folder: str | None, interpreted: bool) -> ModuleType:
    """The imported module of `source`."""
    return emit.build(source(codec, head_dim), folder, interpreted)


def decode(
    codec: Codec, planes: Planes, table: torch.Tensor, head_dim: int, dtype: torch.dtype, folder: str | None = None
) -> torch.Tensor:
    """`coding.decode` of planes [B, H, S, width], any strides but contiguous in the last: [B, H, S, coordinates]."""
    codes, scale = split(codec, planes)
    batch, heads, length = codes.shape[:3]
    width = codec.coordinates(head_dim)
    out = codes.new_empty((batch, heads, length, width), dtype=dtype)
    scale = codes if scale is None else scale
    block = max(1, tune.DECODED_NUMBERS // tune.extent(width))
    built = module(codec, head_dim, folder, codes.device.type == "cpu")
    launcher.launch(
        built,
        "decode_tokens",
        (batch * heads, -(-length // block)),
        (codes, scale, table, out),
        (heads, length, *codes.stride()[:3], *scale.stride()[:3]),
        (width, block, tune.extent(width)),
        num_warps=4,
    )
    return out


def parts(batch: int, heads: int, bytes_per_head: int) -> Iterator[tuple[slice, slice]]:
    """Sequences and KV heads that are decoded at once."""
    most = max(1, DECODED_BYTES // max(1, bytes_per_head))
    rows, columns = max(1, most // heads), min(heads, most)
    for first in range(0, batch, rows):
        for head in range(0, heads, columns):
            yield slice(first, first + rows), slice(head, head + columns)


def attend(
    q: torch.Tensor,
    keys: Planes,
    values: Planes,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    codecs: tuple[Codec, Codec],
    head_dims: tuple[int, int],
    look_ups: tuple[torch.Tensor, torch.Tensor],
    folder: str | None = None,
    score_mod: str = "",
    sinks: torch.Tensor | None = None,
    known: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """`reference.attend` [B, Hq, T, Dv] in q's dtype, by the dense attention of PyTorch over decoded heads.

    `mask` broadcasts to [B, Hq, T, S]; `look_ups` are the numbers of the codebooks. Scores are spelled out, for a
    bounded number of queries at a time, where there is a `score_mod`, or are `sinks`, or heads too wide to be fused.
    With `known`, what `recent` keeps of keys and of values, all is in the model's basis, q and the result, too.
    """
    batch, query_heads, queries, _ = q.shape
    kv_heads, length = keys[0].shape[1:3]
    groups = query_heads // kv_heads
    widths = head_dims if known else [codec.coordinates(dim) for codec, dim in zip(codecs, head_dims)]
    out = q.new_empty((batch, query_heads, queries, widths[1]))
    spelled = score_mod or sinks is not None or max(widths) > tune.FUSED_DIMS
    if mask is not None:
        mask = _in_dtype(mask, q.dtype) if mask.is_floating_point() and not spelled else mask
        mask = mask.broadcast_to(batch, query_heads, queries, length)
    for rows, heads in parts(batch, kv_heads, length * sum(widths) * q.element_size()):
        asked = slice(heads.start * groups, heads.stop * groups)
        decoded = [
            decode(codec, [plane[rows, heads] for plane in planes], table, dim, q.dtype, folder)
            for codec, planes, table, dim in zip(codecs, (keys, values), look_ups, head_dims)
        ]
        if known:
            bases = [tables.basis_matrix(codec, dim, q.device) for codec, dim in zip(codecs, head_dims)]
            decoded = [rotate_back(each, basis, q.dtype) for each, basis in zip(decoded, bases)]
            for each, numbers in zip(decoded, known[::2]):
                put(each, numbers[rows, heads], known, length)
        part = None if mask is None else mask[rows, asked]
        if spelled:
            logit = None if sinks is None else sinks.expand(batch, query_heads, queries, 1)[rows, asked]
            out[rows, asked] = spelled_out(q[rows, asked], *decoded, part, causal, scale, score_mod, logit)
        else:
            out[rows, asked] = dense(q[rows, asked], *decoded, part, causal, scale)
    return out


def put(decoded: torch.Tensor, numbers: torch.Tensor, known: Planes, length: int) -> None:
    """Write into decoded [B, H, S, D] those rows of numbers [B, H, slots, D] that are of its tokens, in place."""
    counts, index = counting(known, 0, length), known[1]
    # A slot that is void writes what another one does, or what is there.
    other = counts.int().argmax().view(1)
    place = torch.where(counts, index, index.index_select(0, other)).clamp(0, length - 1)
    rows = torch.where(counts[:, None], numbers, numbers.index_select(2, other))
    there = decoded.index_select(2, place)
    decoded.index_copy_(2, place, torch.where(counts.any(), rows.to(decoded.dtype), there))


def spelled_out(q, k, v, mask, causal: bool, scale: float, score_mod: str, sinks: torch.Tensor | None) -> torch.Tensor:
    """Attention whose scores lie in memory, in float32: those of a few queries at a time."""
    batch, heads, queries, _ = q.shape
    length, out = k.shape[2], []
    most = max(1, DECODED_BYTES // max(1, batch * heads * length * 4))
    for start in range(0, queries, most):
        run = slice(start, start + most)
        rows = (q[:, :, run] * scale).reshape(batch, k.shape[1], -1, q.shape[3])
        scores = scores_of(score_mod, (rows @ k.mT).float().view(batch, heads, -1, length))
        if causal:
            query = torch.arange(queries, device=q.device)[run, None]
            scores = scores.masked_fill(torch.arange(length, device=q.device) > query, -math.inf)
        part = [None if tensor is None else tensor[:, :, run] for tensor in (mask, sinks)]
        weights = softmax(scores, part[0], False, sinks=part[1]).to(v.dtype)
        out.append((weights.view(batch, v.shape[1], -1, length) @ v).view(batch, heads, -1, v.shape[3]))
    return torch.cat(out, 2)


def _in_dtype(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask in `dtype`, where its finite numbers stay finite: a row of none but those sees all alike.

    Half of what `dtype` holds: fused attention multiplies by the logarithm's base, 1.44.
    """
    limit = torch.finfo(dtype).max / 2
    return torch.where(mask.isinf(), mask, mask.clamp(-limit, limit)).to(dtype)


def logits(q: torch.Tensor, keys: Planes, codec: Codec, look_up: torch.Tensor, folder: str | None = None):
    """`reference.logits` in q's dtype: q [B, Hq, T, D] in the key basis times decoded keys, [B, Hq, T, S]."""
    batch, kv_heads, length = keys[0].shape[:3]
    head_dim = codec.head_dim(q.shape[-1])
    queries = q.reshape(batch, kv_heads, -1, q.shape[-1])
    out = q.new_empty((batch, kv_heads, queries.shape[2], length))
    for part in parts(batch, kv_heads, length * q.shape[-1] * q.element_size()):
        decoded = decode(codec, [plane[part] for plane in keys], look_up, head_dim, q.dtype, folder)
        out[part] = queries[part] @ decoded.mT
    return out.view(*q.shape[:3], length)


def mix(
    weights: torch.Tensor,
    values: Planes,
    codec: Codec,
    look_up: torch.Tensor,
    head_dim: int,
    folder: str | None = None,
) -> torch.Tensor:
    """`reference.mix` in the weights' dtype: weights [B, Hq, T, S] times decoded values, [B, Hq, T, coordinates]."""
    batch, kv_heads, length = values[0].shape[:3]
    rows = weights.reshape(batch, kv_heads, -1, length)
    width = codec.coordinates(head_dim)
    out = weights.new_empty((batch, kv_heads, rows.shape[2], width))
    for part in parts(batch, kv_heads, length * width * weights.element_size()):
        decoded = decode(codec, [plane[part] for plane in values], look_up, head_dim, weights.dtype, folder)
        out[part] = rows[part] @ decoded
    return out.view(*weights.shape[:3], width)


def dense(q, k, v, mask, causal: bool, scale: float) -> torch.Tensor:
    """The attention of PyTorch, by a fused kernel: where none takes grouped heads they are repeated."""
    groups, options = q.shape[1] // k.shape[1], {"is_causal": causal, "scale": scale}
    # PyTorch warns of each kernel that it does not take before it raises.
    with sdpa_kernel(FUSED), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=groups > 1, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # How a backend says that it does not take grouped heads, or this mask.
            pass
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **options)
