"""Takes the README's pictures of `hf-custom look`: some panels of a page, as a browser shows them, to docs/pictures.

The models are trained by the commands of the README, minutes each on two processor cores:

  python -m training.run_clm training/recipes/clm_mini.yaml
  python -m training.run_blip2 training/recipes/blip2_digits_1.yaml
  python -m training.run_word2vec --num_train_epochs 60

Examples:
  python -m tests.pictures gpt2 runs/clm_mini
  python -m tests.pictures blip2 runs/blip2_digits_1
  python -m tests.pictures word2vec runs/word2vec
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from sklearn.datasets import load_digits

from hf_custom.look import look

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
MOST_BYTES = 150_000
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
)


def draw_digit(folder: Path) -> Path:
    """One of scikit-learn's sevens, of those that the scripts hold out."""
    digits = load_digits()
    number = np.flatnonzero(digits.target == 7)[-3]
    file = folder / "seven.png"
    Image.fromarray(np.round(digits.images[number] * 255 / 16).astype(np.uint8)).save(file)
    return file


def press_gpt2(page: Page) -> None:
    page.get_by_role("button", name="layer 3, head 1", exact=True).click()
    page.locator("[data-kind=attention] button.chip", has_text="over").hover()
    page.get_by_role("slider", name="temperature").fill("0.8")
    page.get_by_role("slider", name="top-k").fill("12")


def press_blip2(page: Page) -> None:
    page.locator("[data-kind=attention] button.chip", has_text="query 3").first.hover()


def press_word2vec(page: Page) -> None:
    page.get_by_role("button", name="float", exact=True).hover()


# By family: its text, whether it reads the digit, the headings of stacks and panels to show, and what to press.
PICTURES = {
    "gpt2": (
        ['The "for" statement is used to iterate over the elements of a'],
        False,
        ("Self-attention", "Logit lens", "Predicted tokens"),
        press_gpt2,
    ),
    "word2vec": (["float list exception loop import"], False, ("Neighbours", "Neighbourhood"), press_word2vec),
    "blip2": (["a handwritten seven"], True, ("Cross-attention", "The head’s answer"), press_blip2),
}
KEEP = """titles => {
  const kept = new Set();
  for (const section of document.querySelectorAll("section")) {
    const title = section.querySelector("h3").textContent;
    if (titles.includes(title) && !kept.has(title)) kept.add(title); else section.remove();
  }
  for (const heading of document.querySelectorAll("h2, nav")) {
    if (heading.tagName === "NAV" || heading.nextElementSibling?.tagName !== "SECTION") heading.remove();
  }
}"""


def take(family: str, model: str, width: int = 1080) -> Path:
    """The picture of a family.

    Raises:
        ValueError: when it is too large for a README.
    """
    texts, reads_image, titles, press = PICTURES[family]
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as driver:
        file = Path(scratch) / f"{family}.html"
        look(model, file, texts, draw_digit(Path(scratch)) if reads_image else None)
        browser = driver.chromium.launch(executable_path=BROWSER, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(file.as_uri())
        page.evaluate(KEEP, list(titles))
        press(page)
        FOLDER.mkdir(parents=True, exist_ok=True)
        picture = FOLDER / f"look_{family}.png"
        page.screenshot(path=picture, full_page=True)
        browser.close()
    # A page of three hues needs no more colours.
    Image.open(picture).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(picture, optimize=True)
    if picture.stat().st_size > MOST_BYTES:
        raise ValueError(f"{picture} has {picture.stat().st_size:,} bytes. Show fewer panels.")
    return picture


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=PICTURES)
    parser.add_argument("model", help="folder of a model of that family")
    args = parser.parse_args(argv)
    print(take(args.family, args.model))


if __name__ == "__main__":
    main()
