"""Every kernel at the sizes of Mixtral's models, in every format, compiled for GPUs that need not be there:
none keeps numbers in memory for want of registers. `test_matrices.py` runs these tests, which take minutes,
in processes of their own.
"""

import pytest
import torch

from model.kernels import matrices
from tests.model.kernels.compiled_cases import (
    CAPABILITIES,
    STEP,
    Compiler,
    compiler,  # noqa: F401, a fixture
    compute_experts,
    make_product,
    small_kernels,
)

BITS = ("8", "4", "3", "2")  # with their default groups; then the other groups that documents recommend
MODELS = {"8x7B": (4096, 14336, 32, 32000), "8x22B": (6144, 16384, 48, 32768)}  # D, F, H, V


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("compiler", CAPABILITIES, indirect=True)
def test_every_kernel_keeps_to_registers(compiler: Compiler, model: str) -> None:  # noqa: F811
    D, ffn, H, vocab = MODELS[model]
    dtype = compiler.dtypes[0]
    for text in (*BITS, "3g128", "2g64"):
        for N, K in ((H * 128 + 2048, D), (D, H * 128), (2 * ffn, D), (D, ffn)):
            product = make_product(text, (N, K))
            for M in (1, 4):
                product(torch.empty(M, K, dtype=dtype))
            matrices.expand(product.matrix, 0, torch.empty(16, K, dtype=dtype))
        compute_experts(text, D, ffn, dtype)
    for M in (1, 4):
        make_product("8", (vocab, D))(torch.empty(M, D, dtype=dtype))
    small_kernels(dtype, 64, D, H)
    compiler.check("multiply_one", "multiply_few", "expand", "gate_up", "down", *STEP)
