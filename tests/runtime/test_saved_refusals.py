"""Files that are no saved session of this model: one line says what they are, and nothing of them is used."""

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from runtime import Engine, RequestError, SamplingParams

PARAMS = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def saved(shared_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved conversation of one turn. Do not write to it."""
    file = tmp_path_factory.mktemp("saved") / "talk.session"
    with shared_engine.session("Be brief.") as session:
        session.send("def alpha")
        list(session.generate(PARAMS))
        session.save(file)
    return file


def refusal(engine: Engine, file: Path) -> str:
    """What the engine says of a file, without its path."""
    with pytest.raises(RequestError) as caught:
        engine.restore(file)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(file)) and len(message) < 600
    return message.removeprefix(f"{file}: ")


def test_of_another_model(
    load: Callable[..., Engine], saved: Path, checkpoint: Path, variant: Callable[..., Path], tmp_path: Path
) -> None:
    other = load(variant(ffn=48))
    name, mine = other.runner.identity.name, checkpoint.name
    assert refusal(other, saved) == (
        f"a conversation with the model '{mine}', and this is '{name}'; load the model that it was saved "
        "with, or begin a new conversation"
    )
    tuned = shutil.copytree(checkpoint, tmp_path / "tuned" / checkpoint.name)
    weights = tuned / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1  # the last bits of one weight
    weights.write_bytes(data)
    assert f"with the model '{mine}', and this is another model of that name;" in refusal(load(tuned), saved)
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert load(moved).restore(saved).messages[1]["content"] == "def alpha"


def test_of_another_dtype(load: Callable[..., Engine], saved: Path) -> None:
    assert refusal(load(dtype="bfloat16"), saved) == (
        "its keys and values are 'float32', and this engine computes in bfloat16; load the model with "
        "--dtype float32"
    )


def test_of_another_width_of_keys_and_values(
    load: Callable[..., Engine], engine: Engine, saved: Path, tmp_path: Path
) -> None:
    coded = load(kv=8)
    assert refusal(coded, saved) == (
        "its keys and values have '16' bits, and this engine keeps 8; load the model with --kv 16"
    )
    with coded.session() as session:
        session.send("def alpha")
        list(session.generate(PARAMS))
        session.save(tmp_path / "s")
    assert "have '8' bits, and this engine keeps 16; load" in refusal(engine, tmp_path / "s")


def test_longer_than_the_context(load: Callable[..., Engine], engine: Engine, saved: Path) -> None:
    length = len(engine.restore(saved).ids)
    assert refusal(load(context=length - 1), saved) == (
        f"the conversation has {length} tokens, and the context holds {length - 1}; begin a new one or raise "
        "--context"
    )
    session = load(context=length).restore(saved)
    session.send("more")
    with pytest.raises(RequestError, match="the context holds"):
        list(session.generate(PARAMS))


class Armed:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_pickles(engine: Engine, tmp_path: Path) -> None:
    file, trace = tmp_path / "s", tmp_path / "trace"
    for protocol in (2, 3, 4, 5):
        file.write_bytes(pickle.dumps(Armed(trace), protocol))
        assert refusal(engine, file).startswith("a pickle, which runs code when it is opened")
    torch.save({"keys": Armed(trace)}, file)
    assert refusal(engine, file).startswith("a pickle, which runs code when it is opened")
    file.write_bytes(pickle.dumps(Armed(trace), 0))
    assert refusal(engine, file).startswith("damaged, or not a saved session")
    assert not trace.exists()


def test_other_things(engine: Engine, checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    file, weights = tmp_path / "s", checkpoint / "model.safetensors"
    assert refusal(engine, tmp_path / "none") == "no such file; give a file that Session.save wrote"
    assert refusal(engine, tmp_path) == "a folder; give a file that Session.save wrote"
    os.mkfifo(tmp_path / "fifo")
    assert refusal(engine, tmp_path / "fifo") == "not a regular file; give a file that Session.save wrote"
    assert "a safetensors file of format 'pt', not a saved session;" in refusal(engine, weights)
    for data in (b"", b"1234567", b"GGUF" + bytes(60), b"\xff" * 64, b"version https://git-lfs", b"{}" * 99):
        file.write_bytes(data)
        assert refusal(engine, file).startswith("damaged, or not a saved session: ")
    file.write_bytes(saved.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    assert refusal(engine, file).startswith(
        "a saved session of version '2', and this program reads version 1"
    )


def test_no_damage_goes_unnoticed(engine: Engine, saved: Path, tmp_path: Path) -> None:
    chance, good, file = Random(11), saved.read_bytes(), tmp_path / "s"
    header = 8 + int.from_bytes(good[:8], "little")
    for case in range(400):
        data = bytearray(good)
        match case % 5:
            case 0:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                data[chance.randrange(header)] ^= 1 << chance.randrange(8)
            case 2:
                del data[chance.randrange(len(data)) :]
            case 3:
                at, size = chance.randrange(len(data)), chance.randint(1, 600)
                old = data[at : at + size]
                data[at : at + size] = chance.randbytes(size)
                if data[at : at + size] == old:
                    continue
            case _:
                data[chance.randrange(len(data)) : 0] = chance.randbytes(chance.randint(1, 40))
        file.write_bytes(data)
        refusal(engine, file)
    file.write_bytes(good)
    assert engine.restore(file).messages[0]["content"] == "Be brief."


def signed(header: dict[str, Any], body: bytes) -> bytes:
    """A file of this header and these tensors' bytes, with a digest that is right."""
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + body[:-32]
    return data + hashlib.sha256(data).digest()


def parted(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1 << 40, 1 << 62, 10**30, 1.5, "", "8", "F16", "I64", [], [0], [1 << 59], [3, 3], {},
    "[]", "[[]]", '[{"role": 1, "content": "x"}]', '[{"role": "user"}]', "[" * 9999, "null", "\ud800\n",
)  # fmt: skip


def test_forged_files_are_refused_or_are_conversations(engine: Engine, saved: Path, tmp_path: Path) -> None:
    """Digests that are right prove nothing: anyone can compute one."""
    chance, file = Random(12), tmp_path / "s"
    _, body = parted(saved)
    refused = 0
    for _ in range(300):
        header, _ = parted(saved)
        for _ in range(chance.randint(1, 2)):
            owner = chance.choice([header, *header.values(), header["__metadata__"]])
            if not isinstance(owner, dict) or not owner:
                continue
            key = chance.choice(list(owner))
            if chance.random() < 0.2:
                del owner[key]
            elif chance.random() < 0.1:
                owner[f"{key}x"] = owner.pop(key)
            else:
                owner[key] = chance.choice(VALUES)
            if "__metadata__" not in header:
                break
        file.write_bytes(signed(header, body))
        try:
            session = engine.restore(file)
        except RequestError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            refused += 1
        else:
            assert len(session.ids) == session.kv.length
            session.close()
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": "["}, "its messages are not JSON"),
        ({"messages": '[{"role": "user", "content": ["a"]}]'}, "its messages are not pairs"),
        ({"messages": "{}"}, "its messages are not pairs"),
        ({"model": "\x1b[2J" + "y" * 10**5, "model_sha256": "0"}, r"with the model '\\x1b[2Jy"),
        ({"kv": "8"}, "have '8' bits, and this engine keeps 16; load the model with --kv 8"),
        ({"dtype": "x\n"}, r"are 'x\\n', and"),
    ],
)
def test_forged_metadata(
    engine: Engine, saved: Path, tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    header, body = parted(saved)
    header["__metadata__"] |= change
    (tmp_path / "s").write_bytes(signed(header, body))
    assert reason.replace("\\\\", "\\") in refusal(engine, tmp_path / "s")


def test_ids_that_the_model_does_not_have(engine: Engine, saved: Path, tmp_path: Path) -> None:
    header, body = parted(saved)
    for id in (400, -1, 1 << 40):
        (tmp_path / "s").write_bytes(signed(header, struct.pack("<q", id) + body[8:]))
        assert "ids outside the vocabulary of 400" in refusal(engine, tmp_path / "s")


def test_a_header_that_promises_much_is_not_read(engine: Engine, tmp_path: Path) -> None:
    with (tmp_path / "s").open("wb") as file:
        file.write(struct.pack("<Q", 90 << 20))
        file.truncate(100 << 20)
    assert "promise a header of 94371840 bytes" in refusal(engine, tmp_path / "s")


def test_messages_that_no_header_has_room_for(engine: Engine, tmp_path: Path) -> None:
    session = engine.session("\u00e9" * (1 << 20))
    with pytest.raises(RequestError, match=r"s: the messages take 62\d+ bytes, and a saved session"):
        session.save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_file_changes_nothing(engine: Engine, saved: Path, tmp_path: Path) -> None:
    session = engine.session()
    session.send("def beta")
    expected = [token.logprob for token in session.generate(PARAMS)]
    session.close()
    data = bytearray(saved.read_bytes())
    data[-40] ^= 1
    (tmp_path / "s").write_bytes(data)
    assert refusal(engine, tmp_path / "s").startswith("damaged: its bytes do not have the SHA-256")
    session = engine.session()
    assert session.kv.length == 0
    session.send("def beta")
    assert [token.logprob for token in session.generate(PARAMS)] == expected


def test_a_closed_engine_restores_nothing(load: Callable[..., Engine], saved: Path) -> None:
    engine = load()
    engine.close()
    with pytest.raises(RequestError, match="the engine is closed"):
        engine.restore(saved)
