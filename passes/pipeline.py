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
    """Run every pass that the options leave on, in place; counts go to `context.counts`."""
    for step in PIPELINE:
        if step.__name__ not in context.options.disable:
            context.counts[step.__name__] = step(gm, context)
    gm.recompile()
