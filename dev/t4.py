"""What a T4 should take for a token of Mixtral-8x7B: arithmetic from the compiled kernels, not a measurement.

    python -m dev.t4

It needs Triton and no GPU. Each kernel is compiled for compute capability 7.5, and its instructions are
counted. A kernel takes the longer of two times: its bytes over the memory's bandwidth, and its instructions
over the rate at which a T4 issues them. Nothing is said of latency, so real times are longer. Misses are
added to that as if nothing were copied while the device computes.
"""

import argparse
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.kernels import experts, launching, matrices
from model.kernels.experts import BlobLayout, experts_by_slot
from model.kernels.matrices import PackedMatrix
from model.quant.formats import Formats
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields
from model.shapes import SHAPES
from model.target import TURING, Target
from runtime.options import EngineOptions
from runtime.planning.planner import make_plan
from runtime.planning.request import Request

MEMORY = 320e9  # bytes a second
ISSUE = 40 * 4 * 1.59e9  # warps' instructions a second: multiprocessors, schedulers, clock
LINKS = (12e9, 6e9)  # bytes a second: PCIe 3.0 x16 in practice, and half of that
LRU = {2: 0.34, 3: 0.47, 4: 0.59}  # hits by slots of a layer, as arXiv 2312.17238 measured them
CONFIG = SHAPES["mixtral-8x7b"]
POINTERS = {torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32", torch.float16: "*fp16"}


class Counter:
    """In place of `launch`: compiles the kernel and counts the instructions of all its warps."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}  # by kernel

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *tensors: Tensor, num_warps: int, **values: int
    ) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        name = kernel.fn.__name__
        values["INTERPRETED"] = False
        kinds = [POINTERS[t.dtype] for t in tensors] + ["constexpr"] * len(values)
        signature = dict(zip(kernel.arg_names, kinds, strict=True))
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(tensors))}
        source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        code = compile(source, target=GPUTarget("cuda", 75, 32), options=options).asm["cubin"]
        K = values["F"] if name == "down" else CONFIG.hidden
        rounds = values.get("A", 1), -(-K // (values["PIECE"] * values["PIECES"]))
        self.counts[name] = executed(disassembled(code), rounds) * num_warps * math.prod(grid)


def disassembled(code: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        done = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def executed(text: str, rounds: tuple[int, int]) -> int:
    """Instructions that a warp executes. The longest loop is taken `rounds[0]` times, the longest one in it
    `rounds[1]` times. Shorter ones are the end of a program, which waits."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)([^;]*);", text)
    jumps = [(int(at, 16), re.search(r"0x([0-9a-f]+)", rest)) for at, op, rest in lines if op == "BRA"]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    loops.sort(key=lambda loop: loop[0] - loop[1])
    total, entered = len(lines), 1
    for (start, end), times in zip(loops, rounds, strict=False):
        total += entered * (times - 1) * ((end - start) // 16 + 1)  # an instruction has 16 bytes
        entered *= times
    return total


def count(experts_format: str) -> list[tuple[str, int, float, float]]:
    """A layer's matrices and the head: name, launches a token, bytes and instructions of a launch."""
    c, counter, rows = CONFIG, Counter(), []
    matrices.launch = experts.launch = counter  # type: ignore[assignment]
    launching.capability_of = lambda device: TURING  # type: ignore[assignment]
    qkv, D = (c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden
    for name, bits, shape, launches in (
        ("qkv", 4, (qkv, D), c.layers),
        ("o", 4, (D, c.heads * c.head_dim), c.layers),
        ("head", 8, (c.vocab, D), 1),
    ):
        spec = QuantSpec(bits)
        size = matrix_fields("", shape, spec)[-1].end
        matrix = PackedMatrix(torch.empty(size, dtype=torch.uint8), spec, shape)
        matrices.multiply_one(torch.empty(1, shape[1], dtype=torch.float16), matrix)
        rows.append((name, launches, float(size), counter.counts["multiply_one"]))
    layout = BlobLayout(QuantSpec.parse(experts_format), D, c.ffn)
    w2 = layout.w2_offset(torch.float16)
    end = matrix_fields("w2", (D, c.ffn), layout.spec, w2, torch.float16)[-1].end
    slots, weights = torch.zeros(c.experts_per_token, dtype=torch.int32), torch.ones(c.experts_per_token)
    pool = torch.empty(1, end, dtype=torch.uint8)
    experts_by_slot(torch.empty(1, D, dtype=torch.float16), pool, slots, weights, layout)
    A = c.experts_per_token
    rows.append(("w1 and w3", c.layers, float(A * w2), counter.counts["gate_up"]))
    rows.append(("w2", c.layers, float(A * (end - w2)), counter.counts["down"]))
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    c = CONFIG
    for text in ("2", "2g64", "3g128"):
        computing = 0.0
        print(f"\nexperts {text}: matrix, bytes and warps' instructions a token, ms by memory, ms by issue")
        for name, launches, size, instructions in count(text):
            times = [1000 * launches * x for x in (size / MEMORY, instructions / ISSUE)]
            computing += max(times)
            print(
                f"{name:9}  {launches * size / 1e9:5.2f} GB  {launches * instructions / 1e6:6.1f} M  "
                f"{times[0]:5.2f}  {times[1]:5.2f}"
            )
        formats = Formats(QuantSpec(4), QuantSpec.parse(text), QuantSpec(8))
        options = EngineOptions(device="cuda", vram="15GiB", ram="11GiB")
        request = Request.make(c, formats, options, Target.hypothetical(TURING), files=torch.bfloat16)
        plan = make_plan(request)
        used, all_experts = c.layers * c.experts_per_token, c.layers * c.experts
        share = sum(plan.slots_per_layer) / all_experts  # hits if all experts were equally likely
        missed = (1 - share) * used
        print(
            f"computing {computing:.1f} ms; {sum(plan.slots_per_layer)} slots, {plan.berths} berths, "
            f"{plan.file_experts} experts left to files; "
            f"{missed:.1f} misses of {plan.blob_bytes / 1e6:.1f} MB a token"
        )
        for slots, hits in [*LRU.items(), (share * c.experts, share)]:
            misses = [(1 - hits) * used * plan.blob_bytes / link * 1000 for link in LINKS]
            rates = ", ".join(f"{ms:.0f} ms: {1000 / (computing + ms):.1f} tokens/s" for ms in misses)
            print(f"  {slots:.1f} slots a layer, hits {hits:.2f}: {rates}")


if __name__ == "__main__":
    main()
