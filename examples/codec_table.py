"""The table of codecs, derived from the codecs themselves.

python examples/codec_table.py            prints it
python examples/codec_table.py --write    writes it to docs/codecs.md
"""

import argparse
from pathlib import Path

import torch
from tabulate import tabulate

from tqcompile import formats
from tqcompile.codec import Codec, Plane, Term
from tqcompile.layout import layout_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "codecs.md"
HEAD_DIMS = (64, 80, 128, 256)

TEXT = """# Codecs

Written by `python examples/codec_table.py --write`, from the codec objects of `tqcompile/formats.py`; a test holds
this page to them. `keys=` takes any name of the first column, and `values=` those that serve values.

{codecs}

- **stored**: what a codec keeps of one vector of `head_dim` numbers, in coordinates of its basis. All codes of a token
  lie in one row of bytes, side by side, and all its scales in one row of float16 numbers.
- **basis**: in which its terms read a vector: the model's own, a random orthogonal one, Sylvester's Hadamard matrix in
  blocks, or a sketch, of as many orthogonal or independent normal rows for each coordinate as it says. Terms that share
  the channels out have that share of them each; those of principal components take neighbours, the largest first.
- **bits at D**: all bytes of a token of one head, scales included, over `head_dim = D`; the spare room of a growing
  cache comes on top (at most a sixteenth, or 32 tokens). `identity` is counted for a float16 model.
- **unbiased**: averaged over the random basis, the inner product of any query with a decoded vector is the exact one.
- **values**: whether `values=` takes it. Signs of a sketch keep inner products on average; the vector that is made of
  them is off by 57 % of its energy at one row a coordinate, and by 14 % at four.

## Codes of a trellis

`turboquant:2:trellis` to `:4:trellis` store what `turboquant` of as many bits does, and choose it otherwise (QTIP,
arXiv 2406.11235). A number belongs to a state of ten bits, which are the codes of a coordinate and of those behind it,
the first behind the last; a code is good for several numbers, and all are chosen together, by Viterbi's algorithm.
Reading takes shifts and a look-up among 1,024 numbers, which `tqcompile/tables.py` derives.

- **Distortion**, of directions, in decibels under that of Lloyd-Max codes: 1.8 at two bits, 2.5 at three and 2.6 at
  four for 48 dims; 1.9, 2.5 and 2.5 for 80 (`tests/test_trellis.py` holds it to these). Narrow vectors have few closed
  paths, and under 16 bits a vector no path closes.
- **Encoding** is a sequential program, one operator of a graph: on one core of an x86-64 CPU (AVX-512), beside other
  programs, a token of 8 heads of 128 dims takes 6.2 ms at two bits where `turboquant:2` takes 0.17, and a prompt of
  1,024 tokens of 3 heads of 64 dims 0.68 s where that takes 7 ms: `python -m timeit -s "import torch; from tqcompile
  import coding, formats; torch.set_num_threads(1); c = formats.codec('turboquant:2:trellis'); x = torch.randn(8, 128)"
  "coding.encode(c, x)"`, and `torch.randn(3072, 64)`. On a GPU a program searches a row in one launch
  (`kernels/path.py`), in 64 dims or more; narrower ones are PyTorch there, hundreds of kernels.
- **On a GPU it saves memory and costs time.** One H100 80GB, 8 sequences of 32K tokens, 8 KV heads of 128 dims
  (2026-11-27, torch 2.11): attention 3.48 ms where dense takes 0.35, because the portable kernel gathers a state for
  each number; a token of all sequences 0.38 ms to write where `turboquant:2` takes 0.005; the whole context 2,249 ms,
  beside 115 ms of dense attention: `python -m tqcompile bench --batch 8 --context 32768 --codec turboquant:2:trellis
  --tasks attend append prefill`.
- **Quality**: mean KL of SmolLM2-135M-Instruct at two bits 0.706, where `turboquant:2` has 1.196, and 0.112 where that
  has 0.194 with keys centred and one first token exact, on 2026-11-27: `python -m tqcompile validate FOLDER --codecs
  turboquant:2,turboquant:2:trellis --windows 1 --context 256 --generate 0 --inner eager`, and the same with
  `+centre+sinks=1` behind both names; 191 scored tokens, so that their ratio counts and not their last digit.

## Principal components

`kvtc:1` to `:4` are the resident stage of KVTC (arXiv 2511.01815): a cache is kept in the principal components of its
first tokens, a sequence and a head at a time, in bands with bits of their own. The entropy-coded store that KVTC has
for what is not in use is not here. Keys are centred and balanced first, whatever `centre` says; values are not, as
taking off their mean does harm. A basis is found again for every prompt; one of fewer than 16 tokens gets a random
rotation. Queries are turned in place of keys, and the weighted sum of values is turned back.

- **Bits** are shared out by dynamic programming (`tqcompile/allocation.py`) over the spectrum of SmolLM2's keys
  (`examples/spectrum.py`), the float16 scalar of each band charged: so many a coordinate at 128 dims, scalars included.
  Energy behind the prompt is far flatter than in it: the first of eight bands has .37 of it, the last .07, which in the
  prompt itself has .006. That is worth .15 bits a coordinate; a scalar more costs .125 at 128 dims and .25 at 64.
- **Bytes**: the basis takes 2 D D bytes a head and sequence, in float16, and a step of Newton and Schulz makes it
  orthogonal again where it is used (what is turned comes back to 1e-6). At 64 dims that is 8 KiB, as much as 455 tokens
  of `kvtc:2`, and at 128 dims 32 KiB, as much as 1,024: it is under a tenth of what codes take from 4,551 and 10,240
  tokens on.
- **Where no basis can be had** the cache stays dense, the report says why, and `strict` raises: where keys cannot be
  centred, and where values are read in other ways than as weighted sums of a head's.
- **Quality**: none is gained. Mean KL of SmolLM2-135M-Instruct, one window of 512 tokens, 383 scored, values
  `turboquant:4`, keys as named, 2026-11-27 (`python -m tqcompile validate FOLDER --codecs
  turboquant:2/turboquant:4+centre,kvtc:2/turboquant:4 --windows 1 --context 512 --generate 0 --inner eager`, and the
  other rows alike):

| keys | extras | bits of its codes at 64 dims | bits of keys and values, basis included | mean KL |
|---|---|---|---|---|
| `turboquant:2` | | 2.25 | 3.25 | 1.118 |
| `turboquant:2` | centre | 2.25 | 3.28 | 0.279 |
| `kvtc:2` | | 2.25 | 4.28 | 0.301 |
| `turboquant:2` | centre, first token exact | 2.25 | 3.41 | 0.130 |
| `kvtc:2` | first token exact | 2.25 | 4.41 | 0.198 |
| `turboquant:3` | centre, first token exact | 3.25 | 3.91 | 0.0382 |
| `kvtc:3` | first token exact | 3.25 | 4.91 | 0.0393 |

  The same of all bit widths, of values too, on one H100 80GB: 8 windows of 1,024 tokens, 6,136 scored, float32,
  PyTorch 2.11, 2026-11-27 (`python -m tqcompile validate FOLDER --device cuda --inner eager --generate 0 --batch 4
  --codecs turboquant:2/turboquant:4+centre kvtc:2/turboquant:4 turboquant:4/turboquant:2 turboquant:4/kvtc:2`, and the
  other widths alike). Bits are of keys and values, basis included; where keys are named values are `turboquant:4`, and
  the other way round:

| bits | keys `turboquant`, centred | keys `kvtc` | values `turboquant` | values `kvtc` |
|---|---|---|---|---|
| 1 | KL 1.269, 2.77 bits | 1.408, 3.20 | 0.656, 2.75 | 0.783, 3.20 |
| 2 | 0.316, 3.27 | 0.337, 3.77 | 0.177, 3.25 | 0.227, 3.77 |
| 3 | 0.0871, 3.77 | 0.0907, 4.27 | 0.0986, 3.75 | 0.1047, 4.27 |
| 4 | 0.0280, 4.27 | 0.0280, 4.77 | 0.0800, 4.25 | 0.0788, 4.77 |

## Presets

`preset=` names a pair; `keys=` and `values=` override its halves.

{presets}
"""


def stored(plane: Plane) -> str:
    """What one plane holds, in words."""
    bits = "the model's dtype" if plane.bits is None else f"{plane.bits} bit{'s' * (plane.bits > 1)}"
    each = {None: "a vector", 1: "a coordinate"}.get(plane.per, f"{plane.per} coordinates")
    return f"{plane.name}: {bits} {each}" if plane.per in (None, 1) else f"{plane.name}: {bits} for {each}"


def basis_of(term: Term, principal: bool) -> str:
    """The basis of one term, in words."""
    name = {
        "standard": "the model's",
        "rotation": "random rotation",
        "hadamard": "Hadamard",
        "sketch": "orthogonal sketch",
        "gaussian": "normal sketch",
    }[term.basis]
    if term.share < 1:
        return f"{name} of {term.share} of the {'components' if principal else 'channels'}"
    return name if term.share == 1 else f"{name}, {term.share} rows a coordinate"


def row(codec: Codec) -> tuple:
    """The row of one codec."""
    sizes = [f"{layout_of(codec, dim, torch.float16, 'cpu').bits_per_element:.2f}" for dim in HEAD_DIMS]
    planes = "; ".join(stored(plane) for plane in codec.planes)
    basis = "; ".join(basis_of(term, codec.principal) for term in codec.terms)
    promises = ["yes" if promise else "no" for promise in (codec.unbiased, codec.for_values)]
    return (f"`{codec.name}`", planes, basis, *sizes, *promises, codec.minimum_head_dim, codec.source)


def page() -> str:
    """docs/codecs.md, whole."""
    bits = [f"bits at {d}" for d in HEAD_DIMS]
    headers = ("codec", "stored", "basis", *bits, "unbiased", "values", "least head_dim", "source")
    codecs = tabulate([row(codec) for codec in formats.REGISTRY.values()], headers, "github", disable_numparse=True)
    presets = [(f"`{name}`", f"`{p.keys}`", f"`{p.values}`", p.extras) for name, p in formats.PRESETS.items()]
    return TEXT.format(codecs=codecs, presets=tabulate(presets, ("preset", "keys", "values", "beside codes"), "github"))


def main(argv: list[str] | None = None) -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing")
    if parser.parse_args(argv).write:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
