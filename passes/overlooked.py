"""Inputs that are kept like a cache and that `sites` neither compresses nor refuses: the ones no pattern knows.

A cache is known here by what becomes of it alone: tokens are written into a part of it, or are put behind it and the
longer one is returned. States that are replaced as a whole (of a convolution, of a recurrence) are no caches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tqcompile.cache import CompressedKV
from tqcompile.passes.indices import full, index_items, same_size
from tqcompile.passes.nodes import example, memory_of, sizes_of, spelling, tensor_of, walk, written_operands
from tqcompile.passes.places import PRODUCTS, are_weights, becomes_weights, operands_of, roles_of
from tqcompile.passes.roles import real
from tqcompile.passes.survey import Survey
from tqcompile.passes.views import CARRIERS, shape_only

_SCALED = {"mul", "truediv", "div"}
_INDEXED = {"index_copy_", "index_put_", "index_add_", "scatter_", "scatter_add_"}


@dataclass(frozen=True)
class Overlooked:
    """Cache `root`, the node that shows it to be one, and the first that reads its numbers; None where none does."""

    root: fx.Node
    kept: fx.Node
    reader: fx.Node | None


def overlooked(roots: Iterable[fx.Node]) -> Iterator[Overlooked]:
    """Those of `roots` that tokens are stored in."""
    for root in roots:
        kept, reader = _history(root)
        if kept is not None:
            yield Overlooked(root, kept, reader)


def read_only(roots: Iterable[fx.Node]) -> Iterator[Overlooked]:
    """Those of `roots` that attention reads as they are, whoever made them."""
    for root in roots:
        shown = list(walk([root], _alone))
        reader = next((user for node in shown for user in node.users if _attends(user, node)), None)
        if reader is not None:
            yield Overlooked(root, reader, reader)


def remade(outputs: list[fx.Node], survey: Survey) -> Iterator[Overlooked]:
    """The caches of a survey that come in, grow or are compressed already, and of which nothing leaves but numbers that
    no view shows: tokens that were chosen or changed by an operator that no rule follows."""
    roots = [node for node, view in survey.views.items() if node is view.root]
    caches = {root for root in roots if isinstance(real(root), CompressedKV)}
    caches |= {root for root in roots if any(_continues(user, root) and roles_of([user]) for user in root.users)}
    caches -= {root for node in outputs if node in survey.views for root in survey.views[node].roots}
    caches -= {view.root for view in survey.writes.values()}
    ends = {*survey.views, *survey.reads} if caches else ()
    for node in outputs if caches else ():
        if node in survey.views or tensor_of(node) is None:
            continue
        before = dict.fromkeys(walk([node], lambda each: [] if each in ends else operands_of(each)))
        for source in before:
            root = survey.views[source].root if source in survey.views else None
            if root in caches and _is_as_wide(node, root):
                caches.remove(root)
                yield Overlooked(root, node, _culprit(source, before))


def _culprit(source: fx.Node, before: dict[fx.Node, None]) -> fx.Node:
    """The first node on the way from `source` that does more than to move tokens, or the first of all."""
    first, *others = list(walk([source], lambda each: [user for user in each.users if user in before]))[1:]
    return next((each for each in (first, *others) if spelling(each) not in {*CARRIERS, "cat", "stack"}), first)


def _is_as_wide(node: fx.Node, root: fx.Node) -> bool:
    """Whether a tensor could be tokens of a cache: of its dtype, and of its size but for one of the leading ones."""
    made, held = tensor_of(node), tensor_of(root)
    if made.dtype != held.dtype or made.dim() != held.dim() or not same_size(made.shape[-1], held.shape[-1]):
        return False
    return sum(not same_size(a, b) for a, b in zip(made.shape, held.shape)) <= 1


def _alone(node: fx.Node) -> list[fx.Node]:
    """What hands a tensor's tokens on as they are, or times a number."""
    others = [user for user in node.users if user.op != "output" and spelling(user) not in PRODUCTS]
    lone = [user for user in others if all(operand is node or tensor_of(operand) is None for operand in user.args[:2])]
    return [user for user in lone if _carries(user, node) or spelling(user) in _SCALED]


def _attends(user: fx.Node, node: fx.Node) -> bool:
    if spelling(user) == "scaled_dot_product_attention":
        return node in user.args[1:3]
    right = spelling(user) == "matmul" and user.args[1] is node
    return right and (becomes_weights(user) or are_weights(user.args[0]))


def _history(root: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The first node that keeps tokens in `root` and the first that reads them, of all that its views reach."""
    kept, reader = None, None
    longer: dict[fx.Node, fx.Node] = {}
    reached = {root: None}
    for node in (queue := [root]):
        for user in node.users:
            if user.op == "output":
                kept = kept or _returned(node, longer.get(node))
            elif node in written_operands(user):
                kept = kept or (user if _writes_tokens(user, node, root) else None)
            elif _continues(user, node) and node not in longer:
                longer[user] = user
            elif not _carries(user, node):
                reader = reader or (None if shape_only(user) else user)
                continue
            elif node in longer:
                longer[user] = longer[node]
            if user.op != "output" and tensor_of(user) is not None and user not in reached:
                reached[user] = None
                queue.append(user)
    # Whoever returns a longer tensor that nothing reads has concatenated, and that is all.
    return (None if kept in longer and reader is None else kept), reader


def _carries(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` hands on the tokens of `node`, as a view of it or as a copy, and computes nothing."""
    if tensor_of(user) is None:
        return False
    source = user.args[0] if user.args else user.kwargs.get("input")
    return _share(user, node) or (spelling(user) in CARRIERS and source is node)


def _continues(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` puts tokens behind those of `node`."""
    return spelling(user) == "cat" and isinstance(user.args[0], (tuple, list)) and user.args[0][0] is node


def _returned(node: fx.Node, cat: fx.Node | None) -> fx.Node | None:
    """`cat`, where `node` shows what it made; a cut along the last dimension is the state of a convolution."""
    if cat is None:
        return None
    rank = tensor_of(cat).dim()
    whole = node is cat or sizes_of(node) == sizes_of(cat)
    return cat if whole or cat.args[1] % rank < rank - 1 else None


def _writes_tokens(write: fx.Node, target: fx.Node, root: fx.Node) -> bool:
    """Whether a write changes a part of `root` that could be tokens: not all of it, nor one of a stack of states."""
    if not _share(target, root):
        return False
    if spelling(write) in _INDEXED:
        return True
    if spelling(write) != "setitem":
        return sizes_of(target) not in (sizes_of(root), sizes_of(root)[1:])
    items = index_items(write.args[1], tensor_of(target).dim())
    if items is None or None in items:
        return False
    parts = [not full(item, size) for item, size in zip(items, tensor_of(target).shape)]
    return any(parts[1:]) or (parts[0] and not isinstance(example(items[0]), int))


def _share(node: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors share memory; what a subclass wraps is its memory too."""
    return not _memories(node).isdisjoint(_memories(other))


def _memories(node: fx.Node) -> set[int]:
    value, found = tensor_of(node), {memory_of(node)}
    if is_traceable_wrapper_subclass(value):
        # Not all of them are tensors: a sharded one also names the processes it is sharded over.
        inner = (getattr(value, name) for name in value.__tensor_flatten__()[0])
        found |= {part.untyped_storage()._cdata for part in inner if isinstance(part, torch.Tensor)}
    return found
