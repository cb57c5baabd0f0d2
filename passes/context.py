"""What the passes hand to each other and to the backend."""

from dataclasses import dataclass, field

import torch
from torch import fx

from tqcompile.centre import Centring
from tqcompile.codec import Codec
from tqcompile.options import Options
from tqcompile.passes.refusals import Refusal
from tqcompile.passes.sites import Site
from tqcompile.passes.survey import Survey
from tqcompile.recent import Regions


@dataclass(frozen=True)
class Fallback:
    """A read that no rule knows: the cache is decoded in front of it, for the length of that operator."""

    name: str
    operator: str
    where: str


@dataclass(frozen=True)
class Uncentred:
    """Keys that are encoded as they are, where the options ask for centred ones."""

    name: str
    reason: str
    where: str


@dataclass(frozen=True)
class CacheInput:
    """How the caller turns argument `index` of Dynamo's graph into planes.

    Without a site the graph reads a decoded copy, which is encoded again after the call where it `writes_back`.
    `tokens` is how many an append adds: a number, or the symbol that says it. `regions` come in behind the planes.
    """

    index: int
    site: Site | None
    name: str
    tokens: object = None
    writes_back: bool = False
    centring: Centring | None = None
    regions: Regions | None = None


@dataclass(frozen=True)
class Output:
    """What the caller puts at one place of the model's outputs.

    `tensor`: value `index` of the compiled graph. `shown`: the same, and in the model a view of the cache that argument
    `of` is. `argument`: argument `index`, as it is. `appended`: of the cache that
    grew out of argument `index`, the tokens `run` along a dimension. `planes`: a new cache of the values
    `index .. index + count`: its planes, the vectors of its centre where it has a `centring`, and two of what is kept
    of `regions`, where there are such. The next graph is to leave its size along `token_dim` open.
    """

    kind: str
    index: int
    count: int = 1
    codec: Codec | None = None
    head_dim: int = 0
    dtype: torch.dtype | None = None
    name: str = ""
    run: tuple[int, slice] | None = None
    centring: Centring | None = None
    regions: Regions | None = None
    token_dim: int | None = None
    of: int = -1


@dataclass
class Context:
    """One graph's journey through the pipeline."""

    options: Options
    survey: Survey | None = None
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    decoded_inputs: set[fx.Node] = field(default_factory=set)
    regions: dict[fx.Node, Regions] = field(default_factory=dict)
    made_by: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    kept: tuple[tuple[str, str], ...] = ()
    foreign: dict[int, list] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    centres: dict[fx.Node, Centring] = field(default_factory=dict)
    asking: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]] = field(default_factory=dict)
    uncentred: list[Uncentred] = field(default_factory=list)
    reads: int = 0
    inputs: list[CacheInput] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
