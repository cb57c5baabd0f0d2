"""One spelling for each operator the later passes look for."""

import operator

import torch
from torch import fx

from tqcompile.passes.by_index import BY_INDEX
from tqcompile.passes.indices import index_items
from tqcompile.passes.inplace import forget_sizes, name_writes
from tqcompile.passes.nodes import example, spelling, tensor_of
from tqcompile.passes.values import before, respell, size_of

_MATMULS = {"matmul", "bmm", "__matmul__"}
_SDPA_DEFAULTS = (("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False), ("scale", None), ("enable_gqa", False))


def canonicalize(gm: fx.GraphModule, context) -> int:
    """Give matrix products, permutations and attention calls one form each; returns how many were respelled."""
    changed = name_writes(gm.graph) + forget_sizes(gm.graph)
    return changed + sum(_RULES[spelling(node)](node) for node in list(gm.graph.nodes) if spelling(node) in _RULES)


def _matmul(node: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    return respell(node, torch.matmul, node.args)


def _einsum(node: fx.Node) -> bool:
    """What sums over one letter is a matrix product, between changes of shape: `bhqd,bhkd->bhqk`, in any letters.

    Letters that both tensors share lead, the second and later ones as one dimension; so do those of the rows.
    """
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    letters = _letters(equation, operands)
    if letters is None:
        return False
    first, second, result = letters
    given = [dict(zip(part, map(str, tensor_of(x).shape))) for part, x in zip((first, second), operands)]
    if any(given[0][letter] != given[1][letter] for letter in first if letter in second):
        return False
    shared = [letter for letter in result if letter in first and letter in second]
    (inner,) = [letter for letter in first if letter not in result]
    rows = [letter for letter in first if letter not in second]
    (column,) = [letter for letter in second if letter not in first]
    apart = [*(rows if len(rows) > 1 else ()), *(shared[1:] if len(shared) > 2 else ())]
    sizes = {letter: size_of(node, operands[0], first.index(letter)) for letter in apart}
    left = _ordered(node, operands[0], first, (*shared, *rows, inner))
    right = _ordered(node, operands[1], second, (*shared, inner, column))
    left = before(node, torch.unsqueeze, left, -2) if not rows else left
    left = before(node, torch.flatten, left, len(shared), -2) if len(rows) > 1 else left
    if len(shared) > 2:
        left, right = (before(node, torch.flatten, side, 1, len(shared) - 1) for side in (left, right))
    out = before(node, torch.matmul, left, right)
    if len(rows) > 1:
        out = before(node, torch.unflatten, out, -2, tuple(sizes[letter] for letter in rows))
    out = out if rows else before(node, torch.squeeze, out, -2)
    if len(shared) > 2:
        out = before(node, torch.unflatten, out, 1, tuple(sizes[letter] for letter in shared[1:]))
    made = [*shared, *rows, column]
    if made != list(result):
        return respell(node, torch.permute, (out, tuple(made.index(letter) for letter in result)))
    respell(node, out.target, out.args)
    node.graph.erase_node(out)
    return True


def _letters(equation, operands: list) -> tuple[str, str, str] | None:
    """The letters of two tensors and of their product, where that sums over one letter and is a batch of matrices."""
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    left, result = equation.replace(" ", "").split("->")
    first, second = left.split(",")
    if any(len(set(part)) != len(part) for part in (first, second, result)) or None in map(tensor_of, operands):
        return None
    inner = (set(first) & set(second)) - set(result)
    kept = set(result) == (set(first) | set(second)) - inner
    shared, columns = set(first) & set(second) & set(result), set(second) - set(first)
    return (first, second, result) if kept and len(inner) == len(columns) == 1 and shared else None


def _ordered(node: fx.Node, tensor: fx.Node, letters: str, wanted: tuple[str, ...]) -> fx.Node:
    order = tuple(letters.index(letter) for letter in wanted)
    return tensor if order == tuple(range(len(order))) else before(node, torch.permute, tensor, order)


def _added_product(node: fx.Node) -> bool:
    """`baddbmm(bias, a, b)` is a product and a sum."""
    given = {**dict(zip(("input", "batch1", "batch2"), node.args)), **node.kwargs}
    beta, alpha = given.pop("beta", 1), given.pop("alpha", 1)
    if set(given) != {"input", "batch1", "batch2"} or not all(isinstance(x, (int, float)) for x in (beta, alpha)):
        return False
    product = before(node, torch.matmul, given["batch1"], given["batch2"])
    product = product if alpha == 1 else before(node, torch.mul, product, alpha)
    if beta == 0:
        return respell(node, torch.clone, (product,))
    bias = given["input"] if beta == 1 else before(node, torch.mul, given["input"], beta)
    return respell(node, torch.add, (product, bias))


def _getitem(node: fx.Node) -> bool:
    return _new_axes(node) if tensor_of(node.args[0]) is not None else _piece(node)


def _new_axes(node: fx.Node) -> bool:
    """An index that cuts and puts dimensions in is one that cuts, and then `unsqueeze`."""
    source, index = node.args
    items = list(index) if isinstance(index, tuple) else [index]
    plain = all(item is None or item is Ellipsis or type(item) in (int, slice) for item in items)
    if None not in items or not plain or all(item in (None, Ellipsis, slice(None)) for item in items):
        return False
    items = index_items(index, tensor_of(source).dim())
    out = before(node, operator.getitem, source, tuple(item for item in items if item is not None))
    kept = [item for item in items if type(item) is not int]
    *others, last = [place for place, item in enumerate(kept) if item is None]
    for place in others:
        out = before(node, torch.unsqueeze, out, place)
    return respell(node, torch.unsqueeze, (out, last))


def _piece(node: fx.Node) -> bool:
    """One tensor of an `unbind`, `split` or `chunk` is a `select` or a `narrow`."""
    pieces, place = node.args
    if not isinstance(pieces, fx.Node) or spelling(pieces) not in _PIECES:
        return False
    given = {**dict(zip(("tensor", *_PIECES[spelling(pieces)]), pieces.args)), **pieces.kwargs}
    source, dim, values = pieces.args[0] if pieces.args else None, given.get("dim", 0), example(pieces)
    if tensor_of(source) is None or not isinstance(values, (tuple, list)) or not isinstance(dim, int):
        return False
    place, dim = place % len(values), dim % tensor_of(source).dim()
    sizes = [value.shape[dim] for value in values[: place + 1]] if spelling(pieces) != "unbind" else []
    if not all(isinstance(size, int) for size in sizes):
        return False
    target, where = (torch.narrow, (sum(sizes[:-1]), sizes[-1])) if sizes else (torch.select, (place,))
    respell(node, target, (source, dim, *where))
    if not pieces.users:
        node.graph.erase_node(pieces)
    return True


def _transpose(node: fx.Node) -> bool:
    value = tensor_of(node.args[0])
    if value is None or len(node.args) != 3 or node.kwargs:
        return False
    order = list(range(value.dim()))
    first, second = (dim % value.dim() for dim in node.args[1:])
    order[first], order[second] = order[second], order[first]
    return respell(node, torch.permute, (node.args[0], tuple(order)))


def _matrix_transpose(node: fx.Node) -> bool:
    value = tensor_of(node.args[0])
    if value is None or value.dim() < 2 or tensor_of(node) is None:
        return False
    order = (*range(value.dim() - 2), value.dim() - 1, value.dim() - 2)
    return respell(node, torch.permute, (node.args[0], order))


def _permute(node: fx.Node) -> bool:
    value = tensor_of(node.args[0])
    dims = node.args[1] if len(node.args) == 2 else node.args[1:]
    if value is None or node.kwargs or not isinstance(dims, (tuple, list)) or not all(type(d) is int for d in dims):
        return False
    return respell(node, torch.permute, (node.args[0], tuple(dim % value.dim() for dim in dims)))


def _attention(node: fx.Node) -> bool:
    names = ("query", "key", "value", *(name for name, _ in _SDPA_DEFAULTS))
    given = {**dict(zip(names, node.args)), **node.kwargs}
    operands = tuple(given.pop(name) for name in names[:3])
    options = {name: given.pop(name, default) for name, default in _SDPA_DEFAULTS}
    if given:
        return False
    return respell(node, torch.nn.functional.scaled_dot_product_attention, operands, options)


def _cast(node: fx.Node) -> bool:
    """A cast to the dtype of another tensor uses that dtype, and not the tensor."""
    value, operands = tensor_of(node), [tensor_of(operand) for operand in node.args]
    if len(operands) != 2 or None in (value, *operands) or node.kwargs or value.device != operands[0].device:
        return False
    return respell(node, torch.Tensor.to, (node.args[0], value.dtype))


def _item_assignment(node: fx.Node) -> bool:
    return respell(node, operator.setitem, node.args) if len(node.args) == 3 else False


def _cat(node: fx.Node) -> bool:
    given = {**dict(zip(("tensors", "dim"), node.args)), **node.kwargs}
    if "tensors" not in given or not set(given) <= {"tensors", "dim"}:
        return False
    parts, dim = given["tensors"], given.get("dim", 0)
    order = _turn(parts[0]) if isinstance(parts, (tuple, list)) and parts else None
    # Only of a past: what is turned comes out as a view, and where nothing is kept the model may count on a copy.
    turned = order is not None and _is_given(parts[0].args[0]) and None not in map(tensor_of, parts)
    if not turned or any(tensor_of(part).dim() != len(order) for part in parts):
        return respell(node, torch.cat, (parts, dim))
    # A turned past that tokens are put behind: the past itself, and what is put behind it turned back.
    back = tuple(order.index(place) for place in range(len(order)))
    straight = [part.args[0] if _turn(part) == order else before(node, torch.permute, part, back) for part in parts]
    joined = before(node, torch.cat, straight, order[dim % len(order)])
    return respell(node, torch.permute, (joined, order))


def _is_given(node: fx.Node) -> bool:
    """Whether a node is an input of the graph, or a part of one."""
    while spelling(node) in ("getitem", "select", "narrow"):
        node = node.args[0]
    return node.op == "placeholder"


def _turn(node) -> tuple[int, ...] | None:
    """The order of a permutation that moves the last dimension."""
    moves = isinstance(node, fx.Node) and node.target is torch.permute and node.args[1][-1] != len(node.args[1]) - 1
    return tuple(node.args[1]) if moves else None


_PIECES = {"unbind": ("dim",), "split": ("split_size_or_sections", "dim"), "chunk": ("chunks", "dim")}

_RULES = {
    **dict.fromkeys(_MATMULS, _matmul),
    "einsum": _einsum,
    "baddbmm": _added_product,
    "getitem": _getitem,
    **BY_INDEX,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("mT", "adjoint"), _matrix_transpose),
    "permute": _permute,
    **dict.fromkeys(("type_as", "to"), _cast),
    "scaled_dot_product_attention": _attention,
    "__setitem__": _item_assignment,
}
