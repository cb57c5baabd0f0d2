"""One spelling for each operator the later passes look for."""

import operator

import torch
from torch import fx

_MATMULS = {"matmul", "bmm", "__matmul__"}
_SDPA_DEFAULTS = (("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False), ("scale", None), ("enable_gqa", False))


def canonicalize(gm: fx.GraphModule, context) -> int:
    """Give matrix products, permutations and attention calls one form each; returns how many were respelled."""
    changed = 0
    for node in list(gm.graph.nodes):
        rule = _RULES.get(spelling(node))
        if rule is not None and rule(node):
            changed += 1
    return changed


def spelling(node: fx.Node) -> str:
    """The bare name of what a node calls, whether as a function, a method or an ATen overload."""
    if node.op == "call_method":
        return node.target
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    if node.target is getattr:
        return str(node.args[1])
    return getattr(node.target, "__name__", str(node.target))


def example(node) -> object:
    """The fake value Dynamo computed for a node, or the argument itself where it is not a node."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def tensor_of(node) -> torch.Tensor | None:
    """The fake tensor of a node; None where it is anything else."""
    value = example(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _respell(node: fx.Node, target, args: tuple, kwargs: dict | None = None) -> bool:
    kwargs = kwargs or {}
    if node.op == "call_function" and node.target is target and node.args == args and node.kwargs == kwargs:
        return False
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, kwargs
    return True


def _matmul(node: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    return _respell(node, torch.matmul, node.args)


def _einsum(node: fx.Node) -> bool:
    """`bhqd,bhkd->bhqk` and `bhqk,bhkd->bhqd`, in any letters, are matrix products."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "..." in equation or "->" not in equation:
        return False
    left, result = equation.replace(" ", "").split("->")
    first, second = left.split(",")
    rank = len(first)
    if not (rank == len(second) == len(result) >= 3) or any(len(set(part)) != rank for part in (first, second, result)):
        return False
    if first[: rank - 1] != result[: rank - 1]:
        return False
    inner, outer = first[-1], result[-1]
    if set(second) != {*result[: rank - 2], inner, outer}:
        return False
    value = tensor_of(operands[1])
    if value is None:
        return False
    order = [second.index(letter) for letter in (*result[: rank - 2], inner, outer)]
    with node.graph.inserting_before(node):
        permuted = node.graph.call_function(torch.permute, (operands[1], tuple(order)))
    permuted.meta = {**node.meta, "example_value": value.permute(order)}
    return _respell(node, torch.matmul, (operands[0], permuted))


def _transpose(node: fx.Node) -> bool:
    value = tensor_of(node.args[0])
    if value is None or len(node.args) != 3 or node.kwargs:
        return False
    order = list(range(value.dim()))
    first, second = (dim % value.dim() for dim in node.args[1:])
    order[first], order[second] = order[second], order[first]
    return _respell(node, torch.permute, (node.args[0], tuple(order)))


def _matrix_transpose(node: fx.Node) -> bool:
    value = tensor_of(node.args[0])
    if value is None or value.dim() < 2 or tensor_of(node) is None:
        return False
    order = (*range(value.dim() - 2), value.dim() - 1, value.dim() - 2)
    return _respell(node, torch.permute, (node.args[0], order))


def _permute(node: fx.Node) -> bool:
    value = tensor_of(node.args[0])
    dims = node.args[1] if len(node.args) == 2 else node.args[1:]
    if value is None or node.kwargs or not isinstance(dims, (tuple, list)) or not all(type(d) is int for d in dims):
        return False
    return _respell(node, torch.permute, (node.args[0], tuple(dim % value.dim() for dim in dims)))


def _attention(node: fx.Node) -> bool:
    names = ("query", "key", "value", *(name for name, _ in _SDPA_DEFAULTS))
    given = {**dict(zip(names, node.args)), **node.kwargs}
    operands = tuple(given.pop(name) for name in names[:3])
    options = {name: given.pop(name, default) for name, default in _SDPA_DEFAULTS}
    if given:
        return False
    return _respell(node, torch.nn.functional.scaled_dot_product_attention, operands, options)


def _item_assignment(node: fx.Node) -> bool:
    return _respell(node, operator.setitem, node.args) if len(node.args) == 3 else False


def _cat(node: fx.Node) -> bool:
    given = {**dict(zip(("tensors", "dim"), node.args)), **node.kwargs}
    if "tensors" not in given or not set(given) <= {"tensors", "dim"}:
        return False
    return _respell(node, torch.cat, (given["tensors"], given.get("dim", 0)))


_RULES = {
    **dict.fromkeys(_MATMULS, _matmul),
    "einsum": _einsum,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("mT", "adjoint"), _matrix_transpose),
    "permute": _permute,
    "scaled_dot_product_attention": _attention,
    "__setitem__": _item_assignment,
}
