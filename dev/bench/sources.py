"""What `tools.quantize` takes of memory, disk and time for a model of each kind that it converts.

Each model is random, and its matrices have the sizes of Mixtral-8x7B's. Every run is a process of its own.
`hub` is a 16-bit model in shards, which a small hub on this machine serves.
`source_gb` and `largest_gb` are all of the source's files and the largest one, `out_gb` the output.
`memory_mb` is the most that the process had resident, libraries included, and `disk_gb` the most that the
output's folder took at any moment. `weights_per_second` counts all weights, read, turned back and quantized.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from dev.bench.random_sources import WRITERS
from dev.loopback_hub import LoopbackHub
from model.checkpoint.names import HF, stored_tensors
from model.shapes import MIXTRAL_8X7B
from runtime.engine import DEMO
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say

HUB = "hub"
LAYERS = {"HF": 1, "GGUF": 3, "hqq": 3, "mixtral-offloading": 3, HUB: 2}  # which take 2 GB or more
NAME = "org/model"
EVERY = 0.05  # seconds between two looks at the output's folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=LAYERS, help="(default: all)")
    parser.add_argument("--folder", type=Path, help="for models of 2 to 4 GB (default: the temporary one)")
    parser.add_argument("--attention", default="4", help="(default: 4)")
    parser.add_argument("--experts", default="3g128", help="(default: 3g128)")
    parser.add_argument("--threads", type=at_least_one, default=2, help="(default: 2)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line for each kind on stderr. Returns all figures."""
    rows = {}
    for kind in args.only or LAYERS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows[kind] = measure(kind, Path(folder), args)
            say(f"{kind}: {rows[kind]}")
    return {"sources": rows}


def measure(kind: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    config = dataclasses.replace(MIXTRAL_8X7B, layers=LAYERS[kind])
    source, out = WRITERS[kind](config, folder / "source"), folder / "out"
    sizes = [path.stat().st_size for path in (folder / "source").iterdir()]
    with LoopbackHub() as hub:
        hub.add(NAME, folder / "source")
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache")}
        found = quantize(NAME if kind == HUB else str(source), out, args, environment)
    weights = sum(math.prod(stored.shape) for stored in stored_tensors(HF, config).values())
    return {
        "source_gb": sum(sizes) / 1e9,
        "largest_gb": max(sizes) / 1e9,
        "out_gb": taken(out) / 1e9,
        **found,
        "weights_per_second": weights / found["seconds"],
    }


def quantize(
    source: str, out: Path, args: argparse.Namespace, environment: dict[str, str]
) -> dict[str, float]:
    """Run the command. Returns what it took."""
    command = [sys.executable, "-m", "tools.quantize", source, str(out), "--quiet"]
    command += ["--tokenizer", str(DEMO)]
    command += ["--attention", args.attention, "--experts", args.experts, "--threads", str(args.threads)]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    most, ended = [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(out, most, ended))
    watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - began
    ended.set()
    watcher.join()
    if status:
        raise subprocess.CalledProcessError(status, command)
    return {"memory_mb": usage.ru_maxrss / 1000 * 1.024, "disk_gb": most[0] / 1e9, "seconds": seconds}


def watch(folder: Path, most: list[int], ended: threading.Event) -> None:
    """Keep in `most` the most bytes that the folder has had."""
    while not ended.wait(EVERY):
        most[0] = max(most[0], taken(folder))


def taken(folder: Path) -> int:
    """The bytes on the disk of all files below a folder, which another process may be changing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total
