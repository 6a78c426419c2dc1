"The demo: equal seconds for all, side by side, by commands a user could type; one failure ends them all; its report."
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from nanollada import demo as d
from nanollada import toy
from nanollada.cli import _parse
from nanollada.core import UserError
from nanollada.pretrain import RECIPE

LOSS = {"per_document", "per_token", "standard_error", "chain_rule", "chain_rule_error"}


@pytest.fixture
def small(tmp_path) -> d.DemoConfig:
    "A demo of no consequence."
    return d.DemoConfig(out=tmp_path / "a demo", seconds=1.0, documents=100, scored=3, samples=3, progress=False, device="cpu")


def test_the_commands_are_equal_but_for_folder_and_objective(small):
    "A user's own command line is what trains, in RECIPE; nobody gets more seconds, rows or data than another."
    parsed = {}
    for name, words in d.commands(small).items():
        assert words[0] == "nanollada"
        _, cfg = _parse(words[1:])
        assert cfg.out == small.out / name and cfg.train.time_budget == small.seconds
        assert replace(cfg.train, steps=RECIPE.steps, time_budget=None, progress=True, overwrite=False, device=None) == RECIPE
        parsed[name] = cfg
    assert [cfg.objective for cfg in parsed.values()] == ["ar", "diffusion", "joint"]
    assert parsed["diffusion_from_ar"].ar_share == 0.25 and all(cfg.init_from is None for cfg in parsed.values())
    same = [replace(cfg, out=Path("x"), objective="ar") for cfg in parsed.values()]
    assert same[0] == same[1] == same[2]


@pytest.fixture
def started(monkeypatch) -> list:
    "The processes that the demo starts, with the words and the environment of each."
    found = []

    class Noted(subprocess.Popen):
        def __init__(self, words, **settings):
            super().__init__(words, **settings)
            found.append((self, words, settings["env"]))

    monkeypatch.setattr(d.subprocess, "Popen", Noted)
    return found


def test_they_learn_side_by_side_and_one_failure_ends_all(small, started, monkeypatch):
    small = replace(small, seconds=1000.0)
    small.out.mkdir()
    (small.out / "diffusion").touch()  # where a folder should be
    monkeypatch.setattr(d.os, "cpu_count", lambda: 6)
    with pytest.raises(UserError, match="^diffusion was not trained: .*diffusion") as told:
        d.train_all(small)
    assert len(str(told.value).splitlines()) == 1 and "Traceback" not in str(told.value)
    assert [words[2:] for _, words, _ in started] == list(d.commands(small).values())
    assert {env["OMP_NUM_THREADS"] for *_, env in started} == {"2"}
    assert all(process.returncode is not None for process, *_ in started)


def test_ctrl_c_ends_all(small, started, monkeypatch):
    def press(seconds):
        assert len(started) == 3 and all(process.returncode is None for process, *_ in started)  # at the same time
        raise KeyboardInterrupt

    monkeypatch.setattr(d.time, "sleep", press)
    with pytest.raises(KeyboardInterrupt):
        d.train_all(small)
    assert all(process.returncode for process, *_ in started)


def test_a_killed_process_is_named(small, monkeypatch):
    words = {"ar": ["timeit", "import os; os._exit(9)"], "diffusion": ["timeit", "import time; time.sleep(1000)"]}
    monkeypatch.setattr(d, "commands", lambda cfg: words)  # the first says nothing
    with pytest.raises(UserError, match="ar was not trained: it was killed"):
        d.train_all(small)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple:
    "A whole demo, of a second."
    cfg = d.DemoConfig(out=tmp_path_factory.mktemp("demo"), seconds=1.0, documents=100, scored=3, samples=3, progress=False, device="cpu")
    return cfg, d.demo(cfg)


def test_the_report_has_the_keys_others_rely_on(made):
    cfg, report = made
    assert json.loads((cfg.out / "report.json").read_text()) == json.loads(json.dumps(report))
    for key in ("ar_nll", "diffusion_nelbo", "diffusion_from_ar_nelbo"):
        assert set(report[key]) == LOSS and all(value >= 0 for value in report[key].values())
    assert report["ar_nll"]["chain_rule"] == report["ar_nll"]["per_document"]
    assert report["entropy"]["per_document"] == toy.entropy("en")
    assert report["entropy"]["per_token"] == pytest.approx(toy.entropy("en") / 56)  # 55 words and one end
    assert report["ar_nll"]["per_token"] == pytest.approx(report["ar_nll"]["per_document"] / 56)
    for key in ("grammatical_share", "tokens_per_second", "training", "writing", "commands"):
        assert list(report[key]) == list(d.MODELS), key
    assert list(report["writing"]["ar"]) == ["default"] and list(report["writing"]["diffusion"]) == list(d.WRITING) == list(report["settings"])
    assert {"machine", "threads", "torch", "seed"} <= set(report)
    names = {"report.md", "report.json", "loss.png", "unmasking.gif", "stories.jsonl", *(f"{name}.log" for name in d.MODELS), *d.MODELS}
    assert names <= {path.name for path in cfg.out.iterdir()}


def test_they_get_equal_seconds(made):
    cfg, report = made
    for name, told in report["training"].items():
        budget = json.loads((cfg.out / name / "train_config.json").read_text())["time_budget"]
        steps = [json.loads(line) for line in (cfg.out / name / "metrics.jsonl").read_text().splitlines()]
        assert budget == cfg.seconds <= told["seconds"] and told["updates"] == steps[-1]["step"] >= 1
        before = [record["seconds"] for record in steps if record["step"] < told["updates"]]
        assert all(seconds < cfg.seconds for seconds in before)  # the update that ended it is the only one beyond


def test_the_stories_are_those_of_the_language(made):
    cfg, report = made
    texts = [json.loads(line)["text"] for line in (cfg.out / "stories.jsonl").read_text().splitlines()]
    assert texts == toy.sample(cfg.documents, cfg.seed, "en") and len(set(texts)) == len(texts)
    assert report["language"]["name"] == "en" and report["language"]["grammatical_share"] == 1
    rows = (cfg.out / "report.md").read_text().splitlines()
    fresh = next(row for row in rows if row.startswith("| the language | fresh |"))
    assert f"| 100.0% | {report['language']['distinct_2']:.3f} |" in fresh
    assert rows[rows.index(fresh) + 1].startswith("| ar | default | ")


def test_chinese_and_both_fit_the_rows(tmp_path):
    for language in ("zh", None):
        cfg = d.DemoConfig(out=tmp_path, language=language, documents=300, seconds=1)
        texts = toy.sample(300, 0, cfg.language)
        d.document_rows(d.toy_tokenizer(), texts, d.ROW)  # raises if one is too long
