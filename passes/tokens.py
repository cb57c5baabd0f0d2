"""Which writes put whole tokens into a cache, and what is kept of a tensor."""

from torch import fx

from tqcompile.passes.indices import full, index_items
from tqcompile.passes.nodes import memory_of, spelling, tensor_of, written_operands
from tqcompile.passes.views import CARRIERS, View

_WRITERS = {"setitem", "index_copy_", "copy_", "zero_"}


def whole_tokens(node: fx.Node, view: View, views: dict[fx.Node, View]) -> bool:
    """Whether a write replaces whole tokens by dense ones."""
    name, cache = spelling(node), tensor_of(view.node)
    if name not in _WRITERS:
        return False
    if name == "zero_":
        return True
    source = node.args[1] if name == "copy_" else node.args[-1]
    value, shown = tensor_of(source), views.get(source)
    if value is None or value.dim() == 0:
        return False
    if shown is not None and shown.root is view.root and (not shown.plain or memory_of(source) == memory_of(view.node)):
        return False
    if name == "index_copy_" and (len(node.args) != 4 or not isinstance(node.args[1], int)):
        return False
    if name == "index_copy_" and node.args[1] % cache.dim() == cache.dim() - 1:
        return False
    if name == "setitem":
        items = index_items(node.args[1], cache.dim())
        if items is None or None in items or not full(items[-1], cache.shape[-1]):
            return False
    # Where Dynamo has symbols for a second head_dim an assignment, which may broadcast, does not make them one.
    return bool(value.shape[-1] == cache.shape[-1])


def is_stored(node: fx.Node) -> bool:
    """Whether a tensor is what a node writes into another."""
    return any(node in user.args[1:] and written_tensors(user) for user in node.users)


def kept_by(join: fx.Node) -> bool:
    """Whether a part of a tensor leaves the graph, or is written into another."""
    reached = {join: None}
    for node in (queue := [join]):
        if any(user.op == "output" for user in node.users) or is_stored(node):
            return True
        fresh = [user for user in node.users if spelling(user) in {*CARRIERS, "cat", "stack"} and user not in reached]
        reached.update(dict.fromkeys(fresh))
        queue += fresh
    return False


def written_tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes into."""
    return [operand for operand in written_operands(node) if tensor_of(operand) is not None]
