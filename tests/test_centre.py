"""What is taken off keys by their places comes back exactly, and what is learned of keys is what turned them."""

import math

import pytest
import torch

from tqcompile import reference
from tqcompile.centre import (
    FEWEST,
    Centring,
    Rotation,
    learned,
    less,
    more,
    planes_of,
    still,
    tables,
    turned,
    waved,
    waves,
)  # fmt: skip
from tqcompile.principal import weighed

HEADS, QUERIES, TOKENS, HEAD_DIM = 2, 6, 40, 8
HALVES = Rotation((-1.0, -0.1, 0.0, -0.01, 1.0, 0.1, 0.0, 0.01), (4, 5, 2, 7, 0, 1, 6, 3))
CPU = torch.device("cpu")


def keys_of(mean, tokens=TOKENS, noise=0.1):
    """Keys [2, H, T, D] that turn, around a mean [H, D] before they do."""
    x = mean[None, :, None] + noise * torch.randn(2, HEADS, tokens, HEAD_DIM)
    return turned(x, torch.arange(tokens), *tables(HALVES, CPU), 2)


def test_a_rotation_turns_pairs_by_their_angle_and_leaves_the_others():
    x, place = torch.randn(1, 1, 1, HEAD_DIM), 3
    out = turned(x, torch.tensor([place]), *tables(HALVES, CPU), 2)[0, 0, 0]
    left, right = x[0, 0, 0, 0], x[0, 0, 0, 4]
    assert out[0].item() == pytest.approx((left * math.cos(place) - right * math.sin(place)).item(), abs=1e-6)
    assert out[4].item() == pytest.approx((right * math.cos(place) + left * math.sin(place)).item(), abs=1e-6)
    assert torch.equal(out[[2, 6]], x[0, 0, 0, [2, 6]])


@pytest.mark.parametrize("dim", [1, 2])
def test_what_was_taken_off_comes_back(dim):
    keys = torch.randn(2, 5, 5, HEAD_DIM)
    centre = Centring(HALVES, dim, torch.randn(5, HEAD_DIM)).of(keys)
    assert centre.mean.norm() > 0
    torch.testing.assert_close(centre.more(centre.less(keys)), keys)
    turns = tables(HALVES, CPU)
    left = less(keys, centre.vectors, torch.arange(5), *turns, dim)
    torch.testing.assert_close(left, centre.less(keys))
    torch.testing.assert_close(more(left, centre.vectors, *turns, dim), keys)


def test_the_mean_is_that_of_keys_before_they_turn():
    mean = torch.randn(HEADS, HEAD_DIM)
    centre = Centring(HALVES, 2).of(keys_of(mean, 400))
    torch.testing.assert_close(centre.mean[0, :, 0], mean, atol=0.03, rtol=0)
    left = centre.more(centre.less(keys_of(mean))) - centre.at(torch.arange(TOKENS))
    assert left.std() < 0.2 < keys_of(mean).std()


def test_places_beside_the_positions_turn_the_mean_and_nothing_else():
    """Rows that are padded on the left have their tokens at other places than positions."""
    padding = 7
    keys = keys_of(torch.randn(HEADS, HEAD_DIM), TOKENS, noise=0.0)
    padded = torch.cat([torch.zeros(2, HEADS, padding, HEAD_DIM), keys], 2)
    left = Centring(HALVES, 2).of(padded).less(padded)
    # What float16 rounds of a mean of this size is left.
    assert left[:, :, padding:].abs().max() < 2e-3


def test_empty_tokens_and_those_that_are_not_finite_are_no_part_of_the_mean():
    keys = keys_of(torch.randn(HEADS, HEAD_DIM))
    expected = Centring(HALVES, 2).of(keys).mean
    longer = torch.cat([keys, torch.zeros(2, HEADS, 9, HEAD_DIM), torch.full((2, HEADS, 1, HEAD_DIM), math.nan)], 2)
    torch.testing.assert_close(Centring(HALVES, 2).of(longer).mean, expected)
    longer[0, 0, 3, 5] = math.inf
    assert Centring(HALVES, 2).of(longer).mean.isfinite().all()
    huge = Centring(HALVES, 2).of(1e7 * keys)
    assert huge.vectors.isfinite().all()
    torch.testing.assert_close(huge.more(huge.less(1e7 * keys)), 1e7 * keys)


def test_what_is_kept_as_it_is_is_no_part_of_the_mean():
    keys = keys_of(torch.randn(HEADS, HEAD_DIM), noise=0.0)
    expected = Centring(HALVES, 2).of(keys).mean
    keys[:, :, :3] = 1000
    torch.testing.assert_close(Centring(HALVES, 2, sinks=3).of(keys).mean, expected)
    assert not Centring(HALVES, 2, sinks=TOKENS - FEWEST + 1).of(keys).mean.any()


def test_channels_are_balanced_between_keys_and_queries():
    sizes = torch.tensor([1.0, 2, 4, 1, 2, 0.5, 1, 1])
    keys = torch.randn(2, HEADS, 4000, HEAD_DIM) * sizes
    turns, slots, squares = tables(still(HEAD_DIM), CPU), torch.arange(4000), (1 / sizes**2).expand(2, HEADS, 1, -1)
    for known, power in ((None, 1 / 4), (squares, 1)):
        balance = learned(keys, slots, *turns, None, known, 2)[:, :, 1].float()
        expected = sizes**power / sizes.log().mean().mul(power).exp()
        torch.testing.assert_close(balance, expected.expand_as(balance), atol=0, rtol=0.03)
    wide = learned(keys * torch.tensor([1e20] + 7 * [1e-9]), slots, *turns, None, None, 2)[:, :, 1]
    assert wide.isfinite().all() and wide.max() <= 8.001 and wide.min() >= 1 / 8.001


def test_of_few_tokens_nothing_is_learned_but_what_weights_say():
    keys, given = torch.randn(2, HEADS, FEWEST - 1, HEAD_DIM), torch.randn(HEADS, HEAD_DIM)
    assert not Centring(HALVES, 2).of(keys).mean.any()
    torch.testing.assert_close(Centring(HALVES, 2, given).of(keys).mean[1, :, 0], given.half().float())
    again = learned(keys, torch.arange(FEWEST - 1), *tables(HALVES, CPU), given.unsqueeze(1), None, 2)
    torch.testing.assert_close(again, Centring(HALVES, 2, given).of(keys).vectors)


@pytest.mark.parametrize("rotation", [HALVES, still(HEAD_DIM)])
def test_scores_are_those_of_what_was_taken_off(rotation):
    q, mean = torch.randn(2, QUERIES, 3, HEAD_DIM), torch.randn(2, HEADS, 1, HEAD_DIM)
    turns, planes = tables(rotation, CPU), planes_of(rotation, CPU)
    mean = mean.half().float()
    rows = waved(q, torch.cat([mean, mean + 1], 2).half(), *planes, 0.3)
    found = reference.shifted(rows, waves(TOKENS, turns[0], planes[0]), None)
    taken = turned(mean, torch.arange(TOKENS), *turns, 2).expand(-1, -1, TOKENS, -1)
    expected = 0.3 * q @ taken.repeat_interleave(QUERIES // HEADS, 1).mT
    torch.testing.assert_close(found, expected)


def test_a_mask_hides_what_it_hid():
    given = torch.randn(2, QUERIES, 3, 5), torch.randn(TOKENS, 4)
    bias, kept = reference.shifted(*given, None), torch.rand(2, 1, 3, TOKENS) > 0.5
    assert torch.equal(reference.shifted(*given, kept).isfinite(), kept.expand_as(bias))
    torch.testing.assert_close(reference.shifted(*given, bias), 2 * bias)


def test_attention_over_centred_keys_with_their_scores_is_attention_over_the_keys():
    from tqcompile import formats

    identity = formats.codec("identity")
    keys, values = keys_of(10 * torch.randn(HEADS, HEAD_DIM)), torch.randn(2, HEADS, TOKENS, HEAD_DIM)
    q, kept = torch.randn(2, QUERIES, 3, HEAD_DIM), torch.rand(2, 1, 3, TOKENS) > 0.3
    centre, planes = Centring(HALVES, 2).of(keys), planes_of(HALVES, CPU)
    table = waves(TOKENS, tables(HALVES, CPU)[0], planes[0])
    mask = reference.shifted(waved(q, centre.vectors, *planes, 0.3), table, kept)
    others = False, 0.3, identity, identity, (HEAD_DIM, HEAD_DIM)
    ours = reference.attend(weighed(q, centre.vectors), (centre.less(keys),), (values,), mask, *others)
    torch.testing.assert_close(ours, reference.attend(q, (keys,), (values,), kept, *others), atol=1e-4, rtol=1e-4)
