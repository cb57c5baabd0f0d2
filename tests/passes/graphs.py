"""Graphs as Dynamo hands them over, and what the passes make of them, without a compiler behind."""

from collections import Counter

import torch
from torch import fx

from tqcompile.backend import _copy
from tqcompile.options import Options
from tqcompile.passes.canonicalize import canonicalize
from tqcompile.passes.context import Context
from tqcompile.passes.nodes import spelling
from tqcompile.passes.pipeline import run
from tqcompile.passes.sites import sites


def capture(function, *args) -> fx.GraphModule:
    """The first graph that Dynamo makes of `function(*args)`."""
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(_copy(gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=keep)(*args)
    return graphs[0]


def passed(function, *args, until=None, **options) -> tuple[fx.GraphModule, Context, fx.GraphModule]:
    """The graph after the passes (or after those before `until`), the context, and the graph before."""
    results = []

    def backend(gm, example_inputs):
        after, context = _copy(gm), Context(Options(**{"preset": "lossless", **options}))
        if until is None:
            run(after, context)
        else:
            for step in (canonicalize, sites):
                step(after, context)
                if step is until:
                    break
        results.append((after, context, gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend)(*args)
    return results[0]


def operators(gm: fx.GraphModule) -> Counter:
    """How often each operator is called."""
    return Counter(spelling(node) for node in gm.graph.nodes if node.op in ("call_function", "call_method"))
