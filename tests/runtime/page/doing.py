"""What tests of the page do with it."""

from dev.chromium_page import Page


def ask(page: Page, text: str) -> None:
    page.evaluate("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")


def wait_for(page: Page, state: str) -> None:
    """Wait until the last answer is in a state."""
    page.wait(f"[...document.querySelectorAll('article.assistant')].at(-1)?.dataset.state === {state!r}")


def turns(page: Page) -> list[list[str]]:
    """Role and text of each turn that is seen."""
    found: list[list[str]] = page.evaluate(
        "[...document.querySelectorAll('article')].map((each) => "
        "[each.classList[0], each.querySelector('.text').innerText])"
    )
    return found
