"""Counters of an engine."""

from dataclasses import dataclass
from operator import add, sub

from runtime.units import format_bytes


@dataclass
class Stats:
    """Counters since the engine was loaded. Times are wall-clock seconds spent inside the engine."""

    requests: int = 0
    prompt_tokens: int = 0  # computed ones, without those reused
    reused_tokens: int = 0  # prompt tokens found in a session's KV cache
    prompt_seconds: float = 0.0
    first_token_seconds: float = 0.0  # of the last request, from its start to its first token
    new_tokens: int = 0
    decoded_tokens: int = 0  # new tokens without each request's first, which its prompt pays for
    decode_seconds: float = 0.0
    # Counted by an expert cache, and 0 where all experts are resident.
    hits: int = 0
    misses: int = 0
    guesses: int = 0
    computed: int = 0  # misses whose expert the host computed
    used_guesses: int = 0  # misses whose expert had been guessed: it was there, or on its way
    recalled: int = 0  # of `recallable`, those that the layer before ranked as high as that
    recallable: int = 0  # experts that decoded tokens chose, where the layer before had a ranking
    stall_seconds: float = 0.0  # in which the host or the device waited for copies
    copied_bytes: int = 0
    wasted_bytes: int = 0  # of the copied ones, those for unused guesses and for forwards that failed
    read_bytes: int = 0  # from files, after loading
    written_back_bytes: int = 0  # from slots to host memory

    def __add__(self, other: "Stats") -> "Stats":
        """
        >>> (Stats(hits=3, misses=1) + Stats(hits=1, stall_seconds=0.5) - Stats(misses=1)).hits
        4
        """
        return Stats(*map(add, vars(self).values(), vars(other).values()))  # astuple takes 20 times as long

    def __sub__(self, other: "Stats") -> "Stats":
        return Stats(*map(sub, vars(self).values(), vars(other).values()))

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def hit_ratio(self) -> float:
        """The share of needed experts that were in a slot."""
        return self.hits / (self.hits + self.misses) if self.misses else 1.0

    @property
    def recall(self) -> float:
        """The share of `recallable` experts that were `recalled`."""
        return self.recalled / self.recallable if self.recallable else 0.0

    def __str__(self) -> str:
        cached = ""
        if self.hits or self.misses:
            cached = (
                f"\nexperts: hit ratio {self.hit_ratio:.2f}, lookahead recall {self.recall:.2f}; "
                f"{format_bytes(self.copied_bytes)} copied, {format_bytes(self.wasted_bytes)} wasted; "
                f"waited {self.stall_seconds:.2f} s for copies"
            )
        if self.computed:
            cached += f"; {self.computed} of {self.misses} misses computed on the CPU"
        if self.read_bytes or self.written_back_bytes:
            cached += (
                f"\ntiers: {format_bytes(self.read_bytes)} read from files, "
                f"{format_bytes(self.written_back_bytes)} written back to host memory"
            )
        reused = f" and {self.reused_tokens} reused" if self.reused_tokens else ""
        return (
            f"first token {self.first_token_seconds:.2f} s; "
            f"prompt {self.prompt_tokens} tokens{reused}, {self.prompt_rate:.1f} tokens/s; "
            f"decode {self.decoded_tokens} tokens, {self.decode_rate:.1f} tokens/s{cached}"
        )
