"""What each rank of a test of tensor parallelism does: run a sharded model and measure; the test judges."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from checkpoints import VOCABULARY, cache_of, new_cache, step, tensors
from conversations import Conversation
from models import EMBED, MODELS, Shape
from ranks import RANKS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

import tqcompile

SHAPE = Shape(heads=8, kv_heads=4, head_dim=32)
CALLS = (4, 1, 1)
ROWS = 2


@dataclass(frozen=True)
class Facts:
    """`worst` is the largest error of a call relative to the output it should have; `whole_bytes` are the bytes of
    the same caches in one process; `troubles` is the report where something was not compressed as it should be."""

    worst: float
    bytes: int
    whole_bytes: int
    names: list[str]
    troubles: str


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _facts(worst: list[float], caches, model, whole) -> Facts:
    ours, theirs = tqcompile.report(model), tqcompile.report(whole)
    wrong = ours.refusals or ours.fallbacks or any(graph.events for graph in ours.graphs)
    missed = {id(cache) for cache in caches} - {id(cache) for cache in ours.caches}
    troubles = f"{len(missed)} caches are not in the report\n{ours}" if wrong or missed else ""
    names = [type(cache).__name__ for cache in caches]
    return Facts(max(worst), ours.compressed_bytes, theirs.compressed_bytes, names, troubles)


def _shard(model, device: str, local: bool = True) -> None:
    """Projections by head, and a cache of this rank's heads where the model holds one."""
    mesh = init_device_mesh(device, (RANKS,))
    columns = {name: ColwiseParallel(use_local_output=local) for name in ("wq", "wk", "wv")}
    for block in model.blocks:
        parallelize_module(block, mesh, {**columns, "wo": RowwiseParallel()})
        for name, cache in list(block.named_buffers()):
            if cache.dim() == 4:
                setattr(block, name, cache.chunk(RANKS, dim=1)[dist.get_rank()].clone())


def _inputs(device: str, calls: tuple[int, ...] = CALLS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, tokens, EMBED, generator=generator).to(device) for tokens in calls]


def hand_written(device: str, kind: str, codec: str, inner: str, layers: int, calls: tuple[int, ...]) -> Facts:
    """A model of `models.py` with sharded projections, against itself in one process."""
    torch.manual_seed(0)
    shape = replace(SHAPE, layers=layers)
    model, whole = (MODELS[kind](shape).requires_grad_(False).to(device) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    _shard(model, device)
    codecs = {"keys": codec, "values": codec}
    ours, theirs = (
        Conversation(m, torch.compile(m, backend="turboquant", options={**codecs, "inner": by}))
        for m, by in ((model, inner), (whole, "eager"))
    )
    worst = [relative(ours.feed(x), theirs.feed(x)) for x in _inputs(device, calls)]
    return _facts(worst, ours.caches(), model, whole)


def _loaded(device: str, folder: str) -> tuple[nn.Module, nn.Module]:
    """The model of a folder, sharded by its own plan, and whole."""
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto").eval().requires_grad_(False)
    whole = LlamaForCausalLM.from_pretrained(folder).eval().requires_grad_(False).to(device)
    assert isinstance(model.model.layers[0].self_attn.k_proj.weight, DTensor)
    return model, whole


def _prompt(device: str, tokens: int, seed: int) -> torch.Tensor:
    ids = torch.randint(2, VOCABULARY, (ROWS, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(device)


def called(device: str, folder: str, kind: str, codec: str) -> Facts:
    """A compiled transformer on its own cache."""
    model, whole = _loaded(device, folder)
    options = {"keys": codec, "values": codec, "inner": "eager"}
    ours, theirs = (torch.compile(m, backend="turboquant", options=options) for m in (model, whole))
    cache, whole_cache = new_cache(kind, model), new_cache(kind, whole)
    prompts = [_prompt(device, tokens, seed) for seed, tokens in enumerate(CALLS)]
    worst = [relative(step(ours, ids, cache), step(theirs, ids, whole_cache)) for ids in prompts]
    return _facts(worst, tensors(cache), model, whole)


def generated(device: str, folder: str, kind: str, codec: str) -> tuple[Facts, bool]:
    """`generate` of a compiled transformer; whether both said the same."""
    pair, results = _loaded(device, folder), []
    ids = _prompt(device, 6, 0)
    for model in pair:
        model.forward = torch.compile(
            model.forward, backend="turboquant", options={"keys": codec, "values": codec, "inner": "eager"}
        )
        results.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                disable_compile=True,
                cache_implementation=kind,
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    ours, theirs = results
    worst = [relative(*logits) for logits in zip(ours.logits, theirs.logits)]
    # Both results live until the bytes are counted: a report counts the caches that somebody holds.
    facts = _facts(worst, tensors(cache_of(ours)), *pair)
    return facts, torch.equal(ours.sequences, theirs.sequences)


class Sharded(nn.Module):
    """Attention on caches that are themselves sharded tensors; `write` says how they are kept."""

    def __init__(self, write: str):
        super().__init__()
        self.write, wide = write, SHAPE.kv_heads * SHAPE.head_dim
        self.wq, self.wk, self.wv = (nn.Linear(EMBED, wide) for _ in range(3))
        self.wo = nn.Linear(wide, EMBED)

    def forward(self, x, cache, start: int):
        size = (*x.shape[:2], SHAPE.kv_heads, SHAPE.head_dim)
        q, k, v = (w(x).view(size).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        stop = start + x.shape[1]
        if self.write == "cat":
            cache = k, v = (k, v) if cache is None else (torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2))
        else:
            mesh, keys, values = k.device_mesh, *cache
            if self.write == "to_local":
                q, k, v, keys, values = (t.to_local() for t in (q, k, v, keys, values))
            keys[:, :, start:stop], values[:, :, start:stop] = k, v
            k, v = keys[:, :, :stop], values[:, :, :stop]
        y = torch.softmax(torch.matmul(q, k.transpose(2, 3)), -1) @ v
        y = y.transpose(1, 2).reshape(*x.shape[:2], -1)
        y = DTensor.from_local(y, mesh, [Shard(-1)]) if self.write == "to_local" else y
        return x + self.wo(y), cache


def sharded_caches(device: str, write: str) -> tuple[float, int, list]:
    """The error against the same sharded model that is not compiled, compressed bytes, and the refusals as text."""
    torch.manual_seed(0)
    model, mesh = Sharded(write).requires_grad_(False).to(device), init_device_mesh(device, (RANKS,))
    columns = {name: ColwiseParallel(use_local_output=False) for name in ("wq", "wk", "wv")}
    parallelize_module(model, mesh, {**columns, "wo": RowwiseParallel()})
    compiled = torch.compile(
        model, backend="turboquant", options={"keys": "turboquant:4", "values": "turboquant:2", "inner": "eager"}
    )
    size = (ROWS, SHAPE.kv_heads, SHAPE.length, SHAPE.head_dim)

    def empty():
        return None if write == "cat" else [zeros(size, device_mesh=mesh, placements=[Shard(1)]) for _ in range(2)]

    ours, theirs, start, worst = empty(), empty(), 0, []
    for x in _inputs(device):
        (mine, ours), (other, theirs) = compiled(x, ours, start), model(x, theirs, start)
        worst.append(relative(mine, other))
        start += x.shape[1]
    found = tqcompile.report(model)
    return max(worst), found.compressed_bytes, [(r.name, r.reason, r.remedy) for r in found.refusals]
