"""Keys and values that each step makes of a cached latent: attention reads the latent, and the query is brought to it.

The score of a query q with a key `W c` of a latent c is q (W c) = (q W) c, and the weighted sum of values `U c` is
U (weighted sum of c). What a cache keeps beside the latent, a rotary key that all heads share, adds a score of its own,
which becomes a part of the mask.
"""

import math

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from tqcompile.cache import CompressedKV
from tqcompile.passes.latents import Made, Piece, Tracer, are_heads, is_latent
from tqcompile.passes.nodes import memory_of, spelling, tensor_of, walk, written_operands
from tqcompile.passes.places import are_weights, becomes_weights
from tqcompile.passes.roles import real
from tqcompile.passes.sites import may_be_cache
from tqcompile.passes.survey import Survey
from tqcompile.passes.values import before

# Queries up to which a product with the latent, which is wider than a head, costs less than to make keys of all tokens.
MOST_QUERIES = 16
_ATTENTION = "scaled_dot_product_attention"


def absorb(gm: fx.GraphModule, context) -> int:
    """Let attention of few queries read a cached latent itself; returns how many products or attentions do now."""
    graph = gm.graph
    targets = [node for node in graph.nodes if node.target is torch.matmul or spelling(node) == _ATTENTION]
    if not any(spelling(node) == "linear" for node in graph.nodes) or not targets:
        return 0
    absorber = _Absorber(graph, _caches(graph))
    return sum(map(absorber.absorb, targets))


def _caches(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that show a cache which came in, as [batch, tokens, n] or [batch, 1, tokens, n]."""
    survey = Survey(graph, [node for node in graph.nodes if node.op == "placeholder" and may_be_cache(node)])
    kept = {view.root for view in survey.writes.values()}
    kept |= {survey.views[node].root for node in (*survey.appends, *survey.joins) if not survey.views[node].also}
    kept |= {root for root in survey.views if isinstance(real(root), CompressedKV)}
    shown = {node for node, view in survey.views.items() if view.root in kept and view.root not in survey.losses}
    return {node for node in shown if is_latent(tensor_of(node))}


class _Absorber:
    """Rewrites one graph; `writes` are its writes as they were: where, into which memory, and the node."""

    def __init__(self, graph: fx.Graph, caches: set[fx.Node]):
        self.graph, self.caches = graph, caches
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self.additive: dict[fx.Node, fx.Node] = {}
        given = [real(node) for node in graph.nodes if node.op == "placeholder"]
        ranges = [each for tensor in given for each in getattr(tensor, "_dynamo_dynamic_range", ())]
        self.bounded = any(each.max is not None for each in ranges)
        self.writes = [
            (at, memory_of(operand), node)
            for node, at in self.order.items()
            for operand in written_operands(node)
            if tensor_of(operand) is not None
        ]

    def absorb(self, node: fx.Node) -> bool:
        """Rewrite an attention or one of its two products, where it reads what is made of a cached latent."""
        self.at, tracer = node, Tracer(self.caches)
        if tensor_of(node) is None or tensor_of(node).dim() != 4 or tensor_of(node).requires_grad:
            return False
        rewritten = (self._attention if spelling(node) == _ATTENTION else self._product)(node, tracer)
        if rewritten is None:
            return False
        rewritten = self._new(torch.Tensor.contiguous, rewritten) if rewritten.target is torch.einsum else rewritten
        rewritten.meta = dict(node.meta)
        node.replace_all_uses_with(rewritten)
        self._erase(node, tracer)
        return True

    def _attention(self, node: fx.Node, tracer: Tracer) -> fx.Node | None:
        (query, key, value), given = node.args, node.kwargs
        masked = given["attn_mask"] is not None
        keys, values = tracer.trace(key), tracer.trace(value)
        if keys is None or values is None or len(values.pieces) > 1 or not (are_heads(keys) and are_heads(values)):
            return None
        if given["dropout_p"] or isinstance(given["scale"], fx.Node) or (masked and given["is_causal"]):
            return None
        if not self._allows(node, tracer, query, keys, values):
            return None
        width = sum(piece.size for piece in keys.pieces)
        scale = width**-0.5 if given["scale"] is None else float(given["scale"])
        scores, latent, asked = self._of_pieces(query, keys, scale)
        mask = given["attn_mask"] if scores is None else self._mask(scores, given)
        options = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": given["is_causal"] and scores is None}
        latents = self._latent(values.pieces[0])
        with self.graph.inserting_before(node):
            read = self.graph.call_function(node.target, (asked, latent, latents))
        read.kwargs = {**options, "scale": scale, "enable_gqa": True}
        read.meta = {**node.meta, "example_value": torch.empty_like(tensor_of(asked))}
        return self._expanded(read, values.pieces[0])

    def _product(self, node: fx.Node, tracer: Tracer) -> fx.Node | None:
        left, right = node.args
        made = tracer.trace(right)
        if made is None or tensor_of(left) is None:
            return None
        mixes = are_heads(made) and len(made.pieces) == 1 and are_weights(left)
        scores = are_heads(made, transposed=True) and becomes_weights(node, loosely=True)
        if not (mixes or scores) or not self._allows(node, tracer, left, made):
            return None
        if mixes:
            read = self._new(torch.matmul, left, self._latent(made.pieces[0]))
            return self._expanded(read, made.pieces[0])
        scores, latent, asked = self._of_pieces(left, made)
        product = self._new(torch.matmul, asked, self._new(torch.permute, latent, (0, 1, 3, 2)))
        return product if scores is None else self._new(torch.add, product, scores)

    def _allows(self, node: fx.Node, tracer: Tracer, left: fx.Node, *made: Made) -> bool:
        """Whether few queries, or weights, read what was read before, in one dtype."""
        caches = [piece.cache for each in made for piece in each.pieces]
        if any(tensor_of(x).dtype != tensor_of(node).dtype for x in (left, *caches)):
            return False
        return not self._is_stale(node, tracer) and _few(tensor_of(left).shape[-2], self.bounded)

    def _is_stale(self, node: fx.Node, tracer: Tracer) -> bool:
        """Whether something that was read on the way is overwritten before `node`, or is read before it is filled."""
        first: dict[int, int] = {}
        for reached in tracer.reached:
            for operand in reached.all_input_nodes:
                if tensor_of(operand) is not None:
                    memory = memory_of(operand)
                    first[memory] = min(self.order[reached], first.get(memory, self.order[reached]))
        stop, parts = self.order[node], tracer.parts
        if any(first.get(memory, at) < at < stop and write not in parts for at, memory, write in self.writes):
            return True
        readers = ((part, user) for part, filled in parts.items() for user in filled.users if user not in parts)
        return any(self.order[user] < self.order[part] for part, user in readers)

    def _of_pieces(self, query: fx.Node, made: Made, scale: float | None = None) -> tuple:
        """The scores of keys that all heads share (or None), the latent of the others, and the query that reads it.

        With a `scale` the scores are scaled and in full precision, as a fused attention adds them to the others.
        """
        scores, offset = None, 0
        for piece in made.pieces:
            part = self._new(torch.narrow, query, -1, offset, piece.size)
            offset += piece.size
            if piece.weight is not None:
                latent, asked = self._latent(piece), self._new(torch.einsum, "bhtn,hnr->bhtr", part, self._rows(piece))
                continue
            keys = self._latent(piece)
            if scale is not None:
                dtype = torch.promote_types(tensor_of(query).dtype, torch.float32)
                part, keys = self._new(torch.mul, self._cast(part, dtype), scale), self._cast(keys, dtype)
            product = self._new(torch.matmul, part, self._new(torch.permute, keys, (0, 1, 3, 2)))
            scores = product if scores is None else self._new(torch.add, scores, product)
        return scores, latent, asked

    def _mask(self, scores: fx.Node, given: dict) -> fx.Node:
        """`scores` and the mask of an attention as one additive mask."""
        mask = given["attn_mask"]
        if mask is None and given["is_causal"]:
            mask = self._new(torch.triu, self._new(torch.full_like, scores, -math.inf), 1)
        elif mask is not None and tensor_of(mask).dtype == torch.bool:
            mask = self._additive(mask)
        total = scores if mask is None else self._new(torch.add, scores, mask)
        return self._cast(total, tensor_of(self.at).dtype)

    def _additive(self, mask: fx.Node) -> fx.Node:
        """A bool mask as what is added to scores: one for all layers, as long as nothing overwrites it."""
        if mask not in self.additive or any(memory == memory_of(mask) for _, memory, _ in self.writes):
            seen = self._new(torch.zeros_like, mask, dtype=torch.float32)
            self.additive[mask] = self._new(torch.masked_fill, seen, self._new(torch.logical_not, mask), -math.inf)
        return self.additive[mask]

    def _latent(self, piece: Piece) -> fx.Node:
        """What a piece is made of, as keys and values of one head."""
        return piece.cache if tensor_of(piece.cache).dim() == 4 else self._new(torch.unsqueeze, piece.cache, 1)

    def _rows(self, piece: Piece) -> fx.Node:
        """The weight of a piece, [heads, size, width of the latent]."""
        heads = int(tensor_of(piece.weight).shape[0]) // piece.rows
        rows = self._new(torch.unflatten, piece.weight, 0, (heads, piece.rows))
        return self._new(torch.narrow, rows, 1, piece.start, piece.size)

    def _expanded(self, read: fx.Node, piece: Piece) -> fx.Node:
        return self._new(torch.einsum, "bhtr,hvr->bhtv", read, self._rows(piece))

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if tensor_of(node).dtype == dtype else self._new(torch.Tensor.to, node, dtype)

    def _new(self, target, *args, **kwargs) -> fx.Node:
        """A call in the place of what is rewritten, with the value that it has."""
        return before(self.at, target, *args, **kwargs)

    def _erase(self, node: fx.Node, tracer: Tracer) -> None:
        """Erase what nothing uses any more, last first: what fills a tensor stays as long as that is read."""
        parts = tracer.parts
        # Sizes that were asked for go, too: they would keep what they are of.
        reached = walk([*tracer.reached, node], _sizes)
        for each in sorted(reached, key=self.order.__getitem__, reverse=True):
            read = each in parts and any(user not in parts for user in parts[each].users)
            if not each.users and not read:
                self.graph.erase_node(each)


def _sizes(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.all_input_nodes if operand.op != "placeholder" and tensor_of(operand) is None]


def _few(queries, bounded: bool) -> bool:
    """Whether there are few queries: of a symbol a guard says so, or that there are many, unless inputs are `bounded`.

    Within bounds that the author gave a guard is an error.
    """
    few = queries <= MOST_QUERIES
    return statically_known_true(few) if bounded else guard_or_false(few)
