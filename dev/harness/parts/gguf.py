"""Damaged GGUF files, of which `tools.quantize` reads everything."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from random import Random

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor as Weights

from dev.harness.mutate.gguf_file import ARRAY, FLOAT, TEXT, UINT32, File, Key, Tensor, damaged, harmless
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Absent, Case
from dev.harness.subject import CONFIG, Subject
from model.checkpoint.names import GGUF, stored_tensors
from runtime.engine import DEMO
from tools.quantize.sources import gguf

F32, Q8_0 = 0, 8  # types of tensors
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # kinds of tokens
CPU = torch.device("cpu")


@contextmanager
def open_gguf(subject: Subject) -> Iterator[Case]:
    if find_spec("gguf") is None:
        raise Absent("gguf is not installed")
    path = subject.work("gguf") / "x.gguf"
    file = File((*model_keys(), *tokenizer_keys()), tuple(model_tensors()))
    path.write_bytes(file.encoded())
    known, tokenizer = read_all(path)

    def case(chance: Random) -> Verdict:
        if chance.random() < 0.1:
            path.write_bytes(harmless(file, chance))
            weights, files = read_all(path)
            same = all(torch.equal(weight, known[name]) for name, weight in weights.items())
            if not same or files != tokenizer:
                raise Wrong("another order of keys and tensors changed the model")
        else:
            path.write_bytes(damaged(file, chance))
            read_all(path)
        return Verdict.ACCEPTED

    yield case


def read_all(path: Path) -> tuple[dict[str, Weights], dict[str, Path | bytes]]:
    """Everything that `tools.quantize` takes from a file."""
    source = gguf.open_gguf(path)
    return {name: source.read(name, CPU) for name in source.parts}, dict(source.tokenizer)


def model_keys() -> Iterator[Key]:
    yield Key(b"general.architecture", TEXT, b"llama")
    numbers = {
        "block_count": CONFIG.layers, "context_length": CONFIG.context, "embedding_length": CONFIG.hidden,
        "feed_forward_length": CONFIG.ffn, "attention.head_count": CONFIG.heads,
        "attention.head_count_kv": CONFIG.kv_heads, "attention.key_length": CONFIG.head_dim,
        "rope.dimension_count": CONFIG.head_dim, "expert_count": CONFIG.experts,
        "expert_used_count": CONFIG.experts_per_token,
    }  # fmt: skip
    for name, value in numbers.items():
        yield Key(f"llama.{name}".encode(), UINT32, value)
    yield Key(b"llama.attention.layer_norm_rms_epsilon", FLOAT, CONFIG.norm_eps)
    yield Key(b"llama.rope.freq_base", FLOAT, CONFIG.rope_theta)


def tokenizer_keys() -> Iterator[Key]:
    model = SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    ids = range(model.vocab_size())
    tests = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, BYTE: model.is_byte}
    kinds = [next((kind for kind, test in tests.items() if test(i)), NORMAL) for i in ids]
    yield Key(b"tokenizer.ggml.model", TEXT, b"llama")
    yield Key(b"tokenizer.ggml.tokens", ARRAY, (TEXT, [model.id_to_piece(i).encode() for i in ids]))
    yield Key(b"tokenizer.ggml.scores", ARRAY, (FLOAT, [model.get_score(i) for i in ids]))
    yield Key(b"tokenizer.ggml.token_type", ARRAY, (UINT32, kinds))
    for name, place in (("bos", model.bos_id()), ("eos", model.eos_id())):
        yield Key(f"tokenizer.ggml.{name}_token_id".encode(), UINT32, place)
    yield Key(b"tokenizer.chat_template", TEXT, b"{% for m in messages %}{{ m.content }}</s>{% endfor %}")


def model_tensors() -> Iterator[Tensor]:
    """Matrices in blocks of 32 codes and a scale, and norms in float32."""
    chance = Random(0)
    for name, stored in stored_tensors(GGUF["experts stacked"], CONFIG).items():
        shape, count = stored.shape[::-1], torch.Size(stored.shape).numel()
        if len(shape) == 1:
            yield Tensor(name.encode(), shape, F32, struct.pack(f"<{count}f", *[1.0] * count))
        else:
            blocks = b"".join(struct.pack("<e", 0.01) + chance.randbytes(32) for _ in range(count // 32))
            yield Tensor(name.encode(), shape, Q8_0, blocks)
