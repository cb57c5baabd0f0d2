"""An index is one item a dimension, and takes what torch takes."""

import warnings

import pytest
import torch
from graphs import capture
from hypothesis import given
from hypothesis import strategies as st

from tqcompile.passes.canonicalize import canonicalize
from tqcompile.passes.indices import chosen_of, index_items, names_tokens

SHAPE = (2, 3, 4, 5)
NUMBERS = torch.arange(2 * 3 * 4 * 5).view(SHAPE)
ONE = st.one_of(
    st.integers(-2, 1),
    st.builds(slice, st.none() | st.integers(0, 2), st.none() | st.integers(-2, 5), st.sampled_from([None, 1, 2])),
    st.none(),
    st.lists(st.integers(-2, 1), min_size=2, max_size=2),
)
SEVERAL = st.lists(ONE, min_size=1, max_size=4)


@st.composite
def indices(draw):
    """A tuple, a list or an item alone, with or without dots."""
    items = draw(SEVERAL)
    if draw(st.booleans()):
        items.insert(draw(st.integers(0, len(items))), ...)
    return draw(st.sampled_from([tuple(items), items, items[0]]))


@given(indices())
def test_items_take_what_the_index_takes(index):
    with warnings.catch_warnings():
        # Newer versions of torch want a tuple where a list has slices.
        warnings.simplefilter("ignore")
        taken = NUMBERS[index]
    items = index_items(index, NUMBERS.dim())
    if items is None:
        assert isinstance(index, list) or any(isinstance(item, list) for item in index)
    else:
        assert sum(item is not None for item in items) == NUMBERS.dim()
        assert NUMBERS[tuple(items)].equal(taken)


@pytest.mark.parametrize("index", [[1, 0], [0], [], [True, False], ([1, 0], slice(None)), True], ids=str)
def test_a_list_of_numbers_takes_several_of_one_dimension(index):
    assert index_items(index, 4) is None


TENSOR = torch.randn(2, 3, 6, 5)


def at_one(index):
    index[..., 1].zero_()
    return index


INDICES = {
    "expanded": (lambda x, i: i[..., None].expand(-1, -1, -1, x.shape[-1]), True),
    "expanded as another": (lambda x, i: i.unsqueeze(-1).expand_as(x[:, :, :2]), True),
    "expanded, then cut": (lambda x, i: i[..., None].expand(2, 3, 2, 5)[:, :1], True),
    "broadcast": (lambda x, i: torch.broadcast_to(i[..., None], (2, 3, 2, 5)), True),
    "repeated": (lambda x, i: i[..., None].repeat(1, 1, 1, 5), True),
    "repeated along a new dimension": (lambda x, i: i[0, 0, :, None].repeat(2, 3, 1, 5), True),
    "repeated, then written": (lambda x, i: at_one(i[..., None].repeat(1, 1, 1, 5)), False),
    "expanded, then written": (lambda x, i: at_one((i[..., None] + 1).expand(-1, -1, -1, 5)), True),
    "narrower": (lambda x, i: i[..., None].expand(-1, -1, -1, 4), False),
    "another in each channel": (lambda x, i: i[..., None] + torch.arange(5) % 2, False),
    "repeated along tokens": (lambda x, i: (i[..., None] + torch.arange(5) % 2).repeat(1, 1, 2, 1), False),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_names_tokens_where_it_was_made_one_number_for_all_channels(name):
    make, expected = INDICES[name]
    places = torch.randint(4, (2, 3, 2))
    gm = capture(lambda x, i: x.gather(2, make(x, i)), TENSOR, places)
    gather = next(node for node in gm.graph.nodes if node.target == "gather")
    assert names_tokens(gather, TENSOR) == expected
    index = make(TENSOR, places)
    assert not expected or index.equal(index[..., :1].expand(*index.shape[:-1], 5))


CHOICES = {
    "a run": (lambda x, i: x[:, :, 1:3], True),
    "places": (lambda x, i: x[:, :, i[0, 0]], True),
    "of each head": (lambda x, i: x.gather(2, i[..., None].expand(-1, -1, -1, 5)), True),
    "two runs": (lambda x, i: torch.cat((x[:, :, :1], x[:, :, 2:]), 2), True),
    "channels": (lambda x, i: x[..., 1:3], False),
    "channels of two runs": (lambda x, i: torch.cat([x[:, :, :1], x[:, :, 1:2]], 3), False),
    "two tensors": (lambda x, i: torch.cat([x[:, :, :1], (x + 1)[:, :, 2:]], 2), False),
    "other numbers": (lambda x, i: x[:, :, 1:3] + 1, False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_keeps_tokens_of_one_tensor_is_told_from_the_rest(name):
    make, expected = CHOICES[name]
    gm = capture(lambda x, i: make(x * 2, i), TENSOR, torch.randint(4, (2, 3, 2)))
    canonicalize(gm, None)
    output = next(iter(gm.graph.find_nodes(op="output"))).args[0][0]
    source = chosen_of(output)
    assert (source is not None) == expected and (source is None or source.target.__name__ == "mul")


def test_what_a_node_makes_a_list_of_is_no_choice():
    graph = torch.fx.Graph()
    joined = graph.call_function(torch.cat, (graph.call_function(torch.split, (graph.placeholder("x"), 1)), 2))
    joined.meta["example_value"] = TENSOR
    assert chosen_of(joined) is None
