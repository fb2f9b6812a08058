"""A headless Chromium, driven as a person would: by clicks, keys and dropped files.

It speaks the DevTools protocol over two pipes, so that nothing but Debian's Chromium is needed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)

_TIMEOUT_S = 60


class Browser:
    """One Chromium. Each of its pages is a window of its own, of a person of its own: nothing is shared."""

    def __init__(self, to_it: int, from_it: int) -> None:
        self._to_it = to_it
        self._from_it = from_it
        self._numbers = itertools.count(1)
        self._received = b""

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """The result of a command of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._to_it, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                part = os.read(self._from_it, 1 << 16)
                assert part, "Chromium ended"
                self._received += part
            text, self._received = self._received.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, url: str, *, width: int = 1280, height: int = 860, phone: bool = False) -> Page:
        """A page of this size in CSS pixels. phone: with a phone's screen."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        page.go(url)
        return page


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **params: Any) -> Any:
        return self._browser.call(method, self._session, **params)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def reload(self) -> None:
        self.evaluate("window.before_reload = true")
        self.call("Page.reload")
        self.wait_for("!window.before_reload && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            with contextlib.suppress(AssertionError):  # while another document is being loaded
                if self.evaluate(f"!!({expression})"):
                    return
            assert time.monotonic() < deadline, f"{expression}\n{self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        """What can be read on the page."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def click(self, element: str) -> None:
        """Click the middle of an element, a JavaScript expression, once it is there."""
        x, y = self._place(element)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """... where the cursor is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def drop(self, element: str, *files: Path) -> None:
        """Drag files there and let them go."""
        x, y = self._place(element)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def picture(self, path: Path) -> None:
        """Write what can be seen to a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _place(self, element: str) -> list[float]:
        """The middle of an element, which may be in a frame of the same server."""
        self.wait_for(element)
        place: list[float] = self.evaluate(
            f"""(() => {{
                let e = {element}; e.scrollIntoView({{ block: 'center' }});
                let r = e.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;
                for (let w = e.ownerDocument.defaultView; w.frameElement; w = w.parent) {{
                    const f = w.frameElement.getBoundingClientRect(); x += f.x; y += f.y;
                }}
                return [x, y];
            }})()"""
        )
        return place


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A Chromium that has its files in this folder."""
    to_it, from_it = os.pipe(), os.pipe()

    def connect() -> None:  # Chromium reads from 3 and writes to 4
        read, write = fcntl.fcntl(to_it[0], fcntl.F_DUPFD, 10), fcntl.fcntl(from_it[1], fcntl.F_DUPFD, 10)
        os.dup2(read, 3)
        os.dup2(write, 4)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        [str(PROGRAM), *options, "--no-first-run", "about:blank"],
        preexec_fn=connect,
        pass_fds=(3, 4),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_it[0])
    os.close(from_it[1])
    try:
        yield Browser(to_it[1], from_it[0])
    finally:
        os.close(to_it[1])
        process.terminate()
        process.wait()
        os.close(from_it[0])
