"""Planes of more than 2**31 bytes: every address in them takes 64 bits."""

import pytest
import torch
from cases import TOLERANCE, close

from tqcompile import coding, formats, reference, tables
from tqcompile.kernels import append, attend, chunks, integer, logits, step, tune
from tqcompile.layout import layout_of
from tqcompile.passes import rewrite

LENGTH, LAST = 4_300_000, 700


@pytest.fixture(scope="module")
def wide():
    """A codec, and planes of keys and of values of 8 heads whose last tokens alone are written."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    codec = formats.codec("turboquant:4")
    planes = [layout_of(codec, 128, torch.float32, "cuda").allocate((1, 8, LENGTH), "cuda") for _ in range(2)]
    assert max(plane.nbytes for plane in planes[0]) > 2**31
    positions = torch.arange(LENGTH - LAST, LENGTH, device="cuda")
    for side in planes:
        append.append(codec, side, torch.randn(1, 8, LAST, 128, device="cuda"), positions)
    return codec, planes


def at_the_end(planes):
    return [plane[:, :, LENGTH - LAST :].contiguous() for plane in planes]


@pytest.mark.gpu
@pytest.mark.parametrize("reaching", [False, True])
@pytest.mark.parametrize("kernel", ["portable", "int8", "chunk"])
def test_the_last_tokens_are_read(wide, kernel, reaching, monkeypatch):
    codec, (keys, values) = wide
    if kernel == "portable":
        monkeypatch.setattr(integer, "takes", lambda *a: False)
    else:
        monkeypatch.setitem(TOLERANCE, torch.float32, 4e-4)
    q = torch.randn(1, 16, 1, 128, device="cuda")
    if kernel == "chunk":
        monkeypatch.setitem(TOLERANCE, torch.bfloat16, 2**-8)
        q = torch.randn(1, 16, 20, 128, device="cuda", dtype=torch.bfloat16)
        codes = [coding.split(codec, each)[0] for each in (keys, values)]
        assert chunks.takes(q, codes, (codec, codec), (128, 128), True) == (tune.capability_of(q.device) == (9, 0))
    mask = (torch.arange(LENGTH, device="cuda") >= LENGTH - LAST).view(1, 1, 1, -1)
    options = (False, 0.1, codec, codec, (128, 128))
    out = attend.attend(q, keys, values, mask, *options, reach=rewrite.reach(mask) if reaching else None)
    close(out, reference.attend(q, at_the_end(keys), at_the_end(values), None, *options), q.dtype)


@pytest.mark.gpu
def test_the_last_tokens_are_scored_among_more_than_two_to_the_31_scores(wide, monkeypatch):
    monkeypatch.setitem(TOLERANCE, torch.float32, 3e-3)
    codec, (keys, _) = wide
    q = torch.randn(1, 16, 32, 128, device="cuda")
    out = logits.logits(q, keys, codec, 128, dtype=torch.bfloat16)
    assert out.numel() > 2**31
    close(out[..., LENGTH - LAST :].float(), reference.logits(q, at_the_end(keys), codec, 128), torch.float32)


@pytest.mark.gpu
def test_the_last_token_is_written(wide):
    codec, planes = wide
    basis = tables.basis_matrix(codec, 128, "cuda")
    k, q = torch.randn(1, 8, 1, 128, device="cuda"), torch.randn(1, 16, 1, 128, device="cuda")
    step.append_step((codec, codec), planes, (k, k), q, torch.tensor([LENGTH - 1], device="cuda"), (basis, basis))
    expected = coding.encode(codec, reference.rotate(k, basis))
    for side in planes:
        last = coding.decode(codec, [plane[:, :, LENGTH - 1 :] for plane in side], 128)
        torch.testing.assert_close(last, coding.decode(codec, expected, 128), rtol=1e-3, atol=1e-3)
