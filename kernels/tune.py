"""Block sizes, warps and splits: every number of the kernels that decides speed and nothing else."""

from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache

import torch

from tqcompile.kernels.address import power_of_two

# (most rows a program holds, float32 product) -> (rows, tokens, warps, registers) for heads of up to 128 numbers. No
# entry may spill, for any codec: `build` checks it. The assembler spills a little to fit more programs unless it is
# told how many registers it may take. A product in float32 has no matrix unit, and wants small tiles.
ATTEND = {
    (16, False): (16, 64, 4, 255),
    (16, True): (16, 16, 8, 255),
    (64, False): (64, 64, 8, 255),
    (64, True): (16, 16, 8, 255),
}
# The same, in half precision, of a latent of up to 512 numbers that is keys and values at once: it is decoded once for
# both, and 128 rows are 64 KiB of sums. Those of more than 16 rows are for Hopper: what came before spills.
LATENT = {16: (16, 32, 4, 255), 64: (32, 64, 8, 255)}
LATENT_DIMS = 512
APPEND_REGISTERS = 128
# Tiles of a ring; the programs whose rings a multiprocessor must hold, and what it keeps of each for itself: an H100
# has room for all, an A100 for small tiles of long rows, and what came to desks and laptops after it for few.
STAGES = 2
RING_PROGRAMS = 8
RESERVED_BYTES = 1024
# Tokens of a program up to which tiles are small, and how many bytes of codes they then have, or 32 tokens: nothing
# hides what is done with the last.
SHORT_SPAN = 256
SMALL_BYTES = 4096
# Programs that a multiprocessor holds at once; dims, and numbers, that one step of the combination reads.
PROGRAMS_PER_PROCESSOR = 2
COMBINE_DIMS = 32
# Rows of a step from which each has one program of the combination, for all dims; what that holds of a basis at once.
COMBINED_ROWS = 256
COMBINED_NUMBERS = 16384
BASIS_BYTES = 32768
# Numbers of a basis that a program of four warps holds at once; rows, and tokens of a step, up to which the programs
# that make them rotate them too: each reads the whole basis, and a matrix product has its own launch.
TURNED_NUMBERS = 8192
TURNED_ROWS = 2048
STEP_TOKENS = 8
# Rows a KV head up to which a token is decoded for each block of them; of more, it is decoded once: of heads wider than
# fused attention takes, soon. Numbers that a program decodes at once.
MOST_ROWS = 128
MOST_ROWS_WIDE = 16
FUSED_DIMS = 256
DECODED_NUMBERS = 4096
# Rows a KV head from which a tile is decoded for a chunk of them, of few KV heads in all and of many, and up to which
# it is without a mask; dims that its matrix products want at least, and how many bytes of sums it may leave.
CHUNK_ROWS, CHUNK_ROWS_OF_MANY, CHUNK_HEADS = 33, 25, 64
CHUNK_MOST_ROWS = 512
CHUNK_LEAST_DIMS = 32
CHUNK_BYTES = 2**28
# What is planned for where there is no device to ask: by the interpreter, and for kernels that are only compiled.
DEFAULT_PROCESSORS = 4
DEFAULT_SHARED_BYTES = 228 * 1024


@dataclass(frozen=True)
class AttendPlan:
    """How one call is cut: rows and tokens of a tile, splits of `span` tokens, warps, registers a thread may take."""

    block_rows: int
    block_tokens: int
    splits: int
    span: int
    warps: int
    registers: int


@dataclass(frozen=True)
class Setting:
    """What is free to choose of a kernel on int8 units: rows and tokens of a tile, programs that a multiprocessor is
    given at once, registers a thread may take. Any choice computes the same, save for the order of sums."""

    block_rows: int
    block_tokens: int
    programs: int
    registers: int

    def __post_init__(self):
        allowed = ((4, 8), (32, 64, 128), range(1, 65), range(32, 256))
        for field, choices in zip(fields(self), allowed):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value not in choices:
                raise ValueError(f"{field.name}={value!r}; allowed are {choices}")


# What a search times: tiles of rows and tokens, by programs and registers.
SETTINGS = {
    "attend": tuple(
        Setting(*tile, *share)
        for tile in ((4, 64), (4, 32), (8, 64), (8, 32))
        for share in ((8, 255), (16, 255), (12, 168), (16, 128))
    ),
    "logits": tuple(
        Setting(*tile, *share)
        for tile in ((4, 128), (4, 64), (4, 32), (8, 64), (8, 32))
        for share in ((8, 255), (12, 168), (16, 128), (20, 96))
    ),
}


@cache
def extent(head_dim: int) -> int:
    """The extent of a tile that covers a vector; a matrix product wants at least 16."""
    return max(16, power_of_two(head_dim))


def most_rows(head_dim: int, latent: bool = False) -> int:
    """Rows a KV head up to which a token is decoded for each block of them; of a `latent` on Hopper, more."""
    return MOST_ROWS if head_dim <= FUSED_DIMS or latent else min(MOST_ROWS, MOST_ROWS_WIDE)


@lru_cache(maxsize=4096)
def attend_plan(
    rows: int,
    heads: int,
    length: int,
    head_dim: int,
    float32: bool,
    device: torch.device,
    processors: int | None = None,
    crowded: bool = False,
    latent: bool = False,
) -> AttendPlan:
    """The plan for `rows` query rows on each of `heads` KV heads over `length` tokens.

    `crowded` numbers take several loads each, and more registers than others of their head_dim.
    """
    many = 16 if rows <= 16 else 64
    block_rows, block_tokens, warps, registers = LATENT[many] if latent else ATTEND[many, float32]
    if not latent and (head_dim > 128 or crowded):
        block_tokens, warps, registers = 16 if crowded else max(16, block_tokens // 2), 8, 255
    wanted = (processors or processors_of(device)) * PROGRAMS_PER_PROCESSOR
    blocks = -(-length // block_tokens)
    splits = max(1, min(blocks, wanted // (heads * -(-rows // block_rows))))
    span = -(-blocks // splits) * block_tokens
    return AttendPlan(block_rows, block_tokens, -(-length // span), span, warps, registers)


def integer_setting(
    rows: int, head_dim: int, breadth: int, crowded: bool, ring_tokens: int = 0, bits: int = 0, scalars: int = 1
) -> Setting:
    """What attention on int8 units does unless a search found better: registers for two tiles of codes at once.

    `breadth` is head_dim, or twice that where codes are bytes in registers; `crowded` codes need more registers than
    others of their head_dim, and get smaller tiles. Where tiles come through shared memory, they have `ring_tokens`, or
    fewer: eight rows leave registers for the largest ones of few `bits` alone. Codes under several `scalars` cost more
    for each tile, whatever its size.
    """
    block_rows = 4 if rows <= 4 or head_dim > 128 or crowded else 8
    if ring_tokens:
        roomy = block_rows == 4 or (breadth <= 64 and bits <= 3)
        most = 32 if block_rows * breadth > 1024 else 128 if roomy and scalars == 1 else 64
        return Setting(block_rows, min(ring_tokens, most), RING_PROGRAMS, 255)
    large = block_rows * breadth <= 512 and not crowded and scalars == 1
    return Setting(block_rows, 64 if large else 32, 8, 255)


def with_small_tiles(
    setting: Setting, row_bytes: int, rows: int, heads: int, length: int, device: torch.device
) -> Setting:
    """The setting, with small tiles where a program has few tokens; those of a token's codes are `row_bytes`."""
    if integer_plan(setting, rows, heads, length, device).span > SHORT_SPAN:
        return setting
    tokens = max(32, 1 << (SMALL_BYTES // row_bytes).bit_length() - 1)
    return replace(setting, block_tokens=min(setting.block_tokens, tokens))


def logits_setting(rows: int, head_dim: int, breadth: int, crowded: bool, bits: int) -> Setting:
    """The same of scores alone: without values, two tiles of codes take fewer registers, and more programs are held;
    several pieces have what one of their breadth has."""
    tile = integer_setting(rows, head_dim, breadth, crowded)
    if tile.block_rows == 4 and breadth <= 128 and bits != 5:
        return replace(tile, programs=16, registers=128)
    return replace(tile, programs=12, registers=168) if tile.block_rows * breadth <= 1024 and head_dim <= 128 else tile


def integer_plan(
    setting: Setting, rows: int, heads: int, length: int, device: torch.device, processors: int | None = None
) -> AttendPlan:
    """The plan of a kernel on int8 units: as many programs as the device holds at once, and no more.

    A program of a single tile would not pay for its query.
    """
    held = (processors or processors_of(device)) * setting.programs
    blocks, heads = -(-length // setting.block_tokens), heads * -(-rows // setting.block_rows)
    least = 2 if 2 * blocks * heads > held else 1
    span = max(least, -(-blocks // max(1, held // heads))) * setting.block_tokens
    return AttendPlan(setting.block_rows, setting.block_tokens, -(-length // span), span, 1, setting.registers)


def chunk_least_rows(heads: int) -> int:
    """Rows a KV head, of `heads` in all, from which tiles are decoded for a chunk: fewer are faster on int8 units."""
    return CHUNK_ROWS if heads < CHUNK_HEADS else CHUNK_ROWS_OF_MANY


def chunk_most_rows(bits: int) -> int:
    """Rows a KV head up to which tiles, of codes of up to so many bits, are decoded for a chunk of them without a mask:
    of more, decoding each once for all and dense attention take less time."""
    return CHUNK_MOST_ROWS if bits < 5 else CHUNK_MOST_ROWS // 2


@lru_cache(maxsize=4096)
def chunk_plan(
    rows: int, heads: int, length: int, width: int, bits: tuple[int, int], plain: bool, device: torch.device
) -> AttendPlan:
    """The plan of a kernel that decodes tiles for a chunk of rows: of up to `width` numbers a token, and `bits` of keys
    and of values; a `plain` reader has neither a mask nor a function of scores.

    Sixty-four rows are those of four warps. No entry may spill: `build` checks those of 64, 96, 128 and 256 dims.
    """
    warps = 4 if rows <= 64 and width <= 128 else 8
    block_tokens = 64 if width <= 128 else 32
    if warps == 8 and plain and width <= 128 and max(bits) < 5:
        block_tokens = 128
    if warps == 4 and min(bits) == 5 and width > 64:
        block_tokens = 32
    held = processors_of(device) * (8 // warps)
    blocks, programs = -(-length // block_tokens), heads * -(-rows // (16 * warps))
    span = -(-blocks // max(1, held // programs)) * block_tokens
    return AttendPlan(16 * warps, block_tokens, -(-length // span), span, warps, 255)


def append_plan(tokens: int, head_dim: int) -> tuple[int, int]:
    """Tokens of a program, and its warps."""
    block = min(power_of_two(tokens), max(1, 2048 // extent(head_dim)))
    return block, 4 if block * extent(head_dim) >= 512 else 1


@lru_cache(maxsize=4096)
def combine_blocks(splits: int, width: int, rows: int, basis_bytes: int) -> tuple[int, int, int, int]:
    """Splits and dims that a program of the combination of `rows` reads at once, dims that it rotates to, and warps.

    A number of the basis takes `basis_bytes`; 0 where nothing is rotated.
    """
    dims = extent(width) if basis_bytes or rows >= COMBINED_ROWS else min(COMBINE_DIMS, extent(width))
    block = min(max(1, COMBINED_NUMBERS // dims), power_of_two(splits))
    if not basis_bytes:
        return block, dims, 0, 8 if block * dims > 8192 else 4
    warps = 8 if block * dims > 8192 and dims > 128 else 4
    # Many programs find room beside the last ones of attention, and are ready when these end, where they are narrow.
    if rows >= COMBINED_ROWS and block * dims <= 2048 and dims <= 128 and basis_bytes == 2:
        warps = 2
    return block, dims, turned_dims(width, BASIS_BYTES // basis_bytes), warps


@cache
def turned_dims(head_dim: int, numbers: int = TURNED_NUMBERS) -> int:
    """Rows of a basis that a program multiplies by at once, where it may hold so many numbers."""
    return max(1, min(extent(head_dim), numbers // extent(head_dim)))


@cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def ring_tokens(key_bytes: int, value_bytes: int, scalars: int, device: torch.device) -> int:
    """Tokens of a tile that comes through shared memory, of so many bytes of codes each, under so many `scalars` on
    either side; 0 where it has no room."""
    most = max(key_bytes, value_bytes)
    tokens = 128 if most <= 32 else 64 if most <= 80 else 32
    # Rows lie at powers of two, or share what they leave of one.
    row = power_of_two(key_bytes) + power_of_two(value_bytes) + 4 * scalars
    while STAGES * tokens * row > shared_bytes_of(device) // RING_PROGRAMS - RESERVED_BYTES:
        tokens //= 2
    return tokens if tokens >= 32 else 0


@cache
def shared_bytes_of(device: torch.device) -> int:
    """Shared memory of a multiprocessor."""
    if device.type != "cuda":
        return DEFAULT_SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) of other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one that it depends on ends (Hopper and later)."""
    return capability_of(device) >= (9, 0)
