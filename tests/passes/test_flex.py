"""FlexAttention over a cache: its functions are found to be what attention over codes takes."""

import pytest
import torch
from test_sites import Cache, write
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tqcompile

LENGTH = 9
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
SHOWN = torch.tensor([[True] * 9, [False, False] + [True] * 7])


def alibi(score, b, h, q, kv):
    return score - (q + 4 - kv) * SLOPES[h]


def capped(score, b, h, q, kv):
    return torch.tanh(score / 3.0) * 3.0


def capped_and_added_to(score, b, h, q, kv):
    return torch.tanh(score / 3.0) * 3.0 + SLOPES[h] * kv


def hidden_by_the_score(score, b, h, q, kv):
    return torch.where(kv <= q + 4, score, -torch.inf)


def causal(b, h, q, kv):
    return kv <= q + 4


def padded(b, h, q, kv):
    return (kv <= q + 4) & SHOWN[b, kv]


def window(b, h, q, kv):
    return (kv <= q + 4) & (kv > q + 1)


def nothing_of_the_second(b, h, q, kv):
    return (kv <= q + 4) & (q != 1)


def scaled_by_head(score, b, h, q, kv):
    return score * SLOPES[h]


KNOWN = {
    "neither": (None, None),
    "a mask": (None, causal),
    "a mask of a tensor": (None, padded),
    "a window": (None, window),
    "a query that sees nothing": (None, nothing_of_the_second),
    "slopes": (alibi, causal),
    "a cap": (capped, None),
    "a cap, and more": (capped_and_added_to, padded),
    "a mask in the score": (hidden_by_the_score, None),
}


def conversation(score_mod, mask_mod, heads=4):
    """What three calls say, compiled and not, and the report."""
    queries = 2

    def step(kc, vc, q, k, v, at, mask):
        write(kc, k, at), write(vc, v, at)
        return flex_attention(q, kc, vc, score_mod=score_mod, block_mask=mask, enable_gqa=heads < 4)

    class Asked(Cache):
        def __init__(self):
            super().__init__(step)
            self.k, self.v = torch.zeros(2, heads, LENGTH, 16), torch.zeros(2, heads, LENGTH, 16)

        def forward(self, q, k, v, at, mask):
            return self.step(self.k, self.v, q, k, v, at, mask)

    model, twin = Asked(), Asked()
    compiled = torch.compile(model, backend=tqcompile.turboquant(preset="lossless", inner="eager"))
    mask = None if mask_mod is None else create_block_mask(mask_mod, 2, 4, queries, LENGTH, device="cpu")
    with torch.no_grad():
        for place in range(3):
            q, (k, v) = torch.randn(2, 4, queries, 16), torch.randn(2, 2, heads, queries, 16)
            at = torch.tensor([2 * place, 2 * place + 1])
            torch.testing.assert_close(compiled(q, k, v, at, mask), twin(q, k, v, at, mask), rtol=1e-4, atol=1e-5)
    return tqcompile.report(model)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_functions_of_scores_and_places_go_into_attention_over_codes(name, heads):
    report = conversation(*KNOWN[name], heads=heads)
    assert all(graph.reads == 1 and not graph.fallbacks and len(graph.sites) == 2 for graph in report.graphs)


def test_a_score_function_that_no_rule_says_leaves_the_call_as_it_is():
    report = conversation(scaled_by_head, causal)
    assert not any(graph.reads for graph in report.graphs)
    assert "flex_attention" in str(report)


def test_blocks_that_no_function_speaks_of_are_not_lost():
    from torch.nn.attention.flex_attention import BlockMask

    def step(kc, vc, q, k, v, at):
        write(kc, k, at), write(vc, v, at)
        counts, places = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 2, dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(counts, places, BLOCK_SIZE=(128, 128), seq_lengths=(2, 256))
        return flex_attention(q, kc, vc, block_mask=mask)

    class Long(Cache):
        def __init__(self):
            super().__init__(step)
            self.k, self.v = (torch.full((2, 4, 256, 16), number) for number in (0.5, 1.5))

    model, twin = Long(), Long()
    q, k, v = (torch.randn(2, 4, 2, 16) for _ in range(3))
    at = torch.tensor([0, 1])
    with torch.no_grad():
        out = torch.compile(model, backend=tqcompile.turboquant(preset="lossless", inner="eager"))(q, k, v, at)
        torch.testing.assert_close(out, twin(q, k, v, at), rtol=1e-4, atol=1e-5)
    assert not any(graph.reads for graph in tqcompile.report(model).graphs)
