"""Measures how evenly a model's routers use their experts."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from model.mixtral import Mixtral
from model.router import Choice, Router


class Balance:
    """Watches every router for the balancing loss of a forward, and for the load of each expert."""

    def __init__(self, model: Mixtral) -> None:
        self.losses: list[Tensor] = []
        shape = model.config.layers, model.config.experts
        self.loads = torch.zeros(shape)  # assignments since `busiest` was last called
        routers = [module for module in model.modules() if isinstance(module, Router)]
        for layer, router in enumerate(routers):
            router.register_forward_hook(functools.partial(self.watch, layer))

    @torch.autocast("cpu", enabled=False)
    def watch(self, layer: int, router: Router, inputs: tuple[Tensor], choice: Choice) -> None:
        """Add the Switch Transformer's loss (arXiv 2101.03961, eq. 4): E times the sum of each expert's load
        times its mean probability, which is 1 if all are alike."""
        E = router.weight.shape[0]
        probability = F.linear(inputs[0].float(), router.weight).softmax(-1).mean(0)  # [E]
        load = torch.bincount(choice.ids.flatten(), minlength=E)  # [E]
        self.losses.append(E * (load / load.sum() * probability).sum())
        self.loads[layer] += load.cpu()

    def loss(self) -> Tensor:
        """The balancing loss of the last forward, averaged over layers."""
        loss = torch.stack(self.losses).mean()
        self.losses.clear()
        return loss

    def busiest(self) -> float:
        """The busiest expert's load over the mean in the worst layer, since the last call."""
        share = self.loads / self.loads.sum(1, keepdim=True)
        self.loads.zero_()
        self.losses.clear()
        return (share.max() * share.shape[1]).item()
