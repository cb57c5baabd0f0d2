"""FlexAttention, spelled out beside itself, so that what reads a cache can be found in its score and mask functions."""

import operator

import torch
from torch import fx

from tqcompile import scores
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.values import before, size_of

TWIN = "spelled out"
# The block size of FlexAttention where there are no blocks.
WHOLE = 2**30
# What functions of scores and places may be made of: what gives for tensors of places what it gives place by place.
_POINTWISE = {
    *("add", "sub", "mul", "truediv", "div", "floordiv", "floor_divide", "mod", "remainder", "neg", "pow"),
    *("lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "xor", "invert", "logical_and", "logical_or", "logical_not"),
    *("__and__", "__or__", "__invert__", "bitwise_and", "bitwise_or", "bitwise_not", "where", "clamp", "to", "float"),
    *("maximum", "minimum", "max", "min", "abs", "exp2", "log2", "new_ones", "new_full", "masked_fill"),
    *scores.FUNCTIONS,
}


def flex(gm: fx.GraphModule, context) -> int:
    """Put two products with a softmax between them beside each FlexAttention; returns how many.

    Nothing uses them. What finds that they are attention over a cache rewrites the call they stand for, and else they
    are dropped.
    """
    calls = [node for node in gm.graph.nodes if spelling(node) == "flex_attention" and node.op == "call_function"]
    return sum(_spell_out(gm, node) for node in calls)


def _spell_out(gm: fx.GraphModule, node: fx.Node) -> bool:
    if len(node.args) != 9 or node.kwargs:
        return False
    query, key, value, score_mod, block_mask, scale, _, score_others, mask_others = node.args
    results = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    functions = [_graph_of(gm, function) for function in (score_mod, block_mask[-1])]
    if len(results) != 1 or len(node.users) != 1 or None in functions or isinstance(scale, fx.Node):
        return False
    # Blocks that come without a function hide what no function says.
    if _says_nothing(functions[1]) and any(isinstance(size, fx.Node) or size < WHOLE for size in block_mask[-3:-1]):
        return False
    batch, heads, queries, length = (size_of(node, *at) for at in ((query, 0), (query, 1), (query, 2), (key, 2)))
    keys, values = (_repeated(node, side, query) for side in (key, value))
    product = before(node, torch.matmul, query, before(node, torch.permute, keys, (0, 1, 3, 2)))
    product = before(node, torch.mul, product, scale)
    places = [before(node, _places, query, dim, size) for dim, size in enumerate((batch, heads, queries, length))]
    score = _inlined(node, functions[0], (product, *places, *score_others))
    keep = _inlined(node, functions[1], (*places, *mask_others))
    if score is None or keep is None:
        return False
    if not _says_nothing(functions[1]):
        score = before(node, torch.where, keep, score, -float("inf"))
    weights = before(node, torch.softmax, score, -1)
    results[0].meta[TWIN] = before(node, torch.matmul, weights, values)
    return True


def _places(like: torch.Tensor, dim: int, size) -> torch.Tensor:
    """The places along one of the four dimensions of scores, as it is broadcast to them."""
    return torch.arange(size, device=like.device).reshape(tuple(-1 if other == dim else 1 for other in range(4)))


def _graph_of(gm: fx.GraphModule, function) -> fx.Graph | None:
    module = getattr(gm, str(function.target), None) if isinstance(function, fx.Node) else None
    return module.graph if isinstance(module, fx.GraphModule) else None


def _says_nothing(mask: fx.Graph) -> bool:
    """Whether a mask function keeps everything: what it returns depends on no place."""
    places = mask.find_nodes(op="placeholder")
    return all(spelling(user) == "new_ones" for place in places for user in place.users)


def _repeated(node: fx.Node, side: fx.Node, query: fx.Node) -> fx.Node:
    """Keys or values with a head for each of the queries'."""
    groups = tensor_of(query).shape[1] // tensor_of(side).shape[1]
    return side if groups == 1 else before(node, torch.repeat_interleave, side, groups, 1)


def _inlined(node: fx.Node, function: fx.Graph, operands: tuple) -> fx.Node | None:
    """What a function of a score and places gives for tensors of them, in front of `node`; None where it may differ."""
    known: dict[fx.Node, object] = {}
    given = iter(operands)
    for inner in function.nodes:
        if inner.op == "placeholder":
            known[inner] = next(given)
            continue
        if inner.op == "output":
            result = inner.args[0]
            return known.get(result) if isinstance(result, fx.Node) else None
        args, kwargs = fx.map_arg((inner.args, inner.kwargs), lambda old: known[old])
        if inner.op not in ("call_function", "call_method") or not _by_place(inner, known):
            return None
        target = inner.target if inner.op == "call_function" else getattr(torch.Tensor, inner.target)
        known[inner] = before(node, target, *args, **kwargs)
    return None


def _by_place(inner: fx.Node, known: dict) -> bool:
    """Whether a node computes each of its numbers from those of one place, or looks them up in a captured tensor."""
    if spelling(inner) != "getitem":
        return spelling(inner) in _POINTWISE
    items = inner.args[1] if isinstance(inner.args[1], tuple) else (inner.args[1],)
    looked_up = known[inner.args[0]]
    whole = tensor_of(looked_up) is not None and tensor_of(looked_up).dim() == len(items)
    return whole and looked_up.op == "placeholder" and all(isinstance(item, fx.Node) for item in items)


def made_for(twin: fx.Node) -> list[fx.Node]:
    """`twin` and all that is computed for it alone, each before what it is computed of."""
    found = [twin]
    for node in found:
        operands = (operand for operand in node.all_input_nodes if operand.op == "call_function")
        found += [operand for operand in operands if operand not in found and set(operand.users) <= set(found)]
    return found


def drop(twin: fx.Node) -> None:
    """Erase `twin` and what was computed for it alone."""
    for node in made_for(twin):
        node.graph.erase_node(node)
