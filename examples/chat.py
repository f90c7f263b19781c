"""Hold a conversation of two turns. The second reuses the keys and values of the first.

python examples/chat.py path/to/Mixtral-8x7B-Instruct-v0.1
python examples/chat.py     # the demo model, which was never trained to answer
"""

import sys

from runtime import Engine, SamplingParams

QUESTIONS = ("How do I open a file?", "And how do I close it?")


def main(model: str | None = None) -> None:
    params = SamplingParams(max_new_tokens=48, temperature=0.3, seed=1)
    with Engine.load(model) as engine:
        session = engine.session(system="Answer in one sentence.")
        for question in QUESTIONS:
            before = engine.stats().prompt_tokens
            session.send(question)
            print(f"> {question}")
            for token in session.generate(params):
                print(token.text, end="", flush=True)
            computed = engine.stats().prompt_tokens - before
            print(f"\n# a prompt of {computed} new tokens; the conversation has {len(session.ids)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
