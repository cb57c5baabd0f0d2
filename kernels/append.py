"""Encodes tokens and writes them into their planes: the kernel, and its launcher.

`write_tokens` is printed by `emit` for a codec. A program takes a block of tokens of one row and head.
"""

from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl

from tqcompile import tables
from tqcompile.codec import Codec
from tqcompile.coding import Planes, split
from tqcompile.kernels import emit, launcher, tune
from tqcompile.kernels.combine import maximum_of, sum_of
from tqcompile.kernels.portable import table_of
from tqcompile.kernels.writers import writer

# Printed by `emit`; the name stands here so that the skeleton can be read, and checked, as ordinary Python.
write_tokens = None


@triton.jit
def nearest(unit, edges, bits: tl.constexpr):
    """How many of the ascending `edges` lie under `unit`, by bisection."""
    code = tl.full(unit.shape, 0, tl.int32)
    for level in tl.static_range(bits):
        half = 1 << (bits - 1 - level)
        code += tl.where(unit > tl.load(edges + code + (half - 1)), half, 0)
    return code


@triton.jit
def lowered(number, step, low: tl.constexpr):
    """number * (1 / step), from the half below it, as an integer within -low .. low - 1; -low where it is no number."""
    usable = step != 0.0
    ratio = number * tl.where(usable, tl.div_rn(1.0, tl.where(usable, step, 1.0)), 0.0) + (low + 0.5)
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    return tl.minimum(tl.maximum(ratio, 0.0), 2.0 * low - 1.0).to(tl.int32) - low


@triton.jit
def rounded(number, step, limit: tl.constexpr):
    """number / step to the nearest integer, halves to even, within -limit .. limit; 0 where that is no number."""
    usable = step > 0.0
    ratio = tl.where(usable, tl.div_rn(number, tl.where(usable, step, 1.0)), 0.0)
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    ratio = tl.minimum(tl.maximum(ratio, -limit), limit)
    # 1.5 * 2**23: the sum has no bits left for a fraction, and the adder rounds halves to even.
    return ((ratio + 12582912.0) - 12582912.0).to(tl.int32)


# fmt: off
@triton.jit(do_not_specialize=["tokens", "length"])
def append_tokens(
    y, codes, scale, edges, table, positions, heads, tokens, length,
    y_b, y_h, y_t, y_d, codes_b, codes_h, codes_s, scale_b, scale_h, scale_s,
    POSITIONED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = token < tokens
    token = token.to(tl.int64)
    if POSITIONED:
        place = tl.load(positions + token, mask=valid, other=0)
        inside = (place >= 0) & (place < length)
        tl.device_assert(inside, "a position lies outside the cache")
        valid = valid & inside
    else:
        place = token
    rows = y + batch * y_b + head * y_h + token * y_t
    code_rows = codes + batch * codes_b + head * codes_h + place * codes_s
    scale_rows = scale + batch * scale_b + head * scale_h + place * scale_s
    write_tokens(rows, y_d, code_rows, scale_rows, edges, table, valid, BLOCK_T, BLOCK_D)
# fmt: on


def fitting(*codecs: Codec) -> tuple:
    """The functions that writers of these codecs call beside those that all of them may."""
    return (lowered,) if any(codec.terms[0].fit == "extreme" for codec in codecs) else ()


def source(codec: Codec, head_dim: int) -> str:
    """The text of the module that `append` launches."""
    helpers = (writer(codec, head_dim),)
    kernels = (maximum_of, sum_of, nearest, rounded, *fitting(codec), append_tokens)
    return emit.module_text(f"Writes tokens of {head_dim} dims in {codec.name}.", helpers, kernels)


@cache
def module(codec: Codec, head_dim: int, folder: str | None, interpreted: bool) -> ModuleType:
    """The imported module of `source`."""
    return emit.build(source(codec, head_dim), folder, interpreted)


@cache
def edges_of(codec: Codec, head_dim: int, device: torch.device) -> torch.Tensor:
    """Where a nearest-centroid code changes, float32 [2**bits - 1]; one unused zero for other codecs."""
    plain = codec.is_plain and codec.codes.table == "codebook"
    edges = tables.boundaries(tables.numbers(codec.codes, head_dim)) if plain else (0.0,)
    return torch.tensor(edges, dtype=torch.float32, device=device)


def prepare(codec: Codec, head_dim: int, device: torch.device) -> None:
    """Put the tables of a codec on `device` before a CUDA graph is captured, whose memory they must not lie in."""
    edges_of(codec, head_dim, device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        table_of(codec, head_dim, dtype, device)


def check(y: torch.Tensor, length: int, positions: torch.Tensor | None) -> None:
    """Raise where tokens do not fit planes of `length` tokens; a GPU is not asked for its positions."""
    if positions is None and y.shape[2] != length:
        raise ValueError(f"y has {y.shape[2]} tokens and the planes {length}: without positions they must be equal")
    if y.device.type == "cpu" and positions is not None and ((positions < 0) | (positions >= length)).any():
        raise IndexError(f"a position lies outside the {length} tokens of the planes: {positions.tolist()}")


def append(
    codec: Codec, planes: Planes, y: torch.Tensor, positions: torch.Tensor | None, folder: str | None = None
) -> None:
    """`reference.append`, on a GPU, or in Triton's interpreter where the tensors are on a CPU.

    y [A, B, T, head_dim] float32, float16 or bfloat16 in the codec's basis, any strides; planes [A, B, S, width], any
    strides but contiguous in the last, written in place; `positions` int64 [T], or None where y fills the planes. A
    position outside the planes writes nothing on a GPU (with TRITON_DEBUG=1 from the start the device stops there); it
    never writes elsewhere. Positions must differ. Nothing waits for the device, and after the first call with the same
    codec and dtypes a CUDA graph can capture it. Generated files go to `folder`.

    Raises:
        IndexError: a position lies outside the planes, on a CPU.
        ValueError: y does not fill the planes, and there are no positions.
    """
    codes, scale = split(codec, planes)
    batch, heads, tokens, head_dim = y.shape
    length = codes.shape[2]
    check(y, length, positions)
    interpreted = y.device.type == "cpu"
    if not y.numel():
        return
    scale = codes if scale is None else scale
    block, warps = tune.append_plan(tokens, head_dim)
    tables = edges_of(codec, head_dim, y.device), table_of(codec, head_dim, torch.float32, y.device)
    launcher.launch(
        module(codec, head_dim, folder, interpreted),
        "append_tokens",
        (batch * heads, -(-tokens // block)),
        (y, codes, scale, *tables, y if positions is None else positions),
        (heads, tokens, length, *y.stride(), *codes.stride()[:3], *scale.stride()[:3]),
        (positions is not None, block, tune.extent(head_dim)),
        num_warps=warps,
        maxnreg=tune.APPEND_REGISTERS,
    )
