"""What runs on a CPU in numba: products with quantized matrices, and a token's experts.

`products` takes tensors, arranges the work and launches it. `launching` has numba's threads run the programs
of a grid, and `compiling` compiles the kernels. A kernel of `programs` walks over its rows of activations.
For each few of them, `tile` multiplies sixteen rows of a matrix, `dots` being the innermost step. `rounding`
says how activations become integers of 8 bits. Kernels are written in `lanes`, vectors of LLVM's
intermediate representation, because no compiler has to be on the machine then but the one that numba brings.

`products`, `launching` and `rounding` can be imported without numba. The others import it, and are imported
when a kernel is first needed.

**What is the same bit for bit.** A row's result depends on the row and the matrix alone. It does not depend
on the other rows, on threads, on addresses, or on the kind of processor.
"""
