"""The picture of the explorer's page: ``python docs/tools/explorer_picture.py docs/images/explorer.jpg``.

Trains the demo's SALFCBM on scenes, opens its explorer in the system's Chromium, and makes the first edit that the demo
finds: one concept, in one box, that turns a wrong prediction into the right one.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from captum_concepts import explore
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.demo import show_and_tell


def main(picture: str) -> None:
    scenes = CaptionedScenes(48, seed=1_000_003, size=64)
    model = show_and_tell.train(scenes)
    search = CaptionedScenes(show_and_tell.SEARCHED, seed=scenes.seed + 4, size=scenes.size).stack()
    found = show_and_tell.find_corrections(model, search).shown[0]
    index = next(i for i in range(len(search.image)) if bool((search.image[i] == found.image).all()))
    chosen = [index, *(i for i in range(30) if i != index)]
    page = Path(tempfile.mkdtemp()) / "explorer.html"
    explore(model, search.image[chosen], labels=search.label[chosen].tolist()).save(page)
    with sync_playwright() as driver:
        options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
        browser = driver.chromium.launch(**options)
        shown = browser.new_page(viewport={"width": 1280, "height": 900})
        shown.goto(page.as_uri())
        shown.locator("[data-testid=image][data-index='0']").click()
        stage = shown.get_by_test_id("stage").bounding_box()
        x0, y0, x1, y1 = (float(v) / scenes.size for v in found.box)
        at = [(stage["x"] + x * stage["width"], stage["y"] + y * stage["height"]) for x, y in ((x0, y0), (x1, y1))]
        shown.mouse.move(*at[0])
        shown.mouse.down()
        shown.mouse.move(*at[1], steps=3)
        shown.mouse.up()
        shown.fill("#find-concept", found.concept)
        shown.locator(f"[data-testid=concept][data-concept='{found.concept}']").click()
        shown.fill("#find-concept", "")
        shown.get_by_test_id("beta").fill(f"{found.beta:.1f}")
        shown.mouse.move(5, 5)
        shown.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        shown.screenshot(path=picture, type="jpeg", quality=82)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
