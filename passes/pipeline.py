"""The passes in the order they run, and the one doorway that runs them."""

from torch import fx

from tqcompile.passes.absorb import absorb
from tqcompile.passes.canonicalize import canonicalize
from tqcompile.passes.centre import centre, without_bases
from tqcompile.passes.compress import compress
from tqcompile.passes.context import Context
from tqcompile.passes.flex import flex
from tqcompile.passes.fuse import fuse
from tqcompile.passes.regions import regions
from tqcompile.passes.second import second
from tqcompile.passes.sites import sites
from tqcompile.passes.verify import verify

PIPELINE = (
    flex,
    canonicalize,
    absorb,
    sites,
    centre,
    regions,
    compress,
    second,
    fuse,
    verify,
)
NEEDED = (canonicalize, sites, compress)


def run(gm: fx.GraphModule, context: Context) -> None:
    """Run the passes in place; counts go to `context.counts`.

    Where the options leave out one of those that are needed no cache of the graph is compressed. The others only make
    the graph faster, and are left out alone.
    """
    for apply in PIPELINE:
        if apply.__name__ not in context.options.disable:
            context.counts[apply.__name__] = apply(gm, context)
        elif apply in NEEDED:
            context.sites = ()
            break
        elif apply is centre:
            without_bases(context)
    gm.recompile()
