"""A screenshot for the README, taken in Chromium: three parts of the report on the question of the quickstart.

    python benchmarks/picture.py [--write]

The exit code is 1 if examples/report.png is a different picture; --write replaces it.
"""

import argparse
import shutil
import sys
from base64 import b64encode
from pathlib import Path

import torch
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

import featpatch as fp

PICTURE = Path("examples/report.png")
TOLERANCE = 2.0
"""The largest mean difference, of 255, between two pictures that are the same except for the rendering of letters."""
READY = "return Boolean(document.querySelector('#ranking tr.opens') && document.querySelector('#quadrants .main-svg'))"
PARTS = """
const keep = ["question", "ranking", "quadrants"];
document.querySelectorAll("header, section").forEach(part => { if (!keep.includes(part.id)) part.remove(); });
document.querySelectorAll("#question .prompt").forEach((prompt, at) => { if (at > 1) prompt.remove(); });
document.querySelector("#question table").closest(".block").remove();
document.querySelector("#ranking tr.opens").click();
document.querySelectorAll("#ranking tr.opens").forEach((row, at) => { if (at > 5) row.remove(); });
document.querySelectorAll("#ranking tbody tr:not(.opens):not(.opened)").forEach(row => row.remove());
document.querySelectorAll("h2").forEach(title => { title.style.marginTop = "10px"; });
document.querySelector("main").style.padding = 0;
"""


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
    """Return a screenshot of the chosen parts of the page, one below the other, as PNG."""
    browser.get(page.resolve().as_uri())
    WebDriverWait(browser, 60).until(lambda browser: browser.execute_script(READY))
    browser.execute_script(PARTS)
    return bytes(browser.find_element("tag name", "main").screenshot_as_png)


def main() -> None:
    """Take the screenshot, compare it with the stored one, and print the README's line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    demo = fp.load_demo()
    pairs = demo.pairs("ioi", n=16, seed=0)
    effects = fp.rank_features(demo.model, demo.saes, pairs, positions=["S2", "end"], progress=False)
    page = fp.report(effects, "build/picture.html", model=demo.model, saes=demo.saes, pairs=pairs)
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1160,2400"):
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
    print(
        "![Prompts with differing tokens highlighted, an opened row of the ranking, and recovery against "
        f"degradation]({PICTURE})"
    )


if __name__ == "__main__":
    main()
