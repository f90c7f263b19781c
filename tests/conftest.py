"""One thread for tiny models, and what a machine need not have.

`pytest -m gpu` is also for machines that have PyTorch, Triton and pytest, and little else.
"""

import gc
import os
import signal
from collections.abc import Generator
from importlib.util import find_spec

import pytest

from tests.aside import MANY, Aside, belongs

# PyTorch reads this when it is imported, and processes that tests start inherit it. Threads that wait for
# each other spin: on a machine with other work, two of them took ten to thirty times as long as one. Tests of
# what several threads do ask for a number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whatever started the tests may ignore Ctrl-C, as a shell does for what runs in the background. Processes
# that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The other packages that tests import. What needs a GPU needs none of these.
EXTRA = {
    "accelerate", "gguf", "hqq", "httpx", "hypothesis", "jsonschema", "llguidance", "matplotlib",
    "mistral_common", "nbclient", "nbformat", "numba", "openai", "prometheus_client", "pydantic", "starlette",
    "transformers", "uvicorn",
}  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With `-m gpu`, a file that cannot be imported for want of one of these packages is skipped. Without, it
    fails, because whoever runs all tests wants to know."""
    report = yield
    if collector.config.option.markexpr != "gpu" or not report.failed or report.call.excinfo is None:
        return report
    missing = [name for name in sorted(EXTRA) if find_spec(name) is None]
    if missing and isinstance(report.call.excinfo.value.__cause__, ImportError):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {', '.join(missing)} are not installed")
    return report


@pytest.hookimpl(trylast=True)  # after tests have been deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Many tests are divided among two processes if there are two processors."""
    from runtime.process.threads import usable_processors

    alone = config.option.collectonly or config.option.usepdb or config.getoption("--tell", None)
    if len(items) > MANY and usable_processors() > 1 and not alone:
        aside = [item for item in items if belongs(item)]
        items[:] = [item for item in items if not belongs(item)] + aside
        if aside:
            config.pluginmanager.register(Aside(aside, config.option.markexpr))


def pytest_collection_finish() -> None:
    """No garbage collection looks at what has been imported by now, which is half a million objects.

    That took a fifth of the time of tests that load engines.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise Triton's bindings complain of what is left at the end


@pytest.fixture(autouse=True, scope="session")
def patient_progress() -> Generator[None, None, None]:
    """Nothing says how far it is, however slow the machine: what a command prints does not depend on that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.shell.progress.PATIENCE", 1e9)
        yield


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine that has no numba. Returns why its CPU has no fast product, as backends say it."""
    from model.kernels.cpu import launching

    find = launching.find_spec
    monkeypatch.setattr(launching, "find_spec", lambda name: None if name == "numba" else find(name))
    launching.unsupported.cache_clear()
    reason = launching.unsupported()
    monkeypatch.undo()
    launching.unsupported.cache_clear()
    assert reason is not None
    monkeypatch.setattr(launching, "unsupported", lambda: reason)
    return reason
