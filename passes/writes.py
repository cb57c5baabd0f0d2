"""How writes to a cache become writes to its planes: tokens are encoded, codes that move are copied."""

import operator

import torch
from torch import fx

from tqcompile import ops
from tqcompile.passes import rewrite
from tqcompile.passes.centred import Centrer
from tqcompile.passes.context import Context
from tqcompile.passes.indices import index_items
from tqcompile.passes.keep import Keeper
from tqcompile.passes.nodes import memory_of, of_given_sizes, spelling, tensor_of, written_memory
from tqcompile.passes.records import Join
from tqcompile.passes.sites import Site
from tqcompile.passes.tokens import positions_along, source_of
from tqcompile.passes.views import View


class Writer(Centrer, Keeper):
    """`changed` counts the nodes that were rewritten; `overwritten` is memory that any node writes into."""

    changed = 0

    def __init__(self, gm: fx.GraphModule, context: Context):
        super().__init__(gm, context)
        self.places: dict[tuple, fx.Node] = {}
        self.overwritten = written_memory(self.graph.nodes)

    def append(self, node: fx.Node, site: Site) -> None:
        append = site.append
        dense = self.dense(append.tokens)
        tokens = self.call(torch.ops.aten.sym_size.int, dense, append.dim)
        region = []
        for plane in self.planes[site.root]:
            end = self.call(torch.ops.aten.sym_size.int, plane, append.dim)
            start = self.call(operator.sub, end, tokens)
            region.append(self.call(torch.narrow, plane, append.dim, start, tokens))
        if site.root in self.context.centres:
            dense = self.less(dense, site, self.run_of(start, end, tensor_of(dense)))
        self.encode(region, dense, None, site)
        self.remember(site.root, dense, None, start)
        self.planes[node] = self.planes[site.root]
        self.recents[node] = self.recents.get(site.root)
        self.changed += 1

    def outline(self, node: fx.Node) -> fx.Node:
        """What shows the shape of a cache, for an operator that looks at nothing else.

        The planes of a cache that grows here have room for its new tokens already.
        """
        site = self.sites[self.view(node).root]
        if site.append is None or node not in (site.root, site.append.node):
            return self.rebuild(node)
        dim, value = site.append.dim, tensor_of(node)
        tokens = self._count(tensor_of(site.append.tokens).shape[dim]) if node is site.root else 0
        made = self.call(rewrite.outline, self.planes[node][0], dim, tokens, int(value.shape[-1]), value.dtype)
        made.meta = {"example_value": value}
        return made

    def _count(self, size):
        """A size as a number, or as the node that makes it of the sizes that the graph is given."""
        if not isinstance(size, torch.SymInt):
            return size
        evaluate, given = of_given_sizes(size, self.graph)
        made = evaluate(*map(fx.Proxy, given))
        return made.node if isinstance(made, fx.Proxy) else made

    def join(self, join: Join, site: Site) -> None:
        """New planes of what the parts hold: codes as they are, and tokens encoded."""
        views, own = [(part, self.view(part)) for part in join.parts], self.survey.views[join.node].roots
        parts = [
            self.planes[view.base] if view is not None and view.root in own else self.encoded(part, site)
            for part, view in views
        ]
        target = torch.cat if spelling(join.node) == "cat" else torch.stack
        joined = [self.call(target, list(planes), join.dim) for planes in zip(*parts)]
        for plane, first in zip(joined, parts[0]):
            plane.meta["example_value"] = tensor_of(first)
        self.planes[join.node] = tuple(joined)
        self.changed += 1

    def encoded(self, tokens: fx.Node, site: Site) -> list[fx.Node]:
        """Planes of a cache's first tokens, and behind them the vectors of its centre where it has one."""
        vectors, tokens = self.learned(tokens, site) if site.root in self.context.centres else (None, tokens)
        planes = self.call(rewrite.encode, self.rotated(tokens, site), site.codec.name)
        planes = [self.call(operator.getitem, planes, place) for place in range(len(site.codec.stores))]
        return planes if vectors is None else [*planes, vectors]

    def write(self, node: fx.Node, view: View) -> None:
        site, name, source = self.sites[view.root], spelling(node), source_of(node)
        planes, shown = list(self.planes[view.base]), self.view(source)
        self.changed += 1
        if source is None:
            for plane in planes:
                self.graph.call_method("zero_", (plane,))
            return
        if shown is not None and shown.root is view.root:
            self._write_codes(node, planes, self.planes[shown.base], view)
            return
        source = self._as_stored(source, view)
        if site.root in self.context.centres:
            source = self.less(source, site, self._slots(node, site))
        if name == "index_copy_":
            self._write_positions(planes, node.args[1] % len(view.axes), node.args[2], source, site)
        elif name == "copy_":
            self._write_region(planes, source, site)
        elif name == "scatter_":
            self.call(rewrite.scatter, planes, self.rotated(source, site), *node.args[1:3], site.codec.name)
        else:
            self._write_items(planes, view, node.args[1], source, site)

    def _slots(self, node: fx.Node, site: Site) -> fx.Node:
        """The places along the tokens of a cache that a write of centred keys goes to."""
        if spelling(node) == "index_copy_":
            return node.args[2]
        cache, dim = tensor_of(site.root), self.context.centres[site.root].dim
        index, plane = index_items(node.args[1], cache.dim())[dim], self.planes[site.root][0]
        if tensor_of(index) is not None:
            return self._wrapped(index, plane, dim, str(cache.shape[dim]))
        length = self.call(torch.ops.aten.sym_size.int, plane, dim)
        return self.call(operator.getitem, self.run_of(0, length, cache), index)

    def _write_codes(self, node: fx.Node, planes: list[fx.Node], source: tuple[fx.Node, ...], view: View) -> None:
        """A write of tokens that are copies of the cache's own: the same operator on their codes."""
        place = () if spelling(node) == "copy_" else node.args[1:-1]
        if spelling(node) == "setitem":
            place = (rewrite.plane_index(index_items(node.args[1], len(view.axes))),)
        for plane, codes in zip(planes, source):
            moved = self.graph.node_copy(node)
            moved.args, moved.meta = (plane, *place, codes), {"stack_trace": node.stack_trace}

    def _as_stored(self, source: fx.Node, view: View) -> fx.Node:
        """`source` in the dtype of the cache: an assignment casts before it stores."""
        dtype, source = tensor_of(view.node).dtype, self.dense(source)
        return source if tensor_of(source).dtype == dtype else self.call_like(torch.Tensor.to, source, dtype)

    def _write_positions(self, planes, dim: int, positions: fx.Node, source: fx.Node, site: Site) -> None:
        """An indexed write, with the indexed dimension brought to where `append` has it."""
        self.remember(site.root, source, positions)
        rank = tensor_of(source).dim()
        order = [other for other in range(rank - 1) if other != dim]
        order = (*order[: rank - 2], dim, rank - 1)
        # PyTorch 2.11 writes in place to an input of a graph, and not to a view of one.
        if order != tuple(range(rank)):
            planes = [self.call(torch.permute, plane, order) for plane in planes]
            source = self.call_like(torch.permute, source, order)
        self.encode(planes, source, positions, site)

    def _wrapped(self, positions: fx.Node, plane: fx.Node, dim: int, size: str) -> fx.Node:
        """The places along `dim` of a plane that an assignment writes: computed once for all layers of one size."""
        same = positions, size
        if same not in self.places or memory_of(positions) in self.overwritten:
            length = self.call(torch.ops.aten.sym_size.int, plane, dim)
            self.places[same] = self.call(ops.places, positions, length)
            self.places[same].meta["example_value"] = tensor_of(positions)
        return self.places[same]

    def _write_region(self, planes, source: fx.Node, site: Site) -> None:
        source = self._call_like_shape(source, planes[0], site)
        self.encode(planes, source, None, site)

    def _call_like_shape(self, source: fx.Node, plane: fx.Node, site: Site) -> fx.Node:
        """`source` broadcast to the leading dimensions of a plane."""
        node = self.call(rewrite.broadcast, source, plane)
        node.meta["example_value"] = tensor_of(source)
        return node

    def _write_items(self, planes, view: View, index, source: fx.Node, site: Site) -> None:
        cache = tensor_of(view.node)
        items = index_items(index, cache.dim())
        indexed = [dim for dim, item in enumerate(items) if tensor_of(item) is not None]
        along = positions_along(index, cache, tensor_of(source))
        if along is not None:
            positions = self._wrapped(items[along], planes[0], along, str(cache.shape[along]))
            self._write_positions(planes, along, positions, source, site)
        elif not indexed:
            region = [self.call(operator.getitem, plane, rewrite.plane_index(items)) for plane in planes]
            self._write_region(region, source, site)
        else:
            rotated = self.rotated(source, site)
            self.call(rewrite.encode_items, planes, rotated, rewrite.plane_index(items), site.codec.name)
