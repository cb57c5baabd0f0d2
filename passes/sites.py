"""Find where a graph keeps its KV cache: which tensors are caches, how each is written, how attention reads it.

Nothing is edited here. The result is frozen records that `compress` consumes: `Site` for a cache that will be
compressed, `Refusal` for one that stays dense and why.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from tqcompile.cache import CompressedKV, refusal
from tqcompile.codec import Codec
from tqcompile.layout import layout_of
from tqcompile.passes.canonicalize import spelling, tensor_of
from tqcompile.passes.views import View, derived, full, index_items, root_view

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_WRITERS = {"setitem", "index_copy_", "copy_", "zero_"}


@dataclass(frozen=True)
class Append:
    """`node = cat([cache, tokens], dim)`."""

    node: fx.Node
    tokens: fx.Node
    dim: int


@dataclass(frozen=True)
class Read:
    """Attention, or one of its two products, over views of caches: kind is `attend`, `logits` or `mix`."""

    node: fx.Node
    kind: str
    key: View | None
    value: View | None


@dataclass(frozen=True)
class Site:
    """One cache: `kind` is `in_place`, `append`, `create` (made in this graph) or `read` (never written here)."""

    root: fx.Node
    kind: str
    role: str
    codec: Codec
    append: Append | None


@dataclass(frozen=True)
class Refusal:
    """A cache that stays dense: its name in the model, why, where, and what would change that."""

    name: str
    reason: str
    where: str
    remedy: str


class Survey:
    """Every view of every possible cache in one graph, gathered in a single walk."""

    def __init__(self, graph: fx.Graph, roots: Iterable[fx.Node]):
        self.views: dict[fx.Node, View] = {root: root_view(root) for root in roots}
        self.appends: dict[fx.Node, Append] = {}
        self.writes: dict[fx.Node, View] = {}
        self.reads: dict[fx.Node, Read] = {}
        self.losses: dict[fx.Node, str] = {}
        self._memory: dict[int, fx.Node] = {}
        for root in list(self.views):
            other = self._memory.setdefault(_memory_of(root), root)
            if other is not root:
                self.losses[root] = self.losses[other] = "two inputs of the graph share its memory"
        for node in graph.nodes:
            if node.op in ("call_function", "call_method"):
                self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node in self.views:
            return
        target = self._mutated(node)
        if target is not None:
            self._write(node, target)
            return
        operands = [self.views.get(operand) for operand in node.args if isinstance(operand, fx.Node)]
        if spelling(node) == "cat":
            self._append(node)
        elif spelling(node) == "scaled_dot_product_attention":
            self._attention(node)
        elif node.target is torch.matmul:
            self._product(node)
        elif operands and operands[0] is not None:
            view = derived(node, operands[0])
            if view is not None:
                self.views[node] = view
        if node in self.views:
            self._memory.setdefault(_memory_of(node), self.views[node].root)

    def _mutated(self, node: fx.Node) -> fx.Node | None:
        """The operand this node writes into, where that operand shares memory with a cache."""
        name = spelling(node)
        in_place = name == "setitem" or (name.endswith("_") and not name.endswith("__"))
        candidates = [node.args[0]] if in_place and node.args else []
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            candidates = [a for a, s in zip(node.args, node.target._schema.arguments) if s.is_write]
        candidates.append(node.kwargs.get("out"))
        for operand in candidates:
            value = tensor_of(operand)
            if value is not None and _memory_of(operand) in self._memory:
                return operand
        return None

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        root = self._memory[_memory_of(target)]
        view = self.views.get(target)
        if view is None or not view.writable or not view.plain or not _whole_tokens(node, view, self.views):
            self.losses.setdefault(root, f"{spelling(node)} writes it in a way that no rule follows")
            return
        self.writes[node] = view
        self.views[node] = view

    def _append(self, node: fx.Node) -> None:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(parts, (tuple, list)) or len(parts) != 2:
            return
        past, tokens = parts
        view, value = self.views.get(past), tensor_of(node)
        if view is None or past is not view.root or tokens in self.views or value is None:
            return
        rank = value.dim()
        if dim % rank == rank - 1 or tensor_of(past).dim() != rank or tensor_of(tokens).dim() != rank:
            return
        if past in (append.node.args[0][0] for append in self.appends.values() if append.node.args):
            self.losses.setdefault(past, "two appends to it in one graph make a fork")
            return
        if tensor_of(past).dtype != tensor_of(tokens).dtype:
            return
        self.appends[node] = Append(node, tokens, dim % rank)
        self.views[node] = View(node, past, node, past, root_view(past).axes, True)

    def _attention(self, node: fx.Node) -> None:
        query, key, value = (self.views.get(operand) for operand in node.args)
        if query is not None or key is None or value is None or node.kwargs["dropout_p"]:
            return
        if heads_of(key, 2) is None or heads_of(value, 2) is None or not _fits(node.args[0], node.args[1]):
            return
        if not node.kwargs["enable_gqa"] and tensor_of(node.args[0]).shape[1] != tensor_of(node.args[1]).shape[1]:
            return
        if isinstance(node.kwargs["scale"], fx.Node):
            return
        self.reads[node] = Read(node, "attend", key, value)

    def _product(self, node: fx.Node) -> None:
        left, right = (self.views.get(operand) for operand in node.args)
        if left is not None or right is None or tensor_of(node.args[0]) is None:
            return
        if not _fits(node.args[0], node.args[1]) or tensor_of(node.args[0]).shape[1] != tensor_of(node.args[1]).shape[1]:
            return
        if heads_of(right, 3) is not None:
            self.reads[node] = Read(node, "logits", right, None)
        elif heads_of(right, 2) is not None:
            self.reads[node] = Read(node, "mix", None, right)


def _memory_of(node: fx.Node) -> int:
    return tensor_of(node).untyped_storage()._cdata


def heads_of(view: View, token_axis: int) -> tuple[int, int, int] | None:
    """Plane dimensions of batch, heads and tokens, where `view` is [batch, heads (repeated), ...] with tokens there.

    None where the view is not of that form.
    """
    if len(view.axes) != 4:
        return None
    channel = view.axes[5 - token_axis]
    batch, heads, tokens = view.axes[0], view.axes[1], view.axes[token_axis]
    rank = tensor_of(view.base).dim()
    if channel != (rank - 1,) or len(batch) != 1 or len(tokens) != 1 or "r" in batch + tokens:
        return None
    if len(heads) not in (1, 2) or heads[0] == "r" or rank != 4:
        return None
    return batch[0], heads[0], tokens[0]


def _fits(query: fx.Node, cache: fx.Node) -> bool:
    left, right = tensor_of(query), tensor_of(cache)
    return left is not None and left.dim() == right.dim() == 4 and str(left.shape[0]) == str(right.shape[0])


def _whole_tokens(node: fx.Node, view: View, views: dict[fx.Node, View]) -> bool:
    """Whether a write replaces whole tokens by dense ones."""
    from tqcompile.passes.views import full, index_items

    name, cache = spelling(node), tensor_of(view.node)
    if name not in _WRITERS:
        return False
    if name == "zero_":
        return True
    source = node.args[1] if name == "copy_" else node.args[-1]
    value = tensor_of(source)
    if value is None or source in views or value.dim() == 0 or str(value.shape[-1]) != str(cache.shape[-1]):
        return False
    if name == "index_copy_":
        return len(node.args) == 4 and isinstance(node.args[1], int) and node.args[1] % cache.dim() != cache.dim() - 1
    if name == "setitem":
        items = index_items(node.args[1], cache.dim())
        return items is not None and None not in items and full(items[-1], cache.shape[-1])
    return True


def sites(gm: fx.GraphModule, context) -> int:
    """Fill `context.sites`, `context.refusals` and `context.survey`; returns how many caches can be compressed."""
    outputs = _outputs(gm.graph)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder" and _may_be_cache(node)]
    made = [node for node in outputs if node.op.startswith("call_") and _may_be_cache(node)]
    held = Survey(gm.graph, inputs)
    created = Survey(gm.graph, [node for node in made if node not in held.views])
    context.survey = held
    found, refused = _decide(held, outputs, context)
    new, also_refused = _decide_created(created, context)
    context.sites, context.refusals = (*found, *new), (*refused, *also_refused)
    if context.options.strict and context.refusals:
        first = context.refusals[0]
        raise ValueError(f"strict=True, and {first.name} cannot be compressed: {first.reason} ({first.where}). {first.remedy}")
    return len(context.sites)


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return list(dict.fromkeys(output.all_input_nodes))


def _may_be_cache(node: fx.Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dim() == 4 and value.dtype in FLOATS and not isinstance(real(node), torch.nn.Parameter)


def real(node: fx.Node) -> torch.Tensor | None:
    """The tensor that Dynamo traced a placeholder with, while it is still alive."""
    argument = node.meta.get("grapharg")
    value = argument.example if argument is not None else None
    return value if isinstance(value, torch.Tensor) else None


def _decide(survey: Survey, outputs: list[fx.Node], context) -> tuple[list[Site], list[Refusal]]:
    written = {view.root for view in survey.writes.values()}
    appended = {survey.views[node].root: append for node, append in survey.appends.items()}
    compressed = {root for root in _roots(survey) if isinstance(real(root), CompressedKV)}
    candidates = [root for root in _roots(survey) if root in written or root in appended or root in compressed]
    candidates += [root for root in survey.losses if root not in candidates]
    accepted, refused = {}, {}
    for root in candidates:
        role = _role(survey, root, context)
        reason = survey.losses.get(root) or _obstacle(root, role, root in written, appended.get(root), outputs, context)
        if reason is None:
            kind = "in_place" if root in written else "append" if root in appended else "read"
            accepted[root] = Site(root, kind, role, _codec(role, context), appended.get(root))
        elif role is not None or root in compressed:
            refused[root] = reason
    for root in refused:
        if root in compressed:
            # It is compressed already: the graph reads a decoded copy, and must not write into that.
            context.decoded_inputs.add(root)
    return list(accepted.values()), [_refusal(root, reason) for root, reason in refused.items()]


def _decide_created(survey: Survey, context) -> tuple[list[Site], list[Refusal]]:
    found, refused = [], []
    for root in _roots(survey):
        role = _role(survey, root, context)
        if role is None:
            continue
        reason = _obstacle(root, role, False, None, [root], context)
        if reason is None:
            found.append(Site(root, "create", role, _codec(role, context), None))
        else:
            refused.append(_refusal(root, reason))
    return found, refused


def _roots(survey: Survey) -> list[fx.Node]:
    return [node for node, view in survey.views.items() if node is view.root]


def _role(survey: Survey, root: fx.Node, context) -> str | None:
    """`keys` or `values`, as attention reads it; None where nothing does, `both` where it is read as both."""
    roles = set()
    for read in survey.reads.values():
        roles |= {"keys"} if read.key is not None and read.key.root is root else set()
        roles |= {"values"} if read.value is not None and read.value.root is root else set()
    if not roles:
        held = real(root) if root.op == "placeholder" else None
        if isinstance(held, CompressedKV):
            return "keys" if held.codec is context.options.key_codec else "values"
        return None
    return roles.pop() if len(roles) == 1 else "both"


def _codec(role: str, context) -> Codec:
    return context.options.value_codec if role == "values" else context.options.key_codec


def _obstacle(root, role, in_place, append, outputs, context) -> str | None:
    if role is None:
        return "no attention that a rule knows reads it"
    if role == "both" and context.options.key_codec is not context.options.value_codec:
        return "it is read as keys and as values, and the two have different codecs"
    value, held = tensor_of(root), real(root) if root.op == "placeholder" else None
    if value.requires_grad or (held is not None and held.requires_grad):
        return "gradients flow through it"
    if append is not None and (in_place or append.node.meta["example_value"].requires_grad):
        return "it is both written in place and appended to" if in_place else "gradients flow through it"
    if append is not None and append.node not in outputs:
        return "what was appended does not leave the graph"
    try:
        layout_of(_codec(role, context), int(value.shape[-1]), value.dtype, value.device.type)
    except ValueError as error:
        return str(error)
    if in_place and held is not None and not isinstance(held, CompressedKV):
        return refusal(held)
    return None


_REMEDIES = {
    "gradients flow through it": "Call the model under torch.no_grad() or torch.inference_mode().",
    "it is a view of another tensor": "Give each layer a cache tensor of its own.",
    "other tensors share its memory": "Drop the other views of it before the first compiled call.",
}


def _refusal(root: fx.Node, reason: str) -> Refusal:
    remedy = _REMEDIES.get(reason, "It works as before, uncompressed.")
    return Refusal(name_of(root), reason, where(next(iter(root.users), root)), remedy)


def name_of(node: fx.Node) -> str:
    """What the model calls a tensor: its path from the compiled function's arguments, or the node's name."""
    source = getattr(node, "_dynamo_source", None)
    return getattr(source, "name", None) if isinstance(getattr(source, "name", None), str) else node.name


def where(node: fx.Node) -> str:
    """The line of the model's code that made a node."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    frames = [line for line in lines if line.startswith("File")]
    return frames[-1].removeprefix("File ").replace('"', "") if frames else f"node {node.name}"


