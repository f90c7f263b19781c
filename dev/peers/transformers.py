"""Speed of decoding next to Transformers' `generate`, with the same checkpoint, dtype and threads in one run.

    python -m dev.peers.transformers [MODEL] [--dtype float32] [--tokens 128] [--rounds 7] [--json]

Both decode greedily from the same prompt, in turn. The figures are medians, and include the prompt.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from runtime import Engine, EngineOptions, SamplingParams
from runtime.engine import DEMO
from runtime.shell.arguments import new_parser
from tools.text import as_text


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("dev.peers.transformers", __doc__)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)

    engine = Engine.load(args.model, EngineOptions(device="cpu", dtype=args.dtype))
    peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=engine.dtype).eval()
    prompt = engine.tokenizer.encode(args.prompt)
    params = SamplingParams(max_new_tokens=args.tokens, temperature=0, ignore_eos=True)
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": args.tokens}

    def ours() -> list[int]:
        return [token.id for token in engine.generate(prompt, params)]

    def theirs() -> list[int]:
        return peer.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist()

    equal = sum(a == b for a, b in zip(ours(), theirs(), strict=True))  # and a warm-up
    times: dict[Callable[[], list[int]], list[float]] = {ours: [], theirs: []}
    for _ in range(args.rounds):
        for run, seconds in times.items():
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    rates = {run.__name__: args.tokens / statistics.median(seconds) for run, seconds in times.items()}
    result = {
        "ours_tokens_per_s": round(rates["ours"], 1),
        "transformers_tokens_per_s": round(rates["theirs"], 1),
        "ratio": round(rates["ours"] / rates["theirs"], 2),
        "ids_equal": f"{equal} of {args.tokens}",
        "dtype": str(engine.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result) if args.json else as_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
