"""Rewrite every site: planes come in where the cache did, writes become `append`, reads become `attend`."""

import torch
from torch import fx

from tqcompile import ops, reference
from tqcompile.centre import VECTORS, Centring
from tqcompile.layout import layout_of
from tqcompile.passes import rewrite
from tqcompile.passes.context import CacheInput, Context, Fallback, Output
from tqcompile.passes.flex import TWIN, drop
from tqcompile.passes.indices import index_items, kept_run
from tqcompile.passes.masks import Masker
from tqcompile.passes.nodes import memory_of, spelling, tensor_of
from tqcompile.passes.places import places_of
from tqcompile.passes.records import Read
from tqcompile.passes.refusals import name_of, where
from tqcompile.passes.sites import Site
from tqcompile.passes.views import View, shape_only, whole, written_value


def compress(gm: fx.GraphModule, context: Context) -> int:
    """Replace the caches of `context.sites` by their planes; returns how many nodes were rewritten."""
    if not context.sites and not context.decoded_inputs:
        _plan_untouched(gm, context)
        return 0
    for node in list(gm.graph.nodes):
        if TWIN in node.meta and node not in context.survey.reads:
            drop(node.meta[TWIN])
    return _Rewriter(gm, context).run()


def _plan_untouched(gm: fx.GraphModule, context: Context) -> None:
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    context.outputs = [Output("tensor", index) for index in range(len(output.args[0]))]


class _Rewriter(Masker):
    """One walk over the graph, from the placeholders to the output."""

    def __init__(self, gm: fx.GraphModule, context: Context):
        super().__init__(gm, context)
        reads = [read for read in self.survey.reads.values() if self._rewrites(read)]
        self.absorbed = {node for read in reads for node in read.absorbed}

    def run(self) -> int:
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        written = {*self.survey.losses, *(view.root for view in self.survey.writes.values())}
        for index, node in enumerate(placeholders):
            if node in self.sites:
                self._open(index, node)
            elif node in self.context.decoded_inputs:
                self.context.inputs.append(CacheInput(index, None, name_of(node), writes_back=node in written))
        for node in list(self.graph.nodes):
            if node.op in ("call_function", "call_method"):
                with self.graph.inserting_before(node):
                    self._visit(node)
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        with self.graph.inserting_before(output):
            self._close(output, placeholders)
        self._sweep()
        return self.changed

    def _visit(self, node: fx.Node) -> None:
        read = self.survey.reads.get(node)
        views = [view for view in map(self.view, node.all_input_nodes) if view is not None]
        rewritten = read is not None and self._rewrites(read)
        if not (views or rewritten) or node in self.absorbed:
            return
        own, written = self.view(node), self.survey.writes.get(node)
        if written is not None and written.root in self.sites:
            self.write(node, written)
        elif own is not None and node in self.survey.appends:
            self.append(node, self.sites[own.root])
        elif own is not None and node in self.survey.joins:
            self.join(self.survey.joins[node], self.sites[own.root])
        elif rewritten:
            self._read(node, read)
        elif own is not None:
            self._move(node, own)
        else:
            self._fall_back(node)

    def _rewrites(self, read: Read) -> bool:
        return all(root in self.sites for _, view, _ in read.sides for root in view.roots)

    def _open(self, index: int, root: fx.Node) -> None:
        """Placeholders for the planes, in front of the cache's own."""
        site = self.sites[root]
        value = tensor_of(site.append.node if site.append else root)
        layout = layout_of(site.codec, int(value.shape[-1]), value.dtype, value.device.type)
        nodes = []
        with self.graph.inserting_before(root):
            for store in layout.stores:
                node = self.graph.placeholder(f"{root.name}_{store.name}")
                shape = (*value.shape[:-1], store.width)
                stride = rewrite.strides(shape, site.append.dim if site.append else None)
                fake = value.new_empty_strided(shape, stride, dtype=store.dtype)
                node.meta = {"example_value": fake, "tensor_dict": dict(root.meta.get("tensor_dict", {}))}
                nodes.append(node)
            centring = self.context.centres.get(root)
            if centring is not None:
                self.vectors[root] = self._open_vectors(root, value, centring)
        tokens = tensor_of(site.append.tokens).shape[site.append.dim] if site.append else None
        regions = self.open_regions(root, value)
        what = {"centring": centring, "regions": regions}
        self.context.inputs.append(CacheInput(index, site, name_of(root), tokens, **what))
        self.planes[root] = tuple(nodes)

    def _open_vectors(self, root: fx.Node, value: torch.Tensor, centring: Centring) -> fx.Node:
        vectors = self.graph.placeholder(f"{root.name}_vectors")
        shape = [*value.shape[: centring.dim], centring.rows, *value.shape[centring.dim + 1 :]]
        fake = value.new_empty_strided(shape, rewrite.strides(shape, None), dtype=VECTORS)
        vectors.meta = {"example_value": fake, "tensor_dict": dict(root.meta.get("tensor_dict", {}))}
        return vectors

    def _move(self, node: fx.Node, view: View) -> None:
        """A view on the planes: the same operator on each of them where it moves tokens, nothing where it relabels."""
        if view.base is not node:
            return
        parents = self.planes[self.survey.views[view.parent].base]
        moved = []
        for plane in parents:
            if spelling(node) == "gather":
                moved.append(self.call(rewrite.gather, plane, *node.args[1:]))
                continue
            copy = self.graph.node_copy(node, lambda old, plane=plane: plane if old is node.args[0] else old)
            if spelling(node) == "getitem":
                rank = tensor_of(node.args[0]).dim()
                copy.args = (plane, rewrite.plane_index(index_items(node.args[1], rank)))
            copy.meta = {"stack_trace": node.stack_trace}
            moved.append(copy)
        self.planes[node] = tuple(moved)
        self.recents[node] = self.moved_regions(node, self.recents.get(self.survey.views[view.parent].base))

    def _ordered(self, view: View, transposed: bool = False) -> list[fx.Node]:
        """The planes of what a product reads as [batch, heads, tokens, width]."""
        return self.in_order(list(self.planes[view.base]), view, transposed)

    def _read(self, node: fx.Node, read: Read) -> None:
        left, sides = self.dense(read.left), list(read.sides)
        planes = [self._ordered(view, turned) for _, view, turned in sides]
        # Where the model folds sequences and heads, or takes them apart, the operators get [batch, heads, ...].
        _, view, turned = sides[-1]
        folds = tensor_of(left).dim() != 4 or view.axes[0] != places_of(view, turned).heads[:1]
        final = (self._attend if read.kind == "attend" else self._product)(read, left, planes, folds)
        final = self.mixed(read, final)
        ranks = tensor_of(left).dim(), tensor_of(node).dim()
        if folds and ranks[0] == ranks[1]:
            final = self.call(rewrite.as_queries, final, left)
        elif ranks == (4, 3):
            final = self.call(torch.flatten, final, 0, 1)
        final.meta = dict(node.meta)
        node.replace_all_uses_with(final)
        self.replaced[node] = final
        self.context.reads += 1
        self.changed += 1

    def _product(self, read: Read, left: fx.Node, planes: list, folds: bool) -> fx.Node:
        view = read.value or read.key
        result, site, width = tensor_of(read.node), self.sites[view.root], int(tensor_of(view.base).shape[-1])
        left = self.rotated(left, site) if read.kind == "logits" else left
        left = self.call(rewrite.by_head, left, planes[0][0]) if folds else left
        operator = ops.logits if read.kind == "logits" else ops.mix
        out = self.call(operator, left, *planes, site.codec.name, width)
        if read.kind == "logits":
            return self.call(torch.Tensor.to, out, result.dtype)
        return self.call(reference.rotate_back, out, self.basis(site, result, width), result.dtype)

    def _attend(self, read: Read, query: fx.Node, planes: list, folds: bool) -> fx.Node:
        keys, values = self.sites[read.key.root], self.sites[read.value.root]
        dims = [int(tensor_of(view.base).shape[-1]) for view in (read.key, read.value)]
        result, key_basis = tensor_of(read.node), self.basis(keys, tensor_of(query), dims[0])
        folding = (query, planes[0][0]) if folds else None
        mask = self.mask(read.masks, folding)
        # Scores that are added hide no token, and are others in each layer.
        hides = tuple(each for each in read.masks if each.node not in self.survey.reads)
        hiding = mask if len(hides) == len(read.masks) else self.mask(hides, folding)
        reach = None if folds or hiding is None else self.reach(hiding)
        if reach is not None and hiding is not mask:
            reach = self.call(rewrite.bounds, reach)
        beside = {"exact": exact, "first": self.context.options.chosen.sinks} if (exact := self.exact(read)) else {}
        if (shift := self.shift(read, query, planes[0])) is not None:
            beside["centre"] = shift
        query = self.weighed(read, query)
        sinks = None if read.sinks is None else self.numbers(read.sinks, folding, tokens=False)
        return self.call(
            ops.attend,
            self.call(rewrite.by_head, query, planes[0][0]) if folds else query,
            *planes,
            mask,
            reach,
            key_basis,
            self.basis(values, result, dims[1]),
            read.causal,
            dims[0] ** -0.5 if read.scale is None else read.scale,
            read.score_mod,
            sinks,
            keys.codec.name,
            values.codec.name,
            *dims,
            result.dtype,
            **beside,
        )

    def _fall_back(self, node: fx.Node) -> None:
        """Decode in front of an operator that no rule knows, as late as can be."""
        shown = self.outline if shape_only(node) else self.rebuild
        dense = {operand: shown(operand) for operand in node.all_input_nodes if self.view(operand)}
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda old: dense.get(old, old))
        for root in dict.fromkeys(self.view(operand).root for operand in dense if not shape_only(node)):
            self.context.fallbacks.append(Fallback(name_of(root), spelling(node), where(node)))
        self.changed += 1

    def _close(self, output: fx.Node, placeholders: list[fx.Node]) -> None:
        values: list[fx.Node] = []
        created = {site.root: site for site in self.context.sites if site.kind == "create"}
        for original in output.args[0]:
            original = written_value(original) if isinstance(original, fx.Node) else original
            view = self.view(original)
            if original in self.context.decoded_inputs or (view is not None and whole(view)):
                root = original if view is None else view.root
                self.context.outputs.append(Output("argument", placeholders.index(root)))
            elif (run := self._kept(original)) is not None:
                place = placeholders.index(view.root)
                self.context.outputs.append(Output("appended", place, name=name_of(view.root), run=run))
            elif view is not None and view.base is original:
                self._emit_planes(values, self.planes[original], self.sites[view.root], original)
            elif view is not None:
                self.context.fallbacks.append(Fallback(name_of(view.root), "output", where(original)))
                self.context.outputs.append(self._shown(original, len(values), placeholders))
                values.append(self.rebuild(original))
            elif original in created:
                site = created[original]
                self._emit_planes(
                    values, self.encoded(original, site), site, original, self.context.regions.get(original)
                )
            else:
                self.context.outputs.append(self._shown(original, len(values), placeholders))
                values.append(original)
        output.args = (tuple(values),)

    def _shown(self, node: fx.Node, index: int, placeholders: list[fx.Node]) -> Output:
        """A value that leaves the graph, which may be a view of a cache that the graph has a decoded copy of."""
        if tensor_of(node) is not None and not tensor_of(node).requires_grad:
            for place, root in enumerate(placeholders):
                known = root in self.sites or root in self.context.decoded_inputs
                if known and memory_of(root) == memory_of(node):
                    return Output("shown", index, of=place)
        return Output("tensor", index)

    def _kept(self, node: fx.Node) -> tuple[int, slice] | None:
        """Which tokens of a cache that grew here a node shows, and along which dimension; None where it shows none."""
        if self.view(node) is None:
            return None
        if node in self.survey.appends:
            return self.survey.appends[node].dim, slice(None)
        run = kept_run(node)
        grown = run is not None and run[0] in self.survey.appends and self.survey.appends[run[0]].dim == run[1]
        return run[1:] if grown else None

    def _emit_planes(self, values: list[fx.Node], planes, site: Site, original: fx.Node, regions=None) -> None:
        made, value = list(planes), tensor_of(original)
        if regions is not None:
            made += self.first_and_last(original, self.left.get(original, original), regions)
        what = len(made), site.codec, int(value.shape[-1]), value.dtype, name_of(original)
        parts = {"centring": self.context.centres.get(site.root), "regions": regions, "token_dim": site.token_dim}
        self.context.outputs.append(Output("planes", len(values), *what, **parts))
        values.extend(made)
        self.changed += 1

    def _sweep(self) -> None:
        """Erase what the rewritten nodes replaced, last first."""
        written = {node for node, view in self.survey.writes.items() if view.root in self.sites}
        for node in reversed(list(self.graph.nodes)):
            replaced = node in self.survey.reads or node in written or node in self.absorbed or self.view(node)
            if replaced and not node.users and node.op != "output":
                self.graph.erase_node(node)
