"""Decoding by steps gives the same bits with experts resident or offloaded, captured or not.

The tests run on a CPU with stand-ins for kernels and graphs, and with the real ones on a GPU if there is one.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.quant.backends.blocks import Blocks
from runtime import Engine, EngineOptions, RequestError
from runtime.experts.host import HostExperts
from runtime.experts.link import HostLink
from runtime.gpu.graphs import CudaGraphs, Work
from runtime.gpu.streams import Streams
from tests.quantized import quantize_folder
from tests.runtime.gpu.plain_step import Recorded, use_plain_kernels
from tools.trace import command as trace

PROMPT, IDS = [5, 6, 7], [8, 3, 3, 40, 9, 11, 12]
LONG = [7 * i % 400 for i in range(1, 90)]
LAYERS, CHOSEN = 3, 3
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Counted:
    """Graphs whose captures and waits are counted."""

    def __init__(self, graphs: Recorded | CudaGraphs) -> None:
        self.graphs, self.captures, self.waits = graphs, 0, 0
        self.shared = graphs.shared

    def capture(self, work: Work) -> Work:
        self.captures += 1
        return self.graphs.capture(work)

    def wait(self) -> None:
        self.waits += 1
        self.graphs.wait()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def graphs(device: str, monkeypatch: pytest.MonkeyPatch) -> list[Counted]:
    """The graphs of each loaded engine."""
    made: list[Counted] = []

    def make(where: torch.device) -> Counted:
        made.append(Counted(CudaGraphs(where) if device == "cuda" else Recorded()))
        return made[-1]

    if device == "cpu":
        use_plain_kernels(monkeypatch)
        monkeypatch.setattr("model.quant.backends.BACKENDS", (Blocks,))  # blobs stay as they are in files
        monkeypatch.setattr("model.linear.packs", lambda weight: False)  # not recordable
    monkeypatch.setattr("runtime.gpu.decoder.CudaGraphs", make)
    return made


@pytest.fixture(scope="session")
def folders(variant: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a checkpoint with experts in a format, which is made once."""
    plain = variant(hidden=64, ffn=64, layers=LAYERS, experts=5, experts_per_token=CHOSEN, context=96)
    known = {"16": plain}

    def folder(experts: str) -> Path:
        if experts not in known:
            known[experts] = quantize_folder(plain, tmp_path_factory.mktemp("quantized") / experts, experts)
        return known[experts]

    return folder


@pytest.fixture
def load(folders: Callable[[str], Path], device: str) -> Callable[..., Engine]:
    def load(experts: str = "4", **options: Any) -> Engine:
        engine = Engine.load(
            folders(experts), EngineOptions(**{"device": device, "dtype": "float32", "map": False} | options)
        )
        assert engine.runner.decoder is not None
        return engine

    return load


def decoded(engine: Engine, prompt: list[int] = PROMPT, ids: list[int] = IDS) -> Tensor:
    """Logits [1 + T, V] after a prompt and after each of T ids, which are decoded one by one."""
    with engine.session() as session:
        return torch.stack([session.prefill(prompt)] + [session.step(i) for i in ids]).cpu()


@pytest.mark.parametrize("options", [{}, {"slots": 3}, {"kv": 8}])
def test_several_texts_between_steps(load: Callable[..., Engine], options: dict[str, int]) -> None:
    """Steps of one text, and forwards of the next tokens of several, take turns with the same KV caches."""
    runner = load(parallel=3, **options).runner
    texts = [PROMPT, LONG[:20], [9, 30]]
    with runner.working():
        kvs, alone = ([runner.new_kv() for _ in texts] for _ in range(2))
        for ids, *pair in zip(texts, kvs, alone, strict=True):
            for kv in pair:
                runner.forward(ids, kv)
        for n, i in enumerate(IDS):
            tokens = [(i + 7 * t) % 400 for t in range(3)]
            if n % 2:
                rows = runner.decode(tokens, kvs)
            else:
                rows = torch.cat(
                    [runner.decode([token], [kv]) for token, kv in zip(tokens, kvs, strict=True)]
                )
            expected = [runner.forward([token], kv) for token, kv in zip(tokens, alone, strict=True)]
            torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-3, atol=1e-3)
        assert [kv.length for kv in kvs] == [len(ids) + len(IDS) for ids in texts]


@pytest.mark.parametrize("experts", ["16", "4", "3", "2g32"])
def test_a_step_is_what_the_network_computes(
    load: Callable[..., Engine], folders: Callable[[str], Path], experts: str
) -> None:
    engine, ids = load(experts), [*PROMPT, *IDS]
    on_cpu = Engine.load(folders(experts), EngineOptions(device="cpu", dtype="float32")).logits(ids)
    torch.testing.assert_close(engine.logits(ids).cpu(), on_cpu, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(decoded(engine), on_cpu[len(PROMPT) - 1 :], rtol=1e-3, atol=1e-3)


OFFLOADED: list[dict[str, Any]] = [
    {"slots": 3}, {"slots": 4, "lookahead": 2, "prefetch": 2}, {"slots": 3, "prefetch": 0},
    {"slots": 4, "policy": "random"}, {"slots": 5}, {"slots": 3, "graphs": False},
    {"offload": "never", "graphs": False},
]  # fmt: skip


@pytest.mark.parametrize(
    ("experts", "dtype", "some"),
    [
        ("4", "bfloat16", OFFLOADED), ("16", "bfloat16", OFFLOADED[::3]), ("4", "float32", OFFLOADED[1::3]),
        ("3", "float32", OFFLOADED[::2]), ("2g32", "bfloat16", OFFLOADED[1::2]),
    ],
)  # fmt: skip
def test_offloaded_and_captured_or_not_the_bits_are_the_same(
    load: Callable[..., Engine], experts: str, dtype: str, some: list[dict[str, Any]]
) -> None:
    warnings.simplefilter("error")
    with load(experts, dtype=dtype) as engine:
        resident, other = decoded(engine), decoded(engine, [1, 2], IDS[:3])
        long = engine.logits(LONG)
    for options in some:
        with load(experts, dtype=dtype, **{"offload": "always"} | options) as engine:
            assert torch.equal(decoded(engine), resident), options
            assert torch.equal(decoded(engine, [1, 2], IDS[:3]), other), options
            assert torch.equal(engine.logits(LONG), long), options
            assert torch.equal(decoded(engine), resident), options  # again, with the captured graphs


def test_the_host_waits_once_a_layer_if_experts_can_miss(
    load: Callable[..., Engine], graphs: list[Counted]
) -> None:
    for options, parts in (({"offload": "never"}, 1), ({"offload": "always", "slots": 3}, LAYERS + 1)):
        engine = load(**options)
        decoded(engine)
        assert graphs[-1].captures == parts  # after the first step
        before = graphs[-1].waits
        decoded(engine)
        assert graphs[-1].captures == parts
        assert graphs[-1].waits - before == parts * len(IDS)  # one of them before the step


DIVIDED: dict[str, Any] = {"offload": "always", "slots": 3, "link_gbps": 2.0, "cpu_gbps": 3.0}


@pytest.mark.parametrize(("experts", "dtype"), [("16", "float32"), ("4", "bfloat16"), ("3", "float32")])
@pytest.mark.parametrize("misses", ["compute", "auto"])
def test_the_host_computes_some_experts(
    load: Callable[..., Engine], graphs: list[Counted], experts: str, dtype: str, misses: str
) -> None:
    """A layer is two parts. The bits are the same with graphs and without, and near those of the device."""
    warnings.simplefilter("error")
    with load(experts, dtype=dtype) as engine:
        resident = decoded(engine)
    found = []
    for options in ({}, {"graphs": False}):
        with load(experts, dtype=dtype, misses=misses, **DIVIDED, **options) as engine:
            found.append([decoded(engine) for _ in range(3)])
            assert graphs[-1].captures == (0 if options else 2 * LAYERS + 1)
            before = graphs[-1].waits
            found[-1].append(decoded(engine))
            assert graphs[-1].waits - before == (LAYERS + 1) * len(IDS)
            assert engine.stats().computed > len(IDS)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    for logits in found[0]:
        torch.testing.assert_close(logits, resident, rtol=0, atol=1e-3 if dtype == "float32" else 0.3)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_host_that_fails_fails_its_request_alone(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(misses="compute", **DIVIDED)
    compute, left = HostExperts.compute, [0]
    expected = decoded(engine)

    def failing(self: HostExperts, job: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError
        return compute(self, job)

    monkeypatch.setattr(HostExperts, "compute", failing)
    for left[0] in range(1, 9, 2):
        cache = engine.runner.cache
        assert cache is not None
        with pytest.raises(
            RequestError, match=r"the CPU could not compute an expert \(MemoryError\); try again"
        ):
            decoded(engine)
        cache.residency.forget()
        assert torch.equal(decoded(engine), expected)


def test_keys_and_values_in_8_bits(load: Callable[..., Engine], graphs: list[Counted]) -> None:
    """Steps see what prompts have written and the other way round, captured or not."""
    wide = decoded(load())
    engine = load(kv=8)
    resident, other = decoded(engine), decoded(engine, [1, 2])
    assert 1e-4 < (resident - wide).abs().median() < 0.2 * wide.std()  # a router may choose another expert
    torch.testing.assert_close(resident[-1], engine.logits([*PROMPT, *IDS])[-1].cpu(), rtol=1e-2, atol=1e-2)
    for options in ({"slots": 3}, {"slots": 4, "graphs": False}):
        with load(kv=8, **options) as engine:
            assert torch.equal(decoded(engine), resident) and torch.equal(decoded(engine, [1, 2]), other)
    assert sum(made.captures for made in graphs) > 0


def test_every_kv_cache_has_graphs_of_its_own(load: Callable[..., Engine], graphs: list[Counted]) -> None:
    engine = load("16", offload="always", slots=3)
    alone = decoded(engine), decoded(engine, [1, 2])
    with engine.session() as one, engine.session() as two:
        rows: tuple[list[Tensor], list[Tensor]] = [one.prefill(PROMPT)], [two.prefill([1, 2])]
        for i in IDS:
            rows[0].append(one.step(i))
            rows[1].append(two.step(i))
    assert graphs[-1].captures == 2 * (LAYERS + 1)
    assert all(torch.equal(torch.stack(now).cpu(), then) for now, then in zip(rows, alone, strict=True))


def test_a_conversation_that_is_cut_back(load: Callable[..., Engine]) -> None:
    """Positions go back, and what `kv` holds beyond them has no effect."""
    engine = load(offload="always", slots=3)
    with engine.session() as session:
        first = [session.prefill(PROMPT)] + [session.step(i) for i in IDS]
        session.prefill([*PROMPT, *IDS[:2]])
        assert len(session.ids) == len(PROMPT) + 2
        again = [session.step(i) for i in IDS[2:]]
    for before, now in zip(first[3:], again, strict=True):
        torch.testing.assert_close(now, before, rtol=1e-3, atol=1e-3)


def test_slots_are_reused_and_an_independent_replay_agrees(
    load: Callable[..., Engine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = load(offload="always", slots=4, lookahead=2, prefetch=2)
    with engine.recording(tmp_path / "trace.jsonl"):
        decoded(engine)
        before = engine.stats()
        decoded(engine, [1], IDS)
        after = engine.stats()
    accesses = (1 + len(IDS)) * LAYERS * CHOSEN
    assert after.hits - before.hits + after.misses - before.misses == accesses
    assert after.hits - before.hits > accesses // 3 and after.recallable > before.recallable
    assert trace.main(["summary", str(tmp_path / "trace.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replay_agrees"] is True


def test_the_last_token_fits_and_one_more_is_an_error(load: Callable[..., Engine]) -> None:
    engine = load("16", context=8)
    with engine.session() as session:
        session.prefill(PROMPT)
        for i in IDS[:5]:
            session.step(i)
        assert session.kv.length == 8
        with pytest.raises(ValueError, match="8 tokens and 1 more do not fit a context of 8"):
            session.step(1)


def test_steps_that_cannot_be_captured_are_launched_one_by_one(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoded(load("16"))

    def capture(self: Counted, work: Work) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    monkeypatch.setattr(Counted, "capture", capture)
    with pytest.warns(RuntimeWarning, match=r"graphs cannot be made \(operation not .* capturing\).*slower"):
        engine = load("16", offload="always", slots=3)  # on a GPU the warning comes here
        assert torch.equal(decoded(engine), expected)
    warnings.simplefilter("error")
    assert torch.equal(decoded(engine), expected)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_copy_that_fails_fails_its_request_alone(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoded(load())
    engine = load(offload="always", slots=3)
    assert torch.equal(decoded(engine), expected)
    move, left = HostLink.move, [0]

    def failing(self: HostLink, source: Tensor, target: Tensor, demand: bool) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError("the bus is on strike")
        move(self, source, target, demand)

    monkeypatch.setattr(HostLink, "move", failing)
    failures = 0
    for left[0] in range(1, 40, 3):
        try:
            assert torch.equal(decoded(engine), expected)
        except RequestError as error:
            assert "an expert could not be copied to the device (the bus is on strike)" in str(error)
            failures += 1
        left[0] = 0  # no more
        assert torch.equal(decoded(engine), expected)
    assert failures > 1


class Cuda:
    """Stands in for CUDA and logs the calls of a capture."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        log = self.log = []  # type: ignore[var-annotated]
        cuda, self.invalidated = self, False
        users: dict[str, int] = {}  # of pools

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                log.append(f"{self.name} waits for {other.name}")

            def synchronize(self) -> None:
                log.append(f"host waits for {self.name}")

            def __enter__(self) -> None:
                log.append(f"on {self.name}")

            def __exit__(self, *error: object) -> None:
                log.append(f"off {self.name}")

        class Graph:
            """Its pool ends with the last graph that uses it."""

            pool: str | None = None

            def capture_begin(self, pool: str, capture_error_mode: str) -> None:
                log.append(f"begin in {pool}, {capture_error_mode}")
                assert users.get(pool, 1) > 0, "INTERNAL ASSERT FAILED: use_count > 0"
                self.pool = pool
                users[pool] = users.get(pool, 0) + 1

            def capture_end(self) -> None:
                log.append("end")
                if cuda.invalidated:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                log.append("replay")

            def __del__(self) -> None:
                if self.pool is not None:
                    users[self.pool] -= 1

        compute = Stream("compute")
        own: Any = Stream("capturing")
        patch.setattr("runtime.gpu.graphs.streams", lambda device: Streams(own, own, own))
        patch.setattr(torch.cuda, "current_stream", lambda device: compute)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")

    def take(self) -> list[str]:
        log, self.log[:] = list(self.log), []
        return log


AROUND = ["capturing waits for compute", "on capturing", "begin in the pool, thread_local"]


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_capturing_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    graphs = CudaGraphs(torch.device("cpu"))
    replay = graphs.capture(lambda: cuda.log.append("work"))
    assert cuda.take() == [*AROUND, "end", "off capturing", *AROUND, "work", "end", "off capturing"]
    replay()
    graphs.wait()
    assert cuda.take() == ["replay", "host waits for compute"]
    del replay
    graphs.capture(lambda: None)  # even though the earlier graph is gone
    assert cuda.take() == [*AROUND, "end", "off capturing"]


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_failed_capture_raises_its_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, ended = Cuda(monkeypatch), []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: ended.append(args), raising=False)
    graphs = CudaGraphs(torch.device("cpu"))
    graphs.capture(lambda: None)
    cuda.take()
    cuda.invalidated = True

    def failing() -> None:
        raise ValueError("what went wrong")

    with pytest.raises(ValueError, match="what went wrong"):
        graphs.capture(failing)
    assert cuda.take() == [*AROUND, "end", "off capturing"] and ended == [(0, "the pool")]
    with pytest.raises(RuntimeError, match="due to a previous error"):  # the only error
        graphs.capture(lambda: None)
    assert len(graphs.broken) == 2  # kept, because PyTorch may still refer to them


def test_sessions_come_and_go(load: Callable[..., Engine]) -> None:
    """A session that never decoded leaves its KV cache to the next, after all graphs are gone."""
    warnings.simplefilter("error")
    engine = load("16", offload="always", slots=3)
    expected = decoded(engine)
    for _ in range(2):
        one, two = engine.session(), engine.session()
        one.prefill(PROMPT)
        one.step(IDS[0])
        two.close()
        one.close()
        del one, two
        assert torch.equal(decoded(engine), expected)
        assert engine.runner.decoder is not None and engine.runner.decoder.capturing


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_at_a_size_where_libraries_pick_among_kernels(variant: Callable[..., Path], device: str) -> None:
    """Libraries compute a prompt's products, which are wide enough here for several kernels."""
    folder = variant(
        hidden=1024, ffn=1536, layers=3, experts=8, heads=8, kv_heads=2, head_dim=128, context=1024
    )
    prompt = [7 * i % 400 for i in range(1, 301)]

    def run(**options: Any) -> tuple[Tensor, Tensor]:
        with Engine.load(folder, EngineOptions(device=device, dtype="bfloat16", **options)) as engine:
            return engine.logits(prompt).cpu(), decoded(engine, prompt[:50])

    resident = run(offload="never")
    for slots in (2, 5):
        offloaded = run(offload="always", slots=slots, lookahead=2, prefetch=2)
        assert all(torch.equal(*pair) for pair in zip(offloaded, resident, strict=True))
