"""The engine: what it generates, when it ends, and that no request harms the next."""

import gc
import math
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from model.kv_cache import KVCache
from runtime import (
    DeviceError,
    Engine,
    EngineOptions,
    LoadError,
    PromptTooLong,
    RequestError,
    SamplingParams,
    Token,
)
from runtime.gpu.warm_up import take_planned
from runtime.planning.plan import PREFILL_CHUNK
from runtime.runner import ModelRunner

PROMPT = "def alpha_"


def greedy(count: int = 24, **others: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": count, "temperature": 0, "ignore_eos": True} | others)


def sampled(seed: int | None, count: int = 24) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=1, seed=seed, ignore_eos=True)


def ids_of(tokens: Any) -> list[int]:
    return [token.id for token in tokens]


def text_of(tokens: Any) -> str:
    return "".join(token.text for token in tokens)


def many_ids(count: int) -> list[int]:
    return torch.randint(3, 400, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def slow_greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    """Without a KV cache, computing the whole text again for each token."""
    made: list[int] = []
    for _ in range(count):
        made.append(int(engine.model(torch.tensor([ids + made]))[0, -1].argmax()))
    return made


@pytest.mark.parametrize("prompt", [PROMPT, "", "é🦊 = 1\n", "  "])
def test_greedy_ids_are_those_of_a_loop_without_a_cache(engine: Engine, prompt: str) -> None:
    ids = engine.tokenizer.encode(prompt)
    made = ids_of(engine.generate(prompt, greedy(16)))
    assert made == slow_greedy(engine, ids, 16)
    assert len(set(made)) > 3  # else nearly any loop would do


def test_ids_and_their_text_are_the_same_prompt(engine: Engine) -> None:
    of_text = list(engine.generate(PROMPT, greedy()))
    assert list(engine.generate(engine.tokenizer.encode(PROMPT, bos=True), greedy())) == of_text
    assert ids_of(engine.generate(engine.tokenizer.encode(PROMPT, bos=False), greedy())) != ids_of(of_text)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prompt", [PROMPT, "x\n"])
def test_the_texts_joined_are_what_the_ids_add_to_the_prompt(engine: Engine, prompt: str, seed: int) -> None:
    tokens = list(engine.generate(prompt, sampled(seed, 60)))
    ids = engine.tokenizer.encode(prompt)
    assert prompt + text_of(tokens) == engine.tokenizer.decode(ids + ids_of(tokens))


@pytest.mark.parametrize(
    "params", [greedy(), sampled(3), greedy(repetition_penalty=1.5, logit_bias={9: 3.0})]
)
def test_logprobs_are_the_models_own_whatever_the_options(engine: Engine, params: SamplingParams) -> None:
    prompt = engine.tokenizer.encode(PROMPT)
    tokens = list(engine.generate(prompt, params))
    logits = engine.logits(prompt + ids_of(tokens)[:-1])[len(prompt) - 1 :]
    expected = logits.log_softmax(-1)[range(len(tokens)), ids_of(tokens)]
    assert torch.allclose(torch.tensor([token.logprob for token in tokens]), expected, atol=1e-4)


def test_logits_are_those_of_one_forward_however_long_the_text(engine: Engine) -> None:
    ids = many_ids(PREFILL_CHUNK + 88)
    logits = engine.logits(ids)
    assert logits.shape == (600, 400) and logits.dtype == torch.float32
    assert torch.allclose(logits, engine.model(torch.tensor([ids]))[0], atol=1e-4)
    assert torch.allclose(engine.logits(ids[:1]), logits[:1], atol=1e-4)


@pytest.mark.parametrize("length", [PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 600])
def test_prompts_around_a_prefill_chunk(engine: Engine, length: int) -> None:
    ids = many_ids(length)
    assert ids_of(engine.generate(ids, greedy(3))) == slow_greedy(engine, ids, 3)


def test_prompts_go_through_the_model_in_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, forward = [], engine.model.forward

    def spy(ids: torch.Tensor, *args: Any, **words: Any) -> torch.Tensor:
        widths.append(ids.shape[1])
        return forward(ids, *args, **words)

    monkeypatch.setattr(engine.model, "forward", spy)
    list(engine.generate(many_ids(600), greedy(3)))
    assert widths == [512, 88, 1, 1]


def test_the_penalty_sees_prompt_and_new_tokens(engine: Engine) -> None:
    ids = many_ids(30)
    made = ids_of(engine.generate(ids, greedy(60, repetition_penalty=1e6)))
    seen, logits = set(ids), engine.logits(ids + made)
    for place, token in enumerate(made, start=len(ids) - 1):
        row = logits[place]
        fresh = [i for i in range(400) if i not in seen and row[i] > 0]
        assert token == max(fresh, key=lambda i: float(row[i]))
        seen.add(token)


# --- how a request ends


def test_max_new_tokens(engine: Engine) -> None:
    whole = list(engine.generate(PROMPT, greedy(10)))
    assert [token.finish for token in whole] == [None] * 9 + ["length"]
    (one,) = engine.generate(PROMPT, greedy(1))
    assert (one.id, one.finish) == (whole[0].id, "length")


@pytest.mark.parametrize(("length", "room"), [(15, 1), (14, 2), (1, 15)])
def test_a_full_context_ends_the_text(load: Callable[..., Engine], length: int, room: int) -> None:
    engine, ids = load(context=16), many_ids(length)
    tokens = list(engine.generate(ids, greedy(100)))
    assert [token.finish for token in tokens] == [None] * (room - 1) + ["context"]
    assert ids_of(tokens) == slow_greedy(engine, ids, room)
    assert [token.finish for token in engine.generate(ids, greedy(room))][-1] == "length"


@pytest.mark.parametrize("length", [16, 17, 600])
def test_a_prompt_that_leaves_no_room_is_refused_with_numbers(
    load: Callable[..., Engine], length: int
) -> None:
    engine = load(context=16)
    with pytest.raises(PromptTooLong, match=f"{length} tokens .* holds 16"):
        engine.generate(many_ids(length))
    assert engine.logits(many_ids(16)).shape == (16, 400)
    with pytest.raises(RequestError, match=r"17 ids .* context of 16"):
        engine.logits(many_ids(17))


def test_the_models_end_of_sequence_ids_end_the_text(
    engine: Engine, load: Callable[..., Engine], with_eos: Callable[..., Path]
) -> None:
    whole = list(engine.generate(PROMPT, greedy()))
    ids = ids_of(whole)
    late, early = ids[9], ids[6]
    first = min(ids.index(late), ids.index(early))
    other = load(with_eos([late, early, 399]))
    tokens = list(other.generate(PROMPT, greedy(ignore_eos=False)))
    assert ids_of(tokens) == ids[: first + 1]
    assert [token.finish for token in tokens] == [None] * first + ["eos"]
    assert text_of(tokens) == text_of(whole[:first])
    assert list(other.generate(PROMPT, greedy())) == whole


def test_without_an_end_of_sequence_id_it_is_the_tokenizers(
    load: Callable[..., Engine], with_eos: Callable[..., Path]
) -> None:
    engine = load(with_eos(None))
    tokens = list(engine.generate(PROMPT, greedy(ignore_eos=False, logit_bias={engine.tokenizer.eos_id: 99})))
    assert [(token.id, token.text, token.finish) for token in tokens] == [(2, "", "eos")]


def test_stop_strings_end_the_text_before_them_wherever_tokens_end(engine: Engine) -> None:
    whole = list(engine.generate(PROMPT, greedy(40)))
    text = text_of(whole)
    borders = [0]
    for token in whole:
        borders.append(borders[-1] + len(token.text))
    for border in borders[4:30:3]:
        stop = text[border - 1 : border + 3]
        tokens = list(engine.generate(PROMPT, greedy(40, stop=("\x00never", stop))))
        end = text.index(stop) + len(stop)
        assert text_of(tokens) == text[: text.index(stop)]
        assert len(tokens) == next(n for n, at in enumerate(borders) if at >= end)
        assert [token.finish for token in tokens] == [None] * (len(tokens) - 1) + ["stop"]


def test_text_that_only_looked_like_a_stop_string_is_given_at_the_end(engine: Engine) -> None:
    text = text_of(engine.generate(PROMPT, greedy(12)))
    tokens = list(engine.generate(PROMPT, greedy(12, stop=(text[-2:] + "\x00",))))
    assert text_of(tokens) == text and tokens[-1].finish == "length"
    assert tokens[-1].text.endswith(text[-2:])


def test_a_space_in_front_is_part_of_a_continuation_and_not_of_an_answer(engine: Engine) -> None:
    spaced = engine.tokenizer.encode("alpha", bos=False)[0]
    assert engine.tokenizer.vocabulary.decoded[spaced] == "\u2581alpha"
    params = greedy(1, logit_bias={spaced: 99.0})
    assert text_of(engine.generate("def", params)) == " alpha"
    session = engine.session()
    session.send("def")
    assert text_of(session.generate(params)) == "alpha"


def test_half_a_character_at_the_end_is_shown_as_such(engine: Engine) -> None:
    first_of_two = next(i for i, piece in enumerate(engine.tokenizer.vocabulary.decoded) if piece == 0xC3)
    (token,) = engine.generate(PROMPT, greedy(1, logit_bias={first_of_two: 99.0}))
    assert (token.id, token.text) == (first_of_two, "\ufffd")


# --- chance


def test_a_seed_gives_the_same_text_and_another_seed_another(engine: Engine) -> None:
    texts = [ids_of(engine.generate(PROMPT, sampled(seed))) for seed in (1, 2, 3, 1, 2, 3)]
    assert texts[:3] == texts[3:]
    assert len({tuple(text) for text in texts}) == 3


def test_without_a_seed_texts_differ(engine: Engine) -> None:
    assert ids_of(engine.generate(PROMPT, sampled(None))) != ids_of(engine.generate(PROMPT, sampled(None)))


def test_loading_and_generating_leave_the_global_source_of_chance_alone(load: Callable[..., Engine]) -> None:
    before = torch.random.get_rng_state()
    engine = load()
    undisturbed = ids_of(engine.generate(PROMPT, sampled(1)))
    list(engine.generate(PROMPT, sampled(None)))
    assert torch.equal(torch.random.get_rng_state(), before)
    disturbed = []
    for token in engine.generate(PROMPT, sampled(1)):
        torch.rand(7)
        disturbed.append(token.id)
    assert disturbed == undisturbed


# --- requests that fail or are left

FAILURES: list[tuple[Any, dict[str, Any], str]] = [
    ("", {"logit_bias": {400: 1.0}}, "logit_bias names token 400, and ids end at 399"),
    ("x" * 3000, {}, "context holds 640"),
    ("\ud800", {}, "lone surrogate"),
    ([], {}, "empty"),
    ([5, -1], {}, "-1"),
    ([5, 400], {}, "400"),
    ([5, "a"], {}, "'a'"),
    ([1.0], {}, "1.0"),
    (5, {}, "of type int"),
    (torch.tensor(5), {}, "of type Tensor"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), FAILURES)
def test_bad_requests_fail_at_once_and_the_next_one_is_right(
    engine: Engine, prompt: Any, options: dict[str, Any], message: str
) -> None:
    expected = list(engine.generate(PROMPT, greedy()))
    before = engine.stats()
    with pytest.raises(RequestError, match=message):
        engine.generate(prompt, greedy(**options))
    assert engine.stats() == before
    assert list(engine.generate(PROMPT, greedy())) == expected


@pytest.mark.parametrize("ids", [[], [400], [-1]])
def test_logits_check_their_ids(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(RequestError):
        engine.logits(ids)


def test_a_request_may_fail_midway(engine: Engine) -> None:
    expected = list(engine.generate(PROMPT, greedy()))
    nothing_left = SamplingParams(logit_bias=dict.fromkeys(range(400), -math.inf))
    with pytest.raises(RequestError, match="no token"):
        next(engine.generate(PROMPT, nothing_left))
    assert list(engine.generate(PROMPT, greedy())) == expected


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("forward", [0, 1, 2, 5])
def test_an_interrupted_request_does_no_harm(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, layer: int, forward: int
) -> None:
    ids = many_ids(600)  # two forwards for the prompt
    other = ids[:10] + ids[:9:-1]
    session = engine.session()
    list(session.complete(other, greedy(3)))
    with monkeypatch.context() as patch:
        block, calls = engine.model.layers[layer], []
        real = block.forward

        def interrupted(*args: Any) -> Any:
            calls.append(args)
            if len(calls) > forward:
                raise KeyboardInterrupt
            return real(*args)

        patch.setattr(block, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.complete(ids, greedy()))
    for prompt in (ids, other) if layer else (other, ids):
        expected = ids_of(engine.generate(prompt, greedy()))
        assert ids_of(session.complete(prompt, greedy())) == expected


def test_a_request_left_midway_gives_its_cache_back(load: Callable[..., Engine]) -> None:
    engine = load()
    expected = list(engine.generate(PROMPT, greedy()))
    for count in (1, 2, 5):
        tokens = engine.generate("something = else", sampled(None))
        for _ in range(count):
            next(tokens)
        tokens.close()  # type: ignore[attr-defined]
        assert list(engine.generate(PROMPT, greedy())) == expected
    assert len(engine.runner.idle_kvs) == 1


def test_a_model_that_computes_nan_is_a_failed_request(
    load: Callable[..., Engine], variant: Callable[..., Path]
) -> None:
    engine = load(variant(spoil=True))
    for params in (greedy(), sampled(1)):
        with pytest.raises(RequestError, match=r"NaN; try --dtype float32"):
            list(engine.generate(PROMPT, params))


# --- several at a time


def test_generators_taken_in_turns_give_what_each_gives_alone(engine: Engine) -> None:
    prompts = (PROMPT, "index = ", "return beta")
    alone = [ids_of(engine.generate(prompt, sampled(5))) for prompt in prompts]
    in_turns = zip(*(engine.generate(prompt, sampled(5)) for prompt in prompts), strict=True)
    assert [list(ids) for ids in zip(*(ids_of(row) for row in in_turns), strict=True)] == alone


def test_threads_give_what_each_gives_alone(engine: Engine) -> None:
    prompts = (PROMPT, "index = ", "return beta", "for n")
    alone = {prompt: list(engine.generate(prompt, sampled(5))) for prompt in prompts}
    together: dict[str, list[Token]] = {}
    start = threading.Barrier(len(prompts))

    def work(prompt: str) -> None:
        start.wait()
        together[prompt] = list(engine.generate(prompt, sampled(5)))

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_engines_of_one_process_know_nothing_of_each_other(
    engine: Engine, load: Callable[..., Engine], variant: Callable[..., Path]
) -> None:
    other = load(variant(layers=1, context=100))
    mine, theirs = list(engine.generate(PROMPT, greedy())), list(other.generate(PROMPT, greedy()))
    assert ids_of(mine) != ids_of(theirs)
    pairs = list(zip(engine.generate(PROMPT, greedy()), other.generate(PROMPT, greedy()), strict=True))
    assert ([a for a, _ in pairs], [b for _, b in pairs]) == (mine, theirs)
    other.close()
    assert list(engine.generate(PROMPT, greedy())) == mine


# --- loading and closing


def test_a_closed_engine_serves_nothing_and_holds_nothing(load: Callable[..., Engine]) -> None:
    with load() as engine:
        session, tokens = engine.session(), engine.generate(PROMPT)
        next(tokens)
        session.send("x")
        model, kv = weakref.ref(engine.model), weakref.ref(session.kv)
    engine.close()  # twice is fine
    for use in (
        lambda: next(tokens),
        lambda: engine.generate(PROMPT),
        lambda: engine.generate([1, 2]),
        lambda: engine.session(),
        lambda: engine.logits([1]),
        lambda: session.generate(),
        lambda: session.complete([1, 2]),
    ):
        with pytest.raises(RequestError, match="the engine is closed"):
            use()
    session.close()
    session = tokens = use = None  # type: ignore[assignment]
    gc.collect()
    assert model() is None and kv() is None and engine.stats().requests == 1


def test_ids_beyond_the_tokenizers_are_never_generated(
    load: Callable[..., Engine], variant: Callable[..., Path]
) -> None:
    engine = load(variant(vocab=600))
    assert engine.logits([1, 599]).shape == (2, 600)
    made = ids_of(engine.generate(PROMPT, SamplingParams(100, temperature=100, seed=0, ignore_eos=True)))
    assert max(made) < 400 and len(set(made)) > 50
    assert len(list(engine.generate([1, 599], greedy(max_new_tokens=2, logit_bias={400: 1.0})))) == 2
    assert engine.tokenizer.decode([1, 599]) == ""
    with pytest.raises(RequestError, match="600"):
        engine.generate([1, 600])
    with pytest.raises(RequestError, match="logit_bias names token 600"):
        engine.generate(PROMPT, greedy(logit_bias={600: 1.0}))


def test_an_end_that_only_the_configuration_names_ends_the_text(
    load: Callable[..., Engine], variant: Callable[..., Path]
) -> None:
    engine = load(variant(vocab=600, eos_ids=(500,)))
    params = SamplingParams(2000, temperature=100, seed=0, logit_bias={engine.tokenizer.eos_id: -math.inf})
    made = list(engine.generate(PROMPT, params))
    assert made[-1].finish == "eos" and made[-1].id == 500
    assert max(token.id for token in made[:-1]) < 400


def test_a_tokenizer_larger_than_the_model_is_refused(
    load: Callable[..., Engine], variant: Callable[..., Path]
) -> None:
    with pytest.raises(LoadError, match=r"400 ids and the model 300"):
        load(variant(vocab=300))


def test_what_is_wrong_with_a_folder_is_a_load_error(
    load: Callable[..., Engine], variant: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(LoadError):
        load(tmp_path)
    folder = variant()
    (folder / "tokenizer.model").unlink()
    with pytest.raises(LoadError, match=r"tokenizer\.model"):
        load(folder)


def test_without_a_path_it_is_the_demo(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.DEMO", checkpoint)
    with Engine.load() as engine:
        assert engine.config.vocab == 400


def test_progress_is_told_of_every_byte(checkpoint: Path) -> None:
    told: list[int] = []

    @contextmanager
    def progress(total: int) -> Any:
        told.append(-total)
        yield told.append
        told.append(0)

    Engine.load(checkpoint, progress=progress).close()
    assert sum(told) == 0 and told[-1] == 0 and -told[0] > 100_000


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-6), ("bfloat16", 0.8), ("float16", 0.1)])
def test_every_dtype_runs(engine: Engine, load: Callable[..., Engine], dtype: str, close: float) -> None:
    other = load(dtype=dtype)
    assert other.dtype == other.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    ids = many_ids(20)
    assert (other.logits(ids) - engine.logits(ids)).abs().max() < close
    assert len(list(other.generate(ids, greedy(5)))) == 5


# --- counters


def test_counters_are_exact(engine: Engine) -> None:
    assert engine.stats().requests == engine.stats().new_tokens == 0
    list(engine.generate(many_ids(600), greedy(1)))
    list(engine.generate(many_ids(7), greedy(5)))
    tokens = engine.generate(many_ids(3), greedy(5))
    next(tokens), next(tokens)
    engine.logits(many_ids(11))
    stats = engine.stats()
    assert (stats.requests, stats.prompt_tokens, stats.reused_tokens) == (3, 610, 0)
    assert (stats.new_tokens, stats.decoded_tokens) == (8, 5)
    next(tokens)
    assert (stats.new_tokens, engine.stats().new_tokens) == (8, 9)  # a copy does not move


def test_times_add_up_and_leave_out_the_reader(engine: Engine) -> None:
    began, seen = time.perf_counter(), [engine.stats()]
    for _ in engine.generate(many_ids(100), greedy(4)):
        seen.append(engine.stats())
        time.sleep(0.05)
    elapsed = time.perf_counter() - began
    last = seen[-1]
    assert 0 < last.prompt_seconds == last.first_token_seconds
    assert all(a.decode_seconds < b.decode_seconds for a, b in pairwise(seen[1:]))
    assert last.prompt_seconds + last.decode_seconds <= elapsed - 4 * 0.05
    assert last.prompt_rate == pytest.approx(100 / last.prompt_seconds)
    assert last.decode_rate == pytest.approx(3 / last.decode_seconds)
    assert seen[0].prompt_rate == seen[0].decode_rate == 0


def test_an_engine_may_be_loaded_and_used_in_and_out_of_inference_mode(checkpoint: Path) -> None:
    """Tensors that outlive a request are made outside of inference mode."""
    options = EngineOptions(device="cpu", dtype="float32", offload="always")
    params = SamplingParams(max_new_tokens=4, temperature=0)
    with torch.inference_mode():
        engine = Engine.load(checkpoint, options)
        inside = ids_of(engine.generate([1, 2, 3], params))
        assert engine.runner.cache and not engine.runner.cache.pool.is_inference()
    with engine:
        assert ids_of(engine.generate([1, 2, 3], params)) == inside
        outside = engine.logits([1, 2, 3])
        with torch.inference_mode():
            assert torch.equal(engine.logits([1, 2, 3]), outside)
        assert not outside.is_inference()


def test_on_a_gpu_what_is_planned_is_taken_at_once(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    for module in ("runtime.gpu.warm_up", "runtime.runner"):
        monkeypatch.setattr(f"{module}.release", lambda device: calls.append("release"))
    monkeypatch.setattr("runtime.gpu.warm_up.reserve", lambda device, size: calls.append(size))
    monkeypatch.setattr(KVCache, "allocate", lambda *words: calls.append("kv") or KVCache([], 1, words[2]))
    engine = load()
    assert calls == []
    engine.runner.device = torch.device("cuda")
    take_planned(engine.runner)
    assert calls == ["release", "kv", engine.plan.workspace_bytes]
    assert engine.runner.take_kv().capacity == engine.plan.context and len(calls) == 3
    engine.close()
    assert calls[3:] == ["release"]


def test_an_engine_whose_plan_is_not_there_is_closed(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ModelRunner] = []

    def fail(runner: ModelRunner, compiling: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("runtime.startup.prepare", fail)
    monkeypatch.setattr(ModelRunner, "close", lambda runner: closed.append(runner))
    with pytest.raises(DeviceError, match=r"out of memory \(CUDA out of memory. Tried to allocate 2 GiB\)"):
        load()
    assert len(closed) == 1
