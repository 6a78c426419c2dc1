"The run for a GPU, at a scale of seconds: what it leaves, that it goes on where it was cut, what it refuses."

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanollada import toy
from nanollada.backbone import Backbone, load_run, preset, save_tokenizer
from nanollada.core import UserError
from nanollada.corpus import toy_tokenizer

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "gpu_pair.py"
spec = importlib.util.spec_from_file_location("gpu_pair", SCRIPT)
gpu_pair = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_pair)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A corpus as `nanollada data` leaves it, with its tokenizer."
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "data").mkdir()
    stories = toy.sample(120, 0)
    for part, texts in (("train", stories[:110]), ("valid", stories[110:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "data" / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    save_tokenizer(toy_tokenizer(), folder / "data")
    return folder


def run(place, part, *more):
    paths = ["--data", place / "data", "--runs", place / "runs", "--out", place / f"out{part}"]
    return gpu_pair.main(["--part", str(part), "--small", "--minutes", "0.01", *map(str, paths), *more])


def test_each_part_leaves_metrics_weights_and_samples(place):
    for part, name in gpu_pair.PARTS.items():
        run(place, part)
        found = json.loads((place / f"out{part}" / f"{name}.json").read_text())
        assert found["model"] == name and found["parameters"] > 100_000 and found["training"]["steps"] >= 1
        assert found["score"]["metric"] == ("NLL" if name == "ar" else "NELBO") and 0 < found["score"]["nats_per_token"] < 15
        assert len(found["samples"]) == 2 and any(r["split"] == "valid" for r in found["training"]["history"])
        index = json.loads((place / f"out{part}" / f"{name}.safetensors.index.json").read_text())
        model = load_run(place / "runs" / name, "cpu")[0]
        assert set(index["weight_map"]) == set(model.state_dict())
        for key, file in index["weight_map"].items():
            saved = load_file(place / f"out{part}" / file)[key]
            assert torch.equal(saved, model.state_dict()[key].bfloat16())
    assert {r.get("variant") for r in found["bench_sample"]} >= {"plain_loop", "ar_kv_cache", "settled_ahead"}
    first = json.loads((place / "out1" / "ar.json").read_text())
    assert {r.get("variant") for r in first["bench_train"]} >= {"plain_step", "ours"}


def test_a_cut_training_goes_on_and_is_not_repeated(place):
    if not (place / "runs" / "diffusion" / "done").exists():
        run(place, 2)
    metrics = place / "runs" / "diffusion" / "metrics.jsonl"
    before = metrics.read_text()
    run(place, 2)
    assert metrics.read_text() == before  # done: measured again, not trained again
    (place / "runs" / "diffusion" / "done").unlink()  # as if the machine had been taken away
    with pytest.raises(UserError, match="add --resume"):
        run(place, 2)
    assert run(place, 2, "--resume")["training"]["steps"] >= 1


def test_a_missing_corpus_is_named(place):
    with pytest.raises(UserError, match="train.jsonl: no such file; prepare the corpus"):
        gpu_pair.main(["--part", "1", "--small", "--data", str(place / "nowhere")])


def test_the_real_model_fits_eight_files_under_fifteen_mebibytes(tmp_path):
    with torch.device("meta"):
        model = Backbone(preset("30m", 6400, mask_token_id=5))
    model = model.to_empty(device="cpu")
    index = gpu_pair.save_shards(model, tmp_path, "ar")
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert max(sizes) < 15 * 2**20 and len(sizes) <= 6 and sum(sizes) < 63 * 2**20  # two more files: metrics and index
    assert set(index["weight_map"].values()) == {file.name for file in tmp_path.iterdir()}


def test_it_is_short_and_says_what_it_needs():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 200 and "import tyro" not in text and "import matplotlib" not in text
