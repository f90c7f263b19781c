"""Quantized products by llama.cpp's own library, called without a model.

llama.cpp keeps a weight in the layout that its CPU code multiplies fastest, if there is one for the format.
So does this. Functions are declared here as `ggml.h` and `ggml-backend.h` have them.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

REPACK = b"CPU_REPACK"  # the name of the layout above
CPU, F32 = 0, 0  # ggml's numbers of the device and of the type
TOLERANCE = 0.1  # of a product's deviation
SLACK = 16 << 20  # bytes for a graph, and to align tensors


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Plan(ctypes.Structure):
    """How a graph is computed: the fields that we need, and room for the others of any version."""

    _fields_ = (("work_size", c_size_t), ("work_data", c_void_p), ("others", c_int64 * 14))


def declared(library: str, name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
    """A function of the library that llama.cpp itself has loaded. A wheel has copies under other names, which
    would be other libraries to the system, and would not know this one's layouts."""
    [file] = (Path(llama_cpp.__file__).parent / "lib").glob(f"lib{library}.so.[0-9]")
    function = getattr(ctypes.CDLL(str(file)), name)
    function.restype, function.argtypes = result, arguments
    found: Callable[..., Any] = function
    return found


init = declared("ggml-base", "ggml_init", c_void_p, InitParams)
free = declared("ggml-base", "ggml_free", None, c_void_p)
new_tensor_2d = declared("ggml-base", "ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
mul_mat = declared("ggml-base", "ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
get_data = declared("ggml-base", "ggml_get_data", c_void_p, c_void_p)
new_graph = declared("ggml-base", "ggml_new_graph", c_void_p, c_void_p)
expand = declared("ggml-base", "ggml_build_forward_expand", None, c_void_p, c_void_p)
plan_of = declared("ggml-cpu", "ggml_graph_plan", Plan, c_void_p, c_int, c_void_p)
compute = declared("ggml-cpu", "ggml_graph_compute", c_int, c_void_p, c_void_p)
overhead = declared("ggml-base", "ggml_tensor_overhead", c_size_t)
device_of = declared("ggml", "ggml_backend_dev_by_type", c_void_p, c_int)
registry_of = declared("ggml-base", "ggml_backend_dev_backend_reg", c_void_p, c_void_p)
address_of = declared("ggml-base", "ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p)
name_of = declared("ggml-base", "ggml_backend_buft_name", c_char_p, c_void_p)
plain = declared("ggml-base", "ggml_backend_cpu_buffer_type", c_void_p)
allocate = declared("ggml-base", "ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p)
release = declared("ggml-base", "ggml_backend_buffer_free", None, c_void_p)
set_tensor = declared("ggml-base", "ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
supports = declared("ggml-base", "ggml_backend_dev_supports_op", c_bool, c_void_p, c_void_p)


class Matrices:
    """Several matrices [N, K] of one format in ggml's memory."""

    def __init__(self, kind: int, shape: tuple[int, int], data: Sequence[np.ndarray], threads: int) -> None:
        """`data` are the packed weights, as a file has them."""
        self.shape, self.threads = shape, threads
        self.device = device_of(CPU)
        for layout in [*self.reordered(), plain()]:
            self.weights, memory = self.place(kind, len(data), layout)
            if self.computable():
                break
            release(memory)
        self.layout = name_of(layout).decode()
        for weight, packed in zip(self.weights, data, strict=True):
            set_tensor(weight, packed.ctypes.data, 0, packed.nbytes)
        self.context: int | None = None

    def reordered(self) -> list[int]:
        """The layouts (buffer types) with an order of their own for this CPU."""
        address = address_of(registry_of(self.device), b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
        layouts: list[int] = []
        while found and (layout := found[len(layouts)]):
            layouts.append(layout)
        return [layout for layout in layouts if name_of(layout) == REPACK]

    def place(self, kind: int, count: int, layout: int) -> tuple[list[int], int]:
        """Uninitialized matrices, and their memory."""
        N, K = self.shape
        context = init(InitParams(overhead() * (count + 1), None, True))
        weights = [new_tensor_2d(context, kind, K, N) for _ in range(count)]
        memory = allocate(context, layout)
        if not memory:
            raise MemoryError("ggml allocates no memory for weights")
        return weights, memory

    def computable(self) -> bool:
        """Whether the CPU multiplies this format in this layout."""
        context, _ = self.product_graph(1)
        found = supports(self.device, mul_mat(context, self.weights[0], self.x))
        free(context)
        return bool(found)

    def product_graph(self, rows: int) -> tuple[int, int]:
        """A context with random rows and a graph of their product with each matrix."""
        N, K = self.shape
        size = 4 * rows * (K + N * (len(self.weights) + 1)) + SLACK
        context = init(InitParams(size, None, False))
        self.x = new_tensor_2d(context, F32, K, rows)
        values = np.random.default_rng(0).standard_normal(rows * K, np.float32)
        ctypes.memmove(get_data(self.x), values.ctypes.data, values.nbytes)
        graph = new_graph(context)
        results = [mul_mat(context, weight, self.x) for weight in self.weights]
        for result in results:
            expand(graph, result)
        self.y = results[0]
        return context, graph

    def check(self, expected: np.ndarray) -> None:
        """Compare a product with that of `expected` [n, K], the first rows of the first matrix, dequantized.

        Raises `ArithmeticError` if they differ by more than rounding to 8 bits explains.
        """
        self.products(1)()
        N, K = self.shape
        x, y = (
            np.ctypeslib.as_array(ctypes.cast(get_data(tensor), ctypes.POINTER(ctypes.c_float)), (size,))
            for tensor, size in ((self.x, K), (self.y, N))
        )
        exact = expected @ x
        if not np.abs(y[: len(exact)] - exact).max() < TOLERANCE * exact.std():
            raise ArithmeticError(f"ggml's product in {self.layout} differs from the dequantized matrix's")

    def products(self, rows: int) -> Callable[[], None]:
        """Prepare for that many rows; each call multiplies them with every matrix."""
        if self.context:
            free(self.context)
        self.context, graph = self.product_graph(rows)
        plan = plan_of(graph, self.threads, None)
        self.work = ctypes.create_string_buffer(plan.work_size)
        plan.work_data = ctypes.addressof(self.work)

        def run() -> None:
            if status := compute(graph, ctypes.addressof(plan)):
                raise ArithmeticError(f"ggml_graph_compute returned {status}")

        return run
