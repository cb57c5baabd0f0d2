"""What attention reads, followed back to the cached latents that each step makes it of."""

from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tqcompile.passes.indices import full, index_items, same_size
from tqcompile.passes.nodes import spelling, tensor_of

_RESHAPES = {"reshape", "view", "unflatten", "flatten", "unsqueeze", "squeeze"}
_COPIES = {"contiguous", "clone"}
_FRESH = {"empty", "zeros", "new_empty", "new_zeros", "empty_like", "zeros_like"}


@dataclass(frozen=True)
class Piece:
    """Channels of a head: numbers `start` to `start + size` of `weight` times `cache`, of `cache` itself without one.

    The rows of `weight` are those of one head after the other, `rows` each.
    """

    cache: fx.Node
    weight: fx.Node | None
    rows: int
    start: int
    size: int


@dataclass(frozen=True)
class Made:
    """What is made of caches: its dimensions, and the pieces that its channels are joined of.

    A dimension is `batch`, `head`, `token`, `channel`, `rows` (the channels of all heads), or `one`, of that size.
    """

    axes: tuple[str, ...]
    pieces: tuple[Piece, ...]


def is_latent(value: torch.Tensor) -> bool:
    """Whether a tensor is [batch, tokens, n] or [batch, 1, tokens, n]: of no head, or of one that all queries share."""
    shared = value.dim() == 3 or (value.dim() == 4 and same_size(value.shape[1], 1))
    # A symbol that is known to be a number reads as one; of any other, as of tokens that lie last, int() makes a guard.
    return shared and str(value.shape[-1]).isdigit() and not is_traceable_wrapper_subclass(value)


def are_heads(made: Made, transposed: bool = False) -> bool:
    """Whether [batch, heads, tokens, channels], or `transposed`, is one product with a latent beside whole caches."""
    wanted = ("batch", "head", "channel", "token") if transposed else ("batch", "head", "token", "channel")
    named = len(made.axes) == 4 and all(axis in (name, "one") for axis, name in zip(made.axes, wanted))
    whole = all(piece.weight is not None or piece.size == piece.rows for piece in made.pieces)
    return named and whole and sum(piece.weight is not None for piece in made.pieces) == 1


class Tracer:
    """Follows what attention reads back to `caches`, through what changes shapes only and one product with a weight.

    `reached` are the nodes on the way; `parts` those that fill a new tensor, or show what is filled of it, and which.
    """

    def __init__(self, caches: set[fx.Node]):
        self.caches = caches
        self.reached: dict[fx.Node, None] = {}
        self.parts: dict[fx.Node, fx.Node] = {}

    def trace(self, node) -> Made | None:
        """How `node` is made of caches; None where no rule says."""
        if tensor_of(node) is None:
            return None
        if node in self.caches:
            width = int(tensor_of(node).shape[-1])
            leading = ("batch", "token") if tensor_of(node).dim() == 3 else ("batch", "one", "token")
            return Made((*leading, "channel"), (Piece(node, None, width, 0, width),))
        self.reached[node] = None
        name = spelling(node)
        if name == "linear":
            return self._linear(node)
        if name == "cat":
            parts, dim = node.args
            last = dim in (-1, tensor_of(node).dim() - 1)
            return _joined([self.trace(part) for part in parts]) if last and isinstance(parts, (tuple, list)) else None
        if name in _FRESH:
            return self._filled(node)
        rule = _RULES.get(name)
        made = self.trace(node.args[0]) if rule is not None and node.args else None
        return None if made is None else rule(node, made)

    def _linear(self, node: fx.Node) -> Made | None:
        given = {**dict(zip(("input", "weight", "bias"), node.args)), **node.kwargs}
        made, weight = self.trace(given.get("input")), tensor_of(given.get("weight"))
        if made is None or weight is None or weight.dim() != 2 or given.get("bias") is not None:
            return None
        piece, rows = made.pieces[0], weight.shape[0]
        whole = len(made.pieces) == 1 and piece.weight is None and piece.size == piece.rows
        plain = not is_traceable_wrapper_subclass(weight) and isinstance(rows, int)
        if not (whole and plain and made.axes[-1] == "channel" and weight.dtype == tensor_of(node).dtype):
            return None
        return Made((*made.axes[:-1], "rows"), (Piece(piece.cache, given["weight"], rows, 0, rows),))

    def _filled(self, node: fx.Node) -> Made | None:
        """A new tensor whose channels are written, run by run, before it is read."""
        parts, end = [], 0
        fills = [fill for user in node.users if (fill := _fill(user, node)) is not None]
        for run, source, write in sorted(fills, key=lambda fill: fill[0].start):
            self.parts |= {part: node for part in (write, write.args[0]) if part is not node}
            if run.start == run.stop:
                continue
            made = self.trace(source)
            shape = (*tensor_of(node).shape[:-1], run.stop - run.start)
            made = None if made is None else _broadcast(made, tensor_of(source).shape, shape)
            if made is None or run.start != end:
                return None
            parts.append(made)
            end = run.stop
        self.reached |= dict.fromkeys(self.parts)
        return _joined(parts) if end == tensor_of(node).shape[-1] else None


def _fill(user: fx.Node, filled: fx.Node) -> tuple[slice, fx.Node, fx.Node] | None:
    """The channels of a tensor that a user of it writes, what it writes there, and the node that does."""
    if spelling(user) not in ("setitem", "getitem") or user.args[0] is not filled:
        return None
    run = _run(user.args[1], tensor_of(filled))
    if spelling(user) == "setitem":
        return None if run is None or tensor_of(user.args[2]) is None else (run, user.args[2], user)
    if len(user.users) != 1:
        return None
    (write,) = user.users
    alone = spelling(write) == "copy_" and write.args[0] is user and len(write.args) == 2 and not write.users
    return (run, write.args[1], write) if run is not None and alone else None


def _run(index, value: torch.Tensor) -> slice | None:
    """The channels that an index takes, where it takes all else as it is."""
    items = index_items(index, value.dim())
    if items is None or len(items) != value.dim() or not all(full(item) for item in items[:-1]):
        return None
    run, width = items[-1], value.shape[-1]
    if not isinstance(run, slice) or any(isinstance(bound, fx.Node) for bound in (run.start, run.stop, run.step)):
        return None
    start, stop, step = run.indices(width) if isinstance(width, int) else (0, 0, 0)
    return slice(start, stop) if step == 1 and start <= stop else None


def _joined(parts: list[Made | None]) -> Made | None:
    """What has the channels of one part after those of the other."""
    if not parts or None in parts or len({len(part.axes) for part in parts}) != 1:
        return None
    axes = []
    for names in zip(*(part.axes for part in parts)):
        name = set(names) - {"one"} or {"one"}
        if len(name) != 1:
            return None
        axes += name
    pieces = tuple(piece for part in parts for piece in part.pieces)
    return Made(tuple(axes), pieces) if axes[-1] == "channel" else None


def _broadcast(made: Made, old, new) -> Made | None:
    """`made`, repeated for every head, where a dimension of size 1 becomes one that is not."""
    if len(old) != len(new):
        return None
    axes = []
    for name, before, after in zip(made.axes, old, new):
        if not same_size(before, after) and name != "one":
            return None
        axes.append(name if same_size(before, after) else "head")
    return replace(made, axes=tuple(axes))


def _expand(node: fx.Node, made: Made) -> Made | None:
    return _broadcast(made, tensor_of(node.args[0]).shape, tensor_of(node).shape)


def _permute(node: fx.Node, made: Made) -> Made | None:
    return (
        None if node.target is not torch.permute else replace(made, axes=tuple(made.axes[dim] for dim in node.args[1]))
    )


def _reshape(node: fx.Node, made: Made) -> Made | None:
    """Dimensions of size 1 come and go, and the rows of a weight become heads of channels."""
    old = [(name, size) for name, size in zip(made.axes, tensor_of(node.args[0]).shape) if name != "one"]
    new, axes, pieces = list(tensor_of(node).shape), [], made.pieces
    while new:
        size = new.pop(0)
        while old and not same_size(size, old[0][1]) and same_size(old[0][1], 1):
            old.pop(0)
        if old and same_size(size, old[0][1]):
            axes.append(old.pop(0)[0])
        elif same_size(size, 1):
            axes.append("one")
        elif old and old[0][0] == "rows" and new and str(size * new[0]) == str(old[0][1]):
            rows = new.pop(0)
            pieces = tuple(replace(piece, rows=rows, size=rows) for piece in pieces)
            axes += ["head", "channel"]
            old.pop(0)
        else:
            return None
    left = all(same_size(size, 1) for _, size in old)
    return Made(tuple(axes), pieces) if left else None


def _narrow(node: fx.Node, made: Made) -> Made | None:
    source = tensor_of(node.args[0])
    if spelling(node) == "narrow":
        _, dim, start, size = node.args if len(node.args) == 4 else (None,) * 4
        last = dim in (-1, source.dim() - 1) and isinstance(start, int) and isinstance(size, int)
        run = slice(start, start + size) if last else None
    else:
        run = _run(node.args[1], source)
    if run is None or len(made.pieces) != 1 or made.axes[-1] != "channel":
        return None
    (piece,) = made.pieces
    return replace(made, pieces=(replace(piece, start=piece.start + run.start, size=run.stop - run.start),))


_RULES = {
    "permute": _permute,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave"), _expand),
    "narrow": _narrow,
    "getitem": _narrow,
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_COPIES, lambda node, made: made),
}
