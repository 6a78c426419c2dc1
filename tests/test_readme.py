"Every command and every line of Python that the READMEs show is run, in their order; training is cut to a few updates."
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanollada import toy
from nanollada.cli import main

ROOT = Path(__file__).resolve().parent.parent
README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
SMALL = {"pretrain": "--vocab-size 400 --length 32 --context 512 --steps 2 --batch-size 2 --warmup-steps 1 --no-progress --device cpu --preset toy",
         "sft": "--steps 2 --batch-size 2 --warmup-steps 1 --no-progress --device cpu", "generate": "--device cpu", "infill": "--device cpu",
         "eval": "--device cpu", "chat": "--gen-length 8 --device cpu", "compare": "--gen-length 8 --device cpu"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text: str) -> list[str]:
    "Lines of shell, without their comments."
    return [line.split("   #")[0].split("  #")[0].strip() for block in blocks(text, "bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("reader")
    (home / "nbs").symlink_to(ROOT / "nbs")
    (home / "my_texts.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in toy.sample(200, 0, "en")))
    talk = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]}
    (home / "talks.jsonl").write_text(json.dumps(talk) + "\n" + json.dumps(talk).replace("small", "tiny") + "\n")
    return home


def test_both_languages_are_short_and_show_the_same_commands():
    assert len(README.splitlines()) < 150 and len(CHINESE.splitlines()) < 150
    assert commands(README) == commands(CHINESE)
    strip = [re.sub(r"#.*", "", block) for block in blocks(README, "python")]
    assert strip == [re.sub(r"#.*", "", block) for block in blocks(CHINESE, "python")]
    assert re.search(r"## Cite", README) and blocks(README, "bibtex") == blocks(CHINESE, "bibtex")


def test_every_command_runs(home, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("nanollada.doors.serve", lambda runs, how: served.append(len(runs)))  # it would not end
    monkeypatch.chdir(home)
    for line in commands(README):
        words = shlex.split(line)
        if words[0] == "nanollada":
            small = shlex.split(SMALL.get(words[1], ""))
            given = dict(zip(small, small[1:]))
            kept = [word for n, word in enumerate(words) if word not in given and (n == 0 or words[n - 1] not in given or words[n - 1] == "--no-progress")]
            monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))
            assert main(kept[1:] + small) == 0, line
            said = capsys.readouterr().out
            if words[1] == "infill" and "weights/lucy" in line:
                assert "Lucy the bee met" in said and toy.is_valid(said.strip(), "en")
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
        else:
            assert line.startswith(("git clone https://github.com/nanollada/nanollada", "pip install -e .", "pip install -e '.[")), line
    assert (home / "side_by_side").is_dir() and served == [2]
    again, first = ((home / "runs" / name / "model.safetensors").read_bytes() for name in ("again", "diffusion"))
    assert again == first


@pytest.mark.parametrize("code", blocks(README, "python"), ids=("shipped weights", "transformers", "own network"))
def test_the_python_runs(code):
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip()


@pytest.mark.parametrize("text", (README, CHINESE), ids=("English", "Chinese"))
def test_links_lead_somewhere(text):
    for target in set(re.findall(r"`?make ([a-z-]+)", re.sub(r"```.*?```", "", text, flags=re.S))):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", text):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("text", (README, CHINESE), ids=("English", "Chinese"))
def test_pages_of_the_site_have_the_names_that_nbdev_gives_them(text):
    pages = {re.sub(r"^\d+[a-z]?_", "", path.stem) for path in (ROOT / "nbs").glob("*.ipynb")}  # without the number
    assert {name for name in re.findall(r"nanollada\.github\.io/nanollada/(\w+)\.html", text)} <= pages
