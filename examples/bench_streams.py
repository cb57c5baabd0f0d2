"""How many sequences decode beside a model's weights until memory runs out, with dense caches and compressed ones.

    python examples/bench_streams.py [--layers 32] [--context 32768] [--keys CODEC] [--values CODEC]

A decoder of the shape of Llama 3 8B with random weights in bfloat16. Each number of sequences is tried: caches of all
layers are put on the device, and two steps run. It is one that fits if the next one runs out of memory. Weights, caches
and whatever a step allocates share the device.
"""

import argparse
import gc
from dataclasses import replace
from types import SimpleNamespace

import torch
from smollm2 import add_codecs, backend_options, positive
from tabulate import tabulate

import tqcompile
from tqcompile import formats
from tqcompile.bench.compressed import live_bytes
from tqcompile.bench.decoder import Decoder
from tqcompile.bench.shapes import Shape
from tqcompile.cache import CompressedKV
from tqcompile.layout import layout_of
from tqcompile.options import resolve

DTYPE = torch.bfloat16


def caches_of(model: Decoder, shape: Shape, codecs: tuple[str, str] | None) -> None:
    """Give every layer caches of `shape`, dense or of these codecs; what they hold is not read for its values."""
    size = (shape.batch, shape.kv_heads, shape.context)
    for layer in model.layers:
        for name, codec in zip(("keys", "values"), codecs or (None, None)):
            if codec is None:
                cache = torch.zeros(*size, shape.head_dim, dtype=DTYPE, device="cuda")
            else:
                codec = formats.codec(codec)
                planes = layout_of(codec, shape.head_dim, DTYPE, "cuda").allocate(size, "cuda")
                for plane in planes:
                    plane.zero_()
                cache = CompressedKV(planes, codec, shape.head_dim, DTYPE)
            setattr(layer, name, cache)


def fits(model: Decoder, shape: Shape, codecs: tuple[str, str] | None) -> int | None:
    """Bytes of the caches if two steps of `shape` run, None if memory runs out."""
    torch.compiler.reset()
    try:
        caches_of(model, shape, codecs)
        token = torch.zeros(shape.batch, 1, dtype=torch.long, device="cuda")
        for place in (0, shape.context - 1):
            model(token, torch.tensor([place], device="cuda"))
        torch.cuda.synchronize()
        kinds = {type(cache) is CompressedKV for cache in model.caches()}
        assert kinds == {codecs is not None}, "a cache is not what was asked for"
        return live_bytes(model.caches())
    except (torch.OutOfMemoryError, torch._dynamo.exc.BackendCompilerFailed) as error:
        # A compiler that runs out of memory says so in an error of its own.
        if "out of memory" not in str(error):
            raise
        return None
    finally:
        for layer in model.layers:
            layer.keys = layer.values = None
        gc.collect()
        torch.cuda.empty_cache()


def most(model: Decoder, shape: Shape, codecs: tuple[str, str] | None) -> tuple[int, int]:
    """The most sequences that fit, and the bytes of their caches; one more was tried and did not."""
    each = live_bytes_of_one(shape, codecs) * len(model.layers)
    batch, found = max(1, torch.cuda.mem_get_info()[0] // each), {}
    while not (found.get(batch) and batch + 1 in found):
        if batch not in found:
            found[batch] = fits(model, replace(shape, batch=batch), codecs)
            print(f"  {batch} sequences: {'fit' if found[batch] else 'out of memory'}", flush=True)
        if batch == 0:
            raise SystemExit("Not one sequence fits; give a smaller --context or --layers.")
        batch += 0 if found[batch] and batch + 1 in found else 1 if found[batch] else -1
    return batch, found[batch]


def live_bytes_of_one(shape: Shape, codecs: tuple[str, str] | None) -> int:
    """Bytes that one layer's caches of one sequence take."""
    layer = SimpleNamespace()
    caches_of(SimpleNamespace(layers=[layer]), replace(shape, batch=1), codecs)
    return live_bytes((layer.keys, layer.values))


def main() -> None:
    """Try both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=positive, default=32, help="decoder layers (default 32)")
    parser.add_argument("--context", type=positive, default=32768, help="tokens of each sequence (default 32768)")
    add_codecs(parser)
    options = parser.parse_args()
    chosen = resolve(backend_options(options)).chosen
    if chosen.extras:
        raise SystemExit(f"--preset {options.preset} keeps more than codes, {chosen.extras}: give --keys and --values")
    shape, rows = Shape(1, options.context), []
    for codecs in (None, chosen.pair):
        name = "dense bfloat16" if codecs is None else " / ".join(codecs)
        print(name)
        with torch.device("cuda"), torch.no_grad():
            torch.set_default_dtype(DTYPE)
            model = Decoder(replace(shape, context=1), options.layers)
            torch.set_default_dtype(torch.float32)
            for layer in model.layers:
                if codecs is not None:
                    layer.compile(backend=tqcompile.turboquant(keys=codecs[0], values=codecs[1], strict=True))
            weights = sum(parameter.nbytes for parameter in model.parameters())
            batch, size = most(model, shape, codecs)
        rows.append((name, batch, batch / (rows[0][1] if rows else batch), size / batch / 2**20, weights / 2**30))
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; {options.layers} layers x {options.context}\n")
    headers = ("cache", "sequences", "of dense", "MiB each", "weights GiB")
    print(tabulate(rows, headers, floatfmt=("", "", ".2f", ".1f", ".1f")))


if __name__ == "__main__":
    main()
