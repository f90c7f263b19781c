"""The examples in the docstrings hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import tokenizer

MODULES = [f"tokenizer.{module.name}" for module in pkgutil.iter_modules(tokenizer.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    tried = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    assert {name for name, n in tried.items() if n} >= {
        "tokenizer.stream",
        "tokenizer.wire",
        "tokenizer.chat",
    }
