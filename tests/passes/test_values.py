"""Calls that passes put into a graph have the values that the operators would give, and are for any length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tqcompile.passes.nodes import tensor_of
from tqcompile.passes.values import before

SIZES = st.sampled_from([1, 2, 3, 7])
EQUATIONS = {"bhtn,hnr->bhtr": ((2, 3, 1, 5), (3, 5, 7)), "bhtr,hvr->bhtv": ((2, 3, 4, 5), (3, 7, 5))}


def value(target, *args) -> torch.Tensor:
    """What the node of a call has for its value, where tensors stand among its arguments."""
    graph = fx.Graph()
    nodes = []
    for place, each in enumerate(args):
        nodes.append(graph.placeholder(f"x{place}") if isinstance(each, torch.Tensor) else each)
        if isinstance(each, torch.Tensor):
            nodes[-1].meta["example_value"] = each
    return tensor_of(before(graph.output(None), target, *nodes))


def alike(made: torch.Tensor, expected: torch.Tensor) -> bool:
    what = ("shape", "dtype", "device", "requires_grad")
    return all(getattr(made, name) == getattr(expected, name) for name in what)


@given(st.tuples(SIZES, SIZES, SIZES), st.booleans(), st.booleans(), st.integers(1, 2), st.booleans())
def test_a_product_is_like_that_of_the_operator(sizes, first, second, leading, learned):
    rows, inner, columns = sizes
    lead = [(2, 3)[:leading] if kept else (1,) * leading for kept in (first, second)]
    left = torch.randn(*lead[0], rows, inner)
    right = torch.randn(*lead[1], inner, columns, requires_grad=learned)
    assert alike(value(torch.matmul, left, right), torch.matmul(left, right))
    with torch.no_grad():
        assert alike(value(torch.matmul, left, right), torch.matmul(left, right))
    with torch.autocast("cpu", torch.bfloat16):
        assert alike(value(torch.matmul, left, right), torch.matmul(left, right))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_contraction_is_like_that_of_the_operator(equation):
    left, right = (torch.randn(shape) for shape in EQUATIONS[equation])
    assert alike(value(torch.einsum, equation, left, right), torch.einsum(equation, left, right))


@pytest.mark.parametrize("shapes", [((2, 4, 1, 16), (2, 4, 16, 13)), ((2, 4, 1, 13), (2, 4, 13, 16))], ids=str)
def test_no_length_is_asked_for(shapes):
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    faked = []
    for shape in shapes:
        sizes = [DimDynamic.DYNAMIC if size == 13 else DimDynamic.STATIC for size in shape]
        context = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * len(shape))
        faked.append(mode.from_tensor(torch.randn(shape), symbolic_context=context))
    if shapes[0][-1] == 13:
        # The same length in both.
        faked[1] = faked[1].new_empty((2, 4, faked[0].shape[-1], 16))
    made = value(torch.matmul, *faked)
    assert not environment.guards and made.fake_mode is mode
    assert str(made.shape[-1]) == str(faked[1].shape[-1])
