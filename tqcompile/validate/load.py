"""A causal language model and its tokenizer: from a folder, a file .gguf, a folder that holds one, or a name."""

from pathlib import Path

import torch

from tqcompile.explain.model import is_path

DTYPES = ("float32", "bfloat16", "float16")


def device(name: str | None) -> torch.device:
    """The device to measure on; a GPU where there is one and nothing is said.

    Raises:
        ValueError: there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def load(name: str, place: torch.device, dtype: str | None = None) -> tuple[torch.nn.Module, object]:
    """(model, tokenizer); the model on `place`, in `dtype` or that of its checkpoint.

    Raises:
        ValueError: no such folder, no model or no tokenizer in it, or transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise ValueError(f"MODEL {name} needs transformers: pip install transformers") from None
    if is_path(name) and not Path(name).exists():
        raise ValueError(f"MODEL {name}: there is no such folder")
    source = _source(name)
    logging.disable_progress_bar()
    tokenizer = _made(AutoTokenizer, source, f"MODEL {name} has no tokenizer to read")
    # Weights of a gguf file are decoded on load: the file has no dtype that they could keep.
    given = getattr(torch, dtype) if dtype else "auto" if len(source) == 1 else torch.float32
    model = _made(AutoModelForCausalLM, {**source, "dtype": given}, f"MODEL {name} has no model to read")
    return model.to(place).eval().requires_grad_(False), tokenizer


def _source(name: str) -> dict:
    """What `from_pretrained` is given: a gguf file is read where a folder has one and no configuration."""
    path = Path(name)
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    if path.suffix == ".gguf":
        files, path = [path], path.parent
    if len(files) > 1:
        raise ValueError(f"MODEL {name} holds {len(files)} files .gguf; name one of them, such as {files[0]}")
    return {"pretrained_model_name_or_path": str(path) if files else name} | (
        {"gguf_file": files[0].name} if files else {}
    )


def _made(kind, source: dict, trouble: str):
    try:
        return kind.from_pretrained(**source)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{trouble}: {said[:200]}") from error
