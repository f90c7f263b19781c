"""Commands for users beside `runtime.generate`: each is `python -m tools.NAME`."""

from pathlib import Path
from runpy import run_path

# The name `runtime` may mean another program's file here, so the check is run by its path.
check = Path(__file__).parent.parent / "runtime" / "shadowed.py"
run_path(str(check))["check_names"]("runtime", "model", "tokenizer")
