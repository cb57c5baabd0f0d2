"""A basis from the first tokens: orthogonal whatever they are, and what is turned into it comes back."""

import pytest
import torch
from vectors import normal

from tqcompile import CompressedKV, formats, principal, tables
from tqcompile.centre import Centring, still
from tqcompile.layout import layout_of

KVTC = [name for name, codec in formats.REGISTRY.items() if codec.principal]


def tokens_of(head_dim, tokens=120, dim=2, heads=2):
    """Tokens [2, H, T, D] of a steep spectrum in a random basis, with `dim` that of tokens."""
    x = normal(2, heads, tokens, head_dim) * torch.logspace(0.5, -1, head_dim)
    return (x @ tables.rotation(head_dim, 1)).transpose(2, dim)


def centre_of(x, dim=2):
    return Centring(still(x.shape[-1]), dim, principal=True).of(x)


def basis_of(centre):
    size = centre.vectors.shape[-1]
    return centre.vectors.narrow(centre.dim, principal.BEFORE, size).movedim(centre.dim, -2).float()


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("head_dim", [7, 48, 64, 80])
def test_what_is_turned_into_a_basis_comes_back(head_dim, dim):
    x = tokens_of(head_dim, dim=dim)
    centre = centre_of(x, dim)
    assert (centre.more(centre.less(x)) - x).abs().max() < 1e-5 * x.abs().max()


def test_coordinates_are_uncorrelated_and_the_largest_come_first():
    x = tokens_of(16)
    left = centre_of(x).less(x)
    moments = left.mT @ left / left.shape[2]
    variance = moments.diagonal(dim1=-2, dim2=-1)
    assert (variance.diff() < 1e-4 * variance[..., :1]).all()
    assert (moments - torch.diag_embed(variance)).abs().max() < 2e-3 * variance.max()


def test_scores_are_what_they_were():
    """Four heads of queries for two of keys."""
    x, q = tokens_of(48), normal(2, 4, 3, 48, seed=1)
    centre = centre_of(x)
    ours = principal.weighed(q, centre.vectors).unflatten(1, (2, 2)) @ centre.less(x).unsqueeze(2).mT
    theirs = q.unflatten(1, (2, 2)) @ (x - centre.mean).unsqueeze(2).mT
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_axes_do_not_depend_on_how_large_tokens_are_and_are_a_rotation_where_one_is_no_number():
    x = tokens_of(16)
    enough = torch.ones(2, 2, 1, 1, dtype=torch.bool)
    expected = principal.learned(x, enough, 2)
    torch.testing.assert_close(principal.learned(x * 2.0**100, enough, 2), expected)
    x[1, 0, 3, 5] = float("inf")
    found = principal.learned(x, enough, 2)
    assert torch.equal(found[1, 0], tables.rotation(16, principal.BASIS_SEED))
    torch.testing.assert_close(found[0], expected[0])


ODD = {
    "one token": lambda x: x[:, :, :1],
    "zeros": torch.zeros_like,
    "fewer than channels": lambda x: x[:, :, :20],
    "one direction": lambda x: x[..., :1] * torch.ones(x.shape[-1]),
    "huge": lambda x: x * 1e30,
    "NaN in one": lambda x: x.index_fill(2, torch.tensor([3]), float("nan")),
    "infinity in one": lambda x: x.index_fill(2, torch.tensor([3]), float("inf")),
}


@pytest.mark.parametrize("name", ODD)
def test_a_basis_is_orthogonal_whatever_the_tokens_are(name):
    basis = basis_of(centre_of(ODD[name](tokens_of(48))))
    torch.testing.assert_close(basis @ basis.mT, torch.eye(48).expand_as(basis), atol=2e-3, rtol=0)


def test_a_few_tokens_get_a_rotation_that_prefers_no_channel():
    found = basis_of(centre_of(tokens_of(48)[:, :, :5]))
    torch.testing.assert_close(found, tables.rotation(48, principal.BASIS_SEED).half().float().expand_as(found))


@pytest.mark.parametrize("name", KVTC)
@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_codes_of_a_steep_spectrum_err_less_than_those_of_as_many_bits_that_know_no_basis(name, head_dim):
    x, codec = tokens_of(head_dim, 400), formats.codec(name)
    centring = Centring(still(head_dim), 2, principal=True, plain=True)
    errors = [
        (CompressedKV.encode(x, codec, how).decode() - x).square().sum() / x.square().sum() for how in (centring, None)
    ]
    # Without a basis the last bands hold as much as the first.
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("name", KVTC)
def test_bits_at_128_are_those_of_the_name(name):
    layout = layout_of(formats.codec(name), 128, torch.float16, "cpu")
    assert layout.bits_per_element <= float(name.split(":")[1])


def test_weighted_sums_are_turned_back():
    x, weights = tokens_of(48), normal(2, 4, 3, 120, seed=2).softmax(-1)
    centre = Centring(still(48), 2, principal=True, plain=True).of(x)
    assert not centre.mean.any() and (centre.balance == 1).all()
    sums = (weights.unflatten(1, (2, 2)) @ centre.less(x).unsqueeze(2)).flatten(1, 2)
    theirs = (weights.unflatten(1, (2, 2)) @ x.unsqueeze(2)).flatten(1, 2)
    torch.testing.assert_close(principal.mixed(sums, centre.vectors), theirs, atol=1e-4, rtol=1e-4)


WRITES = {
    "index_copy_": lambda x, new: x.index_copy_(2, torch.tensor([3, 11]), new[:, :, :2]),
    "assignment": lambda x, new: x.__setitem__((slice(None), slice(None), torch.tensor([5, 2])), new[:, :, :2]),
    "copy_": lambda x, new: x.copy_(new),
    "a run": lambda x, new: x[:, :, :4].copy_(new[:, :, :4]),
    "zero_": lambda x, new: x.zero_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_eager_code_writes_is_read_again(name):
    dense, new = tokens_of(48), tokens_of(48).flip(2)
    cache = CompressedKV.encode(dense.clone(), formats.codec("identity"), Centring(still(48), 2, principal=True))
    WRITES[name](cache, new), WRITES[name](dense, new)
    torch.testing.assert_close(cache.decode(), dense, atol=1e-4, rtol=1e-4)
