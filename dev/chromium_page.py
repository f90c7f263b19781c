"""A page in the browser of `dev.chromium`: what a user does with it, and what it shows."""

import base64
import json
import time
from pathlib import Path
from typing import Any

from dev.chromium import ALT, CONTROL, KEYS, SECONDS, SHIFT, BrowserError, Chromium

MODIFIERS = {"Alt": ALT, "Control": CONTROL, "Shift": SHIFT}


class Page:
    """A page that has loaded.

    complaints  what the browser had to say against it: exceptions, errors of the console, violated policies
    addresses   of all that it has asked for
    """

    def __init__(
        self, browser: Chromium, url: str, width: int = 1280, height: int = 800, scale: float = 1
    ) -> None:
        self._browser, self._loaded = browser, False
        self._session, self._target = browser.new_page()
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        browser.listen(self._session, self._hear)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height, scale)
        self.go(url)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def go(self, url: str) -> None:
        """Open an address, and wait until it has loaded."""
        self._loaded = False
        failed = self.call("Page.navigate", url=url).get("errorText")
        if failed:
            raise BrowserError(f"{url}: {failed}")
        while not self._loaded:
            self.evaluate("0")  # events come in with answers

    def resize(self, width: int, height: int, scale: float = 1, touch: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=touch,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)

    def prefer(self, scheme: str) -> None:
        """Let the system's colors be "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, expression: str) -> Any:
        """What an expression gives, a promise's value included. Raises BrowserError with what it throws."""
        done = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in done:
            details = done["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = SECONDS) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise BrowserError(f"not within {seconds} s: {condition}")
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """The text that is seen of the last element that a selector finds."""
        return str(
            self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText ?? ''")
        )

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of the last element that a selector finds."""
        box = self.evaluate(
            f"(() => {{ const found = [...document.querySelectorAll({json.dumps(selector)})].at(-1);"
            "found?.scrollIntoView({block: 'nearest'}); const box = found?.getBoundingClientRect();"
            "return box?.width ? [box.x + box.width / 2, box.y + box.height / 2] : null })()"
        )
        if box is None:
            raise BrowserError(f"nothing to click: {selector}")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Put text in where the focus is, as a keyboard would."""
        self.call("Input.insertText", text=text)

    def press(self, keys: str) -> None:
        """Press a key: "Enter", "Shift+Enter", "Alt+n"."""
        *held, key = keys.split("+")
        modifiers = sum(MODIFIERS[name] for name in held)
        number, text = KEYS.get(key) or (ord(key.upper()), "" if modifiers & (ALT | CONTROL) else key)
        event = {
            "key": key,
            "code": key if key in KEYS else "Slash" if key == "/" else f"Key{key.upper()}",
            "windowsVirtualKeyCode": number,
            "modifiers": modifiers,
        }
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _hear(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([each.get("value") for each in params["args"]]))
        elif method == "Log.entryAdded":
            entry = params["entry"]
            # Refused requests are the page's business: it has to say so itself.
            if entry["level"] in ("error", "warning") and entry["source"] != "network":
                self.complaints.append(f"{entry['source']}: {entry['text']}")
        elif method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])
