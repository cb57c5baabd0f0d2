"""The expressions of `layout`, as text that Triton reads."""

import sympy
from sympy.printing.str import StrPrinter

from tqcompile.layout import PlaneLayout

# The bit order that these kernels read; `layout` owns it.
DEVICE_TYPE = "cuda"


class _Printer(StrPrinter):
    """Integer expressions as Triton writes them: `Mod` and `floor` of a quotient become `%` and `//`."""

    def _print_Mod(self, expr):
        return f"{self.parenthesize(expr.args[0], 50)} % {expr.args[1]}"

    def _print_floor(self, expr):
        numerator, denominator = expr.args[0].as_numer_denom()
        return f"({self.parenthesize(numerator, 50)} // {denominator})"


def expression(expr: sympy.Expr, count: int) -> str:
    """`expr` in the coordinate 0 <= d < count, as Triton text; wrap-arounds that `count` excludes are dropped."""

    def within(modulus):
        return modulus.is_Integer and modulus >= count

    expr = expr.replace(lambda e: isinstance(e, sympy.Mod) and within(e.args[1]), lambda e: e.args[0])
    expr = expr.replace(
        lambda e: isinstance(e, sympy.floor) and within(sympy.fraction(e.args[0])[1]), lambda e: sympy.Integer(0)
    )
    return _Printer().doprint(expr)


def code_lines(layout: PlaneLayout, indent: str) -> list[str]:
    """Lines that gather `code` [BLOCK_T, BLOCK_D] from the bytes at `row`, section by section."""
    lines = []
    for section in layout.sections:
        byte, bit = expression(section.byte, layout.count), expression(section.bit, layout.count)
        piece = f"tl.load(row + {byte}, mask=inside, other=0).to(tl.int32)"
        if section.fields > 1:
            piece = f"({piece} >> ({bit})) & {2**section.bits - 1}"
        if section.shift:
            piece = f"({piece}) << {section.shift}"
        lines.append(f"{indent}code = {piece}" if not lines else f"{indent}code |= {piece}")
    return lines


def power_of_two(count: int) -> int:
    """The least power of two that is not under `count`: the extent of a tile that covers it."""
    return 1 << (count - 1).bit_length()
