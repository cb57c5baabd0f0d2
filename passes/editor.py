"""The graph while it is rewritten: which plane nodes stand for which value, and how new operators are put on them."""

import torch
from torch import fx

from tqcompile import ops, reference, tables
from tqcompile.passes import rewrite
from tqcompile.passes.context import Context
from tqcompile.passes.nodes import example, tensor_of
from tqcompile.passes.sites import Site
from tqcompile.passes.views import View, written_value


class Editor:
    """`planes` holds, for every node that is a compressed value, the nodes of its planes at that point."""

    def __init__(self, gm: fx.GraphModule, context: Context):
        self.gm, self.graph, self.context, self.survey = gm, gm.graph, context, context.survey
        self.sites = {site.root: site for site in context.sites}
        self.planes: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.bases: dict[str, fx.Node] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}

    def view(self, node) -> View | None:
        view = self.survey.views.get(node) if isinstance(node, fx.Node) else None
        return view if view is not None and view.root in self.sites else None

    def call(self, target, *args, **kwargs) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def call_like(self, target, *args) -> fx.Node:
        node = self.call(target, *args)
        node.meta["example_value"] = target(*map(example, args))
        return node

    def basis(self, site: Site, value: torch.Tensor, head_dim: int) -> fx.Node | None:
        """The basis of a codec for a product with `value`, or None where that is the model's own.

        Float32; in half precision where a GPU has matrix units for it: what that rounds is what the model's own
        products round, and less than what codes do.
        """
        half = value.is_cuda and value.dtype in (torch.float16, torch.bfloat16)
        dtype = value.dtype if half else torch.float32
        matrix = tables.basis_matrix(site.codec, head_dim, value.device, dtype)
        if matrix is None:
            return None
        name = f"basis_{site.codec.basis}_{head_dim}_{str(dtype).removeprefix('torch.')}"
        if name not in self.bases:
            self.gm.register_buffer(name, matrix)
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self.bases[name] = self.graph.get_attr(name)
        return self.bases[name]

    def dense(self, node):
        """`node`, decoded where it shows a cache that is compressed."""
        node = self.replaced.get(node, node)
        return self.rebuild(node) if self.view(node) else node

    def rotated(self, node: fx.Node, site: Site) -> fx.Node:
        node = self.dense(node)
        value = tensor_of(node)
        basis = self.basis(site, value, int(value.shape[-1]))
        return node if basis is None else self.call(reference.rotate, node, basis)

    def encode(self, planes: list[fx.Node], source: fx.Node, positions: fx.Node | None, site: Site) -> None:
        source = self.dense(source)
        value = tensor_of(source)
        planes = list(planes)
        if value.dim() == 3:
            planes = [self.call(torch.unsqueeze, plane, 0) for plane in planes]
            source = self.call_like(torch.unsqueeze, source, 0)
        if value.dim() > 4 or (value.is_cuda and not ops.writes(site.codec, int(value.shape[-1]))):
            node = self.call(rewrite.encode_into, planes, self.rotated(source, site), positions, site.codec.name)
        else:
            basis = self.basis(site, value, int(value.shape[-1]))
            node = self.call(ops.append, planes, source, positions, basis, site.codec.name)
        node.meta["example_value"] = None

    def rebuild(self, node: fx.Node) -> fx.Node:
        """The dense value of a view: its planes decoded, then the model's own relabelling on top."""
        node = written_value(node)
        view = self.survey.views[node]
        if view.base is node or view.parent is None:
            return self.decode(view)
        parent = self.decode(view) if view.parent is view.base else self.rebuild(view.parent)
        return self.graph.node_copy(node, lambda old: parent if old is view.parent else old)

    def decode(self, view: View) -> fx.Node:
        value, site = tensor_of(view.base), self.sites[view.root]
        width = int(value.shape[-1])
        rows = self.call(rewrite.decode, list(self.planes[view.base]), site.codec.name, width)
        dense = self.call(reference.rotate_back, rows, self.basis(site, value, width), value.dtype)
        dense.meta = {"example_value": value}
        return dense
