"""A headless Chromium through Playwright: the system's own, offline, watched."""

from __future__ import annotations

import gc
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass
class Watched:
    """One page, what it asked of the network, and what it said on its console."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def evaluate(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def violations(self) -> list[Any]:
        """What axe-core finds: rules of accessibility, and the elements that break them."""
        pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed (dev extra)")
        self.evaluate((files("axe_playwright_python") / "axe.min.js").read_text())
        return self.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")

    @property
    def outside(self) -> list[str]:
        """Requests for anything but the file itself and what it contains."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "about:", "blob:"))]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (dev extra)")
    binary = next((path for name in NAMES if (path := shutil.which(name))), None)
    if binary is None:
        pytest.skip("no Chromium on the path (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = driver.chromium.launch(executable_path=binary, args=options)
        yield browser
        # A process forked meanwhile holds copies of Playwright's pipes, and Playwright waits until the last is closed.
        gc.collect()
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        browser.close()


@pytest.fixture
def visit(chromium) -> Iterator[Callable[..., Watched]]:
    """``visit(path, width=1280, height=900, dark=False, script=True, touch=False)``: an open, watched page."""
    contexts = []

    def opened(
        path: Path,
        width: int = 1280,
        height: int = 900,
        *,
        dark: bool = False,
        script: bool = True,
        touch: bool = False,
        **more: Any,
    ) -> Watched:
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            java_script_enabled=script,
            has_touch=touch,
            is_mobile=touch,
            offline=True,
            **more,
        )
        contexts.append(context)
        watched = Watched(context.new_page())
        watched.page.set_default_timeout(20_000)
        watched.page.on("request", lambda request: watched.requests.append(request.url))
        watched.page.on("console", lambda message: watched.complaints.append(message.text))
        watched.page.on("pageerror", lambda error: watched.complaints.append(str(error)))
        watched.page.goto(path.resolve().as_uri())
        return watched

    yield opened
    for context in contexts:
        context.close()
