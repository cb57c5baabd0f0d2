"""Prints the reading helpers of codecs of several terms, or of codes that stand for several coordinates.

A token is one scalar, the largest of its scales, and a vector of numbers. A coordinate's number is the product of the
factors of its term, each looked up by the code of that coordinate, or by the state that it and its neighbours make: one
helper gathers the codes of one plane.
"""

import torch

from tqcompile.codec import STATE_BITS, Codec, Lookup
from tqcompile.kernels.address import DEVICE_TYPE, code_lines, power_of_two
from tqcompile.layout import Layout, layout_of
from tqcompile.tables import table_offsets
from tqcompile.trellis import window

SIGNATURE = "(codes, codes_stride, scale, scale_stride, table, token, valid, BLOCK_D: tl.constexpr)"


def helpers(side: str, codec: Codec, head_dim: int) -> tuple[str, ...]:
    """`<side>_scalars`, `<side>_numbers`, and what these call."""
    layout = layout_of(codec, head_dim, torch.float32, DEVICE_TYPE)
    planes = [factor.plane.name for factor in codec.factors if factor.store == "codes"]
    gathers = [_gather(side, name, layout) for name in planes]
    states = [_states(side, factor, layout) for factor in codec.factors if factor.table == "trellis"]
    return _scalars(side, layout), _numbers(side, codec, head_dim, layout), *states, *gathers


def scalar_lines(side: str, width: int) -> list[str]:
    """`<side>_scalars` of tokens that have `width` scales each."""
    inside = "valid[:, None]" if width == power_of_two(width) else f"valid[:, None] & (block < {width})"
    return [
        f"@triton.jit\ndef {side}_scalars{SIGNATURE}:",
        f"    block = tl.arange(0, {power_of_two(width)})[None, :]",
        f"    inside = {inside}",
        "    scales = tl.load(scale + token[:, None] * scale_stride + block, mask=inside, other=0.0).to(tl.float32)",
        "    # A scale that is not finite must not reach the other blocks of its token.",
        "    largest = maximum_of(tl.where(tl.abs(scales) <= 65504.0, tl.abs(scales), 0.0), 1)",
        "    return tl.where(largest > 0.0, largest, 1.0)",
    ]


def _scalars(side: str, layout: Layout) -> str:
    return "\n".join(scalar_lines(side, next(store.width for store in layout.stores if store.name == "scale")))


def _gather(side: str, name: str, layout: Layout) -> str:
    lines = [f"@triton.jit\ndef {side}_{name}(row, d, inside):", *code_lines(layout.plane(name), "    ")]
    return "\n".join([*lines, "    return code"])


def _states(side: str, factor: Lookup, layout: Layout) -> str:
    """`<side>_<plane>_state`: the codes from coordinate `d` on, one behind the other, the first next to the last."""
    name, bits, count = factor.plane.name, factor.plane.bits, layout.plane(factor.plane.name).count
    lines = [
        f"@triton.jit\ndef {side}_{name}_state(row, d, inside):",
        f"    state = {side}_{name}(row, d, inside)",
        f"    for ahead in tl.static_range(1, {window(bits)}):",
        "        at = d + ahead",
        f"        at = tl.where(at < {count}, at, at - {count})",
        f"        state = (state << {bits}) | {side}_{name}(row, at, inside)",
        f"    return state & {2**STATE_BITS - 1}",
    ]
    return "\n".join(lines)


def _numbers(side: str, codec: Codec, head_dim: int, layout: Layout) -> str:
    lines = [
        f"@triton.jit\ndef {side}_numbers{SIGNATURE}:",
        "    place = tl.arange(0, BLOCK_D)[None, :]",
        "    row = codes + token[:, None] * codes_stride",
        "    scales = scale + token[:, None] * scale_stride",
        f"    scalars = {side}_scalars(codes, codes_stride, scale, scale_stride, table, token, valid, BLOCK_D)",
        "    shrink = (1.0 / scalars)[:, None]",
    ]
    for index, (term, band) in enumerate(zip(codec.terms, codec.bands(head_dim))):
        count = band.stop - band.start
        lines += [
            f"    d = place - {band.start}" if band.start else "    d = place",
            f"    inside = valid[:, None] & (d >= 0) & (d < {count})",
        ]
        product = [_number(side, factor, codec, head_dim, layout) for factor in term.factors]
        lines.append(f"    number = {' * '.join(product)}")
        lines.append(
            "    numbers = tl.where(inside, number, 0.0)"
            if index == 0
            else "    numbers = tl.where(inside, number, numbers)"
        )
    return "\n".join([*lines, "    return numbers"])


def _number(side: str, factor: Lookup, codec: Codec, head_dim: int, layout: Layout) -> str:
    """The expression of one factor at coordinate `d` of its term."""
    plane, per = layout.plane(factor.plane.name), factor.plane.per
    if factor.store == "scale":
        at = "scales" + (f" + {plane.offset}" if plane.offset else "") + (f" + d // {per}" if per else "")
        # One address for all coordinates still wants the shape of a tile.
        mask = "inside" if per else "valid[:, None]"
        return f"(tl.load({at}, mask={mask}, other=0.0).to(tl.float32) * shrink)"
    code = f"{side}_{factor.plane.name}(row, {'d' if per == 1 else f'd // {per}'}, inside)"
    if factor.table == "signed":
        half = 2 ** (factor.plane.bits - 1)
        return f"(({code} ^ {half}) - {half}).to(tl.float32)"
    if factor.table == "sign":
        return f"(2 * {code} - 1).to(tl.float32)"
    start = table_offsets(codec, head_dim)[factor.plane.name]
    if factor.table == "trellis":
        return f"tl.load(table + {start} + {side}_{factor.plane.name}_state(row, d, inside), mask=inside, other=0.0)"
    if factor.table == "angle":
        return f"tl.load(table + {start} + 2 * {code} + d // {per // 2} % 2, mask=inside, other=0.0)"
    return f"tl.load(table + {start} + {code}, mask=inside, other=0.0)"
