import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

import tqcompile
from tqcompile import ops
from tqcompile.bench.decoder import Written
from tqcompile.bench.shapes import Shape


@given(st.data())
def test_places_are_those_that_an_assignment_writes(data):
    length = data.draw(st.integers(1, 40))
    chosen = data.draw(st.lists(st.integers(-length, length - 1), max_size=8))
    positions = torch.tensor(chosen, dtype=data.draw(st.sampled_from([torch.int64, torch.int32])))
    places = ops.places(positions, length)
    assert torch.equal(places, torch.arange(length)[positions.long()])
    assert places.dtype == torch.int64
    assert not chosen or places.data_ptr() != positions.data_ptr()


@pytest.mark.parametrize("count", [1, 3])
def test_the_places_of_a_step_are_computed_once_for_all_layers(count):
    """Inductor computes again, for each operator that takes it, what it could fuse."""
    shape = Shape(batch=1, context=64, heads=2, kv_heads=1, head_dim=64)
    with torch.no_grad():
        subject = Written(shape, count, torch.device("cpu"))
        model = torch.compile(subject.model, backend=tqcompile.turboquant(keys="turboquant:4", values="turboquant:4"))
        _, texts = run_and_get_code(subject.step, model, 0)
    assert sum(text.count("tqcompile.places.default(") for text in texts) == 1
    assert sum(text.count("tqcompile.append_step.default(") for text in texts) == count
