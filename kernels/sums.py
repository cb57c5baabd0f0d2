"""What a program leaves of its split, for `combine`: parts of the skeletons in `fragment` and `ringed`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcompile.kernels.operands import doublings

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
VALUE_PARTS = VALUE_WIDTH = gl.constexpr(0)
# One number for each piece or block.
VALUE_DIMS = VALUE_UNIT = VALUE_AT = gl.constexpr(())


@gluon.constexpr_function
def sums_layout(dims, rows):
    """[rows, dims]: what a lane has of the sums of a row, four of them side by side (`Side.order`)."""
    registers = [[0, 1], [0, 2]] + [[0, at] for at in doublings(32, dims)] + [[at, 0] for at in doublings(4, rows)]
    return gl.DistributedLinearLayout(registers, [[1, 0], [2, 0], [0, 4], [0, 8], [0, 16]], [], [], [rows, dims])


@gluon.jit
def store_sums(out, peaks, totals, state, splits, rows, R: gl.constexpr):
    """Store what this split leaves of its rows: sums as lanes have them, peaks and totals."""
    peak, total, mixed = state
    row = gl.program_id(1) * R + gl.arange(0, R, peak.type.layout)
    place = (gl.program_id(0).to(gl.int64) * splits + gl.program_id(2)) * rows
    gl.store(peaks + place + row, peak, mask=row < rows)
    total = gl.sum(total, 0)
    row = gl.program_id(1) * R + gl.arange(0, R, total.type.layout)
    gl.store(totals + place + row, total, mask=row < rows)
    for part in gl.static_range(VALUE_PARTS):
        store_part(out + VALUE_AT[part], place, mixed[part], rows, VALUE_DIMS[part], VALUE_UNIT[part], R)


@gluon.jit
def store_part(out, place, sums, rows, DIMS: gl.constexpr, UNIT: gl.constexpr, R: gl.constexpr):
    """Store the sums [DIMS, R] of a piece or block, in units of UNIT."""
    LAYOUT: gl.constexpr = sums_layout(DIMS, R)
    row = gl.program_id(1) * R + gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
    number = gl.arange(0, DIMS, gl.SliceLayout(0, LAYOUT))
    sums = gl.permute(gl.reshape(sums, [DIMS // 32, 4, 8, R]), [3, 0, 2, 1])
    sums = gl.convert_layout(gl.reshape(sums, [R, DIMS]), LAYOUT)
    address = out + (place + row)[:, None] * VALUE_WIDTH + number[None, :]
    gl.store(address, sums * UNIT, mask=(row < rows)[:, None])


KERNELS = (sums_layout, store_sums, store_part)
