"""A tiny configuration of any architecture, made from the fields that its own configuration class has.

Nothing here knows an architecture: a field is shrunk by what its name says it counts, and every nested configuration is
treated like the outer one. Ratios that classes insist on (width = heads x head_dim, groups that divide heads) hold
between the numbers below, and lists with an entry a layer keep one layer of each kind.
"""

import re
from collections.abc import Callable
from typing import Any

WIDTH, HEADS, HEAD_DIM, INNER, LATENT = 64, 4, 16, 64, 32
VOCABULARY, SPECIAL, POSITIONS, WINDOW, EXPERTS, CHOSEN = 160, 100, 512, 8, 4, 2

_LAYERS = r"(num_hidden_layers|num_layers|n_layers?|num_blocks|(num_)?(encoder|decoder)_layers|layers|depth)"


def _at_most(limit: int) -> Callable[[Any], Any]:
    return lambda old: min(old, limit)


def _groups(old: int) -> int:
    """A count that divides the heads or the experts: one stays one."""
    return 1 if old == 1 else 2


# What a name counts, the first that matches: exactly so many, or a function of how many there were.
_INTEGERS: tuple[tuple[str, Any], ...] = (
    (r"(.*_)?(key_value|kv)_heads|kv_n_heads", _groups),
    (r"linear_num_key_heads", 2),
    (r"mamba_n_heads|mamba_num_heads", 2 * HEADS),
    (r"n_mamba_heads|num_heads_per_.*", _at_most(2)),
    (r"(.*_)?(attention_heads|num_heads|n_heads?|linear_num_value_heads|index_n_heads|index_heads)", HEADS),
    (r"(qk_(nope|rope)_head_dim|qk_rope_dim|rotary_dim)", lambda old: min(old, HEAD_DIM // 2)),
    (r"mamba_(d_head|head_dim)|head_dim|.*_head_dim|d_kv|dim_head|kv_channels|head_size|d_head", HEAD_DIM),
    (r"(q|kv|o)_lora_rank|.*_rank|time_step_rank", lambda old: min(old, LATENT)),
    (r"(mamba_d_state|state_size|ssm_state_size|d_state)", HEAD_DIM),
    (r"mamba_d_ssm|attention_hidden_size|ssm_hidden_size", 2 * WIDTH),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|n_inner|dim_ff|dff|intermediate_dim)", INNER),
    (r"intermediate_size_mlp|.*_intermediate_(size|dim)", INNER),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|proj_dim|projection_dim)", WIDTH),
    (r"(.*_)?(lru_width|output_dim|hidden_size_global|out_dim|in_dim|input_size)", WIDTH),
    (r"hidden_size_per_layer_input", HEAD_DIM),
    (r"(.*_)?vocab_size(_.*)?|.*_vocab|n_words", VOCABULARY),
    (r"n_group|num_expert_group|n_groups|moe_n_group", _groups),
    (r"topk_group|num_limited_groups|moe_topk_group", 1),
    (r"(.*_)?(experts_per_tok|experts_per_token|moe_topk|moe_k|moe_top_k)", _at_most(CHOSEN)),
    (r"(.*_)?(num_shared_experts|n_shared_experts)", _at_most(1)),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|num_routed_experts|n_experts)", EXPERTS),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length", _at_most(POSITIONS)),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention_window_len|attention_window_size", WINDOW),
    (r"index_topk|indexer_topk", 4 * WINDOW),
    (r"(.*_)?(interval|period|every_n_layers|layer_step|layer_group_size|sliding_window_pattern)", _at_most(2)),
    (r"attn_layer_offset", 1),
    (r"first_k_dense_replace|num_dense_layers|n_dense_layers|moe_layer_start_index", _at_most(1)),
    (r"num_kv_shared_layers", _at_most(2)),
    (r"mamba_chunk_size|chunk_size|block_size", _at_most(8)),
    (r"image_size|resolution", lambda old: min(old, 64)),
)
_RULES = tuple((re.compile(pattern), rule) for pattern, rule in _INTEGERS)
# What a default leaves open and the model then asks for.
_OPEN = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "attn_layer_indices": [1],
    "vocabulary_map": {"<image>": SPECIAL},
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 4 * WINDOW,
    "indexer_compress_ratio": 4,
}
_TOKEN = re.compile(r".*(token_id|token_index|token|_id|_index)")
_PLACES = re.compile(r".*(idxs|indices|indexes|_layers|layer_ids)")
_INIT = re.compile(r"initializer_range|init_std|init_method_std")


class Shrinker:
    """Shrinks one configuration class and what it nests; `layers` of each stack at least, `options` override fields."""

    def __init__(self, layers: int = 2, fill: bool = False, options: dict[str, Any] | None = None):
        self.layers, self.fill, self.options = layers, fill, options or {}
        self.special: dict[str, int] = {}

    def overrides(self, config) -> dict[str, Any]:
        """The fields of `config` that have to change, nested configurations as dicts of theirs."""
        fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
        kept = self._kept_layers(config, fields)
        found = {}
        for name, value in fields.items():
            new = self._field(name, value, fields, kept)
            if new is not None:
                found[name] = new
        found.update(_ratios(fields))
        found.update({name: value for name, value in self.options.items() if name in fields})
        return found

    def _field(self, name: str, value: Any, fields: dict[str, Any], kept: list[int] | None) -> Any:
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            return {"model_type": value.model_type, **self.overrides(value)}
        if isinstance(value, bool) or value is None:
            return _OPEN.get(name) if value is None and self.fill else None
        if isinstance(value, int):
            return self._integer(name, value, kept)
        if isinstance(value, float):
            return WIDTH**-0.5 if _INIT.fullmatch(name) else None
        if isinstance(value, dict) and name.startswith("rope"):
            return self._rope(value, fields)
        if isinstance(value, (list, tuple)) and kept is not None and _lists_places(name, value, _depth(fields)):
            return type(value)(kept.index(at) for at in value if at in kept)
        if isinstance(value, (list, tuple)) and kept is not None and len(value) == _depth(fields):
            return _with_attention(name, type(value)(self._entry(name, value[at]) for at in kept))
        if name == "block_types":
            return type(value)(dict.fromkeys(value))
        if name.endswith("feature_layer") and isinstance(value, (list, tuple)):
            return type(value)(-1 - at for at in range(min(2, len(value))))
        return None

    def _rope(self, value: dict, fields: dict[str, Any]) -> dict:
        """Rotary parameters, where sections and factors count pairs of a head's numbers."""
        if not value and self.fill:
            value = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in fields.get("layer_types") or ()}
        pairs = (HEAD_DIM // 2 if fields.get("qk_rope_head_dim") else HEAD_DIM) / 2
        new = {}
        for name, item in value.items():
            if isinstance(item, dict):
                new[name] = self._rope(item, fields)
            elif name.endswith("_section") and isinstance(item, (list, tuple)):
                new[name] = _sections(item, pairs * value.get("partial_rotary_factor", 1.0))
            elif name in ("long_factor", "short_factor"):
                new[name] = list(item)[: HEAD_DIM // 2]
            else:
                new[name] = item
        if self.fill and "rope_theta" in new:
            new.setdefault("mrope_section", _sections((2, 1, 1), pairs * value.get("partial_rotary_factor", 1.0)))
        return new

    def _entry(self, name: str, value: Any) -> Any:
        """One layer's entry of a list: a count is shrunk like the field of that name in the singular."""
        new = self._integer(name, value, None) if isinstance(value, int) and not isinstance(value, bool) else None
        return value if new is None else new

    def _integer(self, name: str, value: int, kept: list[int] | None) -> int | None:
        if re.fullmatch(_LAYERS, name):
            return min(value, self.layers if kept is None else len(kept))
        if _TOKEN.fullmatch(name) and value >= SPECIAL:
            return self.special.setdefault(name, SPECIAL + len(self.special) % (VOCABULARY - SPECIAL))
        for pattern, rule in _RULES:
            if pattern.fullmatch(name) and value > 0:
                return rule(value) if callable(rule) else rule
        return None

    def _kept_layers(self, config, fields: dict[str, Any]) -> list[int] | None:
        """The layers to keep: the first of each kind that a list with an entry a layer tells apart."""
        depth = _depth(fields)
        if depth is None or len(_parts(fields)) > 1:
            return None if depth is None else list(range(len(_parts(fields))))
        lists = _kinds(fields, depth)
        kept: dict[int, None] = {}
        for values in lists:
            for kind in dict.fromkeys(values):
                if not any(values[at] == kind for at in kept):
                    kept[values.index(kind)] = None
        if fields.get("num_kv_shared_layers"):
            return _shared(fields, depth, kept)
        again = [
            [at for at in range(depth) if values[at] == kind] for values in lists for kind in dict.fromkeys(values)
        ]
        second = [places[1] for places in again if len(places) > 1] if self.layers > 2 else []
        for at in (*second, 0, depth - 1, *range(depth)):
            if len(kept) < min(self.layers, depth):
                kept[at] = None
        return sorted(kept)


def _lists_places(name: str, value: Any, depth: int) -> bool:
    """Whether a field says which layers are of a kind, by their places."""
    return (
        bool(_PLACES.fullmatch(name))
        and len(set(value)) == len(value) > 0
        and all(type(item) is int and 0 <= item < depth for item in value)
    )


def _kinds(fields: dict[str, Any], depth: int) -> list[list]:
    """What tells layers apart, for each field that does: an entry a layer, of few kinds."""
    found = []
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and _lists_places(name, value, depth):
            found.append([at in value for at in range(depth)])
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            found.append(list(value) if all(isinstance(item, (str, int)) for item in value) else [None] * depth)
    return [kinds for kinds in found if len(set(kinds)) <= 4]


def _with_attention(name: str, kinds):
    """Layers of a class that could have attention and by default has none: the last one gets it."""
    if name == "layer_types" and set(kinds) == {"linear_attention"}:
        return type(kinds)((*kinds[:-1], "full_attention"))
    return kinds


def _ratios(fields: dict[str, Any]) -> dict[str, Any]:
    """What keeps its proportion to another field, whatever its name says on its own."""
    found = dict.fromkeys(_parts(fields), 1)
    heads = [v for n, v in fields.items() if re.fullmatch(r"num_(attention_)?heads|n_heads?", n) and v]
    for name, value in fields.items():
        if re.fullmatch(r"num_(key_value|kv)_heads", name) and value in heads:
            found[name] = HEADS
    if fields.get("attention_hidden_size") and fields.get("hidden_size"):
        found["attention_hidden_size"] = WIDTH * fields["attention_hidden_size"] // fields["hidden_size"]
    if fields.get("codebook_dim") and fields["codebook_dim"] == fields.get("hidden_size"):
        found["codebook_dim"] = WIDTH
    if "sliding_attention" in (fields.get("layer_types") or ()) and fields.get("sliding_window", 0) is None:
        found["sliding_window"] = WINDOW
    if "expand" in fields and "num_heads" in fields:
        found["num_heads"] = WIDTH * fields["expand"] // HEAD_DIM
    if fields.get("qk_rope_head_dim") and fields.get("head_dim") == fields["qk_rope_head_dim"]:
        found["head_dim"] = HEAD_DIM // 2
    if fields.get("axial_pos_embds_dim"):
        found["axial_pos_embds_dim"] = (WIDTH // 4, WIDTH - WIDTH // 4)
    if "conv_L_cache" in fields and fields.get("layer_types", ()) is None:
        found["layer_types"], found["num_hidden_layers"] = ["conv", "full_attention"], 2
    if fields.get("languages") and "default_language" in fields:
        found["default_language"] = fields["languages"][0]
    return found


def _shared(fields: dict[str, Any], depth: int, kept: dict[int, None]) -> list[int]:
    """Two layers with a cache and two of the same kinds that read theirs, which are the last."""
    kinds = fields.get("layer_types") or [None] * depth
    first = sorted(kept)[:2] if len(kept) > 1 else [0, 1]
    own = depth - fields["num_kv_shared_layers"]
    last = [next((at for at in range(own, depth) if kinds[at] == kinds[f]), depth - 1) for f in first]
    return [*first, *last]


def _parts(fields: dict[str, Any]) -> list[str]:
    """Counts of layers that add up to all of them."""
    names = [name for name in fields if re.fullmatch(r"n_\w+_layers", name) and isinstance(fields[name], int)]
    return names if len(names) > 1 and sum(fields[name] for name in names) == _depth(fields) else []


def _depth(fields: dict[str, Any]) -> int | None:
    """How many layers the lists of `fields` have an entry for."""
    names = [name for name in fields if re.fullmatch(_LAYERS, name) and isinstance(fields[name], int)]
    return max((fields[name] for name in names), default=None)


def _sections(sections, pairs: float) -> list[int]:
    """Sections in the same proportions that add up to `pairs`."""
    new = [max(1, int(size * pairs / sum(sections))) for size in sections]
    new[-1] += int(pairs) - sum(new)
    return new


def tiny_config(config_class: type, layers: int = 2, fill: bool = False, options: dict[str, Any] | None = None):
    """A small configuration of `config_class`, made by its own constructor.

    At least `layers` of each stack are kept; `fill` sets counts that the defaults leave open; `options` override any
    field of that name, nested ones too. Raises whatever the constructor raises.
    """
    return config_class(**Shrinker(layers, fill, options).overrides(config_class()))
