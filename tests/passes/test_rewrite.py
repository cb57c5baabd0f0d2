"""What rewritten nodes call."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqcompile.passes import rewrite


@given(data=st.data())
def test_reach_spans_what_any_query_of_a_sequence_sees_and_tokens_that_need_no_mask(data):
    batch, heads, queries, length = (data.draw(st.integers(1, most)) for most in (3, 2, 3, 12))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    keep, plain = (
        torch.rand(batch, heads, queries, length) < data.draw(st.sampled_from([0.1, 0.5, 1.0])) for _ in range(2)
    )
    start, end = sorted(data.draw(st.integers(0, length)) for _ in range(2))
    if data.draw(st.booleans()):
        keep[..., :start], keep[..., start:end], plain[..., start:end] = False, True, True
    additive = data.draw(st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16]))
    low = -torch.inf if additive is None or data.draw(st.booleans()) else torch.finfo(additive).min
    mask = keep
    if additive is not None:
        mask = torch.where(keep, torch.where(plain, 0.0, 1 + torch.rand(keep.shape)), low).to(additive)
    expected = []
    for rows, same in zip(keep.flatten(1, 2), (keep & (plain | (mask.dtype == torch.bool))).flatten(1, 2).all(1)):
        seen = rows.any(0).nonzero().flatten().tolist()
        first, stop = (seen[0], seen[-1] + 1) if rows.any(-1).all() else (0, length)
        expected.append([first, stop, next((t for t in range(first, length) if not same[t]), length)])
    assert rewrite.reach(mask).tolist() == expected
    assert rewrite.bounds(rewrite.reach(mask)).tolist() == [[first, stop] for first, stop, _ in expected]


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 1, 5), (3, 1, 2, 5)])
def test_a_mask_of_fewer_dimensions_is_one_of_all_sequences(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., 1:3] = True
    assert rewrite.reach(mask).tolist() == [[1, 3, 3]] * (shape[0] if len(shape) == 4 else 1)


def test_a_number_that_is_none_in_a_mask_is_seen():
    mask = torch.tensor([-torch.inf, torch.nan, 0.0, -torch.inf])
    assert rewrite.reach(mask).tolist() == [[1, 3, 1]]
