"""No architecture is known by its name: whatever is compressed is known by what its graph does."""

import ast
import pathlib
import re

import pytest
from test_house import docstring, modules, parse, prose

auto = pytest.importorskip("transformers.models.auto.configuration_auto")
mappings = pytest.importorskip("transformers.models.auto.modeling_auto")

# Words that architectures are named with and that code says for reasons of its own.
ENGLISH = {
    "align", "anything", "clip", "code", "data", "dense", "depth", "edge", "fast", "filter", "fine", "global",
    "head", "image", "large", "local", "loop", "mask", "model", "module", "next", "note", "open", "prompt",
    "registers", "seed", "small", "step", "table", "text", "time", "tiny", "token", "video", "with", "word",
    "wrapper",
}  # fmt: skip
OF_THE_FIELD = {
    "beam": "beam search",
    "codebook": "the centroids of a codec",
    "decoder": "half of an encoder-decoder",
    "embedding": "a table of token vectors",
    "embeddings": "position embeddings",
    "encoder": "half of an encoder-decoder",
    "flash": "a provider of dense attention",
    "flex": "flex_attention",
    "generation": "a model's generation_config says which tokens end what it says",
    "linear": "torch.nn.Linear",
    "mamba": "fields of configurations are called mamba_d_state, ...: they count the sizes of a recurrence",
    "recurrent": "a recurrence's state",
    "tokenizer": "what makes tokens of a text",
    "transformer": "what the package compresses caches of",
    "transformers": "the package",
    "vision": "fields of configurations are called vision_config, ...",
}
# Not the model: the program, or the paper, that a format comes from.
PROGRAMS = ("llama.cpp", "TurboQuant")


def words(text: str) -> set[str]:
    """The words of four letters and more in names of any spelling: snake_case, kebab-case and CamelCase."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).lower()
    return {word.rstrip("0123456789") for word in re.findall(r"[a-z][a-z0-9]{3,}", apart)} | set(
        re.findall(r"[a-z]{4,}", apart)
    )


def architectures() -> set[str]:
    named = set(auto.CONFIG_MAPPING_NAMES)
    for name, mapping in vars(mappings).items():
        named |= set(mapping) if name.endswith("MAPPING_NAMES") else set()
    assert len(named) > 300
    return {word for name in named for word in words(name) if len(word) > 3} - ENGLISH - OF_THE_FIELD.keys()


def said(path: pathlib.Path) -> set[str]:
    """The words of a module's identifiers and of the strings that a decision can hang on."""
    tree = parse(path)
    exempt = {id(node) for node in prose(tree)}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in exempt:
            found.append(node.value)
        found += [
            getattr(node, part) for part in ("id", "attr", "arg", "name") if isinstance(getattr(node, part, 0), str)
        ]
    text = " ".join(found)
    for program in PROGRAMS:
        text = text.replace(program, "")
    return words(text)


@pytest.mark.parametrize(("name", "path"), modules().items(), ids=modules())
def test_no_module_names_an_architecture(name, path):
    assert not said(path) & architectures()


def test_a_name_would_be_found(tmp_path):
    path = tmp_path / "named.py"
    path.write_text(
        '"""Not Bloom."""\n\n\ndef rotate(x):\n    return isinstance(x, Gemma3Attention) or x == "qwen2_moe"\n'
    )
    assert said(path) & architectures() == {"gemma", "qwen"}
    assert docstring(parse(path))
