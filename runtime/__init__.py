"""Run Mixtral: load a checkpoint, generate text, hold conversations. See `runtime.engine`.

A name is imported when it is first used. Torch takes seconds to import, and a command that only prints its
help does not wait for it. The import fails at once if a file of another program hides `model` or `tokenizer`.
"""

from importlib import import_module

from runtime.shadowed import check_names

TYPE_CHECKING = False  # of `typing`, which takes milliseconds to import
if TYPE_CHECKING:
    from runtime.answer import Token
    from runtime.batching.batch import Batch, Work
    from runtime.batching.scheduler import QueueFull
    from runtime.batching.service import Service
    from runtime.engine import Engine
    from runtime.errors import DeviceError, LoadError, MixtralError, OptionError, PromptTooLong, RequestError
    from runtime.options import EngineOptions, SamplingParams
    from runtime.planning.plan import Plan
    from runtime.session import Session
    from runtime.stats import Stats

__all__ = [
    "Batch",
    "DeviceError",
    "Engine",
    "EngineOptions",
    "LoadError",
    "MixtralError",
    "OptionError",
    "Plan",
    "PromptTooLong",
    "QueueFull",
    "RequestError",
    "SamplingParams",
    "Service",
    "Session",
    "Stats",
    "Token",
    "Work",
]

check_names("model", "tokenizer")

HOMES = {
    "Batch": "batching.batch",
    "Engine": "engine",
    "Plan": "planning.plan",
    "QueueFull": "batching.scheduler",
    "Service": "batching.service",
    "Session": "session",
    "Stats": "stats",
    "Token": "answer",
    "Work": "batching.batch",
}
HOMES |= dict.fromkeys(("EngineOptions", "SamplingParams"), "options")


def __getattr__(name: str) -> object:
    """Import one of `__all__` from its home, and keep it. Python asks for each name once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
