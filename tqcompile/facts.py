"""What the passes saw of every cache of a graph, in words: how it is written, who reads it, what became of it.

Gathered once a graph, after the passes: what is kept here holds no node and no tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tqcompile.cache import CompressedKV
from tqcompile.passes.context import Context
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.places import places_of
from tqcompile.passes.records import Read
from tqcompile.passes.refusals import Refusal, name_of, where
from tqcompile.passes.roles import one_role, real
from tqcompile.passes.sites import Site
from tqcompile.passes.survey import Survey


@dataclass(frozen=True)
class Place:
    """One node that writes or reads a cache: the operator the model calls there, its line, and the node's name.

    `kind` of a write is `write`, `append`, `join` or `create`; of a read `attend`, `logits`, `mix` or `other`, `over`
    codes, a decoded copy, or dense numbers.
    """

    kind: str
    operator: str
    where: str
    node: str
    over: str = ""


@dataclass(frozen=True)
class CacheFacts:
    """One cache in one graph.

    `form` is the kind of a site (`in_place`, `append`, `create`, `read`), `decoded` for a compressed cache that this
    graph works on a decoded copy of, or `dense`. `codec` is None where it is dense. `heads` and `head_dim` are as
    attention reads it, None where nothing says them; `folded` where its heads are those of all sequences, in one
    dimension. `reason` and `remedy` are those of a refusal, at `refused_at`.
    """

    name: str
    form: str
    role: str | None
    codec: str | None
    dtype: torch.dtype | None
    device: str
    shape: tuple[int | str, ...]
    heads: int | None
    head_dim: int | None
    folded: bool
    writes: tuple[Place, ...]
    reads: tuple[Place, ...]
    reason: str = ""
    remedy: str = ""
    refused_at: str = ""


def facts(before: fx.GraphModule, after: fx.GraphModule, context: Context) -> tuple[CacheFacts, ...]:
    """The caches of a graph, compressed ones first: `before` is Dynamo's, `after` what the passes made of it."""
    sites = {site.root: site for site in context.sites}
    names = {name_of(node): node for node in before.graph.nodes if node.op == "placeholder"}
    created = {node.name: node for node in after.graph.nodes if node.op.startswith("call_")}
    refused = {refusal.name: refusal for refusal in context.refusals}
    # A graph's own keys and values are surveyed after the passes: they stay in the graph, and so does who reads them.
    made = [created[name] for name in refused if name in created and name not in names]
    made += [site.root for site in context.sites if site.kind == "create"]
    surveys = (context.survey, Survey(after.graph, dict.fromkeys(made)) if made else None)
    found = [_site(site, surveys[site.kind == "create"], sites, context) for site in context.sites]
    for refusal in refused.values():
        node = names.get(refusal.name, created.get(refusal.name))
        found.append(_refused(refusal, node, surveys[refusal.name not in names], context))
    return tuple(found)


def _site(site: Site, survey: Survey, sites: dict[fx.Node, Site], context: Context) -> CacheFacts:
    root, name = site.root, name_of(site.root)
    writes = list(_writes(root, survey))
    if site.kind == "create":
        writes.insert(0, Place("create", spelling(root), where(root), root.name))
        reads = [_read(read, "dense") for read in _reads(root, survey)]
    else:
        known = [read for read in _reads(root, survey) if all(other in sites for other in _roots(read))]
        reads = [_read(read, "codes") for read in known]
        falls = dict.fromkeys(fall for fall in context.fallbacks if fall.name == name)
        reads += [Place("other", fall.operator, fall.where, "", "decoded") for fall in falls]
    sizes = _sizes(root, survey)
    return CacheFacts(name, site.kind, site.role, site.codec.name, *_tensor(root), *sizes, tuple(writes), tuple(reads))


def _refused(refusal: Refusal, node: fx.Node | None, survey: Survey | None, context: Context) -> CacheFacts:
    said = {"reason": refusal.reason, "remedy": refusal.remedy, "refused_at": refusal.where}
    root = _root_called(refusal.name, survey)
    if root is None:
        known = _tensor(node) if node is not None else (None, "", ())
        return CacheFacts(refusal.name, "dense", None, None, *known, None, None, False, (), (), **said)
    held, decoded = real(root), root in context.decoded_inputs
    codec = held.codec.name if isinstance(held, CompressedKV) else None
    reads = list(_reads(root, survey))
    roles = {role for read in reads for role, view, _ in read.sides if root in view.roots}
    return CacheFacts(
        refusal.name,
        "decoded" if decoded else "dense",
        one_role(roles),
        codec,
        *_tensor(root),
        *_sizes(root, survey),
        tuple(_writes(root, survey)),
        tuple(_read(read, "decoded" if decoded else "dense") for read in reads),
        **said,
    )


def _root_called(name: str, survey: Survey | None) -> fx.Node | None:
    views = survey.views.items() if survey is not None else ()
    return next((node for node, view in views if node is view.root and name_of(node) == name), None)


def _tensor(root: fx.Node) -> tuple[torch.dtype | None, str, tuple[int | str, ...]]:
    """Dtype, device and shape; a size that Dynamo keeps a symbol for is its name, and no guard is made."""
    value = tensor_of(root)
    if value is None:
        return None, "", ()
    return value.dtype, str(value.device), tuple(n if isinstance(n, int) else str(n) for n in value.shape)


def _writes(root: fx.Node, survey: Survey) -> Iterator[Place]:
    written = [("write", node) for node, view in survey.writes.items() if view.root is root]
    written += [("append", node) for node in survey.appends if survey.views[node].root is root]
    written += [("join", node) for node in survey.joins if root in survey.views[node].roots]
    if root in survey.culprits:
        written.append(("write", survey.culprits[root]))
    for kind, node in written:
        yield Place(kind, spelling(node), where(node), node.name)


def _reads(root: fx.Node, survey: Survey) -> Iterator[Read]:
    return (read for read in survey.reads.values() if root in _roots(read))


def _roots(read: Read) -> list[fx.Node]:
    return [root for _, view, _ in read.sides for root in view.roots]


def _read(read: Read, over: str) -> Place:
    return Place(read.kind, spelling(read.node), where(read.node), read.node.name, over)


def _sizes(root: fx.Node, survey: Survey) -> tuple[int | None, int | None, bool]:
    """Heads, head_dim and whether sequences are among the heads, as the first reader sees them.

    A cache may keep its dimensions in any order; nothing else says which is which.
    """
    for read in _reads(root, survey):
        view, turned = next((view, turned) for _, view, turned in read.sides if root in view.roots)
        places = places_of(view, turned)
        if places is not None:
            shape = tensor_of(view.base).shape
            sizes = [size if isinstance(size, int) else None for size in (shape[places.heads[-1]], shape[-1])]
            return *sizes, len(places.heads) == 1
    return None, None, False
