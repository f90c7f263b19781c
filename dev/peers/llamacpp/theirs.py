"""llama.cpp's side, run in an environment with llama-cpp-python and gguf. Ids are random.

It calls llama.cpp's C functions, so that no tokenizer, sampler or Python class takes time.
"""

import ctypes
import random
import sys
from typing import Any

from dev.peers.llamacpp.serving import serve

try:
    import llama_cpp as lib
    import numpy as np

    from dev.peers.llamacpp import ggml, gguf_model
except ImportError as error:
    sys.exit(f"error: {error}")

BATCH = 512  # tokens of a prompt at once, as llama.cpp's own programs have by default


@lib.llama_log_callback
def quiet(level: int, text: bytes, data: object) -> None:
    """Print nothing."""


class Theirs:
    def check(self) -> None:
        """Nothing: that this process answers says that its libraries are there."""

    def write(self, path: str, shape: dict[str, Any], quant: str, trunk: str, head: str) -> None:
        """Make a GGUF file of random weights."""
        gguf_model.write(path, shape, quant, trunk, head)

    def load(self, path: str, threads: int, context: int, map: bool = True, repack: bool = True) -> None:
        """`repack` has llama.cpp reorder weights for this CPU, as it does by default. That copies them into
        memory of its own, even where the file is mapped."""
        model_params, params = lib.llama_model_default_params(), lib.llama_context_default_params()
        model_params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if map else lib.LLAMA_LOAD_MODE_NONE
        model_params.use_extra_bufts = repack
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        self.model = lib.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise OSError(f"{path}: llama.cpp does not load it")
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise MemoryError(f"llama.cpp makes no context of {context} tokens")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.random = random.Random(0)

    def describe(self, path: str) -> dict[str, Any]:
        return {"version": lib.__version__, "bytes_per_token": gguf_model.bytes_per_token(path)}

    def prompt(self, tokens: int) -> None:
        """Compute a prompt from an empty KV cache."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        ids = self.random_ids(tokens)
        for start in range(0, tokens, BATCH):
            self.forward(ids[start : start + BATCH])

    def decode(self, tokens: int) -> None:
        """Add one token after the other."""
        for i in self.random_ids(tokens):
            self.forward([i])

    def random_ids(self, count: int) -> list[int]:
        return [self.random.randrange(self.vocab) for _ in range(count)]

    def forward(self, ids: list[int]) -> None:
        tokens = (lib.llama_token * len(ids))(*ids)  # which the batch only points to
        if status := lib.llama_decode(self.context, lib.llama_batch_get_one(tokens, len(ids))):
            raise ArithmeticError(f"llama_decode returned {status}")
        logits = lib.llama_get_logits_ith(self.context, -1)  # waits for them
        if not np.isfinite(np.ctypeslib.as_array(logits, (self.vocab,)).max()):
            raise ArithmeticError("logits are not finite")

    def prepare(self, quant: str, outputs: int, inputs: int, copies: int, threads: int) -> dict[str, Any]:
        """Make quantized matrices for `product`."""
        data = [gguf_model.random_matrix(quant, outputs, inputs, seed) for seed in range(copies)]
        kind = gguf_model.kind_of(quant)
        self.matrices = ggml.Matrices(kind, (outputs, inputs), data, threads)
        self.matrices.check(gguf_model.dequantize(data[0][:64], kind))
        return {"kind": self.matrices.layout, "bytes": data[0].nbytes}

    def batch(self, rows: int) -> None:
        """Make random rows for `product`."""
        self.products = self.matrices.products(rows)

    def product(self) -> None:
        """Multiply the rows with every matrix."""
        self.products()


if __name__ == "__main__":
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    serve(Theirs())
