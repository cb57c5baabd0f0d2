"""What `examples/frontier.py` measures with: rivals as published, one forward for all positions, honest bits."""

import itertools
import pathlib
import sys

import numpy as np
import pytest
import torch
from checkpoints import prompt, tiny

pytest.importorskip("transformers")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

from simulation import coders, trellis
from simulation.attention import Simulation, reference, rope, unrope
from simulation.layers import ByLayer, spend
from simulation.systems import rivals, system, tq
from simulation.transforms import allocate, distortion, gather, moment, plan, transform, transformed

PROMPT = 16
TOKENS = 48


def vectors(rows: int = 256, head_dim: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, rows, head_dim, generator=torch.Generator().manual_seed(seed))


def lost(coder: coders.Coder, x: torch.Tensor) -> float:
    """Squared error over squared length."""
    return ((coder.code(x, 7) - x).square().sum() / x.square().sum()).item()


@pytest.fixture
def simulation():
    return Simulation(tiny(), PROMPT)


@pytest.fixture
def ids():
    return prompt(1, TOKENS)[0]


@pytest.mark.parametrize(("coder", "name"), [(coders.q8_0(), "Q8_0"), (coders.q4_0(), "Q4_0")])
def test_llama_cpp_blocks_are_those_of_its_own_package(coder, name):
    gguf = pytest.importorskip("gguf")
    x = vectors()
    kind = gguf.GGMLQuantizationType[name]
    theirs = gguf.dequantize(gguf.quantize(x.numpy(), kind), kind)
    np.testing.assert_allclose(coder.code(x, 0).numpy(), theirs, rtol=1e-6, atol=1e-7)


def test_rivals_take_the_bits_that_they_publish():
    contexts = torch.tensor([10_000.0], dtype=torch.float64)
    bits = {one.name: (one.keys.bits(128) + one.values.bits(128)) / 2 for one in rivals()}
    assert [bits[f"vLLM {name}"] for name in ("4bit_nc", "k3v4_nc", "3bit_nc")] == [4.1875, 3.6875, 3.1875]
    assert (bits["q8_0"], bits["q4_0"], bits["KIVI 2"], bits["3/3"]) == (8.5, 4.5, 3.0, 3.125)
    kivi = next(one for one in rivals() if one.name == "KIVI 2")
    assert kivi.bits(contexts, 4, 128) == pytest.approx(3 + 13 * 128 / 10_000)
    vllm = next(one for one in rivals() if one.name == "vLLM 4bit_nc")
    assert vllm.bits(contexts, 8, 128) == pytest.approx((4 * 16 + 4 * 4.1875) / 8)


def test_vectors_taken_from_the_prompt_are_charged_at_each_context():
    contexts = torch.tensor([100.0, 400.0], dtype=torch.float64)
    plain, tricks = tq(3, 3), tq(3, 3, centre="before", balance=True, sinks=1, window=7)
    assert plain.bits(contexts, 2, 64) == 3.25
    expected = [(8 * 16 + (n - 8) * 3.25 + 16) / n for n in (100, 400)]
    assert tricks.bits(contexts, 2, 64) == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_scales_in_a_byte_cost_next_to_nothing(bits):
    x = vectors() * torch.logspace(-2, 2, 256)[:, None]
    assert lost(coders.turboquant(bits, 8), x) == pytest.approx(lost(coders.turboquant(bits), x), rel=0.02, abs=4e-4)


def test_zeros_come_back_as_zeros():
    zeros = torch.zeros(1, 2, 32, 64)
    made = [coders.turboquant(3), coders.turboquant(3, 8), coders.q4_0(), coders.q8_0(), coders.norm_corrected(3)]
    made += [coders.kivi_keys(2), coders.kivi_values(2), coders.uniform_vectors(3), trellis.trellis(2, 8, 6, False)]
    assert all((coder.code(zeros, 7) == 0).all() for coder in made)


def test_a_position_that_is_undone_leaves_the_key():
    angles = torch.rand(1, TOKENS, 16).repeat(1, 1, 2) * 6
    x = vectors(TOKENS, 32)
    torch.testing.assert_close(unrope(rope(x, angles.cos(), angles.sin()), angles.cos(), angles.sin()), x)


def test_dense_simulation_is_the_model(simulation, ids):
    theirs = tiny()(ids[None]).logits[0, -20:]
    torch.testing.assert_close(simulation.logits(ids, 20), theirs, atol=1e-4, rtol=1e-4)


def test_a_window_over_everything_is_16_bits(simulation, ids):
    exact = simulation.logits(ids, 20, system(coders.exact(), coders.exact()))
    for tricks in ({"window": TOKENS}, {"sinks": TOKENS}, {"sinks": 20, "window": TOKENS - 20}):
        torch.testing.assert_close(simulation.logits(ids, 20, tq(1, 1, **tricks)), exact, atol=1e-4, rtol=1e-4)
    assert (simulation.logits(ids, 20, tq(1, 1)) - exact).abs().max() > 0.1


def test_a_step_over_codes_sees_what_one_forward_sees(simulation, ids):
    """The window moves with the query: its logits are those of a text that ends there."""
    tricks = {"centre": "before", "balance": True, "sinks": 2, "window": 5}
    whole = simulation.logits(ids, 20, tq(2, 2, **tricks))
    for end in (TOKENS - 19, TOKENS - 8):
        alone = simulation.logits(ids[:end], 1, tq(2, 2, **tricks))
        torch.testing.assert_close(alone[0], whole[end - TOKENS - 1], atol=1e-4, rtol=1e-4)


def test_each_query_sees_sinks_and_its_window_exactly_and_codes_between(simulation):
    """Against a loop over queries, each with a key list of its own."""
    query, key, value = vectors(TOKENS, 16).repeat(1, 2, 1, 1), vectors(TOKENS, 16, 1), vectors(TOKENS, 16, 2)
    simulation.system = tq(1, 1, sinks=3, window=5)
    module = simulation.modules[0]
    ours = simulation.attend(module, query, key, value, None, 0.25)[0][0]
    coded = simulation.system.keys.code(key, 0), simulation.system.values.code(value, 1)
    for at in range(TOKENS):
        exact = [*range(min(3, at + 1)), *range(max(3, at - 4), at + 1)]
        k, v = (part[0, :, : at + 1].clone() for part in coded)
        k[:, exact], v[:, exact] = coders.half(key[0, :, exact]), coders.half(value[0, :, exact])
        for head in range(4):
            scores = k[head // 2] @ query[0, head, at] * 0.25
            torch.testing.assert_close(ours[at, head], scores.softmax(0) @ v[head // 2])


def test_keys_that_are_all_alike_before_rope_cost_nothing(simulation):
    angles = (torch.arange(TOKENS)[:, None] * torch.logspace(0, -3, 8)).repeat(1, 2)[None]
    simulation.turns = angles.cos(), angles.sin()
    alike = coders.half(100 * vectors(1, 16)).expand(1, 2, TOKENS, 16)
    key = rope(alike, *simulation.turns)
    simulation.system = tq(1, 1, centre="before")
    found = simulation.code_keys(simulation.system.keys, key, torch.ones(1, 2, 2, TOKENS, 16))
    torch.testing.assert_close(found, key, atol=1e-3, rtol=0)


def test_centring_before_rope_takes_a_bias_of_keys_away(ids):
    """What a bias costs without: the codes' steps grow with it."""

    def kl(bias: float, **tricks) -> float:
        simulation = Simulation(tiny(), PROMPT)
        if bias:
            simulation.bias_keys(bias)
        dense = reference(simulation, ids, 20)
        return dense.compare(simulation.logits(ids, 20, tq(4, 4, **tricks)))["kl"]

    assert kl(300.0, centre="before") < 2 * kl(0.0, centre="before")
    assert kl(300.0) > 10 * kl(0.0)


def test_kl_is_that_of_its_definition(simulation, ids):
    dense = reference(simulation, ids, 20)
    ours = dense.logits + torch.randn(dense.logits.shape, generator=torch.Generator().manual_seed(1))
    found = dense.compare(ours)
    p, q = dense.logits.double().softmax(-1), ours.double().softmax(-1)
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-9)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(ours[:-1].double(), ids[-19:]).item())
    assert dense.compare(dense.logits)["kl"] == 0 and dense.compare(dense.logits)["top1"] == 1


@pytest.mark.parametrize("widths", [[2] * 6, [3, 1, 2, 1, 2, 3], [1] * 8])
def test_a_path_goes_round_the_trellis(widths):
    codebook = trellis.gaussian_codebook(6)
    states = trellis.viterbi(vectors(64, len(widths))[0, 0], codebook, widths)
    for before, after, width in zip(states.T.roll(1, 0), states.T, widths):
        assert ((after >> width) == (before & (2 ** (6 - width) - 1))).all()


def test_a_path_that_meets_itself_at_a_given_place_is_the_cheapest():
    """Against all paths of a small trellis, whose ends meet in the same bits."""
    codebook, widths = trellis.gaussian_codebook(4), [2, 1, 2, 2]
    x = vectors(8, 4)[0, 0]
    states = trellis.viterbi(x, codebook, widths)
    for row, found in zip(x, states):
        costs = {}
        for bits in itertools.product(*(range(2**width) for width in widths)):
            state = 0
            for width, new in zip(widths * 2, bits * 2):
                state = ((state << width) | new) & 15
            path = []
            for width, new in zip(widths, bits):
                state = ((state << width) | new) & 15
                path.append(state)
            costs[tuple(path)] = (row - codebook[path]).square().sum().item()
        meeting = found[0].item() >> widths[0]
        best = min(cost for path, cost in costs.items() if path[0] >> widths[0] == meeting)
        assert (row - codebook[found]).square().sum().item() == pytest.approx(best, rel=1e-5)


def test_a_trellis_loses_less_than_the_best_scalar_code():
    x = vectors(128)
    decibels = [
        10 * np.log10(lost(trellis.trellis(rate, 16, 8, False), x) / lost(coders.turboquant(rate), x))
        for rate in (2, 3)
    ]
    assert all(-2.3 < gain < -0.9 for gain in decibels), decibels


def test_bits_go_where_they_save_most():
    variance = torch.tensor([[9.0, 4.0, 1.0, 0.01]])
    bits = allocate(variance, 8, 1)

    def cost(widths):
        return sum(v * distortion(width) for v, width in zip(variance[0].tolist(), widths))

    assert sum(bits) == 8
    rivals = (one for one in itertools.product(range(9), repeat=4) if sum(one) == 8)
    assert cost(bits) == pytest.approx(min(map(cost, rivals)), rel=1e-6)
    spent = spend([(4.0, 1.0), (0.5, 0.1)], 12, 64)
    assert sum(map(sum, spent)) == 12 and spent[0][0] > spent[0][1] > spent[1][1]


def test_a_transform_makes_costs_a_sum_of_squares():
    generator = torch.Generator().manual_seed(3)
    signal, cost = (torch.randn(2, 64, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    signal, cost = signal.mT @ signal, cost.mT @ cost
    made = transform(signal, cost)
    torch.testing.assert_close(made.analysis @ made.synthesis, torch.eye(16).expand(2, 16, 16), atol=1e-3, rtol=0)
    weighed = made.synthesis.double() @ cost @ made.synthesis.double().mT
    torch.testing.assert_close(weighed, torch.diag_embed(made.variance.double()), rtol=0.1, atol=0.1 * weighed.max())
    assert (made.variance.diff() <= 0).all()


@pytest.mark.parametrize("on_trellis", [False, True])
def test_a_basis_that_knows_signal_and_cost_loses_less(on_trellis):
    """In the currency of that cost: expected squared products with queries."""
    generator = torch.Generator().manual_seed(5)
    shapes = torch.randn(2, 2, 64, 64, generator=generator) * torch.logspace(0, -1.5, 64)
    x, queries = vectors(512) @ shapes[0], vectors(512, seed=1) @ shapes[1]
    basis = transform(moment(x, 0), moment(queries, 0))
    learned = transformed("", basis, allocate(basis.variance, 128, 8), on_trellis)
    fresh = vectors(512, seed=2) @ shapes[0]

    def damage(coder):
        return ((coder.code(fresh, 7) - fresh) @ queries.mT).square().sum()

    assert learned.bits(64) == coders.turboquant(2, 8).bits(64)
    assert damage(learned) < damage(coders.turboquant(2, 8)) / 4


@pytest.mark.parametrize("domain", ["before", "after"])
def test_a_calibrated_system_runs_in_either_domain(simulation, ids, domain):
    """At 8 bits next to nothing is lost, and a basis of each head's keys and values is counted."""
    made = plan(gather(simulation, prompt(6, TOKENS, seed=9)), domain, 8, 8)
    ours = system(*made[0], plan=made, unturned=domain == "before", centre="before", sinks=1)
    dense = reference(simulation, ids, 20)
    kl = [dense.compare(simulation.logits(ids, 20, one))["kl"] for one in (ours, tq(5, 5), tq(8, 8))]
    assert kl[0] < kl[1] / 2
    assert ours.constants == 2 * 2 * 2 * 16 * 16 * 2


def test_bits_by_layer_keep_to_their_budget(simulation, ids):
    base = system(coders.exact(), coders.exact(), centre="before", sinks=1)
    simulation.prompt = 40
    made = ByLayer(base, 2.5).made(simulation, torch.cat([ids, ids, ids]), 7)
    widths = [coder.bits(16) - 8 / 16 for pair in made.plan for coder in pair]
    assert sum(widths) / len(widths) == 2.5
