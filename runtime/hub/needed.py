"""Which of a model's files are needed."""

import re
from collections.abc import Collection
from pathlib import Path

from model.checkpoint import foreign
from model.checkpoint.files import INDEX, some, weight_names
from model.checkpoint.foreign import GGUF, STEMS
from model.errors import ModelError, quoted
from runtime.hub.names import HubName

SETTINGS = (
    "config.json", "generation_config.json", "params.json", "quantization.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "tekken.json", *(stem + INDEX for stem in STEMS),
)  # fmt: skip
TOKENIZER = "tokenizer.model"  # and Mistral's tokenizer.model.v3
PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE | re.ASCII)


def beside_weights(names: Collection[str]) -> list[str]:
    """The files of configuration and tokenizer, and the weights' index. They are small."""
    return sorted(name for name in names if name in SETTINGS or f"{name}.".startswith(f"{TOKENIZER}."))


def weights(name: HubName, names: Collection[str], folder: Path) -> list[str]:
    """The weight files of a model whose small files are in `folder`: in safetensors, each weight once.

    Raises `ModelError` if there are none that are read here, or if some are missing.
    """
    foreign.check_names(str(name), names)
    return weight_names(str(name), names, folder)


def ggufs(name: HubName, names: Collection[str]) -> list[str]:
    """The GGUF file that the name means, or all parts of the model that it belongs to, in order.

    Raises `ModelError` if there is no such file, or if no file is named and there are several models.
    """
    models: dict[object, list[str]] = {}
    for each in sorted(names):
        if each.lower().endswith(GGUF):
            models.setdefault(gguf_model(each), []).append(each)
    whole = [files[0] for files in models.values()]
    if name.file is not None and name.file not in names:
        listed = f"; it has {some(whole)}" if whole else ", and no other in GGUF"
        raise ModelError(f"{name.repo}: no file {quoted(name.file)}{listed}")
    if name.file is not None:
        return models[gguf_model(name.file)]
    if len(models) != 1:
        raise ModelError(
            f"{name.repo}: {len(models)} models in GGUF ({some(whole)}); name a file of one, as "
            f"{name.repo}/FILE.gguf"
        )
    return models[gguf_model(whole[0])]


def gguf_model(file: str) -> object:
    """What the names of one model's files have in common.

    >>> gguf_model("q4/a-00001-of-00002.gguf"), gguf_model("a-q4.gguf")
    (('q4/a', '00002'), 'a-q4.gguf')
    """
    match = PART.fullmatch(file)
    return match.groups() if match else file
