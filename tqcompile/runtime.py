"""What happens at a call: caches become planes on the way in, and planes become caches on the way out."""

import gc
from collections.abc import Callable
from itertools import chain, count
from operator import attrgetter, itemgetter

import torch
from torch import fx

from tqcompile.adopt import adopt, refusal
from tqcompile.cache import CompressedKV
from tqcompile.centre import Centre
from tqcompile.centred import fitted, refit
from tqcompile.passes.context import CacheInput, Context
from tqcompile.passes.nodes import of_given_sizes
from tqcompile.readonly import ReadOnly
from tqcompile.recent import Recent, empty, of_dense
from tqcompile.report import Graph


class CompiledGraph:
    """The callable that Dynamo runs in place of its graph, over the one that Inductor made of the rewritten graph."""

    def __init__(self, original: fx.GraphModule, compiled: Callable, context: Context, record: Graph):
        self.original, self.compiled, self.record = original, compiled, record
        self.inputs = {entry.index: entry for entry in sorted(context.inputs, key=lambda entry: entry.index)}
        with_site = [entry for entry in context.inputs if entry.site is not None]
        self.in_place = tuple(entry for entry in with_site if entry.site.kind == "in_place")
        self.first = any(entry.site.kind == "append" for entry in with_site)
        self.written_back = tuple(entry.index for entry in context.inputs if entry.writes_back)
        self.outputs = tuple(context.outputs)
        self.settled: Settled | None = None
        self.tokens = {e.index: _token_count(e.tokens, original) for e in context.inputs if e.tokens is not None}

    def __call__(self, *args):
        if self.first:
            # Dynamo leaves its tracing state behind as a cycle, which holds this call's arguments: an outgrown
            # cache would live on beside its successor until Python happens to collect.
            self.first = False
            gc.collect()
        values = None if self.settled is None else self.settled.values(args)
        if values is not None:
            return self._given(self.compiled(*values), args, {})
        if self._begins(args):
            results = self.original(*args)
            self._adopt(args)
            return results
        if not self._adopt(args):
            return self.original(*args)
        caches = {index: self._cache(entry, args) for index, entry in self.inputs.items()}
        self._settle(caches, len(args))
        return self._given(self.compiled(*self._planes(args, caches)), args, caches)

    def _given(self, results, args: tuple, caches: dict) -> tuple:
        """What the model's graph returns, and writes back."""
        for index in self.written_back:
            if caches[index] is not args[index]:
                args[index].copy_(caches[index])
        return tuple(self._output(output, args, caches, results) for output in self.outputs)

    def _settle(self, caches: dict, arguments: int) -> None:
        """Remember the caches of this call, where all are written in place: the next one need not look at them."""
        if (
            self.in_place
            and len(self.in_place) == len(self.inputs)
            and all(cache.buffer is None for cache in caches.values())
        ):
            self.settled = Settled(caches, arguments)

    def _planes(self, args: tuple, caches: dict) -> list:
        values, start = [], 0
        for index, cache in caches.items():
            values += args[start:index]
            start = index + 1
            if isinstance(cache, CompressedKV):
                values += cache.parts
                values += cache.recent.tensors if self.inputs[index].regions is not None else ()
            else:
                values.append(cache)
        return [*values, *args[start:]]

    def _begins(self, args: tuple) -> bool:
        """Whether this call writes the first tokens of a cache whose keys are to be less the mean of those.

        They are written and read as they are, and encoded afterwards.
        """
        return any(
            entry.centring is not None
            and not isinstance(args[entry.index], CompressedKV)
            and refusal(args[entry.index]) is None
            and not args[entry.index].any()
            for entry in self.in_place
        )

    def _adopt(self, args: tuple) -> bool:
        """Compress the caches that are written in place, and say whether the graph can write into all of them.

        One that cannot be does not keep the others dense: Dynamo sees them change, and asks for a graph that fits.
        """
        complete = True
        for entry in self.in_place:
            held = args[entry.index]
            if isinstance(held, CompressedKV):
                reason = refit(held, entry.centring)
            else:
                kept = of_dense(held, entry.regions, filled=False)
                reason = adopt(held, entry.site.codec, entry.centring)
                if reason is None:
                    held.recent = kept and kept.less(held.centre)
            reason = held.own() if reason is None else reason
            if reason is not None:
                self.record.events[entry.name] = reason
                complete = False
        return complete

    def _cache(self, entry: CacheInput, args: tuple) -> torch.Tensor:
        """The cache whose planes the graph works on; without a site, its decoded numbers."""
        held = args[entry.index]
        if entry.site is None:
            return held.decode() if isinstance(held, CompressedKV) else held
        if not isinstance(held, CompressedKV):
            held = _encoded(held, entry)
        assert held.codec is entry.site.codec, f"{entry.name}: a graph of {entry.site.codec.name} was given {held}"
        if entry.site.kind != "in_place":
            held = fitted(held, entry.centring)
        if entry.site.kind == "append":
            held = held.room(self.tokens[entry.index](args), entry.site.append.dim)
        else:
            self.record.track(entry.name, held)
            held = held if entry.site.kind == "in_place" else held.in_order()
        if entry.site.kind != "read":
            held.keep(entry.regions)
        elif entry.regions is not None and (held.recent is None or held.recent.regions != entry.regions):
            # What another graph keeps of it stays.
            held = CompressedKV(held.planes, held.codec, held.shape[-1], held.dtype).centred(held.centre)
            held.recent = empty(held, entry.regions)
        return held

    def _output(self, output, args: tuple, caches: dict, results):
        if output.kind == "tensor":
            return results[output.index]
        if output.kind == "shown":
            return _shown(results[output.index], args[output.of], caches.get(output.of))
        if output.kind == "argument":
            return args[output.index]
        if output.kind == "appended":
            cache = caches[output.index].kept(*output.run)
        else:
            cache = _made(results[output.index : output.index + output.count], output)
        if cache.buffer is not None:
            cache.buffer.forget_length(cache)
        elif output.token_dim is not None:
            torch._dynamo.maybe_mark_dynamic(cache, output.token_dim)
        self.record.track(output.name, cache)
        return cache


_stamp = attrgetter("stamp")


class Settled:
    """Caches of the last call that a graph can write into as they are, by their index among its arguments.

    A model has two for each layer, and each call asks for all: builtins do the work.
    """

    def __init__(self, caches: dict[int, CompressedKV], arguments: int):
        plain = all(len(cache.tensors) == len(cache.planes) for cache in caches.values())
        self.held, self.stamps = _items(list(caches)), list(map(_stamp, caches.values()))
        self.tensors = attrgetter("planes" if plain else "tensors")
        behind = count(arguments)
        taken = {index: [next(behind) for _ in cache.tensors] for index, cache in caches.items()}
        self.values_of = _items([place for index in range(arguments) for place in taken.get(index, [index])])

    def values(self, args: tuple) -> tuple | None:
        """What the compiled graph takes, where each cache is the one of the last call, and keeps the same tensors; None
        where some is not."""
        held = self.held(args)
        try:
            same = list(map(_stamp, held)) == self.stamps
        except AttributeError:  # a dense one
            return None
        return self.values_of((*args, *chain.from_iterable(map(self.tensors, held)))) if same else None


def _items(places: list[int]) -> Callable[[tuple], tuple]:
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple(values[place] for place in places)


def _shown(part: torch.Tensor, held: torch.Tensor, decoded: torch.Tensor | None) -> torch.Tensor:
    """What the model takes for a view of a cache: one of its planes where a view of the decoded copy moves tokens."""
    if not isinstance(held, CompressedKV):
        return part
    head_dim, places = held.shape[-1], (*part.stride()[:-1], part.storage_offset())
    follows = (
        isinstance(decoded, torch.Tensor)
        and not isinstance(decoded, CompressedKV)
        and part.untyped_storage()._cdata == decoded.untyped_storage()._cdata
        and held.centre is None
        and held.is_contiguous()
        and (part.shape[-1:], part.stride()[-1:], part.dtype) == ((head_dim,), (1,), held.dtype)
        and not any(place % head_dim for place in places)
        and all(plane.is_contiguous() for plane in held.planes)
    )
    if not follows:
        return ReadOnly(part)
    planes = []
    for plane in held.planes:
        width = plane.shape[-1]
        *strides, start = (place // head_dim * width for place in places)
        planes.append(plane.as_strided((*part.shape[:-1], width), (*strides, 1), plane.storage_offset() + start))
    return held.like(tuple(planes), part.stride())


def _made(results, output) -> CompressedKV:
    """A new cache of what a graph made: planes, the vectors of its centre, and what is kept of it as it is."""
    rest = list(results)
    planes = [rest.pop(0) for _ in output.codec.stores]
    cache = CompressedKV(planes, output.codec, output.head_dim, output.dtype)
    if output.centring is not None:
        cache.centre = Centre(output.centring.rotation, output.centring.dim, rest.pop(0))
    if output.regions is not None:
        cache.recent = Recent(*rest, output.regions)
    return cache


def _encoded(dense: torch.Tensor, entry: CacheInput) -> CompressedKV:
    """A dense cache that is not written where it stands, with what is to be kept of it as it is."""
    cache, kept = CompressedKV.encode(dense, entry.site.codec, entry.centring), of_dense(dense, entry.regions)
    cache.recent = kept and kept.less(cache.centre)
    return cache


def _token_count(tokens, original: fx.GraphModule) -> Callable[[tuple], int]:
    """How many tokens a call appends, as a function of its arguments."""
    if not isinstance(tokens, torch.SymInt):
        return lambda args, count=int(tokens): count
    evaluate, given = of_given_sizes(tokens, original.graph)
    arguments = original.graph.find_nodes(op="placeholder")
    places = list(map(arguments.index, given))
    return lambda args: int(evaluate(*(args[place] for place in places)))
