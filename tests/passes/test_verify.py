"""The last pass refuses a graph that still holds what was compressed."""

import pytest
import torch
from graphs import passed
from test_compress import stepping
from test_sites import AT, K, Q, V, attend

from tqcompile.passes.verify import verify


def rewritten():
    after, context, _ = passed(stepping(attend), Q, K, V, AT)
    return after, context


def test_a_rewritten_graph_passes_and_its_nodes_are_counted():
    after, context = rewritten()
    assert verify(after, context) == len(after.graph.nodes)


def test_a_compressed_cache_that_is_still_an_input_is_an_error():
    after, context = rewritten()
    first = next(iter(after.graph.nodes))
    site = context.sites[0]
    context.sites = (type(site)(first, site.kind, site.role, site.codec, None),)
    with pytest.raises(AssertionError, match="still in the graph"):
        verify(after, context)


def test_an_output_that_nobody_planned_is_an_error():
    after, context = rewritten()
    context.outputs = []
    with pytest.raises(AssertionError, match="values planned"):
        verify(after, context)


def test_a_placeholder_without_an_example_is_an_error():
    after, context = rewritten()
    next(iter(after.graph.nodes)).meta.pop("example_value")
    with pytest.raises(AssertionError, match="without an example"):
        verify(after, context)


def test_inputs_of_the_graph_are_planes_of_the_layout():
    after, _ = rewritten()
    planes = [node.meta["example_value"] for node in after.graph.nodes if node.name.endswith("_number")]
    assert [tuple(plane.shape) for plane in planes] == [(2, 4, 9, 8)] * 2
    assert all(plane.dtype == torch.float32 for plane in planes)
