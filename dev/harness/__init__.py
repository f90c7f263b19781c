"""Tries to break the runtime, and counts what happens: `python -m dev.harness`.

A part is one way to break things. It yields a case, a function that draws one attack from a source of chance.
Cases have numbers, and their chance comes only from the seed, the part and the number, so `--seed S --only
PART --at K` repeats case K. Each part runs in a process that the command watches, and replaces when it hangs,
crashes or is killed.

To add a part, write `parts/NAME.py` with an `open_NAME(subject)` like the others, and add it to
`parts/__init__.py`.
"""
