"""The entry point: Dynamo's graph in, a callable out. The only file that names Dynamo, AOTAutograd or Inductor."""

import hashlib
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import AttrSource, ConstantSource, LocalSource

from tqcompile import centre, cpu, formats, ops, principal, recent, reference
from tqcompile import report as reports
from tqcompile.dump import Dump, texts
from tqcompile.facts import facts
from tqcompile.options import Options, resolve
from tqcompile.passes import rewrite
from tqcompile.passes.context import Context
from tqcompile.passes.nodes import tensor_of
from tqcompile.passes.pipeline import run
from tqcompile.passes.sites import real
from tqcompile.reads import kernels_of, kinds_of
from tqcompile.runtime import CompiledGraph


def turboquant_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict | None = None
) -> Callable:
    """The backend named "turboquant", found by torch.compile through its entry point.

    `mode` is Inductor's; `options` are the fields of `tqcompile.options.Options`.
    """
    return _compile(gm, example_inputs, resolve(options), mode)


class Backend:
    """The same backend as a callable with its options bound: `torch.compile(model, backend=turboquant(...))`."""

    def __init__(self, options: Options):
        self.options = options
        self.__name__ = "turboquant"

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict | None = None
    ) -> Callable:
        return _compile(gm, example_inputs, resolve(options, self.options) if options else self.options, mode)

    def __eq__(self, other) -> bool:
        return isinstance(other, Backend) and other.options == self.options

    def __hash__(self) -> int:
        return hash(self.options)


def turboquant(
    *,
    preset: str | None = None,
    keys: str | None = None,
    values: str | None = None,
    sinks: int | None = None,
    window: int | None = None,
    strict: bool | None = None,
    centre: bool | None = None,
    disable: Sequence[str] | None = None,
    inner: str | None = None,
    dump: str | Path | None = None,
) -> Backend:
    """The backend with options; those left out come from TQCOMPILE_OPTIONS. See `tqcompile.options.Options`.

    Raises:
        ValueError: an option's value is not one of those allowed.
    """
    return Backend(resolve({name: value for name, value in locals().items() if value is not None}))


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None) -> Callable:
    if options.inner == "inductor":
        cpu.use_row_compiler(compile_rows)
    context, copy = Context(options), _copy(gm)
    start = time.perf_counter()
    run(copy, context)
    record = reports.record(_record(gm, copy, context))
    record.seconds = time.perf_counter() - start
    if not context.inputs and not any(site.kind == "create" for site in context.sites):
        return _followed(_inner(gm, example_inputs, options, mode), context)
    dump = Dump(options.dump, record.name) if options.dump is not None else None
    if dump is not None:
        record.dump = dump.graphs(gm, copy, context.sites)
    given = {node.name: value for node, value in zip(_placeholders(gm), example_inputs)}
    examples = [given.get(node.name, node.meta.get("example_value")) for node in _placeholders(copy)]
    _name_sources(gm, copy, context)
    for site in context.sites:
        cache = tensor_of(site.root)
        ops.prepare(site.codec, int(cache.shape[-1]), cache.device)
    record.kinds = kinds_of(copy)
    if any(tensor_of(site.root).device.type == "cuda" for site in context.sites):
        record.readers = kernels_of(copy)
    compiled = _inner(copy, examples, options, mode, dump)
    return _followed(CompiledGraph(gm, compiled, context, record), context)


def _followed(compiled: Callable, context: Context) -> Callable:
    """`compiled`, and the report knows which tensors it was last given where that matters."""
    foreign = tuple(context.foreign.items())

    def call(*args):
        for index, last in foreign:
            last[:] = [weakref.ref(args[index])]
        return compiled(*args)

    return call if foreign else compiled


def graph_breaks() -> dict[str, int]:
    """Why Dynamo ended graphs early since the last call, and how often: what lies between them is not compiled."""
    counted = torch._dynamo.utils.counters["graph_break"]
    found = dict(counted)
    counted.clear()
    return found


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of our own: Dynamo keeps using its one, and reads facts about the inputs off these attributes."""
    graph, mapping = fx.Graph(), {}
    result = graph.graph_copy(gm.graph, mapping)
    graph.output(result)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    copy._param_name_to_source = dict(getattr(gm, "_param_name_to_source", {}))
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copy


def _name_sources(gm: fx.GraphModule, copy: fx.GraphModule, context: Context) -> None:
    """AOTAutograd asks each input where it comes from; planes come from an attribute of the cache they replace."""
    originals = _placeholders(gm)
    plane_source = {}
    for entry in context.inputs:
        if entry.site is not None:
            root = originals[entry.index]
            for name in (*entry.site.codec.stores, "vectors", "numbers", "index"):
                plane_source[f"{root.name}_{name}"] = AttrSource(root._dynamo_source, name)
    for node in _placeholders(copy):
        if not hasattr(node, "_dynamo_source"):
            node._dynamo_source = plane_source[node.target]
    for name, _ in (*copy.named_parameters(), *copy.named_buffers()):
        copy._param_name_to_source.setdefault(name, ConstantSource(source_name=f"tqcompile_{name}"))


def _inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None, dump: Dump | None = None
) -> Callable:
    if options.inner != "inductor":
        return torch._dynamo.lookup_backend(options.inner)(gm, list(example_inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), "unsafe_marked_cacheable_functions": _cacheable(gm)}
    if dump is None:
        return compile_fx(gm, list(example_inputs), config_patches=patches)
    # Where AOTAutograd finds the whole graph in its cache it asks no inner compiler, whose source is wanted.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(gm, list(example_inputs), _dumping(dump), config_patches=patches)


def _cacheable(gm: fx.GraphModule) -> dict[str, str]:
    """What AOTAutograd is to key a graph on that calls functions of ours: it looks through none but PyTorch's own.

    What they trace to follows from the sources, and from the codecs whose names are among their arguments.
    """
    from torch._inductor import config

    own = [node for node in gm.graph.nodes if getattr(node.target, "__module__", None) in _OWN]
    names = {arg for node in own for arg in node.args if isinstance(arg, str) and arg in formats.REGISTRY}
    key = "-".join([source_digest(), *(formats.codec(name).digest() for name in sorted(names))])
    marked = {f"{node.target.__module__}.{node.target.__name__}": key for node in own}
    return {**config.unsafe_marked_cacheable_functions, **marked}


_OWN = (centre.__name__, principal.__name__, reference.__name__, rewrite.__name__, recent.__name__)


@cache
def source_digest() -> str:
    """Of the package's modules and passes, which decide what a graph becomes; commands are no part of that."""
    folders = Path(__file__).parent, Path(rewrite.__file__).parent
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()[:12]


def _dumping(dump: Dump) -> Callable:
    """Inductor's inner compiler, which also writes down what it generates."""
    from torch._inductor.compile_fx import compile_fx_inner

    def compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs):
        compiled = compile_fx_inner(gm, example_inputs, **kwargs)
        dump.write(
            "inductor_backward" if kwargs.get("is_backward") else "inductor", getattr(compiled, "source_code", "")
        )
        return compiled

    return compile


def compile_rows(function: Callable, rows: Sequence[torch.Tensor]) -> Callable:
    """`function`, compiled for all sizes but the last of each tensor; straight to Inductor: a call costs less so."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    # Inductor's cache asks the context for the sizes that are symbols.
    tracing = torch._guards.tracing(torch._guards.TracingContext(mode))
    with tracing, torch.no_grad(), torch.inference_mode(False):
        fakes = []
        for place, tensor in enumerate(rows):
            sizes = [*[DimDynamic.DYNAMIC] * (tensor.dim() - 1), DimDynamic.STATIC]
            symbolic = StatelessSymbolicContext(dynamic_sizes=sizes)
            fakes.append(mode.from_tensor(tensor, source=LocalSource(f"rows{place}"), symbolic_context=symbolic))
        traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="symbolic")(*fakes)
        # The one that is traced also holds the symbols of all sizes, which no key of a cache can be made of.
        gm = fx.GraphModule(traced, traced.graph)
        # A scale that is stored in half precision divides as it is stored: a code must not depend on who computed it.
        # A decoded number is computed where it is used, however long its expression is: it is never stored.
        settings = {
            "emulate_precision_casts": True,
            "realize_opcount_threshold": 10**6,
            "realize_reads_threshold": 10**6,
        }
        with V.set_fake_mode(mode), config.patch(settings):
            compiled = compile_fx_inner(gm, fakes)
    return lambda *rows: compiled(list(rows))


def _record(gm: fx.GraphModule, copy: fx.GraphModule, context: Context) -> reports.Graph:
    held = [(getattr(getattr(n, "_dynamo_source", None), "name", ""), real(n)) for n in _placeholders(gm)]
    # An input is a parameter by its type, and a buffer by where Dynamo found it.
    owners = tuple(
        weakref.ref(tensor)
        for source, tensor in held
        if isinstance(tensor, torch.nn.Parameter) or (tensor is not None and "_buffers[" in source)
    )
    identity = gm.meta.get("dynamo_compile_id")
    return reports.Graph(
        name=str(identity) if identity is not None else "graph",
        owners=owners,
        sites=context.sites,
        refusals=context.refusals,
        fallbacks=tuple(context.fallbacks),
        uncentred=tuple(context.uncentred),
        facts=facts(gm, copy, context),
        regions=context.kept,
        texts=texts(gm, copy, context.sites),
        counts=context.counts,
        reads=context.reads,
        ended=_ended(gm),
    )


def _ended(gm: fx.GraphModule) -> tuple[str, str] | None:
    """Why and where Dynamo ended a graph early; None where it reached the end of what was compiled."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    lines = (f"{frame.filename}, line {frame.lineno}, in {frame.name}" for frame in reason.user_stack[-1:])
    return reason.reason.splitlines()[0], "".join(lines)
