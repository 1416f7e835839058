"""Triton kernels as machine code for GPUs that are not here: registers, and bytes that do not fit in them.

python tests/cubins.py     prints a row for each kernel of `CASES`: name, capability, registers, bytes spilled
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HALF = ("q", "k", "v", "y", "d_y", "d_q", "d_k", "d_v")
POINTERS = {*HALF, *"sums z values top d_sums d_z bias num den phi_q phi_k d_num d_den d_log_c".split()}
POINTERS |= {"table", "places", "basis", "d_planes"}
NUMBERS = ("eps", "q_eps", "k_eps", "norm")


def sizes(exp: bool, d: int, m: int, turn: bool = False, basis: bool = False) -> dict:
    found = {"EXP": exp, "PROJECTED": exp, "TURN": turn, "BASIS": basis, "LEARNS": turn, "D": d, "DV": d, "M": m}
    return found | {"BLOCK": 16, "num_warps": 8 if max(d, m) > 64 else 4}


LINEAR = ("forward", "forward_sums", "forward_averages", "backward_queries", "backward_keys")
MASKED, LARGEST = ({"M": n, "DV": n, "BLOCK": block, "num_warps": 4} for n, block in ((64, 32), (128, 16)))
CASES = [
    ("linear.backward", "relu", sizes(False, 32, 32), 90),
    *[("linear.backward", "favor_circulant", sizes(True, 32, 64, True, True), each) for each in (80, 90, 100)],
    ("linear.backward", "favor_rope, D = 64", sizes(True, 64, 64, True), 80),
    ("linear.backward", "relu, D = 128", sizes(False, 128, 128), 80),
    ("linear.backward", "favor_rope, D = 64, m = 128", sizes(True, 64, 128, True), 90),
    ("masked.key_slopes", "general", MASKED, 80),
    ("masked.key_slopes", "general, m = 128", LARGEST, 80),
    ("masked.pair_slopes", "general, m = 128", LARGEST | {"num_warps": 8}, 80),
    *[(f"linear.{name}", "favor_circulant", sizes(True, 32, 64, True, True), 90) for name in LINEAR],
    *[(f"masked.{name}", "general", MASKED, 90) for name in ("forward", "query_slopes")],
]
"""Each kernel, and those that need the most registers at more sizes and for more GPUs."""


def compiled(kernel, constants: dict, capability: int, half: tuple[str, ...]):
    """A kernel for pointers to bfloat16 where `half` names them, else float32; strides are multiples of 16, as torch's
    are at usual head sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes, pointers = {}, {}, POINTERS | ({"w"} if "PROJECTED" in constants else set())
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*bf16" if name in half else "*fp32"
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
        if name in pointers or re.search(r"_(image|head|row)$", name):
            attributes[(place,)] = [["tt.divisibility", 16]]
    fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source, options = ASTSource(kernel, signature, fixed, attributes), {"num_warps": constants["num_warps"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that are spilled, as NVIDIA's assembler reports them."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={target}", source, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return int(re.search(r"Used (\d+) registers", said)[1]), spilled


def report(case: tuple) -> list:
    """A case's row."""
    from erpe.model.kernels.gpu import linear, masked

    name, what, constants, capability = case
    module, _, function = name.partition(".")
    kernels, half = {"linear": (linear, HALF), "masked": (masked, ())}[module]  # masked_attention makes all float32
    kernel = compiled(getattr(kernels, function), constants, capability, half)
    return [name, what, capability, *resources(kernel.asm["ptx"], capability), kernel.metadata.shared]


if __name__ == "__main__":
    assert not os.environ.get("TRITON_INTERPRET"), "the interpreter has nothing to compile"
    chosen = [case for case in CASES if not sys.argv[1:] or sys.argv[1] in case[0]]
    with ThreadPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(report, chosen))))
