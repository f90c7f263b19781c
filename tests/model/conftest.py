"""A seed for every test, one thread for tiny models, and a summary of comparisons with Transformers."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a summary of what all tests recorded as `logit_difference` and `ids_equal`."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    recorded = [entry for report in reports if report.when == "call" for entry in report.user_properties]
    differences = [value for name, value in recorded if name == "logit_difference"]
    ids = [value for name, value in recorded if name == "ids_equal"]
    if differences or ids:
        terminalreporter.section("against Transformers")
    if differences:
        worst = max(float(difference) for difference in differences)
        terminalreporter.line(
            f"largest difference of float32 logits: {worst:.1e} in {len(differences)} comparisons"
        )
    if ids:
        equal, all_ids = (sum(int(pair[i]) for pair in ids) for i in (0, 1))
        terminalreporter.line(f"greedy token ids equal: {equal} of {all_ids}")
