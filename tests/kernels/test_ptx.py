"""The printed look-ups, run by an interpreter of the few instructions they are made of."""

import emulate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqcompile import formats, tables
from tqcompile.kernels import blocks, ptx
from tqcompile.layout import layout_of

WORD = st.integers(0, 2**32 - 1)


def run(block, inputs, numbers):
    """The outputs of a block, each as four signed bytes."""
    words = [torch.tensor(word & 0xFFFFFFFF) for word in (*inputs, *ptx.table_words(numbers))]
    outputs = [int(word).to_bytes(4, "little") for word in emulate.assembled(block.text(), words, block.outputs)]
    return [[byte - 256 if byte > 127 else byte for byte in output] for output in outputs]


def numbers_of(bits, head_dim=128):
    return tables.integers(formats.codec(f"turboquant:{bits}").codes, head_dim)[0]


def code(bits, word, high, nibble, field):
    if bits > 3:
        return word >> 4 * nibble & 15 | (high >> 4 * nibble & 1) << 4 if bits == 5 else word >> 4 * nibble & 15
    if bits == 1:
        return word >> 4 * nibble + field & 1
    low = word >> 4 * nibble + 2 * field & 3
    return low | (high >> 4 * nibble + 2 * field & 1) << 2 if bits == 3 else low


@pytest.mark.parametrize(("bits", "fields"), [(5, 1), (4, 1), (3, 2), (3, 1), (2, 2), (2, 1), (1, 4), (1, 2)])
@given(word=WORD, high=WORD)
def test_a_word_of_keys_becomes_its_numbers(bits, fields, word, high):
    numbers = numbers_of(bits)
    found = run(ptx.key_look_up(bits, fields), [word, high] if ptx.has_high(bits) else [word], numbers)
    if bits > 3:
        found = [[sum(terms) for terms in zip(*found[half::2])] for half in range(2)]
    for field in range(fields):
        expected = [numbers[code(bits, word, high, nibble, field)] for nibble in range(8)]
        assert found[2 * field] + found[2 * field + 1] == expected


@pytest.mark.parametrize("count", [8, 4])
@pytest.mark.parametrize(("bits", "fields"), [(5, 1), (4, 1), (3, 2), (3, 1), (2, 2), (2, 1), (1, 4), (1, 2), (1, 1)])
@given(words=st.tuples(WORD, WORD, WORD, WORD), high=st.tuples(WORD, WORD, WORD, WORD))
def test_four_tokens_of_values_become_their_numbers_dim_by_dim(bits, fields, count, words, high):
    numbers = numbers_of(bits)
    found = run(ptx.value_look_up(bits, fields, count), [*words, *(high if ptx.has_high(bits) else ())], numbers)
    assert len(found) == count * fields * ptx.terms_of(bits)
    if bits > 3:
        found = [[sum(terms) for terms in zip(*found[nibble::count])] for nibble in range(count)]
    for field in range(fields):
        for nibble in range(count):
            codes = [code(bits, *pair, nibble, field) for pair in zip(words, high)]
            assert found[count * field + nibble] == [numbers[c] for c in codes]


@given(words=st.tuples(WORD, WORD, WORD, WORD))
def test_the_bytes_of_four_tokens_are_transposed(words):
    found = emulate.assembled(blocks.TRANSPOSE_BYTES.value, list(map(torch.tensor, words)), 4)
    expected = zip(*(word.to_bytes(4, "little") for word in words))
    assert [int(word).to_bytes(4, "little") for word in found] == list(map(bytes, expected))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128, 256, 576])
def test_the_bytes_of_every_codebook_add_up(bits, head_dim):
    numbers = numbers_of(bits, head_dim)
    words = b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in ptx.table_words(numbers))
    signed = [byte - 256 if byte > 127 else byte for byte in words]
    if bits < 4:
        assert signed[: 2**bits] == list(numbers)
        return
    # A flagged byte is its sign, so that what may be flagged must be negative.
    assert max(signed[8 : 8 * ptx.terms_of(bits)]) < 0
    pairs = [signed[place] + signed[8 + place] for place in range(8)] + [number - 1 for number in signed[:8]]
    if bits == 5:
        across = [signed[16 + place] for place in (*range(8), *reversed(range(8)))]
        pairs = [pair + other for pair, other in zip(pairs, across)] + [pair - 1 for pair in pairs]
    assert pairs == list(numbers)


def test_numbers_too_far_apart_for_a_byte_are_refused():
    with pytest.raises(AssertionError, match="further apart"):
        ptx.table_words([*range(-127, -119), *range(120, 128)])


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_a_code_lies_where_the_look_up_finds_it(bits, head_dim):
    """The layout's bytes, read as words of nibbles, hold the dim that the kernel thinks they do."""
    plane = layout_of(formats.codec(f"turboquant:{bits}"), head_dim, torch.float32, "cuda").plane("codes")
    codes = torch.randint(0, 2**bits, (head_dim,))
    packed = plane.pack(codes).contiguous().view(torch.int32).tolist()
    run_bytes, fields = plane.sections[0].run, 1 if bits > 3 else 2
    high_run = plane.sections[1].run if bits % 2 else 4
    for word in range(run_bytes // 4):
        high = packed[run_bytes // 4 + word % (high_run // 4)] >> word // (high_run // 4) if bits % 2 else 0
        for nibble in range(8):
            for field in range(fields):
                dim = 4 * word + nibble // 2 + run_bytes * (fields * (nibble % 2) + field)
                assert code(bits, packed[word] & 0xFFFFFFFF, high & 0xFFFFFFFF, nibble, field) == codes[dim]
