"""What each pair of codecs costs in quality: KL, top-1 agreement and perplexity of SmolLM2 on windows of English.

    python examples/quality.py [--windows 4] [--length 512] [--pairs KEYS/VALUES ...] [--write docs/quality.json]

The model runs uncompiled over a cache whose tokens went through the backend's own encoder and decoder
(`CompressedKV.encode(...).decode()`), so a token attends to codes only, its own included: what a compiled model does
in decode steps. A prefill that the backend compiles attends to exact keys and values, and loses less.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import torch
import transformers
from smollm2 import english, load, mean_kl, positive, top1_agreement
from tabulate import tabulate
from tqdm import tqdm
from transformers import DynamicCache

from tqcompile import CompressedKV, formats
from tqcompile.codec import Codec

PAIRS = (
    "identity/identity",
    "q8_0/q8_0",
    "turboquant:8/turboquant:8",
    "turboquant:5/turboquant:5",
    "turboquant:5/turboquant:4",
    "turboquant:4/turboquant:4",
    "turboquant:5/turboquant:3",
    "turboquant:4/turboquant:3",
    "turboquant:3/turboquant:4",
    "turboquant:3/turboquant:3",
    "turboquant:4/turboquant:2",
    "turboquant:2/turboquant:2",
)


class CodedCache(DynamicCache):
    """A growing cache that keeps what its codecs make of each token, and counts the bytes of their codes."""

    def __init__(self, config, keys: Codec, values: Codec):
        super().__init__(config=config)
        self.codecs, self.nbytes, self.elements = (keys, values), 0, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Keys and values [B, H, T, D] through their codecs, then what every growing cache does."""
        coded = [CompressedKV.encode(x, codec) for x, codec in zip((key_states, value_states), self.codecs)]
        self.nbytes += sum(part.nbytes for part in coded)
        self.elements += sum(part.numel() for part in coded)
        return super().update(*(part.decode() for part in coded), layer_idx, *args, **kwargs)


@torch.no_grad()
def evaluate(model, windows: torch.Tensor, reference: list[torch.Tensor], pair: str) -> dict:
    """Mean figures of one pair over `windows` [N, T], against the logits [T, V] of the uncompressed model."""
    codecs = [formats.codec(name) for name in pair.split("/")]
    kl, top1, loss, base, bits = 0.0, 0.0, 0.0, 0.0, 0.0
    for window, exact in zip(windows, reference):
        cache = CodedCache(model.config, *codecs)
        logits = model(window[None], None, None, cache).logits[0]
        kl, top1 = kl + mean_kl(exact, logits), top1 + top1_agreement(exact, logits)
        loss, base = loss + cross_entropy(logits, window), base + cross_entropy(exact, window)
        bits += 8 * cache.nbytes / cache.elements
    count = len(windows)
    perplexity = float(torch.tensor((loss - base) / count).exp()) - 1
    tokens = windows.shape[1]
    return {
        "pair": pair,
        "bits": bits / count,
        "bytes_per_token": cache.nbytes / tokens,
        "kl": max(0.0, kl / count),
        "top1": top1 / count,
        "perplexity": perplexity,
    }


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean negative log likelihood of the tokens [T] after the first."""
    return torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:]).item()


def table(rows: list[dict], dense_bytes: float) -> str:
    """Rows for people; `dense_bytes` is what a token takes in float16."""
    body = [
        (
            row["pair"].replace("/", " / "),
            f"{row['bits']:.2f}",
            f"{row['bytes_per_token']:,.0f}",
            f"{dense_bytes / row['bytes_per_token']:.2f} x",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['perplexity']:+.1%}",
        )
        for row in rows
    ]
    headers = ("keys / values", "bits", "bytes a token", "float16 over it", "mean KL", "top-1", "perplexity")
    return tabulate(body, headers, tablefmt="github", colalign=("left",) + ("right",) * 6, disable_numparse=True)


def pair_of_codecs(text: str) -> str:
    """An argparse type: KEYS/VALUES."""
    names = text.split("/")
    if len(names) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEYS/VALUES, such as turboquant:5/turboquant:3")
    for name in names:
        try:
            formats.codec(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def main(argv: list[str] | None = None) -> None:
    """Evaluate every pair and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name (default: packaged SmolLM2)")
    parser.add_argument("--windows", type=positive, default=4, help="windows of text (default 4)")
    parser.add_argument("--length", type=positive, default=512, help="tokens in a window (default 512)")
    parser.add_argument("--pairs", type=pair_of_codecs, nargs="+", default=PAIRS, metavar="KEYS/VALUES")
    parser.add_argument("--write", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(argv)
    model, tokenizer = load(options.model)
    ids, needed = english(tokenizer)[0], options.windows * options.length
    if len(ids) < needed:
        raise SystemExit(f"{options.windows} windows of {options.length} tokens are more than the {len(ids)} there are")
    windows = ids[:needed].view(options.windows, options.length)
    with torch.no_grad():
        reference = [model(window[None]).logits[0] for window in tqdm(windows, desc="reference", unit="window")]
    rows = [evaluate(model, windows, reference, pair) for pair in tqdm(options.pairs, desc="codecs", unit="pair")]
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dense = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    setting = f"{options.windows} windows of {options.length} tokens of English, torch {torch.__version__}, "
    setting += f"transformers {transformers.__version__}"
    print(f"\n{setting}, {date.today()}\n\n{table(rows, dense)}")
    if options.write is not None:
        content = {"setting": setting, "date": str(date.today()), "dense_bytes_per_token": dense, "rows": rows}
        options.write.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
