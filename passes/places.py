"""What a product of queries or weights with a cache reads: where the cache has its heads and tokens, and as what."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from tqcompile.passes.indices import same_size
from tqcompile.passes.nodes import memory_of, spelling, tensor_of, walk, written_operands
from tqcompile.passes.views import View

PRODUCTS = {"matmul", "linear", "scaled_dot_product_attention", "addmm", "addbmm"}
# What makes one number of several tokens: behind it are no tokens of a cache any more.
_MIXERS = {"sum", "mean", "cumsum", "lerp", "conv1d", "conv2d", "amax", "max", "pool", "avg_pool1d", "unfold"}
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


def alike(key: View, value: View, transposed: bool = False) -> bool:
    """Whether keys, or `transposed` ones, and values have the same sequences and heads, in the same order.

    Products may have both in one dimension and apart.
    """
    sides = (key, places_of(key, transposed)), (value, places_of(value))
    sizes = [[str(tensor_of(view.base).shape[dim]) for dim in places.heads] for view, places in sides]
    folds = [len(view.axes) for view, _ in sides]
    first = [places.heads[0] for _, places in sides]
    same = key.axes[0] == value.axes[0] or (sorted(folds) == [3, 4] and first[0] == first[1] and len(sizes[0]) == 2)
    return same and sizes[0] == sizes[1]


def fits(query: fx.Node, cache: fx.Node, grouped: bool = False) -> bool:
    """Whether all that leads is of the same sizes; heads may be one, or fewer where they are `grouped`."""
    left, right = tensor_of(query), tensor_of(cache)
    if left is None or left.dim() != right.dim():
        return False
    pairs = list(zip(left.shape[:-2], right.shape[:-2]))
    spread = [place for place, (a, b) in enumerate(pairs) if not same_size(a, b)]
    # What is spread over several queries lies behind all heads: in front of them is another order.
    if spread and not all(same_size(b, 1) or (grouped and len(pairs) == 2) for _, b in pairs[max(spread[0], 1) :]):
        return False
    return all(same_size(a, b) or (place and (grouped or same_size(b, 1))) for place, (a, b) in enumerate(pairs))


def becomes_weights(product: fx.Node, loosely: bool = False) -> bool:
    """Whether a softmax follows before another product does: then these are scores.

    `loosely`: what another product takes as weights as it is, or what the graph returns, may be scores too.
    """
    return any(_makes_weights(user, node, loosely) for node in walk([product], _unmultiplied) for user in node.users)


def _makes_weights(user: fx.Node, node: fx.Node, loosely: bool) -> bool:
    weighs = spelling(user) == "matmul" and user.args[0] is node
    # Attention adds its mask to scores.
    mask = spelling(user) == "scaled_dot_product_attention" and user.kwargs.get("attn_mask") is node
    return mask or "softmax" in spelling(user) or (loosely and (weighs or user.op == "output"))


def _unmultiplied(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if spelling(user) not in PRODUCTS and tensor_of(user) is not None]


def are_weights(node: fx.Node) -> bool:
    """Whether a softmax comes before a number, and no product between them."""
    return any("softmax" in spelling(before) for before in walk([node], operands_of))


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node computes from, unless it multiplies them."""
    operands = node.all_input_nodes if spelling(node) not in PRODUCTS else ()
    return [operand for operand in operands if tensor_of(operand) is not None]


def roles_of(views: Iterable[fx.Node]) -> set[str]:
    """`keys` and `values`: as what attention reads numbers that are computed from a cache, token by token.

    Followed as far as the first attention, and no further than a sum with what does not come from the cache: behind
    that are the next layers.
    """
    reached, roles = dict.fromkeys(views), set()
    for node in (queue := list(reached)):
        onward: list[fx.Node] = []
        for user in node.users:
            name = spelling(user)
            if name == "scaled_dot_product_attention":
                roles |= {
                    role for role, operand in zip((None, "keys", "values"), user.args) if operand is node and role
                }
            elif name == "matmul" and becomes_weights(user):
                roles.add("keys")
            elif name == "matmul" and user.args[1] is node and are_weights(user.args[0]):
                roles.add("values")
            elif node in user.args[1:] and written_operands(user):
                # What is written elsewhere goes on from there.
                owner = _owner(written_operands(user)[0])
                onward += [owner] if owner.op != "placeholder" else []
            elif tensor_of(user) is not None and name not in _MIXERS and not _leaves_cache(user, reached):
                onward.append(user)
        fresh = [each for each in dict.fromkeys(onward) if each not in reached]
        reached.update(dict.fromkeys(fresh))
        queue += fresh
    return roles


def _owner(view: fx.Node) -> fx.Node:
    """The tensor whose memory a view shows."""
    while view.args and tensor_of(view.args[0]) is not None and memory_of(view.args[0]) == memory_of(view):
        view = view.args[0]
    return view


def _leaves_cache(node: fx.Node, reached: dict[fx.Node, None]) -> bool:
    """Whether a node adds to numbers of a cache what does not come from it, and has as many."""
    if spelling(node) not in _SUMS:
        return False
    others = [operand for operand in node.all_input_nodes if operand not in reached and tensor_of(operand) is not None]
    return any(tensor_of(operand).dim() == tensor_of(node).dim() for operand in others)
