"""One walk over a graph: every view of every possible cache, how each is written, and how attention reads it."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import torch
from torch import fx

from tqcompile.passes.flex import TWIN, made_for
from tqcompile.passes.indices import kept_run
from tqcompile.passes.nodes import memory_of, spelling, tensor_of, walk, written_memory, written_operands
from tqcompile.passes.places import alike, are_weights, becomes_weights, fits, places_of, roles_of
from tqcompile.passes.records import Append, Join, Read, forget_unread
from tqcompile.passes.sinks import sink_behind
from tqcompile.passes.softmax import addends, chain_behind
from tqcompile.passes.tokens import kept_by, source_of, whole_tokens
from tqcompile.passes.views import View, derived, identity, root_view, shape_only

TURNED = "its tokens lie along the last dimension, where codes have head_dim"
STATE = "it is replaced by what is computed from it, as a recurrent state is"


class Survey:
    """Every view of every possible cache in one graph, gathered in a single walk.

    `apart` are nodes that join tokens of several caches, and that codes cannot be joined for.
    """

    def __init__(self, graph: fx.Graph, roots: Iterable[fx.Node], apart: frozenset[fx.Node] = frozenset()):
        self.views: dict[fx.Node, View] = {root: root_view(root) for root in roots}
        self.appends: dict[fx.Node, Append] = {}
        self.joins: dict[fx.Node, Join] = {}
        self.writes: dict[fx.Node, View] = {}
        self.reads: dict[fx.Node, Read] = {}
        self.losses: dict[fx.Node, str] = {}
        self.culprits: dict[fx.Node, fx.Node] = {}
        self._memory: dict[int, fx.Node] = {}
        self._mutations: dict[int, int] = {}
        self._aliases: list[fx.Node] = []
        self._apart = apart
        self._order = {node: at for at, node in enumerate(graph.nodes)}
        for root in list(self.views):
            other = self._memory.setdefault(memory_of(root), root)
            if other is not root:
                self.losses[root] = self.losses[other] = "two inputs of the graph share its memory"
        for node in graph.nodes:
            if node.op in ("call_function", "call_method"):
                self._visit(node)
        self._settle_appends()
        self._pair_products(graph)
        forget_unread(self.joins, self.views, self.reads, self.writes)
        self._settle_twins(graph)
        self._cross_check()

    def _visit(self, node: fx.Node) -> None:
        target = self._mutated(node)
        if target is not None:
            self._write(node, target)
            return
        if spelling(node) in ("cat", "stack"):
            self._concatenation(node)
        elif spelling(node) == "scaled_dot_product_attention":
            self._attention(node)
        elif node.target is torch.matmul:
            self._product(node)
        elif node not in self.views:
            self._derive(node)
        if tensor_of(node) is not None and node not in self.views and memory_of(node) in self._memory:
            self._aliases.append(node)
        elif node in self.views:
            self._memory.setdefault(memory_of(node), self.views[node].root)

    def _derive(self, node: fx.Node) -> None:
        parent = self.views.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        view = derived(node, parent) if parent is not None else None
        if view is not None:
            self.views[node] = view

    def _settle_appends(self) -> None:
        """A past can grow in place where one tensor continues it and nothing else reads or writes it."""
        written = {view.owner for view in self.writes.values()}
        for node, join in list(self.joins.items()):
            root, *others = join.parts
            one = spelling(node) == "cat" and len(others) == 1 and not self._from(others[0], root)
            if not one or root is not self.views[node].root:
                continue
            alone = all(user is node or shape_only(user) for user in root.users)
            if alone and _leaves(node, join.dim) and written.isdisjoint((root, node)):
                self.appends[node] = Append(node, others[0], join.dim)
                del self.joins[node]

    def _pair_products(self, graph: fx.Graph) -> None:
        """Two products with a softmax between are attention, where nothing is overwritten in the meantime."""
        nodes, scores = list(graph.nodes), {node: read for node, read in self.reads.items() if read.kind == "logits"}
        for node, read in list(self.reads.items()):
            sinks = (sink_behind(node), None) if read.kind == "mix" else ()
            chains = ((chain_behind(node, scores, sink), sink) for sink in dict.fromkeys(sinks))
            chain, sink = next((found for found in chains if found[0] is not None), (None, None))
            if chain is None:
                continue
            last = node if sink is None else sink.node
            first = scores[chain.nodes[0]]
            *leading, channel, tokens = first.key.axes
            if not alike(first.key, read.value, transposed=True):
                continue
            given = (each.node for each in (*chain.masks, chain.sinks) if each is not None and each.node is not None)
            start, middle, end = (self._order[each] for each in (first.node, node, last))
            if _overwrite(nodes[start + 1 : end], (first.left, first.key.node, *given)):
                continue
            if _overwrite(nodes[middle + 1 : end], (read.value.node,)):
                continue
            del self.reads[first.node], self.reads[node]
            self.reads[last] = replace(
                read,
                node=last,
                kind="attend",
                key=replace(first.key, axes=(*leading, tokens, channel)),
                left=first.left,
                scale=chain.scale,
                score_mod=chain.score_mod,
                masks=chain.masks,
                sinks=chain.sinks,
                absorbed=chain.nodes,
            )

    def _settle_twins(self, graph: fx.Graph) -> None:
        """Attention that was spelled out beside a call is that call, or else it reads nothing."""
        for node in graph.nodes:
            twin = node.meta.get(TWIN)
            read = self.reads.pop(twin, None)
            if read is not None and read.kind == "attend":
                self.reads[node] = replace(read, node=node, absorbed=(*read.absorbed, twin, node.args[0]))
            elif twin is not None:
                for unused in made_for(twin):
                    self.reads.pop(unused, None), self.views.pop(unused, None)

    def _cross_check(self) -> None:
        """What no single node shows: mutations that were not recognised."""
        for root in [node for node, view in self.views.items() if node is view.root and node.op == "placeholder"]:
            value = tensor_of(root)
            if not value.is_inference() and value._version != self._mutations.get(memory_of(root), 0):
                self.losses.setdefault(root, "an operator writes it in a way that no rule follows")

    def _mutated(self, node: fx.Node) -> fx.Node | None:
        """The operand this node writes into, where that operand shares memory with a cache."""
        for operand in written_operands(node):
            if tensor_of(operand) is not None and memory_of(operand) in self._memory:
                return operand
        return None

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        memory = memory_of(target)
        root = self._memory[memory]
        self._mutations[memory] = self._mutations.get(memory, 0) + 1
        view = self.views.get(target)
        if view is None or not view.writable or not view.plain or not whole_tokens(node, view, self.views):
            self.losses.setdefault(root, f"{spelling(node)} writes it in a way that no rule follows")
            self.culprits.setdefault(root, node)
            return
        source = source_of(node) if spelling(node) in ("copy_", "setitem") else None
        whole = view.base is root and spelling(node) == "copy_"
        if isinstance(source, fx.Node) and self._feeds(root, source, through_attention=whole):
            self.losses.setdefault(root, STATE)
            self.culprits.setdefault(root, node)
            return
        if any(self._outlives(other, node) for other in self.views.values() if other.root is root):
            self.losses.setdefault(root, "a copy of it that was made before a write is read after it")
            return
        aliases = (alias for alias in self._aliases if memory_of(alias) == memory)
        if any(self._order[user] > self._order[node] for alias in aliases for user in alias.users):
            self.losses.setdefault(root, "a view of it that no rule follows is read after a write")
            return
        self.writes[node] = view
        if tensor_of(node) is not None:
            self.views[node] = replace(view, node=node, parent=target)

    def _feeds(self, root: fx.Node, number: fx.Node, through_attention: bool) -> bool:
        """Whether `number` is computed from what `root` held, and is no copy of that nor what attention makes of it.

        To choose between the two, token by token, is no computation.
        """
        if self._from(number, root) or spelling(number) == "where":
            return False
        last = self._order[number]

        def onward(node: fx.Node) -> list[fx.Node]:
            users = (user for user in node.users if self._order[user] <= last)
            return [user for user in users if through_attention or user not in self.reads]

        shown = [node for node, view in self.views.items() if view.root is root]
        return any(node is number for node in walk(shown, onward))

    def _outlives(self, view: View, write: fx.Node) -> bool:
        """Whether `view` is a copy the planes cannot tell from the cache, and is used after `write` changed that."""
        if memory_of(view.node) == memory_of(view.owner) or memory_of(view.owner) != memory_of(write.args[0]):
            return False
        return any(self._order[user] > self._order[write] for user in view.node.users)

    def _concatenation(self, node: fx.Node) -> None:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(parts, (tuple, list)) or tensor_of(node) is None or None in map(tensor_of, parts):
            return
        # What stands in front of a cache, as a prefix that was learned, is not to be encoded.
        root = self.views[parts[0]].root if parts[0] in self.views else None
        rank = tensor_of(node).dim()
        if root is None:
            return
        if dim % rank == rank - 1:
            if parts[0] is root and _leaves(node, rank - 1) and roles_of([node]):
                self.losses.setdefault(root, TURNED)
                self.culprits.setdefault(root, node)
            return
        shown = [part for part in parts if self._from(part, root)]
        foreign = [part for part in parts if part not in shown]
        shared = bool(foreign) and all(part in self.views for part in foreign) and self._may_share(node)
        if shared:
            shown, foreign = list(parts), []
        if any(self._is_kept(part) for part in foreign) or not (kept_by(node) or all(map(kept_by, foreign))):
            return
        kinds = {(tensor_of(part).dim(), tensor_of(part).dtype) for part in parts}
        part_rank = rank - (spelling(node) == "stack")
        if kinds != {(part_rank, tensor_of(root).dtype)} or not all(self.views[part].plain for part in shown):
            return
        self.joins[node] = Join(node, tuple(parts), dim % rank)
        also = tuple(dict.fromkeys(each for part in shown for each in self.views[part].roots if each is not root))
        self.views[node] = View(node, root, node, shown[0], identity(rank), True, node, also)

    def _may_share(self, node: fx.Node) -> bool:
        """Whether tokens of several caches are joined to be read, and for nothing else."""
        read = node not in self._apart and spelling(node) == "cat" and not kept_by(node)
        return read and memory_of(node) not in self._overwritten

    @cached_property
    def _overwritten(self) -> set[int]:
        return written_memory(self._order)

    def _is_kept(self, node: fx.Node) -> bool:
        """Whether a tensor is, or continues, a cache of its own."""
        view, kept = self.views.get(node), {join.parts[0] for join in self.joins.values()}
        kept |= {written.root for written in self.writes.values()}
        return view is not None and (view.node is not view.root or view.root in kept)

    def _from(self, node: fx.Node, root: fx.Node) -> bool:
        return node in self.views and self.views[node].root is root

    def _attention(self, node: fx.Node) -> None:
        query, key, value = (self.views.get(operand) for operand in node.args)
        if key is None or value is None or (query is not None and query.root in (key.root, value.root)):
            return
        if node.kwargs["dropout_p"]:
            return
        if places_of(key) is None or places_of(value) is None or not alike(key, value):
            return
        if not all(fits(node.args[0], side.node, node.kwargs["enable_gqa"]) for side in (key, value)):
            return
        if isinstance(node.kwargs["scale"], fx.Node):
            return
        mask, scale = node.kwargs["attn_mask"], node.kwargs["scale"]
        scale = None if scale is None else float(scale)
        masks, sums = addends(mask, self.reads)
        how = {"masks": masks, "causal": bool(node.kwargs["is_causal"]), "absorbed": sums}
        self.reads[node] = Read(node, "attend", key, value, node.args[0], scale, **how)

    def _product(self, node: fx.Node) -> None:
        right = self.views.get(node.args[1])
        if right is None or tensor_of(node.args[0]) is None or self._from(node.args[0], right.root):
            return
        if not fits(node.args[0], node.args[1]):
            return
        if places_of(right, transposed=True) is not None:
            if becomes_weights(node, loosely=True):
                self.reads[node] = Read(node, "logits", right, None, node.args[0])
        elif places_of(right) is not None and becomes_weights(node):
            self.losses.setdefault(right.root, TURNED)
            self.culprits.setdefault(right.root, node)
        elif places_of(right) is not None and (right.root.op == "placeholder" or are_weights(node.args[0])):
            # What a graph makes and reads with anything but weights is the state of a recurrence.
            self.reads[node] = Read(node, "mix", None, right, node.args[0])


def _overwrite(nodes: list[fx.Node], tensors: tuple[fx.Node, ...]) -> bool:
    """Whether any of these nodes writes into the memory of one of these tensors."""
    return not written_memory(nodes).isdisjoint(map(memory_of, tensors))


def _leaves(node: fx.Node, dim: int) -> bool:
    """Whether the graph returns `node`, or a run of its tokens, which lie along `dim`."""
    for user in node.users:
        run = kept_run(user)
        cut = run is not None and run[0] is node and run[1] == dim
        if user.op == "output" or (cut and any(further.op == "output" for further in user.users)):
            return True
    return False
