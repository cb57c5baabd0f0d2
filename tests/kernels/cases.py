"""What the tests of both kernels share: compressed caches in any memory order, and how far is too far."""

import torch

from tqcompile import reference, tables
from tqcompile.codec import Codec
from tqcompile.layout import layout_of

# Relative error of one product's roundings: float32 sums in another order, float16 and bfloat16 operands.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def numbers_of(codec: Codec, *shape: int) -> torch.Tensor:
    """Normal vectors of shape[-1] numbers in the codec's basis, [..., coordinates] float32."""
    return reference.rotate(torch.randn(shape), tables.basis_matrix(codec, shape[-1]))


def planes_of(codec: Codec, shape, dtype, device, growing: bool = False) -> tuple[torch.Tensor, ...]:
    """Zeroed planes [B, H, S, width] for vectors of shape[-1] numbers; `growing` is [S, B, H, width] in memory."""
    batch, heads, length, head_dim = shape
    layout = layout_of(codec, head_dim, dtype, torch.device(device).type)
    if not growing:
        return layout.allocate((batch, heads, length), device)
    return tuple(plane.permute(1, 2, 0, 3) for plane in layout.allocate((length, batch, heads), device))


def compressed(codec: Codec, x: torch.Tensor, growing: bool = False) -> tuple[torch.Tensor, ...]:
    """The planes of x [B, H, S, coordinates], as the reference encodes it."""
    planes = planes_of(codec, (*x.shape[:3], codec.head_dim(x.shape[3])), x.dtype, x.device, growing)
    reference.append(codec, planes, x, torch.arange(x.shape[2], device=x.device))
    return planes


def distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected|, in float64."""
    out, expected = out.double(), expected.double()
    return float((out - expected).norm() / expected.norm().clamp_min(1e-30))


def close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that non-finite places agree and that the rest is within the roundings of `dtype`."""
    assert out.shape == expected.shape and out.dtype == torch.float32
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite)
    error = distance(out[finite], expected[finite]) if finite.any() else 0.0
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e} in {dtype}"
