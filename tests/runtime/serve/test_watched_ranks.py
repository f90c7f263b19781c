"""What can be watched of ranks: the picture of all experts, memory by rank, and traces of each rank's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime import Engine, EngineOptions, OptionError, SamplingParams
from runtime.engine import DEMO
from runtime.experts.places import Places
from runtime.ranks.follower import Follower
from tests.runtime.ranks.engines import over_ranks
from tests.runtime.serve.served import running
from tools.trace.read import read_trace

OFFLOADED: dict[str, Any] = {"device": "cpu", "threads": 1, "context": 256, "slots": 3, "lookahead": 0}
IDS = [(n * n * 5 + n) % 1800 + 100 for n in range(40)]


@contextmanager
def remembering(followers: list[Follower]) -> Iterator[None]:
    """Inside, followers that are made are put there, in the order of ranks when sorted."""
    make = Follower.__init__

    def remembered(self: Follower, *words: Any) -> None:
        make(self, *words)
        followers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Follower, "__init__", remembered)
        yield


def test_the_picture_of_all_ranks() -> None:
    """Layers are those of the whole model, and what was heard of the others is what they had."""
    followers = list[Follower]()

    def places(follower: Follower) -> Places:
        config = follower.runner.config
        return Places.of(follower.runner.cache, config.layers, config.experts)

    def measure(engine: Engine) -> None:
        with running(engine) as server:
            found = server.get("/experts").json()
            assert (found["layers"], found["experts"], found["resident"]) == (8, 8, False)
            assert found["places"][:5] == ["?" * 8] * 5 and "?" not in "".join(found["places"][5:])
            engine.logits(IDS[:20])  # with which others' places are asked for
            by_rank = sorted(followers, key=lambda follower: follower.rank)
            expected = sum(map(places, by_rank), Places([], []))
            assert any(uses["miss"] for uses in expected.last)
            engine.logits(IDS)  # changes them, and hears of what they were
            assert expected != sum(map(places, by_rank), Places([], []))
            own = Places.of(engine.runner.cache, engine.config.layers, engine.config.experts)
            found = server.get("/experts").json()
            assert found["places"] == (expected + own).places
            for mine, its in zip(found["last"], (expected + own).last, strict=True):
                assert [sorted(mine[use]) for use in mine] == [sorted(its[use]) for use in mine]

    with remembering(followers):
        over_ranks(DEMO, (3, 3, 2), measure, **OFFLOADED)


def test_ranks_that_have_all_their_experts() -> None:
    def measure(engine: Engine) -> None:
        with running(engine) as server:
            found = server.get("/experts").json()
            assert found["resident"] and found["places"] == ["s" * 8] * 8
            with pytest.raises(OptionError, match="nothing to trace"), engine.recording("x"):
                pass

    over_ranks(DEMO, (4, 4), measure, device="cpu", threads=1, context=256)


def test_memory_by_rank() -> None:
    def measure(engine: Engine) -> None:
        with running(engine) as server:
            text = server.get("/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        memory = {
            (sample.labels["rank"], sample.labels["tier"]): sample.value
            for sample in families["mixtral_memory_bytes"].samples
        }
        assert engine.rank_plans
        assert memory == {
            (f"{rank}", tier): value
            for rank, plan in enumerate(engine.rank_plans.plans)
            for tier, value in (("device", plan.device_bytes), ("host", plan.host_bytes), ("file", 0))
        }
        assert memory["0", "host"] != memory["1", "host"]

    over_ranks(DEMO, (3, 5), measure, **OFFLOADED)


def test_a_trace_is_of_a_ranks_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = Engine.follow

    def recorded(self: Engine) -> None:
        with self.recording(tmp_path / "trace1"):
            follow(self)

    monkeypatch.setattr(Engine, "follow", recorded)

    def measure(engine: Engine) -> int:
        with engine.recording(tmp_path / "trace0"):
            list(engine.generate(IDS, SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)))
        return engine.stats().misses

    misses = over_ranks(DEMO, (3, 5), measure, **OFFLOADED)
    traces = [read_trace(tmp_path / f"trace{rank}") for rank in (0, 1)]
    assert [trace.header.layers for trace in traces] == [3, 5]
    kinds = [[type(event).__name__ for event in trace.events] for trace in traces]
    assert sum(kind.count("Miss") for kind in kinds) == misses > 0
    assert {event.layer for event in traces[1].events if hasattr(event, "layer")} == set(range(5))


@pytest.mark.parametrize("misses", ["copy", "compute"])
def test_what_is_promised(misses: str) -> None:
    def measure(engine: Engine) -> list[str]:
        return engine.batch().caveats

    options = {"device": "cpu", "threads": 1, "context": 128, "slots": 4, "misses": misses}
    with Engine.load(DEMO, EngineOptions(**options)) as alone:
        before = alone.batch().caveats
    more = set(over_ranks(DEMO, (4, 4), measure, **options)) - set(before)
    assert len(more) == (misses == "compute") and all("number of ranks" in line for line in more)
