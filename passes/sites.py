"""Find where a graph keeps its KV cache: which tensors are caches, how each is written, how attention reads it.

Nothing is edited here. The result is frozen records that `compress` consumes: `Site` for a cache that will be
compressed, `Refusal` for one that stays dense and why.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from tqcompile.adopt import refusal
from tqcompile.cache import CompressedKV
from tqcompile.codec import Codec
from tqcompile.passes.indices import chosen_of
from tqcompile.passes.nodes import memory_of, sizes_of, tensor_of, walk
from tqcompile.passes.overlooked import Overlooked, overlooked, read_only, remade
from tqcompile.passes.places import operands_of
from tqcompile.passes.records import Append, Read
from tqcompile.passes.refusals import (
    FLOATS,
    Refusal,
    foreign_cache,
    name_of,
    refuse,
    remade_cache,
    unknown_cache,
    wrapped,
)
from tqcompile.passes.roles import (
    along_tokens,
    codec_of,
    paged,
    real,
    role_behind,
    role_beside,
    role_of,
    token_dim_of,
    unfit,
)
from tqcompile.passes.survey import STATE, TURNED, Survey
from tqcompile.passes.views import View, written_value

REPEATED = "it is computed from a tensor of its size in a way that no rule follows, and codes of codes would drift"

# Caches that a graph writes and does not read: the next one that reads them knows what they are. Each has the lists
# `settled` of the refusals that said so.
_written_elsewhere = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Site:
    """One cache: `kind` is `in_place`, `append`, `create` (made in this graph) or `read` (never written here)."""

    root: fx.Node
    kind: str
    role: str
    codec: Codec
    append: Append | None
    # Of a cache that is created, where all reads agree on it, nothing writes into it, and the whole of it is kept.
    token_dim: int | None = None


def sites(gm: fx.GraphModule, context) -> int:
    """Fill `context.sites`, `context.refusals` and `context.survey`; returns how many caches can be compressed.

    Raises:
        ValueError: `strict`, and a cache stays dense. A recurrent state is none. One that this graph writes and never
            reads is reported and does not raise: whether attention knows it is for the graph to say that reads it,
            and a prefill over its own keys and values is no failure. Nor is what attention reads and no graph keeps.
    """
    outputs = _outputs(gm.graph)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder" and may_be_cache(node)]
    made = [node for node in map(written_value, outputs) if node.op.startswith("call_") and may_be_cache(node)]
    # What has three dimensions and leaves a graph that made it may be the model's result.
    made = [node for node in made if tensor_of(node).dim() > 3]
    held, found, refused = _survey(gm.graph, inputs, outputs, context)
    made = [node for node in dict.fromkeys(made) if node not in held.views]
    created = Survey(gm.graph, dict.fromkeys(map(_whole, made)))
    context.survey = held
    roles = {node: role_of(created, _whole(node), context) for node in made}
    new, also_refused = _decide_created(created, roles, context)
    others = [node for node in map(written_value, outputs) if roles.get(node) is None]
    changed = {cache.root: remade_cache(cache) for cache in remade(others, held)}
    refused = {**changed, **refused}
    decided = {site.root for site in found} | refused.keys()
    unknown = list(overlooked(_others(gm.graph, decided)))
    decided |= {cache.root for cache in unknown}
    foreign = {cache.root: foreign_cache(cache) for cache in read_only(_others(gm.graph, decided))}
    given = [node for node in gm.graph.nodes if node.op == "placeholder"]
    context.foreign = {given.index(root): refusal.last for root, refusal in foreign.items()}
    context.sites = (*found, *new)
    refusals = [*refused.values(), *also_refused]
    states = [refusal for refusal in refusals if refusal.reason in (STATE, REPEATED)]
    refusals = [refusal for refusal in refusals if refusal not in states]
    context.refusals = (*refusals, *(unknown_cache(cache) for cache in unknown if cache.reader))
    if context.options.strict and context.refusals:
        raise ValueError(context.refusals[0].under_strict)
    context.refusals += (*states, *map(_unread, (cache for cache in unknown if cache.reader is None)))
    context.refusals += tuple(foreign.values())
    return len(context.sites)


def _unread(cache: Overlooked) -> Refusal:
    """The refusal of a cache that is written and not read, until another graph takes it for one."""
    refusal, held = unknown_cache(cache), real(cache.root)
    if held in _written_elsewhere:
        _written_elsewhere[held].append(refusal.settled)
    return refusal


def _survey(
    graph: fx.Graph, inputs: list[fx.Node], outputs: list[fx.Node], context
) -> tuple[Survey, list[Site], dict[fx.Node, Refusal]]:
    """A survey, and what it finds and refuses, in which only caches of one codec share a tensor of their tokens."""
    apart: frozenset[fx.Node] = frozenset()
    while True:
        context.decoded_inputs.clear()
        survey = Survey(graph, inputs, apart)
        found, refused = _decide(survey, outputs, context)
        codecs = {site.root: site.codec for site in found}
        shared = (survey.views[node] for node in survey.joins if not codecs.keys().isdisjoint(survey.views[node].roots))
        torn = {view.node for view in shared if len({codecs.get(root, root) for root in view.roots}) > 1}
        if not torn:
            return survey, found, refused
        assert not torn <= apart, f"set apart, and joined again: {torn}"
        apart |= torn


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return list(dict.fromkeys(output.all_input_nodes))


def may_be_cache(node: fx.Node) -> bool:
    """Whether a tensor has the rank and dtype of a cache and is no parameter."""
    value = tensor_of(node)
    return (
        value is not None
        and value.dim() >= 3
        and value.dtype in FLOATS
        and not isinstance(real(node), torch.nn.Parameter)
    )


def _others(graph: fx.Graph, decided: Iterable[fx.Node]) -> list[fx.Node]:
    """The inputs of any rank and dtype that could be a cache of another kind than those decided on."""
    given = [
        node for node in graph.nodes if node.op == "placeholder" and node not in decided and tensor_of(node) is not None
    ]
    # A model may keep codes of its own; masks and positions are no caches.
    numbers = [n for n in given if tensor_of(n).dim() >= 3 and tensor_of(n).dtype not in (torch.bool, torch.int64)]
    return [node for node in numbers if not isinstance(real(node), torch.nn.Parameter)]


def _decide(survey: Survey, outputs: list[fx.Node], context) -> tuple[list[Site], dict[fx.Node, Refusal]]:
    written = {view.root for view in survey.writes.values() if view.owner is view.root}
    appended = {survey.views[node].root: append for node, append in survey.appends.items()}
    compressed = {root for root in _roots(survey) if isinstance(real(root), CompressedKV)}
    elsewhere = {root: _written_elsewhere[real(root)] for root in _roots(survey) if real(root) in _written_elsewhere}
    kept = {*written, *appended, *compressed, *elsewhere, *_continued(survey, outputs)}
    candidates = [root for root in _roots(survey) if root in kept]
    candidates += [root for root in survey.losses if root not in candidates]
    accepted, refused = {}, {}
    for root in candidates:
        role = role_of(survey, root, context)
        if role is None and (root in written or root in appended):
            role = role_beside(survey, root, context) or role_behind(survey, root)
        in_place = root in written or root in elsewhere
        reason = survey.losses.get(root) or _obstacle(root, role, in_place, appended.get(root), context)
        if reason is None and any(_differentiable(read, root) for read in survey.reads.values()):
            reason = "gradients flow through it"
        if reason is None and not along_tokens(survey, root):
            reason = "it grows along a dimension that attention does not read as tokens"
        if reason is None:
            for settled in elsewhere.get(root, ()):
                settled.append(name_of(root))
            kind = "in_place" if in_place else "append" if root in appended else "read"
            accepted[root] = Site(root, kind, role, codec_of(root, role, context), appended.get(root))
        elif role is not None or root in compressed or reason == TURNED:
            refused[root] = reason
        if role is None and root in written and real(root) is not None and root not in survey.losses:
            _written_elsewhere.setdefault(real(root), [])
    for root in refused:
        if root in compressed:
            # It is compressed already: the graph reads a decoded copy, and must not write into that.
            context.decoded_inputs.add(root)
    return list(accepted.values()), {r: refuse(r, why, survey.culprits.get(r)) for r, why in refused.items()}


def _continued(survey: Survey, outputs: list[fx.Node]) -> set[fx.Node]:
    """The roots of caches that leave the graph as copies which more tokens were put into."""
    changed = {*survey.joins, *(view.owner for view in survey.writes.values())}
    left = (survey.views[node] for node in map(written_value, outputs) if node in survey.views)
    return {view.root for view in left if _sources(survey, view) & changed}


def _sources(survey: Survey, view: View) -> set[fx.Node]:
    """What a view shows a part of, or was copied from, without the cache itself."""
    found = set()
    while view.parent is not None:
        found.add(view.node)
        view = survey.views[view.parent]
    return found


def _whole(node: fx.Node) -> fx.Node:
    """What a graph attends to of which it keeps some tokens."""
    source = chosen_of(node)
    return node if source is None or source.op == "placeholder" else source


def _decide_created(survey: Survey, roles: dict[fx.Node, str | None], context) -> tuple[list[Site], list[Refusal]]:
    found, refused, parts = [], [], _parts(list(roles))
    for root, role in roles.items():
        # A map of features that attention pools is no cache: it is both at once, and its places are two dimensions.
        if role is None or (role == "both" and tensor_of(root).dim() == 4 and paged(survey, _whole(root))):
            continue
        reason = _obstacle(root, role, False, None, context) or _repeats(root, context.survey)
        reason = "it is returned beside a part of it" if root in parts else reason
        if reason is None:
            dim = token_dim_of(survey, root) if root is _whole(root) else None
            found.append(Site(root, "create", role, codec_of(root, role, context), None, dim))
        else:
            refused.append(refuse(root, reason))
    return found, refused


def _parts(made: list[fx.Node]) -> set[fx.Node]:
    """Tensors one of which is a view of another: what is written into either is to be seen in both."""
    found, everything = set(), set(made)
    for node in made:
        parent = node
        while (source := next(iter(parent.all_input_nodes), None)) is not None:
            if tensor_of(source) is None or memory_of(source) != memory_of(parent):
                break
            parent = source
            if parent in everything:
                found |= {node, parent}
    return found


def _repeats(root: fx.Node, held: Survey) -> str | None:
    """Why a new tensor is one that came in, changed in a way that no rule follows: step after step it would drift."""
    size = sizes_of(root)

    def onward(node: fx.Node) -> list[fx.Node]:
        return [] if node in held.reads else operands_of(node)

    given = (node for node in walk([root], onward) if node.op == "placeholder" and node in held.views)
    return REPEATED if any(sizes_of(node) == size for node in given) else None


def _roots(survey: Survey) -> list[fx.Node]:
    return [node for node, view in survey.views.items() if node is view.root]


def _obstacle(root, role, in_place, append, context) -> str | None:
    if role is None:
        return "no attention that a rule knows reads it"
    value, held = tensor_of(root), real(root) if root.op == "placeholder" else None
    if is_traceable_wrapper_subclass(value):
        return wrapped(value)
    if value.requires_grad or (held is not None and held.requires_grad):
        return "gradients flow through it"
    if append is not None and tensor_of(append.node).requires_grad:
        return "gradients flow through it"
    if (reason := unfit(value, role, codec_of(root, role, context))) is not None:
        return reason
    if in_place and held is not None and not isinstance(held, CompressedKV):
        return refusal(held)
    return None


def _differentiable(read: Read, root: fx.Node) -> bool:
    return any(root in view.roots for _, view, _ in read.sides) and tensor_of(read.node).requires_grad
