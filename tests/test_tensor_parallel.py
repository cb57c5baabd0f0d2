"""Models whose heads are spread over two processes: each compresses its own, and together they are the whole model."""

import pytest
import sharded
import torch
from checkpoints import VOCABULARY
from ranks import RANKS, Ranks
from transformers import LlamaConfig, LlamaForCausalLM

# A sum over ranks is taken in another order. On a GPU queries of a codec are rounded to 15 bits, one or another way.
TOLERANCES = {("cpu", "identity"): 1e-5, ("cpu", "turboquant:4"): 1e-5}
TOLERANCES |= {("cuda", "identity"): 1e-4, ("cuda", "turboquant:4"): 1e-3}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def ranks(request):
    if request.param == "cuda" and torch.cuda.device_count() < RANKS:
        pytest.skip(f"fewer than {RANKS} CUDA devices")
    pool = Ranks(request.param)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A small random transformer with 4 KV heads, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        # The head is cut by its rows, and transformers 5.17 wants halves of one size.
        vocab_size=VOCABULARY + VOCABULARY % RANKS,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=128,
        # The usual 0.02 makes logits so flat that a wrong cache hardly moves them.
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("sharded")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def assert_sharded(facts: sharded.Facts, device: str, codec: str, layers: int = 2) -> None:
    assert facts.names == ["CompressedKV"] * 2 * layers and not facts.troubles, facts
    assert facts.worst < TOLERANCES[device, codec]
    assert facts.bytes * RANKS == facts.whole_bytes > 0


# One layer and one graph for Inductor: to compile is what takes long.
HAND_WRITTEN = [
    ("tuples", "identity", "eager", 2, sharded.CALLS),
    ("counter", "turboquant:4", "eager", 2, sharded.CALLS),
    ("counter", "identity", "inductor", 1, (1, 1, 1)),
]


@pytest.mark.parametrize("kind, codec, inner, layers, calls", HAND_WRITTEN)
def test_sharded_projections_equal_the_whole_model_with_half_its_bytes_a_rank(ranks, kind, codec, inner, layers, calls):
    for facts in ranks.run(sharded.hand_written, kind, codec, inner, layers, calls):
        assert_sharded(facts, ranks.device, codec, layers)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_transformer_sharded_by_its_own_plan_equals_the_whole_one(ranks, folder, kind):
    for facts in ranks.run(sharded.called, folder, kind, "turboquant:4"):
        assert_sharded(facts, ranks.device, "turboquant:4")


def test_generate_says_on_every_rank_what_the_whole_model_says(ranks, folder):
    for facts, same in ranks.run(sharded.generated, folder, "dynamic", "turboquant:4"):
        assert_sharded(facts, ranks.device, "turboquant:4")
        assert same


@pytest.mark.parametrize("write", ["cat", "slices", "to_local"])
def test_caches_that_are_dtensors_stay_dense_and_are_reported(ranks, write):
    if torch.__version__ < "2.12" and ranks.device == "cuda" and write != "to_local":
        pytest.skip("Dynamo of torch 2.11 does not multiply DTensors on a GPU, whatever the backend")
    for worst, compressed_bytes, refusals in ranks.run(sharded.sharded_caches, write):
        assert worst < TOLERANCES[ranks.device, "identity"]
        assert compressed_bytes == 0
        inputs = {name for name, _, _ in refusals if name.startswith("L[")}
        assert inputs == {"L['cache'][0]", "L['cache'][1]"}
        for _, reason, remedy in refusals:
            assert reason == "it is a DTensor, not a plain tensor" and "use_local_output=True" in remedy


def broken(device: str) -> None:
    if torch.distributed.get_rank() == 1:
        raise ArithmeticError("only here")
    torch.distributed.barrier()


def test_a_failure_on_one_rank_names_the_rank_and_shows_its_traceback(ranks):
    with pytest.raises(pytest.fail.Exception, match=r"rank 1: Traceback(?s:.*)ArithmeticError: only here"):
        ranks.run(broken)
