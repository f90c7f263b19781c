"""What it costs a GPU to expand quantized weights before it multiplies with them, as `Blocks` does."""

import torch

from model.mixtral import Mixtral
from model.quant.backends.blocks import MOVED, Blocks
from model.quant.expert import ExpertFormat
from model.quant.product import QuantizedLinear
from model.quant.streams import matrix_fields


def cost_of_expanding(model: Mixtral, form: ExpertFormat, bandwidth: float | None) -> str:
    """The bytes that a token then moves, and how long that takes at `bandwidth` bytes a second. Where that is
    not known, how many times as many they are as the kernels read. `Blocks` has to be in use."""
    config = model.config
    used = config.layers * config.experts_per_token
    matrices = [
        (module.spec, module.shape, 1)
        for module in model.modules()
        if isinstance(module, QuantizedLinear) and module.backend is Blocks
    ]
    matrices += [(form.spec, form.shapes[name], used) for name, b in form.backends.items() if b is Blocks]
    moved = MOVED * sum(count * N * K for _, (N, K), count in matrices)
    stored = sum(count * matrix_fields("", shape, spec)[-1].end for spec, shape, count in matrices)
    if bandwidth:
        compared = f"{moved / bandwidth:.2g} s at {bandwidth / 1e9:.0f} GB/s"
    else:
        compared = f"{moved / stored:.0f} times what the fast product reads"
    return f"a token moves about {moved / 1e9:.3g} GB of device memory for that, {compared}"


def memory_bandwidth(device: torch.device) -> float | None:
    """Bytes a second of a GPU's memory, by its clock and width. None where PyTorch does not tell them."""
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "memory_clock_rate", 0)  # kHz; two bits a line each time
    return 2000 * clock * getattr(properties, "memory_bus_width", 0) / 8 or None
