"""Continue several texts at once: one forward computes the next token of each.

python examples/batch.py
python examples/batch.py path/to/Mixtral-8x7B-v0.1 "The first law is" "The second law is"
"""

import sys

from runtime import Engine, EngineOptions, RequestError, SamplingParams

PROMPTS = ("def read_bytes(obj):", "class Reader:", "import os\n", "for line in file:")


def main(model: str | None = None, *prompts: str) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=0.3, seed=4)
    options = EngineOptions(parallel=4, context=512)  # four KV caches; other requests wait
    with Engine.load(model, options) as engine, engine.batch() as batch:
        requests = [batch.add(engine.work(prompt, params)) for prompt in prompts or PROMPTS]
        texts = dict.fromkeys(requests, "")
        while batch.busy:
            for request, result in batch.step():
                if isinstance(result, RequestError):  # it ends this request only
                    print(f"# {result}")
                else:
                    texts[request] += result.text
        for request, prompt in zip(requests, prompts or PROMPTS, strict=True):
            print(f"{prompt}{texts[request]}\n# {request.reused} tokens of the prompt were there already")
        print(f"# {engine.stats().decode_rate:.0f} tokens/s in all")


if __name__ == "__main__":
    main(*sys.argv[1:])
