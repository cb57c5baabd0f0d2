"""The language of score functions: what PyTorch makes of a text, a kernel's own text makes too."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqcompile import scores

NUMBERS = st.floats(-8, 8).map(lambda number: round(number, 3))
UNARY = sorted(name for name, function in scores.FUNCTIONS.items() if "{1}" not in function.text)
TEXTS = st.recursive(
    st.just("score"),
    lambda inner: st.one_of(
        st.builds("{}({})".format, st.sampled_from(UNARY), inner),
        st.builds("{}({}, {})".format, st.sampled_from(["maximum", "minimum"]), inner, NUMBERS),
        st.builds("({}) {} {}".format, inner, st.sampled_from("+-*"), NUMBERS),
        st.builds("({}) / {}".format, inner, st.sampled_from([-3.0, 0.5, 50.0])),
        st.builds("-({})".format, inner),
        st.builds("({}) * ({})".format, inner, inner),
    ),
    max_leaves=4,
)
SCORES = torch.tensor([-40.0, -1.5, -0.25, -0.0, 0.0, 1e-3, 0.7, 3.0, 90.0, torch.inf, -torch.inf, torch.nan])


@given(text=TEXTS)
def test_a_kernel_computes_what_pytorch_computes(text):
    scores.check(text)
    expected = scores.apply(text, SCORES.double())
    printed = eval(scores.in_kernel(text, "torch", "x"), {"torch": torch, "x": SCORES.double()})
    torch.testing.assert_close(printed, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_the_empty_text_leaves_scores_alone():
    scores.check("")
    assert scores.apply("", SCORES) is SCORES


def test_a_cap_is_the_cap_that_models_write():
    capped = scores.apply("tanh(score / 50.0) * 50.0", SCORES)
    torch.testing.assert_close(capped, torch.tanh(SCORES / 50.0) * 50.0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("score +", "no expression"),
        ("position + score", "position"),
        ("open('file')", "open"),
        ("score.__class__", "__class__"),
        ("tanh(score, 2.0)", "tanh"),
        ("maximum(score)", "maximum"),
        ("score ** 2", "**"),
        ("score * 1e999", "1e309"),
        ("score * True", "True"),
    ],
)
def test_what_is_not_of_the_language_is_refused_by_name(text, named):
    with pytest.raises(ValueError) as error:
        scores.check(text)
    assert repr(text) in str(error.value) and named in str(error.value)
