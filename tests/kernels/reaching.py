"""Caches of which a mask shows a part: what it hides holds numbers that would be seen in a result."""

import math

import torch
from cases import compressed

from tqcompile import formats, reference, tables
from tqcompile.passes import rewrite

SPANS = [[(0, 40), (150, 299)], [(7, 8), (299, 300)], [(130, 131), (64, 192)], [(0, 300), (0, 1)], [(0, 1), (40, 90)]]


def first_of(spans, count, length):
    """Which tokens are of the first `count` of a span, bool [2, 1, 1, length]."""
    token = torch.arange(length)
    return torch.stack([(token >= first) & (token < min(stop, first + count)) for first, stop in spans])[:, None, None]


def lie_of(mask):
    """A mask of a kind that hides all tokens, where one that changes nothing was promised."""
    return torch.zeros_like(mask) if mask.dtype == torch.bool else torch.full_like(mask, -math.inf)


def hidden_case(name, spans, kind, device, length=300, clear=0, growing=False):
    """q, planes with nothing but NaN out of reach, mask, and what attention over the rest gives [2, 6, 2, 64].

    The mask changes nothing of the first `clear` tokens of a span, and hides each of the others from one query.
    """
    torch.manual_seed(4)
    codec, token = formats.codec(name), torch.arange(length)
    shown = torch.stack([(token >= first) & (token < stop) for first, stop in spans])[:, None, None]
    caches = [torch.randn(2, 2, length, 64) for _ in range(2)]
    q = torch.randn(2, 6, 2, 64).to(device)
    keep, plain = torch.rand(2, 1, 2, length) < 0.5, first_of(spans, clear, length)
    for row, (first, stop) in enumerate(spans):
        keep[row, ..., [first, stop - 1]] = True
    if clear:
        keep[:, :, 1] = ~keep[:, :, 0]
    keep = shown & (keep | plain)
    added = torch.where(plain, 0.0, 0.25)
    mask = (keep if kind == "bool" else torch.where(keep, added, torch.finfo(torch.float32).min)).to(device)
    planes = [compressed(codec, x.to(device), growing) for x in caches]
    arguments = (mask, False, 0.125, codec, codec, (64, 64))
    basis = tables.basis_matrix(codec, 64, device)
    expected = reference.rotate_back(reference.attend(q, *planes, *arguments), basis, torch.float32)
    broken = [torch.where(shown.view(2, 1, length, 1), x, math.nan).to(device) for x in caches]
    broken = [compressed(codec, x, growing) for x in broken]
    return q, broken, arguments, rewrite.reach(mask), basis, expected
