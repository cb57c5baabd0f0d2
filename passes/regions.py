"""Which caches keep their first and last tokens as they are, beside the codes of all: where writes tell them apart."""

from collections.abc import Iterator

from torch import fx

from tqcompile.passes.context import Context
from tqcompile.passes.indices import kept_run
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.places import places_of
from tqcompile.passes.refusals import name_of
from tqcompile.passes.sites import Site
from tqcompile.passes.survey import Survey
from tqcompile.passes.tokens import positions_along, source_of
from tqcompile.passes.views import View
from tqcompile.recent import Regions


def regions(gm: fx.GraphModule, context: Context) -> int:
    """Fill `context.regions`, and `context.kept` for the report; returns how many caches keep such tokens."""
    sinks, window = context.options.chosen.sinks, context.options.chosen.window
    if not sinks + window:
        return 0
    made = [site.root for site in context.sites if site.kind == "create"]
    created = Survey(gm.graph, made) if made else None
    kept = []
    for site in context.sites:
        found = _dimension(site, created if site.kind == "create" else context.survey)
        writes = [n for n, view in created.writes.items() if view.root is site.root] if site.kind == "create" else []
        if isinstance(found, int):
            context.regions[site.root] = Regions(found, sinks, window)
            context.made_by[site.root] = writes
            found = str(context.regions[site.root])
        kept.append((name_of(site.root), found))
    context.kept += tuple(kept)
    return len(context.regions)


def _dimension(site: Site, survey: Survey) -> int | str:
    """The dimension that tokens of a cache lie along, or why none are kept as they are."""
    root, rank = site.root, tensor_of(site.root).dim()
    if any(root in survey.views[node].roots for node in survey.joins):
        return "codes of it are joined with others"
    written = {site.append.dim} if site.append else set()
    for node, view in survey.writes.items():
        if view.root is root:
            dim = _written_along(node, view, survey)
            if dim is None:
                return f"{spelling(node)} writes it elsewhere than at positions along one dimension"
            written.add(dim)
    read = set(_read_along(root, survey))
    if len(written | read) != 1:
        return (
            "its reads do not say which tokens are the last" if written | read else "nothing says which are its tokens"
        )
    if site.append and any(_cut(node, survey) for node in survey.views if survey.views[node].root is root):
        return "what is kept of it slides"
    (dim,) = written | read
    return dim if dim < rank - 1 else "its tokens lie along the last dimension"


def _written_along(node: fx.Node, view: View, survey: Survey) -> int | None:
    """The dimension along which a write takes positions, whole in all others; None for any other write."""
    rank, source = len(view.axes), source_of(node)
    shown = survey.views.get(source)
    if view.base is not view.root or source is None or (shown is not None and shown.root is view.root):
        return None
    if spelling(node) == "index_copy_":
        return node.args[1] % rank
    if spelling(node) != "setitem" or tensor_of(source) is None:
        return None
    return positions_along(node.args[1], tensor_of(view.node), tensor_of(source))


def _read_along(root: fx.Node, survey: Survey) -> Iterator[int]:
    """The dimensions that reads take for tokens, of those that show the cache itself or what it grew to."""
    for read in survey.reads.values():
        for _, view, turned in read.sides:
            places = places_of(view, turned)
            if view.root is root and len(places.tokens) == 1 and view.base in (root, *survey.appends):
                yield places.tokens[0]


def _cut(node: fx.Node, survey: Survey) -> bool:
    """Whether a node that leaves the graph shows a part of what a cache grew to."""
    run = kept_run(node)
    return run is not None and run[0] in survey.appends and any(user.op == "output" for user in node.users)
