"""What attention takes a cache for, keys or values, and the codec that it gets for that."""

import torch
from torch import fx

from tqcompile.cache import CompressedKV
from tqcompile.codec import Codec
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.places import places_of, roles_of
from tqcompile.passes.survey import Append, Survey


def real(node: fx.Node) -> torch.Tensor | None:
    """The tensor that Dynamo traced a placeholder with, while it is still alive."""
    argument = node.meta.get("grapharg")
    value = argument.example if argument is not None else None
    return value if isinstance(value, torch.Tensor) else None


def role_of(survey: Survey, root: fx.Node, context) -> str | None:
    """`keys` or `values`, as attention reads it; None where nothing does, `both` where it is read as both."""
    roles = set()
    for read in survey.reads.values():
        roles |= {"keys"} if read.key is not None and read.key.root is root else set()
        roles |= {"values"} if read.value is not None and read.value.root is root else set()
    if not roles:
        codec = held_codec(root)
        return None if codec is None else "keys" if codec is context.options.key_codec else "values"
    return roles.pop() if len(roles) == 1 else "both"


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
    return append.dim, *(str(size) for size in tensor_of(append.tokens).shape[:-1])


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


def role_behind(survey: Survey, root: fx.Node) -> str | None:
    """As what attention reads numbers that are computed from a cache: it is decoded in front of what computes."""
    roles = roles_of(node for node, view in survey.views.items() if view.root is root)
    return "both" if len(roles) > 1 else next(iter(roles), None)


def along_tokens(survey: Survey, root: fx.Node) -> bool:
    """Whether every read of what continues a tensor has tokens along the dimension that it grows in."""
    for read in survey.reads.values():
        for view, turned in ((read.key, read.kind == "logits"), (read.value, False)):
            grown = survey.appends.get(view.base) or survey.joins.get(view.base) if view is not None else None
            if grown is None or view.root is not root or spelling(grown.node) != "cat":
                continue
            places = places_of(view, turned)
            if places is not None and grown.dim not in places.tokens:
                return False
    return True


def paged(survey: Survey, root: fx.Node) -> bool:
    """Whether attention reads two dimensions of a tensor as its tokens."""
    for read in survey.reads.values():
        for view, turned in ((read.key, read.kind == "logits"), (read.value, False)):
            places = places_of(view, turned) if view is not None and view.root is root else None
            if places is not None and len(places.tokens) > 1:
                return True
    return False
