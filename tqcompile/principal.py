"""The principal components of what a head keeps: a basis per sequence and head, from its first tokens.

KVTC (arXiv 2511.01815) finds it in a calibration run over all layers and heads; here the first tokens of a cache are
that run, head by head, so that scores need no other heads. The basis P [D, D] lies behind mean and balance in
`centre.Centre.vectors`, as D more tokens of it. Keys are stored as P x and queries multiply them as P q, so that their
product stays; values are stored as P v, and the weighted sum of them is turned back.
"""

import torch

from tqcompile import tables

BASIS_SEED = 2511_01815
# Rows of `Centre.vectors` in front of the basis: the mean, and the balance.
BEFORE = 2

_library = torch.library.Library("tqcompile", "FRAGMENT")
# What decomposes on the host is no part of a CUDA graph.
_library.define("principal_axes(Tensor moments, Tensor known) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
principal_axes = torch.ops.tqcompile.principal_axes.default


def _principal_axes(moments: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    size = moments.shape[-1]
    fallback = tables.rotation(size, BASIS_SEED).to(moments.device)
    trace = moments.diagonal(dim1=-2, dim2=-1).sum(-1)
    sound = known & moments.isfinite().all(-1).all(-1) & (trace > 0)
    safe = torch.where(
        sound[..., None, None], moments / trace.clamp(min=1e-30)[..., None, None], torch.eye(size).to(moments)
    )
    # Of these, eigenvalues ascend along the columns.
    axes = torch.linalg.eigh(safe)[1].mT.flip(-2)
    return torch.where(sound[..., None, None], axes, fallback).contiguous()


_library.impl("principal_axes", _principal_axes, "CompositeExplicitAutograd")


@torch.library.register_fake("tqcompile::principal_axes", lib=_library)
def _(moments, known):
    return torch.empty_like(moments, memory_format=torch.contiguous_format)


def learned(tokens: torch.Tensor, enough: torch.Tensor, dim: int) -> torch.Tensor:
    """The principal axes of tokens [..., D] that lie along `dim`, in place of the tokens: D of them, float32.

    `tokens` are float32, zero where nothing was seen. Where not `enough`, as wide as one token, was, the axes are a
    random rotation, in which no coordinate is worth more than another; so they are where the moments are not finite.
    """
    rows = tokens.movedim(dim, -2)
    peak = rows.abs().amax((-2, -1), keepdim=True)
    rows = torch.where(peak > 0, rows / peak, 0.0)
    known = enough.movedim(dim, -2).all(-1).all(-1)
    return principal_axes(rows.mT @ rows, known).movedim(-2, dim)


def has_basis(vectors: torch.Tensor, dim: int) -> bool:
    """Whether a basis lies behind the mean and the balance."""
    return vectors.shape[dim] > BEFORE


def into(x: torch.Tensor, vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """Tokens [..., D] that lie along `dim`, float32, in the basis of `vectors`; as they are where that has none."""
    return _turned(x, vectors, dim, False)


def out_of(y: torch.Tensor, vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `into`."""
    return _turned(y, vectors, dim, True)


def _turned(x: torch.Tensor, vectors: torch.Tensor, dim: int, back: bool) -> torch.Tensor:
    if not has_basis(vectors, dim):
        return x
    basis = vectors.narrow(dim, BEFORE, vectors.shape[dim] - BEFORE).movedim(dim, -2)
    return turned(x.movedim(dim, -2), basis, back).movedim(-2, dim)


def turned(rows: torch.Tensor, basis: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Rows [..., T, D] times the transpose of a basis [..., D, D] that float16 rounded, or, `back`, times the basis.

    A rounded basis is orthogonal to 1e-3 alone. One step of Newton and Schulz, P (3 - P^T P) / 2, makes it so to 1e-6;
    it is done to rows, which a decode step has few of, and not to the basis.
    """
    first = basis.float() if back else basis.float().mT
    once = rows @ first
    return 1.5 * once - 0.5 * (once @ first.mT) @ first


def standard(token: torch.Tensor, dim: int) -> torch.Tensor:
    """The basis that tokens are in already, beside one token that has dimension `dim` for it."""
    size, leading = token.shape[-1], token.movedim(dim, -2).shape[:-2]
    return torch.eye(size, dtype=token.dtype, device=token.device).expand(*leading, size, size).movedim(-2, dim)


def weighed(q: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Queries [B, Hq, T, D] times the balance of `vectors` [B or 1, H, n, D], in their basis, in their own dtype."""
    heads = vectors.shape[1]
    grouped = q.float().unflatten(1, (heads, q.shape[1] // heads)) * vectors[:, :, 1:2].float().unsqueeze(2)
    grouped = turned(grouped, vectors[:, :, None, BEFORE:]) if has_basis(vectors, 2) else grouped
    return grouped.flatten(1, 2).to(q.dtype)


def mixed(out: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Weighted sums [B, Hq, T, D] of values in the basis of `vectors` [B or 1, H, n, D] as sums of the values
    themselves, in their dtype."""
    heads = vectors.shape[1]
    grouped = out.float().unflatten(1, (heads, out.shape[1] // heads))
    return turned(grouped, vectors[:, :, None, BEFORE:], back=True).flatten(1, 2).to(out.dtype)
