"""Which of a model's files are needed."""

from collections.abc import Collection
from pathlib import Path

from model.checkpoint import foreign
from model.checkpoint.files import INDEX, some, weight_names
from model.checkpoint.foreign import GGUF, STEMS
from model.errors import ModelError
from runtime.hub.names import HubName

SETTINGS = (
    "config.json", "generation_config.json", "params.json", "quantization.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "tekken.json", *(stem + INDEX for stem in STEMS),
)  # fmt: skip
TOKENIZER = "tokenizer.model"  # and Mistral's tokenizer.model.v3


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
    """The GGUF file that the name means, or its parts. Raises `ModelError` if there are several to choose
    from."""
    found = sorted(each for each in names if each.lower().endswith(GGUF))
    if name.file is not None:
        found = [each for each in found if each == name.file]
    whole = {each.rpartition("-of-")[0].rpartition("-")[0] or each for each in found}
    if len(whole) != 1:
        listed = f"{len(found)} GGUF files ({some(found)})" if found else f"no {name.file}"
        raise ModelError(f"{name.repo}: has {listed}; name one of its files, as {name.repo}/FILE.gguf")
    return found
