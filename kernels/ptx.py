"""Prints the PTX that turns packed codes into int8 numbers, four to a register: `prmt` is a look-up of four bytes.

Each of the four nibbles in the low half of a selector picks one of eight bytes by its low three bits. Its top bit is
a flag that replaces the byte by its sign, 0 or -1. Codes of two and three bits need one look-up. Codes of four bits
are the sum of two: with a_l + b_l = number(l), a_l - 1 = number(l + 8) and b_l < 0, one look-up gives a and the
flagged one b or -1. Nothing adds them here: both go to the matrix unit, whose sums are exact.
"""

from collections.abc import Sequence

TABLE_WORDS = 4
# lop3 truth tables are the function of 0xF0, 0xCC, 0xAA: here `c ? a : b`, and `(a & b) | c`.
SELECT = "0xe4"
AND_OR = "0xea"


def table_words(numbers: Sequence[int]) -> tuple[int, ...]:
    """The look-up operands of ascending int8 numbers, 4, 8 or 16 of them: four signed 32-bit words."""
    numbers = list(numbers)
    if len(numbers) == 16:
        first = [number + 1 for number in numbers[8:]]
        second = [low - high for low, high in zip(numbers, first)]
        assert all(-128 <= number < 0 for number in second), f"{numbers} are further apart than a byte"
        numbers = first + second
    assert all(-128 <= number < 128 for number in numbers), f"{numbers} are no bytes"
    parts = [bytes(number & 255 for number in numbers[at : at + 4]) for at in range(0, len(numbers), 4)]
    words = [int.from_bytes(part, "little", signed=True) for part in parts]
    return tuple((words * TABLE_WORDS)[:TABLE_WORDS])


class Block:
    """Instructions of one inline block: outputs and inputs by number, temporaries named as they come."""

    def __init__(self, outputs: int, inputs: int):
        self.outputs, self.inputs, self.lines, self.temporaries = outputs, inputs, [], 0

    def input(self, place: int) -> str:
        return f"${self.outputs + place}"

    def table(self, place: int) -> str:
        return f"${self.outputs + self.inputs + place}"

    def put(self, target: str | int, operation: str, *operands: str | int) -> str:
        """Append one instruction that writes an output, by its number, or a register."""
        target = f"${target}" if isinstance(target, int) else target
        self.lines.append(f"{operation}.b32 {target}, {', '.join(map(str, operands))};")
        return target

    def new(self, operation: str, *operands: str | int) -> str:
        self.temporaries += 1
        return self.put(f"t{self.temporaries}", operation, *operands)

    def text(self) -> str:
        names = ", ".join(f"t{place + 1}" for place in range(self.temporaries))
        return "\n".join(["{", f".reg .b32 {names};", *self.lines, "}"])

    def constraints(self) -> str:
        return ",".join(["=&r"] * self.outputs + ["r"] * (self.inputs + TABLE_WORDS))


def look_up(block: Block, bits: int, word: str, outputs: Sequence[tuple[int, ...]]) -> None:
    """Eight nibbles of `word` -> four bytes of the low ones, four of the high ones, into each half's outputs."""
    index = block.new("and", word, "0x77777777") if bits == 4 else word
    for half, targets in enumerate(outputs):
        low = block.new("shr", index, 16) if half else index
        block.put(targets[0], "prmt", block.table(0), block.table(1 if bits > 2 else 0), low)
        if bits == 4:
            flagged = block.new("shr", word, 16) if half else word
            block.put(targets[1], "prmt", block.table(2), block.table(3), flagged)


def nibbles(block: Block, bits: int, field: int, word: str, high: str | None) -> str:
    """One nibble for each code of `field` (the low or the high pair of bits) of a word's nibbles.

    The third bit comes from `high`, where that of field 0 lies lowest in each nibble and that of field 1 two above.
    """
    if bits == 4:
        return word
    low = block.new("shr", word, 2) if field else word
    if bits == 2:
        return block.new("and", low, "0x33333333")
    top = block.new("and", high if field else block.new("shl", high, 2), "0x44444444")
    return block.new("lop3", low, "0x33333333", top, AND_OR)


def transposed(block: Block, words: Sequence[str]) -> dict[tuple[int, int], str]:
    """Four tokens' words of eight nibbles -> {(nibble, nibble): word with both nibbles of all four tokens}."""
    pairs = []
    for first, second in (words[:2], words[2:]):
        even = block.new("lop3", block.new("shl", second, 4), first, "0xf0f0f0f0", SELECT)
        odd = block.new("lop3", second, block.new("shr", first, 4), "0xf0f0f0f0", SELECT)
        pairs.append((even, odd))
    return {
        (nibble, nibble + 2): block.new(
            "prmt", *(pair[nibble % 2] for pair in pairs), "0x7362" if nibble > 1 else "0x5140"
        )
        for nibble in (0, 1, 4, 5)
    }


def key_look_up(bits: int, fields: int) -> Block:
    """A word of codes [, a word of top bits] -> for each field or term, low nibbles and high nibbles as bytes.

    Outputs: at four bits (term 0 low, high, term 1 low, high); below (field 0 low, high, [field 1 low, high]).
    """
    block = Block(4 if bits == 4 else 2 * fields, 2 if bits == 3 else 1)
    for field in range(fields):
        word = nibbles(block, bits, field, block.input(0), block.input(1) if bits == 3 else None)
        look_up(block, bits, word, [(2 * field, 2), (2 * field + 1, 3)])
    return block


def value_look_up(bits: int, fields: int) -> Block:
    """Four tokens' words [, and words of top bits] -> for each of eight nibbles, four tokens as bytes.

    Outputs: eight of term 0, then at four bits eight of term 1; below eight of each field.
    """
    block = Block(16 if bits == 4 else 8 * fields, 8 if bits == 3 else 4)
    words, high = ([block.input(start + token) for token in range(4)] for start in (0, 4))
    shared = None if bits == 3 else transposed(block, words)
    for field in range(fields):
        own = shared or transposed(block, [nibbles(block, 3, field, *pair) for pair in zip(words, high)])
        for places, word in own.items():
            word = word if bits == 3 else nibbles(block, bits, field, word, None)
            look_up(block, bits, word, [(8 * field + place, 8 + place) for place in places])
    return block
