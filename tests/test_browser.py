"The page that runs the toy model in a browser: its logits and its texts are PyTorch's, and a reader can use it anywhere."
import functools
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
import torch

from nanollada.backbone import Backbone, BackboneConfig, load_run, save_run
from nanollada.sampler import by_threshold, write
from nanollada.tokenizer import encode, train_tokenizer
from nanollada.toy import LUCY, sample

NBS = Path(__file__).resolve().parent.parent / "nbs"
FILES = [NBS / name for name in ("lucy.js", "lucy.html", "lucy.css")]
RUNS = [NBS / "weights" / name for name in ("lucy", "lucy_ar")]
MARKUP = next(cell.source for cell in nbformat.read(NBS / "10a_browser.ipynb", as_version=4).cells if 'class="lucy"' in cell.source)
HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
POLICIES = {"official": dict(steps=12), "hasty": dict(steps=4), "threshold": dict(commit=by_threshold, limit=0.9), "left": dict(block_length=1)}


def settings(name: str) -> dict:
    "A policy of `POLICIES` in the page's words."
    kind = "official" if "steps" in POLICIES[name] else name
    return dict(policy=kind, steps=POLICIES[name].get("steps", 12), limit=POLICIES[name].get("limit", 0.9), heat=0, seed=0)


# ---------------------------------------------------------------- without a browser


def test_the_script_is_small_readable_and_calls_nobody():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= 120
        assert not re.search(r"https?:|//[a-z]+\.|\bimport\b|require\(|eval\(|url\(", text), path.name
    assert len(FILES[0].read_text(encoding="utf-8").splitlines()) <= 300


def test_the_weights_are_under_two_megabytes():
    assert sum((run / "model.safetensors").stat().st_size for run in RUNS) < 2_000_000
    assert (RUNS[0] / "tokenizer.json").read_bytes() == (RUNS[1] / "tokenizer.json").read_bytes(), "the page reads only the first"


def test_the_page_tells_the_story_of_the_book_and_the_site_ships_its_files():
    assert f'data-story="{LUCY}"' in MARKUP
    listed = (NBS / "_quarto.yml").read_text(encoding="utf-8")
    for name in (*(path.name for path in FILES), "10a_browser.ipynb", '"weights/lucy/*"', '"weights/lucy_ar/*"', '"images/*"'):
        assert name in listed, f"{name} is missing in _quarto.yml"


# ---------------------------------------------------------------- with one


@pytest.fixture(scope="module")
def chromium():
    "A headless Chromium; tests that need it are skipped where there is none."
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as api:
        try:
            browser = api.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def serve():
    "A function that serves a folder, and gives its address."
    servers = []

    def start(folder: Path) -> str:
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()


def make_site(folder: Path, runs: list[Path]) -> Path:
    "A folder with the page, its files and these runs in place of the trained ones."
    (folder / "index.html").write_text(f"{HEAD}<title>Lucy</title><body>{MARKUP}</body></html>", encoding="utf-8")
    shutil.copytree(NBS / "images", folder / "images")
    for file in FILES:
        shutil.copy(file, folder)
    for run, place in zip(runs, RUNS):
        shutil.copytree(run, folder / "weights" / place.name)
    return folder


@pytest.fixture(scope="module")
def site(serve, tmp_path_factory):
    return serve(make_site(tmp_path_factory.mktemp("site"), RUNS))


@pytest.fixture(scope="module")
def models():
    "The trained pair, its tokenizer, and Lucy's story between its ends."
    (model, tokenizer, _), (twin, _, _) = (load_run(run, "cpu") for run in RUNS)
    ids = [tokenizer.bos_token_id, *encode(tokenizer, LUCY), tokenizer.eos_token_id]
    return model, twin, tokenizer, torch.tensor([ids])


@pytest.fixture
def visit(chromium):
    "A function that opens an address and waits for the models; whatever the page complains of fails the test."
    contexts, complaints = [], []

    def start(address: str, ready: str = ".lucy-app", errors: bool = False, **options: object):
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        if not errors:
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.wait_for_selector(ready, state="visible", timeout=60_000)
        return page

    yield start
    for context in contexts:
        context.close()
    assert not complaints


def logits_of(page, ids: torch.Tensor, side: int) -> torch.Tensor:
    "The page's logits (L, V) for a canvas (1, L)."
    code = "async ([ids, side]) => lucy.logits((await lucy.ready)[side], ids, [...ids.keys()]).map((row) => [...row])"
    return torch.tensor(page.evaluate(code, [ids[0].tolist(), side]))


def films_of(page, canvas: torch.Tensor, chosen: dict) -> list[dict]:
    "What both writers of the page make of a canvas (1, L)."
    code = """async ([ids, settings]) => {
        const films = [lucy.newFilm(ids), lucy.newFilm(ids)];
        for (const _ of lucy.writeBoth(await lucy.ready, films, settings));
        return films.map(({ ids, when, times }) => ({ ids, when: [...when].map((pass) => pass ?? 0), passes: times.length }));
    }"""
    return page.evaluate(code, [canvas[0].tolist(), chosen])


def canvases(ids: torch.Tensor, mask_id: int) -> list[torch.Tensor]:
    "A canvas with its beginning, its every other word, all of it, and one word hidden; the ends always stand."
    place = torch.arange(ids.shape[1])
    inside = (place > 0) & (place < len(place) - 1)
    return [ids.masked_fill(inside & hidden, mask_id) for hidden in (place < 24, place % 2 == 0, place >= 0, place == 20)]


def greedy(twin: Backbone, canvas: torch.Tensor, mask_id: int, eos_id: int) -> list[int]:
    "The twin's likeliest continuation of the words before the first mask, to the end of the canvas or of the story."
    ids = canvas[:, : canvas[0].tolist().index(mask_id)]
    while ids.shape[1] < canvas.shape[1] and ids[0, -1] != eos_id:
        best = twin(ids, True)[0, -1].index_fill(0, torch.tensor([mask_id]), -torch.inf).argmax()
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return ids[0].tolist()


@torch.no_grad()
def test_logits_equal_pytorch(site, visit, models):
    model, twin, tokenizer, ids = models
    page = visit(site)
    for canvas in [ids, *canvases(ids, tokenizer.mask_token_id)]:
        torch.testing.assert_close(logits_of(page, canvas, 0), model.denoise(canvas)[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(logits_of(page, canvas, 1), twin(canvas, True)[0], atol=1e-3, rtol=0)


@torch.no_grad()
def test_every_policy_writes_what_the_sampler_writes(site, visit, models):
    model, twin, tokenizer, ids = models
    page = visit(site)
    for canvas in canvases(ids, tokenizer.mask_token_id):
        for name, changes in POLICIES.items():
            film, other = films_of(page, canvas, settings(name))
            steps = list(write(model.denoise, canvas, **changes))
            assert film["ids"] == steps[-1].ids[0].tolist() and film["passes"] == len(steps), name
        assert other["ids"] == greedy(twin, canvas, tokenizer.mask_token_id, tokenizer.eos_token_id)


SHAPES = {  # what the trained pair has not: shared keys, tied words, no QK-norm, no shift, a width four does not divide
    "grouped": dict(num_key_value_heads=2, intermediate_size=30, qk_norm=True, shift=True),
    "plain": dict(tie_word_embeddings=True, intermediate_size=33, rope_theta=10_000.0)}


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_come_from_the_config(name, serve, visit, tmp_path):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(sample(300, 0, "en"), 400)
    mask_id, pair = tokenizer.mask_token_id, []
    for objective in ("diffusion", "ar"):
        shape = SHAPES[name] if objective == "diffusion" else SHAPES[name] | {"shift": False}
        cfg = BackboneConfig(len(tokenizer), 24, 2, 4, objective=objective, mask_token_id=mask_id, initializer_range=0.5, **shape)
        pair.append(Backbone(cfg).eval())
        save_run(pair[-1], tokenizer, tmp_path / objective)  # in float32
    (tmp_path / "site").mkdir()
    page = visit(serve(make_site(tmp_path / "site", [tmp_path / "diffusion", tmp_path / "ar"])))
    ids = torch.tensor([[tokenizer.bos_token_id, *encode(tokenizer, LUCY), tokenizer.eos_token_id]])
    for canvas in canvases(ids, mask_id):
        torch.testing.assert_close(logits_of(page, canvas, 0), pair[0].denoise(canvas)[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(logits_of(page, canvas, 1), pair[1](canvas, True)[0], atol=1e-3, rtol=0)
    steps = list(write(pair[0].denoise, canvases(ids, mask_id)[0], steps=7))
    film, other = films_of(page, canvases(ids, mask_id)[0], settings("official") | {"steps": 7})
    order = sum(step.committed[0] * step.nfe for step in steps).tolist()
    assert film["ids"] == steps[-1].ids[0].tolist() and film["when"] == order[: len(film["when"])]
    assert other["ids"] == greedy(pair[1], canvases(ids, mask_id)[0], mask_id, tokenizer.eos_token_id)


def test_the_tokenizer_is_the_package_s(site, visit, models):
    tokenizer, page = models[2], visit(site)
    texts = [LUCY, *sample(20, 1, "en"), "", "Once upon a time, a dragon  flew\n\nover 17 hills!", "naïve café 小明 🐝 don't  ", "<|mask|>"]
    for text in texts:
        found = page.evaluate("async (text) => (await lucy.ready)[2].encode(text)", text)
        assert found == encode(tokenizer, text), text
    said = page.evaluate("async (ids) => ids.map((await lucy.ready)[2].decode)", encode(tokenizer, LUCY))
    assert "".join(said) == LUCY


def test_temperature_draws_by_a_seed(site, visit, models):
    page, canvas = visit(site), canvases(models[3], models[2].mask_token_id)[2]
    texts = [[film["ids"] for film in films_of(page, canvas, settings("official") | dict(heat=1.0, seed=seed))] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] and texts[0][0] != texts[2][0] and texts[0][1] != texts[2][1]


def scrub(page, to: int) -> None:
    "Move the slider of passes."
    page.eval_on_selector("[name=pass]", "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input', {bubbles: true})); }", to)


def test_a_click_hides_a_word_and_another_brings_it_back(site, visit):
    page = visit(site)
    page.click("[name=hide][value=none]")
    assert page.locator("button.masked").count() == 0 and page.inner_text("[name=status]") == "nothing is hidden"
    page.click("[name=play]")  # there is nothing to write
    assert page.is_disabled("[name=pass]") and page.locator(".lucy-note").first.inner_text() == ""
    word = page.locator(".lucy-text button", has_text="castle")
    word.click()
    assert page.locator("button.masked").count() == 1 and "hidden word" in page.locator("button.masked").get_attribute("aria-label")
    page.keyboard.press("Enter")  # the word keeps the focus
    assert page.locator("button.masked").count() == 0 and "given" in word.get_attribute("class")
    for which, count in (("start", 23), ("half", 27), ("all", 55)):
        page.click(f"[name=hide][value={which}]")
        assert page.locator("button.masked").count() == count


def test_play_pause_and_scrub_offline(site, visit):
    page = visit(site)
    page.context.set_offline(True)
    page.select_option("[name=policy]", "threshold")
    page.click("[name=play]")
    page.wait_for_selector("[name=play][aria-label=Pause]", timeout=60_000)
    page.wait_for_function("document.querySelector('[name=pass]').value > 1")
    page.click("[name=play]")
    paused = page.input_value("[name=pass]")
    assert page.get_attribute("[name=play]", "aria-label") == "Play"
    scrub(page, 0)
    assert page.locator("button.masked").count() == 23 and page.locator("span.written").count() == 0
    page.check("[name=peek]")
    scrub(page, 1)
    assert page.locator("button.new[data-pass='1']").count() >= 1 and page.locator("span.new").count() == 1
    guessed = page.locator("button.masked:not([data-guess=''])").count()
    assert guessed == page.locator("button.masked").count() and "%" in page.locator("button.masked").first.get_attribute("title")
    scrub(page, 999)
    assert page.locator("button.masked").count() == 0 and page.locator("button.written").count() == 23 and int(paused) >= 2
    assert page.locator(".lucy-note").first.inner_text().startswith("9 passes")


def test_the_film_plays_to_its_end_and_a_change_forgets_it(site, visit):
    page = visit(site)
    page.click("[name=hide][value=none]")
    for word in ("hive", "proud"):
        page.locator(".lucy-text button", has_text=re.compile(f"^{word}$")).click()
    page.click("[name=play]")
    page.wait_for_function("document.querySelector('[name=status]').value === 'pass 9 of 9'", timeout=60_000)
    page.wait_for_selector("[name=play][aria-label=Play]")
    assert page.locator("button.written").count() == 2
    page.select_option("[name=policy]", "left")
    assert page.locator("button.masked").count() == 2 and page.is_disabled("[name=pass]")
    assert page.is_hidden("[name=steps]") and page.is_hidden("[name=limit]")


def test_a_beginning_of_the_reader(site, visit):
    page = visit(site)
    page.fill("[name=prompt]", "On a sunny Monday, Tom the dragon")
    page.press("[name=prompt]", "Enter")
    assert "sunny" in page.inner_text(".lucy-text") and page.locator("button.masked").count() > 40
    given = page.locator("button.given").count()
    page.click("[name=play]")
    page.wait_for_selector("[name=pass]:enabled", timeout=60_000)
    scrub(page, 999)
    assert page.locator("button.masked").count() == 0 and page.locator("button.given").count() == given
    page.fill("[name=prompt]", "dragon " * 40)
    page.press("[name=prompt]", "Enter")
    assert "too long" in page.inner_text("[name=status]")


def test_it_fits_a_phone(site, visit):
    page = visit(site, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.locator(".lucy-text button", has_text="castle").tap()
    page.locator("[name=play]").tap()
    page.wait_for_selector("[name=pass]:enabled", timeout=60_000)
    scrub(page, 5)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.eval_on_selector_all("button, select, input:not([type=checkbox])", "all => all.filter((e) => e.offsetHeight && e.offsetHeight < 32).length")
    assert small == 0, "too low for a finger"


def test_the_dark_has_its_own_colours(site, visit):
    def look(page) -> list[str]:
        return page.eval_on_selector(".lucy-app", "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]")

    light, dark = visit(site), visit(site, color_scheme="dark")
    assert look(light) != look(dark)
    for page, theme, like in ((light, "quarto-dark", dark), (dark, "quarto-light", visit(site))):
        page.evaluate("theme => document.body.classList.add(theme)", theme)
        assert look(page) == look(like), "the site's own switch comes first"


def test_the_film_stays_where_there_is_no_script(site, visit):
    page = visit(site, ready=".lucy img", java_script_enabled=False)
    assert page.locator(".lucy img").bounding_box()["width"] > 100 and "With JavaScript" in page.inner_text(".lucy")


def test_without_weights_a_sentence_says_so_and_the_film_stays(serve, visit, tmp_path):
    (tmp_path / "site").mkdir()
    folder = make_site(tmp_path / "site", [])
    for address in (serve(folder), (folder / "index.html").as_uri()):
        page = visit(address, ready=".lucy img", errors=True)
        page.wait_for_function("document.querySelector('.lucy').textContent.includes('could not be loaded')")
        assert page.locator(".lucy img").is_visible() and page.locator(".lucy-app").count() == 0
