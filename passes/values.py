"""Calls that are put into a graph, with the values that they have there: fake tensors, as Dynamo makes them."""

from contextlib import nullcontext

import torch
from torch import fx

from tqcompile.passes.nodes import example, tensor_of


def before(node: fx.Node, target, *args, **kwargs) -> fx.Node:
    """A call in front of `node`, with the value that it has."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args, kwargs)
    modes = (getattr(tensor_of(operand), "fake_mode", None) for operand in made.all_input_nodes)
    with next((mode for mode in modes if mode is not None), nullcontext()):
        value = _VALUES.get(target, target)(*fx.map_arg(args, example), **fx.map_arg(kwargs, example))
    made.meta = {**node.meta, "example_value": value}
    return made


def respell(node: fx.Node, target, args: tuple, kwargs: dict | None = None) -> bool:
    """Make a node call `target` on these; returns whether it did not already."""
    kwargs = kwargs or {}
    if node.op == "call_function" and node.target is target and node.args == args and node.kwargs == kwargs:
        return False
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, kwargs
    return True


def size_of(node: fx.Node, tensor: fx.Node, dim: int):
    """A size of a tensor, as a number or as the node of a symbol, in front of `node`."""
    size = tensor_of(tensor).shape[dim]
    if isinstance(size, int):
        return size
    with node.graph.inserting_before(node):
        symbol = node.graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
    symbol.meta["example_value"] = size
    return symbol


def _made_of(left: torch.Tensor, right: torch.Tensor, shape) -> torch.Tensor:
    """A tensor of the dtype that a product has, under autocast too, which needs gradients where that would."""
    dtype = (left.new_empty(1, 1) @ right.new_empty(1, 1)).dtype
    needed = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    return left.new_empty(shape, dtype=dtype).requires_grad_(needed)


def _product_of(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    leading = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return _made_of(left, right, (*leading, left.shape[-2], right.shape[-1]))


def _contraction_of(equation: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    inputs, result = equation.split("->")
    sizes = dict(zip(inputs.replace(",", ""), (*left.shape, *right.shape)))
    return _made_of(left, right, [sizes[letter] for letter in result])


# What has the shape of a product and is none: PyTorch 2.11 asks for the sizes of what it multiplies as numbers, so that
# a graph would serve one length alone.
_VALUES = {torch.matmul: _product_of, torch.einsum: _contraction_of}
