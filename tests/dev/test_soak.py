"""Many clients at once: a few requests always, and a thousand on request."""

import random

import pytest

from dev.soak.client import Client, Report, soak
from dev.soak.command import main
from dev.soak.known import Known, write_alone
from runtime import Engine, EngineOptions
from runtime.serve.guard import Keys
from tests.runtime.serve.served import running


def test_a_few_requests_of_all_kinds() -> None:
    options = EngineOptions(device="cpu", dtype="float32", context=512, parallel=3)
    with Engine.load(None, options) as engine:
        known = write_alone(engine, 8, seed=1)
        with running(engine, keys=Keys(["sesame"]), queue=2) as server:
            report = soak(server.port, "sesame", known, requests=24, clients=7, seed=3)
            assert report.faults == []
            assert sum(report.outcomes.values()) == 24 and report.outcomes["cut off"] >= 4
            wrong = [Known(example.body, example.text + "x") for example in known]
            client = Client(server.port, "sesame", wrong, Report(), random.Random(1))
            for ask in (client.wait, client.read):
                with pytest.raises(AssertionError, match="instead of"):
                    ask()


@pytest.mark.slow
def test_a_thousand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests", "1000"]) == 0
    assert "; 0 faults" in capsys.readouterr().out
