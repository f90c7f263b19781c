"""What runs on a GPU in Triton: a token's small kernels (`step`), quantized matrices (`matrices`), and a
token's experts (`experts`). `cpu` has what runs on a CPU in numba.

The files `..._kernels.py` hold Triton's code. The functions beside them check shapes, pick tiles and launch.
They import Triton when they are first called: a CPU has no use for it, and importing it takes long.

**What is the same bit for bit.** A result depends on the input, the shapes, the kind of GPU and Triton's
version alone. It does not depend on time, on addresses, on the slot that holds an expert, or on the capacity
of the KV cache. Tiles are picked by arithmetic: picking them by timing would make results depend on it.
"""
