"""Continue a text, and print each token as it comes.

python examples/generate.py
python examples/generate.py path/to/Mixtral-8x7B-v0.1 "The three laws of robotics are"
"""

import sys

from runtime import Engine, SamplingParams


def main(model: str | None = None, prompt: str = "def read_bytes(obj):") -> None:
    params = SamplingParams(max_new_tokens=64, temperature=0.3, seed=4)
    with Engine.load(model) as engine:  # without a folder, the demo model
        print(prompt, end="")
        for token in engine.generate(prompt, params):
            print(token.text, end="", flush=True)
        print(f"\n# ended by {token.finish}; {engine.stats().decode_rate:.0f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
