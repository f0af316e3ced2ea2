"""A screenshot for the README, taken in Chromium: the first screen of a report.

    python benchmarks/picture.py [--write]

The exit code is 1 if examples/report.png is a different picture; --write replaces it.
"""

import argparse
import shutil
import sys
from base64 import b64decode, b64encode
from pathlib import Path

import torch
from selenium import webdriver

import featpatch as fp

PICTURE = Path("examples/report.png")
TOLERANCE = 2.0
"""The largest mean difference, of 255, between two pictures that are the same except for the rendering of letters."""
SIZE = (1180, 800)
"""Width and largest height of the picture, in pixels."""


COMPARE = """
const [one, other, done] = arguments;
const pixels = async data => {
  const image = new Image();
  image.src = "data:image/png;base64," + data;
  await image.decode();
  const context = Object.assign(document.createElement("canvas"), {width: image.width, height: image.height}).getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
};
Promise.all([pixels(one), pixels(other)]).then(([a, b]) => done(
  a.width != b.width || a.height != b.height ? 255
    : a.data.reduce((sum, value, at) => sum + Math.abs(value - b.data[at]), 0) / a.data.length));
"""


def taken(browser: webdriver.Chrome, page: Path) -> bytes:
    """Return a screenshot of the first screen of the page, down to the end of its chart, as PNG."""
    browser.get(page.resolve().as_uri())
    chart = browser.find_element("css selector", "#answer figure.bars")
    end = browser.execute_script("return arguments[0].getBoundingClientRect().bottom", chart)
    clip = {"x": 0, "y": 0, "width": SIZE[0], "height": min(SIZE[1], int(end) + 4), "scale": 1.5}
    return b64decode(
        browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": clip, "captureBeyondViewport": True})[
            "data"
        ]
    )


def main() -> None:
    """Take the screenshot, compare it with the stored one, and print the README's line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    demo = fp.load_demo()
    pairs = demo.pairs("sentiment", n=16, seed=0)
    effects = fp.rank_features(demo.model, demo.saes, pairs, positions=["word1", "word2", "end"], progress=False)
    last = [sae for sae in demo.saes if sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"]
    curve = fp.top_k_curve(demo.model, last, pairs, most=8, positions=["end"], progress=False)
    page = fp.report(
        effects,
        "build/picture.html",
        model=demo.model,
        saes=demo.saes,
        pairs=pairs,
        curve=curve,
        question="Which features decide whether a review is positive or negative?",
    )
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={SIZE[0]},{SIZE[1]}",
    ):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        new = taken(browser, Path(page))
        if write:
            PICTURE.write_bytes(new)
        difference = browser.execute_async_script(COMPARE, *(b64encode(each).decode() for each in (PICTURE.read_bytes(), new)))
    finally:
        browser.quit()
    if difference > TOLERANCE:
        sys.exit(
            f"{PICTURE} differs from the new picture by {difference:.1f} of 255 on average: inspect it, then run picture.py "
            "--write"
        )
    print(f"![The first screen of a report: a conclusion, and the largest effects with their intervals]({PICTURE})")


if __name__ == "__main__":
    main()
