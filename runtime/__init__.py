"""Run Mixtral: load a checkpoint, generate text, hold conversations. See `runtime.engine`."""

from runtime.engine import Engine
from runtime.errors import DeviceError, LoadError, MixtralError, OptionError, PromptTooLong, RequestError
from runtime.options import EngineOptions, SamplingParams
from runtime.planner import Plan
from runtime.session import Session, Token
from runtime.stats import Stats

__all__ = [
    "DeviceError",
    "Engine",
    "EngineOptions",
    "LoadError",
    "MixtralError",
    "OptionError",
    "Plan",
    "PromptTooLong",
    "RequestError",
    "SamplingParams",
    "Session",
    "Stats",
    "Token",
]
