"""What centring adds to scores, by the kernel, is what PyTorch adds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attend import mask_of

from tqcompile import reference
from tqcompile.centre import halves, waves
from tqcompile.kernels import shift

MASKS = ("none", "bool", "float32", "bfloat16")


def close(found, waved, table, mask):
    """To the rounding of products of float32, and -inf in the same places."""
    expected = reference.shifted(waved.double(), table.double(), mask)
    assert found.dtype == torch.float32 and found.is_contiguous() and found.shape == expected.shape
    assert torch.equal(found.isinf(), expected.isinf())
    largest = waved.double().abs().sum(-1, keepdim=True) + (0 if mask is None or mask.dtype == torch.bool else 8)
    off = torch.where(expected.isinf(), 0.0, found.double() - expected)
    assert (off.abs() <= 1e-6 * largest).all()


@settings(max_examples=15)
@given(
    sizes=st.tuples(*(st.integers(0, 3),) * 3, st.integers(0, 200)),
    planes=st.integers(0, 33),
    mask=st.sampled_from(MASKS),
    size=st.sampled_from([0.0, 1e-30, 1.0, 3e4]),
    seed=st.integers(0, 99),
)
def test_it_adds_what_pytorch_adds(device, sizes, planes, mask, size, seed):
    torch.manual_seed(seed)
    *rows, length = sizes
    waved = size * torch.randn(*rows, 2 * planes + 1)
    table = waves(length, torch.logspace(0, -4, planes), torch.arange(planes))
    mask = mask_of(mask, (rows[0], 1, rows[2], length), "cpu") if waved.numel() else None
    on_device = None if mask is None else mask.to(device)
    close(shift.shifted(waved.to(device), halves(table).to(device), on_device).cpu(), waved, table, mask)


def test_rows_that_are_no_numbers_spoil_no_others(device):
    waved = torch.randn(1, 3, 1, 9)
    waved[0, 1, 0, 2], waved[0, 2, 0, 3] = float("nan"), float("inf")
    table = waves(70, torch.logspace(0, -4, 4), torch.arange(4))
    found = shift.shifted(waved.to(device), halves(table).to(device), None).cpu()
    close(found[:, :1], waved[:, :1], table, None)
    assert found[0, 1].isnan().all() and not found[0, 2].isfinite().any()


@pytest.mark.parametrize("heads", [1, 3])
def test_a_mask_of_each_head_and_query_is_that_of_no_other(device, heads):
    waved, table = torch.randn(2, 3, 4, 17), waves(65, torch.logspace(0, -3, 8), torch.arange(8))
    mask = torch.rand(2, heads, 4, 65) > 0.5
    close(shift.shifted(waved.to(device), halves(table).to(device), mask.to(device)).cpu(), waved, table, mask)
