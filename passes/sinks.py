"""A logit beside the scores that a model spells behind the values: their mix times `sigmoid(logsumexp(scores) - sink)`.

With that as a factor each weight is `exp(score) / (sum(exp(scores)) + exp(sink))`, what a softmax gives that has the
logit in it.
"""

from dataclasses import dataclass

from torch import fx

from tqcompile.passes.indices import full, index_items, same_size
from tqcompile.passes.nodes import sizes_of, spelling, tensor_of
from tqcompile.passes.views import CASTS

PRODUCTS = {"mul", "mul_", "imul", "__mul__", "__rmul__"}


@dataclass(frozen=True)
class Sink:
    """`node` is a mix of values times that factor; `others` compute nothing but the factor, of `scores` and `logits`.

    The logits lack the last dimension of the scores where they are `by_row`.
    """

    node: fx.Node
    scores: fx.Node
    logits: fx.Node
    by_row: bool
    others: tuple[fx.Node, ...]


def sink_behind(product: fx.Node) -> Sink | None:
    """The factor that all there is of `product` is multiplied by, where it is one that a logit makes."""
    node = next(iter(product.users), None)
    if len(product.users) != 1 or spelling(node) not in PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    squashed, others = _behind_columns(node.args[1] if node.args[0] is product else node.args[0])
    if squashed is None or spelling(squashed) != "sigmoid" or sizes_of(node) != sizes_of(product):
        return None
    difference, casts = _behind_columns(*squashed.args[:1])
    if difference is None or spelling(difference) not in ("sub", "__sub__") or len(difference.args) != 2:
        return None
    total, more = _behind_columns(difference.args[0])
    if total is None or spelling(total) != "logsumexp" or difference.kwargs or not _over_the_last(total):
        return None
    scores, logits = total.args[0], difference.args[1]
    # The logits make no more rows than there are, and the factor is one number for each.
    if tensor_of(logits) is None or sizes_of(difference) != sizes_of(difference.args[0]):
        return None
    factor, rank = tensor_of((*others, squashed)[0]), tensor_of(scores).dim()
    if factor.dim() != rank or not same_size(factor.shape[-1], 1) or not tensor_of(logits).dtype.is_floating_point:
        return None
    by_row = tensor_of(difference).dim() < rank
    return Sink(node, scores, logits, by_row, (*others, squashed, *casts, difference, *more, total))


def uncast(node: fx.Node) -> fx.Node:
    """What a tensor is a copy of in another dtype."""
    while spelling(node) in CASTS and tensor_of(node.args[0]) is not None:
        node = node.args[0]
    return node


def _behind_columns(node=None) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """What a tensor is but for its dtype, and a last dimension of 1; and the nodes in between, the last first."""
    passed = []
    while tensor_of(node) is not None and (spelling(node) in CASTS or _makes_a_column(node)):
        passed.append(node)
        node = node.args[0]
    return (node if tensor_of(node) is not None else None), tuple(passed)


def _makes_a_column(node: fx.Node) -> bool:
    if spelling(node) == "getitem" and tensor_of(node.args[0]) is not None:
        *kept, last = index_items(node.args[1], tensor_of(node.args[0]).dim()) or (0,)
        return last is None and all(map(full, kept))
    dim = node.args[1] if spelling(node) == "unsqueeze" and len(node.args) == 2 else None
    return dim is not None and dim in (-1, tensor_of(node).dim() - 1)


def _over_the_last(total: fx.Node) -> bool:
    given = {**dict(zip(("input", "dim"), total.args)), **total.kwargs}
    return given.get("dim") in (-1, (-1,), [-1], tensor_of(total.args[0]).dim() - 1)
