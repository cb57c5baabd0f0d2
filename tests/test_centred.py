"""Eager operators on a cache whose keys are centred: every number is what it was."""

import copy
import pickle

import pytest
import torch

from tqcompile import CompressedKV, formats
from tqcompile.centre import Centring, still
from tqcompile.centred import fitted, refit
from tqcompile.readonly import ReadOnly

from test_centre import HALVES, HEAD_DIM, HEADS, keys_of  # isort: skip

IDENTITY = formats.codec("identity")
TOKENS = 20
CENTRING = Centring(HALVES, 2)


def pair():
    """A centred cache and the dense one that it stands for."""
    dense = keys_of(3 * torch.randn(HEADS, HEAD_DIM), TOKENS)
    dense[1] *= 2
    cache = CompressedKV.encode(dense.clone(), IDENTITY, CENTRING)
    assert cache.centre.mean.norm() > 1 and not torch.allclose(cache.planes[0], dense, atol=0.1)
    return cache, dense


def assert_alike(ours, dense):
    ours = ours.decode() if isinstance(ours, CompressedKV) else ours
    torch.testing.assert_close(torch.as_tensor(ours.dense if isinstance(ours, ReadOnly) else ours), dense)


# Reads that stay on codes, and those that make dense numbers.
ON_CODES = {
    "crop": lambda x: x[..., :7, :],
    "beam reorder": lambda x: x.index_select(0, torch.tensor([1, 1, 0])),
    "an index of sequences": lambda x: x[torch.tensor([1, 0])],
    "one sequence": lambda x: x[:1],
    "some heads": lambda x: x[:, 1:],
    "sequences several times": lambda x: x.repeat(3, 1, 1, 1),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "a copy of its dtype": lambda x: x.to(torch.float32, copy=True),
    "tokens behind": lambda x: torch.cat([x, torch.ones(2, HEADS, 3, HEAD_DIM)], 2),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}
DECODED = {
    "the last tokens": lambda x: x[:, :, -5:],
    "every second token": lambda x: x[:, :, ::2],
    "tokens by an index": lambda x: x.index_select(2, torch.tensor([4, 2, 9])),
    "roll": lambda x: x.roll(1, 2),
    "transpose": lambda x: x.transpose(1, 2),
    "one token": lambda x: x[0, 1, 3],
    "sum": lambda x: x.sum(2),
    "arithmetic": lambda x: x * 2 + 1,
    "stack": lambda x: torch.stack([x, x]),
    "behind others": lambda x: torch.cat([torch.ones(2, HEADS, 3, HEAD_DIM), x], 2),
    "tolist": lambda x: torch.tensor(x.tolist()),
}


@pytest.mark.parametrize("name", [*ON_CODES, *DECODED])
def test_what_is_read_is_what_a_dense_cache_gives(name):
    cache, dense = pair()
    ours = (ON_CODES | DECODED)[name](cache)
    assert isinstance(ours, CompressedKV) == (name in ON_CODES)
    assert_alike(ours, (ON_CODES | DECODED)[name](dense))


def test_caches_beside_each_other_keep_their_own_centres():
    (first, one), (second, other) = pair(), pair()
    both = torch.cat([first, second], 0)
    assert isinstance(both, CompressedKV)
    assert_alike(both, torch.cat([one, other], 0))
    assert_alike(torch.cat([first, CompressedKV.encode(other, IDENTITY)], 0), torch.cat([one, other], 0))


WRITES = {
    "index_copy_": lambda x, new: x.index_copy_(2, torch.tensor([3, 11]), new[:, :, :2]),
    "index_copy_ of sequences": lambda x, new: x.index_copy_(0, torch.tensor([1]), new[:1]),
    "assignment": lambda x, new: x.__setitem__((slice(None), slice(None), torch.tensor([5, 2])), new[:, :, :2]),
    "a run": lambda x, new: x[:, :, :4].copy_(new[:, :, :4]),
    "copy_": lambda x, new: x.copy_(new),
    "copy_ of codes": lambda x, new: x.copy_(CompressedKV.encode(new, IDENTITY, CENTRING)),
    "zero_": lambda x, new: x.zero_(),
    "fill_": lambda x, new: x.fill_(0.5),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_read_again(name):
    cache, dense = pair()
    new = torch.randn(2, HEADS, TOKENS, HEAD_DIM)
    WRITES[name](cache, new), WRITES[name](dense, new)
    assert_alike(cache, dense)


def test_a_write_that_codes_cannot_follow_is_refused():
    cache, _ = pair()
    with pytest.raises(RuntimeError, match="write whole tokens"):
        cache.mul_(2)


@pytest.mark.parametrize("centring", [None, CENTRING, Centring(still(HEAD_DIM), 2)])
def test_a_cache_is_made_to_fit_a_graph_that_centres_otherwise(centring):
    cache, dense = pair()
    made = fitted(cache, centring)
    assert (made is cache) == (centring is CENTRING)
    assert (made.centre is None) if centring is None else made.centre.fits(centring)
    assert_alike(made, dense)
    assert refit(cache, centring) is None
    assert (cache.centre is None) if centring is None else cache.centre.fits(centring)
    assert_alike(cache, dense)


def test_a_cache_that_others_show_is_not_made_to_fit():
    cache, dense = pair()
    shown = cache[:1]
    assert "others show it" in refit(cache, None)
    assert_alike(cache, dense), assert_alike(shown, dense[:1])


def test_a_plain_cache_gets_a_centre_that_takes_nothing_off():
    dense = torch.randn(2, HEADS, TOKENS, HEAD_DIM)
    made = fitted(CompressedKV.encode(dense, IDENTITY), CENTRING)
    assert made.centre.fits(CENTRING) and not made.centre.mean.any()
    assert_alike(made, dense)


def test_bytes_count_the_centre():
    cache, dense = pair()
    assert cache.nbytes == dense.nbytes + cache.centre.vectors.nbytes
