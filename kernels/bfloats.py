"""How packed codes become bfloat16, four warps or more at once: parts of the skeleton in `chunk`.

A number is an integer of the codebook, which bfloat16 holds exactly, looked up in registers by `prmt`, its two bytes
apart. Of codes of four bits and five the magnitude is looked up and its sign put before it, so that their codebook must
be odd: numbers[~code] is -numbers[code].
"""

from collections.abc import Sequence

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcompile.kernels import ptx
from tqcompile.kernels.operands import load_words, row_of

# lop3 truth tables are the function of 0xF0, 0xCC, 0xAA.
XNOR_AND = "0x82"  # ~(a ^ b) & c
# Bytes that a nibble of 0 or 1 picks: a sign for 0, all ones for 1. In registers, as the tables are: the
# compiler would put a constant there each time.
SIGN, UPPER = 0x80, 0xFF00


@gluon.constexpr_function
def near_words(words):
    """Words of a row that a lane reads at once: up to sixteen bytes."""
    return min(4, words)


@gluon.constexpr_function
def codes_layout(words, warps):
    """[tokens, groups, near words]."""
    near = near_words(words)
    groups = words // near
    return gl.BlockedLayout([1, 1, near], [32 // groups, groups, 1], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def load_codes(
    codes, last, T: gl.constexpr, STRIDE: gl.constexpr, RUN: gl.constexpr, HIGH_RUN: gl.constexpr, WORDS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Words of a tile, and words of top bits as `ptx.nibbles` takes them; tokens after `last` repeat it."""
    LAYOUT: gl.constexpr = codes_layout(WORDS, WARPS)
    NEAR: gl.constexpr = near_words(WORDS)
    token = gl.arange(0, T, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    group = gl.arange(0, WORDS // NEAR, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    word = group * NEAR + gl.arange(0, NEAR, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    row = row_of(codes, token, 0, last, STRIDE)
    return load_words(row, word, word * 0, RUN, HIGH_RUN, 4 * WORDS > RUN, False)


@gluon.jit
def table_beside(table, WORDS: gl.constexpr, WARPS: gl.constexpr, COUNT: gl.constexpr):
    """The look-up operands beside words of codes, in registers of every lane (`operands.table_like`)."""
    LAYOUT: gl.constexpr = codes_layout(WORDS, WARPS)
    NEAR: gl.constexpr = near_words(WORDS)
    group = gl.arange(0, WORDS // NEAR, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    found = ()
    for place in gl.static_range(COUNT):
        found = found + (gl.load(table + 32 * place + group),)
    return found


@gluon.jit
def run_of(first, second, T: gl.constexpr, RUN: gl.constexpr):
    """Words [.., near words] of two numbers each, the first and the second of four neighbours -> bfloat16 [T, RUN]."""
    x = gl.join(first, second)
    x = gl.join(x, x)
    x = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    return gl.reshape(x, [T, RUN])


@gluon.jit
def side_by_side(x, T: gl.constexpr, RUN: gl.constexpr, FIELDS: gl.constexpr):
    """What `look_up` finds as bfloat16 [T, 2 FIELDS RUN]: runs of low nibbles first, of each its fields."""
    if FIELDS == 1:
        low, high = run_of(x[0], x[1], T, RUN), run_of(x[2], x[3], T, RUN)
        return gl.reshape(gl.permute(gl.join(low, high), [0, 2, 1]), [T, 2 * RUN])
    else:
        low = side_by_side(x[: 2 * FIELDS], T, RUN, FIELDS // 2)
        high = side_by_side(x[2 * FIELDS :], T, RUN, FIELDS // 2)
        return gl.reshape(gl.permute(gl.join(low, high), [0, 2, 1]), [T, 2 * FIELDS * RUN])


KERNELS = (near_words, codes_layout, load_codes, table_beside, run_of, side_by_side)


def look_up(bits: int, fields: int) -> ptx.Block:
    """A word of codes [, a word of top bits] -> for each run of coordinates, low nibbles first, of each its fields: two
    words of two numbers.

    Outputs: (run 0 first, second, run 1 first, second ...). Inputs are followed by `table_words`.
    """
    block = ptx.Block(4 * fields, 1 + ptx.has_high(bits), table_count(bits))
    word, high = block.input(0), block.input(1) if ptx.has_high(bits) else None
    for field in range(fields):
        nibbles = ptx.nibbles(block, bits, field, word, high)
        for half, (low, top) in enumerate(_bytes(block, bits, nibbles, high)):
            for nibble, selector in enumerate(("0x6240", "0x7351")):
                block.put(2 * (fields * nibble + field) + half, "prmt", low, top, selector)
    return block


def _bytes(block: ptx.Block, bits: int, word: str, high: str | None):
    """For the lower four nibbles of a word, and for the upper: the low bytes of their numbers, and the high ones."""
    signs = flagged = None
    if bits > 3:
        signs = block.new("and", high if bits == 5 else block.new("shr", word, 3), "0x11111111")
        every = block.new("mul.lo.u32", signs, 15 if bits == 5 else 7)
        # The magnitudes of negative numbers descend.
        word = block.new("lop3", word, every, "0xffffffff" if bits == 5 else "0x77777777", XNOR_AND)
    if bits == 5:
        flagged = block.new("and", block.new("shr", word, 3), "0x11111111")
        word = block.new("and", word, "0x77777777")
    for half in range(2):
        selector, flag, sign = (x and (block.new("shr", x, 16) if half else x) for x in (word, flagged, signs))
        mask = block.new("prmt", block.table(9), 0, flag) if flag else None
        low, top = (_picked(block, place, selector, mask) for place in ((0, 4) if flag else (0, 2)))
        if sign:
            top = block.new("xor", top, block.new("prmt", block.table(8 if flag else 4), 0, sign))
        yield low, top


def _picked(block: ptx.Block, start: int, selector: str, mask: str | None) -> str:
    """Four bytes out of the eight of two table words, or sixteen of four, of which the mask takes the upper ones."""
    found = [
        block.new("prmt", block.table(start + at), block.table(start + at + 1), selector)
        for at in range(0, 4 if mask else 2, 2)
    ]
    return block.new("lop3", *reversed(found), mask, ptx.SELECT) if mask else found[0]


def table_words(numbers: Sequence[int]) -> tuple[int, ...]:
    """The look-up operands of ascending numbers, signed words: the low bytes of bfloat16, then the high ones."""
    magnitudes = numbers[len(numbers) // 2 :] if len(numbers) > 8 else numbers
    bits = torch.tensor(magnitudes, dtype=torch.bfloat16).view(torch.int16).tolist()
    bits = (bits * 8)[: max(8, len(bits))]
    words = ptx.words_of(bytes(each >> shift & 255 for shift in (0, 8) for each in bits))
    return (*words, *(SIGN, UPPER)[: max(0, len(numbers).bit_length() - 4)])


def table_count(bits: int) -> int:
    """How many look-up operands there are for codes of so many bits."""
    return {4: 5, 5: 10}.get(bits, 4)
