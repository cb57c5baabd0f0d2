"""What a graph does with the first and last tokens of a cache that are kept as they are, beside the planes of all."""

import operator

import torch
from torch import fx

from tqcompile import ops
from tqcompile.passes.context import Context
from tqcompile.passes.editor import Editor
from tqcompile.passes.indices import index_items
from tqcompile.passes.nodes import spelling, tensor_of, times_of
from tqcompile.passes.places import places_of
from tqcompile.passes.records import Read
from tqcompile.passes.views import View
from tqcompile.recent import Regions, first_and_last, vacant


class Keeper(Editor):
    """`recents` holds, for every node that is a value of such a cache, the nodes of their numbers and of the index, and
    the dimension that they lie along; None where too little is left of them.
    """

    def __init__(self, gm: fx.GraphModule, context: Context):
        super().__init__(gm, context)
        self.recents: dict[fx.Node, tuple[fx.Node, fx.Node, int] | None] = {}

    def open_regions(self, root: fx.Node, value: torch.Tensor) -> Regions | None:
        """Placeholders for what a cache keeps of its tokens as they are."""
        regions = self.context.regions.get(root)
        if regions is not None:
            sizes = (*value.shape[: regions.dim], regions.slots + 1, *value.shape[regions.dim + 1 :])
            fakes = {
                "numbers": value.new_empty(sizes),
                "index": value.new_empty(regions.slots + 1, dtype=torch.int64),
            }
            nodes = []
            with self.graph.inserting_before(root):
                for name, fake in fakes.items():
                    nodes.append(self.graph.placeholder(f"{root.name}_{name}"))
                    nodes[-1].meta = {"example_value": fake, "tensor_dict": dict(root.meta.get("tensor_dict", {}))}
            self.recents[root] = (*nodes, regions.dim)
        return regions

    def remember(self, root: fx.Node, tokens: fx.Node, positions: fx.Node | None, start: fx.Node | int = 0) -> None:
        """Keep those of the tokens that a cache gets which are to be kept as they are."""
        if self.recents.get(root) is not None:
            numbers, index, dim = self.recents[root]
            sinks = self.context.regions[root].sinks
            node = self.call(ops.remember, numbers, index, tokens, positions, start, dim, sinks)
            node.meta["example_value"] = None

    def moved_regions(self, node: fx.Node, recent: tuple | None) -> tuple | None:
        """What a view still has of such tokens where it shows the first ones of a cache, in any order of axes."""
        if recent is None or spelling(node) not in ("getitem", "permute", "narrow", "repeat"):
            return None
        numbers, index, dim = recent
        if spelling(node) in ("narrow", "repeat"):
            if not _leaves_alone(node, dim):
                return None
            moved = self.graph.node_copy(node, lambda old: numbers if old is node.args[0] else old)
            moved.meta = {"stack_trace": node.stack_trace}
            return moved, index, dim
        if spelling(node) == "permute":
            return self.call(torch.permute, numbers, node.args[1]), index, node.args[1].index(dim)
        items = index_items(node.args[1], tensor_of(node.args[0]).dim())
        first = (
            items[dim].start in (None, 0) and items[dim].step in (None, 1) if isinstance(items[dim], slice) else None
        )
        if not first or not all(isinstance(item, slice) for item in items):
            return None
        items[dim] = slice(None)
        return self.call(operator.getitem, numbers, tuple(items)), index, dim

    def exact(self, read: Read) -> list[fx.Node]:
        """Numbers [batch, heads, slots, head_dim] and index of keys and of values, where both have such."""
        kept = [self.recents.get(view.base) for _, view, _ in read.sides]
        if None in kept or any(places_of(view).tokens != (dim,) for (_, view, _), (*_, dim) in zip(read.sides, kept)):
            return []
        pairs = zip(read.sides, kept)
        return [
            node for (_, view, _), (numbers, index, _) in pairs for node in (*self.in_order([numbers], view), index)
        ]

    def in_order(self, planes: list[fx.Node], view: View, transposed: bool = False) -> list[fx.Node]:
        places = places_of(view, transposed)
        leading = (*places.heads, *places.tokens)
        if leading != tuple(range(len(leading))):
            planes = [self.call(torch.permute, plane, (*leading, len(leading))) for plane in planes]
        if len(places.tokens) > 1:
            planes = [self.call(torch.flatten, plane, len(places.heads), -2) for plane in planes]
        return planes if len(places.heads) == 2 else [self.call(torch.unsqueeze, plane, 1) for plane in planes]

    def first_and_last(self, root: fx.Node, left: fx.Node, regions: Regions) -> list[fx.Node]:
        """The numbers and the index of what a cache that is made here has of such tokens: of those written into it.

        `left` is what is left of its tokens where they are centred, and otherwise the cache itself.
        """
        writes = self.context.made_by[root]
        if writes:
            return self._written(root, left, writes, regions)
        pair = self.call(first_and_last, left, regions.dim, regions.sinks, regions.window)
        return [self.call(operator.getitem, pair, place) for place in range(2)]

    def _written(self, root: fx.Node, left: fx.Node, writes: list[fx.Node], regions: Regions) -> list[fx.Node]:
        """Slots that are empty at first, and what each of the writes puts into them: of `left`, which is made last."""
        slots = self.call(vacant, left, regions.dim, regions.slots)
        made = [self.call(operator.getitem, slots, place) for place in range(2)]
        for write in writes:
            with self.graph.inserting_before(write):
                given = write.args[2] if spelling(write) == "index_copy_" else self._positions(write, root)
                # What says the positions may be counted on before the end.
                positions = self.call(torch.clone, given)
            tokens = self.call(torch.index_select, left, regions.dim, positions)
            self.call(ops.remember, *made, tokens, positions, 0, regions.dim, regions.sinks)
        return made

    def _positions(self, write: fx.Node, dense: fx.Node) -> fx.Node:
        cache = tensor_of(dense)
        positions = next(item for item in index_items(write.args[1], cache.dim()) if tensor_of(item) is not None)
        length = self.call(torch.ops.aten.sym_size.int, dense, self.context.regions[dense].dim)
        return self.call(ops.places, positions, length)


def _leaves_alone(node: fx.Node, dim: int) -> bool:
    """Whether a node that cuts or repeats a tensor does so along other dimensions than `dim`."""
    if spelling(node) == "repeat":
        return times_of(node)[dim] == 1
    return len(node.args) == 4 and node.args[1] % tensor_of(node).dim() != dim
