"The page of `nanollada serve`: films that can be turned back, a stranger's input, and a real browser."
import base64
import io
import itertools
import json
import random
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from nanollada.backbone import Backbone, BackboneConfig, save_run
from nanollada.core import UserError
from nanollada.fast import WriteConfig, write_steps
from nanollada.toy import LUCY, sample
from nanollada.web import (CSS, LATER, SCRIPT, STAGE, WORD, Film, Served, Token, controls, film_gif, frame_html, listener, open_served, settings_of,
                           stage_html, together, tokens_of, write_film)

RUNS = [Path(__file__).resolve().parent.parent / "nbs" / "weights" / name for name in ("lucy", "lucy_ar")]
CFG = WriteConfig(gen_length=60, temperature=0.5)
SETTINGS = 60, 0.5, 0.1, 12, 0, 0  # the same, as the page's controls say it
BEGINNING = "On a sunny Monday, Tom"


@pytest.fixture(scope="module")
def served() -> list[Served]:
    return open_served(RUNS, "cpu")


def film_of(one: Served, text: str, cfg: WriteConfig = CFG, hidden: list[int] | None = None) -> Film:
    "The last film of a text."
    *_, last = write_film(one, text, cfg, hidden)
    return last


def text_of(html: str) -> str:
    "What a reader sees of some HTML, by a parser that is not ours."
    seen: list[str] = []
    parser = HTMLParser()
    parser.handle_data = seen.append
    parser.feed(html)
    return "".join(seen)


def plain(text: str) -> str:
    "A text without what a line break may change."
    return " ".join(text.split())


# ---------------------------------------------------------------- films


@pytest.mark.parametrize("side", (0, 1))
@pytest.mark.parametrize("cfg", (CFG, WriteConfig(gen_length=40, seed=3), WriteConfig(gen_length=48, temperature=1.0, seed=7)))
def test_a_film_turned_back_is_what_the_writer_showed(served, side, cfg):
    one, tokenizer = served[side], served[side].tokenizer
    context = [tokenizer.bos_token_id, *tokenizer.backend_tokenizer.encode(BEGINNING, add_special_tokens=False).ids]
    live, last = list(write_film(one, BEGINNING, cfg)), film_of(one, BEGINNING, cfg)
    steps = list(write_steps(one.model, [context], tokenizer, cfg))
    assert last.passes == len(steps) == len(live) - 1
    for n, step in enumerate(steps, 1):
        ids = step.ids[0].tolist()
        box = "" if side else "▒▒"
        said = [box if i == tokenizer.mask_token_id else tokenizer.decode([i], skip_special_tokens=True) for i in ids]
        shown, then = text_of(frame_html(last, n)), text_of(frame_html(live[n], n))
        assert "".join(shown.split()) == "".join(then.split()) == "".join("".join(said).split()), n
    assert [film.passes for film in live] == list(range(len(live)))


def test_the_confidence_is_the_probability_of_the_token(served):
    one = served[1]
    film = film_of(one, BEGINNING, WriteConfig(gen_length=30))
    context = [one.tokenizer.bos_token_id, *one.tokenizer.backend_tokenizer.encode(BEGINNING, add_special_tokens=False).ids]
    (step,) = [s for s in write_steps(one.model, [context], one.tokenizer, WriteConfig(gen_length=30)) if s.nfe == film.passes]
    ids = step.ids
    with torch.no_grad():
        logits = one.model(ids, True)[0, :-1].index_fill(-1, torch.tensor([one.tokenizer.mask_token_id]), -torch.inf)
    right = logits.softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    for place, token in enumerate(film.tokens):
        if 0 < token.at <= film.passes and token.text:
            assert token.sure == pytest.approx(right[place - 1].item(), abs=1e-4)
    assert sum(0 < token.at for token in film.tokens) == 30


def test_letters_of_several_tokens_come_whole(served):
    tokenizer = served[0].tokenizer
    say = lambda *ids: tokenizer.decode(ids, skip_special_tokens=True)
    for text in ("龙 🐝 naïve", "小明和小红🏳️‍🌈", "abc"):
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        at = list(range(1, len(ids) + 1))
        random.Random(0).shuffle(at)
        cells = tokens_of(ids, at, [0.5] * len(ids), say)
        assert "".join(cell.text for cell in cells) == text and not any("\ufffd" in cell.text for cell in cells)
        assert max(cell.at for cell in cells) == len(ids) and {cell.at for cell in cells} <= set(at)
        for n in range(len(ids)):  # as long as a token is missing, no half of a letter is shown
            canvas = [tokenizer.mask_token_id if place == n else token for place, token in enumerate(ids)]
            half = tokens_of(canvas, [LATER if place == n else 1 for place in range(len(ids))], [0.5] * len(ids), say)
            assert not any("\ufffd" in cell.text for cell in half) and LATER in {cell.at for cell in half}


def test_words_are_the_text_and_stand_alone():
    texts = [LUCY, *sample(20, 3), "", " ", "a", "  two-legged Lily's,\n\n(yes) 小明。ok ", "🐝🐝", "x_y 3.5% — “q”"]
    for text in texts:
        words = WORD.findall(text)
        assert "".join(words) == text and all(words)
    assert [word.strip() for word in WORD.findall("Lily's lamp, 小明。")] == ["Lily's", "lamp", ",", "小", "明", "。"]


def test_gaps_are_filled_and_the_rest_stays(served):
    words = WORD.findall(LUCY)
    for hidden in ([0], [3, 4, 5], list(range(0, len(words), 2)), list(range(len(words)))):
        film = film_of(served[0], LUCY, CFG, hidden)
        given = "".join(word for n, word in enumerate(words) if n not in hidden)
        assert "".join(token.text for token in film.tokens if not token.at) == given
        assert all(0 < token.at <= film.passes for token in film.tokens if token.at) and film.note.endswith("tokens/s")
    twin = film_of(served[1], LUCY, CFG, [3, 9])
    assert "".join(token.text for token in twin.tokens if not token.at) == "".join(words[:3]) and "blind" in twin.note


def test_chat_runs_answer_and_block_runs_write(tmp_path, served):
    shutil.copytree(RUNS[0], tmp_path / "talks")
    (tmp_path / "talks" / "train_config.json").write_text(json.dumps({"sft": {"gen_length": 20}}))
    (one,) = open_served([tmp_path / "talks"], "cpu")
    film = film_of(one, "Who met?", WriteConfig(temperature=0.5))
    assert len(film.tokens) == 20 and all(token.at for token in film.tokens), "the question is not part of the answer"
    assert controls([one])[0].value == 20
    with pytest.raises(UserError, match="prompt"):
        film_of(one, " ")
    with pytest.raises(UserError, match="fine-tuned"):
        open_served([tmp_path / "talks", RUNS[1]], "cpu")
    tokenizer = one.tokenizer
    cfg = BackboneConfig(len(tokenizer), 24, 1, 2, objective="block", block_length=4, mask_token_id=tokenizer.mask_token_id)
    save_run(Backbone(cfg), tokenizer, tmp_path / "blocks")
    (block,) = open_served([tmp_path / "blocks"], "cpu")
    assert film_of(block, "Tom", settings_of(16, 0.5, 0.1, 12, 0, 0)).passes > 0
    assert [control.interactive for control in controls([block])[:5]] == [True, True, True, False, True]
    assert [control.interactive for control in controls(served[1:])[:5]] == [True, True, False, False, False]


def test_runs_that_do_not_fit_are_named():
    for runs, said in (([], "0 runs"), (RUNS * 2, "4 runs"), (RUNS[1:] * 2, "objective ar"), ([RUNS[0] / "nothing"], "no such file")):
        with pytest.raises(UserError, match=said):
            open_served(runs, "cpu")
    assert [one.name for one in open_served(RUNS[:1] * 2, "cpu")] == ["lucy", "lucy-2"]


def test_visitors_at_once_get_what_each_gets_alone(served):
    def visit(seed: int) -> list:
        *_, films = together(served, lambda one: write_film(one, BEGINNING * (seed % 2), WriteConfig(gen_length=40, temperature=0.8, seed=seed)))
        return [film.tokens for film in films]

    alone = [visit(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(visit, range(4))) == alone
    assert len({str(films) for films in alone}) == 4


def test_one_pass_of_a_model_at_a_time(served):
    at_work, most, order = [], [], []

    def steps(who: int):
        for _ in range(5):
            at_work.append(who)
            time.sleep(0.005)
            most.append(len(at_work))
            order.append(at_work.pop())
            yield who
        raise UserError("ended badly")

    def visit(who: int) -> None:
        with pytest.raises(UserError):
            list(served[0].in_turns(steps(who)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(visit, range(4)))
    assert set(most) == {1} and len(order) == 20 and not served[0].lock.locked()


# ---------------------------------------------------------------- what a stranger types


NASTY = ["<script>window.hacked = 1</script>", "<img src=x onerror='window.hacked=1'>", "${window.hacked=1}", "`${window.hacked=1}`",
         "{{constructor.constructor('window.hacked=1')()}}", "{{value}}", '"><b data-at="1">', "&lt;b&gt;", "javascript:window.hacked=1"]


@pytest.mark.parametrize("text", NASTY)
def test_html_of_a_visitor_or_a_model_stays_text(text):
    film = Film("<b>run</b>", "diffusion", (Token(text), Token(" " + text, 1, 0.5)), 1)
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(stage_html([film]))
    assert [tag for tag, _ in found] == ["section", "h2", "small", "p", "span", "p"] and found[4][1]["data-text"] == text
    assert text_of(frame_html(film, 1)) == f"{text} {text}" and "<b>run" not in stage_html([film])


def test_marks_and_controls_in_a_prompt_are_text_or_nothing(served):
    tokenizer = served[0].tokenizer
    for text, seen in (("<|mask|><|im_end|>", "<|mask|><|im_end|>"), ("a\u202eb\x00c\x1b[2J\u2066d", "abc[2Jd"), ("half \ud83d!", "half !"),
                       ("\u200f" + "שלום", "שלום")):
        first = next(write_film(served[0], text, CFG))
        assert "".join(token.text for token in first.tokens if not token.at) == seen
        assert sum(token.at == LATER for token in first.tokens) == 60, "no mask but those to write"
    ids = tokenizer.backend_tokenizer.encode("x\u202ey", add_special_tokens=False).ids
    model_says = tokens_of(ids, [1] * len(ids), [1.0] * len(ids), lambda *ids: tokenizer.decode(ids))
    assert "\u202e" not in "".join(token.text for token in model_says)


@pytest.mark.parametrize("values, said", [
    (("a" * 1_000_000, None, *SETTINGS), "1,000,000 characters"), (("dragon " * 200, None, *SETTINGS), "do not fit"),
    (("a b", [], *SETTINGS), "nothing is hidden"), (("a b", [-1, 99], *SETTINGS), "nothing is hidden"),
    (("", None, 10**9, 0.5, 0.1, 12, 0, 0), "do not fit"),
    (("", None, 60, float("nan"), 0.1, 12, 0, 0), "temperature"), (("", None, 60, 0, float("nan"), 12, 0, 0), "limit"),
    (("", None, 60, -1, 0.1, 12, 0, 0), "temperature"),
    (("", None, 60, 0.5, 0.1, 12, 0, -5), "seed"), (("", None, 0, 0.5, 0.1, 12, 0, 0), "gen_length|something went wrong"),
    (("", None, "x", 0.5, 0.1, 12, 0, 0), "gen_length|something went wrong")])
def test_whatever_goes_wrong_is_one_line(served, values, said):
    shown = []
    try:
        shown += listener(served)(*values)
    except Exception:
        pass  # for the server's log
    if shown[0][1] == "":  # a length of 0 is the usual one
        assert values[2] == 0
        return
    line = shown[-1][1]
    assert re.search(said, line) and line.count("\n") == 0 and len(line) < 400 and "Traceback" not in line and "/" not in text_of(line)


def test_nothing_on_the_page_names_another_host():
    assert not re.search(r"https?:|//\w|@import|url\(", CSS + STAGE + SCRIPT)
    assert not re.search(r"fetch|eval|innerHTML|Function|server\.", SCRIPT) and "{{" not in STAGE, "no template reads what a visitor wrote"


# ---------------------------------------------------------------- GIFs


@pytest.mark.parametrize("sides", ([0], [1], [0, 1]))
def test_a_gif_has_a_picture_for_each_pass(served, sides):
    Image = pytest.importorskip("PIL.Image")
    films = [film_of(served[side], "", WriteConfig(gen_length=40, temperature=0.5, seed=2)) for side in sides]
    passes, gif = max(film.passes for film in films), Image.open(io.BytesIO(film_gif(films)))
    assert (gif.format, gif.n_frames, gif.info["loop"]) == ("GIF", passes + 1, 0)
    greys = []
    for n in range(gif.n_frames):
        gif.seek(n)
        greys.append(sum(count for count, colour in gif.convert("RGB").getcolors(2**20) if colour == (0xC8, 0xC8, 0xC8)))
    assert greys[-1] < 50 and (greys[0] > 5000) == (0 in sides) and all(a >= b - 50 for a, b in itertools.pairwise(greys))


def test_nothing_leaves_the_picture(served):
    Image = pytest.importorskip("PIL.Image")
    film = film_of(served[1], LUCY, CFG, [2])
    assert "goes on from the first" in film.note
    gif = Image.open(io.BytesIO(film_gif([film])))
    gif.seek(gif.n_frames - 1)
    wide = gif.convert("RGB")
    edges = wide.crop((0, 0, 10, wide.height - 6)), wide.crop((wide.width - 10, 0, wide.width, wide.height - 6))
    assert [edge.getcolors() for edge in edges] == [[(edge.width * edge.height, (255, 255, 255))] for edge in edges]


def test_a_gif_of_an_unusual_film_is_drawn():
    for tokens in ((), (Token("a\nb", 1, 0.5), Token("\n\n", 2, 0.5), Token(" " * 9, 3, 0.1), Token("龙" * 200, 3, 1.0)), (Token("given"),)):
        assert film_gif([Film("x", "block", tokens, 3 if len(tokens) > 1 else 0)]).startswith(b"GIF8")


# ---------------------------------------------------------------- a server


@pytest.fixture(scope="module")
def address(served):
    "A server of the page on a free port."
    pytest.importorskip("gradio", reason="no gradio: pip install nanollada[web]")
    import uvicorn
    from fastapi import FastAPI

    from nanollada.web import mount_page
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(mount_page(FastAPI(), served), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(5)


def test_doors_that_are_not_needed_are_closed(address):
    import httpx
    here = Path(__file__).resolve()
    with httpx.Client(base_url=address, timeout=20) as stranger:
        for path in (f"file={here}", f"file/{here}", "file=/etc/passwd", "proxy=http://127.0.0.1:1/", "info",
                     "stream/a/b/c/playlist.m3u8", "upload_progress", "runs",
                     "component_server", "call/listen", "queue/status/../../file=x", "deep_link", "%66ile=/etc/passwd"):
            answer = stranger.get("/gradio_api/" + path)
            assert answer.status_code in (404, 405, 413), path
            assert b"root:" not in answer.content and b"import" not in answer.content
        assert stranger.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
        assert stranger.get("/monitoring").status_code == stranger.get("/monitoring/summary").status_code == 404
        assert stranger.post("/gradio_api/queue/join", content=b"x" * (2**21 + 1)).status_code == 413
        assert stranger.post("/gradio_api/queue/join", content=iter([b"x"] * 9)).status_code == 413, "a body that does not say how long it is"
        assert stranger.post("/gradio_api/queue/join", content=b'{"data":').status_code == 422
        assert stranger.post("/login", content=b"x" * (2**21 + 1)).status_code == 413 and stranger.get("/openapi.json").status_code == 404
        home = stranger.get("/")
        assert home.status_code == 200 and "default-src 'self'" in home.headers["content-security-policy"]
        assert str(RUNS[0].parent) not in home.text, "the page does not say where the runs lie"


def test_no_other_site_reads_what_is_told_to_a_visitor(address):
    import httpx
    for host in ("127.0.0.1", "192.168.1.5:7860", "mine.example"):
        for verb, path in (("GET", "/config"), ("OPTIONS", "/gradio_api/queue/join")):
            answer = httpx.request(verb, address + path, headers={"host": host, "origin": "http://evil.example", "access-control-request-method": "POST"})
            assert answer.status_code == 200 and not [name for name in answer.headers if name.startswith("access-control")], (host, path)


def test_what_nobody_fetches_is_not_kept_for_ever(served):
    pytest.importorskip("gradio", reason="no gradio: pip install nanollada[web]")
    from fastapi import FastAPI

    from nanollada.web import VISITORS, mount_page
    inner = mount_page(FastAPI(), served).routes[-1].app
    waiting = inner.get_blocks()._queue
    for n in range(500):
        waiting.pending_messages_per_session[str(n)] = n
    assert waiting.max_size + VISITORS <= len(waiting.pending_messages_per_session) <= 100, "those in the queue, and few more"
    for n in range(1100):
        inner.state_holder[str(n)]
    assert len(inner.state_holder.session_data) <= 1001


# ---------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def chromium():
    "A headless Chromium; tests that need it are skipped where there is none."
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    calm = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-quic"]
    with playwright.sync_playwright() as api:
        try:
            browser = api.chromium.launch(executable_path=found, args=calm)
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    "A function that opens the page; a request to another host, or what the page complains of, fails the test."
    contexts, asked, complaints = [], [], []

    def start(**options: object):
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" and "413" not in message.text else None)
        page.goto(address)
        page.wait_for_selector("button:has-text('Write')")
        return page

    yield start
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))] and not complaints


TYPE = "(box, text) => { box.value = text; box.dispatchEvent(new Event('input', {bubbles: true})); }"  # what a keyboard could not


def watch(page) -> None:
    "Keep every state of the first text that the page shows."
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => { const film = document.querySelector('.film');
        if (film) window.seen.push(film.innerText); }).observe(document.body,
        {subtree: true, childList: true, attributes: true, characterData: true}); }""")


def press(page, name: str, films: list[Film]) -> None:
    "Press a button, and wait until these films have been shown to their ends."
    page.evaluate("document.querySelectorAll('.film').forEach((film) => { film.dataset.passes = ''; })")
    page.get_by_role("button", name=name, exact=True).click()
    finished(page, films)


def finished(page, films: list[Film]) -> None:
    page.wait_for_function("(passes) => [...document.querySelectorAll('.film')].map((film) => film.dataset.passes).join() === passes",
                           arg=",".join(str(film.passes) for film in films))


def both(served: list[Served], text: str, hidden: list[int] | None = None) -> list[Film]:
    return [film_of(one, text, CFG, hidden) for one in served]


def scrub(page, to: int) -> None:
    "Move the slider of passes."
    page.eval_on_selector("[name=pass]", "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input', {bubbles: true})); }", to)


def texts(page) -> list[str]:
    return [plain(text) for text in page.locator(".film").all_inner_texts()]


def test_a_text_streams_and_can_be_turned_back(visit, served):
    page = visit()
    assert not page.is_visible("#stage")
    watch(page)
    page.get_by_label("The beginning of a text").fill(BEGINNING)
    films = both(served, BEGINNING)
    press(page, "Write", films)
    assert texts(page) == [plain("".join(token.text for token in film.tokens)) for film in films]
    half = {state for state in page.evaluate("window.seen") if "▒" in state}
    assert len(half) > 3, "passes are shown while they are made"
    most = max(film.passes for film in films)
    assert page.get_attribute("[name=pass]", "max") == page.input_value("[name=pass]") == str(most)
    for n in (0, 1, 5, films[0].passes, most):
        scrub(page, n)
        assert texts(page) == [plain(text_of(frame_html(film, n))) for film in films] and page.inner_text("[name=status]") == f"pass {n} of {most}"
        assert page.locator("#stage .stage .new").count() == sum(token.at == n > 0 for film in films for token in film.tokens)
    notes = page.locator(".note").all_inner_texts()
    assert all(re.fullmatch(r"\d+ passes · \d+ tokens · [\d,]+ tokens/s", note) for note in notes)
    assert notes[1].startswith(f"{films[1].passes} passes")
    span = page.locator(".film span[data-at='1']").first
    amber = span.evaluate("e => getComputedStyle(e).backgroundColor")
    page.select_option("[name=colour]", "when")
    assert span.evaluate("e => getComputedStyle(e).backgroundColor") != amber


def test_play_and_pause(visit, served):
    page = visit()
    press(page, "Write", both(served, ""))
    play, most = page.locator("[name=play]"), int(page.get_attribute("[name=pass]", "max"))
    assert page.input_value("[name=pass]") == str(most)
    play.click()
    assert play.get_attribute("aria-label") == "Pause"
    page.wait_for_function("+document.querySelector('[name=pass]').value > 2 && +document.querySelector('[name=pass]').value < 40")
    play.press("Enter")
    paused = page.input_value("[name=pass]")
    page.wait_for_timeout(400)
    assert page.input_value("[name=pass]") == paused and play.get_attribute("aria-label") == "Play" and int(paused) < most
    scrub(page, most - 2)
    play.click()
    page.wait_for_selector("[name=play][aria-label=Play]")
    assert page.input_value("[name=pass]") == str(most)


def test_words_are_hidden_by_mouse_and_key_and_filled(visit, served):
    page = visit()
    page.get_by_role("tab", name="Fill gaps").click()
    page.get_by_label("A text", exact=True).fill(LUCY)
    page.wait_for_selector(".words label >> nth=50")
    words = [word.strip() for word in WORD.findall(LUCY)]
    assert [text.strip() for text in page.locator(".words label").all_inner_texts()] == words
    hidden = [3, 10]
    page.locator(".words label").nth(3).click()
    page.locator(".words input").nth(10).press("Space")
    assert page.locator(".words input:checked").count() == 2
    films = both(served, LUCY, hidden)
    press(page, "Fill", films)
    expected = films[0]
    assert texts(page)[0] == plain("".join(token.text for token in expected.tokens))
    assert page.locator("section >> nth=0 >> span[data-at]").count() == sum(token.at > 0 for token in expected.tokens)
    assert "blind behind a gap" in page.locator(".note").nth(1).inner_text()
    page.get_by_role("button", name="Hide words", exact=True).click()
    page.wait_for_function("() => !document.querySelector('.words input:checked')")


def test_two_visitors_at_once(visit, served):
    starts = BEGINNING, "On a rainy Friday, Lucy"
    pages = [visit(), visit()]
    for page, start in zip(pages, starts):
        page.get_by_label("The beginning of a text").fill(start)
    for page in pages:
        page.get_by_role("button", name="Write", exact=True).click()
    for page, start in zip(pages, starts):
        films = both(served, start)
        finished(page, films)
        assert texts(page) == [plain("".join(token.text for token in film.tokens)) for film in films]


def test_a_visitor_who_leaves_stops_the_writing(visit, served, monkeypatch):
    made, model = [0], served[1].model
    forward = type(model).forward

    def slow(self, *args, **kwargs):
        made[0] += self is model
        time.sleep(0.03)
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(type(model), "forward", slow)
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Length").fill("200")
    page.get_by_label("number input for Temperature").fill("1.5")
    page.get_by_role("button", name="Write", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('[data-at]').length > 20")
    page.close()
    time.sleep(1.5)
    then = made[0]
    time.sleep(0.8)
    assert made[0] == then < 190 and not served[1].lock.locked()


def test_hostile_prompts_are_shown_as_text(visit, served):
    page = visit()
    for text in (" ".join(NASTY[:3]), " ".join(NASTY[3:6]), " ".join(NASTY[6:]),
                 "a\u202eb \u2066c\x07", "half \ud83d emoji", "<|mask|> <|im_end|> <|endoftext|>"):
        page.get_by_label("The beginning of a text").evaluate(TYPE, text)
        press(page, "Write", both(served, text))
        assert not page.evaluate("window.hacked") and page.locator("#stage script, #stage img, .film b").count() == 0
        expected = next(write_film(served[0], text, CFG)).tokens
        assert texts(page)[0].startswith(plain("".join(token.text for token in expected if not token.at)))
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", page.inner_text(".film"))
    scrub(page, 1)
    page.get_by_role("button", name="Hide words", exact=True).click()
    page.get_by_label("A text", exact=True).evaluate(TYPE, " ".join(NASTY))
    page.wait_for_selector(".words label:has-text('javascript')")
    assert not page.evaluate("window.hacked") and page.locator(".words img, .words b, .words script").count() == 0


def test_a_megabyte_is_refused_in_one_line(visit, served):
    page = visit()
    page.get_by_label("The beginning of a text").evaluate(
        "(box) => { box.removeAttribute('maxlength'); box.value = 'a '.repeat(500_000); box.dispatchEvent(new Event('input', {bubbles: true})); }")
    page.get_by_role("button", name="Write", exact=True).click()
    page.wait_for_selector(".trouble")
    said = page.inner_text(".trouble")
    assert "1,000,000 characters" in said and "\n" not in said and not page.is_visible("#stage")
    page.get_by_label("The beginning of a text").fill(BEGINNING)
    press(page, "Write", both(served, BEGINNING))
    assert page.locator(".trouble").count() == 0 and len(texts(page)) == 2


def test_the_film_is_taken_away_as_a_gif(visit, served, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    page = visit(accept_downloads=True)
    press(page, "Write", both(served, ""))
    page.get_by_role("button", name="Make a GIF").click()
    link = page.wait_for_selector("a[download]")
    with page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "film.gif")
    gif = Image.open(tmp_path / "film.gif")
    assert gif.format == "GIF" and gif.n_frames == int(page.get_attribute("[name=pass]", "max")) + 1
    assert base64.b64decode(page.get_attribute(".gif img", "src").partition(",")[2]) == (tmp_path / "film.gif").read_bytes()


def test_it_fits_a_phone_and_has_a_dark_side(visit, served):
    looks = []
    for scheme in ("light", "dark"):
        page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme=scheme)
        page.get_by_role("button", name="Write", exact=True).tap()
        finished(page, both(served, ""))
        page.get_by_role("button", name="Hide words", exact=True).tap()
        page.locator(".words label").nth(2).tap()
        assert page.locator(".words input:checked").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.eval_on_selector_all("#stage button, .words label", "all => all.filter((e) => e.offsetHeight && e.offsetHeight < 32).length") == 0
        looks.append(page.eval_on_selector("#stage", "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"))
    assert looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]
