"""Attention of many rows, over heads that are decoded a part at a time."""

import math

import pytest
import torch
from cases import close, compressed, numbers_of
from representatives import REPRESENTATIVES

from tqcompile import coding, formats, reference, tables
from tqcompile.kernels import attend, chunks, decoded, portable, tune

CODECS = REPRESENTATIVES
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def many_rows(monkeypatch):
    """Few rows are many here, and no chunk."""
    monkeypatch.setattr(tune, "MOST_ROWS", 12)
    monkeypatch.setattr(chunks, "takes", lambda *arguments: False)


def look_up(codec, head_dim, dtype, device):
    return portable.table_of(codec, head_dim, dtype, torch.device(device))


# Ragged ones for every codec, and one of the others in turn.
EACH = [(name, dim) for place, name in enumerate(CODECS) for dim in (48, 80, (16, 128, 256)[place % 3])]


@pytest.mark.parametrize(("name", "head_dim"), EACH)
def test_every_codec_is_decoded_as_the_reference_does(device, name, head_dim):
    torch.manual_seed(0)
    codec = formats.codec(name)
    x = numbers_of(codec, 2, 3, 77, head_dim).to(device)
    planes = [plane[:, :, 5:] for plane in compressed(codec, x, growing=True)]
    numbers = decoded.decode(codec, planes, look_up(codec, head_dim, torch.float32, device), head_dim, torch.float32)
    torch.testing.assert_close(numbers, coding.decode(codec, planes, head_dim), rtol=3e-6, atol=1e-6)


def run(device, q, keys, values, mask, causal, codecs, dims, score_mod="", sinks=None):
    """Attention of many rows: on a GPU as `attend.attend` chooses it, which must choose it."""
    if device == "cpu":
        numbers = [look_up(codec, dim, q.dtype, device) for codec, dim in zip(codecs, dims)]
        return decoded.attend(q, keys, values, mask, causal, 0.1, codecs, dims, numbers, None, score_mod, sinks)
    calls, inner = [], decoded.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded, "attend", lambda *a: calls.append(1) or inner(*a))
        out = attend.attend(q, keys, values, mask, causal, 0.1, *codecs, dims, score_mod=score_mod, sinks=sinks)
    assert calls
    return out


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "causal"])
def test_any_part_of_the_heads_at_a_time_attends_like_the_reference(device, kind, at_once, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(decoded, "DECODED_BYTES", at_once * 70 * (64 + 32) * 4)
    codecs, dims = (formats.codec("turboquant:4"), formats.codec("q8_0")), (64, 32)
    keys, values = (compressed(codec, torch.randn(3, 2, 70, dim, device=device)) for codec, dim in zip(codecs, dims))
    q = torch.randn(3, 9, 6, 64, device=device).transpose(1, 2)
    keep = torch.rand(3, 1, 9, 70, device=device) < 0.7
    mask = {"bool": keep, "additive": torch.where(keep, 0.5, -torch.inf)}.get(kind)
    out = run(device, q, keys, values, mask, kind == "causal", codecs, dims)
    close(out.float(), reference.attend(q, keys, values, mask, kind == "causal", 0.1, *codecs, dims), torch.float32)


@pytest.mark.parametrize("kind", ["none", "additive"])
def test_heads_too_wide_to_be_fused_attend_like_the_reference(device, kind):
    """As a latent does that keys and values are made of: many rows over one head of both."""
    torch.manual_seed(9)
    codec = formats.codec("turboquant:4")
    planes = compressed(codec, torch.randn(2, 1, 70, 512, device=device))
    q = torch.randn(2, 20, 1, 512, device=device)
    mask = torch.randn(2, 20, 1, 70, device=device) * 9 if kind == "additive" else None
    out = run(device, q, planes, planes, mask, False, (codec, codec), (512, 512))
    close(out.float(), reference.attend(q, planes, planes, mask, False, 0.1, codec, codec, (512, 512)), torch.float32)


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "causal"])
def test_a_cap_and_sinks_of_a_few_queries_at_a_time_are_those_of_the_reference(device, kind, at_once, monkeypatch):
    torch.manual_seed(8)
    monkeypatch.setattr(decoded, "DECODED_BYTES", at_once * 70 * 6 * 4)
    codecs, dims = (formats.codec("turboquant:4"), formats.codec("q8_0")), (64, 32)
    keys, values = (compressed(codec, torch.randn(3, 2, 70, dim, device=device)) for codec, dim in zip(codecs, dims))
    q, sinks = torch.randn(3, 6, 50, 64, device=device), torch.randn(1, 6, 50, 1, device=device) * 3
    keep = torch.rand(3, 1, 50, 70, device=device) < 0.7
    mask = {"bool": keep, "additive": torch.where(keep, 0.5, -torch.inf)}.get(kind)
    how = {"score_mod": "tanh(score) * 2.0", "sinks": sinks}
    out = run(device, q, keys, values, mask, kind == "causal", codecs, dims, **how)
    expected = reference.attend(q, keys, values, mask, kind == "causal", 0.1, *codecs, dims, **how)
    close(out.float(), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_every_codec_attends_like_the_reference(device, name, dtype):
    torch.manual_seed(2)
    codec = formats.codec(name)
    keys, values = (compressed(codec, numbers_of(codec, 2, 2, 90, 64).to(device, dtype)) for _ in range(2))
    q = numbers_of(codec, 2, 6, 7, 64).to(device, dtype)
    out = run(device, q, keys, values, None, False, (codec, codec), (64, 64))
    expected = reference.attend(q, keys, values, None, False, 0.1, codec, codec, (64, 64))
    close(out.float(), expected, dtype)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_query_that_sees_nothing_gets_zeros(device, kind):
    torch.manual_seed(3)
    codec = formats.codec("turboquant:4")
    keys, values = (compressed(codec, torch.randn(1, 2, 40, 64, device=device)) for _ in range(2))
    q, keep = torch.randn(1, 4, 8, 64, device=device), torch.rand(1, 1, 8, 40, device=device) < 0.5
    keep[:, :, 3] = False
    mask = keep if kind == "bool" else torch.where(keep, 0.0, -math.inf)
    out = run(device, q, keys, values, mask, False, (codec, codec), (64, 64))
    expected = reference.attend(q, keys, values, mask, False, 0.1, codec, codec, (64, 64))
    assert (expected[:, :, 3] == 0).all()
    close(out.float(), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_whose_mask_is_nothing_but_low_sees_all_alike(device, dtype):
    torch.manual_seed(6)
    codec = formats.codec("turboquant:4")
    keys, values = (compressed(codec, torch.randn(1, 2, 40, 64, device=device).to(dtype)) for _ in range(2))
    q, mask = torch.randn(1, 4, 8, 64, device=device).to(dtype), torch.zeros(1, 1, 8, 40, device=device)
    mask[:, :, 3] = torch.finfo(torch.float32).min
    out = run(device, q, keys, values, mask, False, (codec, codec), (64, 64))
    expected = reference.attend(q, keys, values, mask, False, 0.1, codec, codec, (64, 64))
    close(out[:, :, 3].float(), expected[:, :, 3], dtype)


def test_a_basis_rotates_the_result_back(device):
    torch.manual_seed(4)
    codec = formats.codec("turboquant:4")
    keys, values = (compressed(codec, torch.randn(1, 1, 40, 64, device=device)) for _ in range(2))
    q, basis = torch.randn(1, 4, 8, 64, device=device), tables.basis_matrix(codec, 64, device)
    arguments = (q, keys, values, None, False, 0.1, codec, codec, (64, 64))
    out = attend.attend(*arguments, basis=basis)
    close(out, reference.rotate_back(reference.attend(*arguments), basis, torch.float32), torch.float32)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("name", CODECS)
def test_the_single_products_equal_the_references(device, name, at_once, monkeypatch):
    torch.manual_seed(5)
    monkeypatch.setattr(decoded, "DECODED_BYTES", at_once * 70 * 48 * 4)
    codec = formats.codec(name)
    planes = compressed(codec, numbers_of(codec, 2, 3, 70, 48).to(device), growing=True)
    numbers = look_up(codec, 48, torch.float32, device)
    q, weights = numbers_of(codec, 2, 6, 4, 48).to(device), torch.rand(2, 6, 4, 70, device=device)
    close(decoded.logits(q, planes, codec, numbers), reference.logits(q, planes, codec, 48), torch.float32)
    close(decoded.mix(weights, planes, codec, numbers, 48), reference.mix(weights, planes, codec, 48), torch.float32)
