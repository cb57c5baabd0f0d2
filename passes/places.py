"""What a product of queries or weights with a cache reads: where the cache has its heads and tokens, and as what."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from tqcompile.passes.canonicalize import spelling, tensor_of
from tqcompile.passes.views import View, same_size

PRODUCTS = {"matmul", "linear", "scaled_dot_product_attention", "addmm", "addbmm"}
_SUMS = {"add", "add_", "sub", "sub_", "iadd", "isub", "__add__", "__radd__", "__iadd__"}


@dataclass(frozen=True)
class Places:
    """Plane dimensions of what a product reads: of sequences and heads, or of both in one, and of tokens or pages."""

    heads: tuple[int, ...]
    tokens: tuple[int, ...]


def places_of(view: View, transposed: bool = False) -> Places | None:
    """Where a view [..., tokens, head_dim], or `transposed`, has them; None where it is not of that form.

    What leads is sequences and heads, repeated after the last of them at most, and each plane dimension is in it once.
    """
    rank = tensor_of(view.base).dim()
    if len(view.axes) < 3:
        return None
    *leading, first, second = view.axes
    tokens, channel = (second, first) if transposed else (first, second)
    labels = [label for axis in leading for label in axis]
    heads = [label for label in labels if label != "r"]
    if channel != (rank - 1,) or not tokens or "r" in tokens or not heads or "r" in labels[: len(heads)]:
        return None
    if len(heads) > 2 or sorted((*heads, *tokens)) != list(range(rank - 1)):
        return None
    return Places(tuple(heads), tokens)


def fits(query: fx.Node, cache: fx.Node, grouped: bool = False) -> bool:
    """Whether all that leads is of the same sizes; heads may be one, or fewer where they are `grouped`."""
    left, right = tensor_of(query), tensor_of(cache)
    if left is None or left.dim() != right.dim():
        return False
    pairs = list(zip(left.shape[:-2], right.shape[:-2]))
    return all(same_size(a, b) or (place and (grouped or same_size(b, 1))) for place, (a, b) in enumerate(pairs))


def becomes_weights(product: fx.Node) -> bool:
    """Whether a softmax follows before another product does: then these are scores, of keys that are kept turned."""
    reached = {product: None}
    for node in (queue := [product]):
        for user in node.users:
            name = spelling(user)
            if "softmax" in name:
                return True
            if user not in reached and name not in PRODUCTS and tensor_of(user) is not None:
                reached[user] = None
                queue.append(user)
    return False


def _are_weights(node: fx.Node) -> bool:
    """Whether a softmax comes before a number, and no product between them."""
    reached = {node: None}
    for before in (queue := [node]):
        if "softmax" in spelling(before):
            return True
        for operand in before.all_input_nodes if spelling(before) not in PRODUCTS else ():
            if operand not in reached and tensor_of(operand) is not None:
                reached[operand] = None
                queue.append(operand)
    return False


def roles_of(views: Iterable[fx.Node]) -> set[str]:
    """`keys` and `values`: as what attention reads numbers that are computed from a cache, token by token.

    Followed as far as the first attention, and no further than a sum with what does not come from the cache: behind
    that are the next layers.
    """
    reached, roles = dict.fromkeys(views), set()
    for node in (queue := list(reached)):
        for user in node.users:
            name = spelling(user)
            if name == "scaled_dot_product_attention":
                roles |= {
                    role for role, operand in zip((None, "keys", "values"), user.args) if operand is node and role
                }
            elif name == "matmul" and becomes_weights(user):
                roles.add("keys")
            elif name == "matmul" and user.args[1] is node and _are_weights(user.args[0]):
                roles.add("values")
            elif user not in reached and tensor_of(user) is not None and not _leaves_cache(user, reached):
                reached[user] = None
                queue.append(user)
    return roles


def _leaves_cache(node: fx.Node, reached: dict[fx.Node, None]) -> bool:
    """Whether a node adds to numbers of a cache what does not come from it, and has as many."""
    if spelling(node) not in _SUMS:
        return False
    others = [operand for operand in node.all_input_nodes if operand not in reached and tensor_of(operand) is not None]
    return any(tensor_of(operand).dim() == tensor_of(node).dim() for operand in others)
