"The command line as a stranger meets it: verbs run, help explains, and mistakes end in one line."
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from safetensors.torch import load_file

import nanollada
from nanollada import toy
from nanollada.cli import VERBS, main
from nanollada.sft import toy_conversations

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in toy.sample(300, 0)))
    return place


def flags_of(verb: str) -> list:
    parts = [resolve_name(f"nanollada.{part}") if isinstance(part, str) else part for part in VERBS[verb]]
    return [part for part in parts if isinstance(part, type)]


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


SMALL = ["--preset", "toy", "--vocab-size", 400, "--length", 64, "--context", 512, "--steps", 3, "--batch-size", 4, "--warmup-steps", 1, "--log-every", 1,
         "--eval-every", 3, "--save-every", 3, "--no-progress", "--precision", "no", "--device", "cpu", "--valid-fraction", 0.05]


@pytest.fixture(scope="module")
def runs(place):
    assert call("data", place / "texts.jsonl", "--out", place / "split", "--valid-fraction", 0.05) == 0
    data = ["--data", place / "split", "--cache", place / "cache"]
    assert call("pretrain", *data, "--objective", "ar", "--out", place / "ar", *SMALL) == 0
    assert call("pretrain", *data, "--objective", "diffusion", "--init-from", place / "ar", "--out", place / "diffusion", *SMALL) == 0
    return place


def test_data_writes_a_split_with_statistics(runs):
    statistics = json.loads((runs / "split" / "statistics.json").read_text())
    lines = {part: (runs / "split" / f"{part}.jsonl").read_text().splitlines() for part in ("train", "valid")}
    assert len(lines["train"]) == statistics["train"]["documents"] and len(lines["train"]) + len(lines["valid"]) == 300


def test_pretrain_leaves_a_loss_plot(runs):
    assert (runs / "ar" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_data_does_not_overwrite_unasked(runs, capsys):
    before = (runs / "split" / "train.jsonl").read_text()
    assert call("data", "toy", "--limit", 20, "--out", runs / "split") == 1
    assert "--overwrite" in capsys.readouterr().err and (runs / "split" / "train.jsonl").read_text() == before
    assert call("data", "toy", "--limit", 20, "--out", runs / "other") == call("data", "toy", "--limit", 30, "--out", runs / "other", "--overwrite") == 0
    assert len((runs / "other" / "train.jsonl").read_text().splitlines()) > 20


def test_a_text_file_is_cut_at_blank_lines_unless_it_is_whole(place, capsys):
    (place / "files").mkdir()
    (place / "files" / "a.txt").write_bytes(b"one\r\nand more\r\n\r\ntwo\r\n")
    (place / "files" / "b.txt").write_text("three\n")
    for flags, documents in (([], ["one\nand more", "three", "two"]), (["--whole-files"], ["one\nand more\n\ntwo", "three"])):
        out = place / f"files{len(flags)}"
        assert call("data", place / "files", "--out", out, "--valid-fraction", 0.5, *flags) == 0
        found = [json.loads(line)["text"].strip() for part in ("train", "valid") for line in (out / f"{part}.jsonl").read_text().splitlines()]
        assert sorted(found) == documents
    capsys.readouterr()


def test_tokenizer(place, capsys):
    "attack E: what exists and is no folder is refused."
    from nanollada.tokenizer import encode, load_tokenizer
    assert call("tokenizer", "--data", place / "texts.jsonl", "--vocab-size", 300, "--out", place / "tok") == 0
    assert "300 entries" in capsys.readouterr().out
    opened = load_tokenizer(place / "tok")
    assert len(opened) == 300
    assert call("tokenizer", "--out", place / "tok", "--show", "On a day") == 0
    size, shown = capsys.readouterr().out.splitlines()
    assert size.startswith("300 entries") and [int(token) for token in re.findall(r":(\d+)", shown)] == encode(opened, "On a day") and shown.startswith("'O':")
    before = (place / "texts.jsonl").read_text()
    assert call("tokenizer", "--data", place / "texts.jsonl", "--vocab-size", 300, "--out", place / "texts.jsonl") == 1
    assert (place / "texts.jsonl").read_text() == before and call("tokenizer", "--out", place / "nothing") == 1


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_generate_repeats_with_its_seed(runs, capsys, name):
    texts = []
    for seed in (1, 1, 2):
        assert call("generate", runs / name, "--prompt", "Lucy", "--gen-length", 12, "--temperature", 1, "--seed", seed, "--samples", 2, "--device", "cpu") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].count("--- 2 of 2 ---") == 1


def test_generate_writes_json_and_warns_of_copies(runs, capsys):
    line = ["generate", runs / "ar", "--prompt", "Lucy", "--gen-length", 6, "--device", "cpu"]
    assert call(*line) == 0
    text = capsys.readouterr().out
    assert call(*line, "--json", "--samples", 2) == 0
    said = capsys.readouterr()
    assert [json.loads(record) for record in said.out.splitlines()] == [{"prompt": "Lucy", "text": text[:-1]}] * 2
    assert said.err.count("\n") == 1 and "temperature 0" in said.err


def test_the_official_algorithm_is_one_flag_away(runs, capsys):
    line = ["generate", runs / "diffusion", "--gen-length", 12, "--device", "cpu"]
    assert call(*line, "--no-fast", "--steps", 12) == 0
    official = capsys.readouterr().out
    from nanollada.backbone import load_run
    from nanollada.sampler import generate as sample
    import torch
    model, tokenizer, _ = load_run(runs / "diffusion", "cpu")
    ids = sample(model.denoise, torch.tensor([[tokenizer.bos_token_id]]), gen_length=12, steps=12, eos_id=tokenizer.eos_token_id)
    assert official[:-1] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_infill_keeps_what_is_given(runs, capsys):
    line = ["infill", runs / "diffusion", "--prompt", "On a <|mask|> day<|mask|>.", "--gap", 3, "--device", "cpu"]
    texts = []
    for seed in (1, 1, 2):
        assert call(*line, "--samples", 2, "--temperature", 1, "--seed", seed, "--json") == 0
        texts.append([json.loads(record)["text"] for record in capsys.readouterr().out.splitlines()])
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 2
    assert all(text.startswith("On a") and " day" in text and text.endswith(".") and "<|mask|>" not in text for text in sum(texts, []))
    from nanollada.backbone import load_run
    from nanollada.cli import Infill
    tokenizer = load_run(runs / "diffusion", "cpu")[1]
    canvas = Infill(runs, "On a <|mask|> day<|mask|>.", gap=3).canvas(tokenizer, 100)
    assert canvas.count(tokenizer.mask_token_id) == 6
    assert tokenizer.decode([token for token in canvas[1:-1] if token != tokenizer.mask_token_id]) == "On a day."


@pytest.mark.parametrize("name, metric", [("ar", "NLL"), ("diffusion", "NELBO")])
def test_eval_reports_with_settings(runs, capsys, name, metric):
    assert call("eval", runs / name, "--data", runs / "split", "--limit", 3, "--masks", 2, "--device", "cpu", "--json", runs / "eval.json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((runs / "eval.json").read_text()) and report["metric"] == metric and report["documents"] == 3
    assert report["bits_per_byte"] < report["bits_per_character"] and report["standard_error"] > 0


@pytest.fixture(scope="module")
def tuned(runs):
    "Both runs, fine-tuned for a moment."
    for name in ("ar", "diffusion"):
        assert call("sft", "--data", "toy", "--limit", 60, "--length", 400, "--init-from", runs / name,
                    "--out", runs / f"{name}_chat", *SFT) == 0
    return runs


SFT = ["--steps", 2, "--batch-size", 4, "--warmup-steps", 1, "--log-every", 1, "--eval-every", 2, "--save-every", 2, "--no-progress",
       "--precision", "no", "--device", "cpu"]


def test_sft_says_what_it_used_and_what_it_dropped(runs, capsys):
    talks = [{"prompt": "Who?", "response": "Lucy"}] * 8 + [{"prompt": "Who?"}, {"prompt": "Who?", "response": "word " * 300}]
    (runs / "talks.jsonl").write_text("\n".join(json.dumps(talk) for talk in talks))
    assert call("sft", "--data", runs / "talks.jsonl", "--skip-bad", "--length", 64, "--valid-fraction", 0, "--init-from", runs / "diffusion",
                "--out", runs / "tuned", *SFT) == 0
    said = capsys.readouterr().out
    statistics = json.loads(said[: said.index("\n}\n") + 2])
    assert statistics["pairs"] == 8 and statistics["too_long"] == 1
    assert statistics["unusable"] == 1 and "2 updates" in said and (runs / "tuned" / "loss.png").is_file()


def test_chat_through_a_pipe(tuned, capsys, monkeypatch):
    for name, notes in (("ar_chat", ""), ("ar", "was not fine-tuned on conversations")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\nWhat?\n/reset\nWho?\n/quit\nWhy?\n"))
        assert call("chat", tuned / name, "--gen-length", 6, "--device", "cpu", "--system", "Be brief.") == 0
        said = capsys.readouterr()
        lines = said.out.split("\n")
        assert len(lines) == 4 and lines[0] == lines[2] and notes in said.err and bool(said.err) == bool(notes)


@pytest.mark.parametrize("names, kind", [(("ar", "diffusion"), "beginnings of documents"), (("ar_chat", "diffusion_chat"), "questions")])
def test_compare_prints_and_writes(tuned, capsys, names, kind):
    (tuned / "prompts.txt").write_text("Who?\n\nOnce\n")
    out = tuned / f"out_{names[0]}"
    assert call("compare", tuned / names[0], tuned / names[1], "--prompt", "On a", "--prompt", "Lucy", "--prompts", tuned / "prompts.txt",
                "--gen-length", 6, "--steps", 3, "--top-k", 5, "--repeats", 1, "--device", "cpu", "--out", out) == 0
    said, report = capsys.readouterr().out, json.loads((out / "compare.json").read_text())
    assert [record["prompt"] for record in report["answers"]] == ["On a", "Lucy", "Who?", "Once"]
    assert report["about"]["prompts_are"] == kind and report["about"]["settings"]["diffusion"]["steps"] == 3
    assert said.startswith((out / "compare.md").read_text()) and str(out / "compare.png") in said


def test_eval_of_questions(tuned, capsys):
    for source in ("toy", tuned / "questions.jsonl"):
        (tuned / "questions.jsonl").write_text('{"prompt": "Who?", "response": "Lucy"}\n' * 3)
        assert call("eval", tuned / "diffusion_chat", "--questions", source, "--limit", 3, "--gen-length", 4, "--seed", 5, "--device", "cpu") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["questions"]["questions"] == 3 and report["seed"] == 5 and "metric" not in report
        assert report["questions"]["settings"]["gen_length"] == 4 and report["device"] == "cpu"


def test_eval_of_samples_beside_documents(runs, capsys):
    assert call("eval", runs / "diffusion", "--data", runs / "split", "--limit", 3, "--masks", 2, "--samples", 3, "--temperature", 1,
                "--gen-length", 8, "--judge", runs / "ar", "--device", "cpu") == 0
    report = json.loads(capsys.readouterr().out)
    samples = report["samples"]
    assert report["metric"] == "NELBO" and samples["samples"] == 3 and samples["judge"] == str(runs / "ar")
    assert "grammatical_share" not in samples and {"distinct_1", "distinct_2", "repetition_4", "judged_nats_per_token"} <= set(samples)
    assert call("eval", runs / "ar", "--data", "toy", "--limit", 2, "--samples", 2, "--temperature", 1, "--gen-length", 4, "--device", "cpu") == 0
    assert "grammatical_share" in json.loads(capsys.readouterr().out)["samples"]
    assert call("eval", runs / "ar", "--samples", 2, "--temperature", 1, "--gen-length", 4, "--device", "cpu") == 0
    assert "grammatical_share" not in json.loads(capsys.readouterr().out)["samples"]


def test_bench_sample(runs, capsys):
    assert call("bench", "sample", "--run", runs / "diffusion", "--ar-run", runs / "ar", "--gen-length", 8, "--batch-sizes", 1, "--seconds", 0,
                "--variants", "official", "ar", "default", "--device", "cpu", "--json", runs / "b.json") == 0
    about, *records = json.loads((runs / "b.json").read_text())
    assert [record["variant"] for record in records] == ["official", "ar", "default"] and about["device"] == "cpu"
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 1 | default | ")


def test_bench_train(runs, capsys):
    assert call("bench", "train", "--preset", "toy", "--vocab-size", 64, "--length", 16, "--batch-size", 2, "--objectives", "ar", "--variants", "ours",
                "--seconds", 0, "--device", "cpu", "--json", runs / "t.json") == 0
    about, record = json.loads((runs / "t.json").read_text())
    assert record["variant"] == "ours" and about["device"] == "cpu" and "| ar | ours | " in capsys.readouterr().out


def test_bench_without_a_run_says_how_to_get_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("bench", "sample") == 1 and "`nanollada demo`" in capsys.readouterr().err


def test_the_package_is_a_command_for_launchers():
    done = subprocess.run([sys.executable, "-m", "nanollada", "generate", "none"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("nanollada: none/config.json: no such file") == 1


def test_help_and_version_need_no_torch():
    code = "import sys, nanollada.cli as c; c.main(sys.argv[1:]); print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    for flag, said in (("--help", "pretrain"), ("--version", f"nanollada {nanollada.__version__}")):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, cwd=ROOT, check=True)
        assert said in done.stdout and done.stdout.splitlines()[-1] == "[]"


MISTAKES = {
    "missing file": (["pretrain", "--data", "none.jsonl", "--out", "x"], "none.jsonl"),
    "no run": (["generate", "none"], "none/config.json: no such file"),
    "no prompt room": (["generate", "{runs}/diffusion", "--gen-length", "5000"], "context of 512"),
    "infill without a gap": (["infill", "{runs}/diffusion", "--prompt", "On"], r"no gap in 'On': write <\|mask\|>"),
    "infill by an ar model": (["infill", "{runs}/ar", "--prompt", "On <|mask|>"], "objective ar, and cannot fill gaps"),
    "infill beyond the context": (["infill", "{runs}/diffusion", "--prompt", "On <|mask|>", "--gap", "511"], "context of 512"),
    "tokenizer for nothing": (["tokenizer", "--out", "x"], "give --data to learn from, or --show TEXT"),
    "steps do not divide": (["generate", "{runs}/diffusion", "--gen-length", "12", "--block-length", "4", "--steps", "7"], "multiple of 3"),
    "setting of the other kind": (["generate", "{runs}/ar", "--steps", "7"], "steps is 7, which means nothing to an ar model"),
    "empty file": (["pretrain", "--data", "{runs}/empty.jsonl", "--out", "x"], "empty"),
    "bad line": (["pretrain", "--data", "{runs}/bad.jsonl", "--out", "x", "--cache", "{runs}/c"], r"bad\.jsonl:2"),
    "missing field": (["pretrain", "--data", "{runs}/field.jsonl", "--out", "x", "--cache", "{runs}/c"], "body"),
    "not utf-8": (["pretrain", "--data", "{runs}/latin.txt", "--out", "x", "--cache", "{runs}/c"], "UTF-8"),
    "run in the way": (["pretrain", "--data", "{runs}/split", "--cache", "{runs}/cache", "--objective", "ar", "--out", "{runs}/ar"], "already holds a run"),
    "compare nothing": (["compare", "{runs}/ar", "{runs}/diffusion"], "give --prompt TEXT"),
    "compare the wrong way round": (["compare", "{runs}/diffusion", "{runs}/ar", "--prompt", "a"], "objective diffusion, ar; expected ar, diffusion"),
    "compare with no run": (["compare", "{runs}/ar", "none", "--prompt", "a"], "none/config.json: no such file"),
    "compare chat with none": (["compare", "{runs}/ar_chat", "{runs}/diffusion", "--prompt", "a"], "ar_chat, .*diffusion was fine-tuned on conversations"),
    "compare an empty prompt": (["compare", "{runs}/ar", "{runs}/diffusion", "--prompt", "a", "--prompt", " "], "prompt 2: the prompt is ' '"),
    "compare beyond the context": (["compare", "{runs}/ar", "{runs}/diffusion", "--prompt", "a", "--gen-length", "5000"], "context of 512"),
    "compare no file": (["compare", "{runs}/ar", "{runs}/diffusion", "--prompts", "none.txt"], "none.txt: no such file"),
    "compare a broken file": (["compare", "{runs}/ar", "{runs}/diffusion", "--prompts", "{runs}/bad.jsonl"], r"bad\.jsonl:1: no prompt"),
    "compare not utf-8": (["compare", "{runs}/ar", "{runs}/diffusion", "--prompts", "{runs}/latin.txt"], r"latin\.txt:1: no"),
    "chat with no run": (["chat", "none"], "none/config.json: no such file"),
    "chat with the other's flag": (["chat", "{runs}/ar_chat", "--steps", "4"], "steps is 4, which means nothing to an ar model"),
    "chat beyond the context": (["chat", "{runs}/ar_chat", "--gen-length", "5000"], "line 1 of the questions: .*context of 512"),
    "sft on no file": (["sft", "--data", "none.jsonl", "--init-from", "{runs}/ar", "--out", "x"], "none.jsonl: no such file"),
    "sft on a broken file": (["sft", "--data", "{runs}/bad.jsonl", "--init-from", "{runs}/ar", "--out", "x"], r"bad\.jsonl:1"),
    "eval nothing": (["eval", "{runs}/ar"], "give --data, --questions or --samples"),
    "eval cold samples": (["eval", "{runs}/ar", "--samples", "4"], "samples at temperature 0 are all the same"),
    "eval one sample": (["eval", "{runs}/ar", "--samples", "1", "--temperature", "1"], "samples is 1"),
    "eval fewer than no samples": (["eval", "{runs}/ar", "--samples", "-1"], "samples is -1"),
    "eval without masks": (["eval", "{runs}/diffusion", "--data", "toy", "--masks", "0"], "masks is 0; expected 1 to 10,000"),
    "eval questions of no talker": (["eval", "{runs}/ar", "--questions", "toy"], "ar was not fine-tuned on conversations"),
    "eval the language of nothing": (["eval", "{runs}/ar", "--data", "{runs}/split", "--language", "en"], "--language is about --data toy"),
    "eval the direction of nothing": (["eval", "{runs}/ar", "--data", "toy", "--direction", "forward"], "--direction is about --questions toy"),
    "eval idle judge": (["eval", "{runs}/ar", "--data", "toy", "--judge", "{runs}/ar"], "give --samples"),
    "eval unjust judge": (["eval", "{runs}/ar", "--samples", "2", "--temperature", "1", "--gen-length", "4", "--judge", "{runs}/diffusion"], "the judge is a diffusion"),
    "eval samples of a talker": (["eval", "{runs}/ar_chat", "--samples", "2", "--temperature", "1"], "ar_chat was fine-tuned to answer"),
    "eval no questions": (["eval", "{runs}/ar", "--questions", "{runs}/empty.jsonl"], "no conversations in it"),
    "eval no limit": (["eval", "{runs}/ar", "--questions", "toy", "--limit", "0"], "limit is 0"),
    "eval flags of the other kind": (["eval", "{runs}/ar_chat", "--questions", "toy", "--steps", "3"], "steps is 3, which means nothing to an ar model"),
    "eval nothing fits": (["eval", "{runs}/ar", "--data", "toy", "--canvas", "4"], "fits 4 tokens"),
    "bench the wrong way round": (["bench", "sample", "--run", "{runs}/ar", "--ar-run", "{runs}/diffusion"], "objective diffusion, ar; expected ar"),
    "nothing to resume": (["pretrain", "--data", "{runs}/split", "--cache", "{runs}/cache", "--resume", "--out", "{runs}/new"], "nothing to resume"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_a_failure(tuned, capsys, monkeypatch, mistake):
    runs = tuned
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n"))
    (runs / "empty.jsonl").write_text("")
    (runs / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (runs / "field.jsonl").write_text('{"body": "fine"}\n')
    (runs / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    arguments, message = MISTAKES[mistake]
    small = {"pretrain": SMALL, "sft": SFT, "tokenizer": []}.get(arguments[0], ["--device", "cpu"])
    assert call(*[argument.format(runs=runs) for argument in arguments], *small) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("nanollada:")]
    assert len(lines) == 1 and re.search(message, lines[0]) and "Traceback" not in error


@pytest.mark.parametrize("arguments, message", [
    (["pretrain", "--data", "toy", "--out", "x", "--steps", 0], "steps is 0"),
    (["sft", "--data", "toy", "--init-from", "x", "--out", "y", "--steps", 0], "steps is 0"),
    (["sft", "--data", "toy", "--init-from", "x", "--out", "x"], "x"),
    (["compare", "a", "b", "--gen-length", 0], "gen_length is 0"),

])
def test_a_bad_setting_is_one_line_before_anything_is_made(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("nanollada: ") and error.count("\n") == 1 and message in error and not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["pretrain", "--data", "toy", "--out", "x", "--steps", "abc"], "abc"), (["pretrain", "--data", "toy", "--out", "x", "--stepz", 3], "--stepz"),
    (["pretrain", "--data", "toy"], "--out"),
    (["eval", "x", "--data", "toy", "--language", "fr"], "'fr'"), (["bench", "train", "--variants", "theirs"], "theirs"), (["bench", "sale"], "bench sale"),
    (["sing"], "there is no verb 'sing'; expected one of demo, data"), (["generate", "a", "b"], "b"), (["generate"], "PATH")])
def test_what_cannot_be_read_is_one_line(arguments, message, capsys):
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("nanollada: ") and said.err.count("\n") == 1 and message in said.err and not said.out


def test_nothing_asked_is_helped(capsys):
    assert [call(), call("bench"), call("bench", "--help"), call("-h")] == [2, 2, 0, 0]
    assert capsys.readouterr().out.count("usage: nanollada VERB") == 4


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA out of memory")])
def test_too_little_memory_is_one_line(error, capsys, monkeypatch):
    def run(*_):
        raise error
    monkeypatch.setitem(VERBS, "infill", (run, *flags_of("infill")))
    assert call("infill", "x") == 1 and capsys.readouterr().err.startswith("nanollada: not enough memory: lower the batch")


PRETRAIN, TUNE = ["pretrain", "--data", "toy", "--out", "x"], ["sft", "--data", "toy", "--init-from", "x", "--out", "y"]
CTRL_C, TERMINATED = KeyboardInterrupt(), SystemExit(143)  # as the trainer ends after SIGTERM


@pytest.mark.parametrize("arguments, error, status, saved", [
    (["generate", "x"], CTRL_C, 130, False),
    (PRETRAIN, CTRL_C, 130, True), (TUNE, CTRL_C, 130, True), (PRETRAIN, TERMINATED, 143, True)])
def test_stopping_speaks_of_saved_state_only_where_there_is_one(capsys, monkeypatch, arguments, error, status, saved):
    def stop(*_):
        raise error
    monkeypatch.setitem(VERBS, arguments[0], (stop, *flags_of(arguments[0])))
    assert call(*arguments) == status
    said = capsys.readouterr()
    assert said.err.startswith("nanollada: stopped") and ("--resume" in said.err) == saved and not said.out


def test_a_chat_that_is_stopped_ends_as_at_the_end_of_the_input(tuned, capsys, monkeypatch):
    import nanollada.chat

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(nanollada.chat, "run_chat", stop)
    assert call("chat", tuned / "ar_chat", "--device", "cpu") == 0
    said = capsys.readouterr()
    assert said.out == "\n" and not said.err


def test_toy_questions_and_documents_can_be_of_one_language(tuned, capsys, monkeypatch):
    import nanollada.compare
    asked = []
    real = nanollada.compare.score_questions
    monkeypatch.setattr(nanollada.compare, "score_questions", lambda *given: asked.append(given[2]) or real(*given))
    arguments = ["eval", tuned / "ar_chat", "--questions", "toy", "--limit", 2, "--gen-length", 4, "--device", "cpu"]
    for flags, language, direction in (([], None, None), (["--language", "en", "--direction", "forward"], "en", "forward")):
        assert call(*arguments, *flags) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["language"] == language and report["direction"] == direction
        assert asked.pop() == toy_conversations(2, 1_000_003, language, direction)


def test_skip_bad_lines_counts_them(runs, capsys, caplog):
    good = "".join(json.dumps({"text": story}) + "\n" for story in toy.sample(50, 3, "en"))
    (runs / "some.jsonl").write_text(good + "not json\n")
    assert call("data", runs / "some.jsonl", "--out", runs / "some", "--skip-bad-lines", "--valid-fraction", 0.2) == 0
    assert json.loads(capsys.readouterr().out)["train"]["documents"] > 30 and "some.jsonl: 1 bad lines skipped" in caplog.text


def weights_of(run: Path) -> dict:
    return load_file(run / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_and_the_command_line_are_the_same_run(runs):
    "And a flag wins over the file; --pack undoes what the file says."
    data = {"data": str(runs / "split"), "cache": str(runs / "cache"), "objective": "ar", "preset": "toy", "vocab-size": 400, "length": 64, "context": 512,
            "valid_fraction": 0.05}
    train = {"steps": 9, "batch_size": 4, "warmup_steps": 1, "log_every": 1, "eval_every": 3, "save_every": 3, "precision": "no", "device": "cpu",
             "progress": False, "learning_rate": "1.25e-3"}
    lines = [f"{name}: {str(value).lower() if value is False else value}" for name, value in data.items()] + ["pack: false", "train:"]
    (runs / "ar.yaml").write_text("\n".join(lines + [f"  {name}: {value}" for name, value in train.items()]))
    (runs / "ar.json").write_text(json.dumps(data | {"pack": False, "train": train}, indent="\t"))
    for kind in ("yaml", "json"):
        assert call("pretrain", "--config", runs / f"ar.{kind}", "--steps", 3, "--pack", "--out", runs / f"ar_{kind}") == 0
        assert same_weights(runs / f"ar_{kind}", runs / "ar")
    assert call("pretrain", f"--config={runs / 'ar.yaml'}", "--steps", 3, "--out", runs / "ar_rows") == 0
    assert not same_weights(runs / "ar_rows", runs / "ar")


@pytest.mark.parametrize("name", ["ar", "diffusion", "ar_chat", "diffusion_chat"])
def test_a_record_can_be_run_again_as_it_stands(tuned, name, tmp_path):
    verb = "sft" if "chat" in name else "pretrain"
    again = [verb, "--config", tuned / name / "train_config.json", "--out", tmp_path / "run"]
    assert call(*again, *(["--cache", tuned / "cache"] if verb == "pretrain" else [])) == 0
    assert same_weights(tmp_path / "run", tuned / name)
    other, mine = (json.loads((run / "train_config.json").read_text()) for run in (tuned / name, tmp_path / "run"))
    assert mine == other
    assert call(verb, "--config", tmp_path / "run" / "train_config.json", "--steps", 4, "--seed", 1, "--out", tmp_path / "other") == 0
    assert not same_weights(tmp_path / "other", tuned / name)


def test_a_record_of_a_resumed_or_overwriting_run_begins_anew(runs, tmp_path):
    record = json.loads((runs / "ar" / "train_config.json").read_text())
    for entry in ("resume", "overwrite"):
        (tmp_path / "train_config.json").write_text(json.dumps(record | {entry: True}))
        again = ["pretrain", "--config", tmp_path / "train_config.json", "--cache", runs / "cache", "--out", tmp_path / "run"]
        assert call(*again) == (0 if entry == "resume" else 1)  # the second time there is a run, which is left alone


@pytest.mark.parametrize("text, message", [
    ("steps: 0", r"bad\.yaml, with the flags beside it: steps is 0; expected 1 to"),
    ("train: {steps: abc}", r"bad\.yaml: steps is 'abc'; expected int"),
    ("stepz: 3", r"bad\.yaml: stepz is no setting of pretrain; expected one such as steps"),
    ("objective: gan", r"bad\.yaml: objective is 'gan'; expected .*'joint'"),
    ("sft: {data: toy}", "sft is no setting of pretrain")])
def test_a_mistake_in_a_file_is_one_line_that_names_it(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert call("pretrain", "--data", "toy", "--config", tmp_path / "bad.yaml", "--out", tmp_path / "run") == 1
    said = capsys.readouterr()
    assert re.search(message, said.err) and said.err.count("\n") == 1 and not said.out and not (tmp_path / "run").exists()


def test_what_a_file_leaves_out_is_still_required(tmp_path, capsys):
    (tmp_path / "some.yaml").write_text("data: toy")
    assert call("pretrain", "--config", tmp_path / "some.yaml") == 2
    assert "--out" in capsys.readouterr().err
    assert call("pretrain", "--config", tmp_path / "none.yaml", "--out", "x") == 1
    assert "none.yaml: no such file" in capsys.readouterr().err


def test_info_says_what_a_run_is(tuned, capsys):
    assert call("info", tuned / "diffusion_chat", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    record = json.loads((tuned / "diffusion_chat" / "train_config.json").read_text())
    valid = min((r for r in map(json.loads, (tuned / "diffusion_chat" / "metrics.jsonl").open()) if r["split"] == "valid"), key=lambda r: r["loss"])
    assert facts["parameters"] == sum(value.numel() for value in weights_of(tuned / "diffusion_chat").values())
    assert facts["best"] == {"NELBO, a bound": valid["loss"], "unit": "nats per answer token", "standard_error": valid["standard_error"], "update": 2}
    assert facts["begun_from"] == str(tuned / "diffusion") and facts["fine_tuned"] == {"canvas": record["sft"]["gen_length"]}
    assert facts["updates"] == {"done": 2, "of": 2, "weights_of": record["saved"]} and facts["resumes_from"] == "state/step-00000002"
    assert call("info", tuned / "ar") == 0
    said = capsys.readouterr().out
    assert re.search(r"^trained_as: ar$", said, re.M) and "exact NLL" in said and f"\ntokens: {3 * 4 * 64}\n" in said and "fine_tuned" not in said


def test_info_of_half_a_run_of_weights_alone_and_of_none(tmp_path, capsys):
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "train_config.json").write_text('{"steps": 5, "pretrain": {"data": "toy", "objective": "joint"}, "saved": null}')
    assert call("info", tmp_path / "young", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["resumes_from"] == "the beginning" and "parameters" not in facts and facts["updates"]["done"] == 0
    assert call("info", ROOT / "nbs" / "weights" / "lucy") == 0
    assert "parameters: 481584" in capsys.readouterr().out
    for wrong, message in (("nothing", "is no run"), ("young", "damaged")):
        (tmp_path / "young" / "metrics.jsonl").write_text('{"step": 1}\n')
        assert call("info", tmp_path / wrong) == 1
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and not said.out


def test_bash_completes_verbs_flags_and_choices(tmp_path, capsys):
    assert call("completion", "bash") == 0
    (tmp_path / "nanollada").write_text(capsys.readouterr().out)
    ask = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); $(complete -p nanollada | sed "s/.*-F //; s/ .*//"); printf "%s\\n" "${COMPREPLY[@]}"'
    for line, expected in (("pret", {"pretrain"}), ("pretrain --ob", {"--objective"}), ("pretrain --objective ", {"ar", "diffusion", "joint", "block", "editing"}),
                           ("pretrain --data toy --no-p", {"--no-pack", "--no-progress"}), ("bench ", {"train", "sample"}), ("generate run", {""}),
                           ("bench sample --ar", {"--ar-run"}), ("sft --out ", {""}), ("completion ", {"bash", "zsh", "--help", "--config"})):
        done = subprocess.run(["bash", "-c", ask, tmp_path / "nanollada", "nanollada", *line.split(" ")], capture_output=True, text=True, check=True)
        assert set(done.stdout.splitlines()) == expected and not done.stderr, line
    listed = subprocess.run(["bash", "-c", ask, tmp_path / "nanollada", "nanollada", ""], capture_output=True, text=True).stdout.split()
    assert set(listed) == {verb.split()[0] for verb in VERBS}
    assert call("completion", "zsh") == 0 and "bashcompinit" in capsys.readouterr().out


def test_a_warning_is_one_line(runs, capsys):
    (runs / "warn.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in toy.sample(50, 3, "en")) + "not json\n")
    for _ in range(2):
        assert call("data", runs / "warn.jsonl", "--out", runs / "warn", "--skip-bad-lines", "--valid-fraction", 0.2, "--overwrite") == 0
        assert capsys.readouterr().err == f"nanollada: warning: {runs / 'warn.jsonl'}: 1 bad lines skipped\n"


def test_a_verb_of_another_module_is_one_line(monkeypatch, capsys):
    "What it returns is printed; its help does not import it."
    monkeypatch.setitem(VERBS, "measure", ("bench:bench_table", "demo:DemoConfig"))
    assert call("--help") == 0
    assert "measure       Lines of Markdown" in capsys.readouterr().out
    monkeypatch.setattr("nanollada.bench.bench_table", lambda cfg: iter([f"seed {cfg.seed}", {"a": 1}, None]))
    assert call("measure", "--seed", 7) == 0
    assert capsys.readouterr().out == 'seed 7\n{\n  "a": 1\n}\n'


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_explained(verb, capsys):
    assert call(*verb.split(), "--help") == 0
    text = capsys.readouterr().out
    rows = re.split(r"\n[│ ]*(?=--?[a-zA-Z])", re.sub(r"[ │]+\n", "\n", text))
    assert len(rows) > 2
    bare = [row.split()[0] for row in rows[1:] if not re.search(r"[a-z]{3,} ", re.sub(r"--\S+|\(default[^)]*\)|\(required\)", "", row))]
    assert not bare, bare


def test_the_installed_command_answers():
    command = Path(sys.executable).with_name("nanollada")
    assert "pretrain" in subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout


def test_commands_of_the_results_page_exist():
    results = (ROOT / "RESULTS.md").read_text()
    for line in set(re.findall(r"^nanollada ([a-z]+ .*?)$", results, re.M)):
        verb = next(verb for verb in VERBS if line.startswith(verb + " "))
        used = re.findall(r"--([a-z-]+)", line)
        fields = {("no-" if name in ("pack", "fast", "progress", "causal_clean") else "") + name.replace("_", "-") for name in _fields(verb)}
        assert set(used) <= fields, (verb, set(used) - fields)


def _fields(verb: str) -> set[str]:
    "Names of all flags of a verb, those of nested configurations too."
    found = set()
    kinds = flags_of(verb)
    while kinds:
        for field in dataclasses.fields(kinds.pop()):
            found.add(field.name)
            made = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
            kinds += [type(made)] if dataclasses.is_dataclass(made) else []
    return found
