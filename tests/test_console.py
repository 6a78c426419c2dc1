"Files of settings: what is typed and what is written mean the same, and a hostile file costs nothing."
import json
import time
from dataclasses import fields, is_dataclass

import pytest
import tyro

from nanollada.cli import VERBS, _blanks
from nanollada.console import blank, completion, read_settings, slots
from nanollada.core import UserError
from nanollada.sft import SftConfig
from nanollada.trainer import TrainConfig


def read(tmp_path, text, kind=TrainConfig, name="some.yaml"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    made = blank(kind)
    read_settings(tmp_path / name, "verb", [made])
    return made


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_every_default_can_be_written_and_is_read_back_as_itself(tmp_path, verb, suffix):
    _, made = _blanks(verb)
    defaults = {name: getattr(owner, name) for each in made for name, (owner, _) in slots(each).items()}
    known = {name: value for name, value in defaults.items() if value is not tyro.MISSING}
    (tmp_path / f"all.{suffix}").write_text(json.dumps(known, default=str))
    _, again = _blanks(verb)
    for each in again:
        for name, (owner, _) in slots(each).items():
            object.__setattr__(owner, name, "another")
    read_settings(tmp_path / f"all.{suffix}", verb, again)
    found = {name: getattr(owner, name) for each in again for name, (owner, _) in slots(each).items()}
    assert {name: found[name] for name in known} == known
    assert {name: type(found[name]) for name in known} == {name: type(value) for name, value in known.items()}


def test_blank_has_no_checks_and_shares_nothing():
    one, other = blank(SftConfig), blank(SftConfig)
    one.train.steps = 0
    assert other.train.steps == 600 and one.data is tyro.MISSING and is_dataclass(one) and len(vars(one)) == len(fields(SftConfig))


@pytest.mark.parametrize("written, name, value", [
    ("precision: no", "precision", "no"), ("precision: 'no'", "precision", "no"), ("progress: no", "progress", False), ("progress: on", "progress", True),
    ("learning_rate: 1e-3", "learning_rate", 1e-3), ("clip:", "clip", None), ("clip: ~", "clip", None), ("clip: null", "clip", None),
    ("compile: true", "compile", True), ("device: -x", "device", "-x"), ("device: !!python/name:os.system x", "device", "x"), ("compile: auto", "compile", "auto"), ("batch-size: 7", "batch_size", 7), ("train: {steps: 8}", "steps", 8),
    ("verb: {steps: 8}", "steps", 8), ("\ufeffsteps: 8", "steps", 8), ("device: cuda:1", "device", "cuda:1"), ("a: &a {steps: 8}\n".replace("a: ", "train: "), "steps", 8)])
def test_yaml_means_what_it_says(tmp_path, written, name, value):
    assert getattr(read(tmp_path, written), name) == value


LAUGHS = "\n".join([f"a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)), "steps: *a29"])


@pytest.mark.parametrize("text, message", [
    ("", "holds no settings"), ("# nothing", "holds no settings"), ("- 1", "holds no settings"), ("text", "holds no settings"),
    (b"data: caf\xe9", "no YAML in UTF-8"), ("steps: [1", "no YAML.*line 1"), ("a: b: c", "no YAML"), ("steps: 1\n---\nsteps: 2", "no YAML.*single document"),
    ("steps: " + "[" * 30_000, "no YAML"), ("{" * 30_000, "no YAML"), (LAUGHS, "a0 is no setting"), ("steps: &a [*a]", "no YAML.*recursive"),
    ("train: &a {train: *a}", "no YAML.*recursive"), (LAUGHS.replace("a0: &", "steps: &"), "steps is a list or a mapping; expected int"),
    ("? [a, b]\n: 3", "no YAML.*unhashable"), ("<<: {steps: 3}", "<< is no setting"), ("steps: 1\ntrain: {steps: 2}", "steps stands there twice"),
    ("seed: !!python/object/apply:os.system [exit]", "seed is a list"), ("steps: !!python/object/apply:os.getpid []", "steps is a list"),
    ("steps: 1.5", "steps is '1.5'; expected int"), ("micro_batch_size: many", "micro_batch_size is 'many'"), ("steps: null", "steps is 'null'; expected int"), ("steps: [3]", "steps is a list"), ("schedule: --help", "schedule is '--help'"),
    ("steps: " + "9" * 70_000, "or a large one")])
def test_what_is_no_file_of_settings_is_one_line_at_once(tmp_path, text, message, capfd):
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"some.yaml: .*{message}") as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and capfd.readouterr() == ("", "")
    assert time.perf_counter() - start < 60  # 9 ** 30 texts would never be


def test_json_is_json(tmp_path):
    assert read(tmp_path, json.dumps({"steps": 3, "train": {"device": "caf\u00e9 \U0001f600"}}, indent="\t"), name="a.json").device == "caf\u00e9 \U0001f600"
    for text, message in (("steps: 3", "not JSON"), ("[1]", "expected a dict"), ("[" * 60_000, "not JSON"), (b"{\xff}", "not JSON")):
        with pytest.raises(UserError, match=message):
            read(tmp_path, text, name="a.json")


def test_facts_are_left_out_of_records_only(tmp_path):
    facts = {"processes": 2, "torch": "2", "nanollada": "0", "saved": 3, "sharded": False, "statistics": {"a": 1}, "resume": True, "verb": {"gen_length": 9}}
    made = read(tmp_path, json.dumps(facts | {"fixed": {}, "steps": 4}), name="r.json")
    assert made.steps == 4 and made.resume is False
    with pytest.raises(UserError, match="processes is no setting of verb"):
        read(tmp_path, json.dumps(facts), name="r.json")
    assert read(tmp_path, '{"resume": true}', name="r.json").resume is True


def test_completion_of_a_small_command():
    text = completion("work", {"go far": [blank(TrainConfig)], "stay": []})
    assert '"go far "*"--schedule ") words="wsd cosine constant"' in text and '"go ") words="far"' in text and '" ") words="go stay"' in text
    assert "--no-progress" in text and "--resume " in text and '--steps ") words=""' in text
