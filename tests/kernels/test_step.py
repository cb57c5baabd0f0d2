"""The launch that precedes attention: the query rotated, keys and values rotated and written."""

import pytest
import torch
from cases import TOLERANCE, distance, planes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_append import agree, dims_of

from tqcompile import coding, formats, ops, reference, tables
from tqcompile.kernels import step, writers

WRITTEN = [name for name, codec in formats.REGISTRY.items() if writers.writes(codec, 64)]
KEYS = [name for name in WRITTEN if formats.codec(name).basis != "standard"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tokens_of(shape, dtype, device, by_token):
    """Random tokens [B, H, T, D], laid out as [B, T, H, D] in memory with `by_token`."""
    x = torch.randn(shape, device=device).to(dtype)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if by_token else x


@settings(max_examples=24)
@given(data=st.data())
def test_any_step_is_written_and_rotated_as_the_reference_does(device, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    codecs = formats.codec(draw(st.sampled_from(KEYS))), formats.codec(draw(st.sampled_from(WRITTEN)))
    dims = draw(st.sampled_from([3, 32, 48, 64, 80, 128, 256])), draw(st.sampled_from([16, 33, 64, 128]))
    dims = [dims_of(codec, dim) for codec, dim in zip(codecs, dims)]
    dtype, length = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([None, 9]))
    batch, heads, tokens, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2
    y = [tokens_of((batch, heads, tokens, dim), dtype, device, draw(st.booleans())) for dim in dims]
    q = tokens_of((batch, heads * groups, tokens + 1, dims[0]), dtype, device, draw(st.booleans()))
    positions = None if length is None else torch.randperm(length)[:tokens].to(device)
    sizes = [(batch, heads, length or tokens, dim) for dim in dims]
    growing = draw(st.booleans())
    ours, theirs = ([planes_of(c, s, dtype, device, growing) for c, s in zip(codecs, sizes)] for _ in range(2))
    bases = [tables.basis_matrix(codec, dim, device) for codec, dim in zip(codecs, dims)]
    turned = step.append_step(codecs, ours, y, q, positions, bases)
    assert turned.dtype == torch.float32
    assert distance(turned, reference.rotate(q, bases[0])) < TOLERANCE[torch.float32]
    for codec, mine, other, x, basis in zip(codecs, ours, theirs, y, bases):
        x = reference.rotate(x, basis)
        reference.append(codec, other, x, positions)
        agree(codec, (mine, other), x, positions)


def test_a_basis_in_half_precision_rotates_into_it(device):
    torch.manual_seed(1)
    codec, dtype = formats.codec("turboquant:4"), torch.bfloat16
    basis = tables.basis_matrix(codec, 64, device, dtype)
    q, k = torch.randn(2, 4, 1, 64, device=device).to(dtype), torch.randn(2, 2, 1, 64, device=device).to(dtype)
    planes = [planes_of(codec, (2, 2, 1, 64), dtype, device) for _ in range(2)]
    turned = step.append_step((codec, codec), planes, (k, k), q, None, (basis, basis))
    assert turned.dtype == dtype
    assert distance(turned, q.float() @ basis.float().T) < 4e-3
    back = coding.decode(codec, planes[0], 64) @ basis.float()
    assert torch.equal(planes[0][0], planes[1][0]) and distance(back, k) < 0.12


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_outside_the_planes_writes_nothing(device, position):
    codec = formats.codec("turboquant:4")
    basis, k = tables.basis_matrix(codec, 64, device), torch.ones(1, 1, 2, 64, device=device)
    planes = [planes_of(codec, (1, 1, 11, 64), torch.float32, device) for _ in range(2)]
    inner = [tuple(plane[:, :, 1:10] for plane in side) for side in planes]
    positions = torch.tensor([position, 4], device=device)
    arguments = ((codec, codec), inner, (k, k), k, positions, (basis, basis))
    if device == "cpu":
        with pytest.raises(IndexError, match="outside the 9 tokens"):
            step.append_step(*arguments)
        return
    step.append_step(*arguments)
    assert all((plane[:, :, [0, 10]] == 0).all() and (plane[:, :, 5] != 0).any() for side in planes for plane in side)


def test_tokens_that_do_not_fill_the_planes_need_positions(device):
    codec = formats.codec("turboquant:4")
    basis, k = tables.basis_matrix(codec, 64, device), torch.ones(1, 1, 2, 64, device=device)
    planes = [planes_of(codec, (1, 1, 3, 64), torch.float32, device) for _ in range(2)]
    with pytest.raises(ValueError, match="without positions"):
        step.append_step((codec, codec), planes, (k, k), k, None, (basis, basis))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["turboquant:2:trellis", "polarquant", "turboquant_prod:3"])
def test_the_operator_takes_codecs_that_no_kernel_writes(name):
    codec, q, k = formats.codec(name), torch.randn(2, 4, 1, 64).cuda(), torch.randn(2, 2, 1, 64).cuda()
    basis, place = tables.basis_matrix(codec, 64, k.device), torch.tensor([3], device="cuda")
    ours, theirs, values = (planes_of(codec, (2, 2, 5, 64), k.dtype, "cuda") for _ in range(3))
    turned = ops.append_step(ours, values, k, k, q, place, basis, basis, name, name)
    reference.append(codec, theirs, reference.rotate(k, basis), place)
    assert distance(turned, reference.rotate(q, basis)) < TOLERANCE[torch.float32]
    for mine, value, other in zip(ours, values, theirs):
        assert torch.equal(mine, other) and torch.equal(value, other) and other.any()
