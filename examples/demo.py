"""The same model, with a dense and with a compressed KV cache: bytes, speed, how close the two are, and both texts.

    python examples/demo.py [--model FOLDER_OR_NAME] [--preset small] [--keys CODEC] [--values CODEC] [--device cuda]

Both caches start as copies of one prefill. "Agreement" and "KL" are measured along the dense run's tokens: the
compressed model reads those, and what it would have said next is compared at each step.
"""

import argparse
import copy
import time

import torch
from smollm2 import (
    Run,
    add_codecs,
    backend_options,
    bits_per_element,
    conversation,
    decode,
    device,
    kept_as,
    live_bytes,
    load,
    mark_growing,
    mean_kl,
    positive,
    prefill,
    top1_agreement,
)
from tabulate import tabulate

import tqcompile
from tqcompile.options import INNERS

TOPIC = "compound"
QUESTION = "In a few sentences: what does the text above say about the with statement?"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: packaged SmolLM2)")
    parser.add_argument("--device", type=device, default="cpu", help="where to run (default cpu)")
    parser.add_argument("--context", type=positive, default=1600, help="tokens of the document (default 1600)")
    parser.add_argument("--tokens", type=positive, default=64, help="tokens to generate (default 64)")
    parser.add_argument(
        "--inner", choices=INNERS, default="inductor", help="compiler of both graphs (default inductor)"
    )
    parser.add_argument("--question", default=QUESTION, help="what to ask about the document")
    add_codecs(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def compare(model, ids: torch.Tensor, options: argparse.Namespace) -> tuple[dict, dict[str, Run], object]:
    """Rows of the table, the two runs, and the compressed model's cache (kept alive for the report)."""
    dense = torch.compile(model, backend=options.inner)
    compressed = torch.compile(model, backend="turboquant", options=backend_options(options))

    cache, first = prefill(model, ids)
    start = copy.deepcopy(cache)
    runs = {"dense": decode(dense, mark_growing(cache), first, options.tokens, desc="dense")}
    rows = {"dense": [live_bytes(cache), bits_per_element(cache)]}
    cache = mark_growing(copy.deepcopy(start))
    runs["compressed"] = decode(compressed, cache, first, options.tokens, desc="compressed")
    rows["compressed"] = [live_bytes(cache), bits_per_element(cache)]

    along = decode(
        compressed, mark_growing(start), first, options.tokens, forced=runs["dense"].tokens, desc="same tokens"
    )
    reference, ours = torch.stack(runs["dense"].logits), torch.stack(along.logits)
    rows["dense"] += [runs["dense"].tokens_per_second, "", ""]
    rows["compressed"] += [along.tokens_per_second, top1_agreement(reference, ours), mean_kl(reference, ours)]
    return rows, runs, cache


def table(rows: dict, tokens: int) -> str:
    """Both caches side by side."""
    headers = ("cache", "live bytes", "bits/element", "smaller", "tokens/s", "top-1 agreement", "mean KL (nats)")
    dense = rows["dense"][0]
    body = []
    for name, (size, bits, speed, agreement, kl) in rows.items():
        agreement = f"{agreement:.1%} of {tokens}" if agreement != "" else ""
        kl = f"{kl:.4f}" if kl != "" else ""
        body.append((name, f"{size:,}", f"{bits:.2f}", f"{dense / size:.2f} x", f"{speed:.1f}", agreement, kl))
    return tabulate(body, headers, colalign=("left",) + ("right",) * 6, disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    """Load, generate twice, print."""
    options = arguments(argv)
    started = time.perf_counter()
    model, tokenizer = load(options.model, options.device)
    ids = conversation(tokenizer, TOPIC, options.question, options.context).to(options.device)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + options.tokens > limit:
        raise SystemExit(
            f"The prompt has {ids.shape[1]} tokens and --tokens asks for {options.tokens}; this model reads {limit}."
        )
    rows, runs, cache = compare(model, ids, options)
    print(f"\n{ids.shape[1]} tokens read, {options.tokens} generated; {kept_as(options)}\n")
    print(table(rows, len(runs["dense"].tokens)))
    for name, run in runs.items():
        print(f"\n--- {name} cache ---\n{tokenizer.decode(run.tokens, skip_special_tokens=True).strip()}")
    print(f"\n--- report ---\n{tqcompile.report(model)}")
    print(f"\n{len(cache.layers)} layers, {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
