"""What is measured: shapes of attention, the cases made of them, and the suite that docs/gpu.md publishes."""

from dataclasses import dataclass, replace

from tqcompile import formats, ops

TASKS = ("attend", "logits", "append", "prefill", "step")
MASKS = ("none", "bool", "additive")
DTYPES = ("bfloat16", "float16", "float32")
# Where nothing else is asked for; of other tasks the device says it.
DTYPE = {"logits": "float32"}


@dataclass(frozen=True)
class Shape:
    """One step: sequences, tokens in the cache of each, heads, the mask that attention is given, queries of each.

    Of a static cache the first `filled` tokens are there (0: all are), and a mask hides the others, as a bool where
    nothing else is asked for. Scores are capped at `softcap` (0: they are not), and with `sinks` each head has one more
    logit.
    """

    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mask: str = "none"
    queries: int = 1
    softcap: float = 0.0
    sinks: bool = False
    filled: int = 0

    def __post_init__(self):
        for name in ("batch", "context", "heads", "kv_heads", "head_dim", "queries"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}; give a whole number of 1 or more")
        if not isinstance(self.filled, int) or not 0 <= self.filled <= self.context:
            raise ValueError(
                f"filled={self.filled!r} of context={self.context}; give a number of tokens that it holds, or 0 for all"
            )
        if not 0 <= self.softcap < float("inf"):
            raise ValueError(f"softcap={self.softcap!r}; give a positive number, or 0 for none")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}; each KV head serves as many"
            )
        if self.mask not in MASKS:
            raise ValueError(f"mask={self.mask!r} is unknown; allowed are {', '.join(MASKS)}")

    @property
    def unmasked(self) -> "Shape":
        """The same, of all tokens."""
        return replace(self, mask="none", filled=0)

    @property
    def score_mod(self) -> str:
        """What is done to scores, as a text of `scores`."""
        return f"tanh(score / {self.softcap}) * {self.softcap}" if self.softcap else ""

    def __str__(self):
        tokens = _tokens(self.context) + f", {_tokens(self.filled)} filled" * (self.filled > 0)
        heads = f"{self.heads}/{self.kv_heads} heads, {self.head_dim} dims"
        asked = f", {self.queries} queries" * (self.queries > 1)
        asked += f", softcap {self.softcap:g}" * (self.softcap > 0) + ", sinks" * self.sinks
        return f"B{self.batch} x {tokens}, {heads}" + asked + f", {self.mask} mask" * (self.mask != "none")


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


@dataclass(frozen=True)
class Case:
    """One row to measure: what is timed, for which shape and codecs; `layers`, `model` and `inner` are a step's.

    A `model` is a folder or name of Hugging Face's; without one, a step is that of a decoder like Llama.
    """

    task: str
    shape: Shape
    keys: str
    values: str
    dtype: str = "bfloat16"
    layers: int = 0
    model: str | None = None
    inner: str = "inductor"

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown; allowed are {', '.join(TASKS)}")
        formats.codec(self.keys)
        formats.check_values(self.values)
        if self.task == "step" and self.layers < 1:
            raise ValueError(f"layers={self.layers}; a step needs one or more")

    @property
    def pair(self) -> str:
        return f"{self.keys} / {self.values}"

    @property
    def title(self) -> str:
        """The shape, and of a step its layers too."""
        of = f", {self.model}" if self.model else ""
        return str(self.shape) + (f", {self.layers} layers{of}" if self.task == "step" else "")


FOUR, MIXED, THREE, TWO = (tuple(f"turboquant:{bits}" for bits in pair) for pair in ((4, 4), (4, 3), (3, 3), (2, 2)))
LONG = Shape(8, 32768)
SHAPES = (LONG, *(Shape(*size) for size in ((1, 131072), (32, 8192), (1, 32768), (1, 8192), (4, 2048), (1, 1024))))
VARIANTS = (
    *(Shape(8, 32768, head_dim=dim) for dim in (64, 96, 256)),
    *(Shape(8, 32768, heads=8 * group) for group in (1, 7, 8)),
    *(Shape(8, 32768, mask=mask) for mask in ("bool", "additive")),
    *(Shape(8, 32768, softcap=50.0), Shape(8, 32768, sinks=True)),
    Shape(8, 32747),
)
OTHERS = tuple(
    pair
    for pair in (*map(formats.pair_of, formats.REGISTRY), *(preset.pair for preset in formats.PRESETS.values()))
    if pair not in (FOUR, MIXED, THREE, TWO)
)
SUITE_LAYERS = 32


def spelled_out(pair: tuple[str, str], head_dim: int) -> list[str]:
    """Those codecs that no kernel of a GPU writes: a model's graph spells out how."""
    return [name for name in pair if not ops.writes(formats.codec(name), head_dim)]


def suite() -> list[Case]:
    """The rows that the project publishes, in the order in which it does."""
    default = formats.PRESETS[formats.DEFAULT].pair
    plan = [("attend", LONG, (FOUR, MIXED, THREE, TWO, *dict.fromkeys(OTHERS)))]
    plan += [("attend", shape, (FOUR, MIXED, THREE, TWO)) for shape in SHAPES[1:]]
    plan += [("attend", shape, (FOUR, THREE, TWO)) for shape in VARIANTS]
    alike = [p for p in (*map(formats.pair_of, formats.REGISTRY), default) if not spelled_out(p, LONG.head_dim)]
    plan += [("logits", Shape(1, 131072), (FOUR, THREE))]
    plan += [("append", LONG, alike), ("prefill", Shape(1, 8192), alike), ("step", LONG, (FOUR, default))]
    return [
        Case(task, shape, *pair, DTYPE.get(task, "bfloat16"), SUITE_LAYERS if task == "step" else 0)
        for task, shape, pairs in plan
        for pair in pairs
    ]
