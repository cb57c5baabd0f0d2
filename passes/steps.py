"""What one node does to scores on their way into a softmax, or to the weights behind it."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from tqcompile import scores
from tqcompile.passes.indices import full, index_items, same_size
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.sinks import PRODUCTS
from tqcompile.passes.views import CASTS

_QUOTIENTS = {"div", "div_", "truediv", "itruediv", "__truediv__"}
_SUMS = {"add", "add_", "iadd", "__add__", "__radd__"}
_DIFFERENCES = {"sub", "sub_", "isub", "__sub__"}
_FOLDS = {"reshape", "view", "flatten", "unflatten"}
_FLOORS = {"maximum", "max", "clamp_min"}
_CLAMPS = {"clamp", "clip", "clamp_", "clip_"}
_FILLS = {"where", "masked_fill", "masked_fill_"}
_POINTWISE = CASTS | _FOLDS | PRODUCTS | _QUOTIENTS | _SUMS | _DIFFERENCES | _CLAMPS | _FILLS | {*scores.FUNCTIONS}

# A number that no score comes near, so that a score which is replaced by it is one that it is added to.
HIDDEN = -1e8


@dataclass(frozen=True)
class Mask:
    """A step of the mask that is added to scores.

    `add`: `node` times `number`, or one bool tensor that says what is kept; `fill`: `number` where the bool `node` is
    true, `keep`: where it is not; `floor`: nothing below `number`; `rows`: a logit for each row, without the last
    dimension of scores. Where a model has sequences and heads apart while its product has them in one dimension, there
    are `heads`.
    """

    kind: Literal["add", "fill", "keep", "floor", "rows"]
    node: fx.Node | None
    number: float = 1.0
    heads: int | None = None


@dataclass(frozen=True)
class Step:
    """What a node does to its `source`, whose scores or weights it changes, and what else computes nothing but that."""

    source: fx.Node
    kind: str = "same"
    number: float = 1.0
    mask: Mask | None = None
    others: tuple[fx.Node, ...] = ()


def behind(node, later: list[str]) -> Step | None:
    """What a node makes its scores, or its weights, of; `later` are the kinds of the steps that follow it."""
    value = tensor_of(node)
    if value is None or not node.op.startswith("call_") or not node.args or not value.dtype.is_floating_point:
        return None
    name, source = spelling(node), node.args[0]
    if name in CASTS or (name == "dropout" and _drops_nothing(node)):
        return Step(source) if tensor_of(source) is not None else None
    if name in _FOLDS and tensor_of(source) is not None:
        kept = all(map(same_size, tensor_of(source).shape[-2:], value.shape[-2:]))
        return Step(source) if kept else None
    if "softmax" not in later:
        return _behind_weights(node, name, source, value)
    if name == "cat":
        return _sink(node, later) if "drop" in later and "sink" not in later else None
    # Behind the last logit nothing but what a softmax does not see may change the scores.
    if "drop" in later and "sink" not in later:
        return _less_its_maximum(node, name)
    return _less_its_maximum(node, name) or _number_step(node, name, source) or _mask_step(node, name, value)


def _behind_weights(node: fx.Node, name: str, source, value: torch.Tensor) -> Step | None:
    if name == "softmax":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return Step(source, "softmax") if dim in (-1, value.dim() - 1) else None
    if name in _FILLS:
        fill = _fill(node, name, value)
        return Step(fill.source, "clear", mask=fill.mask, others=fill.others) if fill and not fill.number else None
    if name != "getitem" or tensor_of(source) is None:
        return None
    items = index_items(node.args[1], value.dim())
    whole = items is not None and len(items) == value.dim() and all(map(full, items[:-1]))
    return Step(source, "drop") if whole and items[-1] == slice(None, -1) else None


def _sink(node: fx.Node, later: list[str]) -> Step | None:
    """One more logit behind those of the tokens, whose weight is dropped."""
    parts, dim = node.args
    if dim not in (-1, tensor_of(node).dim() - 1) or len(parts) != 2:
        return None
    # The weight of the last is dropped: that has to be the one, and the only one, which was put there.
    return Step(parts[0], "sink", mask=Mask("add", parts[1])) if same_size(tensor_of(parts[1]).shape[-1], 1) else None


def _less_its_maximum(node: fx.Node, name: str) -> Step | None:
    """`x - x.max(-1, keepdim=True)`, which a softmax does not see."""
    if name not in _DIFFERENCES or len(node.args) != 2 or tensor_of(node.args[1]) is None:
        return None
    source, part = node.args
    others = (part,)
    if spelling(part) == "getitem" and part.args[1] == 0:
        part = part.args[0]
        others = (*others, part)
    if spelling(part) not in ("max", "amax") or part.args[0] is not source:
        return None
    given = {**dict(zip(("input", "dim", "keepdim"), part.args)), **part.kwargs}
    last = given.get("dim") in (-1, (-1,), [-1], tensor_of(source).dim() - 1)
    return Step(source, others=others) if last and given.get("keepdim") is True else None


def _number_step(node: fx.Node, name: str, source) -> Step | None:
    """What is done to every score alike."""
    if name in scores.FUNCTIONS and len(node.args) == 1 and not node.kwargs:
        return Step(source, name)
    if name in _CLAMPS:
        given = {**dict(zip(("input", "min", "max"), node.args)), **node.kwargs}
        bounds = [(kind, given.get(key)) for kind, key in (("maximum", "min"), ("minimum", "max")) if key in given]
        bounds = [(kind, bound) for kind, bound in bounds if bound is not None]
        one = len(bounds) == 1 and type(bounds[0][1]) in (int, float)
        return Step(source, bounds[0][0], float(bounds[0][1])) if one else None
    if name in ("neg", "__neg__"):
        return Step(source, "scale", -1.0)
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if _number(left) is not None and name in PRODUCTS | _SUMS:
        left, right = right, left
    number = _number(right)
    if number is None or not math.isfinite(number) or tensor_of(left) is None:
        return None
    if name in PRODUCTS or (name in _QUOTIENTS and number):
        return Step(left, "scale", number if name in PRODUCTS else 1 / number)
    if name in _SUMS | _DIFFERENCES:
        return Step(left, "shift", number if name in _SUMS else -number)
    kind = "maximum" if name in _FLOORS else "minimum" if name in ("minimum", "min", "clamp_max") else None
    return Step(left, kind, number) if kind else None


def _mask_step(node: fx.Node, name: str, value: torch.Tensor) -> Step | None:
    """What tokens are hidden by, or have added to their scores."""
    if name in _FILLS:
        return _filled(node, name, value)
    if name not in _SUMS | _DIFFERENCES or len(node.args) != 2 or node.kwargs or None in map(tensor_of, node.args):
        return None
    left, right = node.args
    # The scores are the one that has all of the sizes, and if both have, the one that was computed of queries.
    source, mask = (left, right) if name in _DIFFERENCES or _comes_from_product(left) else (right, left)
    fits = left is not right and tensor_of(mask).dtype.is_floating_point and tensor_of(mask).dim() <= value.dim()
    same = str(tensor_of(source).shape) == str(value.shape)
    number = -1.0 if name in _DIFFERENCES else 1.0
    return Step(source, "mask", mask=Mask("add", mask, number)) if fits and same else None


def _fill(node: fx.Node, name: str, value: torch.Tensor) -> Step | None:
    """A number that is put in the place of others, by a bool mask."""
    if len(node.args) != 3 or node.kwargs:
        return None
    source, hidden, number, kind = *node.args, "fill"
    if name == "where":
        chosen, first, second = node.args
        kept = _number(second) is not None
        source, hidden, number, kind = (first, chosen, second, "keep") if kept else (second, chosen, first, "fill")
    number = _number(number)
    is_mask = tensor_of(hidden) is not None and tensor_of(hidden).dtype == torch.bool
    if number is None or not is_mask or tensor_of(source) is None or str(tensor_of(source).shape) != str(value.shape):
        return None
    others = ()
    if spelling(hidden) == "expand_as" and hidden.args[1] is source:
        # To fill a tensor by a mask expands that as well.
        others, hidden = (hidden,), hidden.args[0]
    return Step(source, "fill", number, Mask(kind, hidden, number), others)


def _filled(node: fx.Node, name: str, value: torch.Tensor) -> Step | None:
    """Scores of hidden tokens are a number that none comes near: the least of its dtype is the least of float32."""
    step = _fill(node, name, value)
    number = math.inf if step is None else step.number
    if number != -math.inf and number <= torch.finfo(value.dtype).min:
        number = torch.finfo(torch.float32).min
    return replace(step, kind="mask", mask=replace(step.mask, number=number)) if number <= HIDDEN else None


def _comes_from_product(node: fx.Node) -> bool:
    while spelling(node) in _POINTWISE:
        numbers = (x for x in node.all_input_nodes if tensor_of(x) is not None and tensor_of(x).is_floating_point())
        node = next(numbers, None)
        if node is None:
            return False
    return spelling(node) == "matmul"


def _drops_nothing(node: fx.Node) -> bool:
    given = {**dict(zip(("input", "p", "training"), node.args)), **node.kwargs}
    return given.get("training") is False or given.get("p") == 0


def _number(operand) -> float | None:
    """A number that is written down, also as a tensor of no dimensions that is made of one."""
    if isinstance(operand, fx.Node):
        made = {"full": 1, "tensor": 0, "scalar_tensor": 0, "as_tensor": 0}.get(spelling(operand))
        one = tensor_of(operand) is not None and tensor_of(operand).dim() == 0 and made is not None
        return _number(operand.args[made]) if one and len(operand.args) > made else None
    return float(operand) if type(operand) in (int, float) else None
