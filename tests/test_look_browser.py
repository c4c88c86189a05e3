"""The page in a real browser: it opens without an error and without a request, and it answers to pointer and keys."""

import itertools
import shutil

import pytest
import torch
from test_look import HOSTILE, ask, blip2, build, render, transformer, vocabulary, word_vectors
from test_processing_blip2 import image
from tiny import tokenizer
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
)
if BROWSER is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {
        "gpt2": (build("CustomGPT2ForCausalLM"), ask()),
        "blip2": blip2("CustomBlip2ForPreTraining"),
        "transformer": (transformer(), ask(["it is", "what"])),
        "word2vec": (word_vectors(), ask("king house", reader=vocabulary())),
    }


@pytest.fixture(scope="module")
def pages(models, tmp_path_factory):
    """A page of each family."""
    folder = tmp_path_factory.mktemp("pages")
    for name, (model, request) in models.items():
        if name == "blip2":
            request = ask("a b", image(), processor=request)
        (folder / f"{name}.html").write_text(render(model, request), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tabs():
    """Open pages by name, and what they complained of or asked for."""
    return {}, []


@pytest.fixture
def visit(browser, pages, tabs):
    """Opens a page, once for all tests, and at the end of a test asks what it complained of."""
    opened, complaints = tabs

    def open_page(name):
        if name in opened:
            return opened[name]
        file = (pages / f"{name}.html").as_uri()
        tab = opened[name] = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(("data:", file)) or complaints.append(request.url))
        tab.goto(file)
        return tab

    yield open_page
    assert complaints == []


def panel(tab, title, number=0):
    return tab.locator("section", has=tab.get_by_role("heading", name=title, exact=True)).nth(number)


def picture_of(canvas):
    return canvas.evaluate("canvas => canvas.toDataURL()")


@pytest.mark.parametrize("name", ["gpt2", "blip2", "transformer", "word2vec"])
def test_page_opens_and_draws_every_panel(name, visit):
    tab = visit(name)
    assert tab.evaluate("document.querySelectorAll('section').length === data.length")
    assert tab.evaluate("[...document.querySelectorAll('.body')].every(body => body.childElementCount > 0)")
    assert tab.title() == "a model at work"
    for width in (1280, 400):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
    tab.set_viewport_size({"width": 1280, "height": 900})


def test_pointing_at_a_token_shows_its_weights(visit):
    tab = visit("gpt2")
    attention = panel(tab, "Self-attention")
    weights = tab.evaluate("data[3].values[2][0].map(row => row.map(weight => weight * data[3].unit))")
    for row in (7, 3):
        attention.locator("button.chip").nth(row).hover()
        shown = attention.locator("button.chip").evaluate_all("chips => chips.map(chip => Number(chip.title))")
        assert shown == pytest.approx(weights[row], abs=1e-4)
        best = max(range(11), key=lambda column: weights[row][column])
        assert f"{weights[row][best]:.4f}, its largest" in attention.locator(".said").inner_text()


def test_every_head_can_be_chosen(visit):
    attention = panel(visit("gpt2"), "Self-attention")
    canvas = attention.locator(".field canvas")
    before = picture_of(canvas)
    attention.get_by_role("button", name="layer 1, head 2", exact=True).click()
    assert picture_of(canvas) != before
    assert "layer 1, head 2" in attention.locator(".said").inner_text()


def test_arrow_keys_move_through_a_matrix(visit):
    tab = visit("gpt2")
    mask = panel(tab, "Mask")
    mask.locator(".field").focus()
    tab.keyboard.press("ArrowUp")
    assert mask.locator(".said").inner_text() == "“t” sees “w”"
    for _ in range(10):
        tab.keyboard.press("ArrowRight")
    assert mask.locator(".said").inner_text() == "“t” does not see “?”"


def test_lens_names_the_next_best(visit):
    tab = visit("gpt2")
    lens = panel(tab, "Logit lens")
    lens.locator("td").first.hover()
    names = tab.evaluate("data[5].names[0][0]")
    assert all(f"“{name}”" in lens.locator(".said").inner_text() for name in names)


@pytest.mark.parametrize("row", [10, 4])
def test_warpers_of_the_page_are_the_hosts(row, visit, models):
    model, request = models["gpt2"]
    with torch.no_grad():
        logits = model(**request.encode()).logits[:, row]
    settings = list(itertools.product((0.1, 0.7, 1.0, 3.0), (1, 7, 99), (0.0, 0.01, 0.5, 0.9, 1.0)))
    script = "([row, all]) => all.map(([t, k, p]) => warp(data[6].places[row].logits, t, k, p))"
    for setting, found in zip(settings, visit("gpt2").evaluate(script, [row, settings]), strict=True):
        temperature, top_k, top_p = setting
        expected = TopKLogitsWarper(top_k)(None, TemperatureLogitsWarper(temperature)(None, logits))
        if top_p < 1:  # as the host's `generate` does
            expected = TopPLogitsWarper(top_p)(None, expected)
        expected = expected.softmax(-1).sort(descending=True).values[0]
        assert len(found) == (expected > 0).sum(), setting
        found = torch.tensor(found, dtype=torch.float32)
        torch.testing.assert_close(found, expected[: len(found)], atol=1e-5, rtol=1e-4, msg=str(setting))


def test_sliders_change_the_bars(visit):
    tab = visit("gpt2")
    chosen = panel(tab, "Predicted tokens")
    numbers = chosen.locator(".bars b")
    chosen.get_by_role("button", name="? 11").click()
    before = numbers.all_inner_texts()
    assert "99 of 99 tokens" in chosen.locator(".said").inner_text()
    temperature, top_k, top_p = (chosen.get_by_role("slider", name=name) for name in ("temperature", "top-k", "top-p"))
    temperature.fill("2")
    flat = numbers.all_inner_texts()
    assert float(flat[0]) < float(before[0])
    top_k.fill("3")
    assert "3 of 99 tokens" in chosen.locator(".said").inner_text()
    assert numbers.nth(3).inner_text() == "0.0000"
    top_p.focus()
    tab.keyboard.press("Home")
    assert "1 of 99 tokens" in chosen.locator(".said").inner_text() and numbers.first.inner_text() == "1.0000"


def test_patches_show_what_a_query_looks_at(visit):
    tab = visit("blip2")
    cross = panel(tab, "Cross-attention")
    canvas = cross.locator(".picture canvas").first
    pictures = set()
    for row in range(5):
        cross.locator("button.chip").nth(row).hover()
        pictures.add(picture_of(canvas))
        assert cross.locator("figcaption").first.inner_text() == f"query {row + 1}"
    assert len(pictures) == 5
    tower = panel(tab, "Self-attention")
    tower.locator(".picture canvas").first.hover(position={"x": 5, "y": 5})
    assert tower.locator("figcaption").first.inner_text() == "patch 1, 1"


def test_source_and_target_are_two_rows_of_tokens(visit):
    cross = panel(visit("transformer"), "Cross-attention")
    cross.locator("button.chip").nth(1).hover()
    assert "“w” →" in cross.locator(".said").inner_text()
    assert cross.locator("span.chip").all_inner_texts() == ["i", "t", "␣", "i", "s"]


def test_words_have_neighbours_and_a_place(visit):
    tab = visit("word2vec")
    near = panel(tab, "Neighbours")
    found = []
    for number, word in enumerate(("king", "house")):
        near.locator("button.chip").nth(number).hover()
        found.append(near.locator(".bars span").all_inner_texts())
        assert found[-1] == tab.evaluate(f"data[2].charts[{number}].labels") and word not in found[-1]
    assert found[0] != found[1]
    plane = panel(tab, "Neighbourhood")
    assert plane.locator("circle").count() == 9 and plane.locator(".asked text").all_inner_texts() != []


def test_layers_can_be_chosen(visit):
    states = panel(visit("gpt2"), "Hidden states")
    before = picture_of(states.locator(".field canvas"))
    states.get_by_role("slider").fill("3")
    assert picture_of(states.locator(".field canvas")) != before
    assert "layer 3" in states.locator("label output").inner_text()


def test_dark_page_has_other_colours(visit):
    tab = visit("gpt2")
    canvas = panel(tab, "Mask").locator(".field canvas")
    light = picture_of(canvas)
    changed = "([canvas, light]) => (canvas.toDataURL() === light) === %s"
    for scheme, is_light in (("dark", "false"), ("light", "true")):
        tab.emulate_media(color_scheme=scheme)
        tab.wait_for_function(changed % is_light, arg=[canvas.element_handle(), light], timeout=5000)


def test_hostile_token_is_shown_and_not_run(visit, pages):
    reader = tokenizer()
    reader.add_tokens([HOSTILE])
    model = build("CustomGPT2ForCausalLM", vocab_size=len(reader))
    (pages / "hostile.html").write_text(render(model, ask(HOSTILE, reader=reader), HOSTILE), encoding="utf-8")
    tab = visit("hostile")
    assert tab.locator("img, script").count() == 2
    assert tab.locator("h1").inner_text().startswith("</script><script>alert(1)")
    assert panel(tab, "Tokens").locator(".chip").first.inner_text().startswith("</script><script>alert(1)")
