"""The weight formats of a whole model."""

from dataclasses import dataclass

from model.parameters import ATTENTION, EXPERT, HEAD
from model.quant.spec import QuantSpec

UNQUANTIZED = QuantSpec(16)


@dataclass(frozen=True)
class Formats:
    """The formats of a model's matrices. Embeddings, norms and gates are never quantized.

    >>> print(Formats(QuantSpec(4), QuantSpec(3, 128), QuantSpec(8)))
    attention 4, experts 3g128, head 8
    """

    attention: QuantSpec = UNQUANTIZED
    experts: QuantSpec = UNQUANTIZED
    head: QuantSpec = UNQUANTIZED

    def __str__(self) -> str:
        return ", ".join(f"{kind} {spec}" for kind, spec in self.by_kind().items())

    def by_kind(self) -> dict[str, QuantSpec]:
        """The formats by the names of the fields, which are those of flags and of sections in files."""
        return {"attention": self.attention, "experts": self.experts, "head": self.head}

    def spec_of(self, template: str) -> QuantSpec:
        """The format of a parameter, by its name in `model.parameters`.

        >>> str(Formats(head=QuantSpec(8)).spec_of("lm_head.weight"))
        '8'
        """
        if template.startswith(EXPERT):
            return self.experts
        if template in ATTENTION:
            return self.attention
        return self.head if template == HEAD else UNQUANTIZED

    @property
    def quantized(self) -> bool:
        """Whether any matrix is."""
        return any(spec.quantized for spec in self.by_kind().values())


PLAIN = Formats()  # all at 16 bits
DEFAULT = Formats(QuantSpec(4), QuantSpec(4), QuantSpec(8))  # what `tools.quantize` writes if it is not told
KINDS = tuple(PLAIN.by_kind())
