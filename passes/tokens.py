"""Which writes put whole tokens into a cache, and what is kept of a tensor."""

import torch
from torch import fx

from tqcompile.passes.indices import full, index_items, names_tokens, same_size
from tqcompile.passes.nodes import memory_of, spelling, tensor_of, walk, written_tensors
from tqcompile.passes.views import CARRIERS, View

_WRITERS = {"setitem", "index_copy_", "copy_", "scatter_", "zero_"}
_HAND_ON = {*CARRIERS, "cat", "stack"}


def whole_tokens(node: fx.Node, view: View, views: dict[fx.Node, View]) -> bool:
    """Whether a write replaces whole tokens by dense ones."""
    name, cache = spelling(node), tensor_of(view.node)
    if name not in _WRITERS:
        return False
    source = source_of(node)
    if source is None:
        return True
    value, shown = tensor_of(source), views.get(source)
    if value is None or value.dim() == 0:
        return False
    if shown is not None and shown.root is view.root and (not shown.plain or memory_of(source) == memory_of(view.node)):
        return False
    if name == "index_copy_" and (len(node.args) != 4 or not isinstance(node.args[1], int)):
        return False
    if name == "index_copy_" and node.args[1] % cache.dim() == cache.dim() - 1:
        return False
    if name == "scatter_" and not _scatters_tokens(node, view, views):
        return False
    if name == "setitem":
        items = index_items(node.args[1], cache.dim())
        if items is None or None in items or not full(items[-1], cache.shape[-1]):
            return False
    # Where Dynamo has symbols for a second head_dim an assignment, which may broadcast, does not make them one.
    return bool(value.shape[-1] == cache.shape[-1])


def _scatters_tokens(node: fx.Node, view: View, views: dict[fx.Node, View]) -> bool:
    """Whether `scatter_(dim, index, tokens)` writes all of its tokens, each as a whole, and none of the cache's own."""
    if len(node.args) != 4 or node.kwargs:
        return False
    cache, (_, dim, index, tokens) = tensor_of(view.node), node.args
    if dim % cache.dim() == cache.dim() - 1 or not names_tokens(node, cache):
        return False
    own = tokens in views and views[tokens].root is view.root
    return not own and all(map(same_size, tensor_of(tokens).shape, tensor_of(index).shape))


def kept_by(tensor: fx.Node) -> bool:
    """Whether a part of a tensor leaves the graph, or is written into another."""
    shown = walk([tensor], lambda node: [user for user in node.users if spelling(user) in _HAND_ON])
    return any(user.op == "output" or _stores(user, node) for node in shown for user in node.users)


def _stores(write: fx.Node, node: fx.Node) -> bool:
    return node in write.args[1:] and bool(written_tensors(write))


def source_of(write: fx.Node) -> fx.Node | None:
    """What a write to a cache puts there; None where it clears."""
    if spelling(write) == "zero_":
        return None
    return write.args[1] if spelling(write) == "copy_" else write.args[-1]


def positions_along(index, cache: torch.Tensor, value: torch.Tensor) -> int | None:
    """The dimension in which an assignment of `value` has a tensor of positions, and takes all others whole."""
    items = index_items(index, cache.dim())
    indexed = [dim for dim, item in enumerate(items) if tensor_of(item) is not None]
    if len(indexed) != 1 or tensor_of(items[indexed[0]]).dim() != 1 or value.dim() != cache.dim():
        return None
    if not same_size(value.shape[indexed[0]], tensor_of(items[indexed[0]]).shape[0]):
        return None
    others = [dim for dim in range(cache.dim()) if dim not in indexed]
    whole = all(full(items[d], cache.shape[d]) and same_size(value.shape[d], cache.shape[d]) for d in others)
    return indexed[0] if whole else None
