"""The compiled row codecs of the CPU path against the reference that they are compiled from."""

import pytest
import torch

from tqcompile import backend, cpu, formats, reference


@pytest.fixture(autouse=True)
def compiled_rows():
    """As a compilation with Inductor installs it; the next test starts without."""
    cpu.use_row_compiler(backend._compile_rows)


@pytest.mark.parametrize("name", ["q8_0", "turboquant:4"])
def test_compiled_rows_decode_as_the_reference_does(name):
    codec = formats.codec(name)
    planes = reference.encode(codec, torch.randn(2, 3, 65, 64))
    assert torch.equal(cpu.decode_rows(codec, planes, 64), reference.decode(codec, planes, 64))


def test_compiled_codes_round_as_the_reference_does():
    # No sum is taken for these codes, so that no order of summing moves one: a scale rounds to float16 or it does not.
    codec, y = formats.codec("q8_0"), torch.randn(2, 3, 65, 64)
    assert all(map(torch.equal, cpu.encode_rows(codec, y), reference.encode(codec, y)))


def test_one_token_of_several_heads_lies_apart_in_memory():
    codec, y = formats.codec("q8_0"), torch.randn(1, 3, 65, 64)
    planes = reference.encode(codec, y)
    last = [plane[:, :, 64:] for plane in planes]
    assert torch.equal(cpu.decode_rows(codec, last, 64), reference.decode(codec, last, 64))
    assert all(map(torch.equal, cpu.encode_rows(codec, y[:, :, 64:]), last))
