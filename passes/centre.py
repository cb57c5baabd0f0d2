"""Which keys are centred before they are encoded, and by what: see `tqcompile.centre`.

And which caches, of keys or of values, are kept in a basis of their own: those whose codec wants one. Where that
cannot be, the cache stays dense.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from tqcompile.cache import CompressedKV
from tqcompile.centre import Centring, Rotation, still
from tqcompile.passes.centred import order_of, root_dims
from tqcompile.passes.context import Context, Uncentred
from tqcompile.passes.indices import full, index_items, kept_run, same_size
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.places import places_of
from tqcompile.passes.records import Read
from tqcompile.passes.refusals import name_of, refuse, where
from tqcompile.passes.roles import real
from tqcompile.passes.rotary import Rotations
from tqcompile.passes.sites import Site
from tqcompile.passes.slices import NotRotated
from tqcompile.passes.survey import Survey
from tqcompile.passes.tokens import source_of
from tqcompile.passes.views import View, shape_only, whole, written_value


class NotCentred(Exception):
    """Why keys stay as they are, and the node that says so."""


def centre(gm: fx.GraphModule, context: Context) -> int:
    """Fill `context.centres`, and `context.uncentred` and `context.kept` for the report.

    Returns how many caches are centred.

    Raises:
        ValueError: `strict`, and a cache stays dense because its codec needs a basis that it cannot have.
    """
    wanted = [site for site in context.sites if _wants(site, context)]
    if not wanted:
        return 0
    made = [site.root for site in context.sites if site.kind == "create"]
    created = Survey(gm.graph, dict.fromkeys(made)) if made else None
    rotations = Rotations(gm, {site.root for site in context.sites})
    for site in wanted:
        survey = created if site.kind == "create" else context.survey
        try:
            context.centres[site.root] = _centring(site, survey, rotations, context)
        except NotCentred as error:
            reason, node = error.args
            if site.codec.principal:
                leave_dense(context, site, f"{site.codec.name} keeps it in a basis of its own, and {reason}", node)
            else:
                context.uncentred.append(Uncentred(name_of(site.root), reason, where(node)))
    context.kept += tuple((name_of(root), str(centring)) for root, centring in context.centres.items())
    return len(context.centres)


def _wants(site: Site, context: Context) -> bool:
    keys = site.role in ("keys", "both")
    return site.codec.principal or (keys and context.options.chosen.centre)


def _centring(site: Site, survey: Survey, rotations: Rotations, context: Context) -> Centring:
    root, values = site.root, site.role == "values"
    if site.role == "both" or tensor_of(root).dim() != 4:
        raise NotCentred("it is read as keys and as values, or has no dimension of heads", root)
    reads = [
        read
        for read in survey.reads.values()
        if any(view.root is root for role, view, _ in read.sides if (role == "values") == values)
    ]
    dims = {_value_dim(read, survey) if values else _read_dim(read, survey, context) for read in reads}
    tokens = list(_tokens(site, survey))
    dims |= {dim for _, dim in tokens}
    if site.kind == "create" and not tokens:
        tokens = [(root, dim) for dim in dims]
    if site.kind == "create" and reads and not values:
        context.asking[root] = reads[0].left, order_of(reads[0].key, survey.views)
    if len(dims) != 1:
        raise NotCentred("its reads and writes do not say along which dimension its tokens lie", root)
    (dim,) = dims
    if site.kind != "create":
        _check_users(site, survey, reads)
    held = real(root) if root.op == "placeholder" else None
    how = {"sinks": context.options.chosen.sinks, "principal": site.codec.principal, "plain": values}
    if isinstance(held, CompressedKV):
        if held.centre is None or held.centre.kind[1:] != (dim, site.codec.principal):
            raise NotCentred("its first tokens were encoded as they are", root)
        return Centring(held.centre.rotation, dim, **how)
    head_dim = int(tensor_of(root).shape[-1])
    return replace(Centring(still(head_dim), dim) if values else _found(rotations, tokens, head_dim, dim), **how)


def _found(rotations: Rotations, tokens: list[tuple[fx.Node, int]], head_dim: int, dim: int) -> Centring:
    """By the rotation that all of the tokens show; where they show none, by a mean that no position turns."""
    found: dict[Rotation, torch.Tensor | None] = {}
    for node, along in tokens:
        try:
            rotation = rotations.of(node, along)
            found[rotation] = rotations.bias(node, along)
        except NotRotated:
            found[still(head_dim)] = None
    if len(found) > 1:
        raise NotCentred("what is written into it is rotated in several ways", tokens[0][0])
    ((rotation, given),) = found.items() or [(still(head_dim), None)]
    return Centring(rotation, dim, given)


def _read_dim(read: Read, survey: Survey, context: Context) -> int:
    """The dimension of the cache along which a read has its tokens, from the first place on.

    Raises:
        NotCentred: what was taken off keys cannot be given back to scores as a part of their mask.
    """
    view, node = read.key, read.node
    if read.kind != "attend" or read.score_mod:
        raise NotCentred("more than a mask lies between its scores and their softmax", node)
    sites = {site.root for site in context.sites}
    if any(side.root not in sites for _, side, _ in read.sides) and view.root.op == "placeholder":
        raise NotCentred("the values that are read with it stay dense", node)
    return _dim_of(view, read.value, read, survey)


def _value_dim(read: Read, survey: Survey) -> int:
    """The same of values that are in a basis of their own, which their weighted sum is turned out of.

    Raises:
        NotCentred: what reads them does not say so of which head each sum is.
    """
    if read.kind not in ("attend", "mix"):
        raise NotCentred("it is read as keys are", read.node)
    return _dim_of(read.value, read.value, read, survey)


def _dim_of(view: View, value: View, read: Read, survey: Survey) -> int:
    places, node = places_of(view), read.node
    folds = tensor_of(read.left).dim() != 4 or value.axes[0] != places_of(value).heads[:1]
    if folds or len(places.heads) != 2 or len(places.tokens) != 1:
        raise NotCentred("its heads and sequences are read in one dimension", node)
    base = view
    while base.base is not view.root:
        made = base.base
        if made not in survey.appends and not _keeps_places(made):
            raise NotCentred("its tokens are read at other places than they were written", node)
        base = survey.views[survey.views[made].parent]
    sequences, tokens = root_dims(view, (places.heads[0], places.tokens[0]), survey.views)
    if sequences:
        raise NotCentred("its first dimension is not that of sequences", node)
    return tokens


def without_bases(context: Context) -> None:
    """Leave dense the caches whose codecs need a basis, which `centre` would find.

    Raises:
        ValueError: `strict`, and there is one.
    """
    for site in [site for site in context.sites if site.codec.principal]:
        reason = f"{site.codec.name} keeps it in a basis of its own, and the pass that finds one is left out"
        leave_dense(context, site, reason, None)


def leave_dense(context: Context, site: Site, reason: str, culprit: fx.Node | None) -> None:
    """Take a cache off those that are compressed.

    Raises:
        ValueError: `strict`.
    """
    context.sites = tuple(other for other in context.sites if other is not site)
    refusal = refuse(site.root, reason, culprit)
    if context.options.strict:
        raise ValueError(refusal.under_strict)
    context.refusals += (refusal,)
    if site.root.op == "placeholder" and isinstance(real(site.root), CompressedKV):
        # The graph reads a decoded copy, which is encoded again where it was written.
        context.decoded_inputs.add(site.root)


def _keeps_places(node: fx.Node) -> bool:
    """Whether a view has the first tokens of a cache at their own places, and all else."""
    return node.target is torch.permute or _is_prefix(node)


def _is_prefix(node: fx.Node) -> bool:
    if spelling(node) != "getitem":
        return False
    source = tensor_of(node.args[0])
    items = index_items(node.args[1], source.dim())
    if items is None or len(items) != source.dim():
        return False
    cut = [item for item, size in zip(items, source.shape) if not full(item, size)]
    first = all(isinstance(item, slice) and item.start in (None, 0) and item.step in (None, 1) for item in cut)
    return first and len(cut) <= 1 and full(items[-1], source.shape[-1]) and full(items[0], source.shape[0])


def _tokens(site: Site, survey: Survey) -> Iterator[tuple[fx.Node, int]]:
    """What a graph puts into a cache, and the dimension along which the tokens of that lie."""
    root = site.root
    if site.kind == "create" and kept_run(root) is not None:
        raise NotCentred("only the last tokens of it are kept", root)
    if site.append is not None:
        yield site.append.tokens, site.append.dim
    for node, view in survey.writes.items():
        if view.root is root:
            yield _written(node, view)


def _written(node: fx.Node, view: View) -> tuple[fx.Node, int]:
    """The tokens of a write to the places that it names along one dimension."""
    source, cache = source_of(node), tensor_of(view.root)
    plain = view.plain and view.base is view.root
    if not plain or spelling(node) not in ("index_copy_", "setitem") or tensor_of(source) is None:
        raise NotCentred(f"{spelling(node)} writes it in another way than at places along its tokens", node)
    if spelling(node) == "index_copy_":
        return source, node.args[1] % cache.dim()
    items = index_items(node.args[1], cache.dim())
    named = [dim for dim, item in enumerate(items) if not full(item, cache.shape[dim])]
    lone = len(named) == 1 and tensor_of(source).dim() == cache.dim()
    if lone:
        (dim,) = named
        item, sizes = items[dim], zip(tensor_of(source).shape, cache.shape)
        alike = all(same_size(a, b) for place, (a, b) in enumerate(sizes) if place != dim)
        places = isinstance(item, slice) or (tensor_of(item) is not None and tensor_of(item).dim() == 1)
        if alike and places:
            return source, dim
    raise NotCentred("it is written at places that are not along its tokens alone", node)


def _check_users(site: Site, survey: Survey, reads: list[Read]) -> None:
    """Raise where anything but attention and those writes uses the cache or a view of it."""
    known = {node for read in reads for node in (read.node, *read.absorbed)}
    shown = [node for node, view in survey.views.items() if view.root is site.root]
    for node in shown:
        for user in node.users:
            own = user in known or user in survey.writes or shape_only(user)
            if user.op == "output":
                own = _leaves_whole(node, site, survey)
            elif user in survey.joins:
                own = False
            elif user in survey.views:
                own = own or survey.views[user].base is not user or user in survey.appends or _keeps_places(user)
            if not own:
                raise NotCentred(f"{spelling(user) or user.op} uses it, which is no attention", node)


def _leaves_whole(node: fx.Node, site: Site, survey: Survey) -> bool:
    node = written_value(node)
    return whole(survey.views[node]) or (site.append is not None and node is site.append.node)
