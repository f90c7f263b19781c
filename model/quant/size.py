"""How many bytes a model takes in given formats, from its configuration alone."""

from dataclasses import dataclass

from model.config import ModelConfig
from model.parameters import EXPERT
from model.quant.formats import Formats
from model.quant.spec import QuantSpec
from model.quant.streams import expert_fields, matrix_fields


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's tensors in a native checkpoint.

    They are the same in a GPU's memory, except that gates are float32 there. Here they are 16-bit, as in
    every published Mixtral. Files that keep gates of float32 are larger by that.
    """

    embeddings: int
    head: int
    norms: int
    gates: int
    attention: int
    expert: int  # one expert's blob
    experts: int  # all of them

    @property
    def trunk(self) -> int:
        """What every token needs."""
        return self.embeddings + self.head + self.norms + self.gates + self.attention

    @property
    def total(self) -> int:
        return self.trunk + self.experts


def expert_bits(config: ModelConfig, spec: QuantSpec) -> float:
    """Bits of an expert for each of its weights: codes, scales, zeros and steps.

    >>> from model.shapes import MIXTRAL_8X7B
    >>> round(expert_bits(MIXTRAL_8X7B, QuantSpec(4)), 3)
    4.256
    """
    return 8 * expert_fields(config, spec)[-1].end / (3 * config.ffn * config.hidden)


def model_size(config: ModelConfig, formats: Formats) -> ModelSize:
    """The size without the files' headers (`model.checkpoint.writer.encode_header`).

    Raises `ModelError`, naming the tensor, if a format does not fit the configuration.
    """
    D, L, V, K = config.hidden, config.layers, config.vocab, config.head_dim
    H, G = config.heads, config.kv_heads
    qkv = matrix_fields("layers.0.self_attn.qkv_proj", ((H + 2 * G) * K, D), formats.attention)
    o = matrix_fields("layers.0.self_attn.o_proj", (D, H * K), formats.attention)
    expert = expert_fields(config, formats.experts, EXPERT.format(n=0, e=0))[-1].end
    return ModelSize(
        embeddings=2 * V * D,
        head=matrix_fields("lm_head", (V, D), formats.head)[-1].end,
        norms=2 * (2 * L + 1) * D,
        gates=2 * L * config.experts * D,
        attention=L * (qkv[-1].end + o[-1].end),
        expert=expert,
        experts=L * config.experts * expert,
    )
