"""The streams that this process has on each device, beside the one that computes.

Streams are scarce. PyTorch hands out 32 of them in turn, never takes one back, and keeps a cuBLAS workspace
of up to 32 MiB for each that has multiplied. So all engines on a device share these. Copies of several
engines then run one after the other, as they would on the link.
"""

import threading
from dataclasses import dataclass, field
from functools import cache

import torch


@dataclass(frozen=True)
class Streams:
    """The streams of one device."""

    copies: torch.cuda.Stream  # for experts on their way to the device
    returns: torch.cuda.Stream  # for experts on their way back
    capturing: torch.cuda.Stream  # for graphs, because the default stream cannot be captured
    # Engines in several threads capture one after the other. No finalizer or signal handler captures.
    turn: threading.RLock = field(default_factory=threading.RLock)


@cache
def streams(device: torch.device) -> Streams:
    return Streams(torch.cuda.Stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device))


def same(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """Another object for the same stream. In a `with` statement, such an object remembers the previous
    stream, so each thread needs its own."""
    return torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
