"""The files under attack: one tiny Mixtral in every form that the program reads."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.names import MISTRAL, StoredTensor, stored_tensors
from model.checkpoint.save import write_hf
from model.checkpoint.writer import TensorSpec, Writer
from model.config import ModelConfig
from runtime import EngineOptions
from runtime.engine import DEMO
from tools.quantize import command as quantize

CONFIG = ModelConfig(
    vocab=2048, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=64, experts=4, experts_per_token=2,
    context=256, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip
FORMATS = ("--attention", "4g64", "--experts", "2g32", "--head", "8")
RESIDENT = EngineOptions(device="cpu", dtype="float32", offload="never")
OFFLOADED = EngineOptions(device="cpu", dtype="float32", offload="always", slots=2, prefetch=2)


class Subject:
    """Checkpoints in `folder`, where parts have their working folders too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hf, self.sharded = folder / "hf", folder / "sharded"
        self.mistral, self.native = folder / "mistral", folder / "native"
        self.layouts = self.hf, self.mistral, self.native

    def work(self, name: str) -> Path:
        """An empty folder to work in."""
        folder = self.folder / "work" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def copy(self, source: Path, name: str) -> Path:
        """A copy of a checkpoint to damage."""
        return Path(shutil.copytree(source, self.work(name), dirs_exist_ok=True))


def make_subject(folder: Path) -> Subject:
    """Write all checkpoints. This starts no thread in this process, because its forks would lack it."""
    torch.set_num_threads(1)
    subject = Subject(folder)
    write_hf(CONFIG, subject.hf, random_values())
    write_hf(CONFIG, subject.sharded, random_values(), max_shard_bytes=300_000)
    write_mistral(subject.mistral)
    for checkpoint in (subject.hf, subject.sharded, subject.mistral):
        shutil.copyfile(DEMO / "tokenizer.model", checkpoint / "tokenizer.model")
    child = os.fork()
    if not child:
        os.dup2(os.open(folder / "quantize.log", os.O_WRONLY | os.O_CREAT), 1)
        os._exit(quantize.main([str(subject.hf), str(subject.native), *FORMATS, "--threads", "1", "--quiet"]))
    if status := os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the subject could not be quantized: status {status}")
    return subject


def random_values() -> Callable[[str, StoredTensor], Tensor]:
    """Values for `write_hf`: always the same, and large enough that logits differ by several units."""
    generator = torch.Generator().manual_seed(0)

    def values(name: str, stored: StoredTensor) -> Tensor:
        if len(stored.shape) == 1:
            return torch.ones(stored.shape)
        return torch.randn(stored.shape, generator=generator) * 2 / stored.shape[-1] ** 0.5

    return values


def write_mistral(folder: Path) -> None:
    folder.mkdir()
    values, tensors = random_values(), stored_tensors(MISTRAL, CONFIG)
    specs = [TensorSpec(name, torch.bfloat16, stored.shape) for name, stored in tensors.items()]
    with Writer(folder / "consolidated.safetensors", specs, {}) as writer:
        for name, stored in tensors.items():
            writer.write(name, values(name, stored).bfloat16())
    params = {
        "dim": CONFIG.hidden, "n_layers": CONFIG.layers, "head_dim": CONFIG.head_dim,
        "hidden_dim": CONFIG.ffn, "n_heads": CONFIG.heads, "n_kv_heads": CONFIG.kv_heads,
        "norm_eps": CONFIG.norm_eps, "vocab_size": CONFIG.vocab, "rope_theta": CONFIG.rope_theta,
        "max_seq_len": CONFIG.context,
        "moe": {"num_experts_per_tok": CONFIG.experts_per_token, "num_experts": CONFIG.experts},
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
