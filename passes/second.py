"""Keys that lie in two caches: attention adds up their scores itself, and no mask of scores is made.

Latent attention keeps a rotary key that all heads share beside the latent: its scores are a product of their own.
"""

from itertools import pairwise

import torch
from torch import fx

from tqcompile import ops
from tqcompile.passes import rewrite
from tqcompile.passes.context import Context
from tqcompile.passes.fuse import shown
from tqcompile.passes.nodes import written_operands


def second(gm: fx.GraphModule, context: Context) -> int:
    """Let each `attend` whose mask is, or adds, scores of another cache read that cache; returns how many do."""
    joined = 0
    for node in gm.graph.find_nodes(op="call_function", target=ops.attend):
        # Tokens that are kept as they are, and centred ones, look scores up in the mask; `score_mod` comes before it.
        beside = node.kwargs.get("exact") or node.kwargs.get("centre") or node.args[9]
        path = None if beside else _path(node.args[3], node)
        if path is not None and not _overwritten(path[0], node):
            _join(gm.graph, node, path)
            joined += 1
    return joined


def _path(mask, user: fx.Node) -> list[fx.Node] | None:
    """The nodes from a product of queries and keys to a mask that adds it; None where it adds none, or where any of
    them has another use."""
    if not isinstance(mask, fx.Node) or set(mask.users) != {user}:
        return None
    if mask.target is ops.logits:
        return [mask]
    inner = mask.args[:1] if mask.target is torch.Tensor.to else ()
    if mask.target is rewrite.masked and mask.args[2] != "floor":
        inner = mask.args[: 2 if mask.args[2] == "add" else 1]
    path = next((found for each in inner if (found := _path(each, mask)) is not None), None)
    return None if path is None else [*path, mask]


def _overwritten(logits: fx.Node, attend: fx.Node) -> bool:
    """Whether anything that the product reads may be overwritten before attention."""
    planes, node = set(map(shown, logits.args[1])), logits.next
    while node is not attend:
        written = written_operands(node)
        appends = node.target in (ops.append, ops.append_step, ops.remember)
        if written and (not appends or planes & set(map(shown, written))):
            return True
        node = node.next
    return False


def _join(graph: fx.Graph, attend: fx.Node, path: list[fx.Node]) -> None:
    mask, factor = None, 1.0
    for inner, node in pairwise(path):
        added = node.target is rewrite.masked and node.args[1] is inner
        factor *= node.args[3] if added else 1.0
        if mask is not None:
            node.replace_input_with(inner, mask)
            mask = node
        elif added:
            mask = node.args[0]
        elif node.target is rewrite.masked:
            node.args = (None, *node.args[1:])
            mask = node
    query, planes, codec, head_dim = path[0].args
    if factor != 1:
        with graph.inserting_before(attend):
            query = graph.call_function(torch.mul, (query, factor))
    attend.args = (*attend.args[:3], mask, *attend.args[4:])
    attend.kwargs = {**attend.kwargs, "second": [query, *planes], "second_codec": codec, "second_dim": head_dim}
    for node in reversed(path):
        if not node.users:
            graph.erase_node(node)
