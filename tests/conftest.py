"""`pytest -m gpu` is also for machines that have PyTorch, Triton and pytest, and little else."""

from collections.abc import Generator

import pytest

# The other packages that tests import. What needs a GPU needs none of these.
EXTRA = {"accelerate", "hqq", "hypothesis", "matplotlib", "mistral_common", "transformers"}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With `-m gpu`, a file that imports a package which is not installed is skipped. Without, it fails: who
    runs all tests wants to know."""
    report = yield
    if collector.config.option.markexpr != "gpu" or not report.failed or report.call.excinfo is None:
        return report
    cause = report.call.excinfo.value.__cause__
    missing = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
    if missing in EXTRA:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: it needs {missing}, which is not installed")
    return report


@pytest.fixture(autouse=True, scope="session")
def patient_progress() -> Generator[None, None, None]:
    """Nothing says how far it is, however slow the machine: what a command prints does not depend on that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.shell.progress.PATIENCE", 1e9)
        yield
