"""What a model does to a score between its scale and its masks: a text that every path reads, `50.0 * tanh(score)`.

A text holds `score`, finite numbers, + - * / and the functions of `FUNCTIONS`. It is a score function in the sense of
FlexAttention (https://arxiv.org/abs/2412.05496) that depends on the score alone: what depends on places or on tensors
is in a mask.
"""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

NAME = "score"


@dataclass(frozen=True)
class Function:
    """A function of a score: what computes it, and its text in a kernel, where `lib` is the language's module."""

    compute: Callable
    text: str


# Comparisons and not maxima: those drop what is no number, which a token that cannot be read must not hide behind.
FUNCTIONS = {
    "tanh": Function(torch.tanh, "(1.0 - 2.0 / ({lib}.exp(2.0 * {0}) + 1.0))"),
    "sigmoid": Function(torch.sigmoid, "(1.0 / (1.0 + {lib}.exp(-{0})))"),
    "relu": Function(torch.relu, "{lib}.where({0} < 0.0, 0.0, {0})"),
    "exp": Function(torch.exp, "{lib}.exp({0})"),
    "log": Function(torch.log, "{lib}.log({0})"),
    "sqrt": Function(torch.sqrt, "{lib}.sqrt({0})"),
    "abs": Function(torch.abs, "{lib}.abs({0})"),
    "maximum": Function(lambda score, number: score.clamp(min=number), "{lib}.where({0} < {1}, {1}, {0})"),
    "minimum": Function(lambda score, number: score.clamp(max=number), "{lib}.where({0} > {1}, {1}, {0})"),
}
_OPERATORS = {
    ast.Add: (operator.add, "+"),
    ast.Sub: (operator.sub, "-"),
    ast.Mult: (operator.mul, "*"),
    ast.Div: (operator.truediv, "/"),
}


def check(text: str) -> None:
    """Raise where `text` is not empty, for scores as they are, and not of this language.

    Raises:
        ValueError: says what it holds that it may not.
    """
    if text:
        _parsed(text)


def apply(text: str, scores: torch.Tensor) -> torch.Tensor:
    """What `text` makes of scores of any shape, float32; the empty text hands them back."""
    return _computed(_parsed(text), scores) if text else scores


def in_kernel(text: str, lib: str, name: str) -> str:
    """`text` in the language of a kernel, whose module is called `lib` there and whose scores are called `name`."""
    return _printed(_parsed(text), lib, name)


@cache
def _parsed(text: str) -> ast.expr:
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"score_mod={text!r} is no expression: {error.msg}") from error
    for part in ast.walk(tree):
        if not _allowed(part):
            allowed = f"'{NAME}', numbers, + - * / and {', '.join(FUNCTIONS)}"
            raise ValueError(f"score_mod={text!r} holds {ast.unparse(part) or part!r}; allowed are {allowed}")
    return tree


def _allowed(part: ast.AST) -> bool:
    if isinstance(part, ast.Call):
        named = isinstance(part.func, ast.Name) and part.func.id in FUNCTIONS and not part.keywords
        return named and len(part.args) == (2 if "{1}" in FUNCTIONS[part.func.id].text else 1)
    if isinstance(part, ast.Constant):
        return type(part.value) in (int, float) and abs(part.value) < float("inf")
    if isinstance(part, ast.Name):
        return part.id == NAME or part.id in FUNCTIONS
    return isinstance(part, (ast.BinOp, ast.UnaryOp, ast.Load, ast.USub, *_OPERATORS))


def _computed(part: ast.expr, scores: torch.Tensor):
    if isinstance(part, ast.Call):
        return FUNCTIONS[part.func.id].compute(*(_computed(each, scores) for each in part.args))
    if isinstance(part, ast.BinOp):
        return _OPERATORS[type(part.op)][0](_computed(part.left, scores), _computed(part.right, scores))
    if isinstance(part, ast.UnaryOp):
        return -_computed(part.operand, scores)
    return part.value if isinstance(part, ast.Constant) else scores


def _printed(part: ast.expr, lib: str, name: str) -> str:
    if isinstance(part, ast.Call):
        return FUNCTIONS[part.func.id].text.format(*(_printed(each, lib, name) for each in part.args), lib=lib)
    if isinstance(part, ast.BinOp):
        return f"({_printed(part.left, lib, name)} {_OPERATORS[type(part.op)][1]} {_printed(part.right, lib, name)})"
    if isinstance(part, ast.UnaryOp):
        return f"(-{_printed(part.operand, lib, name)})"
    return repr(float(part.value)) if isinstance(part, ast.Constant) else name
