"Seeds, devices, budgets and files: the promises everything else rests on."
import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from nanollada import core
from nanollada.core import (
    UserError, append_jsonl, atomic_path, budget, by_budget, make_generator, pick_device, pick_precision, read_json,
    read_jsonl, seed_everything, write_json,
)


def numbers(generator: torch.Generator) -> list[float]:
    return torch.rand(8, generator=generator).tolist()


def test_a_key_always_gives_the_same_stream_and_no_two_keys_share_one():
    keys = [("noise", step) for step in range(500)] + [("order", step) for step in range(500)] + [(), ("noise",)]
    streams = [tuple(numbers(make_generator(3, *key))) for key in keys]
    assert streams == [tuple(numbers(make_generator(3, *key))) for key in keys]
    assert len(set(streams)) == len(keys)
    assert numbers(make_generator(3, "a")) != numbers(make_generator(4, "a"))


def test_a_key_gives_the_same_stream_in_another_process():
    code = "import torch; from nanollada.core import make_generator as m; print(torch.rand(4, generator=m(1, 'x', 2)).tolist())"
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(seen) == 1


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    with pytest.raises(UserError, match=f"seed is {seed}"):
        seed_everything(seed)


def test_seed_everything_repeats():
    seed_everything(5)
    first = torch.rand(4)
    seed_everything(5)
    assert torch.equal(first, torch.rand(4))


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="'gpu'"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0").index == 0
    with pytest.raises(UserError, match="does not have"):
        pick_device("cuda:7")


def test_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_precision(cpu, "bf16") == "bf16"
    for fast, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(core, "has_fast_bf16", lambda device, fast=fast: fast)
        assert pick_precision(cpu) == expected
    with pytest.raises(UserError, match="fp8"):
        pick_precision(cpu, "fp8")


def test_budgets(monkeypatch):
    monkeypatch.setenv("NANOLLADA_BUDGET", "gpu")
    assert (by_budget(1, 2), by_budget(1, 2, 3)) == (2, 3)
    monkeypatch.delenv("NANOLLADA_BUDGET")
    assert budget() == "cpu"
    monkeypatch.setenv("NANOLLADA_BUDGET", "fast")
    with pytest.raises(UserError, match="'fast'"):
        budget()


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "deep" / "weights"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
    for error in (KeyboardInterrupt, RuntimeError, OSError(errno.EACCES, "no")):
        with pytest.raises(type(error) if isinstance(error, Exception) else error), atomic_path(path) as temporary:
            temporary.write_text("new")
            raise error
    assert path.read_text() == "old" and os.listdir(path.parent) == ["weights"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: os error 28")])
def test_a_full_disk_is_one_clear_line(tmp_path, error):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(UserError, match="disk is full"), atomic_path(tmp_path / "a.json"):
        raise error
    assert read_json(tmp_path / "a.json") == 1


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, "old")
    code = f"""
from nanollada.core import atomic_path
with atomic_path({str(path)!r}) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"writing"
    process.kill()
    process.wait()
    assert read_json(path) == "old"


def test_records_survive_a_cut_last_line_but_not_a_broken_middle(tmp_path):
    path = tmp_path / "m.jsonl"
    for step in range(3):
        append_jsonl(path, {"step": step, "text": "诗"})
    path.write_text(path.read_text() + '{"step": 3, "te')
    assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2: not JSON"):
        read_jsonl(path)


def test_missing_and_broken_json(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not JSON"):
        read_json(tmp_path / "bad.json")
    write_json(tmp_path / "zh.json", {"诗": 1})
    assert "诗" in (tmp_path / "zh.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "zh.json").read_text(encoding="utf-8")) == {"诗": 1}
