"""Encode and decode rows of numbers for any codec, in plain PyTorch: what every kernel is held to.

Rows are in the codec's own basis, `Codec.coordinates` numbers of a vector of head_dim.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch

from tqcompile import tables, trellis
from tqcompile.codec import Codec, Lookup, Term
from tqcompile.layout import Layout, PlaneLayout, layout_of

Planes = Sequence[torch.Tensor]


def encode(codec: Codec, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y [..., coordinates] in the codec's basis -> its planes [..., width], in the order of `codec.stores`.

    A token that holds NaN or Inf, or whose scale is beyond float16, gets a non-finite scale: it decodes to
    non-finite numbers, and no other token's codes depend on it.
    """
    if codec.is_exact:
        return (y,)
    head_dim = codec.head_dim(y.shape[-1])
    layout, bands = layout_of(codec, head_dim, torch.float32, y.device.type), codec.bands(head_dim)
    stored: dict[str, list[torch.Tensor]] = {name: [] for name in codec.stores}
    made: list[torch.Tensor] = []
    for place, (term, band) in enumerate(zip(codec.terms, bands)):
        left, size = y[..., band].float(), None
        if band.start and term.share >= 1:
            size = _size(y[..., bands[0]].float() - made[0])
            for earlier, numbers in enumerate(made):
                seen = tables.overlap(codec, head_dim, earlier, place)
                left = left - numbers @ torch.tensor(seen, dtype=torch.float32, device=y.device)
        codes = _FITS[term.fit](term, left, head_dim, size)
        if len(codec.terms) > 1 and place < len(codec.terms) - 1:
            made.append(_product(term, codes, band.stop - band.start))
        for factor, code in zip(term.factors, codes):
            packed = code if factor.store == "scale" else layout.plane(factor.plane.name).pack(code)
            stored[factor.store].append(packed)
    return tuple(parts[0] if len(parts) == 1 else torch.cat(parts, -1) for parts in stored.values())


def _size(y: torch.Tensor) -> torch.Tensor:
    """The norm of rows [..., n], [..., 1], without the square of a large number; NaN and Inf stay what they are."""
    peak = y.abs().amax(-1, keepdim=True)
    shape = torch.where(peak > 0, y / peak, 0.0)
    return peak * (shape * shape).sum(-1, keepdim=True).sqrt()


def _fit_absmax(term: Term, y: torch.Tensor, head_dim: int, size: torch.Tensor | None) -> Planes:
    limit = 2 ** (term.codes.plane.bits - 1) - 1
    scales, codes = [], []
    # Blocks one by one, not padded and folded: Inductor miscompiles the ragged last block of the folded form.
    for part in y.split(term.scale.plane.per, -1):
        scale = (part.abs().amax(-1, keepdim=True) / limit).half()
        step = scale.float()
        codes.append(torch.where(step > 0, part / step, 0.0).round().nan_to_num(0.0).clamp(-limit, limit))
        scales.append(scale)
    return torch.cat(scales, -1), torch.cat(codes, -1).to(torch.int32)


def _fit_extreme(term: Term, y: torch.Tensor, head_dim: int, size: torch.Tensor | None) -> Planes:
    low = 2 ** (term.codes.plane.bits - 1)
    scales, codes = [], []
    for part in y.split(term.scale.plane.per, -1):
        most, least = part.amax(-1, keepdim=True), part.amin(-1, keepdim=True)
        step = torch.where(most > -least, most, least) / -low
        # By the reciprocal, as llama.cpp does: a number halfway between two codes goes where it goes there.
        code = (part * torch.where(step == 0, 0.0, 1 / step) + (low + 0.5)).nan_to_num(0.0).clamp(0, 2 * low - 1)
        codes.append(code.to(torch.int32) - low)
        scales.append(step.half())
    return torch.cat(scales, -1), torch.cat(codes, -1)


def _fit_sphere(term: Term, y: torch.Tensor, head_dim: int, size: torch.Tensor | None) -> Planes:
    peak, size, unit = _on_sphere(y)
    codes, numbers = _nearest(term.codes, unit)
    return _unbiased(peak, size, unit, numbers, tables.unit(term.codes, y.shape[-1])), codes


def _fit_path(term: Term, y: torch.Tensor, head_dim: int, size: torch.Tensor | None) -> Planes:
    peak, size, unit = _on_sphere(y)
    numbers, bits = path_numbers(term.codes, y.device), term.codes.plane.bits
    codes = trellis.path(unit, numbers, bits)
    return _unbiased(peak, size, unit, numbers[trellis.states(codes, bits)], 1.0), codes


@cache
def path_numbers(factor: Lookup, device: torch.device) -> torch.Tensor:
    """The numbers of a trellis, kept on `device`: a CUDA graph that encodes captures no copy from the host."""
    return _table(factor, 0, device)


def prepare(codec: Codec, device: torch.device) -> None:
    """Put on `device` what encoding reads there, where that is no part of a graph."""
    for term in codec.terms:
        if term.fit == "path":
            path_numbers(term.codes, device)


def _unbiased(peak: torch.Tensor, size: torch.Tensor, unit: torch.Tensor, numbers: torch.Tensor, step: float):
    """|x|^2 / <x, c>, x = peak * size / sqrt(n) * unit, c = step * numbers: no square of a large norm is formed."""
    fitted = (unit * numbers).sum(-1, keepdim=True) * step
    scale = peak * torch.where(size > 0, size, 1.0) * math.sqrt(unit.shape[-1]) / fitted
    return torch.where(peak == 0, 0.0, scale).half()


def _fit_norm(term: Term, y: torch.Tensor, head_dim: int, size: torch.Tensor | None) -> Planes:
    peak, size, unit = _on_sphere(y)
    return (peak * torch.where(size > 0, size, 1.0) / math.sqrt(y.shape[-1])).half(), _nearest(term.codes, unit)[0]


def _on_sphere(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as peak * size / sqrt(n) * unit, with unit on the sphere of radius sqrt(n)."""
    peak = y.abs().amax(-1, keepdim=True)
    shape = torch.where(peak > 0, y / peak, 0.0)
    size = (shape * shape).sum(-1, keepdim=True).sqrt()
    return peak, size, torch.where(size > 0, shape / size, 0.0) * math.sqrt(y.shape[-1])


def _nearest(factor: Lookup, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest entries of a codebook, and their numbers in units of `tables.unit`."""
    coordinates = unit.shape[-1]
    edges = tables.boundaries(tables.numbers(factor, coordinates))
    codes = torch.bucketize(unit, torch.tensor(edges, dtype=torch.float32, device=unit.device))
    return codes, lookup(factor, codes, coordinates)


def _fit_sign(term: Term, y: torch.Tensor, head_dim: int, size: torch.Tensor | None) -> Planes:
    # Rows of orthonormal matrices keep the norm, once each.
    size = _size(y) / math.sqrt(term.share) if size is None else size
    gain = tables.sign_gain(term.basis, y.shape[-1], head_dim)
    return (size * gain).half(), (y >= 0).to(torch.int32)


def _fit_polar(term: Term, y: torch.Tensor, head_dim: int, size: torch.Tensor | None) -> Planes:
    peak = y.abs().amax(-1, keepdim=True)
    radius = torch.where(peak > 0, y / peak, 0.0)
    radius = torch.nn.functional.pad(radius, (0, -y.shape[-1] % term.scale.plane.per))
    found = []
    for factor in sorted((f for f in term.factors if f.table == "angle"), key=lambda f: f.plane.per):
        level = factor.plane.per.bit_length() - 1
        first, second = radius[..., ::2], radius[..., 1::2]
        angle, radius = torch.atan2(second, first), torch.hypot(first, second)
        angle = torch.where(angle < 0, angle + 2 * math.pi, angle)
        edges = tables.boundaries(tables.angles(level, factor.plane.bits))
        code = torch.bucketize(angle, torch.tensor(edges, dtype=torch.float32, device=y.device))
        found.append(code[..., : factor.plane.count(y.shape[-1])])
    return torch.where(peak == 0, 0.0, radius * peak).half(), *found


_FITS: dict[str, Callable[..., Planes]] = {
    "absmax": _fit_absmax,
    "extreme": _fit_extreme,
    "sphere": _fit_sphere,
    "norm": _fit_norm,
    "path": _fit_path,
    "sign": _fit_sign,
    "polar": _fit_polar,
}


def lookup(factor: Lookup, codes: torch.Tensor, coordinates: int) -> torch.Tensor:
    """Codes [...] -> numbers [...], float32, in units of `tables.unit`; angles -> cosine and sine [..., 2].

    Codes of a trellis are those of all coordinates of a term.
    """
    if factor.table == "trellis":
        codes = trellis.states(codes, factor.plane.bits)
    if factor.table == "signed":
        limit = 2 ** (factor.plane.bits - 1)
        return ((codes ^ limit) - limit).float()
    if factor.table == "sign":
        return (2 * codes - 1).float()
    coefficients = tables.polynomial(factor, coordinates) if factor.table == "codebook" else None
    if coefficients is None:
        table = _table(factor, coordinates, codes.device)
        return table.view(-1, 2)[codes] if factor.table == "angle" else table[codes]
    size = tables.unit(factor, coordinates)
    x = codes.float() - (2**factor.plane.bits - 1) / 2
    square, number = x * x, coefficients[-1] / size
    for coefficient in reversed(coefficients[:-1]):
        number = number * square + coefficient / size
    return number * x if tables.integers(factor, coordinates) is None else (number * x).round()


def _table(factor: Lookup, coordinates: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(tables.numbers(factor, coordinates), dtype=torch.float32, device=device)


def decode(codec: Codec, planes: Planes, head_dim: int) -> torch.Tensor:
    """Planes [..., width] -> numbers [..., coordinates] in the codec's basis, float32 (`exact`: its own dtype)."""
    if codec.is_exact:
        return planes[0]
    return torch.cat([numbers for _, numbers in pieces(codec, planes, head_dim)], -1)


def pieces(
    codec: Codec, planes: Planes, head_dim: int, runs: Callable = PlaneLayout.pieces
) -> list[tuple[slice, torch.Tensor]]:
    """What `decode` makes, as runs of neighbouring coordinates: (coordinates, float32 [..., run])."""
    stored, found = dict(zip(codec.stores, planes)), []
    layout = layout_of(codec, head_dim, torch.float32, planes[0].device.type)
    for term, band in zip(codec.terms, codec.bands(head_dim)):
        if term.is_plain:
            parts = _plain_pieces(term, layout, stored, band.stop - band.start, runs)
        else:
            codes = [_codes_of(factor, layout, stored) for factor in term.factors]
            parts = [(slice(0, band.stop - band.start), _product(term, codes, band.stop - band.start))]
        found += [(slice(part.start + band.start, part.stop + band.start), numbers) for part, numbers in parts]
    return found


def _scales(factor: Lookup, layout: Layout, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    plane = layout.plane(factor.plane.name)
    return stored["scale"][..., plane.offset : plane.offset + plane.width]


def _codes_of(factor: Lookup, layout: Layout, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    if factor.store == "scale":
        return _scales(factor, layout, stored)
    plane = layout.plane(factor.plane.name)
    if factor.table == "trellis":
        # They are read again as neighbours of others: as bytes, which Inductor keeps in memory for that.
        return torch.cat([codes.to(torch.uint8) for _, codes in plane.pieces(stored["codes"])], -1)
    return plane.unpack(stored["codes"])


def _plain_pieces(term: Term, layout: Layout, stored: dict, coordinates: int, runs: Callable) -> list:
    codes, block = layout.plane(term.codes.plane.name), term.scale.plane.per or coordinates
    scale = _scales(term.scale, layout, stored).float() * tables.unit(term.codes, coordinates)
    found = []
    for run, code in runs(codes, stored["codes"]):
        number = lookup(term.codes, code, coordinates)
        edges = [run.start, *range(-(-(run.start + 1) // block) * block, run.stop, block)]
        for start, stop in zip(edges, [*edges[1:], run.stop]):
            part = number[..., start - run.start : stop - run.start]
            found.append((slice(start, stop), part * scale[..., start // block : start // block + 1]))
    return found


def _product(term: Term, codes: Planes, coordinates: int) -> torch.Tensor:
    """The numbers [..., coordinates] of a term: each factor's, spread over the coordinates that it stands for."""
    total = None
    for factor, code in zip(term.factors, codes):
        each = factor.plane.per or coordinates
        numbers = code.float() if factor.store == "scale" else lookup(factor, code, coordinates)
        if factor.table == "angle":
            numbers, each = numbers.flatten(-2), each // 2
        elif factor.table == "codebook":
            numbers = numbers * tables.unit(factor, coordinates)
        numbers = numbers.unsqueeze(-1).expand(*numbers.shape, each).flatten(-2)[..., :coordinates]
        total = numbers if total is None else total * numbers
    return total


def split(codec: Codec, planes: Planes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tensors of codes (or of numbers) and of scales out of a codec's planes; None where it has no scale."""
    if len(codec.stores) == 1:
        return planes[0], None
    return (planes[1], planes[0]) if codec.stores[0] == "scale" else (planes[0], planes[1])
