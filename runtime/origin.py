"""What a text's keys and values depend on besides the text. Others cannot go on with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from model.errors import quoted
from model.kv_cache import KVCache
from runtime.errors import RequestError
from runtime.runner import ModelRunner


@dataclass(frozen=True)
class Origin:
    """A model, what it computes in, and how its KV caches keep it."""

    model: str  # its name, for messages
    digest: str  # of `model.checkpoint.identity`
    dtype: str
    kv: str  # bits: 8 for codes, 16 for `dtype`

    @staticmethod
    def of(runner: ModelRunner, kv: KVCache) -> "Origin":
        codes = kv.layers[0].k.dtype == torch.int8
        dtype = str(runner.dtype).removeprefix("torch.")
        return Origin(runner.identity.name, runner.identity.digest, dtype, "8" if codes else "16")

    def metadata(self) -> dict[str, str]:
        """A file's, by which `check` knows it."""
        return {"model": self.model, "model_sha256": self.digest, "dtype": self.dtype, "kv": self.kv}

    def check(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Raises `RequestError`, which names both sides and the remedy, unless a file is of this origin."""
        model, dtype, kv = (metadata.get(name) for name in ("model", "dtype", "kv"))
        if metadata.get("model_sha256") != self.digest:
            other = "another model of that name" if model == self.model else quoted(self.model)
            raise RequestError(
                f"{path}: a conversation with the model {quoted(model)}, and this is {other}; "
                "load the model that it was saved with, or begin a new conversation"
            )
        if dtype != self.dtype:
            raise RequestError(
                f"{path}: its keys and values are {quoted(dtype)}, and this engine computes in {self.dtype}; "
                f"load the model with --dtype {quoted(dtype)[1:-1]}"
            )
        if kv != self.kv:
            raise RequestError(
                f"{path}: its keys and values have {quoted(kv)} bits, and this engine keeps {self.kv}; "
                f"load the model with --kv {quoted(kv)[1:-1]}"
            )
