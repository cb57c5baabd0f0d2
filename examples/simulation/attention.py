"""A model's attention over fake-quantised keys and values, one forward for all positions of a window of text.

Query t sees codes of every token up to its own, except the first `sinks` and the last `window` tokens before it, which
are kept in 16 bits: the mix that a generation would see at that position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from simulation.coders import HALF_BITS, Coder, half
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

INTERFACE = "frontier"
# Rows of logits that are compared at once, in float64.
ROWS = 256


@dataclass(frozen=True)
class System:
    """How a cache is kept. `centre` is "" or takes a mean per head from the keys, "before" or "after" RoPE; `balance`
    moves diagonal scales from keys to queries; both from the first tokens of a window, the prompt.

    `plan` gives (keys, values) layer by layer in place of `keys` and `values`. `exact_layers` first and as many last
    layers stay in 16 bits.
    """

    name: str
    keys: Coder
    values: Coder
    centre: str = ""
    balance: bool = False
    value_mean: bool = False
    sinks: int = 0
    window: int = 0
    exact_layers: int = 0
    rival: bool = False
    unturned: bool = False
    plan: tuple[tuple[Coder, Coder], ...] | None = None

    @property
    def seeded(self) -> bool:
        pairs = self.plan or ((self.keys, self.values),)
        return any(coder.seeded for pair in pairs for coder in pair)

    def coders(self, layer: int, layers: int) -> tuple[Coder, Coder] | None:
        """The coders of a layer; None where it stays in 16 bits."""
        if min(layer, layers - 1 - layer) < self.exact_layers:
            return None
        return self.plan[layer] if self.plan else (self.keys, self.values)

    @property
    def constants(self) -> int:
        """Bytes that a model keeps once, in float16."""
        return sum(coder.constants for pair in self.plan or () for coder in pair) * HALF_BITS // 8

    def bits(self, contexts: torch.Tensor, layers: int, head_dim: int) -> float:
        """Mean bits an element over `contexts` [N] (cached tokens), float64: codes, scales, 16-bit tokens, vectors."""
        kept = torch.minimum(contexts, contexts.new_tensor(self.sinks + self.window))
        vectors = (self.centre != "") + self.balance + self.value_mean
        total = torch.zeros_like(contexts)
        for layer in range(layers):
            pair = self.coders(layer, layers)
            if pair is None:
                total += HALF_BITS * contexts
                continue
            code_bits = sum(coder.bits(head_dim) for coder in pair) / 2
            total += HALF_BITS * kept + code_bits * (contexts - kept) + HALF_BITS * vectors / 2
        return (total / layers / contexts).mean().item()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D] turned by its positions' angles, cos and sin [B, T, D]."""
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def unrope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The inverse of `rope`."""
    return (x * cos[:, None] - rotate_half(x) * sin[:, None]) / (cos**2 + sin**2)[:, None]


class Simulation:
    """A model whose attention runs over what `system` keeps; `system=None` is dense.

    Raises:
        ValueError: the model's attention layers do not take rotary cosines and sines.
    """

    def __init__(self, model: torch.nn.Module, prompt: int = 128):
        self.model, self.prompt = model, prompt
        self.system: System | None = None
        self.seed = 0
        self.turns: tuple[torch.Tensor, torch.Tensor] | None = None
        self.watch: Callable | None = None
        ALL_ATTENTION_FUNCTIONS.register(INTERFACE, self.attend)
        model.set_attn_implementation(INTERFACE)
        modules = [module for module in model.modules() if hasattr(module, "k_proj") and hasattr(module, "layer_idx")]
        if not modules:
            raise ValueError("this model has no attention layers with a k_proj and a layer_idx; name another --model")
        for module in modules:
            module.register_forward_pre_hook(self._note_turns, with_kwargs=True)
        self.modules, self.layers, self.head_dim = modules, len(modules), modules[0].head_dim
        # Numbers that a token adds to the cache.
        self.elements = 2 * sum(module.k_proj.out_features for module in modules)

    def bias_keys(self, norm: float, pairs: int = 2, seed: int = 0) -> None:
        """Add biases of this norm to every head's keys, in the `pairs` pairs of dimensions that RoPE turns slowest."""
        half_dim = self.head_dim // 2
        slow = [*range(half_dim - pairs, half_dim), *range(self.head_dim - pairs, self.head_dim)]
        for index, module in enumerate(self.modules):
            linear = module.k_proj
            generator = torch.Generator().manual_seed(seed + index)
            heads = linear.out_features // self.head_dim
            bias = torch.zeros(heads, self.head_dim)
            bias[:, slow] = torch.nn.functional.normalize(torch.randn(heads, len(slow), generator=generator)) * norm
            whole = bias.flatten().to(linear.weight) + (0 if linear.bias is None else linear.bias)
            linear.bias = torch.nn.Parameter(whole, requires_grad=False)

    def _note_turns(self, module, args, kwargs) -> None:
        if kwargs.get("position_embeddings") is None:
            raise ValueError("this model's attention takes no position_embeddings (cos, sin); name another --model")
        self.turns = kwargs["position_embeddings"]

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, keep: int, system: System | None = None, seed: int = 0) -> torch.Tensor:
        """Logits [keep, vocabulary] of the last `keep` of tokens [T]."""
        self.system, self.seed = system, seed
        return self.model(tokens[None], use_cache=False, logits_to_keep=keep).logits[0].float()

    def attend(self, module, query, key, value, mask, scaling, **_):
        """A transformers attention function: query [B, Hq, T, D], key and value [B, H, T, D] -> [B, T, Hq, D]."""
        heads, tokens = key.shape[1], key.shape[2]
        if self.watch:
            self.watch(module, query, key, value)
        grouped = query.unflatten(1, (heads, -1))
        pair = self.system.coders(module.layer_idx, self.layers) if self.system else None
        at = torch.arange(tokens, device=key.device)
        age = at[:, None] - at
        future = (age < 0).expand(tokens, tokens)
        if pair is None:
            keep = half if self.system else (lambda x: x)
            scores = _scores(grouped, keep(key)).mul_(scaling).masked_fill_(future, -torch.inf)
            return _mixed(scores.softmax(-1), keep(value)), None
        coded_key, coded_value = self.code_keys(pair[0], key, grouped), self.code_values(pair[1], value)
        scores = _scores(grouped, coded_key)
        if not self.system.sinks and not self.system.window:
            probabilities = scores.mul_(scaling).masked_fill_(future, -torch.inf).softmax(-1)
            return _mixed(probabilities, coded_value), None
        near = (age < self.system.window) | (at < self.system.sinks)
        scores = torch.where(near, _scores(grouped, half(key)), scores)
        probabilities = scores.mul_(scaling).masked_fill_(future, -torch.inf).softmax(-1)
        exact = _mixed(probabilities * near, half(value))
        return exact + _mixed(probabilities.mul_(~near), coded_value), None

    def code_keys(self, coder: Coder, key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Keys after RoPE, as the system's codes give them back; query [B, H, G, T, D] is what balances them."""
        system, offset = self.system, torch.zeros_like(key[:, :, :1])
        # Sinks are unlike all other keys, and are not coded.
        seen = slice(system.sinks, self.prompt)
        if system.centre == "before":
            mean = half(unrope(key, *self.turns)[:, :, seen].mean(2, keepdim=True))
            offset = rope(mean.expand_as(key), *self.turns)
        elif system.centre == "after":
            offset = half(key[:, :, seen].mean(2, keepdim=True))
        rest = key - offset
        if system.unturned:
            return rope(coder.code(unrope(rest, *self.turns), self.seed), *self.turns) + offset
        if not system.balance:
            return coder.code(rest, self.seed) + offset
        # |q s|^2 |k / s|^2 is least where s^4 = E k^2 / E q^2 (Cauchy-Schwarz), channel by channel.
        keys = rest[:, :, seen].square().mean(2, keepdim=True)
        queries = query[:, :, :, seen].square().mean((2, 3)).unsqueeze(2)
        scale = half((keys / queries.clamp_min(1e-12)).clamp_min(1e-12) ** 0.25)
        return coder.code(rest / scale, self.seed) * scale + offset

    def code_values(self, coder: Coder, value: torch.Tensor) -> torch.Tensor:
        if not self.system.value_mean:
            return coder.code(value, self.seed + 1)
        mean = half(value[:, :, : self.prompt].mean(2, keepdim=True))
        return coder.code(value - mean, self.seed + 1) + mean


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, H, G, T, D], [B, H, S, D] -> [B, H, G, T, S]."""
    return query @ key.unsqueeze(2).mT


def _mixed(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[B, H, G, T, S], [B, H, S, D] -> [B, T, H * G, D]."""
    return (probabilities @ value.unsqueeze(2)).flatten(1, 2).transpose(1, 2)


@dataclass
class Reference:
    """Dense logits [N, vocabulary] and the tokens [N] that follow, the last of them unknown (-1)."""

    logits: torch.Tensor
    following: torch.Tensor

    @cached_property
    def loss(self) -> float:
        return self.compare(self.logits)["loss"]

    def compare(self, logits: torch.Tensor) -> dict[str, float]:
        """Mean KL in nats, share of equal largest entries, mean negative log likelihood; float64."""
        kl, same, loss = 0.0, 0.0, 0.0
        for ours, dense, token in zip(logits.split(ROWS), self.logits.split(ROWS), self.following.split(ROWS)):
            p, q = dense.double().log_softmax(-1), ours.double().log_softmax(-1)
            kl += (p.exp() * (p - q)).sum().item()
            same += (dense.argmax(-1) == ours.argmax(-1)).sum().item()
            known = token >= 0
            loss -= q[known].gather(-1, token[known, None]).sum().item()
        count = len(logits)
        return {"kl": kl / count, "top1": same / count, "loss": loss / int((self.following >= 0).sum())}


def reference(simulation: Simulation, tokens: torch.Tensor, keep: int) -> Reference:
    """What dense attention says of the last `keep` of tokens [T]."""
    following = torch.cat([tokens[-keep + 1 :], tokens.new_tensor([-1])])
    return Reference(simulation.logits(tokens, keep), following)
