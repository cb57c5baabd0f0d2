"""The passes in the order they run, and the one doorway that runs them."""

from torch import fx

from tqcompile.passes.canonicalize import canonicalize
from tqcompile.passes.compress import compress
from tqcompile.passes.context import Context
from tqcompile.passes.sites import sites
from tqcompile.passes.verify import verify

PIPELINE = (
    canonicalize,
    sites,
    compress,
    verify,
)


def run(gm: fx.GraphModule, context: Context) -> None:
    """Run the passes in place; counts go to `context.counts`.

    Each builds on those before it: a pass that the options leave out takes the later ones along, and no cache of the
    graph is compressed.
    """
    for step in PIPELINE:
        if step.__name__ in context.options.disable:
            context.sites = ()
            break
        context.counts[step.__name__] = step(gm, context)
    gm.recompile()
