"""Attention of one query over a latent and a rotary key that all heads share (MLA), dense and compressed, in one run.

    python examples/latent_costs.py [--batch 8] [--context 32768] [--heads 16 128] [--codec turboquant:4]

`spelled out` and `fused` read the dense latent with queries that were brought to it; `made each step` is what such a
model computes as it stands: keys and values of all heads. Compressed, scores of the rotary key are a mask of attention
over the latent, or attention reads both caches. Every result is held to the reference before its time counts.
"""

import argparse
from collections.abc import Iterator

import torch
from smollm2 import costs_parser, positive
from tabulate import tabulate
from tqdm import tqdm

from tqcompile import coding, formats, ops, reference, tables
from tqcompile.bench import check, clock
from tqcompile.layout import layout_of

F = torch.nn.functional
# Channels of a head that are made of the latent, for keys and for values.
MADE = 128


class Case:
    """Queries [B, Hq, 1, n] of a latent and of a rotary key, and copies of both caches [B, 1, S, n]."""

    def __init__(self, given: argparse.Namespace, heads: int, device: torch.device):
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.heads, self.dims, self.codec = heads, (given.latent, given.rope), formats.codec(given.codec)
        self.scale = (MADE + given.rope) ** -0.5
        size = given.batch * given.context * sum(self.dims) * self.dtype.itemsize
        self.sizes, self.copies = (given.batch, 1, given.context), clock.copies_of(size, size, device)
        self.queries = [self._random(given.batch, heads, 1, dim) for dim in self.dims]
        self.caches = [[self._random(*self.sizes, dim) for dim in self.dims] for _ in range(self.copies)]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def expected(self, latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """What two query heads of the first sequence attend to, in float32."""
        asked = [q[:1, :2, 0].float() for q in self.queries]
        scores = sum(q @ cache[0].float().mT for q, cache in zip(asked, (latent, rope)))
        return ((scores * self.scale).softmax(-1) @ latent[0].float())[0]

    def spelled_out(self, i: int) -> torch.Tensor:
        latent, rope = (cache.squeeze(1) for cache in self.caches[i])
        asked = [q.squeeze(2) * self.scale for q in self.queries]
        scores = torch.baddbmm(asked[1] @ rope.mT, asked[0], latent.mT)
        return (scores.float().softmax(-1).to(self.dtype) @ latent).unsqueeze(2)

    def dense(self) -> Iterator[tuple[str, clock.Step]]:
        """What reads the latent as it is."""
        yield "spelled out", self.spelled_out
        # One tensor for both, as a cache of its own would be.
        q, joined = torch.cat(self.queries, -1), [torch.cat(pair, -1) for pair in self.caches]

        def fused(i: int) -> torch.Tensor:
            # Query heads as rows of the one KV head.
            rows = q.transpose(1, 2), joined[i], joined[i][..., : self.dims[0]]
            return F.scaled_dot_product_attention(*rows, scale=self.scale).transpose(1, 2)

        yield "fused", fused

    def made(self) -> clock.Step:
        """Keys and values of all heads, made of the latent at each step."""
        weight, rotated = self._random(self.heads * 2 * MADE, self.dims[0]) * 0.02, self.queries[1]
        part = self._random(self.sizes[0], self.heads, 1, MADE)
        q = torch.cat([part, rotated], -1)

        def step(i: int) -> torch.Tensor:
            latent, rope = self.caches[i]
            rows = F.linear(latent.squeeze(1), weight).view(*latent.shape[::2], self.heads, 2 * MADE).transpose(1, 2)
            k, v = rows.split(MADE, -1)
            k = torch.cat([k, rope.expand(-1, self.heads, -1, -1)], -1)
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale)

        return step

    def compressed(self) -> Iterator[tuple[str, clock.Step, list]]:
        """What reads codes, and the numbers of the first sequence that they stand for."""
        bases = [tables.basis_matrix(self.codec, dim, self.device, self.dtype) for dim in self.dims]
        planes = [[self._planes(cache, basis) for cache, basis in zip(pair, bases)] for pair in self.caches]
        asked = [reference.rotate(q, basis) for q, basis in zip(self.queries, bases)]
        asked[1] = asked[1] * self.scale
        names, dims = (self.codec.name,) * 2, (self.dims[0],) * 2
        how = None, None, bases[0], False, self.scale, "", None, *names, *dims, torch.float32

        def masked(i: int) -> torch.Tensor:
            latent, rope = planes[i]
            scores = ops.logits(asked[1], rope, self.codec.name, self.dims[1])
            return ops.attend(asked[0], latent, latent, scores, *how)

        def both(i: int) -> torch.Tensor:
            latent, rope = planes[i]
            second = {"second": [asked[1], *rope], "second_codec": self.codec.name, "second_dim": self.dims[1]}
            return ops.attend(asked[0], latent, latent, None, *how, **second)

        shown = [self._decoded(side, basis, dim) for side, basis, dim in zip(planes[0], bases, self.dims)]
        yield "scores as a mask", masked, shown
        yield "both caches", both, shown

    def _planes(self, cache: torch.Tensor, basis: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        planes = layout_of(self.codec, cache.shape[-1], self.dtype, self.device.type).allocate(
            cache.shape[:3], self.device
        )
        ops.append(planes, cache, None, basis, self.codec.name)
        return planes

    def _decoded(self, planes, basis: torch.Tensor | None, dim: int) -> torch.Tensor:
        """The first sequence, as its codes have it."""
        first = coding.decode(self.codec, [plane[:1] for plane in planes], dim)
        return reference.rotate_back(first, None if basis is None else basis.float(), torch.float32)


def measured(given: argparse.Namespace, heads: int, device: torch.device) -> list[tuple[str, float]]:
    """Milliseconds of each kind of attention."""
    torch.manual_seed(0)
    case, found = Case(given, heads, device), []
    steps = [(name, step, case.caches[0]) for name, step in case.dense()]
    steps += list(case.compressed())
    for name, step, shown in tqdm(steps, desc=f"{heads} heads", disable=None):
        check.require(name, step(0)[0, :2, 0], case.expected(*shown))
        found.append((name, clock.measure(step, case.copies, device).median))
    case.caches = case.caches[:2]
    found.append(("made each step", clock.measure(case.made(), 2, device).median))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = costs_parser(__doc__, {"batch": 8, "context": 32768, "latent": 512, "rope": 64})
    parser.add_argument("--heads", type=positive, nargs="+", default=[16, 128], metavar="N", help="default 16 128")
    given = parser.parse_args(arguments)
    rows = []
    for heads in given.heads:
        found = measured(given, heads, torch.device(given.device))
        best = min(ms for name, ms in found if name in ("spelled out", "fused"))
        rows += [(heads, name, f"{ms:.3f}", f"{best / ms:.2f} x") for name, ms in found]
        clock.release(torch.device(given.device))
    print(tabulate(rows, ("heads", "attention", "ms", "best dense over this"), disable_numparse=True))


if __name__ == "__main__":
    main()
