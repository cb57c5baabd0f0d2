"""How a value that the model computes from a cache relates to the cache's planes."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from tqcompile.passes.indices import full, index_items, names_tokens, same_size
from tqcompile.passes.nodes import memory_of, spelling, tensor_of, times_of

Axis = tuple  # the plane dimensions that one dimension of a view is made of, "r" where a token is repeated

_SHAPE_ONLY = {
    "size",
    "numel",
    "dim",
    "stride",
    "shape",
    "dtype",
    "device",
    "ndim",
    "is_contiguous",
    "nelement",
    "sym_size",
}
CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "_to_copy"}
_RETURN_SELF = {"index_copy_", "copy_", "scatter_", "zero_"}
_COPIES = {"contiguous", "detach", "alias"}


@dataclass(frozen=True)
class View:
    """Node `node` of the model, seen from the cache `root`.

    The planes of `base` hold its tokens: `base` is the cache or a value that moves whole tokens of it, and its
    planes come from the same operator on the planes of its parent. `axes` says which plane dimension each
    dimension of the node is. A write to a node with `writable` reaches those planes. They lie in the memory that
    stands for the dense memory of `owner`. Tokens that were joined are of `also`, other caches, too.
    """

    node: fx.Node
    root: fx.Node
    base: fx.Node
    parent: fx.Node | None
    axes: tuple[Axis, ...]
    writable: bool
    owner: fx.Node
    also: tuple[fx.Node, ...] = ()

    @property
    def roots(self) -> tuple[fx.Node, ...]:
        """The caches whose tokens it shows."""
        return self.root, *self.also

    @property
    def plain(self) -> bool:
        """Whether the dimensions of the node are those of the planes, one for one."""
        return self.axes == identity(len(self.axes))


def root_view(node: fx.Node) -> View:
    """The view a cache has of itself."""
    return View(node, node, node, None, identity(tensor_of(node).dim()), True, node)


def whole(view: View) -> bool:
    """Whether a view is the cache itself, under another name."""
    return view.base is view.root and view.writable and view.plain


def shape_only(node: fx.Node) -> bool:
    """Whether a node asks for a tensor's shape or type and never for its numbers."""
    return spelling(node) in _SHAPE_ONLY and tensor_of(node) is None


def written_value(node: fx.Node) -> fx.Node:
    """The tensor whose object an in-place operator hands back: `cache` for `cache.index_copy_(...)`."""
    while node.op.startswith("call_") and spelling(node) in _RETURN_SELF and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def derived(node: fx.Node, parent: View) -> View | None:
    """The view that `node` is of the cache its first argument views, or None where no rule says."""
    value = tensor_of(node)
    if value is None or node.args[0] is not parent.node:
        return None
    name = spelling(node)
    rule = _RULES.get(name)
    return rule(node, parent, value) if rule is not None else None


def identity(rank: int) -> tuple[Axis, ...]:
    return tuple((dim,) for dim in range(rank))


def _moved(node: fx.Node, parent: View, value: torch.Tensor, fresh: bool = False) -> View:
    """`node` moves whole tokens: its planes are those of its parent under the same operator, copied where `fresh`."""
    owner, axes = node if fresh else parent.owner, identity(value.dim())
    return View(node, parent.root, node, parent.node, axes, fresh or parent.writable, owner, parent.also)


def _relabelled(node: fx.Node, parent: View, axes) -> View:
    """`node` shows the same planes under other labels."""
    return replace(parent, node=node, parent=parent.node, axes=tuple(axes), writable=False)


def _same_tensor(node: fx.Node, parent: View) -> bool:
    """Whether a copy or cast had nothing to do, and hands back the tensor that it was given."""
    value, source = tensor_of(node), tensor_of(parent.node)
    same = memory_of(node) == memory_of(parent.node)
    return same and value.dtype == source.dtype and value.stride() == source.stride()


def _getitem(node: fx.Node, parent: View, value: torch.Tensor) -> View | None:
    source = tensor_of(parent.node)
    items = index_items(node.args[1], source.dim())
    if items is None:
        return None
    if any(item is None for item in items):
        if not all(item is None or full(item) for item in items):
            return None
        axes, kept = [], iter(parent.axes)
        for item in items:
            axes.append(() if item is None else next(kept))
        return _relabelled(node, parent, axes)
    if all(full(item) for item in items):
        return replace(parent, node=node, parent=parent.node)
    if not parent.plain or not full(items[-1], source.shape[-1]):
        return None
    return _moved(node, parent, value, fresh=any(tensor_of(item) is not None for item in items))


def _permute(node: fx.Node, parent: View, value: torch.Tensor) -> View:
    order = node.args[1]
    if parent.plain and order[-1] == value.dim() - 1:
        return _moved(node, parent, value)
    return _relabelled(node, parent, [parent.axes[dim] for dim in order])


def _along(node: fx.Node, parent: View, value: torch.Tensor) -> View | None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    rank = tensor_of(parent.node).dim()
    if not parent.plain or not isinstance(dim, int) or dim % rank == rank - 1:
        return None
    if spelling(node) == "gather" and not names_tokens(node, tensor_of(parent.node)):
        return None
    return _moved(node, parent, value, fresh=spelling(node) in ("index_select", "gather"))


def _clone(node: fx.Node, parent: View, value: torch.Tensor) -> View:
    return _moved(node, parent, value, fresh=True) if parent.plain else _relabelled(node, parent, parent.axes)


def _roll(node: fx.Node, parent: View, value: torch.Tensor) -> View | None:
    dims = node.kwargs.get("dims", node.args[2] if len(node.args) > 2 else None)
    dims = (dims,) if isinstance(dims, int) else dims
    if not parent.plain or not dims or any(dim % value.dim() == value.dim() - 1 for dim in dims):
        return None
    return _moved(node, parent, value, fresh=True)


def _copy(node: fx.Node, parent: View, value: torch.Tensor) -> View:
    if _same_tensor(node, parent):
        return replace(parent, node=node, parent=parent.node)
    return _relabelled(node, parent, parent.axes)


def _cast(node: fx.Node, parent: View, value: torch.Tensor) -> View | None:
    source = tensor_of(parent.node)
    if value.device != source.device or not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        return None
    return _copy(node, parent, value)


def _unsqueeze(node: fx.Node, parent: View, value: torch.Tensor) -> View | None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if type(dim) is not int:
        return None
    axes = list(parent.axes)
    axes.insert(dim % value.dim(), ())
    return _relabelled(node, parent, axes)


def _expand(node: fx.Node, parent: View, value: torch.Tensor) -> View | None:
    source = tensor_of(parent.node)
    if value.dim() != source.dim():
        return None
    axes = []
    for axis, old, new in zip(parent.axes, source.shape, value.shape):
        if same_size(old, new):
            axes.append(axis)
        elif axis == ():
            axes.append(("r",))
        else:
            return None
    return _relabelled(node, parent, axes)


def _reshape(node: fx.Node, parent: View, value: torch.Tensor) -> View | None:
    """Dimensions that are merged, or taken apart into the plane dimensions that they were made of."""
    sizes = tensor_of(parent.base).shape
    if value.dtype != tensor_of(parent.node).dtype:
        return None
    new = list(value.shape)
    old = _without_new_axes(list(zip(tensor_of(parent.node).shape, parent.axes)), len(new))
    axes = []
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        while not same_size(prod(size for size, _ in left), prod(right)):
            # Whichever is the shorter takes the next: where that cannot be told of symbols, the view.
            if old and not (new and _divides(prod(right), prod(size for size, _ in left))):
                left.append(old.pop(0))
            elif new:
                right.append(new.pop(0))
            else:
                return None
        parts = _apart(tuple(label for _, axis in left for label in axis), right, sizes)
        if parts is None:
            return None
        axes += parts
    # What is left over has one element.
    if old or not all(same_size(size, 1) for size in new):
        return None if any(axis for _, axis in old) or new else _relabelled(node, parent, axes)
    return _relabelled(node, parent, axes + [()] * len(new))


def _without_new_axes(dims: list[tuple], rank: int) -> list[tuple]:
    """Sizes and axes with as few that were put in as a view of `rank` dimensions can have."""
    surplus, kept = len(dims) - rank, []
    for size, axis in dims:
        if surplus > 0 and axis == ():
            surplus -= 1
        else:
            kept.append((size, axis))
    return kept


def _divides(small, large) -> bool:
    """Whether two sizes are numbers and the second is a larger multiple of the first."""
    return isinstance(small, int) and isinstance(large, int) and small < large


def _apart(labels: Axis, sizes: list, planes: torch.Size) -> list[Axis] | None:
    """`labels` shared out to dimensions of these sizes: one whole axis, or a plane dimension each beside sizes of 1."""
    wide = [place for place, size in enumerate(sizes) if not same_size(size, 1)]
    axes: list[Axis] = [()] * len(sizes)
    if len(wide) <= 1:
        axes[wide[0] if wide else 0] = labels
        return axes
    labels = tuple(label for label in labels if label == "r" or not same_size(planes[label], 1))
    if len(labels) != len(wide):
        return None
    for place, label in zip(wide, labels):
        if label != "r" and not same_size(planes[label], sizes[place]):
            return None
        axes[place] = (label,)
    return axes


def _repeat(node: fx.Node, parent: View, value: torch.Tensor) -> View | None:
    """A dimension of size 1 is repeated; to tile any other gives heads in another order, and copies whole tokens."""
    times = times_of(node)
    if len(times) != len(parent.axes):
        return None
    if any(n != 1 for n, axis in zip(times, parent.axes) if axis != ()):
        whole_tokens = parent.plain and type(times[-1]) is int and times[-1] == 1
        return _moved(node, parent, value, fresh=True) if whole_tokens else None
    return _relabelled(node, parent, [axis or (() if n == 1 else ("r",)) for n, axis in zip(times, parent.axes)])


def _repeat_interleave(node: fx.Node, parent: View, value: torch.Tensor) -> View | None:
    repeats = node.kwargs.get("repeats", node.args[1] if len(node.args) > 1 else None)
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    axes = list(parent.axes)
    axes[dim] = axes[dim] + ("r",)
    return _relabelled(node, parent, axes)


_RULES = {
    "getitem": _getitem,
    "permute": _permute,
    **dict.fromkeys(("narrow", "select", "index_select", "gather"), _along),
    "clone": _clone,
    "roll": _roll,
    **dict.fromkeys(_COPIES, _copy),
    **dict.fromkeys(CASTS, _cast),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten"), _reshape),
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
}

CARRIERS = frozenset(_RULES)
"""Names of the operators that hand on tokens as they are, in some form at least."""
