"""A cache that no pattern knows stays dense, is right, and is named with the reason; other states are not caches."""

import re

import pytest
import torch
from graphs import passed

import tqcompile
from tqcompile.passes.sites import sites

F = torch.nn.functional
AT = torch.arange(2)
X = torch.randn(2, 4, 2, 8)


def refusals(function, *args, **options):
    return [refusal for refusal in passed(function, *args, until=sites, **options)[1].refusals if refusal.stands]


class Kept(torch.nn.Module):
    """One buffer of the given size, and a step that uses it."""

    def __init__(self, step, *size, dtype=torch.float32):
        super().__init__()
        self.step = step
        self.register_buffer("state", torch.zeros(size, dtype=dtype))

    def forward(self, *args):
        return self.step(self.state, *args)


def mean_pooled(state, x, at):
    state[:, :, at] = x
    return state.mean(2)


def distances(state, x, at):
    state.index_copy_(2, at, x)
    return torch.cdist(x, state).softmax(-1)


def by_slices(state, x, at):
    state[:, :, 3:5].copy_(x)
    return state.repeat_interleave(2, dim=1).cumsum(2)


def double(state, x, at):
    state[:, :, at] = x.double()
    return F.scaled_dot_product_attention(x.double(), state, state)


CACHES = {
    "a reader that is no attention": (mean_pooled, (2, 4, 9, 8), {}, r"mean reads it"),
    "scores that are no product": (distances, (2, 4, 9, 8), {}, r"cdist reads it"),
    "read through copies": (by_slices, (2, 4, 9, 8), {}, r"cumsum reads it"),
    "double precision": (double, (2, 4, 9, 8), {"dtype": torch.float64}, r"its dtype is torch.float64"),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_buffer_that_tokens_are_written_to_is_listed_with_the_reason_and_the_line(name):
    step, size, options, reason = CACHES[name]
    (refusal,) = refusals(Kept(step, *size, **options), X, AT)
    assert "state" in refusal.name and __file__ in refusal.where and f"in {step.__name__}" in refusal.where
    assert re.match(reason, refusal.reason), refusal.reason


def transposed_keys(past, x):
    """Keys kept as [batch * heads, head_dim, tokens], the way that BLOOM did."""
    keys = torch.cat([past, x.flatten(0, 1).mT], -1)
    return torch.bmm(x.flatten(0, 1), keys).softmax(-1), keys


def sliding(past, x):
    keys = torch.cat([past, x], 2)
    return keys.cumsum(2), keys[:, :, -9:]


@pytest.mark.parametrize(("step", "size"), [(transposed_keys, (8, 8, 9)), (sliding, (2, 4, 9, 8))])
def test_a_past_that_grows_is_listed(step, size):
    (refusal,) = refusals(step, torch.randn(size), X)
    assert "past" in refusal.name and f"in {step.__name__}" in refusal.where


def test_a_reader_in_another_graph_is_not_held_against_a_cache():
    def fill(state, x, at):
        state[:, :, at] = x
        return F.scaled_dot_product_attention(x, x, x)

    for strict in (False, True):
        torch._dynamo.reset()
        (refusal,) = refusals(Kept(fill, 2, 4, 9, 8), X, AT, strict=strict)
        assert refusal.reason == "this graph writes it and never reads it"


@pytest.mark.parametrize("name", CACHES)
def test_strict_raises_for_what_no_pattern_knows(name):
    step, size, options, _ = CACHES[name]
    compiled = torch.compile(
        Kept(step, *size, **options), backend="turboquant", options={"inner": "eager", "strict": True}
    )
    with torch.no_grad(), pytest.raises(Exception, match=r"strict=True, and .*state.* cannot be compressed"):
        compiled(X, AT)


@pytest.mark.parametrize("name", CACHES)
def test_what_is_listed_is_dense_and_right(name):
    step, size, options, _ = CACHES[name]
    model, twin = Kept(step, *size, **options), Kept(step, *size, **options)
    compiled = torch.compile(model, backend="turboquant", options={"inner": "eager"})
    for start in (0, 2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(X, AT + start), twin(X, AT + start))
    assert type(model.state) is torch.Tensor and model.state.equal(twin.state)
    report = tqcompile.report(model)
    assert len(report.refusals) == 1 and "left dense:" in str(report) and "state" in str(report)


def rolled(state, x, at):
    """The state of a short convolution, as it is replaced by each step."""
    longer = torch.cat([state, x[:, 0].mT], -1)
    state.copy_(longer[..., -state.shape[-1] :])
    return F.conv1d(longer, torch.ones(8, 1, 3), groups=8)


def returned(state, x, at):
    longer = torch.cat([state, x[:, 0].mT], -1)
    return F.conv1d(longer, torch.ones(8, 1, 3), groups=8), longer[..., -3:]


def recurrent(state, x, at):
    state.mul_(0.9).add_(x.mT @ x)
    return (state * x[:, :, :1].mT).sum(-2)


def replaced(state, x, at):
    state.copy_(x @ x.mT @ state)
    return x.mT @ x @ state.mT


def one_of_a_stack(state, x, at):
    state[1] = torch.tanh(state[1] + x[0, 0])
    return state.sum(0)


def through_a_view_of_a_stack(state, x, at):
    state[1].copy_(torch.tanh(state[1] + x[0, 0]))
    return state.sum(0)


def clipped(state, x, at):
    state[state > 0] = 0
    return state.sum()


def in_place_activation(state, x, at):
    return F.relu(state, inplace=True) + 1


def concatenated(state, x, at):
    return torch.cat([state, x], 1)


def skip(state, x, at):
    longer = torch.cat([state, x], 1)
    return longer.mean((2, 3))


ORDINARY = {
    "a state of a convolution in place": (rolled, (2, 8, 3)),
    "a state of a convolution that is returned": (returned, (2, 8, 3)),
    "a recurrent state": (recurrent, (2, 4, 8, 8)),
    "one state of a stack": (one_of_a_stack, (3, 2, 8)),
    "one state of a stack through a view": (through_a_view_of_a_stack, (3, 2, 8)),
    "written by a mask": (clipped, (2, 4, 9)),
    "an activation in place": (in_place_activation, (2, 4, 9, 8)),
    "a concatenation that is returned and not read": (concatenated, (2, 4, 2, 8)),
    "a concatenation that is read and not returned": (skip, (2, 4, 2, 8)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_other_states_are_not_listed(name):
    step, size = ORDINARY[name]
    assert not refusals(Kept(step, *size), X, AT)


class Normalised(torch.nn.Sequential):
    """Running statistics, written in training."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(inplace=True))


def test_running_statistics_are_not_listed():
    assert not refusals(Normalised().train(), X)


def test_a_state_that_is_computed_from_itself_is_listed_and_is_no_failure():
    model, twin = Kept(replaced, 2, 4, 2, 8), Kept(replaced, 2, 4, 2, 8)
    compiled = torch.compile(model, backend="turboquant", options={"inner": "eager", "strict": True})
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(X, AT), twin(X, AT))
    (refusal,) = tqcompile.report(model).refusals
    assert type(model.state) is torch.Tensor and "as a recurrent state is" in refusal.reason


def test_a_mask_that_is_filled_is_not_listed():
    def step(state, x, at):
        bias = state.clone()
        bias[:, :, :, at] = float("-inf")
        return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)

    mask = torch.zeros(2, 1, 2, 2)
    assert not refusals(lambda x, m: step(m, x, AT[:1]), X, mask)


def test_an_operator_spelled_with_keywords_alone_is_followed_like_any():
    def step(x):
        x = torch.index_select(input=x, dim=1, index=AT)
        return torch.repeat_interleave(input=x, repeats=2, dim=1) + torch.flatten(input=x.mT, start_dim=1).sum()

    assert not refusals(step, torch.randn(2, 4, 8))
