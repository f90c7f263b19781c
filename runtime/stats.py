"""What an engine has done so far."""

from dataclasses import dataclass


@dataclass
class Stats:
    """Counters since the engine was loaded. Times are wall-clock seconds spent inside the engine."""

    requests: int = 0
    prompt_tokens: int = 0  # computed, that is less those re-used
    reused_tokens: int = 0  # found in a session's KV cache
    prompt_seconds: float = 0.0
    first_token_seconds: float = 0.0  # of the latest request, from its start to its first token
    new_tokens: int = 0
    decoded_tokens: int = 0  # new tokens less each request's first, which the prompt pays for
    decode_seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def __str__(self) -> str:
        reused = f" and {self.reused_tokens} re-used" if self.reused_tokens else ""
        return (
            f"first token {self.first_token_seconds:.2f} s; "
            f"prompt {self.prompt_tokens} tokens{reused}, {self.prompt_rate:.1f} tokens/s; "
            f"decode {self.decoded_tokens} tokens, {self.decode_rate:.1f} tokens/s"
        )
