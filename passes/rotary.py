"""Keys that were turned by their positions: which plane each channel turns in, and how fast.

A rotation is linear in what is rotated, however it is spelled. So keys are followed back to what they are a linear
function of, and that part of the graph is run on random numbers at a few positions: what comes out says the rest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from tqcompile.centre import Rotation
from tqcompile.passes.indices import same_size
from tqcompile.passes.nodes import example, memory_of, spelling, tensor_of, walk, written_operands
from tqcompile.passes.roles import real
from tqcompile.passes.views import CARRIERS, CASTS

_MOVES = {*CARRIERS, "cat", "stack", "squeeze", "chunk", "split", "unbind", "view_as_real", "view_as_complex", "flip"}
_MOVES |= {"real", "imag", "complex", "expand_as", "view_as", "reshape_as", "broadcast_to", "movedim", "swapaxes"}
_SUMS = {"add", "sub", "__add__", "__radd__", "__sub__", "__rsub__", "neg", "__neg__"}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "div", "truediv", "__truediv__", "matmul", "einsum", "addcmul"}

NO_POSITION = "nothing that it is multiplied by depends on a position"
WRITTEN = "what it is computed with is written in place"
NOT_A_ROTATION = "it is no rotation whose angles grow with a position"

# Where the graph is run, as far as its tables reach: the first two say how fast, the others whether that is all.
PROBES = (0, 1, 2, 7, 64, 1023)
_TOLERANCE, _ROWS = 1e-4, 64

_EXACT = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
_EXACT[torch.complex64] = torch.complex128


class NotRotated(Exception):
    """Why tokens are not known to be rotated by their positions."""


@dataclass(frozen=True)
class Slice:
    """The part of a graph, in its order, that makes `tokens` linearly of `sources`.

    `positions` are the tensors of whole numbers, one a token, that the factors in it depend on; or `runs` the rows of
    tables that they are, one a token, and along which dimension.
    """

    tokens: fx.Node
    sources: tuple[fx.Node, ...]
    positions: tuple[fx.Node, ...]
    runs: tuple[tuple[fx.Node, int], ...]
    nodes: tuple[fx.Node, ...]


class Slicer:
    """Slices one graph. `caches` are inputs that hold what earlier calls computed."""

    def __init__(self, graph: fx.Graph, caches=()):
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        written = (operand for node in graph.nodes for operand in written_operands(node))
        self.written = {memory_of(operand) for operand in written if tensor_of(operand) is not None}
        self.contents: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            # What a model computes comes of parameters somewhere; what it computes of positions alone does not.
            own = node in caches or (node.op == "placeholder" and not _is_fixed(node))
            self.contents[node] = own or any(self.contents[operand] for operand in node.all_input_nodes)

    def slice(self, tokens: fx.Node, dim: int) -> Slice:
        """`tokens`, which lie along `dim`, back to the first nodes that they are linear in.

        Raises:
            NotRotated: nothing on the way is a factor that depends on a position.
        """
        sources, inside = {}, {}
        for node in walk([tokens], lambda node: [] if node in sources else self._behind(node, sources)):
            inside[node] = None
        factors = [
            each for node in inside if node not in sources for each in node.all_input_nodes if each not in inside
        ]
        positions, count = {}, str(tensor_of(tokens).shape[dim])
        for node in walk(factors, lambda node: [] if node in positions else node.all_input_nodes):
            inside[node] = None
            if self._is_position(node, count):
                positions[node] = None
        runs = [] if positions else [(node, _run_of(node, count)) for node in inside]
        runs = [(node, along) for node, along in runs if along is not None]
        if not positions and not runs:
            raise NotRotated(NO_POSITION)
        ordered = sorted(inside, key=self.order.__getitem__)
        if any(tensor_of(x) is not None and memory_of(x) in self.written for x in ordered if x not in positions):
            raise NotRotated(WRITTEN)
        return Slice(tokens, tuple(sources), tuple(positions), tuple(runs), tuple(ordered))

    def _behind(self, node: fx.Node, sources: dict[fx.Node, None]) -> list[fx.Node]:
        """The content that a node is linear in; without any it is a source."""
        content = [operand for operand in node.all_input_nodes if self.contents[operand]]
        name = spelling(node)
        pieces = name == "getitem" and not isinstance(example(node.args[0]), torch.Tensor)
        linear = name in _MOVES | CASTS or pieces or (name in _SUMS and len(content) == len(_tensors(node)))
        if content and (linear or (name in _PRODUCTS and self._is_scaled(node, content))):
            return content
        sources[node] = None
        return []

    def _is_scaled(self, node: fx.Node, content: list[fx.Node]) -> bool:
        numerator = spelling(node) in ("div", "truediv", "__truediv__")
        return len(content) == 1 and (not numerator or node.args[0] is content[0])

    def _is_position(self, node: fx.Node, tokens: str) -> bool:
        """Whether a node holds whole numbers, one for each token, or a few."""
        value = tensor_of(node)
        if value is None or (node.op == "placeholder" and _is_constant(node)):
            return False
        whole = not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool)
        return (whole or spelling(node) == "arange") and tokens in map(str, value.shape)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.all_input_nodes if tensor_of(operand) is not None]


def _run_of(node: fx.Node, tokens: str) -> int | None:
    """The dimension along which a node takes as many rows of a constant table as there are tokens."""
    source = node.args[0] if spelling(node) in ("getitem", "narrow") else None
    if tensor_of(source) is None or source.op not in ("placeholder", "get_attr"):
        return None
    old, new = tensor_of(source).shape, tensor_of(node).shape
    cut = [dim for dim, (before, after) in enumerate(zip(old, new)) if not same_size(before, after)]
    return cut[0] if len(old) == len(new) and len(cut) == 1 and str(new[cut[0]]) == tokens else None


def _is_constant(node: fx.Node) -> bool:
    """Whether an input is a tensor that the model holds, and no weight."""
    value, source = real(node), getattr(getattr(node, "_dynamo_source", None), "name", "")
    return (
        value is not None
        and not isinstance(value, torch.nn.Parameter)
        and ("." in str(source) or str(source).startswith("G["))
    )


def _is_fixed(node: fx.Node) -> bool:
    """Whether an input is no number that the model computes, or computes with: a size, a position, a table."""
    value = tensor_of(node)
    return value is None or not (value.dtype.is_floating_point or value.dtype.is_complex) or _is_constant(node)


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
