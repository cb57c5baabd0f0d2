"""The passes in the order they run, and the one doorway that runs them."""

from torch import fx

from tqcompile.passes.canonicalize import canonicalize
from tqcompile.passes.compress import compress
from tqcompile.passes.context import Context
from tqcompile.passes.flex import restore_flex
from tqcompile.passes.fuse import fuse
from tqcompile.passes.sites import sites
from tqcompile.passes.verify import verify

PIPELINE = (
    canonicalize,
    sites,
    compress,
    restore_flex,
    fuse,
    verify,
)


def run(gm: fx.GraphModule, context: Context) -> None:
    """Run the passes in place; counts go to `context.counts`.

    Each of the first builds on those before it: one that the options leave out takes the later ones along, and no cache
    of the graph is compressed. What comes after `compress` only makes the graph faster, and is left out alone.
    """
    for apply in PIPELINE:
        if apply.__name__ not in context.options.disable:
            context.counts[apply.__name__] = apply(gm, context)
        elif PIPELINE.index(apply) <= PIPELINE.index(compress):
            context.sites = ()
            break
    gm.recompile()
