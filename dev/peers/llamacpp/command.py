"""Speed on a CPU next to llama.cpp's, with models of the same shape and random weights:

    python -m dev.peers.llamacpp speed --python P      decoding and prompts
    python -m dev.peers.llamacpp product --python P    one quantized matrix, times 1 to 64 rows
    python -m dev.peers.llamacpp limited --python P    decoding in less memory than the model takes
    python -m dev.peers.llamacpp parallel --python P   several requests at once, next to its server's slots

P is the interpreter of another environment, in which `pip install llama-cpp-python gguf` has compiled
llama.cpp for this machine. Each side is a process. Both stay loaded and take turns, ours before theirs, so
what slows the machine down slows both. A ratio is the median of the turns' own ratios, and above 1 where we
are faster; `low` and `high` are its quartiles. Processor time is that of all threads, waiting in a loop
included, so it compares the work best with --threads 1.

The report goes to stdout, with the machine, as text or as JSON with --json. Loading and memory are compared
by `python -m dev.bench load` and `memory` with --python.
"""

from dev.peers.llamacpp import limited, parallel, product, speed
from runtime.shell.command import run
from tools.bench.command import make_parser, measure

SUBCOMMANDS = {"speed": speed, "product": product, "limited": limited, "parallel": parallel}


def main(argv: list[str] | None = None) -> int:
    return run(lambda: measure(make_parser("dev.peers.llamacpp", __doc__, SUBCOMMANDS).parse_args(argv)))
