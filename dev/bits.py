"""Do two versions of this project compute the same bits? Run it once with each, then compare.

    PYTHONPATH=OLD python dev/bits.py record old.json --folder DIR
    PYTHONPATH=NEW python dev/bits.py record new.json --folder OTHER --native DIR
    python dev/bits.py compare old.json new.json

`record` quantizes the demo into DIR at 4, 3g128 and 2 bits. It loads each of these, and the demo itself, with
resident and with offloaded experts, in float32 and in bfloat16. It writes hashes of the logits, the ids that
were generated, and hashes of the quantizer's files. With --native it loads the checkpoints that another
version wrote, and still compares what its own quantizer writes.

The script uses only what the README promises to programs, so that it runs with any version.
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

FORMATS = ("4", "3g128", "2")
PLACES: dict[str, dict[str, Any]] = {
    "resident": {"offload": "never"},
    "offloaded": {"offload": "always", "slots": 4},
    "two slots": {"offload": "always", "slots": 2, "lookahead": 2, "prefetch": 2, "policy": "lfu"},
}
TEXT = (
    "import os\n\n\ndef walk(folder):\n    for name in sorted(os.listdir(folder)):\n        yield name\n" * 8
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--folder", type=Path, required=True, help="where quantized checkpoints go")
    recording.add_argument("--native", type=Path, help="load the checkpoints of another version from here")
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(json.loads(args.old.read_text()), json.loads(args.new.read_text()))
    args.out.write_text(json.dumps(record(args.folder, args.native or args.folder), indent=1))
    return 0


def record(folder: Path, native: Path) -> dict[str, Any]:
    """Everything that has to be equal, by name."""
    import runtime

    demo = Path(runtime.__file__).parent / "demo"
    found: dict[str, Any] = {}
    for spec in FORMATS:
        words = [str(demo), str(folder / spec), "--attention", "4", "--experts", spec, "--quiet"]
        subprocess.run(
            [sys.executable, "-m", "tools.quantize", *words], check=True, stdout=subprocess.DEVNULL
        )
        for file in sorted((folder / spec).iterdir()):
            found[f"{spec}: {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    models = {"16": demo} | {spec: native / spec for spec in FORMATS}
    for (spec, model), place, dtype in itertools.product(models.items(), PLACES, ("float32", "bfloat16")):
        options = runtime.EngineOptions(device="cpu", dtype=dtype, threads=2, **PLACES[place])
        found[f"{spec}, {place}, {dtype}"] = computed(model, options)
        print(f"{spec}, {place}, {dtype}", file=sys.stderr)
    return found


def computed(model: Path, options: Any) -> dict[str, Any]:
    """What an engine computes: logits of a prompt, and texts, greedy and sampled, in one turn and in two."""
    import numpy as np

    from runtime import Engine, SamplingParams

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Engine.load(model, options) as engine:
            logits = engine.logits(engine.tokenizer.encode(TEXT))
            results: dict[str, Any] = {
                "logits": hashlib.sha256(np.ascontiguousarray(logits.numpy()).tobytes()).hexdigest()
            }
            greedy = SamplingParams(max_new_tokens=96, temperature=0, ignore_eos=True)
            sampled = SamplingParams(max_new_tokens=96, temperature=0.9, top_k=50, min_p=0.01, seed=7,
                                     repetition_penalty=1.1, ignore_eos=True)  # fmt: skip
            for name, params in (("greedy", greedy), ("sampled", sampled)):
                tokens = list(engine.generate("class Reader:\n", params))
                results[name] = [(token.id, token.logprob.hex()) for token in tokens]
            with engine.session() as session:
                for number, prompt in enumerate(("def first(", "def first(a, b):\n    return ")):
                    tokens = list(session.complete(prompt, greedy))
                    results[f"turn {number}"] = [(token.id, token.logprob.hex()) for token in tokens]
    return results


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Name what differs; 1 if anything does."""
    different = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    for name in different:
        print(f"differs: {name}")
    print(f"{len({*old, *new}) - len(different)} of {len({*old, *new})} equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
