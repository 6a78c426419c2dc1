"The run for a GPU, at a scale of seconds: what it leaves, and that it goes on where it was cut."

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanollada.backbone import load_run
from nanollada.cli import main

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "gpu_pair.py"
spec = importlib.util.spec_from_file_location("gpu_pair", SCRIPT)
gpu_pair = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_pair)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A corpus as `nanollada data` leaves it, with its tokenizer."
    folder = tmp_path_factory.mktemp("gpu")
    assert main(["data", "toy", "--limit", "400", "--out", str(folder / "data")]) == 0
    assert main(["tokenizer", "--data", str(folder / "data"), "--vocab-size", "400", "--out", str(folder / "data")]) == 0
    return folder


def run(place, part):
    paths = ["--data", place / "data", "--runs", place / "runs", "--out", place / "out"]
    gpu_pair.main(["--part", str(part), "--small", "--minutes", "0.01", *map(str, paths)])


def test_each_part_leaves_metrics_scores_and_weights_and_goes_on(place):
    for part, name in gpu_pair.PARTS.items():
        run(place, part)
        out = place / "out" / name
        report = json.loads((out / "eval.json").read_text())
        assert report["metric"] == ("NLL" if name == "ar" else "NELBO") and report["samples"]["samples"] == 16
        assert (out / "metrics.jsonl").read_text().count('"valid"') >= 1
        model = load_run(place / "runs" / name, "cpu")[0].state_dict()
        saved = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
        assert saved.keys() <= model.keys() and all(saved[key].equal(model[key].bfloat16()) for key in saved)
    assert {r.get("variant") for r in json.loads((place / "out" / "bench_train.json").read_text())} >= {"plain_step", "ours"}
    assert {r.get("variant") for r in json.loads((place / "out" / "bench_sample.json").read_text())} >= {"official", "ar", "default"}
    before = (place / "out" / "ar" / "metrics.jsonl").read_text().splitlines()
    run(place, 1)  # as if it had been cut: what was learned is kept
    after = (place / "out" / "ar" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in after[: len(before) // 2]] == [json.loads(line)["step"] for line in before[: len(before) // 2]]


def test_a_missing_corpus_is_named(place, capsys):
    with pytest.raises(SystemExit, match="failed: nanollada pretrain"):
        gpu_pair.main(["--part", "2", "--small", "--data", str(place / "nowhere"), "--runs", str(place / "r"), "--out", str(place / "o")])
    assert "nowhere" in capsys.readouterr().err


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 60
