"""Attention that a model spells out: two products of one cache of keys and one of values, a softmax between them."""

import ast
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from tqcompile import scores
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.repeated import same_value
from tqcompile.passes.sinks import Sink, uncast
from tqcompile.passes.steps import HIDDEN, Mask, Step, behind
from tqcompile.passes.views import CASTS


@dataclass(frozen=True)
class Chain:
    """softmax(score_mod(scores * scale) + masks), one more logit in each row: `nodes` are all between the products."""

    nodes: tuple[fx.Node, ...]
    scale: float = 1.0
    score_mod: str = ""
    masks: tuple[Mask, ...] = ()
    sinks: Mask | None = None


def chain_behind(product: fx.Node, products, sink: Sink | None = None) -> Chain | None:
    """How the weights of `product` come of one of the `products` of queries and keys; None where no rule says.

    Nothing else may use what stands between: it is not computed any more. With a `sink` that goes on to its node.
    """
    last = product if sink is None else sink.node
    steps, nodes, kinds = [], {product, last}, []
    node = product.args[0]
    while node not in products:
        step = behind(node, kinds)
        if step is None:
            return None
        steps.append(step)
        kinds.append(step.kind)
        nodes |= {node, *step.others}
        node = step.source
    nodes |= {node} if sink is None else {node, *sink.others}
    used = {user for each in nodes - {last} for user in each.users}
    if "softmax" not in kinds or kinds.count("drop") != kinds.count("sink") or not used <= nodes:
        return None
    if sink is not None:
        scores = steps[kinds.index("softmax")].source
        if "sink" in kinds or uncast(scores) is not uncast(sink.scores):
            return None
        steps.insert(0, Step(scores, "sink", mask=Mask("rows" if sink.by_row else "add", sink.logits)))
    between = tuple(each for each in product.graph.nodes if each in nodes and each is not last)
    return _folded(Chain(between), reversed(steps), tensor_of(node))


def _folded(chain: Chain, steps: Iterable[Step], product: torch.Tensor) -> Chain | None:
    """The steps from scores to weights, one after the other, as one chain."""
    for step in steps:
        if step.kind in ("mask", "sink"):
            mask = _placed(step, product)
            if mask is None:
                return None
            chain = replace(chain, sinks=mask) if step.kind == "sink" else replace(chain, masks=(*chain.masks, mask))
        elif step.kind == "clear":
            chain = _cleared(chain, step.mask)
            if chain is None:
                return None
        elif step.kind not in ("same", "softmax", "drop"):
            chain = _in_masks(chain, step) if chain.masks else _in_score(chain, step)
            if chain is None:
                return None
    return chain


def _cleared(chain: Chain, hidden: Mask) -> Chain | None:
    """Weights that are zero where a mask hid their scores: all of a row that sees nothing, and others are already.

    A number that is not infinite is no weight only beside a score that no mask hides: where there is another mask there
    may be none.
    """
    same = [each for each in chain.masks if each.kind == hidden.kind and same_value(each.node, hidden.node)]
    if not same:
        return None
    place = chain.masks.index(same[-1])
    stays = same[-1].number == -math.inf and all(each.kind == "add" for each in chain.masks[place + 1 :])
    if not stays and len(chain.masks) > 1:
        return None
    mask = replace(same[-1], number=-math.inf)
    return replace(chain, masks=(*chain.masks[:place], mask, *chain.masks[place + 1 :]))


def _in_score(chain: Chain, step: Step) -> Chain:
    text, number = chain.score_mod or scores.NAME, repr(step.number)
    if step.kind == "scale" and not chain.score_mod:
        return replace(chain, scale=chain.scale * step.number)
    if step.kind in ("scale", "shift"):
        text = f"({text}) {'*' if step.kind == 'scale' else '+'} {number}"
    else:
        text = f"{step.kind}({text}, {number})" if step.kind in ("maximum", "minimum") else f"{step.kind}({text})"
    return replace(chain, score_mod=ast.unparse(ast.parse(text)))


def _in_masks(chain: Chain, step: Step) -> Chain | None:
    """A change of scores that masks were added to, as one of both."""
    if step.kind == "maximum" and step.number <= HIDDEN:
        return replace(chain, masks=(*chain.masks, Mask("floor", None, step.number)))
    masks = tuple(replace(mask, number=mask.number * step.number) for mask in chain.masks)
    if step.kind != "scale" or not all(mask.kind == "add" or mask.number <= HIDDEN for mask in masks):
        return None
    return _in_score(replace(chain, masks=masks), step)


def _placed(step: Step, product: torch.Tensor) -> Mask | None:
    """The mask of a step with its heads, where the scores there have another number of dimensions than the product."""
    rank, heads = tensor_of(step.source).dim(), tensor_of(step.source).shape[1]
    if rank == product.dim():
        return step.mask
    return replace(step.mask, heads=heads) if (product.dim(), rank) == (3, 4) and type(heads) is int else None


def addends(mask: fx.Node | None, products) -> tuple[tuple[Mask, ...], tuple[fx.Node, ...]]:
    """Masks that a mask is the sum of, where one is among the `products` of queries and keys, and what adds them up.

    Else the mask itself: what several layers share is added up once.
    """
    parts, sums, pending = [], [], [] if mask is None else [mask]
    while pending:
        node = pending.pop()
        step = behind(node, ["softmax"]) if spelling(node) in CASTS | {"add"} and len(node.users) == 1 else None
        if step is None or step.kind not in ("same", "mask"):
            parts.append(node)
            continue
        sums.append(node)
        pending += [step.source] if step.mask is None else [step.source, step.mask.node]
    if products.keys().isdisjoint(parts):
        parts, sums = [] if mask is None else [mask], []
    return tuple(Mask("add", part) for part in parts), tuple(sums)
