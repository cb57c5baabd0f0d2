"""What an operator writes in place has one name afterwards, and sizes that nothing is computed from are not asked for.

Either makes a value look used that is not: by the old name of what was written, or by a comparison that Dynamo settled
while it traced.
"""

import operator

from torch import fx

from tqcompile.passes.nodes import memory_of, spelling, tensor_of, written_operands
from tqcompile.passes.views import shape_only

# Those that a chain from scores to weights may hold. What writes into a cache is met where caches are.
_POINTWISE = {"masked_fill_", "clamp_", "clip_", "neg_"} | {
    spelled for name in ("add", "sub", "mul", "div", "truediv") for spelled in (f"{name}_", f"i{name}")
}
_OPERATORS = {operator.__name__, operator.add.__module__}


def name_writes(graph: fx.Graph) -> int:
    """Let what follows an operator that hands back the tensor it wrote use its result; returns how many do.

    The two are one object. Views of it that were made before are left as they are: they still use the older name, and
    what has such a user is no chain of one value after the other.
    """
    given = {memory_of(node) for node in graph.nodes if _is_given(node)}
    order, changed = {node: place for place, node in enumerate(graph.nodes)}, 0
    for node in order:
        source = node.args[0] if spelling(node) in _POINTWISE and node.args else None
        if None in (tensor_of(node), tensor_of(source)) or source not in written_operands(node):
            continue
        later = {user for user in source.users if order[user] > order[node]}
        if later and memory_of(node) == memory_of(source) and memory_of(source) not in given:
            source.replace_all_uses_with(node, delete_user_cb=later.__contains__)
            changed += len(later)
    return changed


def _is_given(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") and tensor_of(node) is not None


def forget_sizes(graph: fx.Graph) -> int:
    """Erase shapes, and numbers that are computed of shapes, which nothing uses; returns how many there were."""
    erased = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method") and _is_number(node):
            graph.erase_node(node)
            erased += 1
    return erased


def _is_number(node: fx.Node) -> bool:
    """Whether a node asks for a shape, or computes of numbers alone."""
    if shape_only(node):
        return True
    computes = getattr(node.target, "__module__", None) in _OPERATORS
    return computes and not any(tensor_of(each) is not None for each in (node, *node.all_input_nodes))
