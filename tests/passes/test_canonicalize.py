"""One spelling for each operator."""

import pytest
import torch
from graphs import capture, operators

from tqcompile.passes.canonicalize import canonicalize

Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8)


def called(gm):
    """The graph's result, whichever input it names first."""
    gm.recompile()
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    return gm(*(Q if name == "l_q_" else K for name in names))[0]


SCORES = {
    "at and mT": lambda q, k: q @ k.mT,
    "matmul and transpose": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "method and swapaxes": lambda q, k: q.matmul(k.swapaxes(2, 3)),
    "permute": lambda q, k: q @ k.permute(0, 1, 3, 2),
    "permute of a tuple": lambda q, k: q @ torch.permute(k, (0, 1, -1, -2)),
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "einsum in other letters": lambda q, k: torch.einsum("n h i c, n h j c -> n h i j", q, k),
}


@pytest.mark.parametrize("name", SCORES)
def test_every_spelling_of_a_product_of_queries_and_keys_becomes_permute_and_matmul(name):
    gm = capture(SCORES[name], Q, K)
    assert canonicalize(gm, None) >= 1
    assert operators(gm) == {"permute": 1, "matmul": 1}
    torch.testing.assert_close(called(gm), Q @ K.mT)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k: torch.einsum("bhqd,bhkd->hq", q, k),
        lambda q, k: torch.einsum("bhqd,bhkd->bqk", q, k),
        lambda q, k: torch.einsum("...qd,...kd->...qk", q, k),
        lambda q, k: torch.einsum("bhqd,bhkd", q, k),
    ],
)
def test_an_einsum_that_is_no_matrix_product_is_left_alone(function):
    gm = capture(function, Q, K)
    canonicalize(gm, None)
    assert operators(gm) == {"einsum": 1}
    torch.testing.assert_close(called(gm), function(Q, K))


def test_attention_gets_all_its_options_by_name():
    gm = capture(lambda q, k: torch.nn.functional.scaled_dot_product_attention(q, k, k, None, 0.0, True), Q, K)
    assert canonicalize(gm, None) == 1
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    assert len(node.args) == 3
    assert node.kwargs == {"attn_mask": None, "dropout_p": 0.0, "is_causal": True, "scale": None, "enable_gqa": False}


@pytest.mark.parametrize("cat", [torch.cat, torch.concat, torch.concatenate])
def test_every_concatenation_is_cat_with_a_dimension(cat):
    gm = capture(lambda q, k: cat(tensors=(q, k), dim=-2), Q, K)
    canonicalize(gm, None)
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    assert node.target is torch.cat and node.args[1] == -2 and not node.kwargs


PLACES = torch.randint(5, (2, 4, 3))
CHOICES = {
    "gather": lambda x, i: torch.gather(x, 2, i[..., None].expand(-1, -1, -1, 8)),
    "gather by keywords": lambda x, i: x.gather(dim=2, index=i[..., None].expand(2, 4, 3, 8), sparse_grad=False),
    "take_along_dim": lambda x, i: x.take_along_dim(i[..., None], -2),
    "take_along_dim for all heads": lambda x, i: torch.take_along_dim(x, i[:1, :1, :, None], dim=2),
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_spelling_of_tokens_that_an_index_names_becomes_gather(name):
    gm = capture(CHOICES[name], K, PLACES)
    canonicalize(gm, None)
    assert operators(gm)["gather"] == 1 and "take_along_dim" not in operators(gm)
    gm.recompile()
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    assert gm(*(K if name == "l_x_" else PLACES for name in names))[0].equal(CHOICES[name](K, PLACES))


def test_take_along_dim_of_channels_is_left_alone():
    gm = capture(lambda x, i: x.take_along_dim(i, 3), K, torch.zeros(2, 4, 5, 1, dtype=torch.int64))
    assert canonicalize(gm, None) == 0 and operators(gm) == {"take_along_dim": 1}


def test_what_is_canonical_already_is_not_counted():
    gm = capture(lambda q, k: torch.matmul(q, torch.permute(k, (0, 1, 3, 2))), Q, K)
    canonicalize(gm, None)
    assert canonicalize(gm, None) == 0
