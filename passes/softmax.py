"""Attention that a model spells out: two products of one cache of keys and one of values, a softmax between them."""

from dataclasses import dataclass

from torch import fx

from tqcompile.passes.nodes import example, spelling, tensor_of
from tqcompile.passes.views import CASTS

_PRODUCTS = {"mul", "mul_", "imul", "__mul__", "__rmul__"}
_QUOTIENTS = {"div", "div_", "truediv", "itruediv", "__truediv__"}
_SUMS = {"add", "add_", "iadd", "__add__", "__radd__"}


@dataclass(frozen=True)
class Chain:
    """softmax(scores * scale + the sum of mask * factor): `nodes` from the scores to the weights, both included."""

    nodes: tuple[fx.Node, ...]
    scale: float
    masks: tuple[tuple[fx.Node, float], ...]


def chain_behind(weights: fx.Node, scores) -> Chain | None:
    """How `weights` come of one of the products `scores`; None where it takes more than a scale and masks to say.

    Nothing else may use what stands between: it is not computed any more.
    """
    nodes, factor, masks, behind = [], 1.0, [], False
    node = weights
    while isinstance(node, fx.Node) and len(node.users) == 1:
        nodes.append(node)
        if node in scores:
            return Chain(tuple(reversed(nodes)), factor, tuple(masks)) if behind else None
        step = _behind(node)
        if step is None or (step.is_softmax and behind) or (not behind and (step.factor, step.mask) != (1.0, None)):
            return None
        behind = behind or step.is_softmax
        masks += [] if step.mask is None else [(step.mask, factor)]
        node, factor = step.source, factor * step.factor
    return None


@dataclass(frozen=True)
class _Step:
    source: fx.Node
    factor: float = 1.0
    mask: fx.Node | None = None
    is_softmax: bool = False


def _behind(node: fx.Node) -> _Step | None:
    """What a node makes its scores or weights of, and how."""
    name, value = spelling(node), tensor_of(node)
    if value is None or not node.args or not value.dtype.is_floating_point:
        return None
    source = node.args[0]
    if name in CASTS:
        return _Step(source) if tensor_of(source) is not None else None
    if name == "dropout":
        return _Step(source) if _drops_nothing(node) else None
    if name == "softmax":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return _Step(source, is_softmax=True) if dim in (-1, value.dim() - 1) else None
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if name in _PRODUCTS and _number(left) != _number(right):
        return _Step(*((right, float(left)) if _number(left) else (left, float(right))))
    if name in _QUOTIENTS and _number(right) and right:
        return _Step(left, 1 / float(right))
    if name in _SUMS and left is not right and None not in (tensor_of(left), tensor_of(right)):
        # The scores are the one that has all of the sizes, and if both have, the one that was computed of queries.
        scores, mask = (left, right) if _comes_from_product(left) else (right, left)
        fits = tensor_of(mask).dtype.is_floating_point and tensor_of(mask).dim() <= value.dim()
        return _Step(scores, mask=mask) if fits and str(tensor_of(scores).shape) == str(value.shape) else None
    return None


def _comes_from_product(node: fx.Node) -> bool:
    while spelling(node) in CASTS | _PRODUCTS | _QUOTIENTS | _SUMS:
        node = next((operand for operand in node.all_input_nodes if tensor_of(operand) is not None), None)
        if node is None:
            return False
    return spelling(node) == "matmul"


def _drops_nothing(node: fx.Node) -> bool:
    given = {**dict(zip(("input", "p", "training"), node.args)), **node.kwargs}
    return given.get("training") is False or given.get("p") == 0


def _number(operand) -> bool:
    return isinstance(example(operand), (int, float)) and not isinstance(operand, fx.Node)


def addends(mask: fx.Node | None, scores) -> tuple[tuple[tuple[fx.Node, float], ...], tuple[fx.Node, ...]]:
    """Masks with factors that a mask is the sum of, where one is a product in `scores`, and the nodes that add them.

    Else the mask itself: what several layers share is added up once.
    """
    parts, sums, pending = [], [], [] if mask is None else [mask]
    while pending:
        node = pending.pop()
        step = _behind(node) if spelling(node) in CASTS | {"add"} and len(node.users) == 1 else None
        if step is None:
            parts.append(node)
            continue
        sums.append(node)
        pending += [operand for operand in (step.source, step.mask) if operand is not None]
    if scores.keys().isdisjoint(parts):
        parts, sums = [] if mask is None else [mask], []
    return tuple((part, 1.0) for part in parts), tuple(sums)
