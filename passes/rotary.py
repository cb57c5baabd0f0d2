"""Keys that were turned by their positions: which plane each channel turns in, and how fast.

A rotation is linear in what is rotated, however it is spelled. So keys are followed back to what they are a linear
function of, and that part of the graph is run on random numbers at a few positions: what comes out says the rest.
"""

import math
from collections.abc import Callable

import torch
from torch import fx

from tqcompile.centre import Rotation
from tqcompile.passes.nodes import example, spelling, tensor_of
from tqcompile.passes.roles import real
from tqcompile.passes.slices import NO_POSITION, NotRotated, Slice, Slicer

NOT_A_ROTATION = "it is no rotation whose angles grow with a position"

# Where the graph is run, as far as its tables reach: the first two say how fast, the others whether that is all.
PROBES = (0, 1, 2, 7, 64, 1023)
_TOLERANCE, _ROWS = 1e-4, 64

_EXACT = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
_EXACT[torch.complex64] = torch.complex128


class Rotations:
    """Finds rotations in one graph; what several layers do alike is run once."""

    def __init__(self, gm: fx.GraphModule, caches=()):
        self.gm, self.slicer = gm, Slicer(gm.graph, caches)
        self.known: dict[tuple, Rotation | str] = {}

    def of(self, tokens: fx.Node, dim: int) -> Rotation:
        """The rotation of `tokens` [..., head_dim], which lie along `dim`.

        Raises:
            NotRotated: there is none, or none that is found.
        """
        part = self.slicer.slice(tokens, dim)
        key = _structure(part)
        if key not in self.known:
            try:
                self.known[key] = _rotation(_probe(self.gm, part))
            except NotRotated as error:
                self.known[key] = str(error)
        found = self.known[key]
        if isinstance(found, str):
            raise NotRotated(found)
        return found

    def bias(self, tokens: fx.Node, dim: int) -> torch.Tensor | None:
        """What the weights alone say of rotated tokens [B, H, T, D], or with T before H: [H, D] float32 at position 0.

        None where they say nothing: what they are made of has no bias.
        """
        return _constant_part(self.gm, self.slicer.slice(tokens, dim), dim)


def _constant_part(gm: fx.GraphModule, part: Slice, dim: int) -> torch.Tensor | None:
    """What weights alone contribute to the tokens of each head at position zero: [H, D] float32, or None."""
    values: dict[fx.Node, object] = dict(_at(part, 0))
    known = False
    for node in part.sources:
        value = tensor_of(node)
        held = real(_bias_of(node)) if _bias_of(node) is not None else None
        shape = [_number(size) for size in value.shape]
        values[node] = torch.zeros(shape, dtype=torch.float64) if held is None else _exact(held.detach().cpu())
        values[node] = values[node].expand(shape)
        known |= held is not None
    if not known or tensor_of(part.tokens).dim() != 4 or not dim:
        return None
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        tokens = _run(gm, part, values, 0)
    return tokens.select(dim, 0)[0].float().contiguous()


def _bias_of(source: fx.Node) -> fx.Node | None:
    """The weight that is added in what makes a source, or that a source is."""
    if source.op == "placeholder":
        return source if isinstance(real(source), torch.nn.Parameter) else None
    given = {**dict(zip(("input", "weight", "bias"), source.args)), **source.kwargs}
    bias = given.get("bias") if spelling(source) == "linear" else None
    return bias if isinstance(bias, fx.Node) else None


def _structure(part: Slice) -> tuple:
    """Equal for slices that compute the same of the same constants."""
    place = {node: at for at, node in enumerate(part.nodes)}
    rows = []
    for node in part.nodes:
        if node in part.sources or node in part.positions:
            rows.append((node in part.sources, str(example(node).shape), example(node).dtype))
        elif node.op in ("placeholder", "get_attr"):
            rows.append(node.name)
        else:
            given = fx.map_arg((node.args, node.kwargs), lambda operand: f"%{place.get(operand, operand.name)}")
            rows.append((str(node.target), repr(given)))
    return tuple(rows)


def _probe(gm: fx.GraphModule, part: Slice) -> torch.Tensor:
    """[probes, rows, head_dim] float64: tokens made of the same random numbers, all of them at one position each time.

    Raises:
        NotRotated: the graph cannot be run apart.
    """
    generator = torch.Generator().manual_seed(0)
    given = {}
    for node in part.sources:
        shape = [_number(size) for size in tensor_of(node).shape]
        given[node] = torch.randn(shape, generator=generator, dtype=torch.float64)
    found: list[torch.Tensor] = []
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for position in PROBES:
            try:
                found.append(_run(gm, part, {**given, **_at(part, position)}, position))
            except Exception as error:  # whatever an operator of the model raises, past a table's end or at all
                if len(found) < 4:
                    raise NotRotated(f"it cannot be run apart: {type(error).__name__}") from error
                break
    rows = torch.stack(found).flatten(1, -2)
    return rows[:, :: max(1, rows.shape[1] // _ROWS)].double()


def _at(part: Slice, position: int) -> dict[fx.Node, torch.Tensor]:
    kinds = {node: tensor_of(node) for node in part.positions}
    dtypes = {node: torch.float64 if value.is_floating_point() else value.dtype for node, value in kinds.items()}
    return {
        node: torch.full([_number(size) for size in value.shape], position, dtype=dtypes[node])
        for node, value in kinds.items()
    }


def _number(size) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _run(gm: fx.GraphModule, part: Slice, values: dict[fx.Node, object], position: int) -> torch.Tensor:
    """The tokens of a slice for these sources and positions, on a CPU in double precision."""
    runs = dict(part.runs)
    for node in part.nodes:
        if node in values:
            continue
        if node in runs:
            values[node] = values[node.args[0]].narrow(runs[node], position, _number(tensor_of(node).shape[runs[node]]))
            continue
        if tensor_of(node) is None and isinstance(example(node), (int, torch.SymInt)):
            values[node] = _number(example(node))
        elif node.op in ("placeholder", "get_attr"):
            held = real(node) if node.op == "placeholder" else getattr(gm, node.target)
            values[node] = _exact(held.detach().cpu()) if isinstance(held, torch.Tensor) else held
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            args, kwargs = fx.node.map_aggregate((args, kwargs), _exact_argument)
            values[node] = _method(node)(*args, **kwargs)
    return values[part.tokens]


def _method(node: fx.Node) -> Callable:
    if spelling(node) in ("float", "half", "bfloat16"):
        return lambda source: source.double()
    if node.op != "call_method":
        return node.target
    return lambda source, *args, **kwargs: getattr(source, node.target)(*args, **kwargs)


def _exact(value: torch.Tensor) -> torch.Tensor:
    return value.to(_EXACT.get(value.dtype, value.dtype))


def _exact_argument(given):
    if isinstance(given, torch.dtype):
        return _EXACT.get(given, given)
    return torch.device("cpu") if isinstance(given, torch.device) else given


def _rotation(found: torch.Tensor) -> Rotation:
    """Numbers [probes, rows, head_dim] -> the rotation that they show.

    Two channels turn in one plane where what one of them gains in square the other one loses.
    """
    first, head_dim = found[0], found.shape[-1]
    scale = first.square().mean().item()
    gains = (found.square() - first.square()).flatten(0, 1)
    if not math.isfinite(scale) or scale == 0 or gains.abs().max() < _TOLERANCE**3 * scale:
        raise NotRotated(NO_POSITION if scale else NOT_A_ROTATION)
    gram = gains.T @ gains
    own = gram.diagonal()
    cost = own[:, None] + 2 * gram + own[None, :]
    cost.fill_diagonal_(math.inf)
    still = own.sqrt() < _TOLERANCE**3 * scale
    partners = torch.where(still, torch.arange(head_dim), cost.argmin(1))
    moving = [d for d in range(head_dim) if not still[d]]
    if any(partners[partners[d]] != d for d in moving):
        raise NotRotated(NOT_A_ROTATION)
    planes = torch.complex(found, found[..., partners])
    turns = (planes[1] * planes[0].conj()).sum(0)
    # As float32 has them, so that graphs of one model agree to the last bit.
    frequencies = torch.where(still, 0.0, -turns.angle()).float().double()
    frequencies = torch.where(partners < torch.arange(head_dim), -frequencies[partners], frequencies)
    for position, there in zip(PROBES, found):
        angles = frequencies * position
        expected = first * angles.cos() + torch.where(still, 0.0, first[:, partners] * angles.sin())
        if (expected - there).abs().max() > 10 * _TOLERANCE * scale**0.5:
            raise NotRotated(NOT_A_ROTATION)
    return Rotation(tuple(frequencies.tolist()), tuple(partners.tolist()))
