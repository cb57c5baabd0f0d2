"""An index is one item a dimension, and takes what torch takes."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqcompile.passes.indices import index_items

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
