"""The compressed side: the operators that a rewritten graph is made of, over planes of random tokens."""

import torch

from tqcompile import formats, ops, reference, tables
from tqcompile.bench import check, clock
from tqcompile.bench.clock import Sample
from tqcompile.bench.shapes import Case, Shape, spelled_out
from tqcompile.cache import storages
from tqcompile.layout import layout_of
from tqcompile.passes import rewrite

Planes = tuple[torch.Tensor, ...]


class NoKernel(LookupError):
    """No kernel does this by itself: a compiled model has it in its graph."""


def require_kernel(case: Case, device: torch.device) -> None:
    """Raise `NoKernel` for an append or a prefill that a GPU has no kernel for."""
    if device.type == "cuda" and case.task in ("append", "prefill"):
        for name in spelled_out((case.keys, case.values), case.shape.head_dim):
            raise NoKernel(
                f"{case.task} of {case.title}: no kernel writes {name}, a model's graph spells that out; --tasks step"
                " times it"
            )


def attend(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Sample, int, int]:
    """Attention of rotated queries: its time, the bytes of its caches, the bytes it must move."""
    shape, names = case.shape, (case.keys, case.values)
    caches, size = _filled(shape, names, dtype, device)
    q = _query(case.keys, shape, dtype, device)
    mask, scale = mask_of(shape, dtype, device), shape.head_dim**-0.5

    reach = None if mask is None else rewrite.reach(mask)
    sinks = torch.randn(shape.batch, shape.heads, shape.queries, 1, device=device) if shape.sinks else None
    how = None, None, False, scale, shape.score_mod, sinks, *names, shape.head_dim, shape.head_dim, torch.float32

    def step(i: int) -> torch.Tensor:
        return ops.attend(q, *caches[i], mask, reach, *how)

    codecs = tuple(map(formats.codec, names))
    check.attention(f"attention over {case.pair} of {shape}", step(0), q, *caches[0], mask, sinks, codecs, shape)
    return clock.measure(step, len(caches), device), size, moved_bytes(shape, size)


def logits(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Sample, int, int]:
    """Scores of rotated queries: the same three, of keys alone; scores are moved too."""
    shape, name = case.shape, case.keys
    caches, size = _filled(shape, (name,), dtype, device)
    q = _query(name, shape, dtype, device)

    def step(i: int) -> torch.Tensor:
        return ops.logits(q, *caches[i], name, shape.head_dim)

    out = step(0)
    check.scores(f"scores of {name} of {shape}", out, q, *caches[0], formats.codec(name), shape)
    return clock.measure(step, len(caches), device), size, size + out.nbytes


def append(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Sample, int, int]:
    """Rotating and writing one token of keys and one of values, and rotating its query; the same three."""
    return _encoding(case, 1, torch.tensor([case.shape.context - 1], device=device), dtype, device)


def prefill(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Sample, int, int]:
    """Rotating and encoding the whole context; the same three."""
    return _encoding(case, case.shape.context, None, dtype, device)


def _encoding(case: Case, tokens: int, place: torch.Tensor | None, dtype: torch.dtype, device: torch.device):
    shape, names = case.shape, (case.keys, case.values)
    codecs = [formats.codec(name) for name in names]
    bases = [_basis(name, shape, dtype, device) for name in names]
    q = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, device=device, dtype=dtype)
    heads = shape.batch, shape.kv_heads, tokens, shape.head_dim
    caches, size = _allocated(shape, names, dtype, device)
    written = [[torch.randn(heads, device=device, dtype=dtype) for _ in names] for _ in caches]

    def step(i: int) -> None:
        if tokens == 1 and bases[0] is not None:
            ops.append_step(*caches[i], *written[i], q, place, *bases, *names)
            return
        for name, planes, x, basis in zip(names, caches[i], written[i], bases):
            ops.append(planes, x, place, basis, name)

    step(0)
    for codec, planes, x, basis in zip(codecs, caches[0], written[0], bases):
        what = f"{codec.name} written by {case.task} of {shape}"
        turned = reference.rotate(x, None if basis is None else basis.float())
        check.encoded(what, planes, turned, codec, shape, shape.context)
    moved = live_bytes(written[0]) + size * tokens // shape.context
    return clock.measure(step, len(caches), device), size, moved


def _allocated(shape: Shape, names, dtype: torch.dtype, device: torch.device) -> tuple[list[tuple[Planes, ...]], int]:
    """Caches to rotate through, each with the planes of every codec named, and the bytes of one."""
    heads = shape.batch, shape.kv_heads, shape.context
    layouts = [layout_of(formats.codec(name), shape.head_dim, dtype, device.type) for name in names]
    caches = [tuple(layout.allocate(heads, device) for layout in layouts)]
    size = live_bytes(caches[0])
    copies = range(clock.copies_of(size, moved_bytes(shape, size), device) - 1)
    return caches + [tuple(layout.allocate(heads, device) for layout in layouts) for _ in copies], size


def _filled(shape: Shape, names, dtype: torch.dtype, device: torch.device) -> tuple[list[tuple[Planes, ...]], int]:
    """The same, with random tokens in them."""
    caches, size = _allocated(shape, names, dtype, device)
    bases = [_basis(name, shape, dtype, device) for name in names]
    for row in range(shape.batch):
        x = torch.randn(1, shape.kv_heads, shape.context, shape.head_dim, device=device, dtype=dtype)
        for cache in caches:
            for name, basis, planes in zip(names, bases, cache):
                ops.append([plane[row : row + 1] for plane in planes], x, None, basis, name)
    return caches, size


def _query(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random queries in the basis of the codec of the keys."""
    q = torch.randn(shape.batch, shape.heads, shape.queries, shape.head_dim, device=device, dtype=dtype)
    return reference.rotate(q, _basis(name, shape, dtype, device)).to(dtype)


def _basis(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """The basis of a codec, in the dtype that a step multiplies by."""
    half = device.type == "cuda" and dtype != torch.float32
    return tables.basis_matrix(formats.codec(name), shape.head_dim, device, dtype if half else torch.float32)


def mask_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """A mask that hides every tenth token of each sequence where one is asked for, and those that are not filled."""
    if shape.mask == "none" and not shape.filled:
        return None
    token = torch.arange(shape.context, device=device).expand(shape.batch, 1, 1, -1)
    keep = (token < (shape.filled or shape.context)) & ((token % 10 != 9) | (shape.mask == "none"))
    return torch.where(keep, 0.0, -torch.inf).to(dtype) if shape.mask == "additive" else keep


def moved_bytes(shape: Shape, size: int) -> int:
    """Bytes that a step reads of a cache of `size` bytes."""
    return size * (shape.filled or shape.context) // shape.context


def live_bytes(cache) -> int:
    """Bytes of the storages behind tensors, compressed caches among them, nested as they may be."""
    found: dict[int, torch.UntypedStorage] = {}
    waiting = [cache]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            found.update(storages(item))
        else:
            waiting.extend(item)
    return sum(storage.nbytes() for storage in found.values())
