"""A plugin for pytest, by which a process tells another one how its tests end. See `tests.aside`."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tell", type=Path, help="write a line of JSON here for each report")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Telling(config))


class Telling:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.file = config.option.tell.open("a", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self.config.hook
        data = hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")
        self.file.flush()

    def pytest_unconfigure(self) -> None:
        self.file.close()
