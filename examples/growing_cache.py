"""What a step costs over a cache that grows, dense beside compressed, without CUDA graphs: as `generate` takes it.

    python examples/growing_cache.py [--batch 8] [--context 32768] [--layers 8] [--codec turboquant:4]

A Llama of the shape of Llama 3 8B, but for its layers, reads a prompt of random tokens, and then one by one more, over
the `DynamicCache` of transformers. Its first steps compile; `step` is a mean of 40 later ones, and `kernels` is how
long a GPU works on one of them, in a profile. On a GPU PyTorch attends by cuDNN, which plans anew for each
length, so there is a second dense model without that.
"""

import time

import torch
from smollm2 import costs_parser, live_bytes, tensors
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tqcompile import CompressedKV, turboquant
from tqcompile.options import INNERS

FIRST, STEPS, PROFILED = 3, 40, 3
NO_CUDNN = "dense, without cuDNN"


def config(layers: int, context: int) -> LlamaConfig:
    """The shape of Llama 3 8B with so many layers, and room for a prompt and what follows."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=context + 128,
    )


class Conversation:
    """A compiled model and its growing cache."""

    def __init__(self, model: LlamaForCausalLM, backend):
        torch.compiler.reset()
        self.call, self.cache = torch.compile(model, backend=backend), DynamicCache()
        self.device = next(model.parameters()).device

    def feed(self, tokens: torch.Tensor, count: int = 1) -> float:
        """Read tokens [B, T] so many times, one call behind the other, and return the seconds of each."""
        start = self._now()
        for _ in range(count):
            self.call(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return (self._now() - start) / count

    def kernels(self, token: torch.Tensor) -> float:
        """Seconds that a GPU works on a step."""
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.feed(token, PROFILED)
        on_device = (event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA)
        return sum(event.device_time for event in on_device) / PROFILED / 1e6

    def require_compressed(self) -> None:
        """Raise where a cache stayed dense."""
        if not all(isinstance(tensor, CompressedKV) for tensor in tensors(self.cache)):
            raise SystemExit("a cache stayed dense: print(tqcompile.report()) says why")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@torch.no_grad()
def row(model: LlamaForCausalLM, name: str, backend, prompt: torch.Tensor) -> tuple[str, ...]:
    """One line of the table."""
    torch.backends.cuda.enable_cudnn_sdp(name != NO_CUDNN)
    talk, token = Conversation(model, backend), prompt[:, :1]
    talk.feed(prompt)
    first = ", ".join(f"{talk.feed(token):.2f}" for _ in range(FIRST))
    if not isinstance(backend, str):
        talk.require_compressed()
    step = f"{1e3 * talk.feed(token, STEPS):.2f}"
    kernels = f"{1e3 * talk.kernels(token):.2f}" if prompt.device.type == "cuda" else ""
    return name, first, step, kernels, f"{live_bytes(talk.cache) / 2**20:.1f}"


def main(arguments: list[str] | None = None) -> None:
    parser = costs_parser(__doc__, {"batch": 8, "context": 32768, "layers": 8})
    parser.add_argument("--inner", choices=INNERS, default="inductor", help="compiler (default inductor)")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    shape = config(given.layers, given.context)
    with torch.device(given.device):
        dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
        model = LlamaForCausalLM(shape).to(dtype).eval().requires_grad_(False)
        prompt = torch.randint(shape.vocab_size, (given.batch, given.context))
    compressed = turboquant(keys=given.codec, values=given.codec, inner=given.inner)
    dense = ("dense", NO_CUDNN) if given.device == "cuda" else ("dense",)
    backends = {**dict.fromkeys(dense, given.inner), given.codec: compressed}
    rows = [row(model, *each, prompt) for each in tqdm(backends.items(), unit="row", disable=None)]
    titles = ("cache", "first steps, s", "step, ms", "kernels, ms", "MiB of caches")
    print(tabulate(rows, titles, disable_numparse=True, colalign=("left", "left", "right", "right", "right")))


if __name__ == "__main__":
    main()
