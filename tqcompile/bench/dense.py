"""The dense side: the fastest attention that is installed, and what else a dense cache costs."""

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tqcompile.bench import check, clock
from tqcompile.bench.clock import Sample, Step
from tqcompile.bench.shapes import Shape

BACKENDS = {
    "cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}
PAGE = 16


class NoRival(RuntimeError):
    """No backend of dense attention takes a shape."""


def attend(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Sample, str, int]:
    """The fastest attention over a dense cache without a mask: its time, its name, the cache's bytes."""
    q, *first = inputs(shape, dtype, device, shape.queries)
    caches, size = _copies(first, shape, dtype, device)
    return (*_fastest(_decoders(q, caches, device), q, caches, shape, device), size)


def logits(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Sample, str, int]:
    """The fastest product of queries and dense keys, in either order and either layout of the keys: the same three."""
    rows = shape.heads // shape.kv_heads * shape.queries
    found = []
    for layout, product in itertools.product(("tokens first", "dims first"), ("q @ keys", "keys @ q")):
        q, *first = inputs(shape, dtype, device, shape.queries)
        size = first[0].nbytes
        keys = [first[0], *(torch.randn_like(first[0]) for _ in range(clock.copies_of(size, size, device) - 1))]
        if layout == "dims first":
            keys = [x.mT.contiguous().mT for x in keys]
        asked = q.reshape(shape.batch, shape.kv_heads, rows, shape.head_dim)

        def step(i: int, keys=keys, asked=asked, product=product) -> torch.Tensor:
            return asked @ keys[i].mT if product == "q @ keys" else (keys[i] @ asked.mT).mT

        name = f"{product}, {layout}"
        scores = step(0).reshape(*q.shape[:3], shape.context)
        check.scores(f"dense scores ({name}) of {shape}", scores, q, keys[0], None, shape)
        found.append((clock.measure(step, len(keys), device), name))
    return (*min(found, key=lambda pair: pair[0].median), size)


def prefill(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Sample, str, int]:
    """The same of causal attention over the whole context."""
    q, *first = inputs(shape, dtype, device, shape.context)
    caches, size = _copies(first, shape, dtype, device)
    return (*_fastest(_fused(q, caches, device, True), q, caches, shape, device), size)


def append(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Sample, str, int]:
    """Writing one token of keys and one of values to a place that a tensor holds."""
    _, *first = inputs(shape, dtype, device, 1)
    caches, size = _copies(first, shape, dtype, device)
    tokens = [torch.randn_like(x[:, :, :1]) for x in first]
    place = torch.tensor([shape.context - 1], device=device)

    def step(i: int) -> None:
        for cache, token in zip(caches[i], tokens):
            cache.index_copy_(2, place, token)

    return clock.measure(step, len(caches), device), "index_copy_", size


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, queries: int) -> tuple[torch.Tensor, ...]:
    """Random q [B, Hq, queries, D], and k and v [B, Hkv, S, D]."""
    heads = ((shape.heads, queries), *[(shape.kv_heads, shape.context)] * 2)
    return tuple(torch.randn(shape.batch, *head, shape.head_dim, device=device, dtype=dtype) for head in heads)


def _copies(first, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list, int]:
    """Caches to rotate through, and the bytes of one."""
    size = sum(x.nbytes for x in first)
    copies = range(clock.copies_of(size, size, device) - 1)
    return [first, *(inputs(shape, dtype, device, 1)[1:] for _ in copies)], size


def _fastest(steps: Iterator[tuple[str, Step]], q, caches, shape: Shape, device: torch.device) -> tuple[Sample, str]:
    found = []
    for name, step in steps:
        try:
            out = step(0)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # How a backend says that it does not take this shape.
            continue
        check.dense_attention(f"dense attention ({name}) of {shape}", out, q, *caches[0], shape)
        found.append((clock.measure(step, len(caches), device), name))
    if not found:
        raise NoRival(f"no dense attention takes {shape} in {q.dtype}")
    return min(found, key=lambda pair: pair[0].median)


def _decoders(q, caches, device: torch.device) -> Iterator[tuple[str, Step]]:
    yield from _fused(q, caches, device, False)
    if device.type == "cuda":
        yield "flex", _flex(q, caches)
        if q.shape[2] == 1 and importlib.util.find_spec("flashinfer"):
            step = _flashinfer(q, caches)
            if step is not None:
                yield "FlashInfer", step


def _fused(q, caches, device: torch.device, causal: bool) -> Iterator[tuple[str, Step]]:
    def step(i: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, *caches[i], is_causal=causal, enable_gqa=True)

    for backend in BACKENDS[device.type]:
        with sdpa_kernel(backend):
            yield backend.name.split("_")[0].lower(), step


def _flex(q, caches) -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    # A shape of its own each time: past a few shapes the compiler would fall back to what is not compiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda i: compiled(q, *caches[i], enable_gqa=True)


def _flashinfer(q, caches) -> Callable | None:
    """FlashInfer's decoding over pages, which are made of copies of the caches; None where it does not run."""
    try:
        import flashinfer

        batch, heads, _, head_dim = q.shape
        kv_heads, length = caches[0][0].shape[1:3]
        pages = -(-length // PAGE)
        room = (0, 0, 0, pages * PAGE - length)
        paged = [
            torch.stack([F.pad(x, room).unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1) for x in cache], 1)
            for cache in caches
        ]
        workspace = torch.empty(2**27, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * pages
        indices = torch.arange(batch * pages, dtype=torch.int32, device=q.device)
        last = torch.full((batch,), length - (pages - 1) * PAGE, dtype=torch.int32, device=q.device)
        kind = {"q_data_type": q.dtype, "kv_data_type": q.dtype}
        wrapper.plan(starts, indices, last, heads, kv_heads, head_dim, PAGE, **kind)
        return lambda i: wrapper.run(q[:, :, 0], paged[i]).unsqueeze(2)
    except Exception as error:
        warnings.warn(f"FlashInfer is installed and does not run here: {error}", stacklevel=2)
        return None
