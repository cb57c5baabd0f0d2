"""flex_attention that leaves its scores alone is SDPA with a mask. It is spelled so, and back where no codes are read.

A mask function is the truth, as it is where flex_attention runs eagerly; blocks only say what it hides.
"""

import operator

import torch
from torch import fx

from tqcompile.passes import rewrite
from tqcompile.passes.nodes import sizes_of, spelling, tensor_of

# Of torch.nn.attention.flex_attention, where there are no blocks.
WHOLE = 2**30


def spell_flex(gm: fx.GraphModule) -> int:
    """Spell flex_attention as SDPA, which the passes know that look for caches; returns how often."""
    masks: dict[tuple, fx.Node] = {}
    nodes = [node for node in gm.graph.nodes if node.op == "call_function" and spelling(node) == "flex_attention"]
    return sum(_spelled(gm, node, masks) for node in nodes)


def restore_flex(gm: fx.GraphModule, context) -> int:
    """Spell back what still is SDPA: flex_attention leaves out the blocks that its mask hides."""
    restored = 0
    for node in [node for node in gm.graph.nodes if "flex" in node.meta and spelling(node) == _SDPA.__name__]:
        target, others, meta = node.meta["flex"]
        with gm.graph.inserting_before(node):
            flex = gm.graph.call_function(target, (*node.args, *others))
            out = gm.graph.call_function(operator.getitem, (flex, 0))
        flex.meta, out.meta = meta, {name: value for name, value in node.meta.items() if name != "flex"}
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
        restored += 1
    for node in reversed(list(gm.graph.nodes)):
        if node.target is rewrite.seen and not node.users:
            gm.graph.erase_node(node)
    return restored


_SDPA = torch.nn.functional.scaled_dot_product_attention


def _spelled(gm: fx.GraphModule, node: fx.Node, masks: dict[tuple, fx.Node]) -> bool:
    if len(node.args) != 9 or node.kwargs or not all(_first_item(user) for user in node.users):
        return False
    query, key, value, score_mod, blocks, scale, _, _, captured = node.args
    values = [tensor_of(operand) for operand in (query, key, value)]
    if None in values or not _leaves_alone(gm.get_submodule(score_mod.target)):
        return False
    mask_mod = gm.get_submodule(blocks[-1].target)
    hides = any(used for used in rewrite.grid_of(mask_mod)[2:])
    if not hides and any(isinstance(size, fx.Node) or size < WHOLE for size in blocks[-3:-1]):
        return False
    with gm.graph.inserting_before(node):
        mask = _mask(mask_mod, blocks[-1], query, key, captured, masks) if hides else None
        same_heads = str(values[0].shape[1]) == str(values[1].shape[1])
        options = {"attn_mask": mask, "scale": scale, "enable_gqa": not same_heads}
        attention = gm.graph.call_function(_SDPA, (query, key, value), options)
    attention.meta = {**node.meta, "flex": (node.target, node.args[3:], node.meta)}
    attention.meta["example_value"] = values[0].new_empty((*values[0].shape[:-1], values[2].shape[-1]))
    for user in list(node.users):
        user.replace_all_uses_with(attention)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    return True


def _first_item(user: fx.Node) -> bool:
    """Whether a user takes the attention, and not the sums of weights beside it."""
    return user.target is operator.getitem and user.args[1] == 0


def _leaves_alone(score_mod: fx.GraphModule) -> bool:
    *_, output = score_mod.graph.nodes
    score = next(iter(score_mod.graph.nodes))
    return output.args[0] is score or output.args[0] == (score,)


def _mask(mask_mod: fx.GraphModule, graph: fx.Node, query: fx.Node, key: fx.Node, captured, masks) -> fx.Node:
    """Who sees whom, once for all layers that say the same: bool [batch or 1, heads or 1, queries, tokens]."""
    same = mask_mod.code, tuple(captured), str(sizes_of(query)), sizes_of(key)[2]
    if same not in masks:
        length = tensor_of(key).shape[2]
        if not isinstance(length, int):
            symbol = length
            length = query.graph.call_function(torch.ops.aten.sym_size.int, (key, 2))
            length.meta["example_value"] = symbol
        mask = query.graph.call_function(rewrite.seen, (graph, query, length, *captured))
        value, used = tensor_of(query), rewrite.grid_of(mask_mod)
        rows = [size if told else 1 for size, told in zip(value.shape[:2], used)]
        shape = (*rows, value.shape[2], tensor_of(key).shape[2])
        mask.meta["example_value"] = value.new_empty(shape, dtype=torch.bool)
        masks[same] = mask
    return masks[same]
