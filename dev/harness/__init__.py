"""Tries to break the runtime, and counts what happens: `python -m dev.harness`.

A part is one way to break things: it yields a case, which draws one attack from the source of chance it is
given. Cases have numbers, and chance comes from the seed, the part and the number alone, so
`--seed S --only PART --at K` makes case K again. A part runs in a process of its own, which the command
watches: it survives what hangs, crashes or is killed.

To add a part, write `parts/NAME.py` with an `open_NAME(subject)` like the others, and add it to
`parts/__init__.py`.
"""
