"""Have a model fill in a form: an answer that parses, whatever the model.

python examples/schema.py
python examples/schema.py path/to/Mixtral-8x7B-v0.1 "The tallest mountain, as JSON: "
"""

import json
import sys

from runtime import Engine, SamplingParams

FORM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["function", "class", "module"]},
        "lines": {"type": "integer", "minimum": 1, "maximum": 5000},
    },
    "required": ["name", "kind", "lines"],
    "additionalProperties": False,
}
PROMPT = "read_bytes = "


def main(model: str | None = None, prompt: str = PROMPT) -> None:
    with Engine.load(model) as engine:
        for temperature in (0, 1, 4):  # at the last one, the model's own text would be noise
            params = SamplingParams(json_schema=FORM, temperature=temperature, seed=1, max_new_tokens=200)
            text = "".join(token.text for token in engine.generate(prompt, params))
            print(json.loads(text))


if __name__ == "__main__":
    main(*sys.argv[1:])
