"""Bytes a token takes, counted on the storages of a sample that was encoded for it, and totals of a context."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from tqcompile import formats
from tqcompile.cache import CompressedKV, storages
from tqcompile.explain.section import Layers, Section, plain
from tqcompile.facts import CacheFacts

# Tokens of a sample: a codec may store them in blocks.
SAMPLE = 64
LAYER = re.compile(r"\.layers\[(\d+)\]")


@dataclass(frozen=True)
class Total:
    """Bytes of the caches that graphs see: of one token of one sequence, and of `context` tokens of `batch` sequences.

    `unknown` are caches whose size nothing says; they are not counted. `folded` are those whose heads may be of several
    sequences, and are counted as those of one.
    """

    what: str
    caches: int
    unknown: tuple[str, ...]
    folded: tuple[str, ...]
    dense_per_token: int
    kept_per_token: int
    dense: int
    kept: int


@cache
def bytes_per_token(
    codec: str | None, heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[int, int]:
    """Bytes of the storages of one token of one sequence, dense and as it is kept: counted on real ones."""
    sample = torch.randn(1, heads, SAMPLE, head_dim, device=device).to(dtype)
    kept = sample if codec is None else CompressedKV.encode(sample, formats.codec(codec))
    found = [sum(storage.nbytes() for storage in storages(cache).values()) for cache in (sample, kept)]
    assert not any(size % SAMPLE for size in found), f"{found} bytes are no whole number for each of {SAMPLE} tokens"
    return found[0] // SAMPLE, found[1] // SAMPLE


def of_cache(facts: CacheFacts, layers: Layers | None) -> tuple[int, int] | None:
    """`bytes_per_token` of a cache; None where nothing says how many heads it has or how large one is.

    The layers of a Hugging Face cache keep [batch, heads, tokens, head_dim], whatever reads them.
    """
    heads, head_dim = facts.heads, facts.head_dim
    if _of_layer(facts, layers):
        heads, head_dim = facts.shape[1], facts.shape[3]
    if not isinstance(heads, int) or not isinstance(head_dim, int) or facts.dtype is None:
        return None
    return bytes_per_token(facts.codec, heads, head_dim, facts.dtype, facts.device)


def _of_layer(facts: CacheFacts, layers: Layers | None) -> bool:
    return layers is not None and layer_of(facts.name) is not None and len(facts.shape) == 4


def totals(section: Section, context: int, batch: int) -> list[Total]:
    """A total for each set of caches that graphs of a section see, and one for all layers where some were left out.

    A graph that only makes caches is left to those that read them later, where there are such.
    """
    seen = [graph for graph in section.graphs if graph.facts]
    later = [graph for graph in seen if any(facts.form != "create" for facts in graph.facts)]
    found: dict[tuple, list[str]] = {}
    for graph in later or seen:
        weighted = tuple((facts, 1) for facts in graph.facts)
        found.setdefault(_sum(weighted, section.layers, context, batch), []).append(graph.name)
    result = [Total(f"graph {', '.join(names)}", *sums) for sums, names in found.items()]
    if section.layers is not None and later and section.layers.kept < len(section.layers.kinds):
        weighted = whole(later[-1].facts, section.layers)
        if weighted is not None:
            sums = _sum(weighted, section.layers, context, batch)
            result.append(Total(f"all {len(section.layers.kinds)} layers", *sums))
    return result


def whole(facts: Iterable[CacheFacts], layers: Layers) -> tuple[tuple[CacheFacts, int], ...] | None:
    """Caches of all layers, from those that ran: each cache, and how many layers it stands for.

    None where they do not say: a kind of layer did not run, or two of one kind keep different caches.
    """
    held: dict[int, list[CacheFacts]] = {}
    for one in facts:
        at = layer_of(one.name)
        if at is None:
            return None
        held.setdefault(at, []).append(one)
    first: dict[tuple, int] = {}
    for at in range(layers.kept):
        kind = layers.kinds[at]
        like = first.setdefault(kind, at)
        if [_sizes(one) for one in held.get(at, [])] != [_sizes(one) for one in held.get(like, [])]:
            return None
    if set(layers.kinds) - first.keys():
        return None
    return tuple((one, layers.kinds.count(kind)) for kind, at in first.items() for one in held.get(at, []))


def _sizes(facts: CacheFacts) -> tuple:
    return facts.form, facts.role, facts.codec, facts.heads, facts.head_dim, facts.dtype


def layer_of(name: str) -> int | None:
    """The layer that a Hugging Face cache tensor belongs to."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def _sum(weighted: Iterable[tuple[CacheFacts, int]], layers: Layers | None, context: int, batch: int) -> tuple:
    """The fields of a `Total` after its first."""
    caches, unknown, folded, sums = 0, [], [], [0, 0, 0, 0]
    for facts, count in weighted:
        sizes = of_cache(facts, layers)
        if sizes is None:
            unknown.append(plain(facts.name))
            continue
        if facts.folded and not _of_layer(facts, layers):
            folded.append(plain(facts.name))
        at = layer_of(facts.name)
        most = layers.kinds[at][1] if layers is not None and at is not None else None
        tokens = batch * (context if most is None else min(context, most))
        caches += count
        for place, value in enumerate((*sizes, *(size * tokens for size in sizes))):
            sums[place] += count * value
    return caches, tuple(unknown), tuple(folded), *sums
