"""A browser and a server for all tests of the page, where there is a browser."""

from collections.abc import Iterator

import pytest

from dev.chromium import Chromium, find_chromium
from dev.chromium_page import Page
from tests.runtime.page.stub import Stub

WIDE = (1280, 800)


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    if find_chromium() is None:
        pytest.skip("no Chromium is installed")
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def served() -> Iterator[Stub]:
    with Stub() as stub:
        yield stub


@pytest.fixture
def stub(served: Stub) -> Stub:
    """The server, as if it had just begun."""
    served.reset()
    return served


@pytest.fixture(scope="session")
def opened(browser: Chromium, served: Stub) -> Page:
    page = Page(browser, served.url)
    page.wait("document.querySelector('#model').textContent === 'demo'")
    return page


@pytest.fixture
def modules(opened: Page) -> Page:
    """The page as it is by now, for tests that only call its modules."""
    return opened


@pytest.fixture
def page(opened: Page, stub: Stub) -> Iterator[Page]:
    """The page of the stub, loaded anew. The browser may have nothing to say against it, whatever happens."""
    opened.evaluate("localStorage.clear()")
    opened.resize(*WIDE)
    opened.go(stub.url)
    opened.wait("document.querySelector('#model').textContent === 'demo'")
    yield opened
    assert opened.complaints == []
    assert all(address.startswith((stub.url, "data:")) for address in opened.addresses)
