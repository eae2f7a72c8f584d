"""Compile the kernels for Hopper without a GPU, and look for what Triton's assembler did wrong.

    python tests/precondition/kernels/machine_code.py '[[40, 20, 300, true, false]]'

takes (head size, value size, length, Hopper's own kernels or the portable ones, which of the former's two
schedules, for head sizes up to 64: late or not, the precision, and for Hopper whether as for few blocks, for more of few chains or
for many), or "decode" and `compile_decode`'s arguments, and prints, for each
kernel, the products whose operand descriptors come from kernel arguments, whether the assembler gave
up on running products beside other work, how long its code is, and how many halves are moved to or from memory one by one. A program of its own: Triton's driver is one to a process.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

TOOLS = Path(nvidia.__file__).parent / "bin"
COMPILED: list[Any] = []
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?(\S+)\s*(.*?);")


LAUNCHED: list[tuple[str, tuple[Any, ...]]] = []


def note(kernel: str, *args: Any) -> None:
    LAUNCHED.append((kernel, args))


class Launcher:
    """Notes what a launch would be given, in the place of the function in C; see `nvidia.CudaLauncher`."""

    launch_cooperative_grid = launch_pdl = False
    global_scratch_size = profile_scratch_size = 0

    def __init__(self, source: Any, metadata: Any) -> None:
        meta = getattr(metadata, "tensordesc_meta", None)
        launcher = functools.partial(note, source.name)  # like a function in C, it has no code
        self.launch = nvidia.wrap_handle_tensordesc(launcher, dict(source.signature.items()), meta)

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *args: Any) -> None:
        self.launch(x, y, z, stream, function, False, False, None, None, *args)


class Utilities:
    """What Triton asks its CUDA module for."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 0, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def fill_tma_descriptor(self, *_: Any) -> object:
        return object()


class Card:
    """As much of an H200 as compiling asks for."""

    launcher_cls = Launcher
    utils = Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def machine_code(binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def serialised(ptx: str) -> bool:
    """Whether the assembler runs the kernel's products one by one, for want of registers."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(TOOLS / "ptxas"), "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return "serialized" in done.stderr


def spoiled(code: str, *, copies_only: bool) -> list[str]:
    """Products that read an operand descriptor which a kernel argument has gone into.

    From top to bottom, the last write to a register counts. A descriptor is an address in shared memory and
    constants. ``copies_only``: arithmetic on an argument is in order (Hopper's own kernels number their
    buffers by how many blocks there are), the argument itself is not.
    """
    holds: dict[str, bool] = {}
    found = []
    for operation, text in _instructions(code):
        if operation.startswith("HGMMA"):
            if "gdesc[URZ]" in text:  # of nothing: the assembler's end of a group of products
                continue
            first = int(re.search(r"gdesc\[UR(\d+)\]", text)[1])  # type: ignore[index]
            # With the left operand in registers only the second descriptor is read.
            skip = 2 if re.match(r"R\d+, R\d+, gdesc", text) else 0
            if any(holds.get(f"UR{first + k}") for k in range(skip, 4)):
                found.append(f"{operation} {text}")
            continue
        target, _, sources = text.partition(",")
        wide = 2 if ".64" in operation or ".WIDE" in operation else 4 if ".128" in operation else 1
        spilled = re.search(r"\[R1(?:\+(0x[0-9a-f]+))?\]", text)
        if operation.startswith("STL") and spilled:
            source = int(re.search(r"R(\d+)", sources)[1]) if "RZ" not in sources else -1  # type: ignore[index]
            for k in range(wide):
                holds[f"stack {int(spilled[1] or '0', 16) + 4 * k}"] = holds.get(
                    f"R{source + k}", False
                )
            continue
        into = re.match(r"(U?R)(\d+)", target)
        if into is None or operation.startswith(("ST", "RED", "UTMA", "SYNCS")):
            continue
        tainted = "c[0x0]" in sources or any(
            holds.get(name) for name in re.findall(r"\bU?R\d+\b", sources)
        )
        if operation.startswith(("LDG", "LDS", "S2", "ATOM")):
            tainted = False
        if copies_only and not operation.startswith(("ULDC", "UMOV", "MOV", "R2UR", "LDC")):
            tainted = False
        for k in range(wide):
            if operation.startswith("LDL") and spilled:
                tainted = holds.get(f"stack {int(spilled[1] or '0', 16) + 4 * k}", False)
            holds[f"{into[1]}{int(into[2]) + k}"] = tainted
    return found


def _instructions(code: str) -> Iterator[tuple[str, str]]:
    for line in code.splitlines():
        match = INSTRUCTION.match(line)
        if match:
            yield match[1], match[2]


def compile_all(
    width: int, value_width: int, seq: int, hopper: bool, late: bool, precision: str = "default",
    blocks: str = "many",
) -> None:  # fmt: skip
    """Every kernel of a call with a strength, forward and backward, and of one with a past."""
    from lucid_attention.precondition.kernels import family, launch, plan

    adjoint: Any = importlib.import_module("lucid_attention.precondition.kernels.hopper_adjoint")
    adjoint.LATE_FROM = 0 if late else 1 << 30
    plan._calls.clear()
    # See `plan`: of few blocks, or of more of few chains, steps are made short.
    plan.FEW_BLOCKS = 128 if blocks == "few" else 0
    plan.LINKED_BLOCKS = 0 if blocks == "many" else 512

    family.has_hopper_kernels = lambda device: hopper  # type: ignore[assignment]
    key = torch.zeros(1, 2, seq, width, dtype=torch.bfloat16)
    value = torch.zeros(1, 2, seq, value_width, dtype=torch.bfloat16)
    strength = torch.ones(2)
    for more in (None, strength):
        rest = (more, None, None, None, width**-0.5)
        launch.solve_dense(key, value, *rest, precision=precision)
        launch.adjoint_dense(value, key, value, *rest, precision)
    if not hopper:
        before = (key[:, :, :100], value[:, :, :100].float())
        launch.solve_dense(key, value, strength, None, *before, width**-0.5)
        launch.adjoint_dense(value, key, value, strength, None, *before, width**-0.5)


def compile_decode(
    width: int, value_width: int, group: int, tokens: int, page: int, ragged: bool, hopper: bool
) -> None:
    """The decode kernel of one call, with everything optional."""
    from lucid_attention.decode import launch

    launch.multiprocessors = launch.slots = lambda device: 132  # type: ignore[assignment]
    launch.memory_rate = lambda device: 3350.0  # type: ignore[assignment]
    serves = importlib.import_module("lucid_attention.decode.hopper").serves
    launch.is_hoppers = lambda *caches: hopper and serves(*caches)
    batch, heads, rows = 3, 2, 1024
    new = [
        torch.zeros(batch, n, tokens, width, dtype=torch.bfloat16) for n in (heads * group, heads)
    ]
    value = torch.zeros(batch, heads, tokens, value_width, dtype=torch.bfloat16)
    size = (40, heads, page) if page else (batch, heads, rows)
    table = torch.zeros(batch, rows // page, dtype=torch.int32) if page else None
    launch.decode(
        *new, value, torch.zeros(*size, width, dtype=torch.bfloat16),
        torch.zeros(*size, value_width, dtype=torch.float16),
        torch.zeros(batch if ragged else 1, dtype=torch.int32), torch.ones(batch, heads),
        torch.ones(batch, rows, dtype=torch.bool), table, torch.ones(heads), torch.ones(heads * group),
        0.1, 0.1, 0.0, torch.zeros(1000, dtype=torch.int32), interpreted=False,
    )  # fmt: skip


def known_bad() -> None:
    """A build that Triton 3.6's assembler spoils: pieces that `plan.pieces` avoids since."""
    from lucid_attention.precondition.kernels.solve import solve_kernel

    def half(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float16)

    number = torch.zeros(1, dtype=torch.int32)
    value = torch.zeros(128, 80, dtype=torch.bfloat16)
    solve_kernel[1,](
        half(128, 32), None, half(3, 64, 64), value, half(128, 80), value,
        None, None, None, number, number, number, number, 0, 0, 80, 0, 0, 80,
        1, 1, 1, 128, 80, 3, 0.5, 0.5, 1.0,
        R=128, M=128, STAGES=2, PACKED=False, SHIFT=15, INTERPRET=False,
        D1=32, D2=0, E1=64, E2=16, CENTRED=False, PRECISION="tf32", num_warps=4,
    )  # fmt: skip


def main() -> None:
    driver.set_active(Card())  # type: ignore[no-untyped-call]
    keep = triton.compiler.CompiledKernel._init_handles

    def record(self: Any) -> None:
        if self.module is None:
            COMPILED.append(self)
        keep(self)

    triton.compiler.CompiledKernel._init_handles = record
    for name in ("hopper_solve", "hopper_adjoint"):
        module: Any = importlib.import_module(f"lucid_attention.precondition.kernels.{name}")
        module.multiprocessors = lambda device: 132
    report = []
    for job in json.loads(sys.argv[1]):
        COMPILED.clear()
        if job == "known bad":
            known_bad()
        elif job[0] == "decode":
            compile_decode(*job[1:])
        else:
            compile_all(*job)
        for kernel in COMPILED:
            own = kernel.name.startswith("hopper")
            code = machine_code(kernel.kernel)
            report.append(
                {
                    "job": job,
                    "kernel": kernel.name,
                    "products": code.count("HGMMA"),
                    "bytes": 16 * sum(1 for _ in _instructions(code)),
                    "spoiled": spoiled(code, copies_only=own),
                    "serialised": own and serialised(kernel.asm["ptx"]),
                    "single": len(re.findall(r"(?:ld|st)\.global\S*\.b16", kernel.asm["ptx"])),
                }
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
