"""Our side: the engine without tokenizer and sampler, and single quantized products. Ids are random."""

import warnings
from pathlib import Path
from typing import Any

import torch

from dev.bench.random_checkpoint import random_native
from dev.peers.llamacpp.serving import serve
from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.errors import ModelError
from model.quant.formats import Formats
from model.quant.product import QuantizedLinear
from model.quant.spec import QuantSpec
from runtime.engine import Engine
from runtime.options import EngineOptions
from tools.bench.decode import bytes_per_token
from tools.bench.random_model import random_matrix

CPU = torch.device("cpu")


class Ours:
    def write(self, folder: str, shape: dict[str, Any], formats: dict[str, str]) -> None:
        """Make a native checkpoint of random weights, unless this program can read the one that is there."""
        try:
            open_checkpoint(Path(folder))
        except ModelError:
            specs = {kind: QuantSpec.parse(text) for kind, text in formats.items()}
            random_native(ModelConfig(**shape), Path(folder), Formats(**specs))

    def load(self, path: str, **options: Any) -> dict[str, Any]:
        warnings.filterwarnings("ignore", ".*the tokenizer lacks")  # it is the demo's
        self.engine = Engine.load(path, EngineOptions(device="cpu", **options))
        self.kv = self.engine.runner.take_kv()
        self.generator = torch.Generator().manual_seed(0)
        plan = self.engine.plan
        return {"planned": plan.device_bytes + plan.arena_bytes}

    def describe(self) -> dict[str, Any]:
        dtype = str(self.engine.dtype).removeprefix("torch.")
        return {"dtype": dtype, "bytes_per_token": bytes_per_token(self.engine.model)}

    def prompt(self, tokens: int) -> None:
        """Compute a prompt from an empty KV cache."""
        self.kv.truncate(0)
        self.forward(self.random_ids(tokens))

    def decode(self, tokens: int) -> None:
        """Add one token after the other."""
        for i in self.random_ids(tokens):
            self.forward([i])

    def random_ids(self, count: int) -> list[int]:
        ids: list[int] = torch.randint(self.engine.config.vocab, (count,), generator=self.generator).tolist()
        return ids

    def forward(self, ids: list[int]) -> None:
        runner = self.engine.runner
        with runner.working():
            logits = runner.forward(ids, self.kv)
        if not logits.max().isfinite():  # ids that no token has are at minus infinity
            raise ArithmeticError("logits are not finite")

    def prepare(self, format: str, outputs: int, inputs: int, copies: int, threads: int) -> dict[str, Any]:
        """Make quantized matrices for `product`."""
        torch.set_num_threads(threads)
        self.matrices, generator = [], torch.Generator().manual_seed(0)
        spec = QuantSpec.parse(format)
        for _ in range(copies):
            linear = QuantizedLinear(inputs, outputs, spec, torch.bfloat16, CPU)
            linear.store(random_matrix(spec, (outputs, inputs), generator))
            self.matrices.append(linear)
        memory = self.matrices[0].memory
        return {"kind": linear.backend.__name__, "bytes": sum(t.nbytes for t in memory.values())}

    def batch(self, rows: int) -> None:
        """Make random rows for `product`."""
        self.x = torch.randn(rows, self.matrices[0].shape[1], dtype=torch.bfloat16)

    @torch.inference_mode()
    def product(self) -> None:
        """Multiply the rows with every matrix."""
        for matrix in self.matrices:
            matrix(self.x)


if __name__ == "__main__":
    serve(Ours())
