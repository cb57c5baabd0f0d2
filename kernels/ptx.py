"""Prints the PTX that turns packed codes into int8 numbers, four to a register: `prmt` is a look-up of four bytes.

Each of the four nibbles in the low half of a selector picks one of eight bytes by its low three bits. Its top bit is
a flag that replaces the byte by its sign, 0 or -1. Codes of one to three bits need one look-up. The number of a wider
code is a sum of look-ups, which nothing adds here: each goes to the matrix unit, whose sums are exact.

Four bits, l the low three and f the top one: a(l) + (-1 if f else b(l)), where b(l) < 0.
Five bits, h the fifth: the same of magnitudes that ascend, and (-1 if h else c(y)), which takes a magnitude to the
number on the other side of zero; y is l, or 7 - l where f is set, because the codebook is odd.
"""

from collections.abc import Sequence

TABLE_WORDS = 6
# lop3 truth tables are the function of 0xF0, 0xCC, 0xAA.
SELECT = "0xe4"  # c ? a : b
AND_OR = "0xea"  # (a & b) | c
XOR_AND = "0x28"  # (a ^ b) & c
OR_AND = "0xf8"  # a | (b & c)


def has_high(bits: int) -> bool:
    """Whether a code of so many bits has its top bit apart from the nibble."""
    return bits in (3, 5)


def terms_of(bits: int) -> int:
    """Look-ups that the number of a code is the sum of."""
    return max(1, bits - 2)


def table_words(numbers: Sequence[int]) -> tuple[int, ...]:
    """The look-up operands of ascending numbers, 2, 4, 8, 16 or 32 of them: six signed 32-bit words of bytes."""
    numbers = list(numbers)
    if len(numbers) == 32:
        magnitudes = numbers[16:]
        across = [-1 - low - high for low, high in zip(magnitudes[:8], reversed(magnitudes))]
        numbers = [*_flagged([magnitude + 1 for magnitude in magnitudes]), *across]
    elif len(numbers) == 16:
        numbers = _flagged(numbers)
    assert all(-128 <= number < 128 for number in numbers), f"{numbers} are no bytes"
    return tuple((words_of(bytes(number & 255 for number in numbers)) * TABLE_WORDS)[:TABLE_WORDS])


def words_of(data: bytes) -> list[int]:
    """Bytes as signed 32-bit words, the lowest first."""
    return [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]


def _flagged(numbers: Sequence[int]) -> list[int]:
    """a and b of sixteen numbers."""
    first = [number + 1 for number in numbers[8:]]
    second = [low - high for low, high in zip(numbers, first)]
    assert all(-128 <= number < 0 for number in second), f"{numbers} are further apart than a byte"
    return first + second


class Block:
    """Instructions of one inline block: outputs and inputs by number, temporaries named as they come."""

    def __init__(self, outputs: int, inputs: int, tables: int = TABLE_WORDS):
        self.outputs, self.inputs, self.tables, self.lines, self.temporaries = outputs, inputs, tables, [], 0

    def input(self, place: int) -> str:
        return f"${self.outputs + place}"

    def table(self, place: int) -> str:
        return f"${self.outputs + self.inputs + place}"

    def put(self, target: str | int, operation: str, *operands: str | int) -> str:
        """Append one instruction that writes an output, by its number, or a register."""
        target = f"${target}" if isinstance(target, int) else target
        kind = "" if "." in operation else ".b32"
        self.lines.append(f"{operation}{kind} {target}, {', '.join(map(str, operands))};")
        return target

    def new(self, operation: str, *operands: str | int) -> str:
        self.temporaries += 1
        return self.put(f"t{self.temporaries}", operation, *operands)

    def text(self) -> str:
        names = ", ".join(f"t{place + 1}" for place in range(self.temporaries))
        return "\n".join(["{", f".reg .b32 {names};", *self.lines, "}"])

    def constraints(self) -> str:
        return ",".join(["=&r"] * self.outputs + ["r"] * (self.inputs + self.tables))


def look_up(block: Block, bits: int, word: str, high: str | None, outputs: Sequence[Sequence[int]]) -> None:
    """Eight nibbles of `word` -> four bytes of the low ones, four of the high ones, into each half's outputs.

    `high` has the fifth bits at the lowest place of each nibble.
    """
    index = block.new("and", word, "0x77777777") if bits > 3 else word
    selectors = [index, word]
    if bits == 5:
        upper = block.new("mul.lo.u32", block.new("and", block.new("shr", word, 3), "0x11111111"), 7)
        folded = block.new("lop3", word, upper, "0x77777777", XOR_AND)
        selectors.append(block.new("lop3", folded, block.new("shl", high, 3), "0x88888888", OR_AND))
    for half, targets in enumerate(outputs):
        for term, target in enumerate(targets[: terms_of(bits)]):
            selector = block.new("shr", selectors[term], 16) if half else selectors[term]
            tables = (block.table(2 * term), block.table(2 * term + (bits > 2)))
            block.put(target, "prmt", *tables, selector)


def nibbles(block: Block, bits: int, field: int, word: str, high: str | None) -> str:
    """One nibble for each code of `field` (the low or the high pair of bits, or one of four) of a word's nibbles.

    The third bit comes from `high`, where that of field 0 lies lowest in each nibble and that of field 1 two above.
    """
    if bits > 3:
        return word
    low = block.new("shr", word, min(bits, 2) * field) if field else word
    if bits < 3:
        return block.new("and", low, "0x33333333" if bits == 2 else "0x11111111")
    top = block.new("and", high if field else block.new("shl", high, 2), "0x44444444")
    return block.new("lop3", low, "0x33333333", top, AND_OR)


def transposed(block: Block, words: Sequence[str], count: int) -> dict[tuple[int, int], str]:
    """Four tokens' words of eight nibbles, of which the lowest `count` are wanted -> {(nibble, nibble): word with both
    nibbles of all four tokens}."""
    pairs = []
    for first, second in (words[:2], words[2:]):
        even = block.new("lop3", block.new("shl", second, 4), first, "0xf0f0f0f0", SELECT)
        odd = block.new("lop3", second, block.new("shr", first, 4), "0xf0f0f0f0", SELECT)
        pairs.append((even, odd))
    return {
        (nibble, nibble + 2): block.new(
            "prmt", *(pair[nibble % 2] for pair in pairs), "0x7362" if nibble > 1 else "0x5140"
        )
        for nibble in (0, 1, 4, 5)[: count // 2]
    }


def key_look_up(bits: int, fields: int) -> Block:
    """A word of codes [, a word of top bits] -> for each field or term, low nibbles and high nibbles as bytes.

    Outputs: (field or term 0 low, high, field or term 1 low, high ...).
    """
    terms, odd = terms_of(bits), has_high(bits)
    block = Block(2 * terms * fields, 1 + odd)
    word, high = block.input(0), block.input(1) if odd else None
    for field in range(fields):
        outputs = [[2 * (field + term) + half for term in range(terms)] for half in range(2)]
        look_up(block, bits, nibbles(block, bits, field, word, high), high, outputs)
    return block


def value_look_up(bits: int, fields: int, count: int = 8) -> Block:
    """Four tokens' words [, and words of top bits] -> for each of the lowest `count` nibbles, four tokens as bytes.

    Outputs: `count` of each field or term.
    """
    terms, odd = terms_of(bits), has_high(bits)
    block = Block(count * terms * fields, 4 + 4 * odd)
    words, high = ([block.input(start + token) for token in range(4)] for start in (0, 4))
    shared = None if bits == 3 else transposed(block, words, count)
    fifth = transposed(block, high, count) if bits == 5 else None
    for field in range(fields):
        own = shared or transposed(block, [nibbles(block, 3, field, *pair) for pair in zip(words, high)], count)
        for pair, word in own.items():
            word = word if bits == 3 else nibbles(block, bits, field, word, None)
            outputs = [[count * (field + term) + nibble for term in range(terms)] for nibble in pair]
            look_up(block, bits, word, fifth and fifth[pair], outputs)
    return block
