"""What must hold of a graph that is handed to the inner compiler. Runs in production."""

from torch import fx

from tqcompile.passes.context import Context


def verify(gm: fx.GraphModule, context: Context) -> int:
    """Raise where a rewritten graph still holds a dense cache; returns how many nodes were looked at.

    Raises:
        AssertionError: a cache that was compressed is still an input, or is still written or read in place.
    """
    gm.graph.lint()
    caches = {site.root for site in context.sites if site.kind != "create"}
    for node in gm.graph.nodes:
        assert node not in caches, f"{node.name} is compressed and still in the graph: used by {list(node.users)}"
        for operand in node.all_input_nodes:
            assert operand not in caches, f"{node.name} reads the dense cache {operand.name}"
    planned = sum(output.count for output in context.outputs if output.kind in ("tensor", "shown", "planes"))
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    assert planned == len(output.args[0]), f"{planned} values planned, {len(output.args[0])} returned"
    missing = [n.name for n in gm.graph.nodes if n.op == "placeholder" and "example_value" not in n.meta]
    assert not missing, f"placeholders without an example: {missing}"
    return len(gm.graph.nodes)
