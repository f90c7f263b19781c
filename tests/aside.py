"""A second process of pytest, which runs some of many tests while the first one runs the others.

The first one collects all tests. Those of the second come last, and have its reports for their results. A
test of which nothing was heard runs as if there were no second process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MANY = 500  # tests: whoever runs fewer looks for one thing
LAST_WORDS = 2000  # characters of what a process wrote that ended early
# Folders and files whose tests do not care about time, and take about as long as all others. Longest first.
PLACES = (
    "tests/model/kernels/test_matrices.py",
    "tests/model/kernels/test_step.py",
    "tests/model/test_step.py",
    "tests/dev",
    "tests/tokenizer",
    "tests/tools",
)


def belongs(item: pytest.Item) -> bool:
    """Whether a test may run in the second process. What needs a GPU has it for itself."""
    file = item.nodeid.partition("::")[0]
    return item.get_closest_marker("gpu") is None and any(
        file == place or file.startswith(f"{place}/") for place in PLACES
    )


class Aside:
    """The second process. As a plugin of the first, it stands in for the tests that run there."""

    def __init__(self, items: Sequence[pytest.Item], markers: str) -> None:
        """Begin to run the files of these tests, as far as `-m` chooses tests by `markers`."""
        self.waiting = {item.nodeid for item in items}
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="aside-"))
        self.said, told = self.folder / "said", self.folder / "told"
        told.touch()
        files = dict.fromkeys(item.nodeid.partition("::")[0] for item in items)
        order = {file: n for n, place in enumerate(PLACES) for file in files if file.startswith(place)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.telling",
                   "--tell", str(told), "-m", f"({markers or 'not gpu'}) and not gpu",
                   *sorted(files, key=order.__getitem__)]  # fmt: skip
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        self.told = told.open(encoding="utf-8")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item.nodeid not in self.waiting or not (reports := self.heard(item.nodeid)):
            return None
        hook, config = item.ihook, item.config
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for data in reports:
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            if isinstance(report.longrepr, list):  # where it was skipped and why, and JSON has no tuples
                report.longrepr = tuple(report.longrepr)
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def heard(self, test: str) -> list[dict[str, Any]]:
        """The reports of a test once it has ended. None if the process ended before."""
        while True:
            running = self.process.poll() is None
            for line in self.lines():
                data = json.loads(line)
                self.reports.setdefault(data["nodeid"], []).append(data)
            reports = self.reports.get(test, [])
            if reports and reports[-1]["when"] == "teardown":
                return reports
            if not running:
                return []
            time.sleep(0.02)

    def lines(self) -> list[str]:
        """The whole lines that have come."""
        lines = []
        while True:
            place = self.told.tell()
            line = self.told.readline()
            if not line.endswith("\n"):
                self.told.seek(place)
                return lines
            lines.append(line)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.process.poll() not in (None, 0, 1):
            terminalreporter.section("the process aside ended early")
            terminalreporter.write_line(self.said.read_text(errors="replace")[-LAST_WORDS:])

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self) -> None:
        """End what nobody has waited for."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.told.close()
        shutil.rmtree(self.folder, ignore_errors=True)
