"""The kernel that searches a trellis finds the paths that PyTorch finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqcompile import coding, formats, tables, trellis
from tqcompile.kernels import path

BITS = st.sampled_from([2, 3, 4])


def numbers_of(bits, device="cpu"):
    return torch.tensor(tables.trellis(bits), dtype=torch.float32, device=device)


def costs(x, codes, bits):
    """How far rows are from the numbers of a path, squared."""
    return (x - numbers_of(bits, x.device)[trellis.states(codes, bits)]).square().sum(-1)


@settings(max_examples=12)
@given(data=st.data())
def test_a_path_is_that_of_pytorch(device, data):
    bits, width, rows = (
        data.draw(BITS),
        data.draw(st.sampled_from([64, 72, 80, 127, 128])),
        data.draw(st.integers(0, 4)),
    )
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    expected = trellis.path(x, numbers_of(bits), bits)
    found = path.search(x.to(device), numbers_of(bits, device), bits)
    assert found.shape == x.shape and found.dtype == torch.uint8
    if device == "cpu":
        assert torch.equal(found, expected)
    # A GPU fuses squares and sums: of two paths as near as that, either will do.
    assert torch.allclose(costs(x, found.cpu(), bits), costs(x, expected, bits), rtol=1e-5)


def test_rows_that_are_searched_apart_are_rows_that_are_searched_at_once(device, monkeypatch):
    x, numbers = torch.randn(2, 3, 64, device=device), numbers_of(3, device)
    expected = path.search(x, numbers, 3)
    monkeypatch.setattr(path, "CHOICES_BYTES", 2 * 64 << 7)
    assert torch.equal(path.search(x.transpose(0, 1), numbers, 3), expected.transpose(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, codec in formats.REGISTRY.items() if codec.is_sequential])
def test_a_gpu_encodes_as_well_as_a_cpu(name):
    codec, x = formats.codec(name), torch.randn(200, 128)
    assert "cuda" in trellis.SEARCHES

    def error(y):
        decoded = coding.decode(codec, coding.encode(codec, y), 128)
        return ((decoded - y).square().sum(-1) / y.square().sum(-1)).mean().item()

    assert error(x.cuda()) == pytest.approx(error(x), rel=1e-4)
