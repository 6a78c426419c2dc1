"Chapter 14a: the loop over steps, half-written text, several turns, terminal and pipe."

import io
import threading

import pytest
import torch

from nanollada import toy
from nanollada.backbone import Backbone, preset
from nanollada.chat import (MASK_BOX, Chat, ChatStep, as_iterator, canvas_text, growing_text, printable, rows_taken,
                            run_chat, show_in_terminal)
from nanollada.core import UserError
from nanollada.pretrain import cross
from nanollada.sft import AnswerConfig, ChatFormat, answer, write_ids
from nanollada.tokenizer import encode, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(toy.sample(60), 400)


@pytest.fixture(scope="module")
def models(tokenizer):
    "Two models that have learned nothing and never end an answer."
    torch.manual_seed(0)
    shape = preset("toy", len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                   objective="ar", mask_token_id=tokenizer.mask_token_id, max_position_embeddings=96, initializer_range=0.5)
    ar = Backbone(shape).eval()
    return {"ar": ar, "diffusion": cross(ar).eval()}


both = pytest.mark.parametrize("objective", ["ar", "diffusion"])


# The loop over steps

def test_values_arrive_in_order_and_in_step():
    log = []

    def function(report):
        for n in range(4):
            log.append(f"made {n}")
            report(n)

    for n in as_iterator(function):
        log.append(f"seen {n}")
    assert log == [f"{what} {n}" for n in range(4) for what in ("made", "seen")]


def test_errors_come_through_and_nothing_is_left_running():
    def fails(report):
        report(1)
        raise UserError("broken")

    before = threading.active_count()
    found = as_iterator(fails)
    assert next(found) == 1
    with pytest.raises(UserError, match="broken"):
        next(found)
    endless = as_iterator(lambda report: [report(n) for n in iter(int, 1)])
    assert [next(endless) for _ in range(3)] == [0, 0, 0]
    endless.close()
    assert threading.active_count() == before and list(as_iterator(lambda report: None)) == []


# Half-written text

def test_letters_appear_whole(tokenizer):
    ids = encode(tokenizer, "a猫🐈")
    texts = [growing_text(ids[:n], tokenizer) for n in range(len(ids) + 1)]
    assert texts[-1] == "a猫🐈" and set(texts) == {"", "a", "a猫", "a猫🐈"}
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))


def test_a_canvas_as_text(tokenizer):
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    cat = encode(tokenizer, "猫")
    assert canvas_text([mask, *cat, mask, mask], tokenizer, mask) == f"{MASK_BOX}猫{MASK_BOX}{MASK_BOX}"
    assert canvas_text([*cat, eos, mask, *cat], tokenizer, mask) == "猫"
    assert canvas_text([], tokenizer, mask) == "" and canvas_text([eos, mask], tokenizer, mask) == ""


# Chat

@both
def test_the_stream_ends_with_what_answer_says(models, tokenizer, objective):
    model = models[objective]
    steps = list(Chat(model, tokenizer, gen_length=8).stream("Who?"))
    assert [s.done for s in steps] == [False] * (len(steps) - 1) + [True]
    assert [s.passes for s in steps[:-1]] == list(range(1, len(steps)))
    assert steps[-1].text == answer(model, tokenizer, ["Who?"], gen_length=8)[0]
    if objective == "diffusion":
        assert MASK_BOX in steps[0].text and MASK_BOX not in steps[-1].text
        counts = [s.text.count(MASK_BOX) for s in steps]
        assert counts == sorted(counts, reverse=True)
    else:
        assert all(b.text.startswith(a.text) for a, b in zip(steps, steps[1:-1]))


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
    assert chat.ask("Who?") == answer(models["ar"], tokenizer, [[system, {"role": "user", "content": "Who?"}]], gen_length=4)[0]
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
    context = ChatFormat(tokenizer).prompt(kept)
    assert len(context) <= 88 < len(ChatFormat(tokenizer).prompt(chat.turns[last.forgotten - 2 : 11]))
    ids = write_ids(models[objective], [context], tokenizer, AnswerConfig(gen_length=8), None)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == last.text


@both
def test_questions_that_cannot_be_asked_change_nothing(models, tokenizer, objective):
    chat = Chat(models[objective], tokenizer, gen_length=8)
    for question, message in [("word " * 90, "ask something shorter"), ("  ", "is empty")]:
        with pytest.raises(UserError, match=message):
            chat.ask(question)
    stream = chat.stream("Who?")
    next(stream)
    stream.close()  # the reader loses patience
    assert chat.turns == []


def test_settings_are_checked_when_the_chat_begins(models, tokenizer):
    with pytest.raises(UserError, match="steps is 4, which means nothing to an ar model"):
        Chat(models["ar"], tokenizer, steps=4)


# Terminal and pipe

class Terminal(io.StringIO):
    "A screen."

    def isatty(self):
        return True


def test_rows_on_the_screen():
    assert [rows_taken(text, 10) for text in ("", "a" * 10, "a" * 11, "猫" * 5, "猫" * 6, "a\n\nb")] == [1, 1, 2, 1, 2, 3]


@both
def test_in_a_pipe_one_line_in_is_one_line_out(models, tokenizer, objective):
    out = io.StringIO()
    count = run_chat(models[objective], tokenizer, io.StringIO("Who?\n\n/reset\nWho?\nWhat?\n/quit\nWho?\n"), out, gen_length=6)
    lines = out.getvalue().split("\n")
    assert count == 3 and len(lines) == 5 and lines[1] == lines[4] == "" and "\x1b" not in out.getvalue()
    assert lines[0] == lines[2] == " ".join(printable(answer(models[objective], tokenizer, ["Who?"], gen_length=6)[0]).splitlines())
    with pytest.raises(UserError, match="line 2 of the questions: .*ask something shorter"):
        run_chat(models[objective], tokenizer, io.StringIO("\n" + "word " * 90), io.StringIO(), gen_length=8)


def screen(written, columns=80):
    "What a terminal shows after these characters: carriage return, cursor up, clear below, line breaks."
    import re
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[AJ]|.|\n", written, re.S):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] if row == len(lines) else []
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part == "\x1b[J":
            lines = [*lines[:row], lines[row][:column]]
        else:
            lines[row] = lines[row][:column] + part + lines[row][column + 1 :]
            column += 1
    return "\n".join(lines)


def test_a_model_cannot_touch_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\x9bc\n猫") == "a[2Jbc\n猫"


def test_text_appears_in_place():
    texts = ["▒▒▒", "a\n▒▒▒", "a\nb▒c\nd", "e"]
    for grows in (True, False):
        out = Terminal()
        steps = [ChatStep(text, n == 3, n, 0) for n, text in enumerate(texts)]
        assert show_in_terminal(iter(steps), out, grows) == steps[-1]
        assert screen(out.getvalue()) == "e\n"
    out = Terminal()
    show_in_terminal(iter([ChatStep(text, False, 0, 0) for text in ("a", "ab", "ab c")]), out, True)
    assert out.getvalue() == "ab c\n"


@both
def test_a_terminal_shows_answers_errors_and_what_was_forgotten(models, tokenizer, objective):
    out, long_line = Terminal(), "word " * 90
    questions = Terminal("Who?\n" + long_line + "\n" + "word word word word\n" * 4)
    assert run_chat(models[objective], tokenizer, questions, out, gen_length=6) == 5
    written = out.getvalue()
    assert written.count("> ") == 7 and "ask something shorter" in written and "oldest turns no longer fit" in written
    assert ("\x1b" in written) == (objective == "diffusion")
    assert printable(answer(models[objective], tokenizer, ["Who?"], gen_length=6)[0]) in screen(written)


@both
def test_a_command_that_is_none_and_a_canvas_too_large(models, tokenizer, objective):
    out = Terminal()
    assert run_chat(models[objective], tokenizer, Terminal("/help\n/quit\n"), out, gen_length=6) == 0
    assert "(there is no /help; there are /reset and /quit)" in out.getvalue()
    size = models[objective].cfg.max_position_embeddings
    with pytest.raises(UserError, match=f"gen_length is {size}, as much as the whole context of {size} tokens"):
        Chat(models[objective], tokenizer, gen_length=size)
