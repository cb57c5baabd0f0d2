"""A decode step turns its query and writes its keys and values before it attends: all three as one operator."""

import operator

import torch
from torch import fx

from tqcompile import ops
from tqcompile.passes import rewrite
from tqcompile.passes.context import Context
from tqcompile.passes.nodes import memory_of, tensor_of, written_operands

# What shows a part of a plane, and what asks for its shape: neither reads it.
VIEWS = (torch.narrow, torch.permute, operator.getitem)
SHAPES = (torch.ops.aten.sym_size.int, rewrite.broadcast)


def fuse(gm: fx.GraphModule, context: Context) -> int:
    """Join the two `append` in front of each `attend` with the rotation of its query; returns how many were joined."""
    joined = 0
    for node in gm.graph.find_nodes(op="call_function", target=ops.attend):
        appends = _appends(node)
        if appends is not None:
            _join(gm.graph, node, *appends)
            joined += 1
    return joined


def _appends(attend: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The writes of keys and of values that may be done right before `attend`, or None.

    They write the same positions, keys are rotated as the query is, and what lies between neither touches the planes
    nor changes what is written.
    """
    keys, values = ({shown(plane) for plane in planes} for planes in attend.args[1:3])
    if any(plane.op != "placeholder" for plane in keys | values):
        return None
    found: dict[str, fx.Node] = {}
    between, node = [], attend.prev
    while node.op in ("call_function", "call_method", "get_attr") and len(found) < 2:
        touched = {shown(operand) for operand in node.all_input_nodes}
        side = "keys" if touched & keys else "values" if touched & values else None
        if side is not None and node.target is ops.append and side not in found:
            found[side] = node
        elif side is not None and not _reads_nothing(node):
            return None
        else:
            between.append(node)
        node = node.prev
    if len(found) < 2 or keys & values:
        return None
    (_, k, positions, basis, _), (_, v, other_positions, _, _) = found["keys"].args, found["values"].args
    if basis is None or basis is not attend.args[5] or positions is not other_positions:
        return None
    given = [operand for operand in (k, v, positions) if operand is not None]
    changed = [operand for node in between for operand in written_operands(node)]
    if any(tensor_of(operand) is None for operand in (*given, *changed)):
        return None
    overwritten = set(map(memory_of, given)) & set(map(memory_of, changed))
    return None if overwritten else (found["keys"], found["values"])


def shown(node: fx.Node) -> fx.Node:
    """What a node may show a part of: followed through methods too, which may copy; to touch a copy counts as well."""
    while node.op == "call_method" or node.target in VIEWS:
        node = node.args[0]
    return node


def _reads_nothing(node: fx.Node) -> bool:
    """Whether a node only shows a part of a plane; an index with a tensor in it makes a copy."""
    if node.target is operator.getitem:
        items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return not any(isinstance(item, fx.Node) for item in items)
    return node.target in (*VIEWS, *SHAPES)


def _join(graph: fx.Graph, attend: fx.Node, keys: fx.Node, values: fx.Node) -> None:
    (key_planes, k, positions, key_basis, key_codec), (value_planes, v, _, value_basis, value_codec) = (
        keys.args,
        values.args,
    )
    query, *others = attend.args
    with graph.inserting_before(attend):
        turned = graph.call_function(
            ops.append_step,
            (key_planes, value_planes, k, v, query, positions, key_basis, value_basis, key_codec, value_codec),
        )
    others[4] = None
    attend.args = (turned, *others)
    if attend.kwargs.get("exact"):
        # What is kept exactly is in the model's basis.
        attend.kwargs = {**attend.kwargs, "asked": query}
    for node in (keys, values):
        graph.erase_node(node)
