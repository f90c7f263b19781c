"""A model whose layers are shared out over several processes, each of which runs this program.

torchrun --nproc-per-node 2 examples/ranks.py
torchrun --nproc-per-node 2 examples/ranks.py path/to/Mixtral-8x7B-v0.1 "The first law is"
"""

import sys

from runtime import Engine, EngineOptions, SamplingParams


def main(model: str | None = None, prompt: str = "def read_bytes(obj):") -> None:
    params = SamplingParams(max_new_tokens=40, temperature=0.3, seed=4)
    with Engine.load(model, EngineOptions(distributed=True)) as engine:
        if engine.rank:
            engine.follow()  # until rank 0 closes its engine; an error if a rank is lost
            return
        print(prompt, end="")
        for token in engine.generate(prompt, params):
            print(token.text, end="", flush=True)
        print()
        if engine.rank_plans:
            for part in engine.rank_plans.parts:
                print(f"# {part.layers} layers from layer {part.first} on")


if __name__ == "__main__":
    main(*sys.argv[1:])
