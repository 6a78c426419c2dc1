"The verbs that lead out of the house, as they are typed: what they do, and what they refuse in one line."
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanollada.cli import main
from nanollada.sources import CORPORA

WEIGHTS = Path(__file__).resolve().parent.parent / "nbs" / "weights"
LUCY, LUCY_AR = WEIGHTS / "lucy", WEIGHTS / "lucy_ar"


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys, *arguments: object) -> str:
    "The one line that a verb refuses with."
    assert call(*arguments) == 1
    said = capsys.readouterr()
    assert said.err.startswith("nanollada: ") and said.err.count("\n") == 1 and not said.out
    return said.err


def test_corpora_names_each_with_its_licence(capsys):
    assert call("corpora") == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(CORPORA) and all(CORPORA[row.split()[0]].licence in row for row in rows)


def test_a_qwen3_comes_in_and_is_a_run(tmp_path, capsys):
    run = tmp_path / "qwen"
    assert call("import", LUCY_AR, "--out", run, "--dtype", "float32") == 0
    assert capsys.readouterr().out == f"{run}: objective ar, 0 new rows of the vocabulary\n"
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (run, LUCY_AR))
    assert all((mine[name] == theirs[name].float()).all() for name in mine) and len(mine) > 10
    assert call("info", run, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["imported"]["folder"] == str(LUCY_AR) and "updates" not in facts
    texts = []
    for folder in (run, LUCY_AR):
        assert call("generate", folder, "--prompt", "On a rainy Sunday", "--gen-length", 12, "--device", "cpu") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_what_is_no_published_model_does_not_come_in(tmp_path, capsys):
    assert "model_type is 'nanollada'; expected one of llada" in refused(capsys, "import", LUCY, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_export_writes_what_transformers_reads_and_refuses_what_a_layout_cannot_say(tmp_path, capsys):
    from transformers import AutoModelForCausalLM
    assert call("export", LUCY_AR, "--out", tmp_path / "hf") == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'hf'}\n"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    capsys.readouterr()  # transformers' progress
    assert "qk_norm is True" in refused(capsys, "export", LUCY, "--out", tmp_path / "llada", "--format", "llada")
    assert not (tmp_path / "llada").exists()


def test_push_is_refused_before_and_by_the_hub(capsys, monkeypatch):
    assert "license is 'no word'" in refused(capsys, "push", LUCY, "nobody/lucy", "--license", "no word")
    from huggingface_hub import HfApi

    def offline(*_, **asked):
        assert asked["private"]
        raise ConnectionError("no net\nat all")
    monkeypatch.setattr(HfApi, "create_repo", offline)
    assert "nobody/lucy: not published (ConnectionError)" in refused(capsys, "push", LUCY, "nobody/lucy", "--private")


TASK = """task: ends
dataset_path: json
dataset_kwargs: {{data_files: {place}/ends.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: 0
target_delimiter: ""
"""


def test_benchmark_of_a_task_of_ones_own(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    asked = {"begin": "On a rainy Sunday, Lucy the bee met Felix the", "ends": [" fox", " bread"]}
    (tmp_path / "ends.jsonl").write_text(f"{json.dumps(asked)}\n" * 2)
    (tmp_path / "ends.yaml").write_text(TASK.format(place=tmp_path))
    line = ["benchmark", LUCY, "--tasks", "ends", "--include", tmp_path, "--masks", 4, "--device", "cpu"]
    assert call(*line, "--json", tmp_path / "found.json") == 0
    assert "| ends | 2 | acc | 1.000" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["results"]["ends"]["metrics"]["acc"]["value"] == 1
    assert "no task other" in refused(capsys, *[word if word != "ends" else "other" for word in line])


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "nowhere/config.json: no such file"), ([LUCY, "--port", 70000], "port is 70000; expected 0 to 65,535"),
    ([LUCY, LUCY_AR, LUCY, "--port", 0], "3 runs; expected one, or two"), ([LUCY, "--host", "no such host"], "cannot listen at no such host")])
def test_serve_refuses(capsys, arguments, message):
    pytest.importorskip("gradio")
    assert message in refused(capsys, "serve", *arguments)
