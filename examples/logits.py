"""Show what a model expected at each token of a text, and the text's perplexity.

python examples/logits.py
python examples/logits.py path/to/Mixtral-8x7B-v0.1 "To be, or not to be"
"""

import math
import sys

from runtime import Engine

TEXT = """class Queue:
    def __init__(self, maxsize=0):
        self.maxsize = maxsize
"""


def main(model: str | None = None, text: str = TEXT) -> None:
    with Engine.load(model) as engine:
        ids = engine.tokenizer.encode(text)  # T ids. The first is the begin piece
        logprobs = engine.logits(ids).log_softmax(-1)  # [T, V]: row t is about the token after ids[t]
        actual = logprobs[list(range(len(ids) - 1)), ids[1:]]  # [T - 1], of the tokens that did come
        likeliest = logprobs[:-1].argmax(-1)  # [T - 1]

        print("token             probability   likeliest")
        for t, (logprob, guess) in enumerate(zip(actual.tolist(), likeliest.tolist(), strict=True)):
            before = ids[: t + 1]  # a token's text depends on what stands before it
            shown = engine.tokenizer.stream(before).push(ids[t + 1])
            guessed = engine.tokenizer.stream(before).push(guess)
            print(f"{shown!r:20} {math.exp(logprob):8.1%}   {guessed!r}")
        print(f"perplexity {math.exp(-actual.mean()):.2f} over {len(actual)} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
