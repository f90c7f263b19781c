"""Damaged configurations of the model, of generation and of the tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from dev.harness.answers import answers, check_answers, use
from dev.harness.mutate.json_tree import as_text, mutated
from dev.harness.mutate.values import NUMBERS, weird
from dev.harness.outcome import Verdict
from dev.harness.part import Case
from dev.harness.subject import Subject

OTHERS: dict[str, Any] = {  # other files that a checkpoint may have
    "generation_config.json": {"eos_token_id": [2, 7], "bos_token_id": 1, "temperature": 0.5},
    "tokenizer_config.json": {
        "bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "add_bos_token": True,
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True, "lstrip": False},
            "2": {"content": "</s>", "special": True, "lstrip": False},
        },
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    },
    "added_tokens.json": {"<unk>": 0, "</s>": 2},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
}  # fmt: skip
HARMLESS = {
    "_name_or_path": "x", "transformers_version": "9.9", "use_cache": False, "router_jitter_noise": 0.1,
    "tie_word_embeddings": True,  # the files have a head
    "rope_scaling": {"type": "linear", "factor": 1.0},
}  # fmt: skip
STRANGE = (
    "rope_scaling", "rope_parameters", "quantization_config", "eos_token_id", "head_dim", "sliding_window",
    "added_tokens_decoder", "chat_template", "eos_token", "moe", "model_type", "tie_word_embeddings",
)  # fmt: skip


@contextmanager
def open_configs(subject: Subject) -> Iterator[Case]:
    folders = [subject.copy(folder, f"configs-{folder.name}") for folder in subject.layouts]
    known = {folder: answers(folder) for folder in folders}

    def case(chance: Random) -> Verdict:
        folder = chance.choice(folders)
        target, original = chosen(folder, chance)
        kept = target.read_bytes() if target.is_file() else None
        try:
            if chance.random() < 0.05 and target.name == "config.json":
                target.write_text(json.dumps(original | HARMLESS, indent=chance.choice((None, 1))))
                check_answers(folder, known[folder], "settings that the network does not have")
            else:
                target.write_bytes(as_text(changed(original, chance), chance))
                use(folder)
            return Verdict.ACCEPTED
        finally:
            target.unlink()
            if kept is not None:
                target.write_bytes(kept)

    yield case


def chosen(folder: Path, chance: Random) -> tuple[Path, Any]:
    """A file to damage, and its undamaged contents."""
    if chance.random() < 0.5:
        other = chance.choice(list(OTHERS))
        return folder / other, OTHERS[other]
    target = folder / ("params.json" if folder.name == "configs-mistral" else "config.json")
    return target, json.loads(target.read_bytes())


def changed(original: Any, chance: Random) -> Any:
    if chance.random() < 0.5:
        return mutated(original, chance)
    numbers = [name for name, value in original.items() if isinstance(value, (int, float))]
    if not numbers or chance.random() < 0.3:
        if chance.random() < 0.3:
            return {**original, chance.choice(STRANGE[:2]): scaling(chance)}
        return {**original, chance.choice(STRANGE): weird(chance)}
    return {**original, chance.choice(numbers): chance.choice(NUMBERS)}


def scaling(chance: Random) -> dict[str, Any]:
    """Of rotary embedding: what may be right, or almost."""
    factor = chance.choice(NUMBERS) if chance.random() < 0.7 else weird(chance)
    kind = chance.choice(("linear", "linear", "default", "dynamic", "yarn", None))
    return {chance.choice(("type", "rope_type")): kind, "factor": factor, "rope_theta": 1e4}
