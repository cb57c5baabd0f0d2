"""What takes or writes tokens by an index, in one spelling each."""

import operator

import torch
from torch import fx

from tqcompile.passes.indices import same_size
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.values import before, respell, size_of


def _arguments(node: fx.Node, *names: str) -> tuple | None:
    """The arguments of a call by their names, or None where it has others, or no number for a dimension."""
    given = {**dict(zip(names, node.args)), **node.kwargs}
    return tuple(map(given.get, names)) if set(given) == set(names) and type(given["dim"]) is int else None


def _gather(node: fx.Node) -> bool:
    given = _arguments(node, "input", "dim", "index")
    return given is not None and respell(node, torch.gather, given)


def _take_along_dim(node: fx.Node) -> bool:
    """Of numbers for whole tokens, which are given to all channels."""
    given = _arguments(node, "input", "indices", "dim")
    if given is None or None in map(tensor_of, given[:2]):
        return False
    source, index = map(tensor_of, given[:2])
    dim, sizes = given[2] % source.dim(), []
    if index.dim() != source.dim() or dim == source.dim() - 1 or not same_size(index.shape[-1], 1):
        return False
    for place, (small, large) in enumerate(zip(index.shape, source.shape)):
        if place != dim and not (same_size(small, 1) or same_size(small, large)):
            return False
        sizes.append(-1 if place == dim or same_size(small, large) else size_of(node, given[0], place))
    index = before(node, torch.Tensor.expand, given[1], *sizes)
    return respell(node, torch.gather, (given[0], dim, index))


def _scatter_in_place(node: fx.Node) -> bool:
    given = _arguments(node, "self", "dim", "index", "src")
    return given is not None and respell(node, torch.Tensor.scatter_, given)


def _scatter(node: fx.Node) -> bool:
    given = _arguments(node, "input", "dim", "index", "src")
    tokens = given is not None and tensor_of(given[3]) is not None
    return tokens and _write_copy(node, torch.Tensor.scatter_, *given)


def _write_copy(node: fx.Node, write, source: fx.Node, *arguments) -> bool:
    """Let a write into a copy of `source` stand for one that returns a new tensor."""
    copy = before(node, torch.clone, source)
    with node.graph.inserting_before(node):
        written = node.graph.call_function(write, (copy, *arguments))
    written.meta = {**node.meta, "example_value": None}
    node.replace_all_uses_with(copy)
    node.graph.erase_node(node)
    return True


def _scattered(node: fx.Node) -> bool:
    """A write by an index that returns a new tensor is an assignment to a copy."""
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
    index: tuple = tuple([slice(None)] * (dim % tensor_of(source).dim()))
    if spelling(node) == "slice_scatter":
        index = (*index, slice(given.get("start"), given.get("end"), given.get("step", 1)))
    else:
        index = (*index, given["index"]) if "dim" in names else tuple(given["index"])
    return _write_copy(node, operator.setitem, source, index, given["src"])


_SCATTERED = {
    "slice_scatter": ("input", "src", "dim", "start", "end", "step"),
    "select_scatter": ("input", "src", "dim", "index"),
    "index_copy": ("input", "dim", "index", "src"),
    "index_put": ("input", "index", "src", "accumulate"),
}

BY_INDEX = {
    "gather": _gather,
    "take_along_dim": _take_along_dim,
    "scatter_": _scatter_in_place,
    "scatter": _scatter,
    **dict.fromkeys(_SCATTERED, _scattered),
}
"""A rule for each: it respells a node, and returns whether it did."""
