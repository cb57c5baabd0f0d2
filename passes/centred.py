"""Centred keys in a graph: what is taken off the tokens that are written, and given back to the scores."""

import torch
from torch import fx

from tqcompile import centre, principal
from tqcompile.centre import Rotation
from tqcompile.passes.context import Context
from tqcompile.passes.editor import Editor
from tqcompile.passes.nodes import tensor_of
from tqcompile.passes.places import places_of
from tqcompile.passes.records import Read
from tqcompile.passes.sites import Site
from tqcompile.passes.views import View


def root_dims(view: View, dims: tuple[int, ...], views: dict[fx.Node, View]) -> tuple[int, ...]:
    """The dimensions of a cache that dimensions of the planes behind a view of it are."""
    while view.base is not view.root:
        made = view.base
        dims = tuple(made.args[1][dim] for dim in dims) if made.target is torch.permute else dims
        view = views[views[made].parent]
    return dims


def order_of(view: View, views: dict[fx.Node, View]) -> tuple[int, ...]:
    """The dimensions of a cache that a read takes for those of sequences, heads, tokens and channels."""
    places = places_of(view)
    return (*root_dims(view, (*places.heads, *places.tokens), views), 3)


class Centrer(Editor):
    """`vectors` are the nodes of `centre.Centre.vectors` of each cache, and `left` what is left of the tokens that a
    graph makes."""

    def __init__(self, gm: fx.GraphModule, context: Context):
        super().__init__(gm, context)
        self.vectors: dict[fx.Node, fx.Node] = {}
        self.left: dict[fx.Node, fx.Node] = {}
        self.constants: dict[object, tuple[fx.Node, ...]] = {}
        self.shared: dict[tuple, fx.Node] = {}

    def less(self, source: fx.Node, site: Site, slots: fx.Node) -> fx.Node:
        """Tokens for the places `slots` of a cache, less what is taken off them there."""
        centring = self.context.centres[site.root]
        node = self.call(
            centre.less, source, self.vectors[site.root], slots, *self._turns(centring.rotation, source), centring.dim
        )
        node.meta["example_value"] = tensor_of(source)
        return node

    def decode(self, view: View) -> fx.Node:
        """The keys themselves: those of a cache's first places, in front of what asks for their shape."""
        dense, centring = super().decode(view), self.context.centres.get(view.root)
        if centring is None:
            return dense
        node = self.call(
            centre.more, dense, self.vectors[view.root], *self._turns(centring.rotation, dense), centring.dim
        )
        node.meta = dict(dense.meta)
        return node

    def learned(self, source: fx.Node, site: Site) -> tuple[fx.Node, fx.Node]:
        """The centre of keys that a graph makes, and these less that."""
        centring = self.context.centres[site.root]
        slots = self.run_of(0, self.call(torch.ops.aten.sym_size.int, source, centring.dim), tensor_of(source))
        given = centring.start(tensor_of(source))
        given = None if given is None else self._constant(("given", site.root), (given,))[0]
        turns = self._turns(centring.rotation, source)
        self.vectors[site.root] = self.call(
            centre.learned,
            *(source, slots, *turns, given, self._squares(site.root)),
            *(centring.dim, centring.sinks, centring.principal, centring.plain),
        )
        self.left[source] = self.less(source, site, slots)
        return self.vectors[site.root], self.left[source]

    def _squares(self, root: fx.Node) -> fx.Node | None:
        """How large the channels of the queries are that the keys made here meet first; None where none do here."""
        if root not in self.context.asking:
            return None
        query, order = self.context.asking[root]
        heads = int(tensor_of(root).shape[order[1]])
        return self.call(centre.squares_of, self.dense(query), heads, order)

    def weighed(self, read: Read, query: fx.Node) -> fx.Node:
        """Queries for keys that were divided by a balance."""
        if read.key.root not in self.context.centres:
            return query
        return self.call_like(principal.weighed, query, self._ordered_vectors(read.key))

    def mixed(self, read: Read, out: fx.Node) -> fx.Node:
        """Weighted sums of values that are in a basis of their own, turned out of that."""
        if read.value is None or read.value.root not in self.context.centres:
            return out
        return self.call(principal.mixed, out, self._ordered_vectors(read.value))

    def run_of(self, start, stop, value: torch.Tensor) -> fx.Node:
        return self.call(torch.arange, start, stop, device=value.device)

    def shift(self, read: Read, query: fx.Node, planes: list[fx.Node]) -> list[fx.Node] | None:
        """What `reference.shifted` makes the scores of, that the centre of keys adds; None where no softmax sees them,
        because they are the same for all tokens."""
        centring = self.context.centres.get(read.key.root)
        if centring is None or not (centring.rotation.turns or read.sinks):
            return None
        rotation, value = centring.rotation, tensor_of(query)
        planes_of = self._constant(("planes", rotation), centre.planes_of(rotation, value.device))
        table = self._table(rotation, planes[0], tensor_of(read.key.node).shape[-2], query, planes_of[0])
        scale = tensor_of(read.key.base).shape[-1] ** -0.5 if read.scale is None else read.scale
        return [self.call(centre.waved, query, self._ordered_vectors(read.key), *planes_of, scale), table]

    def _ordered_vectors(self, view: View) -> fx.Node:
        """The vectors of what a read has as [batch, heads, tokens, head_dim]."""
        vectors, order = self.vectors[view.root], order_of(view, self.survey.views)
        return vectors if order == (0, 1, 2, 3) else self.call_like(torch.permute, vectors, order)

    def _table(self, rotation: Rotation, plane: fx.Node, tokens, query: fx.Node, first: fx.Node) -> fx.Node:
        """`centre.waves`, once for all layers that are as long."""
        key = rotation, str(tokens)
        if key not in self.shared:
            length = self.call(torch.ops.aten.sym_size.int, plane, 2)
            self.shared[key] = self.call(centre.waves, length, self._turns(rotation, query)[0], first)
        return self.shared[key]

    def _turns(self, rotation: Rotation, like: fx.Node) -> tuple[fx.Node, ...]:
        return self._constant(("turns", rotation), centre.tables(rotation, tensor_of(like).device))

    def _constant(self, key: tuple, tensors: tuple[torch.Tensor, ...]) -> tuple[fx.Node, ...]:
        """Nodes of tensors that every call is given alike."""
        if key not in self.constants:
            names = [f"centre_{len(self.constants)}_{place}" for place in range(len(tensors))]
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                for name, tensor in zip(names, tensors):
                    self.gm.register_buffer(name, tensor)
                self.constants[key] = tuple(map(self.graph.get_attr, names))
        return self.constants[key]
