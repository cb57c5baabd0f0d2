"""Files of option `dump`: the graphs, the source that Inductor generated, and the kernels that it calls on a GPU."""

from collections.abc import Iterable
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


def kernel_sources(after: fx.GraphModule, sites: Iterable[Site]) -> dict[str, str]:
    """The Triton modules that a rewritten graph launches on a GPU, by what they do; needs no GPU."""
    from tqcompile.kernels import append, attend, decoded, integer, step

    sources = {}
    written = [site for site in sites if site.kind in ("in_place", "append")]
    for codec, width in {(site.codec, int(tensor_of(site.root).shape[-1])) for site in written}:
        sources[f"append_{_plain(codec.name)}_{width}"] = append.source(codec, width)
    for node in after.graph.nodes:
        if node.target is ops.append_step:
            keys, values = node.args[-2:]
            dims = tuple(int(tensor_of(y).shape[-1]) for y in node.args[2:4])
            what = f"append_step_{_plain(keys)}_{_plain(values)}_{dims[0]}_{dims[1]}"
            sources[what] = step.source(formats.codec(keys), formats.codec(values), dims)
        if node.target is not ops.attend:
            continue
        mask, _, _, _, causal, _, keys, values, *head_dims, _ = node.args[3:]
        reader = attend.reader_of(tensor_of(mask), causal)
        said = "_causal" * causal + f"_{reader.mask}_mask"
        what = f"attend_{_plain(keys)}_{_plain(values)}_{head_dims[0]}_{head_dims[1]}{said}"
        codecs = formats.codec(keys), formats.codec(values)
        sources[what] = attend.source(*codecs, tuple(head_dims), reader)
        if sides := integer.sides_of(codecs, tuple(head_dims)):
            sources[f"{what}_int8"] = integer.source(*sides, reader)
        for codec, dim in zip(codecs, head_dims):
            sources[f"decode_{_plain(codec.name)}_{dim}"] = decoded.source(codec, dim)
    return sources


def _plain(codec: str) -> str:
    return codec.replace(":", "_")
