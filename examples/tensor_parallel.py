"""A model whose heads are spread over processes: each rank compresses the KV cache of its own heads.

torchrun --nproc-per-node 2 examples/tensor_parallel.py [--model FOLDER] [--tokens 32] [--keys CODEC] [--values CODEC]

Over NCCL where there is a GPU for each process, over gloo on a CPU otherwise.
"""

import argparse
import os
import tempfile
import warnings

import torch
import torch.distributed as dist
from smollm2 import add_codecs, backend_options, decode, kept_as, live_bytes, positive, prefill, top1_agreement
from tabulate import tabulate
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import tqcompile
from tqcompile.options import INNERS

COLUMNS = ("rank", "device", "caches", "KV heads", "compressed bytes", "dense bytes", "top-1 agreement")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a causal language model (default: a small random Llama)")
    parser.add_argument("--context", type=positive, default=64, help="random tokens to read first (default 64)")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens to generate (default 32)")
    parser.add_argument("--inner", choices=INNERS, default="inductor", help="compiler of the rewritten graph")
    add_codecs(parser)
    options = parser.parse_args(argv)
    if "RANK" not in os.environ:
        raise SystemExit(
            "Start this with torchrun --nproc-per-node 2, which says to each process which part is its own."
        )
    return options


def join() -> torch.device:
    """This process's device, in a process group with the others."""
    local, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available() and torch.cuda.device_count() >= size:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


def random_llama(folder: str) -> None:
    """Save a Llama of 2 layers and 4 KV heads, with weights wide enough that its logits tell tokens apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.05,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def sharded(name: str | None) -> torch.nn.Module:
    """The model of a folder, or a random one, cut by the plan that it brings along."""
    logging.disable_progress_bar()
    # The folder outlives the reading of the slowest rank: rank 0 removes it after the barrier.
    with tempfile.TemporaryDirectory() as folder:
        if name is None and dist.get_rank() == 0:
            random_llama(folder)
        names = [name or folder]
        dist.broadcast_object_list(names)
        model = AutoModelForCausalLM.from_pretrained(names[0], dtype=torch.float32, tp_plan="auto")
        dist.barrier()
    return model.eval().requires_grad_(False)


def row(model: torch.nn.Module, device: torch.device, options: argparse.Namespace) -> tuple[tuple, object]:
    """Decode with a dense and with a compressed cache, the same tokens: this rank's row, and the cache to report on."""
    compiled = torch.compile(model, backend="turboquant", options=backend_options(options))

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, options.context), generator=generator).to(device)
    dense_cache, first = prefill(model, ids)
    cache, _ = prefill(model, ids)
    dense = decode(model, dense_cache, first, options.tokens, desc="dense")
    ours = decode(compiled, cache, first, options.tokens, forced=dense.tokens, desc="compressed")

    found, heads = tqcompile.report(model), cache.layers[0].keys.shape[1]
    agreement = top1_agreement(torch.stack(dense.logits), torch.stack(ours.logits))
    sizes = (f"{found.compressed_bytes:,}", f"{live_bytes(dense_cache):,}")
    cells = (dist.get_rank(), str(device), len(found.caches), heads, *sizes, f"{agreement:.1%} of {options.tokens}")
    return cells, cache


def main(argv: list[str] | None = None) -> None:
    """Every rank decodes; rank 0 prints the table and its own report."""
    options = arguments(argv)
    # Newer releases want the plan inside another argument, which older ones do not have.
    warnings.filterwarnings("ignore", message="Passing `tp_plan`", category=FutureWarning)
    device = join()
    model = sharded(options.model)
    mine, cache = row(model, device, options)
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, mine)
    if dist.get_rank() == 0:
        print(f"\n{kept_as(options)}; {dist.get_backend()}\n")
        print(tabulate(rows, COLUMNS, colalign=("right", "left") + ("right",) * 5, disable_numparse=True))
        print(f"\nthe first key cache of rank 0: {cache.layers[0].keys!r}\n\n{tqcompile.report(model)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
