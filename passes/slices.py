"""Tokens followed back to what they are a linear function of, and to the positions that its factors come of."""

from dataclasses import dataclass

import torch
from torch import fx

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
        self.writers: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            for operand in written_operands(node):
                if tensor_of(operand) is not None:
                    self.writers.setdefault(memory_of(operand), []).append(node)
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
        for node in walk(factors, lambda node: [] if node in positions else self._before(node, tokens)):
            inside[node] = None
            if self._is_position(node, count):
                positions[node] = None
        runs = [] if positions else [(node, _run_of(node, count)) for node in inside]
        runs = [(node, along) for node, along in runs if along is not None]
        if not positions and not runs:
            raise NotRotated(NO_POSITION)
        ordered = sorted(inside, key=self.order.__getitem__)
        # What the model holds must not be written by running a part of its graph, and content is not followed there.
        kept = [node for node in ordered if self.contents[node] or node.op in ("placeholder", "get_attr")]
        if any(self._written(node) for node in kept if node not in positions):
            raise NotRotated(WRITTEN)
        return Slice(tokens, tuple(sources), tuple(positions), tuple(runs), tuple(ordered))

    def _written(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that write into the memory of a tensor."""
        return [] if tensor_of(node) is None else self.writers.get(memory_of(node), [])

    def _before(self, node: fx.Node, tokens: fx.Node) -> list[fx.Node]:
        """What a factor is computed from, and what is written into that before the tokens are there."""
        writers = [writer for writer in self._written(node) if self.order[writer] < self.order[tokens]]
        if any(self.contents[writer] for writer in writers):
            raise NotRotated(WRITTEN)
        return [*node.all_input_nodes, *writers]

    def _behind(self, node: fx.Node, sources: dict[fx.Node, None]) -> list[fx.Node]:
        """The content that a node is linear in; without any it is a source."""
        content = [operand for operand in node.all_input_nodes if self.contents[operand]]
        name = spelling(node)
        pieces = name == "getitem" and not isinstance(example(node.args[0]), torch.Tensor)
        linear = name in _MOVES | CASTS or pieces or (name in _SUMS and len(content) == len(_tensors(node)))
        if content and (linear or (name in _PRODUCTS and self._is_scaled(node, content))):
            return content
        scales = [operand for operand in content if same_size(tensor_of(operand).shape[-1], 1)]
        if name in _PRODUCTS and len(content) == 2 and len(scales) == 1 and node.args[0] is not scales[0]:
            # One number for all channels of a token, as a norm without weights has, leaves a rotation what it is.
            sources[scales[0]] = None
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
