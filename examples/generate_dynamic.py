"""Hugging Face `generate` with its default, growing cache. One line: `model.forward = torch.compile(...)`.

python examples/generate_dynamic.py [--model FOLDER_OR_NAME] [--tokens 32] [--keys CODEC] [--values CODEC]
"""

import argparse

import torch
from smollm2 import add_codecs, backend_options, device, live_bytes, load, positive

import tqcompile
from tqcompile.options import INNERS


def main(argv: list[str] | None = None) -> None:
    """Prompt in, text and report out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name (default: packaged SmolLM2)")
    parser.add_argument("--prompt", default="The three largest oceans are", help="text to continue")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens to generate (default 32)")
    parser.add_argument("--device", type=device, default="cpu", help="where to run (default cpu)")
    parser.add_argument("--inner", choices=INNERS, default="inductor", help="compiler of the rewritten graph")
    add_codecs(parser)
    options = parser.parse_args(argv)
    model, tokenizer = load(options.model, options.device)

    model.forward = torch.compile(model.forward, backend="turboquant", options=backend_options(options))

    prompt = tokenizer(options.prompt, return_tensors="pt").to(options.device)
    result = model.generate(
        **prompt, max_new_tokens=options.tokens, do_sample=False, return_dict_in_generate=True, use_cache=True
    )
    cache = getattr(result, "cache", None) or result.past_key_values
    print(tokenizer.decode(result.sequences[0], skip_special_tokens=True))
    print(f"\nthe cache that generate returned takes {live_bytes(cache):,} bytes\n\n{tqcompile.report(model)}")


if __name__ == "__main__":
    main()
