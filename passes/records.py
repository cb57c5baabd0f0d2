"""What a survey finds of caches in a graph, as values: how they grow, what is joined, how attention reads them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from tqcompile.passes.steps import Mask
from tqcompile.passes.views import View


@dataclass(frozen=True)
class Append:
    """`node = cat([cache, tokens], dim)`, which leaves the graph, whole or cut to its last tokens."""

    node: fx.Node
    tokens: fx.Node
    dim: int


@dataclass(frozen=True)
class Join:
    """`node = cat(parts, dim)`, or `stack`: planes of those of the parts that show one cache, the others encoded."""

    node: fx.Node
    parts: tuple[fx.Node, ...]
    dim: int


@dataclass(frozen=True)
class Read:
    """Attention, or one of its two products, over views of caches: kind is `attend`, `logits` or `mix`.

    `left` are the queries, or the weights of a `mix`. Attention is softmax(score_mod(left keys * scale) + masks)
    values, with the logits of `sinks` in the softmax; `absorbed` are the nodes that it is spelled out with.
    """

    node: fx.Node
    kind: str
    key: View | None
    value: View | None
    left: fx.Node
    scale: float | None = None
    score_mod: str = ""
    masks: tuple[Mask, ...] = ()
    sinks: Mask | None = None
    causal: bool = False
    absorbed: tuple[fx.Node, ...] = ()

    @property
    def sides(self) -> Iterator[tuple[str, View, bool]]:
        """What it reads: the role, the view, and whether that is transposed."""
        if self.key is not None:
            yield "keys", self.key, self.kind == "logits"
        if self.value is not None:
            yield "values", self.value, False


def forget_unread(
    joins: dict[fx.Node, Join], views: dict[fx.Node, View], reads: dict[fx.Node, Read], writes: dict[fx.Node, View]
) -> None:
    """Take out what is joined and then decoded for whoever uses it: it is decoded in front, and new parts of it need no
    codes."""
    for node in reversed(list(joins)):
        shown = {node}
        for view in views.values():
            shown |= {view.node} if view.parent in shown else set()
        used = {part for join in joins.values() for part in join.parts}
        used |= {side.node for read in reads.values() for _, side, _ in read.sides}
        users = [user for each in shown for user in each.users]
        if used.isdisjoint(shown) and not any(user.op == "output" or user in writes for user in users):
            del joins[node]
            for each in shown:
                del views[each]
