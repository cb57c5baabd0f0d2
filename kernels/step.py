"""What a decode step does before it attends, in one launch: rotate the query, encode and write its key and value.

A program takes one vector: a token of a KV head's keys or values, or one of a query head. `write_keys` and
`write_values` are printed by `emit`; what they read is rotated into memory that only their program sees.
"""

import math
from functools import cache, lru_cache
from types import ModuleType

import torch
import triton
import triton.language as tl

from tqcompile.codec import Codec
from tqcompile.coding import Planes, split
from tqcompile.kernels import emit, launcher, placement, tune
from tqcompile.kernels.append import check, edges_of, fitting, nearest, rounded
from tqcompile.kernels.combine import maximum_of, sum_of
from tqcompile.kernels.placement import Laid
from tqcompile.kernels.portable import table_of
from tqcompile.kernels.writers import writer, writes

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
write_keys = write_values = None


@triton.jit
def place_of(row, heads, tokens, stride_b, stride_h, stride_t):
    """Where the vector `row` of [B, heads, tokens] starts, and its token."""
    head = row // tokens
    token = (row % tokens).to(tl.int64)
    return (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h + token * stride_t, token


@triton.jit
def turn(x, x_d, basis, out, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr):
    """out [DIM] = basis [DIM, DIM] times x [DIM]."""
    i = tl.arange(0, BLOCK_D)
    number = tl.load(x + i * x_d, mask=i < DIM, other=0.0).to(tl.float32)
    for start in tl.static_range(0, BLOCK_D, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (j < DIM)[:, None] & (i < DIM)[None, :]
        part = tl.load(basis + j[:, None] * DIM + i[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(out + j, sum_of(part * number[None, :], 1).to(out.dtype.element_ty), mask=j < DIM)


@triton.jit
def place_in(positions, token, length, POSITIONED: tl.constexpr):
    """Where in its planes each token goes, and whether that is inside."""
    place = token
    if POSITIONED:
        place = tl.load(positions + token)
        tl.device_assert((place >= 0) & (place < length), "a position lies outside the cache")
    return place, (place >= 0) & (place < length)


# fmt: off
@triton.jit(do_not_specialize=["tokens", "key_rows", "value_rows", "key_length", "value_length"])
def append_step_rows(
    k, key_codes, key_scale, key_edges, key_table, key_basis,
    v, value_codes, value_scale, value_edges, value_table, value_basis, q, turned, scratch, positions,
    key_heads, value_heads, query_heads, tokens, queries, key_rows, value_rows, key_length, value_length,
    k_b, k_h, k_t, k_d, key_codes_b, key_codes_h, key_codes_s, key_scale_b, key_scale_h, key_scale_s,
    v_b, v_h, v_t, v_d, value_codes_b, value_codes_h, value_codes_s, value_scale_b, value_scale_h, value_scale_s,
    q_b, q_h, q_t, q_d,
    POSITIONED: tl.constexpr, TURNED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, KEY_J: tl.constexpr, VALUE_J: tl.constexpr,
):
    row = tl.program_id(0)
    one = tl.arange(0, 1)
    if row < key_rows:
        at, token = place_of(row, key_heads, tokens, k_b, k_h, k_t)
        scratch += row.to(tl.int64) * KEY_DIM
        turn(k + at, k_d, key_basis, scratch, KEY_DIM, BLOCK_K, KEY_J)
        tl.debug_barrier()
        place, inside = place_in(positions, token + one, key_length, POSITIONED)
        at, _ = place_of(row // tokens, key_heads, 1, key_codes_b, key_codes_h, 0)
        codes = key_codes + at + place * key_codes_s
        at, _ = place_of(row // tokens, key_heads, 1, key_scale_b, key_scale_h, 0)
        scale = key_scale + at + place * key_scale_s
        write_keys(scratch + one, 1, codes, scale, key_edges, key_table, inside, 1, BLOCK_K)
    elif row < key_rows + value_rows:
        row -= key_rows
        at, token = place_of(row, value_heads, tokens, v_b, v_h, v_t)
        source = v + at
        if TURNED:
            scratch += key_rows.to(tl.int64) * KEY_DIM + row.to(tl.int64) * VALUE_DIM
            turn(source, v_d, value_basis, scratch, VALUE_DIM, BLOCK_V, VALUE_J)
            tl.debug_barrier()
        place, inside = place_in(positions, token + one, value_length, POSITIONED)
        at, _ = place_of(row // tokens, value_heads, 1, value_codes_b, value_codes_h, 0)
        codes = value_codes + at + place * value_codes_s
        at, _ = place_of(row // tokens, value_heads, 1, value_scale_b, value_scale_h, 0)
        scale = value_scale + at + place * value_scale_s
        if TURNED:
            write_values(scratch + one, 1, codes, scale, value_edges, value_table, inside, 1, BLOCK_V)
        else:
            write_values(source + one, v_d, codes, scale, value_edges, value_table, inside, 1, BLOCK_V)
    else:
        row -= key_rows + value_rows
        at, _ = place_of(row, query_heads, queries, q_b, q_h, q_t)
        turn(q + at, q_d, key_basis, turned + row.to(tl.int64) * KEY_DIM, KEY_DIM, BLOCK_K, KEY_J)
# fmt: on


def source(key_codec: Codec, value_codec: Codec, head_dims: tuple[int, int]) -> str:
    """The text of the module that `append_step` launches."""
    title = f"Writes keys in {key_codec.name}, {head_dims[0]} dims, and values in {value_codec.name}, {head_dims[1]}."
    helpers = writer(key_codec, head_dims[0], "write_keys"), writer(value_codec, head_dims[1], "write_values")
    kernels = (
        maximum_of,
        sum_of,
        nearest,
        rounded,
        *fitting(key_codec, value_codec),
        place_of,
        turn,
        place_in,
        append_step_rows,
    )
    return emit.module_text(title, helpers, kernels)


@cache
def module(
    key_codec: Codec, value_codec: Codec, head_dims: tuple[int, int], folder: str | None, interpreted: bool
) -> ModuleType:
    """The imported module of `source`."""
    return emit.build(source(key_codec, value_codec, head_dims), folder, interpreted)


def takes(codecs: tuple[Codec, Codec], k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `append_step` writes such tokens: few, as many of both, in codecs that kernels write."""
    few = k.shape[2] == v.shape[2] <= tune.STEP_TOKENS
    return few and writes(codecs[0], k.shape[3]) and writes(codecs[1], v.shape[3])


def append_step(
    codecs: tuple[Codec, Codec],
    planes: tuple[Planes, Planes],
    tokens: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    positions: torch.Tensor | None,
    bases: tuple[torch.Tensor, torch.Tensor | None],
    folder: str | None = None,
) -> torch.Tensor:
    """Append keys and values, each rotated by its basis, and return q rotated by the first, in the basis' dtype.

    `tokens` are [A, B, T, head_dim] and q [B, Hq, Tq, head_dim], float32, float16 or bfloat16, any strides; planes and
    positions are as for `append`. Products are float32. Nothing waits for the device.

    Raises:
        IndexError: a position lies outside the planes, on a CPU.
        ValueError: tokens do not fill the planes, and there are no positions.
    """
    (k, v), (key_codes, key_scale), (value_codes, value_scale) = tokens, *map(split, codecs, planes)
    check(k, key_codes.shape[2], positions)
    check(v, value_codes.shape[2], positions)
    turned, written = q.new_empty(q.shape, dtype=bases[0].dtype), k.numel() + v.numel()
    if not written + q.numel():
        return turned
    scratch = q.new_empty(written, dtype=torch.float32)
    keys = k, key_codes, key_codes if key_scale is None else key_scale
    values = v, value_codes, value_codes if value_scale is None else value_scale
    laid = placement.laid((*keys, *values, q))
    kinds = tuple(map(launcher.kind_of, (positions, *bases)))
    call, key_tables, value_tables = _call(codecs, laid, kinds, folder)
    sides = *keys, *key_tables, bases[0], *values, *value_tables, v if bases[1] is None else bases[1]
    call((*sides, q, turned, scratch, q if positions is None else positions))
    return turned


@lru_cache(maxsize=4096)
def _call(
    codecs: tuple[Codec, Codec], laid: tuple[tuple, ...], kinds: tuple, folder: str | None
) -> tuple[launcher.Call, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The launch for tokens, codes and scales, keys' first, and a query that lie as `placement.laid` says, and tables
    of keys and of values; `kinds` are those of positions and of both bases (`launcher.kind_of`)."""
    k, key_codes, key_scale, v, value_codes, value_scale, q = [Laid(*each) for each in laid]
    dims, rows = (k.shape[3], v.shape[3]), [math.prod(side.shape[:3]) for side in (k, v, q)]
    tables = [
        (edges_of(codec, dim, q.device), table_of(codec, dim, torch.float32, q.device))
        for codec, dim in zip(codecs, dims)
    ]
    call = launcher.Call(
        module(*codecs, dims, folder, q.device.type == "cpu"),
        "append_step_rows",
        (sum(rows),),
        (
            *(k.shape[1], v.shape[1], q.shape[1], k.shape[2], q.shape[2]),
            *(*rows[:2], key_codes.shape[2], value_codes.shape[2]),
            *(*k.strides, *key_codes.strides[:3], *key_scale.strides[:3]),
            *(*v.strides, *value_codes.strides[:3], *value_scale.strides[:3], *q.strides),
        ),
        (kinds[0] is not None, kinds[2] is not None, *dims, *map(tune.extent, dims), *map(tune.turned_dims, dims)),
        num_warps=4,
        maxnreg=tune.APPEND_REGISTERS,
    )
    return call, *tables
