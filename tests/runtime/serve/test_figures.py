"""What can be watched: metrics, and the experts' picture."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime import Engine, EngineOptions
from runtime.serve.picture import Rates
from runtime.stats import Stats
from tests.runtime.serve.served import Running, running

BODY = {"prompt": "def read_bytes(obj):", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def offloaded() -> Iterator[Running]:
    """A server whose experts do not all fit, neither in slots nor in berths."""
    options = EngineOptions(device="cpu", dtype="float32", offload="always", slots=3, context=256, parallel=2)
    with Engine.load(None, options) as engine, running(engine) as server:
        assert not engine.plan.resident
        yield server


def values(server: Running) -> dict[str, float]:
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(offloaded: Running) -> None:
    before = values(offloaded)
    for _ in range(2):
        assert offloaded.post("/v1/completions", BODY).status_code == 200
    assert offloaded.get("/nothing").status_code == 404
    after = values(offloaded)
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["mixtral_new_tokens_total"] == 16
    assert gained["mixtral_first_token_seconds_count"] == 2 and gained["mixtral_token_seconds_count"] == 14
    assert gained["mixtral_prompt_tokens_total"] + gained["mixtral_reused_tokens_total"] == 2 * 8
    assert gained["mixtral_reused_tokens_total"] == 7  # all of the second prompt but its last token
    assert gained["mixtral_responses_total[/v1/completions][200]"] == 2
    assert gained["mixtral_responses_total[other][404]"] == 1
    assert (
        gained["mixtral_expert_misses_total"] > 0 and gained["mixtral_moved_bytes_total[host_to_device]"] > 0
    )
    plan = offloaded.served.engine.plan
    assert after["mixtral_memory_bytes[0][host]"] == plan.host_bytes
    assert after["mixtral_hit_ratio"] == pytest.approx(offloaded.served.engine.stats().hit_ratio)
    assert (after["mixtral_requests_running"], after["mixtral_requests_queued"]) == (0, 0)


def test_the_picture_is_what_the_cache_has(offloaded: Running) -> None:
    offloaded.post("/v1/completions", BODY)
    found = offloaded.get("/experts").json()
    engine = offloaded.served.engine
    assert engine.runner.cache is not None
    assert (found["layers"], found["experts"], found["resident"]) == (8, 8, False)
    tables = engine.runner.cache.residency.tables
    for row, table in zip(found["places"], tables, strict=True):
        assert {e for e, letter in enumerate(row) if letter in "sl"} == set(table.where)
        assert set(row) <= set("slgb") and len(row) == 8
    for layer in found["last"]:
        assert len(layer["hit"]) + len(layer["miss"]) == 2
    assert found["copied_bytes"] == engine.stats().copied_bytes > 0
    assert (found["running"], found["queued"]) == (0, 0)


def test_all_experts_on_the_device(server: Running) -> None:
    found = server.get("/experts").json()
    assert found["resident"] and found["places"] == ["s" * 8] * 8
    assert found["last"] == [{"hit": [], "miss": []}] * 8


def test_the_picture_as_a_stream(offloaded: Running) -> None:
    """It changes while a text is written, at most five times a second."""
    seen, began = list[dict[str, Any]](), time.monotonic()
    with httpx.stream("GET", offloaded.url + "/experts/stream", timeout=30) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                seen.append(json.loads(line.removeprefix("data: ")))
                if len(seen) == 1:
                    offloaded.post("/v1/completions", BODY | {"max_tokens": 100, "ignore_eos": True})
                elif len(seen) > 2 and seen[-1]["tokens_per_second"] > 0:
                    break
    assert time.monotonic() - began > 0.18 * (len(seen) - 1)
    assert seen[-1]["copied_bytes"] > seen[0]["copied_bytes"]


def test_rates_are_those_of_the_last_seconds() -> None:
    now = [0.0]
    rates = Rates(lambda: now[0])
    found = []
    for second in range(6):
        now[0] = float(second)
        gained, seconds = rates.read(Stats(new_tokens=second * second))
        found.append(gained.new_tokens / seconds)
    assert found == [0, 1, 2, 4, 6, 8]  # of the last two seconds, once there are two


def test_the_page_and_its_policy(server: Running) -> None:
    page = server.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]
    assert server.get("/main.js").headers["content-type"] == "text/javascript; charset=utf-8"
    for path in ("/../app.py", "/page/main.js", "/%2e%2e/app.py", "/main.js/", "/..%2fapp.py"):
        assert server.get(path).status_code == 404
    assert server.get("/health").headers["content-security-policy"].startswith("default-src 'none'")
