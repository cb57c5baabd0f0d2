"""What an index takes of a tensor, item by item."""

import torch
from torch import fx

from tqcompile.passes.nodes import example, memory_of, spelling, tensor_of, written_memory


def same_size(left, right) -> bool:
    return left is right or str(left) == str(right)


def index_items(index, rank: int) -> list | None:
    """An index as one item a dimension (None items apart), or None where a boolean mask takes several at once, or a
    list one."""
    items = list(index) if isinstance(index, tuple) or _is_spread(index) else [index]
    for item in items:
        tensor = tensor_of(item)
        if isinstance(item, (list, bool)) or (tensor is not None and tensor.dtype == torch.bool):
            return None
    if any(item is Ellipsis for item in items):
        at = next(place for place, item in enumerate(items) if item is Ellipsis)
        missing = rank - sum(item is not None and item is not Ellipsis for item in items)
        items[at : at + 1] = [slice(None)] * missing
    return items + [slice(None)] * (rank - sum(item is not None for item in items))


def _is_spread(index) -> bool:
    """Whether a list is what a tuple of its items is, as torch sees it: one of numbers alone is one item."""
    several = (slice, tuple, list, type(None), type(Ellipsis))
    return isinstance(index, list) and any(isinstance(x, several) or tensor_of(x) is not None for x in index)


def full(item, size=None) -> bool:
    """Whether an index item takes a whole dimension as it is."""
    if not isinstance(item, slice) or item.step not in (None, 1) or item.start not in (None, 0):
        return False
    return item.stop is None or (size is not None and same_size(example(item.stop), size))


def names_tokens(node: fx.Node, tensor: torch.Tensor) -> bool:
    """Whether `gather(dim, index)` or `scatter_` takes tokens of a tensor as a whole: each number of its index was made
    one for all channels."""
    index = node.args[2] if len(node.args) > 2 else None
    value = tensor_of(index)
    if value is None or value.dim() != tensor.dim() or not same_size(value.shape[-1], tensor.shape[-1]):
        return False
    if same_size(value.stride(-1), 0):
        return True
    # What has memory of its own for each channel may be given other numbers there.
    repeated = spelling(index) == "repeat" and same_size(tensor_of(index.args[0]).shape[-1], 1)
    return repeated and memory_of(index) not in written_memory(index.graph.nodes)


def kept_run(node: fx.Node) -> tuple[fx.Node, int, slice] | None:
    """The tensor, dimension and numbers of an index that keeps one run of all that the tensor holds, or None."""
    source = node.args[0] if spelling(node) == "getitem" else None
    if tensor_of(source) is None or tensor_of(node) is None:
        return None
    rank = tensor_of(source).dim()
    items = index_items(node.args[1], rank)
    if items is None or len(items) != rank:
        return None
    cut = [(dim, item) for dim, item in enumerate(items) if not full(item)]
    if len(cut) != 1 or not isinstance(cut[0][1], slice) or cut[0][0] == rank - 1:
        return None
    (dim, run), bounds = cut[0], (cut[0][1].start, cut[0][1].stop)
    numbers = all(bound is None or type(bound) is int for bound in bounds)
    return (source, dim, run) if numbers and run.step in (None, 1) else None


def chosen_of(node: fx.Node) -> fx.Node | None:
    """The tensor of which a node keeps one run of tokens, those that an index names, or several of these behind each
    other; None for any other node."""
    if spelling(node) == "cat":
        parts, dim = (*node.args, 0)[:2]
        behind = isinstance(parts, (tuple, list)) and dim % tensor_of(node).dim() != tensor_of(node).dim() - 1
        sources = set(map(chosen_of, parts)) if behind else set()
        return sources.pop() if len(sources) == 1 else None
    source = node.args[0] if spelling(node) in ("getitem", "index_select", "gather") and node.args else None
    if tensor_of(source) is None or tensor_of(node) is None or tensor_of(source).dim() != tensor_of(node).dim():
        return None
    if spelling(node) == "gather":
        return source if names_tokens(node, tensor_of(source)) else None
    if spelling(node) == "index_select" or kept_run(node) is not None:
        return source
    items = index_items(node.args[1], tensor_of(source).dim()) or [None]
    return source if all(full(item) or tensor_of(item) is not None for item in items) and full(items[-1]) else None
