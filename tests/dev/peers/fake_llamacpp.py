"""Stands in for llama.cpp's side: it answers at once, prints where libraries print, and can fail."""

import os
import time
from pathlib import Path
from typing import Any

from dev.peers.llamacpp.serving import serve


class Fake:
    def check(self) -> None:
        print("a library's own words")

    def write(self, path: str, shape: dict[str, Any], quant: str, trunk: str, head: str) -> None:
        if quant == "q2_k":
            raise ValueError("no such\nquant")
        Path(path).write_bytes(bytes(shape["layers"] * 1000))

    def load(self, path: str, threads: int, context: int, repack: bool = True) -> None:
        assert Path(path).is_file() and context >= 8

    def describe(self, path: str) -> dict[str, Any]:
        return {"version": "0", "bytes_per_token": 500}

    def prompt(self, tokens: int) -> None:
        time.sleep(tokens * 1e-4)

    def decode(self, tokens: int) -> None:
        time.sleep(tokens * 1e-3)

    def prepare(self, quant: str, **sizes: int) -> dict[str, Any]:
        return {"kind": "FAKE", "bytes": sizes["outputs"] * sizes["inputs"] // 2}

    def batch(self, rows: int) -> None:
        if rows == 13:
            os._exit(3)

    def product(self) -> None:
        time.sleep(1e-3)


if __name__ == "__main__":
    serve(Fake())
