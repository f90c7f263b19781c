"""Whatever goes wrong between here and the hub is one line, with what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dev.loopback_hub import LoopbackHub
from model.errors import ModelError
from runtime import LoadError, generate
from runtime.hub import cache as cache_module
from runtime.hub import fetching, remote
from runtime.hub.headers import FIRST
from runtime.hub.opening import find_folder, open_headers
from tests.runtime.hub.conftest import NAME, WEIGHTS
from tools.quantize import command

AGAIN = "the same command goes on where it was"


def refusal(name: str = NAME, find: Callable[[str], object] = find_folder) -> str:
    with pytest.raises((LoadError, ModelError)) as error:
        find(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def constant(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, name, value)


@pytest.mark.parametrize("find", [find_folder, open_headers])
def test_no_such_model_or_revision(hub: LoopbackHub, demo: Path, find: Callable[[str], object]) -> None:
    hub.add("org/private", demo, access="private")
    for name in ("org/none", "org/private", "models/mixtral"):
        assert refusal(name, find) == (
            f"{name}: no such folder, and no such model at {hub.url}, unless it is private and needs a token "
            "(hf auth login, or HF_TOKEN)"
        )
    assert refusal(f"{NAME}@v9", find) == f"{NAME}@v9: no revision 'v9'; look at {hub.url}/{NAME}"


def test_gated(hub: LoopbackHub, demo: Path) -> None:
    hub.add("org/gated", demo, access="gated")
    assert refusal("org/gated") == (
        f"org/gated: gated; accept the terms at {hub.url}/org/gated, and give a token (hf auth login, or "
        "HF_TOKEN)"
    )


def test_tokens(hub: LoopbackHub, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for access in ("private", "gated"):
        hub.add(f"org/{access}", demo, access=access, token=f"hf_{access}")
        monkeypatch.setenv("HF_TOKEN", f"hf_{access}")
        assert (find_folder(f"org/{access}") / WEIGHTS).is_file()
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    assert refusal("org/none") == (
        f"org/none: {hub.url} answered with status 401: the token is not valid; hf auth login again, or mend "
        "HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_é")
    assert refusal("org/none") == "org/none: the token has a character that no token has; mend HF_TOKEN"


def test_no_name(hub: LoopbackHub) -> None:
    """What is no name at the hub is a path, and nothing is asked."""
    for name in ("mixtral", "./org/demo", "/org/demo", "a/b/c", "org/demo@", "org/", "~/org"):
        assert generate.main(["--model", name, "--prompt", "a"]) == 1
    for name in ("org/na--me", "org/name.git", "org/name-"):
        assert refusal(name) == f"{name}: no such folder, and no model at the hub can have such a name"
    assert hub.requests == []


def test_a_path_is_no_such_folder(hub: LoopbackHub, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--model", "./org/demo", "--prompt", "a"]) == 1
    assert capfd.readouterr() == ("", "error: org/demo: no such folder\n")


def test_nobody_answers(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        constant(monkeypatch, "ENDPOINT", url)
        monkeypatch.setattr(remote, "TIMEOUT", 0.2)
        line = f"{NAME}: no such folder, and no connection to {url} (ReadTimeout); try again later"
        assert refusal() == line
    assert refusal() == line.replace("ReadTimeout", "ConnectError")


def test_broken_off_for_good(hub: LoopbackHub, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"{NAME}: no connection to {hub.url} (RemoteProtocolError); {AGAIN}"
    hub.breaks = lambda file, left: 0 if file == WEIGHTS else None  # even the header's bytes
    assert refusal() == line
    cuts = iter([1_000_000])
    hub.breaks = lambda file, left: next(cuts, 0) if file == WEIGHTS and left > FIRST else None
    assert refusal() == line
    hub.breaks = lambda file, left: None
    hub.requests.clear()
    folder = find_folder(NAME)
    assert (folder / WEIGHTS).read_bytes() == (demo / WEIGHTS).read_bytes()
    assert hub.served(WEIGHTS)[1:] == [(1_000_000, (demo / WEIGHTS).stat().st_size - 1_000_000)]


def test_the_hub_fails(hub: LoopbackHub, demo: Path) -> None:
    for status, rest in {
        500: f"500; try again later, and {AGAIN}",
        429: f"429; try again later, and {AGAIN}",
        403: "403: the token does not permit this, or the model is disabled; look at its page",
    }.items():
        hub.status = status
        assert refusal() == f"{NAME}: {hub.url} answered with status {rest}"


@pytest.mark.parametrize("page", ["<html>Please sign in</html>", "[]", "{}", '{"id": "org/demo"}'])
def test_the_answer_is_no_hubs(hub: LoopbackHub, page: str) -> None:
    hub.page = page
    line = (
        f"{NAME}: no such folder, and {hub.url} does not answer as a hub does \\(\\w+\\); look at HF_ENDPOINT"
    )
    assert re.match(line, refusal())


def test_an_endpoint_that_is_no_address(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://[", "localhost", "ftp://localhost"):
        constant(monkeypatch, "ENDPOINT", url)
        assert refusal().startswith(f"{NAME}: no such folder, and ") and url in refusal()


def test_ranges_are_ignored(hub: LoopbackHub, demo: Path) -> None:
    hub.ranges = False
    rest = r" is not served from byte 0 of \d+ \(status 200\); the hub, or a proxy before it, is at fault"
    assert re.fullmatch(rf"{NAME}: [\w.]+{rest}", refusal())


def test_offline(hub: LoopbackHub, demo: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constant(monkeypatch, "HF_HUB_OFFLINE", True)
    line = (
        f"{NAME}: no such folder, and not all of it is in the cache ({cache}); unset HF_HUB_OFFLINE to "
        "download it"
    )
    assert refusal() == line == refusal(find=open_headers)
    constant(monkeypatch, "HF_HUB_OFFLINE", False)
    folder = find_folder(NAME)
    hub.requests.clear()
    constant(monkeypatch, "HF_HUB_OFFLINE", True)
    assert find_folder(NAME) == folder
    (folder / "tokenizer.model").unlink()
    assert find_folder(NAME) == folder  # the engine says that there is no tokenizer
    (folder / WEIGHTS).unlink()
    assert refusal() == line and hub.requests == []


def test_too_little_room(hub: LoopbackHub, demo: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (demo / WEIGHTS).stat().st_size

    def disk(free: int) -> None:
        monkeypatch.setattr(
            cache_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free)
        )

    disk(size - 1)
    assert refusal() == (
        f"{NAME}: 17.1 MiB are to be downloaded to {cache}/models--org--demo/blobs, and 17.1 MiB are free; "
        "make room, or name another disk by HF_HOME"
    )
    assert hub.served(WEIGHTS) == [(0, FIRST)]
    cuts = iter([5_000_000])
    hub.breaks = lambda file, left: next(cuts, 0) if file == WEIGHTS and left > FIRST else None
    disk(size)
    refusal()
    hub.breaks = lambda file, left: None
    disk(size - 5_000_000)  # what has come needs no more room
    assert (find_folder(NAME) / WEIGHTS).stat().st_size == size


def test_a_full_disk(hub: LoopbackHub, demo: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(fetching.os, "fsync", full)
        assert refusal() == f"{NAME}: the disk is full ({cache}); make room, and {AGAIN}"
    assert (find_folder(NAME) / WEIGHTS).is_file()


def test_a_cache_that_cannot_be_written(
    hub: LoopbackHub, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    constant(monkeypatch, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    assert re.fullmatch(
        f"{NAME}: {tmp_path}/file.*: Not a directory; name another cache by HF_HOME", refusal()
    )


def test_without_the_library(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refusal() == (
        f"{NAME}: no such folder; if it is a model at the Hugging Face hub, pip install huggingface_hub to "
        "download it"
    )


def other(folder: Path, files: dict[str, bytes], **config: object) -> Path:
    """A model of another program, with weights of a megabyte."""
    folder.mkdir()
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


LARGE = bytes(1 << 20)
WEIGHTS_OF_ANOTHER = save({"a": torch.zeros(1 << 20, dtype=torch.uint8)})
MIXTRAL = json.loads((Path(generate.__file__).parent / "demo/config.json").read_text())
OTHERS: dict[str, tuple[dict[str, bytes], dict[str, object], str]] = {
    "org/gguf": ({"a.gguf": LARGE}, {}, "org/gguf: the weights are in GGUF ('a.gguf'); convert it with"),
    "org/pickles": (
        {"pytorch_model.bin": LARGE},
        MIXTRAL,
        "org/pickles: the weights are pickles ('pytorch_model.bin')",
    ),
    "org/gptq": (
        {"model.safetensors": WEIGHTS_OF_ANOTHER},
        MIXTRAL | {"quantization_config": {"quant_method": "gptq"}},
        "config.json: the weights were quantized by 'gptq'",
    ),
    "org/old-gptq": (
        {"gptq_model-4bit.safetensors": LARGE},
        MIXTRAL,
        "org/old-gptq: the weights were quantized by",
    ),
    "org/lora": (
        {"adapter_config.json": b"{}", "adapter_model.safetensors": LARGE},
        {},
        "org/lora: a LoRA adapter",
    ),
    "org/qwen": (
        {"model.safetensors": WEIGHTS_OF_ANOTHER},
        MIXTRAL | {"model_type": "qwen2_moe"},
        "config.json: model_type",
    ),
    "org/empty": ({"README.md": b"#"}, {}, "org/empty: no weights"),
}


@pytest.fixture(params=OTHERS)
def foreign(request: pytest.FixtureRequest, hub: LoopbackHub, tmp_path: Path) -> Iterator[tuple[str, str]]:
    name: str = request.param
    files, config, line = OTHERS[name]
    hub.add(name, other(tmp_path / "other", files, **config))
    yield name, line
    assert sum(each.sent for each in hub.requests) < 3 * FIRST


def test_nothing_large_is_downloaded_of_what_is_refused(foreign: tuple[str, str]) -> None:
    name, line = foreign
    for find in (find_folder, open_headers):
        assert line in refusal(name, find)


@pytest.mark.parametrize("foreign", sorted(OTHERS.keys() - {"org/gguf"}), indirect=True)
def test_quantizing_refuses_the_same(
    foreign: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, line = foreign
    assert command.main([name, str(tmp_path / "out")]) == 1
    error = capfd.readouterr().err
    assert line in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_file_is_named_to_the_engine(hub: LoopbackHub) -> None:
    assert refusal("org/name/a.gguf") == (
        "org/name/a.gguf: a GGUF file; convert it with python -m tools.quantize org/name/a.gguf OUT"
    )
    assert hub.requests == []
