"""Files of option `dump`: the graphs, the source that Inductor generated, and the kernels that it calls on a GPU.

The same texts, without a file, are kept for those who ask for them with `texts_kept`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx

from tqcompile import formats, ops
from tqcompile.passes.nodes import tensor_of
from tqcompile.passes.sites import Site


class Dump:
    """Files about one compiled graph in `folder`, each named by the graph and by what it holds."""

    def __init__(self, folder: Path, graph: str):
        self.folder, self.stem = folder, graph.replace("/", "_")

    def write(self, what: str, text: str) -> str:
        """Write one file, over an older one of that name; returns its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.stem}.{what}.py"
        path.write_text(text)
        return str(path)

    def graphs(self, before: fx.GraphModule, after: fx.GraphModule, sites: Iterable[Site]) -> str:
        """Write both graphs, and on CUDA the kernels; returns the path of the rewritten graph."""
        self.write("before", before.print_readable(print_output=False))
        path = self.write("after", after.print_readable(print_output=False))
        on_gpu = [site for site in sites if tensor_of(site.root).device.type == "cuda"]
        for what, text in kernel_sources(after, on_gpu).items() if on_gpu else ():
            self.write(what, text)
        return path


@dataclass(frozen=True)
class Texts:
    """A graph before and after the passes, and by name the kernels that the rewritten one launches on a GPU.

    `gone` are the names of nodes that the passes took out, `new` of those they put in, and `changed` of those whose
    operator or operands they replaced.
    """

    before: str
    after: str
    gone: frozenset[str]
    new: frozenset[str]
    changed: frozenset[str]
    kernels: dict[str, str]


_keeping = 0


@contextmanager
def texts_kept() -> Iterator[None]:
    """While this is open, the record of every graph that is compiled keeps its `Texts`."""
    global _keeping
    _keeping += 1
    try:
        yield
    finally:
        _keeping -= 1


def texts(before: fx.GraphModule, after: fx.GraphModule, sites: Iterable[Site]) -> Texts | None:
    """The texts of a graph, where somebody asked for them."""
    if not _keeping:
        return None
    old, new = ({node.name: _call(node) for node in gm.graph.nodes} for gm in (before, after))
    return Texts(
        before.print_readable(print_output=False),
        after.print_readable(print_output=False),
        frozenset(old.keys() - new.keys()),
        frozenset(new.keys() - old.keys()),
        frozenset(name for name in old.keys() & new.keys() if old[name] != new[name]),
        kernel_sources(after, sites),
    )


def _call(node: fx.Node) -> tuple[str, ...]:
    return node.op, str(node.target), str(node.args), str(node.kwargs)


def kernel_sources(after: fx.GraphModule, sites: Iterable[Site]) -> dict[str, str]:
    """The Triton modules that a rewritten graph launches on a GPU, by what they do; needs no GPU."""
    from tqcompile.kernels import append, decoded, logits, step

    sources = {}
    written = [site for site in sites if site.kind in ("in_place", "append")]
    for codec, width in dict.fromkeys((site.codec, int(tensor_of(site.root).shape[-1])) for site in written):
        # A graph on a GPU spells out the writes that no kernel does.
        if ops.writes(codec, width):
            sources[f"append_{_plain(codec.name)}_{width}"] = append.source(codec, width)
    for node in after.graph.nodes:
        if node.target is ops.append_step:
            keys, values = node.args[-2:]
            dims = tuple(int(tensor_of(y).shape[-1]) for y in node.args[2:4])
            codecs = formats.codec(keys), formats.codec(values)
            if all(map(ops.writes, codecs, dims)):
                what = f"append_step_{_plain(keys)}_{_plain(values)}_{dims[0]}_{dims[1]}"
                sources[what] = step.source(*codecs, dims)
        if node.target is ops.logits:
            codec, width = node.args[2:]
            if side := logits.side_of(formats.codec(codec), width):
                sources[f"logits_{_plain(codec)}_{width}_int8"] = logits.source(side)
        if node.target in (ops.logits, ops.mix):
            codec, width = node.args[2:]
            sources[f"decode_{_plain(codec)}_{width}"] = decoded.source(formats.codec(codec), width)
        if node.target is ops.attend:
            sources |= _attend_sources(node)
    return sources


def _attend_sources(node: fx.Node) -> dict[str, str]:
    from tqcompile.kernels import attend, chunks, decoded, exact, integer, logits, portable, shift

    sources = {}
    mask, _, _, _, causal, _, score_mod, _, keys, values, *head_dims, _ = node.args[3:]
    reader = attend.reader_of(tensor_of(mask), causal, score_mod)
    if node.kwargs.get("centre"):
        sources["shift"] = shift.source()
        reader = replace(reader, mask="additive")
    if node.kwargs.get("exact"):
        sources[f"exact{_said(reader)}"] = exact.source(reader)
        # What hides those tokens from codes is a mask.
        reader = replace(reader, mask="bool") if reader.mask == "none" else reader
    what = f"attend_{_plain(keys)}_{_plain(values)}_{head_dims[0]}_{head_dims[1]}{_said(reader)}"
    codecs, more = (formats.codec(keys), formats.codec(values)), None
    if node.kwargs.get("second"):
        more = formats.codec(node.kwargs["second_codec"]), node.kwargs["second_dim"]
        sources[f"decode_{_plain(more[0].name)}_{more[1]}"] = decoded.source(*more)
        if side := logits.side_of(*more):
            sources[f"logits_{_plain(more[0].name)}_{more[1]}_int8"] = logits.source(side)
    sources[what] = portable.source(*codecs, tuple(head_dims), reader, more)
    if sides := integer.sides_of(codecs, tuple(head_dims)):
        # Scores of a second cache are a mask there.
        reader = replace(reader, mask="additive") if more else reader
        sources[f"{what}_int8"] = integer.source(*sides, reader)
    if pieces := chunks.pieces_of(codecs, tuple(head_dims)):
        sources[f"{what}_chunk"] = chunks.source(*pieces, reader)
    for codec, dim in zip(codecs, head_dims):
        sources[f"decode_{_plain(codec.name)}_{dim}"] = decoded.source(codec, dim)
    return sources


def _plain(codec: str) -> str:
    return codec.replace(":", "_")


def _said(reader) -> str:
    """A reader as a part of a name."""
    return "_causal" * reader.causal + f"_{reader.mask}_mask" + "_score_mod" * bool(reader.score_mod)
