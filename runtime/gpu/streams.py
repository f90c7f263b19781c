"""The streams that this process has on each device, beside the one that computes.

A stream is a resource of the device, as its memory is: PyTorch hands out 32 of them in turn and never takes
one back, and keeps a workspace for cuBLAS, up to 32 MiB, for each that ever multiplied. So all engines on a
device share these two. Copies of several engines then come one after the other, as they do on the link.
"""

import threading
from dataclasses import dataclass, field
from functools import cache

import torch


@dataclass(frozen=True)
class Streams:
    """Those of one device."""

    copies: torch.cuda.Stream  # of experts
    capturing: torch.cuda.Stream  # of steps, as graphs: the default stream cannot be captured
    # Engines in several threads capture one after the other. No finaliser and no handler captures.
    turn: threading.RLock = field(default_factory=threading.RLock)


@cache
def streams(device: torch.device) -> Streams:
    return Streams(torch.cuda.Stream(device), torch.cuda.Stream(device))


def same(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """The same stream as an object of one's own: such an object remembers, from `with` to its end, which
    stream was the current one, so two threads must not share it."""
    return torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
