"""The names of files that `tools.quantize` writes. It replaces and removes no others."""

from collections.abc import Mapping
from pathlib import Path

from model.checkpoint.files import SHARD
from tokenizer import Tokenizer, TokenizerError
from tokenizer.model_file import JSON, find_model, read_model
from tokenizer.model_file import NAME as TOKENIZER

CONFIG, INDEX, RECORD = "config.json", "model.safetensors.index.json", "quantization.json"
DOWNLOAD = "quantize.download"  # a folder of what the next file is made from, if the source is at the hub
GENERATION = "generation_config.json"
COPIED = (
    TOKENIZER, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "tekken.json", GENERATION,
)  # fmt: skip


def is_ours(name: object) -> bool:
    """Whether this program may have written a file of this name to its output's folder.

    >>> [is_ours(name) for name in ("config.json", "model-00001-of-00033.safetensors", "tokenizer.model.v3")]
    [True, True, True]
    >>> [is_ours(name) for name in ("thesis.txt", "../config.json", "/etc/passwd", "..", "", 3)]
    [False, False, False, False, False, False]
    """
    if not isinstance(name, str):
        return False
    shard = SHARD.fullmatch(name)
    return name in (CONFIG, INDEX, RECORD, *COPIED) or is_tokenizer(name) or bool(shard and name.isascii())


def is_tokenizer(name: str) -> bool:
    """Whether this names a sentencepiece model: `tokenizer.model`, or Mistral's `tokenizer.model.v3`."""
    ending = name.removeprefix(TOKENIZER)
    if ending == name or ending == ".part" or not name.isascii():
        return False
    return ending == "" or (ending[0] == "." and ending[1:].isalnum())


def files_to_copy(
    found: Mapping[str, Path | bytes], tokenizer: Path | None = None
) -> dict[str, Path | bytes]:
    """The files that go along with the weights, by their new names: tokenizer, chat template, and settings of
    generation. `found` are those of the source, or their contents.

    If `tokenizer` is a folder, its files replace all of the source's but the settings of generation. If it is
    a file, it replaces the source's tokenizer. Raises `TokenizerError` if it holds no tokenizer.
    """
    if tokenizer is None:
        return dict(found)
    file = find_model(tokenizer)
    read_model(file)
    if tokenizer.is_dir():
        settings = {name: path for name, path in found.items() if name == GENERATION}
        return dict(sorted({**copied_from(tokenizer), **settings}.items()))
    name = file.name if file.name in COPIED or is_tokenizer(file.name) else TOKENIZER
    others = {name: path for name, path in found.items() if not is_tokenizer(name)}
    return dict(sorted({**others, name: file}.items()))


def copied_from(folder: Path) -> dict[str, Path | bytes]:
    """The files of a folder that go along, by their names."""
    names = sorted({*COPIED, *(path.name for path in folder.glob(TOKENIZER + ".*"))})
    return {
        name: folder / name
        for name in names
        if (name in COPIED or is_tokenizer(name)) and (folder / name).is_file()
    }


def tokenizer_missing(source: Path, found: Mapping[str, Path | bytes]) -> str | None:
    """Why an output with the tokenizer that was found in `source` cannot generate text; None if it can."""
    if isinstance(found.get(TOKENIZER), bytes):
        return None
    try:
        file = find_model(source)
        read_model(file)
        if file.name == JSON:
            Tokenizer.load(source)  # which may find that it cannot be turned into a sentencepiece model
    except TokenizerError as error:
        return f"{error}, or name another by --tokenizer: without one the output generates no text"
    return None
