"""How the energy of keys and values spreads over their principal components: what bits are shared out by.

python examples/spectrum.py               of SmolLM2-135M-Instruct, in a window of 768 tokens

The components are those of the first tokens of a window, as `tqcompile.principal` takes them; the energy is that of the
tokens behind, and beside it that of the first tokens themselves.
"""

import argparse

import torch
from simulation.attention import Simulation, rope, unrope
from smollm2 import english, load
from tabulate import tabulate

from tqcompile import centre

BANDS = 8


def energies(tokens: torch.Tensor, prompt: int, skip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of energy [H, bands] of tokens [1, H, T, D] behind the prompt, and in it, in its principal components."""
    rows = tokens[0, :, skip:prompt]
    axes = torch.linalg.eigh(rows.mT @ rows)[1].flip(-1)

    def shares(x: torch.Tensor) -> torch.Tensor:
        energy = (x @ axes).square().mean(1)
        return (energy / energy.sum(-1, keepdim=True)).unflatten(-1, (BANDS, -1)).sum(-1)

    return shares(tokens[0, :, prompt:]), shares(rows)


def spectra(simulation: Simulation, ids: torch.Tensor, prompt: int) -> dict[str, list[float]]:
    """Mean shares of bands over all heads of a model that reads ids [T]."""
    found: dict[str, list[torch.Tensor]] = {}

    def watch(module, query, key, value):
        plain = unrope(key, *simulation.turns)
        mean = plain[:, :, 1:prompt].mean(2, keepdim=True)
        left = key - rope(mean.expand_as(key), *simulation.turns)
        asked = query.unflatten(1, (key.shape[1], -1))[:, :, :, :prompt].square().mean((2, 3)).unsqueeze(2)
        kept = left[:, :, 1:prompt].square().mean(2, keepdim=True)
        for name, tokens, skip in (("keys", left / centre._balance(kept, asked), 1), ("values", value, 0)):
            for where, each in zip(("behind", "in it"), energies(tokens, prompt, skip)):
                found.setdefault(f"{name}, {where}", []).append(each)

    simulation.watch = watch
    simulation.logits(ids, 1)
    simulation.watch = None
    return {name: torch.cat(each).mean(0).tolist() for name, each in found.items()}


def main(argv: list[str] | None = None) -> None:
    """Print a row for keys and values, of tokens behind the prompt and in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or hub name (default: the packaged SmolLM2)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens that components are taken from")
    parser.add_argument("--start", type=int, default=3000, help="the first token of the window in the text")
    parser.add_argument("--tokens", type=int, default=768, help="tokens of the window")
    args = parser.parse_args(argv)
    model, tokenizer = load(args.model)
    simulation = Simulation(model, args.prompt)
    ids = english(tokenizer)[0, args.start : args.start + args.tokens]
    rows = [(name, *shares) for name, shares in spectra(simulation, ids, args.prompt).items()]
    print(tabulate(rows, ("prompt", *(f"band {band}" for band in range(1, BANDS + 1))), floatfmt=".3f"))


if __name__ == "__main__":
    main()
