"""Check that `model`, `tokenizer` and `runtime` mean our packages, and not files of another program.

The names are ordinary, and Python takes the first file or folder of a name on its path. A program with its
own `model.py` would fail deep inside an import, with a message about neither file. So would a command that
starts beside a folder called `tokenizer`.

This file imports nothing of ours, since the name could mean something else.
"""

import os
import sys
from importlib.util import find_spec

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def check_names(*names: str) -> None:
    """Check that each name means the package beside this one, without importing any.

    A command of ours ends with one line on stderr and exit status 1 if a name means something else.
    Raises `ImportError` with that line in every other program.
    """
    for name in names:
        ours, found = os.path.join(HOME, name, "__init__.py"), place(name)
        if found is None or same_init(found, ours):
            continue
        line = (
            f"`import {name}` finds {found!r} and not mixtral-runtime's {ours!r}; "
            "rename the first, or run from another folder"
        )
        if starts_a_command():
            sys.exit(f"error: {line}")
        raise ImportError(line, name=name, path=found)


def place(name: str) -> str | None:
    """Return the file or folder that `import name` has found or would find. None if there is none."""
    if name in sys.modules:
        module = sys.modules[name]
        folders = getattr(module, "__path__", [f"a module {name} without a file"])
        return getattr(module, "__file__", None) or next(iter(folders))
    spec = find_spec(name)
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or []), None)


def same_init(found: str, ours: str) -> bool:
    """Tell whether both are the `__init__` of one folder. Ours may be compiled, or found through a link."""
    if os.path.splitext(os.path.basename(found))[0] != "__init__":
        return False
    folder, home = os.path.dirname(found), os.path.dirname(ours)
    return folder == home or os.path.realpath(folder) == os.path.realpath(home)


def starts_a_command() -> bool:
    """Tell whether Python is looking for a command of ours, as in `python -m runtime.generate --chat`."""
    if sys.argv[0] != "-m":
        return False
    command = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return command.split(".")[0] in ("runtime", "tools")
