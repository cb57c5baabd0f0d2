"""The operators on a CPU: the reference, with its row codecs and the attention of single queries compiled.

For one query a head, `logits` and `mix` are each one loop nest that reads codes and adds up products: a decoded row
lives in registers only. More queries take matrix products over blocks of rows that `decode_rows` makes.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial, reduce

import torch

from tqcompile import coding, reference, tables
from tqcompile.codec import Codec
from tqcompile.layout import PlaneLayout, Section

Tensors = Sequence[torch.Tensor]

# Queries that share a head of keys: each has sums of its own, in registers.
MOST_QUERIES = 8
# Tokens that one sum of `mix` runs over before it is added to the others: threads share these out.
CHUNK = 128
# Float32 numbers in the widest vector register of today.
LANES = 16

# Rows, or tokens of a head, that are compiled for: enough to be shared out between threads.
ROWS = 2**14

_compile_rows: Callable | None = None
_functions: dict[tuple, Callable] = {}


def use_row_compiler(compile_rows: Callable | None) -> None:
    """Install the compiler: `compile_rows(function, example tensors) -> function`. None: run everything eagerly.

    What it makes takes tensors of any size and stride in each dimension but the last.
    """
    global _compile_rows
    _compile_rows = compile_rows


def attend(
    q, keys, values, mask, causal, scale, key_codec, value_codec, head_dims, score_mod="", sinks=None, exact=None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.attend_beside`, compiled for single queries."""
    if not (_compiles(key_codec, q, keys) and _compiles(value_codec, q, values)):
        how = mask, causal, scale, key_codec, value_codec, head_dims, score_mod, sinks
        return reference.attend_beside(q, keys, values, *how, exact, decode_rows)
    scores = logits(q.float() * scale, keys, key_codec, head_dims[0])
    length, weights = scores.shape[-1], reference.softmax(scores, mask, causal, score_mod, sinks, exact, scale)
    out = mix(weights[..., :length], values, value_codec, head_dims[1])
    return out, None if exact is None else exact.mixed(weights[..., length:])


def logits(q: torch.Tensor, keys: Tensors, codec: Codec, head_dim: int) -> torch.Tensor:
    """`reference.logits`, compiled for single queries."""
    if not _compiles(codec, q, keys):
        return reference.logits(q, keys, codec, head_dim, decode_rows)
    queries, planes = _by_head(q, keys)
    queries = queries.flatten(1).contiguous()
    compute = _compiled(_logits_of_rows, codec, head_dim, [queries, *planes], _attention_sizes())
    out = [compute(queries, *block)[0] for block in _blocks(planes)]
    return (out[0] if len(out) == 1 else torch.cat(out, -1)).view(*q.shape[:3], -1)


def mix(weights: torch.Tensor, values: Tensors, codec: Codec, head_dim: int) -> torch.Tensor:
    """`reference.mix`, compiled for single queries."""
    # Numbers that are made of neighbours' codes go to memory first: for a sum over tokens Inductor lays those codes out
    # coordinate by coordinate, and takes five times as long.
    if not _compiles(codec, weights, values) or codec.is_sequential:
        return reference.mix(weights, values, codec, head_dim, decode_rows)
    by_head, planes = _by_head(weights, values)
    tensors = [*by_head.unsqueeze(-1).unbind(1), *planes]
    parts = [part for block in _blocks(tensors) for part in _in_chunks(block)]
    compute = _compiled(_mix_of_rows, codec, head_dim, parts[0], (*_attention_sizes(), CHUNK))
    return reduce(torch.add, [compute(*part)[0] for part in parts]).view(*weights.shape[:3], -1)


def decode_rows(codec: Codec, planes: Tensors, head_dim: int) -> torch.Tensor:
    """`coding.decode` of planes [..., width], folded into rows and compiled once a codec and head_dim."""
    if _compile_rows is None or codec.is_exact or planes[0].shape[:-1].numel() < 2:
        return coding.decode(codec, planes, head_dim)
    # Rows in the order they lie in memory: whatever the model's order of dimensions is, nothing is copied.
    order = sorted(range(planes[0].dim() - 1), key=planes[0].stride, reverse=True)
    ordered = [plane.permute(*order, -1) for plane in planes]
    leading = ordered[0].shape[:-1]
    rows = _full_precision(plane.reshape(-1, plane.shape[-1]).contiguous() for plane in ordered)
    decode = _compiled(_decode_rows, codec, head_dim, rows, (ROWS,))
    back = sorted(range(len(order)), key=order.__getitem__)
    return decode(*rows)[0].view(*leading, -1).permute(*back, -1)


def encode_rows(codec: Codec, y: torch.Tensor) -> Tensors:
    """`coding.encode` of y [..., coordinates], folded into rows and compiled once a codec, head_dim and dtype.

    What is sequential runs as it is.
    """
    if _compile_rows is None or codec.is_exact or codec.is_sequential or y.shape[:-1].numel() < 2:
        return coding.encode(codec, y)
    rows = y.reshape(-1, y.shape[-1]).contiguous()
    encode = _compiled(_encode_rows, codec, codec.head_dim(y.shape[-1]), [rows], (ROWS,))
    return [plane.view(*y.shape[:-1], plane.shape[-1]) for plane in encode(rows)]


def _compiles(codec: Codec, queries: torch.Tensor, planes: Tensors) -> bool:
    """Whether queries [B, Hq, T, ...] of planes [B, Hkv, S, width] are few enough, and tokens are there."""
    few = queries.shape[2] == 1 and queries.shape[1] <= MOST_QUERIES * planes[0].shape[1]
    able = _compile_rows is not None and not codec.is_exact and queries.device.type == "cpu"
    # Heads of all sequences as one dimension, without a copy of the cache.
    folds = planes[0].shape[0] == 1 or planes[0].stride(0) == planes[0].shape[1] * planes[0].stride(1)
    return able and few and folds and planes[0].numel() > 0


def _by_head(queries: torch.Tensor, planes: Tensors) -> tuple[torch.Tensor, Tensors]:
    """Queries [heads, queries, ...] float32 and planes [heads, S, width], where heads are those of all the batch."""
    planes = _full_precision(plane.flatten(0, 1) for plane in planes)
    return queries.float().reshape(planes[0].shape[0], -1, queries.shape[-1]), planes


def _full_precision(planes) -> list[torch.Tensor]:
    """Scales as float32: a float16 operand makes Inductor work on two vectors at a time, as arrays, and slowly."""
    return [plane.float() if plane.is_floating_point() else plane for plane in planes]


def _blocks(tensors: Tensors) -> list[Tensors]:
    """Tensors [heads, S, ...] cut along S, so that a vector for each token and head stays as small as one block."""
    heads, length = tensors[0].shape[:2]
    size = max(CHUNK, reference.BLOCK_ELEMENTS // (heads * LANES) // CHUNK * CHUNK)
    if length <= size:
        return [tensors]
    return [[tensor[:, start : start + size] for tensor in tensors] for start in range(0, length, size)]


def _in_chunks(tensors: Tensors) -> list[Tensors]:
    """Tensors [heads, S, ...] as [heads, chunks, CHUNK, ...], and one shorter chunk where tokens are left."""
    chunks, rest = divmod(tensors[0].shape[1], CHUNK)
    whole = [tensor[:, : chunks * CHUNK].unflatten(1, (chunks, CHUNK)) for tensor in tensors] if chunks else None
    left = [tensor[:, None, chunks * CHUNK :] for tensor in tensors] if rest else None
    return [part for part in (whole, left) if part is not None]


def _compiled(function: Callable, codec: Codec, head_dim: int, tensors: Tensors, sizes: tuple[int, ...]) -> Callable:
    """`function(codec, head_dim, *tensors)`, compiled at its first use for tensors [*sizes, last] like these."""
    # Inductor compiles for a number of threads.
    key = (
        function,
        codec,
        head_dim,
        tensors[0].device,
        torch.get_num_threads(),
        *((tensor.shape[-1], tensor.dtype) for tensor in tensors),
    )
    if key not in _functions:
        tables.prepare(codec, head_dim)
        examples = [_example(each, sizes[: each.dim() - 1], place + 1) for place, each in enumerate(tensors)]
        _functions[key] = _compile_rows(partial(function, codec, head_dim), examples)
    return _functions[key]


def _example(tensor: torch.Tensor, sizes: tuple[int, ...], padding: int) -> torch.Tensor:
    """[*sizes, last], with strides that follow from no size and from no other example: what is compiled takes any."""
    shape = (*sizes, tensor.shape[-1])
    padded = torch.empty([size + padding for size in shape], dtype=tensor.dtype, device=tensor.device)
    return padded[tuple(map(slice, shape))]


def _attention_sizes() -> tuple[int, int]:
    """Heads and tokens to compile for. They tell Inductor what to share out between threads: heads and tokens both."""
    return torch.get_num_threads() + 1, ROWS


def _decode_rows(codec: Codec, head_dim: int, *planes: torch.Tensor) -> Tensors:
    return (coding.decode(codec, planes, head_dim),)


def _encode_rows(codec: Codec, head_dim: int, rows: torch.Tensor) -> Tensors:
    return coding.encode(codec, rows)


def _logits_of_rows(codec: Codec, head_dim: int, queries: torch.Tensor, *planes: torch.Tensor) -> Tensors:
    """Queries [N, G * D], planes [N, S, width] -> [N, G, S]: G sums over one expression, which is decoded once."""
    pieces = coding.pieces(codec, planes, head_dim, wide_runs)
    out = []
    for query in queries.unsqueeze(1).split(codec.coordinates(head_dim), -1):
        sums = {}
        for coordinates, numbers in pieces:
            products = numbers * query[..., coordinates]
            # Runs of one width add up lane by lane, before any sum over lanes.
            width = products.shape[-1]
            sums[width] = sums[width] + products if width in sums else products
        out.append(reduce(torch.add, [each.sum(-1) for each in sums.values()]))
    return (torch.stack(out, 1),)


def _mix_of_rows(codec: Codec, head_dim: int, *tensors: torch.Tensor) -> Tensors:
    """G weights [N, chunks, T, 1], planes [N, chunks, T, width] -> [N, G, D], summed over a chunk, then over chunks."""
    weights, planes = tensors[: -len(codec.stores)], tensors[-len(codec.stores) :]
    pieces = coding.pieces(codec, planes, head_dim, wide_runs)
    sums = [torch.cat([(part * weight).sum(2) for _, part in pieces], -1) for weight in weights]
    return (torch.stack(sums, 1).sum(2),)


def wide_runs(layout: PlaneLayout, packed: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """`layout.pieces`, longer where that fills a vector register: sections of short runs are spread out first.

    A section's bytes, followed by the same bytes shifted by one field and so on, are a section of longer runs.
    """
    width = _run_width(layout)
    if width is None:
        return layout.pieces(packed)
    spread = []
    for section in layout.sections:
        part = packed[..., section.offset : section.offset + section.run].to(torch.int32)
        copies = max(1, width // section.run)
        shifted = [part >> (field * section.bits) if field else part for field in range(copies)]
        spread.append((section, copies, torch.cat(shifted, -1) if copies > 1 else part))
    return [(slice(start, start + width), _codes(spread, start, width)) for start in range(0, layout.count, width)]


def _codes(spread: list, start: int, width: int) -> torch.Tensor:
    codes = None
    for section, copies, part in spread:
        field, byte = divmod(start, section.run * copies)
        piece = part[..., byte : byte + width] >> (field * copies * section.bits)
        piece = (piece & (2**section.bits - 1)) << section.shift
        codes = piece if codes is None else codes | piece
    return codes


@cache
def _run_width(layout: PlaneLayout) -> int | None:
    """The shortest run of at least LANES codes that all sections can be cut into or spread to; None where none is."""
    shortest = min(section.run for section in layout.sections)
    for width in range(shortest, layout.count + 1, shortest):
        if width >= LANES and layout.count % width == 0 and all(_fits(section, width) for section in layout.sections):
            return width
    return None


def _fits(section: Section, width: int) -> bool:
    long, short = max(section.run, width), min(section.run, width)
    return long % short == 0 and section.fields % (long // section.run) == 0
