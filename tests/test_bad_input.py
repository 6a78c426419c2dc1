"""The bad input of a stranger who attacked the command: each line of that table ends in one clear line, exit 1 or 2, in bounded
time and memory (a child with a limit on both; a killed child has no exit status and fails the test)."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanollada import toy
from nanollada.cli import main

TRAIN = ["--steps", 2, "--batch-size", 4, "--warmup-steps", 1, "--log-every", 1, "--eval-every", 2, "--save-every", 1,
         "--no-progress", "--precision", "no", "--device", "cpu"]
SMALL = ["--preset", "toy", "--length", 32, "--context", 256, *TRAIN]
HUGE = 10**9


def attempt(folder: Path, arguments: list, seconds: int = 40, memory: int = 3 * 2**30, largest: int | None = None):
    "Exit status and standard error of the command in a child that may use so much and no more; what it printed is in stdout.txt."
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    said = folder / "stderr.txt"
    child = os.fork()
    if child == 0:
        try:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along
            signal.alarm(seconds)
            if pages:
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
            if largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            os.chdir(folder)
            sys.stdin = io.StringIO("Who?\n")
            texts = (open(folder / f"{name}.txt", "w", errors="backslashreplace") for name in ("stderr", "stdout"))
            with next(texts) as err, next(texts) as out:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    try:
                        status = main([str(argument) for argument in arguments])
                    except BaseException:
                        traceback.print_exc()
                        status = 99
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), said.read_text()


def refused(folder: Path, arguments: list, message: str, **limits) -> None:
    "The command must end with exit 1 or 2 and one line that says this."
    status, said = attempt(folder, arguments, **limits)
    assert status in (1, 2), (status, said)
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith(("note: ", "nanollada: warning: "))]
    assert len(lines) == 1 and lines[0].startswith("nanollada: "), said
    assert message.lower() in lines[0].lower(), said


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Text, a tokenizer and two runs that are all in order."
    place = tmp_path_factory.mktemp("bad")
    call = lambda *words: main([str(word) for word in words])
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in toy.sample(60, 0)))
    assert call("tokenizer", "--data", place / "texts.jsonl", "--vocab-size", 300, "--out", place / "tok") == 0
    data = ["--data", place / "texts.jsonl", "--tokenizer", place / "tok", "--cache", place / "cache", *SMALL]
    assert call("pretrain", "--objective", "ar", "--out", place / "ar", *data) == 0
    assert call("pretrain", "--objective", "diffusion", "--out", place / "diffusion", *data) == 0
    return place


@pytest.fixture
def runs(base, tmp_path):
    "A copy of all that which may be spoilt."
    for name in ("ar", "diffusion", "tok"):
        shutil.copytree(base / name, tmp_path / name)
    shutil.copy(base / "texts.jsonl", tmp_path)
    return tmp_path


PRETRAIN = ["pretrain", "--data", "texts.jsonl", "--tokenizer", "tok", "--out", "new", "--cache", "cache", *SMALL]
VALUES = [  # a command line, and what the one line must say
    *((words, "seed") for words in (
        ["generate", "ar", "--seed=-1"], ["generate", "ar", "--seed", 2**32], ["chat", "ar", "--seed=-1"],
        ["compare", "ar", "diffusion", "--prompt", "On", "--seed=-1"], ["eval", "ar", "--data", "toy", "--seed=-1"],
        ["infill", "diffusion", "--prompt", "On <|mask|>", "--seed=-1"],
        ["bench", "sample", "--run", "diffusion", "--ar-run", "ar", "--seed=-1"], [*PRETRAIN, "--seed=-1"])),
    *((["generate", "ar", "--temperature", value], "temperature") for value in ("nan", "inf", "-1", "1e-300")),
    (["chat", "ar", "--temperature", "1e-300"], "temperature"),
    (["generate", "diffusion", "--samples", 10**6], "samples is 1000000"),
    (["generate", "ar", "--gen-length", HUGE], "context"),
    (["infill", "diffusion", "--prompt", "<|mask|>", "--gap", HUGE], "gap"),
    *(([*words, "--limit", value], "limit") for value in (-1, 0, 10**19) for words in (
        ["data", "texts.jsonl", "--out", "o"], ["data", "toy", "--out", "o"], PRETRAIN,
        ["tokenizer", "--data", "toy", "--out", "o"], ["eval", "ar", "--data", "toy"])),
    *((["tokenizer", "--data", "texts.jsonl", "--out", "o", "--vocab-size", size], "vocab") for size in (10**12, 10**30, -1)),
    (["tokenizer", "--data", "texts.jsonl", "--vocab-size", 300, "--out", "texts.jsonl"], "texts.jsonl"),
    ([*PRETRAIN, "--batch-size", HUGE], "batch_size"),
    ([*PRETRAIN, "--no-pack", "--length", HUGE], "length"),
    *(([*PRETRAIN, "--random-length", value], "random_length") for value in ("-1", "2", "nan")),
    ([*PRETRAIN, "--valid-rows=-1"], "valid_rows"),
    *(([*PRETRAIN, "--learning-rate", value], "learning_rate") for value in ("nan", "-1")),
    (["eval", "diffusion", "--data", "toy", "--limit", 2, "--masks", HUGE], "masks"),
    (["eval", "diffusion", "--data", "toy", "--limit", 2, "--canvas", HUGE], "canvas"),
    (["bench", "train", "--preset", "toy", "--vocab-size", 10**12, "--device", "cpu"], "vocab_size"),
    (["bench", "sample", "--run", "diffusion", "--ar-run", "ar", "--gen-length", HUGE], "gen_length"),
    (["demo", "--samples", 0, "--out", "o"], "samples"),
    (["demo", "--seconds", -1, "--out", "o"], "seconds"),
    (["demo", "--seed", -1, "--out", "o"], "seed"),
    (["sft", "--data", "toy", "--init-from", "ar", "--out", "x", "--spare", HUGE, *TRAIN], "spare"),
]


@pytest.mark.parametrize("arguments, message", VALUES, ids=[" ".join(map(str, words))[:60] for words, _ in VALUES])
def test_a_bad_value(runs, arguments, message):
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    refused(runs, arguments, message)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_more_steps_than_tokens_are_one_a_token(runs):
    "10**30 of them were an OverflowError."
    status, said = attempt(runs, ["generate", "diffusion", "--gen-length", 4, "--steps", 10**30, "--device", "cpu"])
    assert status == 0 and not said


def nest(depth: int = 10**5) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("flags", [[], ["--skip-bad-lines"]])
def test_an_integer_of_five_thousand_digits(runs, flags):
    (runs / "digits.jsonl").write_text('{"text": ' + "9" * 5000 + "}\n")
    refused(runs, ["data", "digits.jsonl", "--out", "o", *flags], "digits.jsonl")


def test_a_folder_with_an_endless_file(runs):
    (runs / "endless").mkdir()
    (runs / "endless" / "x.jsonl").symlink_to("/dev/zero")
    refused(runs, ["data", "endless", "--out", "o"], "endless")


def test_a_pipe_that_nobody_writes_to(runs):
    (runs / "pipes").mkdir()
    os.mkfifo(runs / "pipes" / "x.jsonl")
    refused(runs, ["data", "pipes", "--out", "o"], "pipes")


@pytest.mark.parametrize("arguments", [
    ["tokenizer", "--data", "texts.jsonl", "--vocab-size", 300, "--out", "o"], ["data", "texts.jsonl", "--out", "o"], PRETRAIN])
def test_a_full_disk(runs, arguments):
    "RLIMIT_FSIZE stands for it: the system refuses to make a file longer (EFBIG)."
    refused(runs, arguments, "", largest=2000)
    assert all(path.stat().st_size < 2000 or path.is_relative_to(runs / "cache") for path in runs.glob("new/*"))


def test_a_name_that_is_not_unicode(runs):
    words = [os.fsdecode(b"caf\xe9") if word == "new" else word for word in PRETRAIN]
    status, said = attempt(runs, words)
    assert status == 0 or (status in (1, 2) and said.count("\n") == 1), said


CONFIGS = {
    **{f"whole file {text[:4]}": (lambda config, text=text: text) for text in ("[]", "null", "3", nest())},
    "no vocab_size": lambda config: {name: value for name, value in config.items() if name != "vocab_size"},
    **{f"{name} {value}"[:40]: (lambda config, name=name, value=value: config | {name: value}) for name, value in [
        *(("vocab_size", value) for value in ("300", 300.5, 10**7, 10**9, 10**25, -1, None)),
        ("hidden_size", HUGE), ("num_hidden_layers", HUGE), ("num_key_value_heads", -4), ("num_attention_heads", 0),
        *(("rope_theta", value) for value in ("a", float("nan"), 0, -5, None)), ("rms_norm_eps", "a"), ("rms_norm_eps", -1),
        ("mask_token_id", "a"), ("mask_token_id", 10**9), ("max_position_embeddings", "a"), ("max_position_embeddings", 0)]},
    "a tied head": lambda config: config | {"tie_word_embeddings": not config["tie_word_embeddings"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_json(runs, name):
    path = runs / "diffusion" / "config.json"
    changed = CONFIGS[name](json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    refused(runs, ["generate", "diffusion", "--gen-length", 4, "--device", "cpu"], "")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "train_config.json"])
def test_a_file_of_the_run_nested_deeply(runs, file):
    (runs / "diffusion" / file).write_text(nest())
    refused(runs, ["generate", "diffusion", "--gen-length", 4, "--device", "cpu"], file.split("_")[0].split(".")[0])


@pytest.mark.parametrize("arguments", [["generate", "ar", "--gen-length", 4], ["generate", "diffusion", "--gen-length", 4],
                                       ["eval", "ar", "--data", "toy", "--limit", 2]])
def test_weights_that_are_no_numbers(runs, arguments):
    path = runs / arguments[1] / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    refused(runs, [*arguments, "--device", "cpu"], "model.safetensors")


def test_another_tokenizer_of_the_same_size(runs):
    "attack G: its ids mean something else."
    stories = [story.upper() for story in toy.sample(60, 1, "en")]
    (runs / "other.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    assert main(["tokenizer", "--data", str(runs / "other.jsonl"), "--vocab-size", "300", "--out", str(runs / "other")]) == 0
    shutil.copy(runs / "other" / "tokenizer.json", runs / "ar" / "tokenizer.json")
    refused(runs, ["generate", "ar", "--gen-length", 4, "--device", "cpu"], "tokenizer")


def test_prompts_nested_deeply(runs):
    (runs / "prompts.jsonl").write_text(nest() + "\n")
    refused(runs, ["compare", "ar", "diffusion", "--prompts", "prompts.jsonl"], "prompts.jsonl:1")


AGAIN = [("ar" if word == "new" else word) for word in PRETRAIN] + ["--objective", "ar", "--resume", "--steps", 3]


@pytest.mark.parametrize("text", ['{"loss": 1}\n', "[]\n", nest() + "\n"], ids=lambda value: value[:12].strip())
def test_resuming_from_a_spoilt_record(runs, text):
    (runs / "ar" / "metrics.jsonl").write_text(text)
    refused(runs, AGAIN, "metrics.jsonl")


@pytest.mark.parametrize("text", ["[]", "null", nest()], ids=lambda value: value[:12].strip())
def test_a_spoilt_description_is_written_anew(runs, text):
    "Nothing is read from it when a run goes on: the checkpoint holds the settings."
    path = runs / "ar" / "train_config.json"
    path.write_text(text)
    assert attempt(runs, AGAIN) == (0, "") and json.loads(path.read_text())["steps"] == 3


@pytest.mark.parametrize("text", ["[]", "{}", "null", nest()], ids=lambda text: text[:4])
def test_resuming_from_a_spoilt_state(runs, text):
    records = sorted((runs / "ar" / "state").rglob("*.json"))
    assert records
    for path in records:
        path.write_text(text)
    refused(runs, AGAIN, ".json")


TEMPLATES = [3, {"a": 1}, "{{ 1/0 }}", "{% include 'x' %}", "{{ 'a' * 10**10 }}", "{{ messages.__class__.__mro__ }}",
             "{% for i in range(100000) %}{% for j in range(100000) %}a{% endfor %}{% endfor %}"]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: str(template)[:24])
def test_a_chat_template(runs, template):
    path = runs / "ar" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (runs / "ar" / "chat_template.jinja").unlink(missing_ok=True)
    refused(runs, ["sft", "--data", "toy", "--limit", 20, "--init-from", "ar", "--out", "o", *TRAIN], "template")


@pytest.mark.parametrize("name", ["\x1b]0;gone\x07.jsonl", "a\u202etxt.jsonl"])
def test_an_error_moves_no_cursor(runs, name):
    "code.md 25: what a file is called must not reach the terminal raw."
    status, said = attempt(runs, ["data", name, "--out", "o"])
    assert status == 1 and not set("\x1b\x07\u202e") & set(said)


def test_what_a_model_writes_moves_no_cursor(runs, capsys, monkeypatch):
    "code.md 25."
    import nanollada.fast
    monkeypatch.setattr(nanollada.fast, "generate_text", lambda *_, **__: ["a\x1b]0;gone\x07b\u202ec\rd\ne"])
    assert main(["generate", str(runs / "ar"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "a]0;gonebcd\ne\n"
    assert main(["generate", str(runs / "ar"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "a\x1b]0;gone\x07b\u202ec\rd\ne"
