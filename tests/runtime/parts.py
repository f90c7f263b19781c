"""Parts of a checkpoint, loaded as an engine loads the whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from model.checkpoint import identify, open_checkpoint
from model.part import Part
from runtime import EngineOptions
from runtime.planning.planner import plan_checkpoint
from runtime.runner import ModelRunner
from runtime.startup import load_tokenizer, make_runner

ABSENT = 2  # experts that have no berth, if `berths` are few


def load_part(
    folder: Path, part: Part | None = None, few_berths: bool = False, **options: Any
) -> ModelRunner:
    """A part's runner, by default the whole model's. With `few_berths` some experts stay in files."""
    whole = open_checkpoint(folder)
    checkpoint = whole.part(part or Part.whole(whole.config))
    config = checkpoint.config
    asked = EngineOptions(**{"device": "cpu", "context": 64} | options)
    if few_berths:
        asked = replace(asked, berths=config.layers * config.experts - ABSENT)
    plan = plan_checkpoint(checkpoint, asked)
    assert plan.tiered == few_berths
    tokenizer = load_tokenizer(whole, asked)
    return make_runner(checkpoint, identify(whole, "whole"), plan, tokenizer, asked, None, None)
