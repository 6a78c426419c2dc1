"Weights and states on disk: whole or absent, looked at before they are read, one process a folder."
import errno
import math
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest
import torch

from nanollada import checkpoint
from nanollada.checkpoint import (
    cut_metrics, latest_state, load_state, lock_folder, read_tensors, save_state, tensor_shapes, write_tensors
)
from nanollada.core import UserError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
SHAPES = {"a": (2, 3), "b": (4,)}


def write(folder, **changes):
    write_tensors(folder / "some.safetensors", TENSORS | changes)
    return folder / "some.safetensors"


def test_what_is_written_comes_back(tmp_path):
    path = write(tmp_path)
    assert tensor_shapes(path) == SHAPES
    back = read_tensors(path, SHAPES)
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in TENSORS.items())
    assert {value.dtype for value in read_tensors(path, SHAPES, dtype=torch.float64).values()} == {torch.float64}


def test_weights_can_be_read_by_those_who_can_read_other_files(tmp_path):
    "user.md 19: safetensors makes files of mode 0600."
    (tmp_path / "other").touch()
    assert stat.S_IMODE(write(tmp_path).stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_file_that_is_cut_off_later_does_not_kill_the_reader(tmp_path):
    "Memory-mapped weights would die of SIGBUS; ours are a copy."
    path = write(tmp_path)
    back = read_tensors(path, SHAPES)
    path.write_bytes(b"")
    assert torch.equal(back["a"], TENSORS["a"])


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_a_broken_file_says_so(tmp_path, length):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        tensor_shapes(path)


@pytest.mark.parametrize("expected, message", [
    (SHAPES | {"a": (3, 2)}, r"a has shape \(2, 3\), not \(3, 2\)"), ({"a": (2, 3)}, r"b has shape \(4,\), not None"),
    (SHAPES | {"c": (1,)}, "c has shape None"), (SHAPES | {"a": (10**12, 10**12)}, "not"),
])
def test_other_names_and_shapes_are_refused(tmp_path, expected, message):
    with pytest.raises(UserError, match=message):
        read_tensors(write(tmp_path), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_numbers_are_refused(tmp_path, value):
    "attack.md, accepted in silence: NaN weights."
    with pytest.raises(UserError, match="a holds NaN or infinity"):
        read_tensors(write(tmp_path, a=torch.tensor([[1.0, value, 1], [1, 1, 1]])), SHAPES)


def test_a_lock_keeps_another_process_out_and_dies_with_its_own(tmp_path):
    "attack.md, races: no lock on run folders."
    code = f"from nanollada.checkpoint import lock_folder\nwith lock_folder({str(tmp_path)!r}): print('in', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match="another process trains here"), lock_folder(tmp_path):
        pass
    threading.Timer(0.2, other.kill).start()
    with lock_folder(tmp_path, wait=True):
        assert other.wait() == -signal.SIGKILL


def state(folder, step, value=1.0):
    optimizer = [{"state": {0: {"step": torch.tensor(3.0), "moment": torch.full((2, 3), value)}}, "param_groups": [{"lr": 0.1}]}]
    return save_state(folder / "state", step, TENSORS, optimizer, {"seconds": value})


def test_a_state_comes_back_and_replaces_the_one_before(tmp_path):
    state(tmp_path, 5)
    state(tmp_path, 10, 2.0)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000010"]
    weights, optimizer, record = load_state(latest_state(tmp_path / "state"), SHAPES)
    assert torch.equal(weights["a"], TENSORS["a"]) and record == {"step": 10, "seconds": 2.0}
    assert optimizer[0]["state"][0]["moment"].mean() == 2.0 and optimizer[0]["param_groups"] == [{"lr": 0.1}]


def test_a_new_state_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    "code.md 18: checkpoints were not fsynced before older ones were deleted."
    state(tmp_path, 5)
    synced, real_sync, real_delete = [], os.fsync, checkpoint.shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")) or real_sync(handle))

    def delete(path, **more):
        if path.name == "step-00000005":
            names = " ".join(synced)
            assert all(part in names for part in ("model.safetensors", "optimizer.pt", "trainer.json"))
            assert synced[-2].endswith(".tmp-step-00000010") and synced[-1].endswith("/state")
            synced.append("deleted")
        real_delete(path, **more)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", delete)
    state(tmp_path, 10)
    assert synced[-1] == "deleted"


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    state(tmp_path, 5)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(UserError, match="could not be written.*the last whole checkpoint is .*step-00000005"):
        state(tmp_path, 10)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("name, content, message", [
    ("trainer.json", b"[]", "expected a dict"), ("trainer.json", b"{}", "no step"), ("trainer.json", b'{"step": "x"}', "no step"),
    ("optimizer.pt", b"torn", "damaged"), ("model.safetensors", b"torn", "not a whole"),
])
def test_a_damaged_state_names_the_file(tmp_path, name, content, message):
    "attack.md: trainer.json `[]`/`{}`."
    folder = state(tmp_path, 5)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_state(folder, SHAPES)


def test_nothing_is_executed_by_reading_a_state(tmp_path):
    folder = state(tmp_path, 5)
    torch.save([{"payload": print}], folder / "optimizer.pt")
    with pytest.raises(UserError, match="damaged"):
        load_state(folder, SHAPES)


def test_metrics_are_cut_at_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_metrics(path, 5) == []
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 6}\n{"st')
    assert cut_metrics(path, 5) == [{"step": 1}, {"step": 5}]
    assert path.read_text() == '{"step": 1}\n{"step": 5}\n'


def test_a_metrics_line_without_a_step(tmp_path):
    "attack.md: resume with a metrics line without `step`."
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match="no step"):
        cut_metrics(path, 5)
