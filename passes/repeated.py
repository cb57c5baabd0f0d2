"""Whether two nodes compute the same, as layers and lines of a model do that each make a mask anew."""

from torch import fx

from tqcompile.passes.nodes import memory_of, spelling, tensor_of, written_memory

# What computes the same whenever it is called: nothing random, and nothing that asks for more than its arguments.
_REPEATABLE = (
    {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "expand", "expand_as", "getitem"}
    | {"eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
    | {"logical_not", "logical_and", "logical_or", "bitwise_not", "bitwise_and", "bitwise_or"}
    | {"invert", "and_", "or_", "__invert__", "__and__", "__or__", "inv"}
    | {"tensor", "scalar_tensor", "arange", "to", "bool", "size", "sym_size"}
)


def same_value(left: fx.Node, right: fx.Node) -> bool:
    """Whether two nodes have the same value: of the same operators on the same nodes, that nothing overwrites."""
    if left is right:
        return True
    read: set[fx.Node] = set()
    if not _alike(left, right, read):
        return False
    memory = {memory_of(node) for node in read if tensor_of(node) is not None}
    return memory.isdisjoint(written_memory(left.graph.nodes))


def _alike(left, right, read: set[fx.Node]) -> bool:
    """Whether two arguments are the same, or are computed in the same way; `read` gains the nodes that it is of."""
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        read |= {left, right}
        same = left.op == right.op and left.target == right.target and spelling(left) in _REPEATABLE
        parts = ((each.args, each.kwargs) for each in (left, right))
        return left is right or (same and _alike(*parts, read))
    if type(left) is not type(right):
        return False
    if isinstance(left, slice):
        left, right = ((each.start, each.stop, each.step) for each in (left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_alike(left[key], right[key], read) for key in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(_alike(*pair, read) for pair in zip(left, right))
    return bool(left == right)
