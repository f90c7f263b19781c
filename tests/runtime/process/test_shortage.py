"""Memory that runs short is a `MixtralError` of one line, however it surfaces. The next request is right."""

import errno
import re
import subprocess
import sys

import pytest
import torch

from runtime import RequestError
from runtime.process.shortage import ran_short, shortage_as

SHORT: list[BaseException] = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: ..."
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError(
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    ),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("can't start new thread"),
    RuntimeError("could not create a primitive"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHER: list[BaseException] = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_shortage_is_told_in_one_line(error: BaseException) -> None:
    assert ran_short(error)
    with pytest.raises(RequestError) as caught, shortage_as(RequestError):
        raise error
    assert re.fullmatch(r"out of memory \(.+\); lower --context, or free some", str(caught.value))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    assert not ran_short(error)
    with pytest.raises(type(error)) as caught, shortage_as(RequestError):
        raise error
    assert caught.value is error


LIMITED = """
import resource, sys, warnings
warnings.simplefilter("ignore")
from runtime import Engine, EngineOptions, MixtralError, SamplingParams

OPTIONS = EngineOptions(device="cpu", context=1024, threads=2, {more})
PARAMS = SamplingParams(max_new_tokens=3, temperature=0)
SHORT, LONG = list(range(300, 310)), list(range(300, 1300))

def limit(extra):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if extra is None else used + extra, hard))

def ids(engine, prompt):
    return [token.id for token in engine.generate(prompt, PARAMS)]

def attempt(work):
    try:
        return work()
    except MixtralError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 500, error
        return None

def exhausted():
    # take what the allocator still holds, down to pieces of 64 KiB
    taken = []
    for size in (1 << 20, 1 << 16):
        try:
            while True:
                taken.append(bytearray(size))
        except MemoryError:
            pass
    return taken

def load():
    with Engine.load(None, OPTIONS) as engine:
        return ids(engine, SHORT)

failed = 0
for extra in (1, 16, 40):  # first of all, since no memory is there yet to be reused
    limit(extra << 20)
    failed += attempt(load) is None
    limit(None)
assert failed, "no limit was small enough to fail a load"
expected = load()
failed = 0
with Engine.load(None, OPTIONS) as engine:
    for extra in (0, 1, 8):
        limit(extra << 20)
        taken = exhausted() if extra == 0 else []
        failed += attempt(lambda: ids(engine, LONG)) is None
        del taken
        limit(None)
        assert ids(engine, SHORT) == expected, extra
assert failed, "no limit was small enough to fail a request"
print("failed", failed)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "more", ['dtype="float32"', 'dtype="bfloat16", slots=3'], ids=["resident", "offloaded"]
)
def test_under_a_real_limit(more: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.replace("{more}", more)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("failed"), done.stdout
