"""What was compressed, what was not and why, and how many bytes it takes: read off live caches, not off formulas."""

import gc
import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
from tabulate import tabulate

from tqcompile.cache import CompressedKV, storages


@dataclass
class Graph:
    """What the backend did to one compiled graph."""

    name: str
    owners: tuple[weakref.ref, ...]
    sites: tuple = ()
    refusals: tuple = ()
    fallbacks: tuple = ()
    uncentred: tuple = ()
    facts: tuple = ()
    counts: dict[str, int] = field(default_factory=dict)
    reads: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    readers: dict[tuple[str, str, str], int] = field(default_factory=dict)
    dump: str | None = None
    texts: object = None
    caches: weakref.WeakValueDictionary = field(default_factory=weakref.WeakValueDictionary)
    events: dict[str, str] = field(default_factory=dict)
    regions: tuple[tuple[str, str], ...] = ()
    ended: tuple[str, str] | None = None
    eager: Counter = field(default_factory=Counter)

    def track(self, name: str, cache: CompressedKV, reader: str | None = None) -> None:
        """Remember a cache of a site for as long as somebody holds it; of a functional one several may live at once.

        `reader` is an operator of code that is not compiled, which it was decoded for.
        """
        if reader is not None:
            self.eager[reader] += 1
            return
        self.caches[name, id(cache)] = cache
        cache.counted = partial(self.track, name)


_graphs: list[Graph] = []


def record(graph: Graph) -> Graph:
    """Keep a graph's record for `report`."""
    _graphs.append(graph)
    return graph


def clear() -> None:
    """Forget every record."""
    _graphs.clear()


def _is_held(cache: weakref.ref) -> bool:
    """Whether anything in Python holds a cache; PyTorch itself keeps it for as long as it has views."""
    return bool(gc.get_referrers(cache()))


@dataclass(frozen=True)
class Report:
    """The records of the graphs that belong to a model. `str()` of it is for people."""

    graphs: tuple[Graph, ...]

    @property
    def caches(self) -> list[CompressedKV]:
        """The compressed caches that somebody holds, each once, and what eager code made of them.

        A view counts where its cache is held by nobody else: `crop` leaves a model with views.
        """
        # None is held here in a list: that would be a holder.
        found = {id(c): (weakref.ref(c), c.part_of) for graph in self.graphs for c in list(graph.caches.values())}
        wholes = {id(w()): w for _, part_of in found.values() for w in part_of if w() is not None}
        held = {key for key, whole in wholes.items() if _is_held(whole)}
        alive = [ref() for key, (ref, _) in found.items() if key in held or key not in wholes]
        return [c for c in alive if c is not None and held.isdisjoint(id(whole()) for whole in c.part_of)]

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the live storages behind them, spare capacity included."""
        found: dict[int, torch.UntypedStorage] = {}
        for cache in self.caches:
            found.update(storages(cache))
        return sum(storage.nbytes() for storage in found.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes the same tokens take as dense tensors of the caches' dtype."""
        return sum(cache.numel() * cache.dtype.itemsize for cache in self.caches)

    @property
    def bits_per_element(self) -> float:
        """Bits of live storage for each element of the caches; 0 where there is none."""
        elements = sum(cache.numel() for cache in self.caches)
        return 8 * self.compressed_bytes / elements if elements else 0.0

    @property
    def refusals(self) -> list:
        return list(dict.fromkeys(refusal for graph in self.graphs for refusal in graph.refusals if refusal.stands))

    @property
    def fallbacks(self) -> list:
        return list(dict.fromkeys(fallback for graph in self.graphs for fallback in graph.fallbacks))

    def __str__(self) -> str:
        parts = [self._summary(), self._compressed(), self._kept(), self._read()]
        parts += [self._refused(), self._uncentred(), self._decoded(), self._events(), self._eager(), self._ended()]
        return "\n\n".join(part for part in parts if part)

    def _summary(self) -> str:
        if not self.graphs:
            return "turboquant: no graph was compiled for this model yet"
        sites, reads = sum(len(g.sites) for g in self.graphs), sum(g.reads for g in self.graphs)
        line = (
            f"turboquant: {len(self.graphs)} graphs, {sites} cache sites compressed, {reads} attention reads rewritten"
        )
        if self.caches:
            ratio = self.dense_bytes / max(1, self.compressed_bytes)
            line += (
                f"\nlive caches: {len(self.caches)}, {self.compressed_bytes:,} bytes measured, {self.dense_bytes:,} as "
                f"dense tensors ({ratio:.2f} x), {self.bits_per_element:.2f} bits an element, spare room included"
            )
        return line

    def _compressed(self) -> str:
        groups: dict[tuple, int] = {}
        for graph in self.graphs:
            for site in graph.sites:
                key = (graph.name, site.kind, site.role, site.codec.name)
                groups[key] = groups.get(key, 0) + 1
        rows = [(*key, count) for key, count in groups.items()]
        return tabulate(rows, ("graph", "cache", "role", "codec", "sites")) if rows else ""

    def _kept(self) -> str:
        rows = Counter((graph.name, said) for graph in self.graphs for _, said in graph.regions)
        rows = [(*row, count) for row, count in rows.items()]
        return "beside codes:\n" + tabulate(rows, ("graph", "what is kept", "caches")) if rows else ""

    def _read(self) -> str:
        rows = [(graph.name, *key, count) for graph in self.graphs for key, count in graph.readers.items()]
        return tabulate(rows, ("graph", "reader", "codecs", "kernel", "reads")) if rows else ""

    def _refused(self) -> str:
        rows = [(r.name, r.reason, r.where, r.remedy) for r in self.refusals]
        return "left dense:\n" + tabulate(rows, ("cache", "why", "where", "remedy")) if rows else ""

    def _uncentred(self) -> str:
        rows = list(dict.fromkeys((u.name, u.reason, u.where) for graph in self.graphs for u in graph.uncentred))
        return "keys that are not centred:\n" + tabulate(rows, ("cache", "why", "where")) if rows else ""

    def _decoded(self) -> str:
        rows = [(f.name, f.operator, f.where) for f in self.fallbacks]
        return (
            "decoded in front of a reader that no rule knows:\n" + tabulate(rows, ("cache", "reader", "where"))
            if rows
            else ""
        )

    def _events(self) -> str:
        rows = [(graph.name, name, event) for graph in self.graphs for name, event in graph.events.items()]
        return (
            "calls that ran dense, by the original graph:\n" + tabulate(rows, ("graph", "cache", "why")) if rows else ""
        )

    def _eager(self) -> str:
        rows = sum((graph.eager for graph in self.graphs), Counter()).most_common()
        return "decoded for code that was not compiled:\n" + tabulate(rows, ("reader", "times")) if rows else ""

    def _ended(self) -> str:
        rows = Counter(graph.ended for graph in self.graphs if graph.ended is not None)
        table = tabulate([(count, *ended) for ended, count in rows.items()], ("graphs", "why", "where"))
        return (
            "ended early by Dynamo; a cache that one graph makes and the next one reads stays dense:\n" + table
            if rows
            else ""
        )


def report(model: torch.nn.Module | None = None) -> Report:
    """The report of `model`, compiled or not; without a model, of everything this process compiled.

    A graph belongs to a model where they share a parameter or a buffer; a graph without either belongs to all.
    """
    if model is None:
        return Report(tuple(_graphs))
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={model!r}; report() takes a torch.nn.Module, or nothing for every graph of the process")
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    chosen = [graph for graph in _graphs if not graph.owners or any(id(ref()) in own for ref in graph.owners)]
    return Report(tuple(chosen))
