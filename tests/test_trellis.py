"""The trellis: what a code means, how near its paths come, and that encoding stays out of graphs."""

import math

import pytest
import torch
from scipy.special import ndtri
from torch.fx.experimental.proxy_tensor import make_fx
from vectors import every, normal

from tqcompile import coding, cpu, formats, ops, tables, trellis
from tqcompile.codec import STATE_BITS
from tqcompile.layout import layout_of
from tqcompile.passes import rewrite

PATHS = every(lambda codec: codec.is_sequential)
# Decibels under a Lloyd-Max codebook's distortion, at least and at most, by bits and coordinates.
GAINS = {
    48: {2: (1.68, 1.84), 3: (2.40, 2.54), 4: (2.48, 2.64)},
    80: {2: (1.80, 1.94), 3: (2.42, 2.56), 4: (2.44, 2.60)},
}


def codes_of(codec, planes, head_dim):
    plane = layout_of(codec, head_dim, torch.float32, "cpu").plane(codec.terms[0].codes.plane.name)
    return plane.unpack(planes[1])


def distortion(codec, x):
    """The error of a direction, whatever its scalar is: 1 - cos^2."""
    decoded = coding.decode(codec, coding.encode(codec, x), x.shape[-1]).double()
    along = (decoded * x).sum(-1) ** 2 / (decoded.square().sum(-1) * x.double().square().sum(-1))
    return (1 - along).mean().item()


def number_of(codes, at, bits):
    """The state that a coordinate's code begins, bit by bit, and its number."""
    text = "".join(f"{codes[(at + step) % len(codes)]:0{bits}b}" for step in range(STATE_BITS))
    steps = -(-STATE_BITS // bits)
    return tables.trellis(bits)[int(text[: steps * bits][-STATE_BITS:], 2)]


@PATHS
@pytest.mark.parametrize("head_dim", [8, 31, 48])
def test_a_number_is_that_of_the_bits_of_a_code_and_of_those_behind_it_round_the_vector(codec, head_dim):
    x, bits = normal(3, head_dim), codec.terms[0].codes.plane.bits
    planes = coding.encode(codec, x)
    for row, scale, decoded in zip(
        codes_of(codec, planes, head_dim), planes[0], coding.decode(codec, planes, head_dim)
    ):
        expected = [number_of(row.tolist(), at, bits) for at in range(head_dim)]
        torch.testing.assert_close(decoded, torch.tensor(expected) * scale.float())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_numbers_are_those_of_a_normal_coordinate_and_neighbours_are_apart(bits):
    numbers, count = torch.tensor(tables.trellis(bits), dtype=torch.float64), 2**bits
    shares = (torch.arange(2**STATE_BITS, dtype=torch.float64) + 0.5) / 2**STATE_BITS
    assert torch.allclose(numbers.sort().values, torch.from_numpy(ndtri(shares.numpy())))
    edges = torch.from_numpy(ndtri(torch.arange(1, count).numpy() / count))
    part = torch.bucketize(numbers, edges)
    for together in (part.view(-1, count), part.view(count, -1).T):
        assert torch.equal(together.sort(1).values, torch.arange(count).expand(len(together), -1))


def test_numbers_are_the_same_on_every_machine():
    golden = [-1.85584, -0.55184, 0.16847, 0.84967]
    assert tables.trellis(2)[:4] == pytest.approx(golden, abs=1e-4)


@PATHS
@pytest.mark.parametrize("head_dim", GAINS)
def test_paths_are_nearer_than_the_best_codebook_and_no_nearer_than_any_code_can_be(codec, head_dim):
    bits = codec.terms[0].codes.plane.bits
    found = distortion(codec, normal(1500, head_dim))
    least, most = GAINS[head_dim][bits]
    assert 4.0**-bits < found
    assert least < 10 * math.log10(tables.sphere_distortion(bits, head_dim) / found) < most


@PATHS
@pytest.mark.parametrize("head_dim", [8, 7, 16, 33])
def test_narrow_and_odd_vectors_have_paths_too(codec, head_dim):
    """Few closed paths are there to choose from; none of them points away."""
    if head_dim < codec.minimum_head_dim:
        with pytest.raises(ValueError, match=f"head_dim={head_dim}; {codec.name} needs at least"):
            coding.encode(codec, normal(2, head_dim))
        return
    x = normal(400, head_dim)
    decoded = coding.decode(codec, coding.encode(codec, x), head_dim)
    torch.testing.assert_close((decoded * x).sum(-1), x.square().sum(-1), rtol=2e-3, atol=0)
    assert distortion(codec, x) < {2: 0.5, 3: 0.06, 4: 0.012}[codec.terms[0].codes.plane.bits]


@PATHS
@pytest.mark.parametrize("head_dim", [48, 80])
def test_no_code_away_from_where_the_ends_meet_can_be_exchanged_for_a_better_one(codec, head_dim):
    bits = codec.terms[0].codes.plane.bits
    numbers = torch.tensor(tables.trellis(bits))
    x = normal(20, head_dim)
    codes = trellis.path(x, numbers, bits)
    cost = (numbers[trellis.states(codes, bits)].double() - x).square().sum(-1)
    # Any two neighbours: some changes only pay together.
    for at in range(trellis.window(bits), head_dim - 1):
        for change in range(1, 4**bits):
            other = codes.clone()
            other[:, at] ^= change >> bits
            other[:, at + 1] ^= change & (2**bits - 1)
            assert ((numbers[trellis.states(other, bits)].double() - x).square().sum(-1) > cost - 1e-4).all()


@PATHS
def test_coordinates_where_the_ends_meet_are_nearly_as_near_as_others(codec):
    x = normal(3000, 96)
    decoded = coding.decode(codec, coding.encode(codec, x), 96)
    errors = (decoded - x).square().mean(0)
    edge = trellis.window(codec.terms[0].codes.plane.bits)
    seam = torch.cat([errors[:edge], errors[-edge:]]).mean()
    assert seam < 1.25 * errors[edge:-edge].mean()


@PATHS
def test_rows_that_are_encoded_in_parts_are_those_that_are_encoded_together(codec, monkeypatch):
    y = normal(3, 5, 40)
    whole = coding.encode(codec, y)
    shapes, best = [], trellis._best
    monkeypatch.setattr(trellis, "_best", lambda x, *rest: (shapes.append(x.shape), best(x, *rest))[1])
    monkeypatch.setattr(trellis, "COST_BYTES", {"cpu": 2**20})
    parts = coding.encode(codec, y)
    assert all(map(torch.equal, whole, parts))
    # What is held at once is bounded, in bytes of costs.
    assert max(shape.numel() * 2**STATE_BITS * 4 for shape in shapes) <= 2**20 and len(shapes) > 2


@PATHS
def test_a_graph_holds_one_operator_for_what_encodes_and_none_of_its_steps(codec):
    y = normal(2, 3, 5, 64)
    traced = make_fx(lambda y: rewrite.encode(y, codec.name), tracing_mode="symbolic")(y)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert [target for target in called if "tqcompile" in str(target)] == [ops.encode] and len(called) < 10
    other = normal(1, 2, 9, 64)
    assert all(map(torch.equal, traced(other), coding.encode(codec, other)))


@PATHS
def test_the_operator_is_what_its_shapes_say_and_the_reference(codec):
    y = normal(2, 3, 33)
    torch.library.opcheck(ops.encode, (y, codec.name))
    assert all(map(torch.equal, ops.encode(y, codec.name), coding.encode(codec, y)))


@PATHS
def test_nothing_is_compiled_to_encode_and_a_gradient_does_not_reach_it(codec):
    def refuse(function, examples):
        raise AssertionError("a sequential program is not for Inductor")

    cpu.use_row_compiler(refuse)
    y = normal(2, 3, 40).requires_grad_()
    planes = cpu.encode_rows(codec, y)
    assert all(map(torch.equal, planes, coding.encode(codec, y.detach())))
    assert not planes[1].requires_grad


def test_formats_that_are_not_sequential_are_traced_as_before():
    assert not any(codec.is_sequential for codec in formats.REGISTRY.values() if codec.is_plain)
