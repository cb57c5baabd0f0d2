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
    for preset in formats.PRESETS.values():
        assert all(map(formats.codec, preset.pair))


def test_a_preset_says_what_it_has_beside_codes():
    said = {name: preset.extras for name, preset in formats.PRESETS.items()}
    assert said["balanced"] == said["quality"] == said["lossless"] == ""
    assert said["small"] == said["tiny"] == "first 4 and last 64 tokens exact, keys centred"
    assert formats.Preset("q8_0", "q8_0", window=3).extras == "last 3 tokens exact"
    assert formats.Preset("q8_0", "q8_0", centre=True).extras == "keys centred"


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
@pytest.mark.parametrize("scalar", ["", ":norm"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_rotated_codebook_costs_its_bits_and_one_half_a_vector(bits, scalar, head_dim):
    if f"turboquant:{bits}{scalar}" in formats.REGISTRY:
        assert bits_per_element(f"turboquant:{bits}{scalar}", head_dim) == bits + 16 / head_dim


def test_every_whole_width_up_to_eight_is_there():
    assert {f"turboquant:{bits}" for bits in range(1, 9)} <= set(formats.REGISTRY)


# Of arXiv 2504.19874 section 4.3, 2502.02617 section 4 and llama.cpp's block_q4_0.
PUBLISHED_BITS = {"turboquant:2.5": 2.5, "turboquant:3.5": 3.5, "polarquant": 3.875, "q4_0": 4.5, "q8_0": 8.5}


@pytest.mark.parametrize("name", PUBLISHED_BITS)
def test_bits_at_128_dims_are_the_published_ones(name):
    assert bits_per_element(name, 128) == PUBLISHED_BITS[name]


def test_a_quarter_of_the_channels_of_a_fraction_get_one_bit_more():
    for name, bits in (("turboquant:2.5", (3, 2)), ("turboquant:3.5", (4, 3)), ("turboquant:2.5:norm", (3, 2))):
        codec = formats.codec(name)
        assert [term.codes.plane.bits for term in codec.terms] == [*bits]
        assert codec.bands(128) == (slice(0, 32), slice(32, 128))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_a_residual_s_signs_replace_one_bit_and_bring_their_norm(bits):
    assert bits_per_element(f"turboquant_prod:{bits}", 128) == bits + 2 * 16 / 128


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_sign_sketch_costs_its_rows_and_a_norm(rows):
    assert bits_per_element(f"qjl:{rows}", 128) == rows + 16 / 128


def test_only_sketches_of_keys_are_no_good_for_values():
    refused = {codec.name for codec in formats.REGISTRY.values() if not codec.for_values}
    assert refused == {"qjl:1", "qjl:2", "qjl:4"}
    assert {*formats.REGISTRY} - {*formats.FOR_VALUES} == refused
    presets = (preset.pair for preset in formats.PRESETS.values())
    for _, values in (*presets, *map(formats.pair_of, formats.REGISTRY)):
        formats.check_values(values)
    for name in formats.REGISTRY:
        keys, values = formats.pair_of(name)
        assert keys == name and (values == name) == (name not in refused)
    for name in refused:
        with pytest.raises(ValueError, match=f"'{name}' serves keys alone.*for values one of: identity, q8_0"):
            formats.check_values(name)


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
