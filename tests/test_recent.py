"""Slots of the first and last tokens: whatever is written, what a slot says it holds is what the cache holds there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqcompile import recent
from tqcompile.recent import Recent, Regions, empty, first_and_last

LENGTH = 24
SIZES = st.tuples(st.integers(0, 5), st.integers(0, 7)).filter(sum)


def held(kept: Recent) -> dict[int, torch.Tensor]:
    """The numbers of each token that a slot holds; no token has two."""
    rows = dict(zip(kept.index.tolist(), kept.numbers.unbind(kept.regions.dim)))
    found = {place: numbers for place, numbers in rows.items() if place >= 0}
    assert len(found) == (kept.index >= 0).sum()
    return found


def write(kept: Recent, cache: torch.Tensor, tokens: torch.Tensor, places: list[int], from_start: bool):
    dim = kept.regions.dim
    positions = None if from_start else torch.tensor(places)
    recent.remember(*kept.tensors, tokens, positions, places[0] if from_start else 0, dim, kept.regions.sinks)
    cache.index_copy_(dim, torch.tensor(places), tokens)


@given(sizes=SIZES, dim=st.integers(0, 2), data=st.data())
def test_a_slot_never_holds_what_was_overwritten(sizes, dim, data):
    """Positions in any order, with gaps, back and forth; of a run the first and the last tokens are kept."""
    shape = [2, 3, 4, 8]
    shape[dim] = LENGTH
    cache = torch.zeros(shape)
    kept = empty(cache, Regions(dim, *sizes))
    for _ in range(data.draw(st.integers(1, 6))):
        places = data.draw(st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=9, unique=True))
        run = data.draw(st.booleans())
        places = list(range(min(places), min(LENGTH, min(places) + len(places)))) if run else places
        shape[dim] = len(places)
        write(kept, cache, torch.randn(shape), places, run and data.draw(st.booleans()))
        found, newest = held(kept), max(places)
        for place, numbers in found.items():
            assert torch.equal(numbers, cache.select(dim, place))
        wanted = {place for place in places if place < sizes[0] or place > newest - sizes[1]}
        assert wanted <= found.keys()


@given(sizes=SIZES, length=st.integers(1, 20), dim=st.integers(0, 1))
def test_what_is_made_at_once_is_as_written_token_by_token(sizes, length, dim):
    shape = [3, 2, 8]
    shape[dim] = length
    cache = torch.randn(shape)
    kept = Recent(*first_and_last(cache, dim, *sizes), Regions(dim, *sizes))
    one = empty(cache, kept.regions)
    for place in range(length):
        write(one, cache.clone(), cache.narrow(dim, place, 1), [place], True)
    assert torch.equal(kept.index, one.index)
    assert {*range(min(length, sizes[0])), *range(max(0, length - sizes[1]), length)} == held(kept).keys()
    assert all(torch.equal(numbers, cache.select(dim, place)) for place, numbers in held(kept).items())


def test_a_copy_for_fewer_tokens_knows_no_later_ones_and_is_another():
    cache = torch.randn(1, 9, 8)
    kept = Recent(*first_and_last(cache, 1, 2, 3), Regions(1, 2, 3))
    shorter = kept.copy(7)
    assert set(held(shorter)) == {0, 1, 6} and set(held(kept)) == {0, 1, 6, 7, 8}
    kept.void()
    assert not held(kept) and set(held(shorter)) == {0, 1, 6}


def test_only_what_keys_and_values_both_hold_is_read_exactly():
    keys, values = (torch.randn(1, 2, 9, 8) for _ in range(2))
    sides = [list(first_and_last(side, 2, 2, 3)) for side in (keys, values)]
    sides[1][1][torch.tensor([1, 2])] = torch.tensor([-1, 3])
    q = torch.randn(1, 2, 1, 8)
    found = recent.exact([*sides[0], *sides[1]], q, 0, 9)
    assert found.places.tolist() == [0, 6, 7]
    assert torch.equal(found.keys, keys[:, :, found.places]) and torch.equal(found.values, values[:, :, found.places])
    assert recent.exact([*sides[0], *sides[1]], q, 7, 8).places.tolist() == [0]
    assert recent.exact([*sides[0], *sides[1]], q, 2, 6) is None


@pytest.mark.parametrize("sizes", [(0, 0, 0), (-1, 2, 2), (0, -1, 2), (0, 2, -1)], ids=str)
def test_regions_that_mean_nothing(sizes):
    with pytest.raises(ValueError, match="at least one token to keep"):
        Regions(*sizes)
