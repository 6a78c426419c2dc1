"Chapter 14a: half-written text, several turns, terminal and pipe."

import io
import re

import pytest
import torch

from nanollada import toy
from nanollada.backbone import Backbone, preset
from nanollada.chat import MASK_BOX, Chat, ChatStep, canvas_text, run_chat, show_in_terminal
from nanollada.core import UserError, printable
from nanollada.fast import WriteConfig, write_ids
from nanollada.pretrain import cross
from nanollada.sft import ChatFormat, answer
from nanollada.tokenizer import encode, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(toy.sample(60), 400)


@pytest.fixture(scope="module")
def models(tokenizer):
    "Two models that have learned nothing and never end an answer."
    torch.manual_seed(0)
    shape = preset("toy", len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=32, objective="ar", mask_token_id=tokenizer.mask_token_id,
                   max_position_embeddings=96, initializer_range=0.5)
    ar = Backbone(shape).eval()
    return {"ar": ar, "diffusion": cross(ar).eval()}


both = pytest.mark.parametrize("objective", ["ar", "diffusion"])


def prompt(tokenizer, turns):
    form = ChatFormat(tokenizer)
    return form.context(form.encode(turns))


# Half-written text

def test_letters_appear_whole(tokenizer):
    ids, mask = encode(tokenizer, "a猫🐈"), tokenizer.mask_token_id
    texts = [canvas_text([*ids[:n], mask, mask], tokenizer, True) for n in range(len(ids) + 1)]
    assert texts[-1] == "a猫🐈" and set(texts) == {"", "a", "a猫", "a猫🐈"}
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))


def test_a_canvas_as_text(tokenizer):
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    cat = encode(tokenizer, "猫")
    assert canvas_text([mask, *cat, mask, mask], tokenizer) == f"{MASK_BOX}猫{MASK_BOX}{MASK_BOX}"
    assert canvas_text([*cat, eos, mask, *cat], tokenizer) == "猫"
    assert canvas_text([], tokenizer) == "" and canvas_text([eos, mask], tokenizer) == ""
    assert canvas_text(encode(tokenizer, MASK_BOX), tokenizer, True) == MASK_BOX  # a box that was written stays


# Chat

@both
def test_the_stream_ends_with_what_answer_says(models, tokenizer, objective):
    model = models[objective]
    steps = list(Chat(model, tokenizer, gen_length=8).stream("Who?"))
    assert [s.passes for s in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].text == answer(model, tokenizer, ["Who?"], gen_length=8)[0]
    if objective == "diffusion":
        slow = list(Chat(model, tokenizer, gen_length=8, fast=False).stream("Who?"))
        assert MASK_BOX in slow[0].text and MASK_BOX not in slow[-1].text and len(slow) == 8
        counts = [s.text.count(MASK_BOX) for s in slow]
        assert counts == sorted(counts, reverse=True)
    else:
        assert all(b.text.startswith(a.text) for a, b in zip(steps, steps[1:]))


@both
def test_a_second_question_sees_the_first(models, tokenizer, objective):
    model, chat = models[objective], Chat(models[objective], tokenizer, gen_length=6)
    first, second = chat.ask("Who?"), chat.ask("What?")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": first}, {"role": "user", "content": "What?"}]
    assert second == answer(model, tokenizer, [turns], gen_length=6)[0]
    assert chat.turns == [*turns, {"role": "assistant", "content": second}]
    chat.reset()
    assert chat.turns == [] and chat.ask("Who?") == first


def test_the_system_turn_is_told_and_kept(models, tokenizer):
    chat = Chat(models["ar"], tokenizer, system="Be brief.", gen_length=4)
    system = {"role": "system", "content": "Be brief."}
    turns = [system, {"role": "user", "content": "Who?"}]
    assert chat.ask("Who?") == answer(models["ar"], tokenizer, [turns], gen_length=4)[0]
    chat.reset()
    assert chat.turns == [system]


def test_draws_depend_on_seed_and_turn(models, tokenizer):
    def talk(seed):
        chat = Chat(models["diffusion"], tokenizer, gen_length=6, temperature=1.0, seed=seed)
        return [chat.ask("Who?"), chat.ask("Who?")]
    assert talk(1) == talk(1) != talk(2)


@both
def test_old_turns_are_forgotten_whole_and_this_is_told(models, tokenizer, objective):
    chat = Chat(models[objective], tokenizer, gen_length=8)
    chat.turns = [{"role": role, "content": "word word word"} for _ in range(5) for role in ("user", "assistant")]
    last = list(chat.stream("Who?"))[-1]
    assert 0 < last.forgotten < 10 and last.forgotten % 2 == 0 and len(chat.turns) == 12  # remembered, though not shown
    kept = [*chat.turns[:10][last.forgotten :], {"role": "user", "content": "Who?"}]
    context = prompt(tokenizer, kept)
    assert len(context) <= 88 < len(prompt(tokenizer, chat.turns[last.forgotten - 2 : 11]))
    (ids,) = write_ids(models[objective], [context], tokenizer, WriteConfig(gen_length=8))
    assert tokenizer.decode(ids, skip_special_tokens=True) == last.text


@both
def test_questions_that_cannot_be_asked_change_nothing(models, tokenizer, objective):
    chat = Chat(models[objective], tokenizer, gen_length=8)
    for question, message in [("word " * 90, "ask something shorter"), ("  ", "expected some text")]:
        with pytest.raises(UserError, match=message):
            chat.ask(question)
    stream = chat.stream("Who?")
    next(stream)
    stream.close()  # the reader loses patience
    assert chat.turns == []
    with pytest.raises(UserError, match="96 tokens do not fit the context of 96"):
        Chat(models[objective], tokenizer, gen_length=96).ask("Who?")


def test_settings_are_checked_when_the_chat_begins(models, tokenizer):
    with pytest.raises(UserError, match="steps is 4, which means nothing to an ar model"):
        Chat(models["ar"], tokenizer, steps=4)


# Terminal and pipe

class Terminal(io.StringIO):
    "A screen that keeps what it is sent."

    def isatty(self):
        return True


def screen(written):
    "What a terminal shows after these characters."
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|.|\n", written, re.S):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    return "\n".join(line.rstrip() for line in lines)


@pytest.fixture
def xterm(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def test_text_appears_in_place(xterm):
    out, texts = Terminal(), ["▒▒▒", "a\n▒▒▒", "a\nb▒c\nd", "e" * 100 + "[b]x[/b]"]
    steps = [ChatStep(text, n, 0) for n, text in enumerate(texts)]
    assert show_in_terminal(iter(steps), out) == steps[-1]
    assert screen(out.getvalue()) == "e" * 60 + "\n" + "e" * 40 + "[b]x[/b]\n" and "▒▒▒" in out.getvalue()


def test_a_model_cannot_touch_the_terminal(xterm):
    "code.md 25: neither escapes nor bidirectional controls reach the terminal or the pipe."
    nasty = "a\x1b]0;title\x07\x1b[2Jb\u202ec\u2066d\x9b5me"
    out = Terminal()
    show_in_terminal(iter([ChatStep(nasty, 1, 0)]), out)
    assert screen(out.getvalue()) == "a]0;title[2Jbcd5me\n" == printable(nasty) + "\n"
    assert not set("\x07\x9b\u202e\u2066") & set(out.getvalue()) and "\x1b]" not in out.getvalue()


class Nasty(Chat):
    def ask(self, question):
        return "a\x1b[31m\nb\u202e"


def test_a_pipe_gets_no_controls_either(models, tokenizer):
    out = io.StringIO()
    assert run_chat(Nasty(models["ar"], tokenizer), io.StringIO("Who?\n"), out) == 1
    assert out.getvalue() == "a[31m b\n"


@both
def test_in_a_pipe_one_line_in_is_one_line_out(models, tokenizer, objective):
    out, chat = io.StringIO(), Chat(models[objective], tokenizer, gen_length=6)
    asked = io.StringIO("Who?\n\n/reset\nWho?\nWhat?\n/quit\nWho?\n")
    count = run_chat(chat, asked, out)
    lines = out.getvalue().split("\n")
    assert count == 3 and len(lines) == 5 and lines[1] == lines[4] == "" and "\x1b" not in out.getvalue()
    said = printable(answer(models[objective], tokenizer, ["Who?"], gen_length=6)[0])
    assert lines[0] == lines[2] == " ".join(said.splitlines())
    with pytest.raises(UserError, match="line 2 of the questions: .*ask something shorter"):
        run_chat(chat, io.StringIO("\n" + "word " * 90), io.StringIO())


@both
def test_a_terminal_shows_answers_errors_and_what_was_forgotten(models, tokenizer, objective, xterm):
    out, questions = Terminal(), Terminal("Who?\n" + "word " * 90 + "\n/help\n" + "word word word word\n" * 4)
    assert run_chat(Chat(models[objective], tokenizer, gen_length=6), questions, out) == 5
    written = out.getvalue()
    assert written.count("> ") == 8 and "ask something shorter" in written and "(there are /reset and /quit)" in written
    assert "oldest turns no longer fit" in written
    first = printable(answer(models[objective], tokenizer, ["Who?"], gen_length=6)[0])
    assert "".join(first.split()) in "".join(screen(written).split())


def test_ctrl_c_ends_an_answer_and_not_the_chat(models, tokenizer, monkeypatch, xterm):
    def stream(self, question):
        yield ChatStep("half", 1, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr("nanollada.chat.Chat.stream", stream)
    out = Terminal()
    assert run_chat(Chat(models["ar"], tokenizer), Terminal("Who?\n/quit\n"), out) == 0
    assert "(stopped; this question and its answer are forgotten)" in out.getvalue()
