"""The picture of the server's page in the docs: the demo writes, with slots for half of its experts.

    python -m dev.page_figure
    python -m dev.page_figure --out somewhere

It needs a Chromium. The link is a simulated one, slow enough for experts to be seen on their way.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dev.chromium import BrowserError, Chromium
from dev.chromium_page import Page
from runtime.errors import MixtralError
from runtime.shell.arguments import new_parser
from runtime.shell.command import put, run

OUT = Path(__file__).resolve().parent.parent / "docs" / "figures"
ENGINE = ("--offload", "always", "--slots", "4", "--link-gbps", "0.4", "--parallel", "2")
SIZE, SCALE = (1200, 720), 1.5
PROMPT = "def read_bytes(obj):"
SETTINGS = {"mode": "text", "temperature": "0.3", "seed": "4", "max_tokens": "400"}
ENOUGH = 420  # characters of the answer, at which the page is pictured


def main(argv: list[str] | None = None) -> int:
    return run(lambda: draw(argv))


def draw(argv: list[str] | None) -> None:
    parser = new_parser("dev.page_figure", __doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with Chromium() as browser, serving(*ENGINE) as url:
            page = Page(browser, url, *SIZE, SCALE)
            picture(page, args.out / "page.png")
    except BrowserError as e:
        raise MixtralError(f"no picture: {e}") from None
    put(f"{args.out / 'page.png'}\n")


def picture(page: Page, path: Path) -> None:
    """Have the page's server write, and take a picture while it does."""
    page.wait("document.querySelectorAll('#picture i').length")
    set_fields(page, SETTINGS)
    page.evaluate("document.querySelector('#prompt').focus()")
    page.type(PROMPT)
    page.press("Enter")
    page.wait(f"document.querySelector('article.assistant .text')?.textContent.length > {ENOUGH}", 60)
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path)


def set_fields(page: Page, fields: dict[str, str]) -> None:
    """Fill in settings."""
    for name, value in fields.items():
        page.evaluate(
            f"(() => {{ const field = document.querySelector('#settings form').elements[{name!r}];"
            f"field.value = {value!r}; field.dispatchEvent(new Event('input', {{ bubbles: true }})) }})()"
        )


@contextmanager
def serving(*flags: str, seconds: float = 120) -> Iterator[str]:
    """A server of the demo in a process of its own. Gives its address, or raises MixtralError."""
    command = [sys.executable, "-m", "runtime.serve", "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            end, said = time.monotonic() + seconds, ""
            for line in process.stderr:
                said += line
                if found := re.search(r"http://\S+", line):
                    yield found[0].rstrip("/") + "/"
                    return
                if time.monotonic() > end:
                    break
            raise MixtralError(f"the server did not start: {said.strip().splitlines()[-1:]}")
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
