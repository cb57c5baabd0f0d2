"""Keys in two caches, whose scores add up: a latent that serves as values, too, beside a rotary key of all heads."""

import pytest
import torch
from cases import close, compressed, numbers_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from representatives import REPRESENTATIVES
from test_attend import mask_of

from tqcompile import formats, reference
from tqcompile.kernels import attend, integer, portable
from tqcompile.kernels.portable import Second

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def case(device, dtype, codec, other, dims=(64, 16), batch=2, heads=1, groups=5, queries=2, length=70, growing=False):
    """Queries of a latent, that latent, and a second cache of keys with the queries that it is asked by."""
    made = []
    for name, dim in zip((codec, other), dims):
        kept = formats.codec(name)
        q = numbers_of(kept, batch, heads * groups, queries, dim).to(dtype)
        made += [
            q.to(device),
            compressed(kept, numbers_of(kept, batch, heads, length, dim).to(dtype).to(device), growing),
        ]
    q, planes, beside, more = made
    return q, planes, Second(beside * dims[1] ** -0.5, more, formats.codec(other), dims[1])


def both(q, keys, values, second, mask, causal, names, dims, **options):
    how = causal, 0.3, *map(formats.codec, names), dims
    added = reference.logits(second.q.float(), second.planes, second.codec, second.head_dim)
    expected = reference.attend(q, keys, values, reference.beside(added, mask), *how, **options)
    return attend.attend(q, keys, values, mask, *how, second=second, **options), expected


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_latent_of_every_codec_is_read_with_keys_of_another(device, name, dtype):
    torch.manual_seed(1)
    codec = name if formats.codec(name).for_values else "turboquant:4"
    q, latent, second = case(device, dtype, codec, name, (64, 64))
    close(*both(q, latent, latent, second, None, False, (codec, codec), (64, 64)), dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float32", "bfloat16"])
def test_every_reader_adds_both_scores(device, mask, causal):
    torch.manual_seed(2)
    q, latent, second = case(device, torch.float32, "turboquant:5", "q8_0", (64, 32), heads=2, groups=3, queries=4)
    mask = mask_of(mask, (2, 6, 4, 70), device)
    sinks = torch.randn(2, 6, 4, 1, device=device)
    how = mask, causal, ("turboquant:5",) * 2, (64, 64)
    close(*both(q, latent, latent, second, *how), torch.float32)
    close(*both(q, latent, latent, second, *how, sinks=sinks), torch.float32)


@settings(max_examples=16)
@given(data=st.data())
def test_any_two_caches_of_keys_add_up(device, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dims = draw(st.tuples(*2 * [st.sampled_from([2, 3, 16, 31, 48, 64, 80, 112, 128, 256])]))
    names = draw(st.tuples(*2 * [st.sampled_from(REPRESENTATIVES)]))
    assume(all(dim >= formats.codec(name).minimum_head_dim for name, dim in zip(names, dims)))
    assume(formats.codec(names[0]).for_values)
    size = {"batch": [1, 2], "heads": [1, 2], "groups": [1, 3, 16], "queries": [1, 2, 9], "length": [1, 2, 63, 65, 130]}
    size = {name: draw(st.sampled_from(sizes)) for name, sizes in size.items()}
    dtype = draw(st.sampled_from(DTYPES))
    q, latent, second = case(device, dtype, *names, dims, **size, growing=draw(st.booleans()))
    # The same numbers elsewhere are decoded a second time.
    values = tuple(plane.clone() for plane in latent) if draw(st.booleans()) else latent
    mask = draw(st.sampled_from(["none", "bool", "float32"]))
    mask = mask_of(mask, (size["batch"], 1, size["queries"], size["length"]), device)
    close(*both(q, latent, values, second, mask, draw(st.booleans()), (names[0],) * 2, (dims[0],) * 2), dtype)


def test_kernels_on_int8_units_come_first_and_other_heads_are_left_to_a_mask(device, monkeypatch):
    q, latent, second = case(device, torch.float32, "turboquant:4", "turboquant:4", (64, 16), heads=2, groups=2)
    shared = second._replace(planes=tuple(plane[:, :1] for plane in second.planes))
    how = q, latent, latent, (formats.codec("turboquant:4"),) * 2, (64, 64)
    assert attend.joins(*how, second) == (device == "cpu")
    monkeypatch.setattr(integer, "takes", lambda *arguments: False)
    assert attend.joins(*how, second) and not attend.joins(*how, shared)


def test_a_wide_latent_that_is_keys_and_values_has_tiles_of_its_own(device):
    codec = formats.codec("turboquant:4")
    _, latent, _ = case(device, torch.float32, codec.name, codec.name, (512, 64), length=2)
    other = tuple(plane.clone() for plane in latent)
    assert portable.is_shared((codec,) * 2, (512, 512), latent, latent)
    assert not portable.is_shared((codec,) * 2, (512, 512), latent, other)
    assert not portable.is_shared((codec, formats.codec("turboquant:3")), (512, 512), latent, latent)
    assert portable.is_latent(torch.bfloat16, codec, 512) and not portable.is_latent(torch.float32, codec, 512)
    assert not portable.is_latent(torch.bfloat16, formats.codec("q8_0"), 512)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("heads", [16, 40, 128])
@pytest.mark.parametrize("codec", ["turboquant:4", "turboquant:3", "q8_0", "identity"])
def test_a_latent_as_wide_as_models_have_it_is_read(device, codec, heads):
    torch.manual_seed(3)
    length = 150 if device == "cuda" else 40
    q, latent, second = case(device, torch.bfloat16, codec, codec, (512, 64), 1, 1, heads, 1, length)
    kept = (formats.codec(codec),) * 2
    if not attend.joins(q, latent, latent, kept, (512, 512), second):
        # More rows of such codes are decoded once for all of them.
        assert device == "cuda" and heads > 16
        with pytest.raises(AssertionError, match="to be a mask"):
            both(q, latent, latent, second, None, False, (codec,) * 2, (512, 512))
        return
    close(*both(q, latent, latent, second, None, False, (codec,) * 2, (512, 512)), torch.bfloat16)
