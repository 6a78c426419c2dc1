"The command line as a stranger meets it: verbs run, help explains, and mistakes end in one line."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanollada import toy
from nanollada.cli import VERBS, main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in toy.sample(300, 0)))
    return place


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


SMALL = ["--preset", "toy", "--vocab-size", 400, "--length", 64, "--steps", 3, "--batch-size", 4, "--warmup-steps", 1, "--log-every", 1,
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


def test_tokenizer(place, capsys):
    assert call("tokenizer", "--data", place / "texts.jsonl", "--vocab-size", 300, "--out", place / "tok") == 0
    assert "300 entries" in capsys.readouterr().out
    from nanollada.tokenizer import load_tokenizer
    assert len(load_tokenizer(place / "tok")) == 300


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_generate_repeats_with_its_seed(runs, capsys, name):
    texts = []
    for seed in (1, 1, 2):
        assert call("generate", runs / name, "--prompt", "Lucy", "--gen-length", 12, "--temperature", 1, "--seed", seed, "--samples", 2, "--device", "cpu") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("name, metric", [("ar", "NLL"), ("diffusion", "NELBO")])
def test_eval_reports_with_settings(runs, capsys, name, metric):
    assert call("eval", runs / name, "--data", runs / "split", "--limit", 3, "--masks", 2, "--device", "cpu", "--json", runs / "eval.json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((runs / "eval.json").read_text()) and report["metric"] == metric and report["documents"] == 3
    assert report["bits_per_byte"] < report["bits_per_character"] and report["standard_error"] > 0


MISTAKES = {
    "missing file": (["pretrain", "--data", "none.jsonl", "--out", "x"], "none.jsonl"),
    "no run": (["generate", "none"], "no such run folder"),
    "no prompt room": (["generate", "{runs}/diffusion", "--gen-length", "5000"], "context of 4096"),
    "steps do not divide": (["generate", "{runs}/diffusion", "--gen-length", "12", "--block-length", "4", "--steps", "7"], "multiple of 3"),
    "length does not divide": (["generate", "{runs}/diffusion", "--gen-length", "12", "--block-length", "5"], "block_length 5"),
    "setting of the other kind": (["generate", "{runs}/ar", "--steps", "7"], "--steps means nothing"),
    "empty file": (["pretrain", "--data", "{runs}/empty.jsonl", "--out", "x"], "empty"),
    "bad line": (["pretrain", "--data", "{runs}/bad.jsonl", "--out", "x", "--cache", "{runs}/c"], r"bad\.jsonl:2"),
    "missing field": (["pretrain", "--data", "{runs}/field.jsonl", "--out", "x", "--cache", "{runs}/c"], "body"),
    "not utf-8": (["pretrain", "--data", "{runs}/latin.txt", "--out", "x", "--cache", "{runs}/c"], "UTF-8"),
    "run in the way": (["pretrain", "--data", "{runs}/split", "--cache", "{runs}/cache", "--objective", "ar", "--out", "{runs}/ar"], "already holds a run"),
    "nothing to resume": (["pretrain", "--data", "{runs}/split", "--cache", "{runs}/cache", "--resume", "--out", "{runs}/new"], "nothing to resume"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_a_failure(runs, capsys, mistake):
    (runs / "empty.jsonl").write_text("")
    (runs / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (runs / "field.jsonl").write_text('{"body": "fine"}\n')
    (runs / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    arguments, message = MISTAKES[mistake]
    small = SMALL if arguments[0] == "pretrain" else ["--device", "cpu"]
    assert call(*[argument.format(runs=runs) for argument in arguments], *small) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("nanollada:")]
    assert len(lines) == 1 and re.search(message, lines[0]) and "Traceback" not in error


def test_a_bad_setting_is_refused_before_anything_is_made(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call("pretrain", "--data", "toy", "--out", tmp_path / "x", "--steps", 0)
    assert stopped.value.code == 2 and "steps is 0" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "x").exists()


def test_skip_bad_lines_counts_them(runs, capsys):
    good = "".join(json.dumps({"text": story}) + "\n" for story in toy.sample(50, 3, "en"))
    (runs / "some.jsonl").write_text(good + "not json\n")
    assert call("data", runs / "some.jsonl", "--out", runs / "some", "--skip-bad-lines", "--valid-fraction", 0.2) == 0
    assert json.loads(capsys.readouterr().out)["skipped_lines"] == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_explained(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(verb, "--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    rows = re.split(r"\n[│ ]*(?=--?[a-zA-Z])", re.sub(r"[ │]+\n", "\n", text))
    assert len(rows) > 3
    bare = [row.split()[0] for row in rows[1:] if not re.search(r"[a-z]{3,} ", re.sub(r"--\S+|\(default[^)]*\)|\(required\)", "", row))]
    assert not bare, bare


def test_the_installed_command_answers():
    command = Path(sys.executable).with_name("nanollada")
    assert "pretrain" in subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for verb in set(re.findall(r"^nanollada ([a-z]+)", readme, re.M)):
        assert verb in VERBS
    for flag in set(re.findall(r"^nanollada [a-z]+ .*?$", readme, re.M)):
        verb, used = flag.split()[1], re.findall(r"--([a-z-]+)", flag)
        fields = {field.replace("_", "-") for field in _fields(VERBS[verb])}
        assert set(used) <= fields, (verb, set(used) - fields)
    for link in re.findall(r"\]\(((?:nbs|LICENSE)[^)]*)\)", readme):
        assert (ROOT / link).exists(), link


def _fields(cls) -> set[str]:
    import dataclasses
    names = set()
    for field in dataclasses.fields(cls):
        names.add(field.name)
        if field.name == "train":
            names |= {inner.name for inner in dataclasses.fields(type(field.default_factory()))}
    return names


def test_the_python_of_readme_runs(runs, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    code = code.replace("runs/demo/diffusion_from_ar", str(runs / "diffusion")).replace("gen_length=57, steps=57, block_length=19", "gen_length=8, steps=8")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
