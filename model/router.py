"""The router of a layer: which experts each token goes to, and which ones later layers will probably choose.

**Lookahead** (arXiv 2312.17238, section 3.2). Each layer changes the residual stream only a little. So a
later layer's norm and gate, applied to this layer's residual stream, often choose the experts that the later
layer will choose. This layer's router sees x = n * v, where n is the normed stream and v the norm's weight.
The later router will see about n * v'. So the prediction is one product of x with `gate' * (v' / v)`, which
`seen_from` prepares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels import step as kernels
from model.kernels.cpu import rowwise
from model.rows import apart


@dataclass(slots=True)  # not frozen: a frozen one takes longer to make, and every layer makes one
class Choice:
    """What a layer's router says of N tokens.

    In a step on a GPU, `packed` holds all of it, so the host can read it in one transfer, and `x` is what the
    chosen experts will take.
    """

    ids: Tensor  # [N, A] int64, in the order of weights, largest first; int32 in a step on a GPU
    weights: Tensor  # [N, A] float32, each row adding up to 1
    ranking: Tensor | None = None  # [d, E]: the experts of each of the next d layers, likeliest first
    packed: Tensor | None = None  # [2 A + d E] int32
    x: Tensor | None = None  # [1, D]
    apart: bool = False  # the tokens are of N texts, and each gets the bits that it gets alone (`rows.apart`)

    @staticmethod
    def unpack(packed: Tensor, chosen: int, experts: int) -> "Choice":
        """One token's choice, from the int32 numbers that the `route` kernel writes.

        >>> choice = Choice.unpack(torch.tensor([0, 0, 3, 1, 2, 0, 1, 3], dtype=torch.int32), 2, experts=4)
        >>> choice.ids.tolist(), choice.weights.tolist(), choice.ranking.tolist()
        ([[3, 1]], [[0.0, 0.0]], [[2, 0, 1, 3]])
        """
        weights, ids, later = packed.split([chosen, chosen, packed.numel() - 2 * chosen])
        ranking = later.view(-1, experts) if later.numel() else None
        return Choice(ids[None], weights.view(torch.float32)[None], ranking, packed)


class Router(nn.Module):
    """Chooses the experts with the A largest of E gate logits. The weights are the softmax over those, in
    float32.

    That equals the softmax over all E logits, cut to the chosen and renormalized to 1, because renormalizing
    divides out a factor that all have in common (arXiv 2401.04088, section 2.1).

    >>> _ = torch.manual_seed(0); logits = torch.randn(1, 8)
    >>> over_all = logits.softmax(-1).topk(2).values
    >>> torch.allclose(logits.topk(2).values.softmax(-1), over_all / over_all.sum())
    True
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self.experts, self.experts_per_token = config.experts, config.experts_per_token
        self.weight = nn.Parameter(
            torch.empty(config.experts, config.hidden, dtype=torch.float32, device=device)
        )
        self.ahead: Tensor | None = None  # [d E, D] float32: gates of the next d layers, as seen from here
        self.gates: Tensor | None = None  # [(1 + d) E, D] float32: `weight` above `ahead`, for `step`

    @property
    def distance(self) -> int:
        """The number of later layers whose experts this router ranks."""
        return 0 if self.ahead is None else len(self.ahead) // self.experts

    def look_ahead(self, later: Sequence[Tensor]) -> None:
        """Rank the experts of later layers, too, by their gates [E, D] from `seen_from`."""
        self.ahead = torch.cat(list(later)) if later else None
        if self.gates is not None:
            self.prepare_step()

    def forward(self, x: Tensor, each: bool = False) -> Choice:  # [N, D]
        """The choice of N tokens: of one text, or with `each` of N texts."""
        wide = x.float()
        if not torch.is_grad_enabled() and rowwise.takes(x.dtype, x.device, x.shape[-1]):
            logits = rowwise.route(wide, self.weight)
        else:
            gates = partial(F.linear, weight=self.weight)
            logits = apart(gates, wide) if each else gates(wide)
        logits, ids = logits.topk(self.experts_per_token)  # [N, A]
        ranking = None if self.ahead is None else self.rank(wide, self.ahead)
        return Choice(ids, logits.softmax(-1), ranking, apart=each)

    def rank(self, x: Tensor, ahead: Tensor) -> Tensor:  # [N, D], [d E, D] -> [d, E]
        """A ranking of each later layer's experts. It adds up the probabilities of several tokens."""
        logits = F.linear(x, ahead).view(x.shape[0], -1, self.experts)  # [N, d, E]
        return logits.softmax(-1).sum(0).argsort(dim=-1, descending=True)

    def prepare_step(self) -> None:
        """Stack the gates for `step`. A gate's bits do not depend on the gates below it."""
        weight = self.weight.detach()
        self.gates = weight if self.ahead is None else torch.cat([weight, self.ahead])

    def step(self, x: Tensor) -> Choice:  # [1, D]
        """The choice of one token in one launch. Call `prepare_step` first."""
        assert self.gates is not None
        packed = kernels.route(x, self.gates, self.experts, self.experts_per_token)
        choice = Choice.unpack(packed, self.experts_per_token, self.experts)
        choice.x = x
        return choice


def seen_from(mine: Tensor, theirs: Tensor, gate: Tensor) -> Tensor:  # [D], [D], [E, D] -> [E, D] float32
    """A later layer's gate, rescaled for the input of this layer's router.

    `mine` and `theirs` are the weights of this layer's norm and the later layer's. Where this layer's norm
    has a weight of 0, x says nothing about the stream, so the prediction leaves that number out.
    """
    ratio = torch.where(mine.float().abs() > 1e-6, theirs.float() / mine.float(), 0)
    return gate * ratio
