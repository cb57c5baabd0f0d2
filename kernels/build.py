"""Compiles the kernels of every registered codec ahead of time, with no device, and shows what they take.

    python -m tqcompile.kernels.build

Exits with status 1 if a kernel spills registers to memory.
"""

import sys
from collections.abc import Iterator

import torch
import triton.language as tl
from tabulate import tabulate
from triton.experimental.gluon._runtime import GluonASTSource

from tqcompile.codec import STATE_BITS, Codec
from tqcompile.formats import REGISTRY, pair_of
from tqcompile.formats import codec as codec_named
from tqcompile.kernels import append, chunks, exact, integer, logits, path, portable, shift, step, tune
from tqcompile.kernels.assembled import Usage, compiled
from tqcompile.kernels.emit import Reader
from tqcompile.kernels.sides import Sides, in_blocks, in_sectors
from tqcompile.kernels.writers import writes
from tqcompile.layout import layout_of
from tqcompile.trellis import OVERLAP, window

CAPABILITIES = (80, 90)
HEAD_DIMS = (64, 128)
READERS = (
    Reader("none"),
    Reader("bool"),
    Reader("additive"),
    Reader("none", True),
    Reader("additive", score_mod="tanh(score) * 50.0"),
)


def mixed_pairs(registry: dict[str, Codec]) -> list[tuple[Codec, Codec]]:
    """Each codec with itself, or beside values where it serves keys alone, then with the one that precedes it."""
    codecs = list(registry.values())
    behind = [pair for pair in zip(codecs[1:], codecs) if pair[1].for_values]
    return [tuple(map(codec_named, pair_of(codec.name))) for codec in codecs] + behind[::2]


def attend_usage(
    pair: tuple[Codec, Codec],
    head_dim: int,
    reader: Reader,
    dtype: torch.dtype,
    rows: int,
    capability: int,
    second_dim: int = 0,
) -> Usage:
    """Compile `attend_split` for contiguous planes and queries of `dtype`.

    With `second_dim` the keys are the values, and there are more of so many dims in their codec.
    """
    second = (pair[0], second_dim) if second_dim else None
    kernel = portable.module(*pair, (head_dim, head_dim), reader, None, False, second).attend_split
    widths = [codec.coordinates(dim) for codec, dim in zip((*pair, pair[0]), (head_dim, head_dim, second_dim))]
    how = (max(widths), dtype == torch.float32, torch.device("cpu"))
    latent = bool(second_dim) and portable.is_latent(dtype, pair[0], widths[0])
    plan = tune.attend_plan(rows, 8, 4096, *how, crowded=any(map(portable.crowded, pair)), latent=latent)
    pointers = {"q": dtype, "mask": dtype}
    types = {"scale": "fp32", "reach": "*i32"}
    if reader.mask == "bool":
        pointers["mask"] = torch.uint8
    pointers["second_q"] = dtype
    for side, codec in zip(("key", "value", "second"), (*pair, pair[0])):
        pointers |= planes_of(f"{side}_", codec, dtype)
        pointers[f"{side}_table"] = portable.table_of(codec, head_dim, dtype, torch.device("cpu")).dtype
    kind = portable.TRITON_DTYPES[dtype]
    constants = {
        **{"q_d": 1, "second_q_d": 1, "mask_s": 1, "BLOCK_R": plan.block_rows, "BLOCK_T": plan.block_tokens},
        **{f"{side}_DIM": width for side, width in zip(("KEY", "VALUE", "SECOND"), widths)},
        **{f"BLOCK_{side}": tune.extent(width) for side, width in zip("KVS", widths)},
        "SHARED": bool(second_dim),
        **{"KEY_TYPE": kind, "VALUE_TYPE": kind, "KEY_DOT": kind, "VALUE_DOT": kind},
        "REACH": reader.mask != "none",
        "SHRINK": dtype == torch.float16,
    }
    name = f"attend {pair[0].name} {pair[1].name} d{head_dim} {reader.mask}{' causal' * reader.causal}"
    label = f"{name} {str(dtype)[6:]} {plan.block_rows} rows{f' and {second_dim} dims' * bool(second_dim)}"
    return compiled(label, kernel, pointers, constants, types, plan.warps, plan.registers, capability)


def planes_of(side: str, codec: Codec, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes of a side's codes and scales, for a cache of `dtype`."""
    return {
        f"{side}codes": dtype if codec.is_exact else torch.uint8,
        f"{side}scale": dtype if codec.is_exact else torch.float16,
    }


def fragment_arguments(pair: tuple[Codec, Codec], head_dim: int, reader: Reader, plan: tune.AttendPlan) -> tuple:
    """Pointers, constants and other types of a kernel over codes of contiguous planes, and queries in bfloat16."""
    mask = torch.uint8 if reader.mask == "bool" else torch.bfloat16
    pointers = {"q": torch.bfloat16, "mask": mask, "key_codes": torch.uint8, "value_codes": torch.uint8}
    pointers |= {"key_scale": torch.float16, "value_scale": torch.float16}
    constants = {"q_d": 1, "mask_s": 1}
    for side, codec in zip(("KEY", "VALUE"), pair):
        widths = {store.name: store.width for store in layout_of(codec, head_dim, torch.float32, "cuda").stores}
        constants |= {f"{side}_S": widths["codes"], f"{side}_SCALE_S": widths["scale"]}
    # Of a mask that more was added to, a reach says what is hidden and no more.
    reach = {"none": 0, "bool": 3, "additive": 3 if reader.score_mod else 2}[reader.mask]
    constants |= {"REACH": reach, "T": plan.block_tokens, "R": plan.block_rows}
    types = {"key_words": "*i32", "value_words": "*i32", "scale": "fp32", "reach": "*i32"}
    return pointers, constants | {"num_warps": plan.warps}, types


def integer_usage(
    pair: tuple[Codec, Codec], head_dim: int, reader: Reader, rows: int, capability: int, ring=False, shifted=False
) -> Usage:
    """Compile attention on int8 units for contiguous planes and queries in bfloat16, over a ring or not, and there for
    heads whose tokens begin at a multiple of 16 or, `shifted`, anywhere."""
    sides = integer.sides_of(pair, (head_dim, head_dim))
    plan = integer.plan_of((sides, ring), rows, 8, 4096, torch.device("cpu"))
    kernel = getattr(integer.module(*sides, reader, None), integer.KERNEL[ring])
    pointers, constants, types = fragment_arguments(pair, head_dim, reader, plan)
    constants["EARLY"] = capability >= 90
    if ring:
        constants |= {"STAGES": tune.STAGES, "SCALES": not in_blocks(sides), "SHIFTED": shifted}
    how = f"{reader.mask}{' causal' * reader.causal} {rows} rows{' ring' * ring}{' shifted' * shifted}"
    label = f"int8 attend {pair[0].name} {pair[1].name} d{head_dim} {how}"
    numbers = plan.block_tokens * 2 * head_dim / 32
    return compiled(label, kernel, pointers, constants, types, 1, plan.registers, capability, GluonASTSource, numbers)


def chunk_usage(pair: tuple[Codec, Codec], head_dim: int, reader: Reader, rows: int) -> Usage:
    """Compile attention of a chunk of so many rows for contiguous planes, for the one capability that has it."""
    pieces = chunks.pieces_of(pair, (head_dim, head_dim))
    plan = chunks.plan_of(pieces, reader, rows, 8, 4096, torch.device("cpu"))
    pointers, constants, types = fragment_arguments(pair, head_dim, reader, plan)
    kernel, capability = chunks.module(*pieces, reader, None).attend_chunk, 10 * chunks.CAPABILITY[0]
    how = f"{reader.mask}{' causal' * reader.causal}{' cap' * bool(reader.score_mod)} {rows} rows"
    label, numbers = f"chunk {pair[0].name} {pair[1].name} d{head_dim} {how}", plan.block_tokens * 2 * head_dim / 32
    usual = plan.warps, plan.registers, capability, GluonASTSource, numbers / plan.warps
    return compiled(label, kernel, pointers, constants | {"EARLY": True}, types, *usual)


def logits_usage(codec: Codec, head_dim: int, dtype: torch.dtype, rows: int, capability: int) -> Usage:
    """Compile `logits_fragments` for contiguous planes and queries of `dtype`."""
    side = logits.side_of(codec, head_dim)
    plan = logits.plan_of(side, rows, 8, 4096, torch.device("cpu"))
    widths = {store.name: store.width for store in layout_of(codec, head_dim, torch.float32, "cuda").stores}
    constants = {
        **{"KEY_S": widths["codes"], "KEY_SCALE_S": widths["scale"]},
        **{"q_d": 1, "T": plan.block_tokens, "R": plan.block_rows, "num_warps": 1},
    }
    pointers = {"q": dtype, "codes": torch.uint8, "scale": torch.float16}
    label = f"int8 logits {codec.name} d{head_dim} {str(dtype)[6:]} {rows} rows"
    kernel, types = logits.module(side, None).logits_fragments, {"words": "*i32"}
    numbers = plan.block_tokens * head_dim / 32
    return compiled(label, kernel, pointers, constants, types, 1, plan.registers, capability, GluonASTSource, numbers)


def append_usage(codec: Codec, head_dim: int, dtype: torch.dtype, tokens: int, capability: int) -> Usage:
    """Compile `append_tokens` for contiguous tokens of `dtype`."""
    kernel = append.module(codec, head_dim, None, False).append_tokens
    block, warps = tune.append_plan(tokens, head_dim)
    pointers = {"y": dtype, **planes_of("", codec, dtype)}
    constants = {"y_d": 1, "POSITIONED": True, "BLOCK_T": block, "BLOCK_D": tune.extent(head_dim)}
    label = f"append {codec.name} d{head_dim} {str(dtype)[6:]} {block} tokens"
    return compiled(label, kernel, pointers, constants, {"positions": "*i64"}, warps, tune.APPEND_REGISTERS, capability)


def step_usage(pair: tuple[Codec, Codec], head_dim: int, dtype: torch.dtype, capability: int) -> Usage:
    """Compile `append_step_rows` for contiguous tokens and bases of `dtype`."""
    kernel = step.module(*pair, (head_dim, head_dim), None, False).append_step_rows
    pointers = {name: dtype for name in ("k", "v", "q", "turned", "key_basis", "value_basis")}
    types = {"positions": "*i64", "scratch": "*fp32"}
    for side, codec in zip(("key", "value"), pair):
        pointers |= planes_of(f"{side}_", codec, dtype)
        types |= {f"{side}_edges": "*fp32", f"{side}_table": "*fp32"}
    extent, turned = tune.extent(head_dim), tune.turned_dims(head_dim)
    constants = {
        **{"k_d": 1, "v_d": 1, "q_d": 1, "POSITIONED": True, "TURNED": pair[1].basis != "standard"},
        **{"KEY_DIM": head_dim, "VALUE_DIM": head_dim, "BLOCK_K": extent, "BLOCK_V": extent},
        **{"KEY_J": turned, "VALUE_J": turned},
    }
    label = f"append step {pair[0].name} {pair[1].name} d{head_dim} {str(dtype)[6:]}"
    return compiled(label, kernel, pointers, constants, types, 4, tune.APPEND_REGISTERS, capability)


def exact_usages(head_dim: int, reader: Reader, dtype: torch.dtype, capability: int) -> list[Usage]:
    """Compile what hides, reads and writes tokens that are kept as they are, for contiguous ones of `dtype`."""
    built, extent, mask = exact.module(reader, None, False), tune.extent(head_dim), dtype
    if reader.mask == "bool":
        mask = torch.uint8
    pointers = {**dict.fromkeys(("q", "keys", "values", "numbers", "tokens"), dtype), "mask": mask}
    types = {**dict.fromkeys(("key_index", "value_index", "index", "positions"), "*i64"), "scale": "fp32"}
    hide = {"mask_s": 1, "KIND": reader.mask, "BLOCK": exact.HIDDEN_TOKENS}
    read = {"q_d": 1, "mask_s": 1, "KEY_DIM": head_dim, "VALUE_DIM": head_dim}
    read |= {"BLOCK_R": 16, "BLOCK_T": exact.block_of(head_dim), "BLOCK_K": extent, "BLOCK_V": extent}
    write = {"token_d": 1, "DIM": head_dim, "POSITIONED": True, "BLOCK_T": 1, "BLOCK_S": 256, "BLOCK_D": extent}
    what = f"d{head_dim} {str(dtype)[6:]} {reader.mask}{' causal' * reader.causal}"
    shown = {**pointers, "out": torch.uint8 if reader.mask == "none" else mask}
    return [
        compiled(f"hide {what}", built.hide_tokens, shown, hide, types, 4, 255, capability),
        compiled(f"attend exact {what}", built.attend_exact, pointers, read, types, 4, 255, capability),
        compiled(
            f"hide slots {what}", built.hide_slots, {"mask": torch.float32}, {"BLOCK": 128}, types, 1, 255, capability
        ),
        compiled(f"remember {what}", built.remember_tokens, pointers, write, types, 4, 255, capability),
    ]


def shift_usage(columns: int, reader: Reader, capability: int) -> Usage:
    """Compile what centring adds to scores for rows of so many columns and a mask in bfloat16."""
    tokens, extent = shift.tile_of(columns)
    constants = {"mask_s": 1, "COLUMNS": columns, "KIND": reader.mask, "HALF": tl.float16, "STAGES": shift.STAGES}
    constants |= {"BLOCK_R": shift.BLOCK_R, "BLOCK_T": tokens, "BLOCK_C": extent}
    pointers = {"waved": torch.float32, "waves": torch.float16, "mask": torch.bfloat16}
    if reader.mask == "bool":
        pointers["mask"] = torch.uint8
    kernel, label = shift.module(None, False).shift_scores, f"shift {columns} columns {reader.mask}"
    return compiled(label, kernel, pointers, constants, {}, shift.WARPS, 255, capability)


def path_usage(bits: int, width: int, capability: int) -> Usage:
    """Compile the search of paths of so many bits a coordinate for rows of `width`."""
    constants = {"DIM": width, "BITS": bits, "STATES": 1 << STATE_BITS, "OVERLAP": OVERLAP, "AHEAD": window(bits) - 1}
    pointers = {"x": torch.float32, "numbers": torch.float32, "choices": torch.uint8, "codes": torch.uint8}
    label = f"path {bits} bits d{width}"
    return compiled(label, path.find_paths, pointers, constants, {}, path.WARPS, 255, capability)


def ways_of(sides: Sides) -> list[tuple[bool, bool]]:
    """Whether tiles of such sides come through shared memory, and heads there begin anywhere: what is launched."""
    whole = all(side.scalars == 1 for side in sides)
    return [(False, False)] + in_sectors(sides) * [(True, False)] + (in_sectors(sides) and whole) * [(True, True)]


def every_usage() -> Iterator[Usage]:
    """Every registered codec, alone and in some pairs, at each head_dim, reader and capability."""
    for capability in CAPABILITIES:
        for head_dim in HEAD_DIMS:
            for codec in REGISTRY.values():
                for tokens in (1, 4096) if writes(codec, head_dim) else ():
                    yield append_usage(codec, head_dim, torch.bfloat16, tokens, capability)
            for pair in mixed_pairs(REGISTRY):
                for reader in READERS if pair[0] is pair[1] and pair[0].is_plain else READERS[:1]:
                    yield attend_usage(pair, head_dim, reader, torch.bfloat16, 4, capability)
            for pair in mixed_pairs(REGISTRY)[: len(REGISTRY)]:
                for dtype, rows in (
                    (torch.bfloat16, 512),
                    (torch.float16, 4),
                    (torch.float32, 4),
                    (torch.float32, 512),
                ):
                    yield attend_usage(pair, head_dim, READERS[0], dtype, rows, capability)
            for reader in READERS:
                yield from exact_usages(head_dim, reader, torch.bfloat16, capability)
            for reader in READERS[:3]:
                yield shift_usage(head_dim, reader, capability)
        for codec in REGISTRY.values():
            if portable.is_latent(torch.bfloat16, codec, tune.LATENT_DIMS) and codec.for_values:
                for rows in (16, 128) if capability >= 90 else (16,):
                    yield attend_usage((codec,) * 2, tune.LATENT_DIMS, READERS[0], torch.bfloat16, rows, capability, 64)
        for head_dim in (64, 96, 128, 256):
            for codec in REGISTRY.values():
                if codec.is_sequential:
                    yield path_usage(codec.terms[0].codes.plane.bits, head_dim, capability)
                if logits.side_of(codec, head_dim):
                    for dtype, rows in ((torch.float32, 4), (torch.bfloat16, 4), (torch.bfloat16, 8)):
                        yield logits_usage(codec, head_dim, dtype, rows, capability)
            for pair in mixed_pairs(REGISTRY):
                if pair[0].basis != "standard" and all(writes(codec, head_dim) for codec in pair):
                    for dtype in (torch.bfloat16, torch.float32):
                        yield step_usage(pair, head_dim, dtype, capability)
                if sides := integer.sides_of(pair, (head_dim, head_dim)):
                    for way in ways_of(sides):
                        for reader in READERS:
                            yield integer_usage(pair, head_dim, reader, 4, capability, *way)
                        yield integer_usage(pair, head_dim, READERS[0], 8, capability, *way)


def chunk_usages() -> Iterator[Usage]:
    """Every pair of codecs that is read by chunks, at each head_dim and reader, of few rows and of many."""
    for head_dim in (64, 96, 128, 256):
        for pair in mixed_pairs(REGISTRY):
            if chunks.pieces_of(pair, (head_dim, head_dim)):
                for reader in READERS:
                    yield from (chunk_usage(pair, head_dim, reader, rows) for rows in (64, 512))


def main() -> int:
    """Print the table; 1 if anything spills."""
    usages = [*every_usage(), *chunk_usages()]
    columns = ("kernel", "capability", "registers", "spills", "shared", "instructions")
    rows = [[getattr(usage, column) for column in columns] for usage in usages]
    print(tabulate(rows, headers=columns, floatfmt=".2f"))
    spilled = [usage for usage in usages if usage.spills]
    print(f"\n{len(usages)} kernels, {len(spilled)} spill")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
