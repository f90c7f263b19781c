"""A seed for every test, and a summary of comparisons with Transformers."""

import pytest
import torch


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
