"""The registry: what each format promises in bytes, and how a wrong name is answered."""

import pytest
import torch

from tqcompile import formats
from tqcompile.layout import layout_of

EVERY_CODEC = pytest.mark.parametrize("codec", formats.REGISTRY.values(), ids=formats.REGISTRY)


def bits_per_element(name, head_dim, dtype=torch.bfloat16):
    return layout_of(formats.codec(name), head_dim, dtype, "cpu").bits_per_element


@EVERY_CODEC
def test_a_codec_is_found_by_its_own_name(codec):
    assert formats.codec(codec.name) is codec
    assert codec.source


def test_no_two_codecs_share_a_digest():
    assert len({codec.digest() for codec in formats.REGISTRY.values()}) == len(formats.REGISTRY)


def test_each_preset_is_a_pair_of_codecs_that_exist():
    for keys, values in formats.PRESETS.values():
        assert formats.codec(keys) and formats.codec(values)


@pytest.mark.parametrize(
    ("given", "near"), [("turboqant:4", "turboquant:4"), ("q8-0", "q8_0"), ("Identity", "identity")]
)
def test_a_wrong_name_is_answered_with_the_nearest_one_and_the_whole_list(given, near):
    with pytest.raises(ValueError, match=f"'{given}' does not exist; did you mean '{near}'") as raised:
        formats.codec(given)
    assert all(name in str(raised.value) for name in formats.REGISTRY)


@pytest.mark.parametrize("given", ["", "zzz", "4"])
def test_a_name_like_no_other_still_gets_an_answer(given):
    with pytest.raises(ValueError, match="does not exist"):
        formats.codec(given)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("bits", formats.WIDTHS["turboquant"])
def test_a_rotated_codebook_costs_its_bits_and_one_half_a_vector(bits, head_dim):
    assert bits_per_element(f"turboquant:{bits}", head_dim) == bits + 16 / head_dim


def test_blocks_of_signed_bytes_cost_eight_and_a_half_bits():
    assert bits_per_element("q8_0", 128) == 8.5


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 16)])
def test_the_lossless_codec_costs_what_the_tensor_costs(dtype, bits):
    assert bits_per_element("identity", 80, dtype) == bits


@EVERY_CODEC
def test_a_token_is_smaller_than_a_half_precision_one_at_every_head_dim_unless_it_is_stored_as_it_is(codec):
    for head_dim in range(16, 257):
        size = layout_of(codec, head_dim, torch.float16, "cpu").bytes_per_token
        assert size == 2 * head_dim if codec.is_exact else size < 2 * head_dim
