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
