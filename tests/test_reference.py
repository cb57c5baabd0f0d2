"""Append and rotate, in plain torch, for every codec in the registry."""

import pytest
import torch
from vectors import EVERY_CODEC, normal, round_trip, rows

from tqcompile import coding, reference, tables
from tqcompile.layout import layout_of


def empty(codec, leading, head_dim):
    return layout_of(codec, head_dim, torch.float32, "cpu").allocate(leading, "cpu")


@EVERY_CODEC
def test_append_writes_the_given_positions_and_no_others(codec):
    planes = empty(codec, (2, 3, 9), 48)
    y = rows(codec, 2, 3, 4, 48)
    reference.append(codec, planes, y, torch.tensor([7, 0, 8, 3]))
    decoded = coding.decode(codec, planes, 48)
    assert torch.equal(decoded[:, :, [7, 0, 8, 3]], round_trip(codec, y))
    assert torch.equal(decoded[:, :, [1, 2, 4, 5, 6]], torch.zeros(2, 3, 5, codec.coordinates(48)))


@EVERY_CODEC
def test_append_replaces_what_a_position_held(codec):
    planes = empty(codec, (1, 1, 4), 48)
    for seed in (1, 2):
        reference.append(codec, planes, rows(codec, 1, 1, 1, 48, seed=seed), torch.tensor([2]))
    assert torch.equal(coding.decode(codec, planes, 48)[:, :, 2:3], round_trip(codec, rows(codec, 1, 1, 1, 48, seed=2)))


@EVERY_CODEC
def test_append_of_no_tokens_changes_nothing(codec):
    planes = empty(codec, (1, 2, 3), 48)
    reference.append(codec, planes, rows(codec, 1, 2, 0, 48), torch.empty(0, dtype=torch.int64))
    assert torch.equal(coding.decode(codec, planes, 48).float(), torch.zeros(1, 2, 3, codec.coordinates(48)))


@EVERY_CODEC
def test_append_without_positions_fills_and_equals_token_by_token(codec):
    y = rows(codec, 2, 2, 6, 48)
    at_once, in_turn = empty(codec, (2, 2, 6), 48), empty(codec, (2, 2, 6), 48)
    reference.append(codec, at_once, y, None)
    for token in range(6):
        reference.append(codec, in_turn, y[:, :, token : token + 1], torch.tensor([token]))
    assert torch.allclose(coding.decode(codec, at_once, 48), coding.decode(codec, in_turn, 48), rtol=1e-3)


@EVERY_CODEC
@pytest.mark.parametrize("position", [5, -1, 2**40])
def test_append_outside_the_planes_raises(codec, position):
    planes = empty(codec, (1, 1, 5), 48)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        reference.append(codec, planes, rows(codec, 1, 1, 1, 48), torch.tensor([position]))


@EVERY_CODEC
def test_append_writes_through_a_view_into_a_longer_buffer(codec):
    buffer = empty(codec, (1, 2, 10), 48)
    y = rows(codec, 1, 2, 3, 48)
    reference.append(codec, [plane.narrow(2, 4, 3) for plane in buffer], y, None)
    assert torch.equal(coding.decode(codec, buffer, 48)[:, :, 4:7], round_trip(codec, y))


@EVERY_CODEC
def test_rotating_there_and_back_leaves_a_vector_in_its_dtype(codec):
    x = normal(5, 80, dtype=torch.bfloat16)
    basis = tables.basis_matrix(codec, 80)
    if basis is not None and sum(term.share for term in codec.terms) > 1:
        # Coordinates of several bases are a sum of terms, of which a codec chooses one or more: no inverse.
        numbers = normal(5, codec.coordinates(80))
        back = reference.rotate_back(numbers, basis, x.dtype)
        terms = sum(numbers[:, band] @ basis[band] for band in codec.bands(80))
    else:
        # What no term takes, the last coordinates, is gone.
        kept = x.float() * (torch.arange(80) < codec.coordinates(80))
        back, terms = reference.rotate_back(reference.rotate(x, basis), basis, x.dtype), kept
    assert back.dtype == x.dtype
    assert torch.allclose(back.float(), terms, rtol=1e-2, atol=1e-3)
