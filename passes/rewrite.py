"""What rewritten nodes call, and the arithmetic of plane shapes: functions of tensors and shapes, not of graphs."""

import torch
from torch.nn.functional import pad

from tqcompile import coding, formats, ops, reference
from tqcompile.layout import along_plane


def strides(shape, seq_dim: int | None) -> tuple:
    """Row-major strides; with `seq_dim`, of planes whose storage has the sequence outermost."""
    order = list(range(len(shape)))
    if seq_dim is not None:
        order.remove(seq_dim)
        order.insert(0, seq_dim)
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return tuple(strides)


def plane_index(items: list) -> tuple:
    """An index of the cache as an index of its planes, whose last dimension is another."""
    return (*items[:-1], slice(None))


def outline(plane: torch.Tensor, dim: int, tokens: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any content, of the shape of the numbers that a plane stands for without its last `tokens`."""
    shape = [*plane.shape[:-1], head_dim]
    shape[dim] -= tokens
    return plane.new_empty(shape, dtype=dtype)


def broadcast(source: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
    return source.expand(*plane.shape[:-1], source.shape[-1])


def reach(mask: torch.Tensor) -> torch.Tensor:
    """The first token that some query of a sequence may see, one past the last, and one past those that need no mask:
    int32 [B or 1, 3].

    All tokens where some query may see none: an additive mask gives such a query the mean of everything. Those that
    need no mask begin at the first token: all queries see them, and nothing is added to their scores.
    """
    mask = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)
    seen, clear = mask, mask
    if mask.dtype != torch.bool:
        seen, clear = ~(mask <= torch.finfo(mask.dtype).min), mask == 0
    length = mask.shape[-1]
    # In int64: Inductor 2.11 mixes the widths up where the length is a symbol.
    token = torch.arange(length, device=mask.device)
    some, blind = seen.flatten(1, 2).any(1), ~seen.any(-1).flatten(1).all(-1)
    first = _first(some, token).masked_fill(blind, 0)
    stop = pad(torch.where(some, token + 1, 0), (0, 1)).amax(-1).masked_fill(blind, length)
    masked = ~clear.flatten(1, 2).all(1) & (token >= first[:, None])
    return torch.stack([first, stop, _first(masked, token)], -1).to(torch.int32)


def _first(tokens: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The first of each row [B, S] that is true; S where there is none. `token` counts them."""
    # One more column: there is no least number of none, where there are no tokens yet. Of zeros: PyTorch would take any
    # other number of padding for a constant, and compile for one length alone.
    length = tokens.shape[-1]
    return pad(torch.where(tokens, token - length, 0), (0, 1)).amin(-1) + length


def bounds(reach: torch.Tensor) -> torch.Tensor:
    """What `reach` says of which tokens are hidden, int32 [B or 1, 2]: all need the mask, which adds more."""
    return reach[:, :2]


def by_head(queries: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
    """Queries or weights [..., T, n], whose leading dimensions the model folds, as [batch, heads, T, n]."""
    return queries.reshape(plane.shape[0], -1, *queries.shape[-2:])


def mask_by_head(
    mask: torch.Tensor, queries: torch.Tensor, plane: torch.Tensor, heads: int | None, tokens: bool
) -> torch.Tensor:
    """A mask of such queries, or of them in so many `heads`, over the tokens of a plane as [batch, heads, T, S].

    Without `tokens` it has one number for all of them: [batch, heads, T, 1].
    """
    leading = queries.shape[:-2] if heads is None else (queries.shape[0] // heads, heads)
    return by_head(mask.expand(*leading, queries.shape[-2], plane.shape[2] if tokens else 1), plane)


def masked(total: torch.Tensor | None, mask: torch.Tensor | None, kind: str, number: float) -> torch.Tensor:
    """The mask that is added to scores after one more step, of a `kind` of `steps.Mask`."""
    if kind == "floor":
        return total.clamp(min=number)
    if kind == "add":
        mask = mask if number == 1 else mask * number
        return mask if total is None else total + mask
    hidden = mask if kind == "fill" else ~mask
    total = torch.zeros_like(hidden, dtype=torch.float32) if total is None else total.float()
    total, hidden = torch.broadcast_tensors(total, hidden)
    return total.masked_fill(hidden, number)


def as_queries(result: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """A result [batch, heads, T, n] with the leading dimensions that the model's queries have."""
    return result.reshape(*queries.shape[:-2], *result.shape[-2:])


@reference.as_stored
def encode(y: torch.Tensor, codec: str) -> tuple[torch.Tensor, ...]:
    return tuple((ops.encode if formats.codec(codec).is_sequential else ops.encoded)(y, codec))


@reference.as_stored
def encode_into(planes: list[torch.Tensor], y: torch.Tensor, positions: torch.Tensor | None, codec: str) -> None:
    """`ops.append` for planes of any number of dimensions, the tokens in the last but one."""
    for plane, code in zip(planes, encode(y, codec)):
        if positions is None:
            plane.copy_(code)
        else:
            # Not `index_copy_`, which Inductor makes a write to a permuted view.
            plane[..., positions, :] = code.to(plane.dtype)


@reference.as_stored
def encode_items(planes: list[torch.Tensor], y: torch.Tensor, index: tuple, codec: str) -> None:
    for plane, code in zip(planes, encode(y, codec)):
        plane[index] = code.to(plane.dtype)


@reference.as_stored
def scatter(planes: list[torch.Tensor], y: torch.Tensor, dim: int, index: torch.Tensor, codec: str) -> None:
    """Codes of the tokens y [..., n] to the places along `dim` that an index of their size names, alike for all n."""
    for plane, code in zip(planes, encode(y, codec)):
        plane.scatter_(dim, along_plane(index, plane), code.to(plane.dtype))


def gather(plane: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """What a plane has of the tokens at the places along `dim` that an index names, alike for all channels."""
    return plane.gather(dim, along_plane(index, plane))


@reference.as_stored
def decode(planes: list[torch.Tensor], codec: str, head_dim: int) -> torch.Tensor:
    return coding.decode(formats.codec(codec), planes, head_dim)
