"""What is added to scores, and which tokens that hides, as the operators of a rewritten graph take it."""

import torch
from torch import fx

from tqcompile.passes import rewrite
from tqcompile.passes.context import Context
from tqcompile.passes.nodes import memory_of, spelling, tensor_of
from tqcompile.passes.steps import Mask
from tqcompile.passes.writes import Writer


def _content(node: fx.Node) -> object:
    """What two nodes have in common that show the same part of a tensor: each layer cuts its own view of one mask."""
    if spelling(node) != "getitem" or any(isinstance(item, fx.Node) for item in node.all_input_nodes[1:]):
        return node
    return _content(node.args[0]), repr(node.args[1])


class Masker(Writer):
    """`reaches` are the nodes that say which tokens anyone sees, and which need no mask, by what the mask shows."""

    def __init__(self, gm: fx.GraphModule, context: Context):
        super().__init__(gm, context)
        self.reaches: dict[object, fx.Node] = {}

    def mask(self, masks: tuple[Mask, ...], folding: tuple[fx.Node, fx.Node] | None) -> fx.Node | None:
        """Masks as one."""
        total = None
        for mask in masks:
            numbers = None if mask.node is None else self.numbers(mask, folding)
            if total is None and (mask.kind, mask.number) == ("add", 1):
                total = numbers
                continue
            total = self.call_like(rewrite.masked, total, numbers, mask.kind, mask.number)
        return total

    def numbers(self, mask: Mask, folding: tuple[fx.Node, fx.Node] | None, tokens: bool = True) -> fx.Node:
        """The tensor of a mask, [batch, heads, ...] where the queries and a plane in `folding` are to be folded."""
        numbers = self.dense(mask.node)
        if mask.kind == "rows":
            numbers = self.call_like(torch.unsqueeze, numbers, -1)
        if folding is None:
            return numbers
        value = tensor_of(numbers).new_empty(())
        numbers = self.call(rewrite.mask_by_head, numbers, *folding, mask.heads, tokens)
        numbers.meta["example_value"] = value
        return numbers

    def reach(self, mask: fx.Node) -> fx.Node | None:
        """Which tokens `mask` lets anyone see, and which need none: computed once for all layers that share a mask."""
        if tensor_of(mask).shape[-1] == 1:
            return None
        same = _content(mask)
        if same not in self.reaches or memory_of(mask) in self.overwritten:
            self.reaches[same] = self.call(rewrite.reach, mask)
        return self.reaches[same]
