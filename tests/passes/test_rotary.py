"""However a rotation by position is spelled, it is found with its planes and its frequencies; what is none is not."""

import math

import pytest
import torch
from graphs import capture
from torch import nn

from tqcompile.centre import Rotation
from tqcompile.passes.canonicalize import canonicalize
from tqcompile.passes.nodes import spelling
from tqcompile.passes.rotary import NOT_A_ROTATION, Rotations
from tqcompile.passes.slices import NO_POSITION, WRITTEN, NotRotated, Slicer

EMBED, HEADS, HEAD_DIM, HALF, TOKENS, LONGEST = 16, 2, 16, 8, 5, 4096
INVERSE = 1e4 ** (-torch.arange(HALF) / HALF)

# Which planes a spelling turns: channels of two halves, or neighbours.
HALVES, PAIRS = "halves", "pairs"
SPELLINGS = {}


def spelled(planes, channels=HEAD_DIM):
    def add(function):
        SPELLINGS[function.__name__] = function, planes, channels
        return function

    return add


def rotate_half(x):
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


class Keys(nn.Module):
    """Keys [B, H, T, D] of hidden states, rotated as a spelling does; `positions` [T] or [B, T]."""

    def __init__(self, rotate, heads_first=True):
        super().__init__()
        self.rotate, self.heads_first = rotate, heads_first
        self.proj = nn.Linear(EMBED, HEADS * HEAD_DIM)
        angles = torch.arange(LONGEST)[:, None] * INVERSE
        self.register_buffer("inv_freq", INVERSE.clone())
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def forward(self, hidden, positions):
        x = self.proj(hidden).view(*hidden.shape[:2], HEADS, HEAD_DIM)
        x = x.transpose(1, 2) if self.heads_first else x
        out = self.rotate(self, x, positions)
        return out if self.heads_first else out.transpose(1, 2)


@spelled(HALVES)
def halves(model, x, positions):
    angles = (positions[..., None].float() * model.inv_freq).repeat(1, 2)
    return x * angles.cos() + rotate_half(x) * angles.sin()


@spelled(HALVES)
def halves_of_a_matrix_product(model, x, positions):
    angles = (model.inv_freq[None, :, None].float() @ positions[None, None, :].float()).transpose(1, 2)
    emb = torch.cat((angles, angles), -1)
    cos, sin = emb.cos().to(x.dtype)[:, None], emb.sin().to(x.dtype)[:, None]
    return x * cos + rotate_half(x) * sin


@spelled(HALVES)
def halves_apart(model, x, positions):
    angles = torch.einsum("t,f->tf", positions.float(), model.inv_freq)
    left, right = x[..., :HALF], x[..., HALF:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


@spelled(HALVES)
def halves_of_tables(model, x, positions):
    cos, sin = (torch.cat([table[positions]] * 2, -1)[None, None] for table in (model.cos, model.sin))
    return (x.float() * cos + rotate_half(x.float()) * sin).type_as(x)


@spelled(HALVES)
def halves_by_flip(model, x, positions):
    angles = torch.outer(positions, model.inv_freq)
    turned = x.unflatten(-1, (2, HALF)).flip(-2) * torch.tensor([[-1.0], [1.0]])
    return x * torch.cat([angles, angles], -1).cos() + turned.flatten(-2) * torch.cat([angles, angles], -1).sin()


@spelled(HALVES, channels=8)
def a_part_with_the_rest_behind(model, x, positions):
    angles = positions[:, None] * INVERSE[:4].to(x.device)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    part, rest = x[..., :8], x[..., 8:]
    return torch.cat((part * cos + rotate_half(part) * sin, rest), dim=-1)


@spelled(HALVES)
def halves_of_angles_that_are_filled_in(model, x, positions):
    """Angles of several kinds of positions, those of one kind written over the others'."""
    angles = positions.expand(3, 1, -1)[..., None] * model.inv_freq
    first = angles[0]
    first[..., 1:HALF:3] = angles[1, ..., 1:HALF:3]
    emb = torch.cat((first, first), -1)
    return x * emb.cos() + rotate_half(x) * emb.sin()


@spelled(PAIRS)
def pairs_stacked(model, x, positions):
    cos, sin = model.cos[positions], model.sin[positions]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


@spelled(PAIRS)
def pairs_interleaved(model, x, positions):
    cos, sin = (table[positions].repeat_interleave(2, -1) for table in (model.cos, model.sin))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
    return x * cos + turned * sin


@spelled(PAIRS)
def pairs_complex(model, x, positions):
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * model.freqs_cis[positions]).flatten(3).type_as(x)


@spelled(PAIRS)
def pairs_complex_of_angles(model, x, positions):
    angles = positions[:, None] * model.inv_freq
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (HALF, 2)).contiguous()) * turns).flatten(-2)


@spelled(PAIRS)
def pairs_of_a_run_of_rows(model, x, positions):
    turns = model.freqs_cis[3 : 3 + x.shape[2]].view(1, 1, x.shape[2], HALF)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (HALF, 2))) * turns).flatten(-2)


@spelled(PAIRS)
def pairs_by_a_matrix(model, x, positions):
    cos, sin = model.cos[positions], model.sin[positions]
    turns = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return (turns @ x.unflatten(-1, (HALF, 2))[..., None])[..., 0].flatten(-2)


def captured(model, *args):
    """The graph of `model(*args)` and the nodes that it returns; what it was traced with stays alive."""
    gm = capture(model, *args)
    gm.kept = model, args
    canonicalize(gm, None)
    return gm, next(node for node in reversed(gm.graph.nodes) if node.op == "output").all_input_nodes


def rotations(model, *args):
    """What is found of the one tensor [B, H, T, D] that the graph of `model(*args)` returns."""
    gm, (tokens,) = captured(model, *args)
    return Rotations(gm).of(tokens, 2)


def expected(planes, channels):
    """Frequencies and partners of the first `channels`, the others at rest."""
    half = channels // 2
    partners = list(range(HEAD_DIM))
    frequencies = [0.0] * HEAD_DIM
    for plane in range(half):
        left, right = (plane, plane + half) if planes == HALVES else (2 * plane, 2 * plane + 1)
        partners[left], partners[right] = right, left
        frequencies[left], frequencies[right] = -float(INVERSE[plane]), float(INVERSE[plane])
    return frequencies, partners


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_spelling_is_found_with_its_planes_and_frequencies(name, tokens):
    function, planes, channels = SPELLINGS[name]
    found = rotations(Keys(function), torch.randn(2, tokens, EMBED), torch.arange(3, 3 + tokens))
    frequencies, partners = expected(planes, channels)
    assert list(found.partners) == partners
    assert found.frequencies == pytest.approx(frequencies, rel=1e-5, abs=1e-9)


def test_tokens_in_front_of_heads_are_found_alike():
    def rotate(model, x, positions):
        return halves(model, x.transpose(1, 2), positions).transpose(1, 2)

    hidden, positions = torch.randn(2, TOKENS, EMBED), torch.arange(TOKENS)
    assert rotations(Keys(rotate, False), hidden, positions) == rotations(Keys(halves), hidden, positions)


def test_rotated_keys_that_are_repeated_for_every_query_are_found_alike():
    def rotate(model, x, positions):
        return halves(model, x, positions)[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2)

    hidden, positions = torch.randn(2, TOKENS, EMBED), torch.arange(TOKENS)
    assert rotations(Keys(rotate), hidden, positions) == rotations(Keys(halves), hidden, positions)


def normed(x):
    return x * x.square().mean(-1, keepdim=True).rsqrt()


@pytest.mark.parametrize("after", [False, True])
def test_a_norm_without_weights_before_or_behind_a_rotation_changes_no_angle(after):
    def rotate(model, x, positions):
        return normed(halves(model, x, positions)) if after else halves(model, normed(x), positions)

    hidden, positions = torch.randn(2, TOKENS, EMBED), torch.arange(TOKENS)
    assert rotations(Keys(rotate), hidden, positions) == rotations(Keys(halves), hidden, positions)


def test_weights_behind_a_rotation_are_not_taken_for_one():
    class Weighed(Keys):
        def __init__(self):
            super().__init__(halves)
            self.weight = nn.Parameter(torch.linspace(0.5, 2, HEAD_DIM))

        def forward(self, hidden, positions):
            return super().forward(hidden, positions) * self.weight

    with pytest.raises(NotRotated, match=NO_POSITION):
        rotations(Weighed(), torch.randn(2, TOKENS, EMBED), torch.arange(TOKENS))


def test_half_precision_is_no_reason_to_find_other_frequencies():
    model = Keys(halves_of_a_matrix_product)
    model.proj.to(torch.bfloat16)
    found = rotations(model, torch.randn(2, TOKENS, EMBED, dtype=torch.bfloat16), torch.arange(TOKENS))
    assert found.frequencies == pytest.approx(expected(HALVES, HEAD_DIM)[0], rel=1e-5, abs=1e-9)


def test_positions_of_each_sequence_are_found_alike():
    def rotate(model, x, positions):
        angles = (positions[:, None, :, None] * model.inv_freq).repeat(1, 1, 1, 2)
        return x * angles.cos() + rotate_half(x) * angles.sin()

    found = rotations(Keys(rotate), torch.randn(2, TOKENS, EMBED), torch.arange(2 * TOKENS).view(2, TOKENS))
    assert list(found.partners) == expected(HALVES, HEAD_DIM)[1]


def test_layers_that_do_alike_are_run_once(monkeypatch):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Keys(halves) for _ in range(3))
            for layer in self.layers:
                layer.inv_freq = self.layers[0].inv_freq

        def forward(self, hidden, positions):
            return tuple(layer(hidden, positions) for layer in self.layers)

    from tqcompile.passes import rotary

    runs = []
    monkeypatch.setattr(rotary, "_rotation", lambda found: runs.append(found) or _at_rest())
    gm, outputs = captured(Layers(), torch.randn(2, TOKENS, EMBED), torch.arange(TOKENS))
    finder = Rotations(gm)
    assert len({finder.of(tokens, 2) for tokens in outputs}) == len(runs) == 1


def _at_rest():
    return Rotation((0.0,) * HEAD_DIM, tuple(range(HEAD_DIM)))


def _cleared_in_part(model, x, positions):
    keys = halves(model, x, positions)
    keys[..., 0] = 0
    return keys


NONE_FOUND = {
    "learned positions": (lambda model, x, positions: x + model.cos[positions].repeat(1, 2), NO_POSITION),
    "no positions": (lambda model, x, positions: x * 2, NO_POSITION),
    "a decay": (lambda model, x, positions: x * (-0.01 * positions[:, None]).exp(), NOT_A_ROTATION),
    "another factor for cosines": (
        lambda model, x, positions: (
            x * (positions[:, None] * model.inv_freq).repeat(1, 2).cos() * 2
            + rotate_half(x) * (positions[:, None] * model.inv_freq).repeat(1, 2).sin()
        ),
        NOT_A_ROTATION,
    ),
    "keys that are written into": (_cleared_in_part, WRITTEN),
    "tables written in place": (
        lambda model, x, positions: x * model.cos.mul_(1.0)[positions].repeat(1, 2),
        WRITTEN,
    ),
}


@pytest.mark.parametrize("name", NONE_FOUND)
def test_what_is_no_rotation_by_position_is_not_taken_for_one(name):
    function, reason = NONE_FOUND[name]
    with pytest.raises(NotRotated) as raised:
        rotations(Keys(function), torch.randn(2, TOKENS, EMBED), torch.arange(TOKENS))
    assert str(raised.value) == reason


def test_an_angle_that_is_no_multiple_of_the_position_is_not_taken_for_one():
    def rotate(model, x, positions):
        angles = ((positions[:, None] / 3).floor() * model.inv_freq).repeat(1, 2)
        return x * angles.cos() + rotate_half(x) * angles.sin()

    with pytest.raises(NotRotated, match=NOT_A_ROTATION):
        rotations(Keys(rotate), torch.randn(2, TOKENS, EMBED), torch.arange(TOKENS))


def test_a_slice_stops_where_keys_stop_being_linear():
    """Behind a function of single numbers nothing is: what leaves it is what is rotated."""

    class Normed(Keys):
        weight = nn.Parameter(torch.ones(HEAD_DIM))

        def forward(self, hidden, positions):
            x = self.proj(hidden).view(*hidden.shape[:2], HEADS, HEAD_DIM).transpose(1, 2)
            return halves(self, self.weight * torch.tanh(x), positions)

    gm, (tokens,) = captured(Normed(halves), torch.randn(2, TOKENS, EMBED), torch.arange(TOKENS))
    (source,) = Slicer(gm.graph).slice(tokens, 2).sources
    assert spelling(source) == "mul" and "tanh" in [spelling(operand) for operand in source.all_input_nodes]


@pytest.mark.parametrize(
    ("frequencies", "partners"),
    [((), ()), ((1.0, 1.0), (1, 0)), ((1.0,), (0,)), ((1.0, -1.0), (1,)), ((1.0, -1.0), (1, 2)), ((math.nan,), (0,))],
)
def test_a_rotation_that_is_none_cannot_be_made(frequencies, partners):
    with pytest.raises(ValueError, match="partners"):
        Rotation(frequencies, partners)
