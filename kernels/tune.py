"""Block sizes, warps and splits: every number of the kernels that decides speed and nothing else."""

from dataclasses import dataclass
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
APPEND_REGISTERS = 128
# Programs that a multiprocessor holds at once, and splits that one step of the combination reads.
PROGRAMS_PER_PROCESSOR = 2
COMBINE_SPLITS = 16
# What the interpreter plans for, where there is no device to ask.
DEFAULT_PROCESSORS = 4


@dataclass(frozen=True)
class AttendPlan:
    """How one call is cut: rows and tokens of a tile, splits of `span` tokens, warps, registers a thread may take."""

    block_rows: int
    block_tokens: int
    splits: int
    span: int
    warps: int
    registers: int


def extent(head_dim: int) -> int:
    """The extent of a tile that covers a vector; a matrix product wants at least 16."""
    return max(16, power_of_two(head_dim))


@lru_cache(maxsize=4096)
def attend_plan(
    rows: int,
    heads: int,
    length: int,
    head_dim: int,
    float32: bool,
    device: torch.device,
    processors: int | None = None,
) -> AttendPlan:
    """The plan for `rows` query rows on each of `heads` KV heads over `length` tokens."""
    block_rows, block_tokens, warps, registers = ATTEND[16 if rows <= 16 else 64, float32]
    if head_dim > 128:
        block_tokens, warps, registers = max(16, block_tokens // 2), 8, 255
    wanted = (processors or processors_of(device)) * PROGRAMS_PER_PROCESSOR
    blocks = -(-length // block_tokens)
    splits = max(1, min(blocks, wanted // (heads * -(-rows // block_rows))))
    span = -(-blocks // splits) * block_tokens
    return AttendPlan(block_rows, block_tokens, -(-length // span), span, warps, registers)


def append_plan(tokens: int, head_dim: int) -> tuple[int, int]:
    """Tokens of a program, and its warps."""
    block = min(power_of_two(tokens), max(1, 2048 // extent(head_dim)))
    return block, 4 if block * extent(head_dim) >= 512 else 1


@cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
