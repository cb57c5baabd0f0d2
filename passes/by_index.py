"""What takes or writes tokens by an index, in one spelling each."""

import operator

import torch
from torch import fx

from tqcompile.passes.indices import same_size
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.values import before, respell, size_of


def _gather(node: fx.Node) -> bool:
    given = {**dict(zip(("input", "dim", "index"), node.args)), **node.kwargs}
    given.pop("sparse_grad", None)
    if set(given) != {"input", "dim", "index"} or type(given["dim"]) is not int:
        return False
    return respell(node, torch.gather, (given["input"], given["dim"], given["index"]))


def _take_along_dim(node: fx.Node) -> bool:
    """Of numbers for whole tokens, which are given to all channels."""
    given = {**dict(zip(("input", "indices", "dim"), node.args)), **node.kwargs}
    source, index = (tensor_of(given.get(name)) for name in ("input", "indices"))
    if None in (source, index) or type(given.get("dim")) is not int or len(given) != 3:
        return False
    dim, sizes = given["dim"] % source.dim(), []
    if index.dim() != source.dim() or dim == source.dim() - 1 or not same_size(index.shape[-1], 1):
        return False
    for place, (small, large) in enumerate(zip(index.shape, source.shape)):
        if place != dim and not (same_size(small, 1) or same_size(small, large)):
            return False
        sizes.append(-1 if place == dim or same_size(small, large) else size_of(node, given["input"], place))
    index = before(node, torch.Tensor.expand, given["indices"], *sizes)
    return respell(node, torch.gather, (given["input"], dim, index))


def _scatter_in_place(node: fx.Node) -> bool:
    given = {**dict(zip(("self", "dim", "index", "src"), node.args)), **node.kwargs}
    if set(given) != {"self", "dim", "index", "src"} or type(given["dim"]) is not int:
        return False
    return respell(node, torch.Tensor.scatter_, tuple(given[name] for name in ("self", "dim", "index", "src")))


def _scattered(node: fx.Node) -> bool:
    """A write that returns a new tensor is one into a copy."""
    names = _SCATTERED[spelling(node)]
    given = {**dict(zip(names, node.args)), **node.kwargs}
    source, dim = given.get("input"), given.get("dim", 0)
    if tensor_of(source) is None or not set(given) <= set(names) or given.get("accumulate") or type(dim) is not int:
        return False
    if spelling(node) == "index_copy" and (tensor_of(given["index"]) is None or tensor_of(given["index"]).dim() != 1):
        return False
    dtype, written = tensor_of(source).dtype, tensor_of(given["src"])
    if tensor_of(node).dtype != dtype:
        return False
    if written is not None and written.dtype != dtype:
        given["src"] = before(node, torch.Tensor.to, given["src"], dtype)
    if spelling(node) == "scatter" and written is None:
        return False
    copy = before(node, torch.clone, source)
    index: tuple = tuple([slice(None)] * (dim % tensor_of(source).dim()))
    if spelling(node) == "scatter":
        index = (dim, given["index"])
    elif spelling(node) == "slice_scatter":
        index = (*index, slice(given.get("start"), given.get("end"), given.get("step", 1)))
    else:
        index = (*index, given["index"]) if "dim" in names else tuple(given["index"])
    write, place = (operator.setitem, (index,)) if spelling(node) != "scatter" else (torch.Tensor.scatter_, index)
    with node.graph.inserting_before(node):
        written = node.graph.call_function(write, (copy, *place, given["src"]))
    written.meta = {**node.meta, "example_value": None}
    node.replace_all_uses_with(copy)
    node.graph.erase_node(node)
    return True


_SCATTERED = {
    "slice_scatter": ("input", "src", "dim", "start", "end", "step"),
    "select_scatter": ("input", "src", "dim", "index"),
    "scatter": ("input", "dim", "index", "src"),
    "index_copy": ("input", "dim", "index", "src"),
    "index_put": ("input", "index", "src", "accumulate"),
}

BY_INDEX = {
    "gather": _gather,
    "take_along_dim": _take_along_dim,
    "scatter_": _scatter_in_place,
    **dict.fromkeys(_SCATTERED, _scattered),
}
"""A rule for each: it respells a node, and returns whether it did."""
