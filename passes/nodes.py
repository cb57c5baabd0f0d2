"""What a node of a graph calls, what it computes, and whose memory it writes."""

import operator
from collections.abc import Callable, Iterable, Iterator

import sympy
import torch
from torch import fx

_AUGMENTED = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and hasattr(operator, name[1:])}


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


def sizes_of(node: fx.Node) -> list[str]:
    """The sizes of a tensor as text: to compare symbols would make guards."""
    return [str(size) for size in tensor_of(node).shape]


def times_of(node: fx.Node) -> tuple:
    """How often `repeat` repeats each dimension, however that is written."""
    return node.args[1:2] and (node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:])


def of_given_sizes(size: torch.SymInt, graph: fx.Graph) -> tuple[Callable, list[fx.Node]]:
    """A symbolic size as a function of sizes that a graph is given, and the placeholders of those."""
    given = {}
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(example(node), torch.SymInt):
            given[example(node).node.expr] = node
    names = sorted(size.node.expr.free_symbols, key=str)
    return sympy.lambdify(names, size.node.expr, "math"), [given[name] for name in names]


def walk(starts: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """`starts` and all that `onward` leads to from them, each once, the near ones first."""
    reached = dict.fromkeys(starts)
    for node in (queue := list(reached)):
        yield node
        fresh = dict.fromkeys(each for each in onward(node) if each not in reached)
        reached.update(fresh)
        queue += fresh


def memory_of(node: fx.Node) -> int:
    value = tensor_of(node)
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.untyped_storage()._cdata


def written_operands(node: fx.Node) -> list:
    """The operands a node writes into, as far as its name or its schema says."""
    name, target = spelling(node), node.target
    operands = [node.kwargs.get("out")]
    in_place = name == "setitem" or (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace")
    if in_place or (node.op == "call_function" and target in _AUGMENTED):
        operands += [*node.args[:1], node.kwargs.get("input"), node.kwargs.get("self")]
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        arguments = target._schema.arguments
        operands += [a for a, s in zip(node.args, arguments) if s.is_write]
        operands += [node.kwargs.get(s.name) for s in arguments if s.is_write]
    if name.startswith("triton_kernel_wrapper"):
        operands += node.all_input_nodes
    flat = (item for operand in operands for item in (operand if isinstance(operand, (list, tuple)) else (operand,)))
    return [item for item in flat if isinstance(item, fx.Node)]


def written_tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes into."""
    return [operand for operand in written_operands(node) if tensor_of(operand) is not None]


def written_memory(nodes: Iterable[fx.Node]) -> set[int]:
    """The memory that any of these nodes writes into."""
    return {memory_of(operand) for node in nodes for operand in written_tensors(node)}
