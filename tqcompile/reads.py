"""What reads codes in a rewritten graph, as the report counts it."""

from collections import Counter

from torch import fx

from tqcompile import ops


def kinds_of(gm: fx.GraphModule) -> dict[str, int]:
    """How many reads of codes a rewritten graph has of each operator: attend, or one of its two products."""
    kinds = {ops.attend: "attend", ops.logits: "logits", ops.mix: "mix"}
    return dict(Counter(kinds[node.target] for node in gm.graph.nodes if node.target in kinds))


def kernels_of(gm: fx.GraphModule) -> dict[tuple[str, str, str], int]:
    """What reads codes in a rewritten graph, which, and by which kernel on a GPU: how often each."""
    found = Counter()
    for node in gm.graph.nodes:
        if node.target is ops.attend:
            keys, values, *dims, _ = node.args[-5:]
            kernel = ops.kernel_of(keys, values, tuple(dims), node.args[1] == node.args[2])
            found["attention", f"{keys} / {values}", kernel] += 1
            if node.kwargs.get("second") and kernel == ops.INTEGER:
                more = node.kwargs["second_codec"], node.kwargs["second_dim"]
                found["query x keys", more[0], ops.logits_kernel_of(*more)] += 1
        elif node.target is ops.logits:
            found["query x keys", node.args[2], ops.logits_kernel_of(*node.args[2:])] += 1
        elif node.target is ops.mix:
            found["weights x values", node.args[2], ops.DECODED] += 1
    return dict(found)
