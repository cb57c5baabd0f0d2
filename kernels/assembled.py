"""Compiles one kernel ahead of time, with no device, and reads what the assembler says of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
ALIGNED = re.compile(r".*_(b|h|s|t)$")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers a thread, bytes of spills a thread, bytes of shared memory.

    `instructions` are those of its loop for each number of a tile that a thread has, where somebody counted those.
    """

    kernel: str
    capability: int
    registers: int
    spills: int
    shared: int
    instructions: float | None = None


def compiled(label, kernel, pointers, constants, types, warps, limit, capability, make=ASTSource, numbers=0) -> Usage:
    """Compile for a capability and read the usage that the assembler reports; `numbers` a thread has of a tile."""
    names = list(kernel.arg_names)
    signature = {}
    for name in names:
        kind = "*fp32" if name in ("out", "peaks", "totals", "edges", "table") else "i32"
        kind = POINTERS[pointers[name]] if name in pointers else types.get(name, kind)
        signature[name] = "constexpr" if name in constants else kind
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and ALIGNED.match(name) and "mask" not in name)
    }
    source = make(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": 1, "maxnreg": limit}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = resources(binary.asm["cubin"])
    each = loop_length(binary.asm["cubin"]) / numbers if numbers else None
    return Usage(label, capability, registers, spills, binary.metadata.shared, each)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread of a cubin takes."""
    text = _said_of(cubin, "cuobjdump", "-res-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def loop_length(cubin: bytes) -> int:
    """Instructions of the longest loop of a cubin; 0 where it has none."""
    labels, count, longest = {}, 0, 0
    for line in _said_of(cubin, "nvdisasm", "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            count += 1
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            longest = max(longest, count - labels.get(target[1], count) if target else 0)
    return longest


def _said_of(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
