"""Prints the helper that encodes a tile of tokens and writes it, one function for each way to fit a codec."""

from collections.abc import Sequence

import torch

from tqcompile import tables
from tqcompile.codec import Codec, Lookup, Term
from tqcompile.kernels.address import DEVICE_TYPE, power_of_two
from tqcompile.layout import PlaneLayout, Section, layout_of

# Bits up to which codes, and centroids, are found by comparing with all edges; of more, in memory.
MOST_COMPARED_BITS = 5
MOST_CHOSEN_BITS = 4
WRITE_SIGNATURE = (
    "@triton.jit\n"
    "def {name}(y, y_stride, codes, scale, edges, table, valid, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):"
)


# The scalar of a normalised vector: what leaves inner products unbiased, or the norm.
SCALARS = {
    "sphere": """\
    centroid = {centroid}
    fitted = sum_of(tl.where(inside, unit * centroid, 0.0), 1)
    scalar = tl.div_rn(peak * size_divisor * {root}, tl.where(usable, fitted, 1.0))""",
    "norm": """\
    scalar = tl.div_rn(peak * size_divisor, {root})""",
}


def piece_of(section: Section) -> str:
    """A section's bits of `code`."""
    return f"tl.where(inside, (code >> {section.shift}) & {2**section.bits - 1}, 0)"


def piece_line(section: Section) -> str:
    """The line that takes a section's bits out of `code` and puts them into a field of `byte`."""
    return f"        byte |= {piece_of(section)} << (field * {section.bits})"


def exact_writer(codec: Codec, head_dim: int) -> str:
    """`write_tokens` of a codec that stores the numbers themselves."""
    return "\n".join(
        [
            WRITE_SIGNATURE,
            "    d = tl.arange(0, BLOCK_D)[None, :]",
            f"    inside = valid[:, None] & (d < {head_dim})",
            "    number = tl.load(y[:, None] + d * y_stride, mask=inside, other=0.0)",
            "    tl.store(codes[:, None] + d, number.to(codes.dtype.element_ty), mask=inside)",
        ]
    )


def sphere_writer(codec: Codec, head_dim: int) -> str:
    """`write_tokens` of a codec whose terms take the nearest centroids of normalised vectors."""
    layout, lines, codes = layout_of(codec, head_dim, torch.float32, DEVICE_TYPE), [WRITE_SIGNATURE], []
    for place, (term, band) in enumerate(zip(codec.terms, codec.bands(head_dim))):
        suffix = f"_{place}" if len(codec.terms) > 1 else ""
        codes += [*look_up_lines(term, band.stop - band.start, suffix), "", ""]
        start, plane = tables.table_offsets(codec, head_dim)[term.codes.plane.name], layout.plane(term.codes.plane.name)
        fine = _common_runs(plane)
        tile = _runs(1, plane.count, "d", "inside") if fine is None else _runs(fine.fields, fine.run, "d", "inside")
        lines += [*tile, *_sphere_lines(term, plane, band.start, suffix, start)]
        lines.append(f"    tl.store({_after(place, 'scale')}, scalar, mask=valid)")
        for section in plane.sections:
            lines += _packed_section(section, fine) if fine else _sphere_section(section, band, suffix)
    return "\n".join([*codes, *lines])


def _common_runs(plane: PlaneLayout) -> Section | None:
    """The section whose bytes hold the most pieces, where each run of another is several of its runs, or None."""
    fine = min(plane.sections, key=lambda section: section.bits)
    alike = all(section.fields * section.run == fine.fields * fine.run for section in plane.sections)
    return fine if alike else None


def _peak_lines(indent: str, axis: int) -> list[str]:
    """The largest magnitude along an axis, or what is no number where one is: as integers those are the largest."""
    return [
        f"{indent}peak = maximum_of(tl.abs(number).to(tl.int32, bitcast=True), {axis})",
        f"{indent}peak = peak.to(tl.float32, bitcast=True)",
    ]


def _sphere_lines(term: Term, plane: PlaneLayout, first: int, suffix: str, start: int) -> list[str]:
    """Codes and scalar of a term whose coordinates begin at `first`, and whose centroids at `start` of the table."""
    root = repr(float(plane.count) ** 0.5)
    centroid = f"tl.load(table + {_after(start, 'code')})"
    if term.codes.plane.bits <= MOST_CHOSEN_BITS:
        centroid = f"{{name}}_centroid{suffix}(unit)"
    return [
        f"    inside = valid[:, None] & inside & (d < {plane.count})",
        f"    number = tl.load(y[:, None] + {_after(first, 'd')} * y_stride, mask=inside, other=0.0).to(tl.float32)",
        *_peak_lines("    ", 1),
        '    usable = (peak > 0.0) & (peak < float("inf"))',
        "    divisor = tl.where(usable, peak, 1.0)",
        "    shape = tl.where(usable[:, None], tl.div_rn(number, divisor[:, None]), 0.0)",
        "    size = tl.sqrt_rn(sum_of(shape * shape, 1))",
        "    size_divisor = tl.where(size > 0.0, size, 1.0)",
        f"    unit = tl.div_rn(shape, size_divisor[:, None]) * {root}",
        f"    code = {{name}}_code{suffix}(unit, edges)",
        *SCALARS[term.fit].format(root=root, centroid=centroid).splitlines(),
        "    scalar = tl.where(peak == 0.0, 0.0, scalar).to(tl.float16)",
    ]


def _runs(count: int, run: int, name: str, there: str) -> list[str]:
    """`name`, places of so many runs one behind the other, and which of them are `there`: a tile pads each run."""
    extent = power_of_two(run)
    lines = [f"    place = tl.arange(0, {count * extent})[None, :]"]
    if count == 1 or extent == run:
        return [*lines, f"    {name}, {there} = place, place < {count * run}"]
    return [*lines, f"    {name}, {there} = place // {extent} * {run} + place % {extent}, place % {extent} < {run}"]


def _after(start: int, name: str) -> str:
    return f"({start} + {name})" if start else name


def look_up_lines(term: Term, coordinates: int, suffix: str) -> list[str]:
    """Functions of a number in units of its codebook: its code, by comparing with few edges or searching many in
    memory, and its centroid where few are chosen from."""
    codes, of_code, of_centroid = term.codes, f"{{name}}_code{suffix}(unit, edges)", f"{{name}}_centroid{suffix}(unit)"
    if codes.plane.bits > MOST_COMPARED_BITS:
        return ["@triton.jit", f"def {of_code}:", f"    return nearest(unit, edges, {codes.plane.bits})"]
    centroids = [float(number) for number in torch.tensor(tables.numbers(codes, coordinates), dtype=torch.float32)]
    lines = _chosen_lines(of_code, codes, coordinates, range(len(centroids)), "int32")
    if term.fit == "norm" or codes.plane.bits > MOST_CHOSEN_BITS:
        return lines
    return [*lines, "", "", *_chosen_lines(of_centroid, codes, coordinates, centroids, "float32")]


def _chosen_lines(signature: str, codes: Lookup, coordinates: int, choices: Sequence, dtype: str) -> list[str]:
    """A function that takes one of `choices` by how many edges of a codebook lie under `unit`."""
    first, *others = choices
    lines = ["@triton.jit", f"def {signature}:", f"    chosen = tl.full(unit.shape, {first!r}, tl.{dtype})"]
    for edge, choice in zip(tables.boundaries(tables.numbers(codes, coordinates)), others):
        lines.append(f"    chosen = tl.where(unit > {edge!r}, {choice!r}, chosen)")
    return [*lines, "    return chosen"]


def _packed_section(section: Section, fine: Section) -> list[str]:
    """Bytes of a section, of codes in a tile of the runs of the `fine` one."""
    runs = fine.fields // section.fields
    return [
        f"    piece = {piece_of(section)}",
        f"    piece = tl.reshape(piece, [BLOCK_T, {section.fields}, {runs * power_of_two(fine.run)}])",
        f"    piece = piece << (tl.arange(0, {section.fields})[None, :, None] * {section.bits})",
        *_runs(runs, fine.run, "j", "there"),
        f"    rows = codes[:, None] + {section.offset}",
        "    tl.store(rows + j, sum_of(piece, 1).to(tl.uint8), mask=valid[:, None] & there)",
    ]


def _sphere_section(section: Section, band: slice, suffix: str) -> list[str]:
    """Bytes of a section whose codes are in no tile of runs.

    A byte holds pieces of several coordinates: each is read and quantised again where its byte is built, which is
    the same arithmetic and so the same code, and needs no exchange between threads.
    """
    extent, count, near = power_of_two(section.run), band.stop - band.start, _after(band.start, "d")
    return [
        f"    j = tl.arange(0, {extent})[None, :]",
        f"    byte = tl.full([BLOCK_T, {extent}], 0, tl.int32)",
        f"    for field in tl.static_range({section.fields}):",
        f"        d = field * {section.run} + j",
        f"        inside = valid[:, None] & (j < {section.run}) & (d < {count})",
        f"        number = tl.load(y[:, None] + {near} * y_stride, mask=inside, other=0.0).to(tl.float32)",
        "        shape = tl.where(usable[:, None], tl.div_rn(number, divisor[:, None]), 0.0)",
        f"        unit = tl.div_rn(shape, size_divisor[:, None]) * {float(count) ** 0.5!r}",
        f"        code = {{name}}_code{suffix}(unit, edges)",
        piece_line(section),
        f"    inside = valid[:, None] & (j < {section.run})",
        f"    tl.store(codes[:, None] + {section.offset} + j, byte.to(tl.uint8), mask=inside)",
    ]


def block_writer(codec: Codec, head_dim: int) -> str:
    """`write_tokens` of a codec that scales blocks.

    Raises:
        ValueError: a byte would hold pieces of two blocks that no tile of whole blocks covers.
    """
    if not writes(codec, head_dim):
        raise ValueError(f"{codec.name} at head_dim {head_dim}: bytes cross blocks, which no kernel writes")
    layout = layout_of(codec, head_dim, torch.float32, DEVICE_TYPE).plane(codec.codes.plane.name)
    lines = [WRITE_SIGNATURE]
    for position, section in enumerate(layout.sections):
        lines += _block_section(codec, section, head_dim, with_scales=position == 0)
    return "\n".join(lines)


def _code_of_block(codec: Codec) -> list[str]:
    low = 2 ** (codec.codes.plane.bits - 1)
    if codec.terms[0].fit == "absmax":
        return [
            f"        scalar = tl.div_rn(peak, {float(low - 1)}).to(tl.float16)",
            f"        code = rounded(number, scalar.to(tl.float32)[:, :, None], {float(low - 1)})",
        ]
    return [
        "        most, least = maximum_of(number, 2), -maximum_of(-number, 2)",
        f"        step = tl.div_rn(tl.where(most > -least, most, least), {float(-low)})",
        '        step = tl.where(peak == peak, step, float("nan"))',
        f"        code = lowered(number, step[:, :, None], {low})",
        "        scalar = step.to(tl.float16)",
    ]


def _block_section(codec: Codec, section: Section, head_dim: int, with_scales: bool) -> list[str]:
    block = codec.scale.plane.per
    blocks = power_of_two(-(-section.run // block))
    lines = [
        f"    b = tl.arange(0, {blocks})",
        f"    j = b[None, :, None] * {block} + tl.arange(0, {block})[None, None, :]",
        f"    byte = tl.full([BLOCK_T, {blocks}, {block}], 0, tl.int32)",
        f"    for field in tl.static_range({section.fields}):",
        f"        d = field * {section.run} + j",
        f"        inside = valid[:, None, None] & (j < {section.run}) & (d < {head_dim})",
        "        number = tl.load(y[:, None, None] + d * y_stride, mask=inside, other=0.0).to(tl.float32)",
        *_peak_lines("        ", 2),
        *_code_of_block(codec),
        piece_line(section),
    ]
    if with_scales:
        lines += [
            f"        place = field * {section.run // block} + b",
            f"        inside = (b * {block} < {section.run}) & (place < {codec.scale.plane.count(head_dim)})",
            "        tl.store(scale[:, None] + place[None, :], scalar, mask=valid[:, None] & inside[None, :])",
        ]
    return [
        *lines,
        f"    inside = valid[:, None, None] & (j < {section.run})",
        f"    tl.store(codes[:, None, None] + {section.offset} + j, byte.to(tl.uint8), mask=inside)",
    ]


_WRITERS = {
    "exact": exact_writer,
    "absmax": block_writer,
    "extreme": block_writer,
    "sphere": sphere_writer,
    "norm": sphere_writer,
}


def writes(codec: Codec, head_dim: int) -> bool:
    """Whether there is a kernel that writes tokens of a codec."""
    if len(codec.terms) > 1:
        whole = sum(term.share for term in codec.terms) == 1 and head_dim >= codec.minimum_head_dim
        return whole and all(_shares_out(term) for term in codec.terms)
    if not codec.is_plain or codec.scale is None or codec.scale.plane.per is None:
        return codec.is_plain
    layout = layout_of(codec, head_dim, torch.float32, DEVICE_TYPE).plane(codec.codes.plane.name)
    return not any(section.fields > 1 and section.run % codec.scale.plane.per for section in layout.sections)


def _shares_out(term: Term) -> bool:
    """Whether a term is written by itself, of coordinates that no other has."""
    return term.share < 1 and term.fit in ("sphere", "norm") and term.codes.plane.bits <= MOST_COMPARED_BITS


def writer(codec: Codec, head_dim: int, name: str = "write_tokens") -> str:
    """The helper of a codec, under a name."""
    return _WRITERS[codec.terms[0].fit](codec, head_dim).replace("{name}", name)
