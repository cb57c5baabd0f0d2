"""What attention takes a cache for, keys or values, and the codec that it gets for that."""

import torch
from torch import fx

from tqcompile import formats
from tqcompile.cache import CompressedKV
from tqcompile.codec import Codec
from tqcompile.layout import layout_of
from tqcompile.passes.nodes import sizes_of, spelling
from tqcompile.passes.places import places_of, roles_of
from tqcompile.passes.records import Append
from tqcompile.passes.survey import Survey
from tqcompile.passes.views import View


def real(node: fx.Node) -> torch.Tensor | None:
    """The tensor that Dynamo traced a placeholder with, while it is still alive."""
    argument = node.meta.get("grapharg")
    value = argument.example if argument is not None else None
    return value if isinstance(value, torch.Tensor) else None


def role_of(survey: Survey, root: fx.Node, context) -> str | None:
    """`keys` or `values`, as attention reads it; None where nothing does, `both` where it is read as both."""
    roles = {role for role, _, _ in _sides(survey, root)}
    if not roles:
        codec = held_codec(root)
        return None if codec is None else "keys" if codec is context.options.key_codec else "values"
    return one_role(roles)


def one_role(roles: set[str]) -> str | None:
    return "both" if len(roles) > 1 else next(iter(roles), None)


def _sides(survey: Survey, root: fx.Node) -> list[tuple[str, View, bool]]:
    """What reads a cache, as `Read.sides` says it."""
    return [side for read in survey.reads.values() for side in read.sides if root in side[1].roots]


def role_beside(survey: Survey, root: fx.Node, context) -> str | None:
    """What a past is that nothing here reads, where another grows beside it by as many tokens and is read."""
    own = {survey.views[node].root: append for node, append in survey.appends.items()}
    if root not in own:
        return None
    sizes = _sizes_beside(own[root])
    roles = {role_of(survey, other, context) for other, append in own.items() if _sizes_beside(append) == sizes}
    others = {"keys": "values", "values": "keys"}
    return others.get(next(iter(roles - {None}), "")) if len(roles - {None}) == 1 else None


def _sizes_beside(append: Append) -> tuple:
    return append.dim, *sizes_of(append.tokens)[:-1]


def held_codec(root: fx.Node) -> Codec | None:
    """The codec of a cache that came in compressed."""
    held = real(root) if root.op == "placeholder" else None
    return held.codec if isinstance(held, CompressedKV) else None


def codec_of(root: fx.Node, role: str, context) -> Codec:
    """The codec of keys for what is read as both, and whatever the options say the one that a cache has already.

    Encoding codes anew would lose a little each time.
    """
    chosen = context.options.value_codec if role == "values" else context.options.key_codec
    return held_codec(root) or chosen


def unfit(value: torch.Tensor, role: str, codec: Codec) -> str | None:
    """Why a codec cannot hold a cache that is read in this role, or None."""
    try:
        layout_of(codec, int(value.shape[-1]), value.dtype, value.device.type)
        if role != "keys":
            formats.check_values(codec.name)
    except ValueError as error:
        return str(error)
    return None


def role_behind(survey: Survey, root: fx.Node) -> str | None:
    """As what attention reads numbers that are computed from a cache: it is decoded in front of what computes."""
    return one_role(roles_of(node for node, view in survey.views.items() if view.root is root))


def along_tokens(survey: Survey, root: fx.Node) -> bool:
    """Whether every read of what continues a tensor has tokens along the dimension that it grows in."""
    for _, view, turned in _sides(survey, root):
        grown = survey.appends.get(view.base) or survey.joins.get(view.base)
        places = places_of(view, turned)
        grows = grown is not None and spelling(grown.node) == "cat" and not view.also
        if grows and places and grown.dim not in places.tokens:
            return False
    return True


def token_dim_of(survey: Survey, root: fx.Node) -> int | None:
    """The dimension that every read of a tensor takes for its tokens, where nothing writes into it."""
    if any(view.root is root for view in survey.writes.values()):
        return None
    read = [places_of(view, turned) if view.base is root else None for _, view, turned in _sides(survey, root)]
    along = {places and places.tokens for places in read}
    tokens = along.pop() if len(along) == 1 else None
    return tokens[0] if tokens and len(tokens) == 1 else None


def paged(survey: Survey, root: fx.Node) -> bool:
    """Whether attention reads two dimensions of a tensor as its tokens."""
    read = [places_of(view, turned) for _, view, turned in _sides(survey, root)]
    return any(places is not None and len(places.tokens) > 1 for places in read)
