"""Folders of fine-tunes: Mixtral's sentencepiece model, added tokens, a chat template in a common style."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mistral_common

MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"

CHATML = """\
{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nAnswer.<|im_end|>\\n' }}{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

OPENCHAT = """\
{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + '<|end_of_turn|>' }}
{%- else %}{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

ALPACA = """\
{{ bos_token }}{% set ns = namespace(system='Below is an instruction. Write a response.') %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content | trim %}{% endif %}
{{- ns.system }}{% for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}{{ '\\n\\n### Instruction:\\n' ~ message.content.strip() }}
{%- else %}{{ '\\n\\n### Response:\\n' ~ message.content.strip() ~ eos_token }}{% endif %}{% endfor %}
{{- '\\n\\n### Response:\\n' if add_generation_prompt }}"""

TOOLS = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{{- bos_token }}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('after the system message, user and assistant take turns') }}{% endif %}
{%- if message['role'] == 'user' %}
{%- if tools is not none and message == turns[-1] %}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{% endif %}
{%- elif message.tool_calls is defined and message.tool_calls %}
{{- '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}{{- call.function | tojson }}{% endfor %}
{{- ']' + eos_token }}
{%- else %}{{- ' ' + message['content'] | trim + eos_token }}{% endif %}
{%- endfor %}"""


def token(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special} | plain | flags


SENTENCEPIECE = {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>")}
STYLES: dict[str, dict[str, Any]] = {
    "ChatML": {
        "chat_template": CHATML,
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"32000": token("<|im_end|>"), "32001": token("<|im_start|>")},
    },
    "OpenChat": {
        "chat_template": OPENCHAT,
        "eos_token": "<|end_of_turn|>",
        "added_tokens_decoder": {
            "32000": token("<|end_of_turn|>"),
            "32001": token("<|pad_0|>", special=False),
        },
    },
    "Zephyr": {"chat_template": ZEPHYR, "eos_token": "</s>", "added_tokens_decoder": {}},
    "Alpaca": {"chat_template": ALPACA, "eos_token": "</s>", "added_tokens_decoder": {}},
    "tools": {
        "chat_template": TOOLS,
        "eos_token": "</s>",
        "added_tokens_decoder": {
            str(32000 + i): token(content)
            for i, content in enumerate(
                ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
            )
        },
    },
}


def make_folder(folder: Path, settings: Mapping[str, Any], legacy: bool | None = None) -> Path:
    """A folder that both Transformers and this runtime take for a fine-tune's tokenizer."""
    folder.mkdir(parents=True)
    shutil.copy(MODEL, folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True,
        "add_eos_token": False,
    }  # fmt: skip
    config |= settings | {"added_tokens_decoder": SENTENCEPIECE | settings["added_tokens_decoder"]}
    if legacy is not None:
        config["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "vocab_size": 32016}))
    return folder


HERMES = """\
{%- macro kind(spec) %}{{ spec.type | default('any') | upper }}{% endmacro %}
{%- if messages[0].role == 'system' or tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools or [] %}{{ '\\n<tools>' + (tool | tojson) + '</tools>' }}
{%- for name, spec in (tool.function.parameters or {}).items() %}
{%- if spec is mapping %}{{ ' ' ~ name ~ ': ' ~ kind(spec) }}{% endif %}{% endfor %}
{%- if tool.function.description is defined %}{{ tool.function.description }}{% endif %}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>tool\\n<tool_response>' + message.name + ' ' + message.tool_call_id }}
{{- '\\n' + message.content + '</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{% set call = call.function %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}' }}
{{- '\\n</tool_call>' }}{% endfor %}
{%- if message.tool_calls is defined %}{% for call in message.tool_calls %}{{ call.id ~ call.type }}
{%- endfor %}{% endif %}{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt }}"""

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
MARKS = ["<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tools>", "</tools>", "<tool_response>", "</tool_response>"]


def hermes(template: Any = HERMES, special_tags: bool = False) -> dict[str, Any]:
    added = [token(name) for name in MARKS] + [token(name, special=special_tags) for name in TAGS]
    return {
        "chat_template": template,
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {str(32000 + i): value for i, value in enumerate(added)},
    }
