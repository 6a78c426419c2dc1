"Chapter 08: the trainer. As a script (`test_trainer.py MODE OUT`) this file is the program that gets killed or launched twice."
import atexit
import errno
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from nanollada import processes, trainer
from nanollada.ar import Autoregressive, Objective, with_places
from nanollada.backbone import Backbone, preset
from nanollada.checkpoint import latest_state, lock_folder
from nanollada.core import UserError, make_generator, read_json, read_jsonl
from nanollada.elbo import MaskedDiffusion
from nanollada.processes import apply_gradients, open_processes, peak_flops, update_flops
from nanollada.trainer import (TrainConfig, Training, draw_update, epoch_order, lr_at, make_optimizers, mean_and_error,
                               measure, parameter_groups, rows_of_step, split_batch, train, valid_batches, warm_up)

CONFIG = TrainConfig(steps=24, batch_size=8, micro_batch_size=2, learning_rate=1e-2, warmup_steps=4,
                     eval_every=6, save_every=5, log_every=4, precision="no", progress=False, device="cpu")
AGAIN = replace(CONFIG, resume=True)


class Net(nn.Module):
    "A bigram network with one of everything the optimizer treats differently, a stack of blocks, and dropout."

    def __init__(self, vocab=11, width=8, dropout=0.1):
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab, width), nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList([nn.Linear(width, width)])
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        return self.lm_head(self.drop(self.layers[0](self.norm(self.embed(ids))).tanh()))


class Rows:
    "Random rows; `hook` is called with the number of each batch that was asked for."

    def __init__(self, n=40, seed=0, hook=None):
        self.ids = torch.randint(11, (n, 7), generator=make_generator(seed, "toy"))
        self.hook, self.calls = hook, 0

    def __len__(self):
        return len(self.ids)

    def batch(self, indices, generator=None):
        self.calls += 1
        if self.hook:
            self.hook(self.calls)
        return {"ids": self.ids[indices], "scored": torch.ones_like(self.ids[indices], dtype=torch.bool)}


class Toy(Objective):
    "Next-symbol prediction in which noise drops positions, so that counts differ from row to row."
    name = "toy"

    def noise(self, rows, generator=None):
        t = torch.rand(len(rows["ids"]), 1, generator=generator)
        mask = torch.rand(rows["ids"].shape, generator=generator) < t
        mask[:, 0] = False
        return rows | {"mask": mask, "t": t[:, 0], "count": mask.sum(1).float()}

    def terms(self, model, batch):
        ids = batch["ids"]
        nll = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        return (nll * batch["mask"][:, 1:]).sum(1), batch["count"]


VALID = Rows(11, seed=1)


def net(seed=0, **kw):
    torch.manual_seed(seed)
    return Net(**kw)


def saver(model, folder, weights=None):
    weights = weights or model.state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")


def go(model=None, cfg=CONFIG, out=None, rows=None, objective=None, valid=VALID, **kw):
    model = model or net()
    return model, train(model, objective or Toy(), Rows() if rows is None else rows, cfg, valid, out, saver, **kw)


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def timeless(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


# --- the program that is killed, or launched twice ------------------------------------------------

def lights_out(call):
    if call == 13:
        raise RuntimeError("lights out")


def killer(mode, when=13):
    "What happens when a batch is asked for, or None."
    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM}.get(mode)
    return (lambda call: os.kill(os.getpid(), number) if call == when else None) if number else None


def kill_in_mid_write(step):
    "Die half-way through the optimizer file of the checkpoint of `step`."
    def save(value, path):
        if f"{step:08d}" in str(path):
            Path(path).write_bytes(b"half a fi")
            os.kill(os.getpid(), signal.SIGKILL)
        real(value, path)
    real, torch.save = torch.save, save


def write_threads(out):
    "Names of this process's threads, as Linux knows them."
    names = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    (out / f"threads-{os.environ['RANK']}.json").write_text(json.dumps(names))


def main(mode, out):
    torch.set_num_threads(1)
    mode, _, optimizer = mode.partition(":")
    if mode.startswith("two"):  # "two", "two-kill": one of the processes dies; "two-resume"; "two-term"
        rank = os.environ["RANK"]
        if "term" not in mode:
            atexit.register(write_threads, Path(out))  # registered before the trainer's own, so called after them
        hook = killer(mode[4:]) if rank == "1" else None
        cfg = replace(AGAIN if "resume" in mode else CONFIG, optimizer=optimizer or "adamw")
        go(net(dropout=0.0).double(), cfg, out, Rows(hook=hook))
        return
    if mode == "write":
        kill_in_mid_write(10)
    if mode == "full":
        import resource
        size = (latest_state(Path(out) / "state") / "optimizer.pt").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cfg = replace(AGAIN if mode in ("full", "again") and latest_state(Path(out) / "state") else CONFIG, tracker=os.getenv("TRACKER", "none"))
    try:
        go(cfg=cfg, out=out, rows=Rows(hook=killer(mode)))
    except UserError as error:
        sys.exit(f"UserError: {error}")


def program(mode, out, *launcher, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    command = [sys.executable, *launcher, __file__, mode, str(out)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def twice(mode, out, **environment):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return program(mode, out, *launcher, **environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody disturbed."
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, *go(out=out)


# --- resume ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, code, step", [("kill", -signal.SIGKILL, 12), ("write", -signal.SIGKILL, 6),
                                              ("term", 128 + signal.SIGTERM, 13)])
def test_killed_and_resumed_is_bitwise_the_whole_run(whole, tmp_path, mode, code, step):
    done = program(mode, tmp_path / "run")
    assert done.returncode == code, done.stderr
    assert latest_state(tmp_path / "run/state").name == f"step-{step:08d}"
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")  # attack F: a moved run resumes
    model, result = go(net(seed=99), AGAIN, moved)  # the weights must come from the checkpoint
    assert same(model, whole[1]) and (result.best, result.saved) == (whole[2].best, whole[2].saved)
    ours, theirs = load_file(moved / "model.safetensors"), load_file(whole[0] / "model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    if mode != "term":  # stopping by a signal closes a logging window early
        assert timeless(result.history) == timeless(whole[2].history)
    assert [p.name for p in (moved / "state").iterdir()] == ["step-00000024"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_legs_of_moments_are_equal_too(tmp_path, optimizer):
    cfg = replace(CONFIG, optimizer=optimizer)
    unbroken, _ = go(cfg=cfg, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="lights out"):
        go(cfg=cfg, out=tmp_path / "run", rows=Rows(hook=lights_out))
    assert same(go(net(1), replace(cfg, resume=True), tmp_path / "run")[0], unbroken)

    def moments(out):
        state = torch.load(out / "state/step-00000024/optimizer.pt", weights_only=True)["state"]
        return {(name, key): value for name, kept in state.items() for key, value in kept.items()}
    a, b = moments(tmp_path / "run"), moments(tmp_path / "whole")
    assert a.keys() == b.keys() and len(a) == {"adamw": 18, "muon": 16}[optimizer]
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    out = tmp_path / "run"
    model, _ = go(out=out)
    rows, again = Rows(), net(5)
    _, result = go(again, AGAIN, out, rows)
    assert same(model, again) and rows.calls == 0 and result.steps == 24
    assert timeless(result.history) == timeless(whole[2].history)


def test_resume_may_train_longer(tmp_path):
    "user.md H: more steps or more time than before; with a constant rate it is the longer run, bit for bit."
    cfg = replace(CONFIG, schedule="constant")
    go(cfg=replace(cfg, steps=12), out=tmp_path / "run")
    model, result = go(net(3), replace(cfg, resume=True, time_budget=1000.0), tmp_path / "run")
    assert result.steps == 24 and same(model, go(cfg=replace(cfg, time_budget=1000.0))[0])


def test_resume_of_a_run_killed_early(whole, tmp_path):
    "attack, kill and resume: before the first checkpoint it begins anew; before train_config.json it says so."
    with pytest.raises(UserError, match="nothing to resume.*leave resume out"):
        go(cfg=AGAIN, out=tmp_path / "run")
    (tmp_path / "run/train_config.json").write_text("{}")
    assert same(go(cfg=AGAIN, out=tmp_path / "run")[0], whole[1])
    with pytest.raises(UserError, match="in `out`"):
        go(cfg=AGAIN)


def test_a_run_in_the_way_is_refused_and_overwrite_leaves_nothing_of_it(tmp_path):
    "code.md 5: a run that overwrites another and is killed early must not open with the old weights."
    go(out=tmp_path)
    with pytest.raises(UserError, match="already holds a run, at step-00000024"):
        go(out=tmp_path)
    with pytest.raises(RuntimeError):
        go(cfg=replace(CONFIG, overwrite=True), out=tmp_path, rows=Rows(hook=lambda call: lights_out(12 + call)))
    assert {p.name for p in tmp_path.iterdir()} == {"train_config.json", ".lock"}
    go(cfg=replace(CONFIG, steps=6), out=tmp_path)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000006"]
    (tmp_path / "state/step-00000006").rename(tmp_path / "kept")  # a model without its state is not overwritten either
    with pytest.raises(UserError, match="already holds a run, at model.safetensors"):
        go(out=tmp_path)
    with pytest.raises(UserError, match="nothing to resume"):
        go(cfg=AGAIN, out=tmp_path)


def test_a_folder_in_use_is_refused(whole):
    "attack, races: resume and overwrite while another trains."
    with lock_folder(whole[0]):
        for cfg in (AGAIN, replace(CONFIG, overwrite=True), CONFIG):
            with pytest.raises(UserError, match="another process"):
                go(cfg=cfg, out=whole[0])
    assert len(read_jsonl(whole[0] / "metrics.jsonl")) == len(whole[2].history)


def test_resume_names_every_setting_that_differs(whole):
    other = replace(AGAIN, seed=3, log_every=2, micro_batch_size=4)
    with pytest.raises(UserError, match="seed was 0 and is 3.*n_train was 40 and is 39") as caught:
        go(cfg=other, rows=Rows(39), out=whole[0])
    assert "log_every" not in str(caught.value) and "micro" not in str(caught.value)
    with pytest.raises(UserError, match="different models"):
        go(net(width=9), AGAIN, whole[0])


def test_what_is_fixed_must_be_the_same_again(tmp_path):
    go(out=tmp_path, info={"fixed": {"length": 7}, "more": {"place": "a"}})
    go(cfg=AGAIN, out=tmp_path, info={"fixed": {"length": 7}, "more": {"place": "b"}})
    with pytest.raises(UserError, match="length was 7 and is 8"):
        go(cfg=AGAIN, out=tmp_path, info={"fixed": {"length": 8}})


class Trap:
    "An object that leaves a mark when it is unpickled."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


HARMS = {"model.safetensors": ["cut", "missing"], "optimizer.pt": ["cut", "missing", "trap"],
         "trainer.json": ["cut", "missing", "[]", "{}", '{"step": 4}'],
         "metrics.jsonl": ['{"loss": 1}\n', "[]\n"]}


@pytest.mark.parametrize("name, harm", [(name, harm) for name, harms in HARMS.items() for harm in harms])
def test_damage_names_the_file_and_runs_no_code(tmp_path, name, harm):
    cfg = replace(CONFIG, steps=4)
    go(cfg=cfg, out=tmp_path)
    folder = tmp_path if name == "metrics.jsonl" else tmp_path / "state/step-00000004"
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if harm == "trap":
        torch.save([Trap(tmp_path / "mark")], path)
    elif harm != "missing":
        path.write_bytes(content[:len(content) // 2] if harm == "cut" else harm.encode())
    with pytest.raises(UserError, match=name):
        go(cfg=replace(cfg, resume=True), out=tmp_path)
    assert not (tmp_path / "mark").exists()


def test_another_model_of_the_same_size_is_refused(tmp_path):
    class Renamed(Net):
        def __init__(self):
            super().__init__()
            self.blocks = self.layers
            del self.layers
    cfg = replace(CONFIG, steps=4)
    go(cfg=cfg, out=tmp_path)
    with pytest.raises(UserError, match="model.safetensors.*different models"):
        go(Renamed(), replace(cfg, resume=True), tmp_path)


# --- disk -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("file write failed")])
def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, whole, error):
    real = torch.save

    def save(value, path):
        if "00000010" in str(path):
            raise error
        real(value, path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="step-00000010: could not be.*step-00000006"):
        patch.setattr(torch, "save", save)
        go(out=tmp_path)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000006"]
    assert same(go(net(3), AGAIN, tmp_path)[0], whole[1])


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes")
def test_write_that_the_system_refuses(tmp_path):
    "attack, bad input: RLIMIT_FSIZE (EFBIG)."
    with pytest.raises(RuntimeError, match="lights out"):
        go(out=tmp_path, rows=Rows(hook=lights_out))
    done = program("full", tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("UserError")
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000012"]


# --- one batch, cut in many ways ------------------------------------------------------------------

def final(cfg, **kw):
    return go(net(dropout=0.0).double(), cfg, **kw)


def close(a, b, tolerance=1e-9):
    """Adam divides by the gradient's own size, so float64's 2e-16 grows by 1 / (smallest relative gradient);
    1e-9 leaves six digits for that, and a wrong average differs by 1e-3 (the test of the mean of means)."""
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters())) < tolerance


def test_micro_batches_change_neither_weights_nor_validation():
    "code.md 20: the noise of a validation does not depend on the micro-batch."
    model, result = final(replace(CONFIG, micro_batch_size=8))
    for micro in (1, 2, 4):
        other, its = final(replace(CONFIG, micro_batch_size=micro))
        assert close(model, other) and its.best["step"] == result.best["step"] and its.saved == result.saved
        assert its.best["loss"] == pytest.approx(result.best["loss"], rel=1e-6)  # summed in float32


def test_a_mean_of_means_would_be_another_result():
    class MeanOfMeans(Toy):
        def noise(self, rows, generator=None):
            batch = super().noise(rows, generator)
            return batch | {"count": torch.full_like(batch["count"], 1 / CONFIG.micro_batch_size), "own": batch["count"]}

        def terms(self, model, batch):
            nats, count = super().terms(model, batch)
            return nats / batch["own"].sum().clamp(min=1), count
    assert not close(final(CONFIG)[0], final(CONFIG, objective=MeanOfMeans())[0], tolerance=1e-3)


SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what `accelerate launch --use_fsdp` sets


def check_like_one_process(out, cfg):
    "Weights and records of a run of two processes are those of one."
    model, result = final(cfg)
    two = net(dropout=0.0).double()
    two.load_state_dict(load_file(out / "state/step-00000024/model.safetensors"))
    assert close(model, two)
    for a, b in zip(result.history, read_jsonl(out / "metrics.jsonl"), strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        for key in {"loss", "standard_error", "lr", "grad_norm"} & set(a):  # losses are summed in float32
            assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shards", [{}, SHARDS], ids=["copied", "sharded"])
def test_two_processes_agree_with_one(tmp_path, shards, optimizer):
    "code.md 2: eleven validation rows in pieces of two leave one process without a last piece."
    done = twice(f"two:{optimizer}", tmp_path / "run", **shards)
    assert done.returncode == 0, done.stderr
    if sys.platform == "linux" and not shards:  # threads of the process group that outlive Python abort the process now and then
        threads = [read_json(tmp_path / f"run/threads-{rank}.json") for rank in (0, 1)]
        assert all(threads) and not any("gloo" in name for names in threads for name in names), threads
    record = read_json(tmp_path / "run/train_config.json")
    assert record["processes"] == 2 and record["sharded"] == bool(shards)
    check_like_one_process(tmp_path / "run", replace(CONFIG, optimizer=optimizer))


@pytest.mark.parametrize("shards", [{}, SHARDS], ids=["copied", "sharded"])
def test_two_processes_of_which_one_is_killed_resume(tmp_path, shards):
    assert twice("two-kill", tmp_path / "run", **shards).returncode != 0
    assert latest_state(tmp_path / "run/state").name == "step-00000012"
    done = twice("two-resume", tmp_path / "run", **shards)
    assert done.returncode == 0, done.stderr
    check_like_one_process(tmp_path / "run", CONFIG)
    again, result = final(AGAIN, out=tmp_path / "run")  # and a single process opens it
    assert result.steps == 24 and close(again, final(CONFIG)[0])


def test_a_signal_to_one_of_two_stops_both_after_the_same_update(tmp_path):
    "code.md 6: the flag of a signal is agreed on; on one process alone it would dead-lock the other."
    done = twice("two-term", tmp_path / "run")
    assert done.returncode != 0 and latest_state(tmp_path / "run/state").name == "step-00000013", done.stderr
    assert same(go(net(dropout=0.0).double(), AGAIN, tmp_path / "run")[0], final(CONFIG)[0]) or close(
        go(net(dropout=0.0).double(), AGAIN, tmp_path / "run")[0], final(CONFIG)[0])


def test_processes_that_do_not_meet_are_refused(monkeypatch):
    "attack B: launched twice, but each believes to be alone."
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="sees only itself"):
        open_processes("cpu")
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    with pytest.raises(UserError, match="2 processes were launched, but this one sees only"):
        open_processes("cpu")


def test_every_row_comes_once_an_epoch_and_pieces_make_the_batch():
    line = torch.cat([rows_of_step(s, 10, 4, seed=1) for s in range(5)])
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in line.view(2, 10))
    assert not torch.equal(epoch_order(10, 1, 0), epoch_order(10, 1, 1))
    assert len(rows_of_step(3, 3, 8, seed=0)) == 8  # a batch may hold several epochs
    batch = draw_update(Toy(), Rows(), CONFIG, step=5)
    pieces = [p for rank in (0, 1) for p in split_batch(batch, 2, rank, 2)]
    assert sorted(p["ids"][0].tolist() for p in pieces) == sorted(batch["ids"][::2].tolist())
    assert sum(len(p["places"]) for p in pieces) == batch["mask"].sum() == batch["count"].sum()
    with pytest.raises(UserError, match="a multiple of 3 x 1"):
        go(cfg=replace(CONFIG, micro_batch_size=3))


# --- settings -------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_schedule_rises_holds_and_ends_low(schedule):
    cfg = TrainConfig(steps=100, warmup_steps=10, schedule=schedule, learning_rate=2.0, min_lr_ratio=0.25)
    rates = [lr_at(s, cfg) for s in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[100] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    if schedule == "wsd":
        assert rates[79] == 2.0 and rates[90] == pytest.approx(1.25)
    if schedule == "cosine":
        assert rates[55] == pytest.approx(1.25)


def test_warmup_of_short_runs_is_short():
    rises = [sum(lr_at(s, TrainConfig(steps=n, schedule="constant")) < 1e-3 for s in range(n)) for n in (1, 8, 200, 999)]
    assert rises == [0, 1, 49, 49]


def test_time_budget_moves_the_schedule_and_stops_the_run(monkeypatch):
    cfg = TrainConfig(steps=1000, warmup_steps=0, min_lr_ratio=0.0, time_budget=10.0, decay_fraction=0.5)
    assert lr_at(1, cfg, elapsed=5.0) == cfg.learning_rate
    assert lr_at(1, cfg, elapsed=7.5) == lr_at(750, cfg, elapsed=1.0) == pytest.approx(cfg.learning_rate / 2)
    looks = count()  # a clock that moves by a millisecond whenever it is looked at
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 1000))
    _, result = go(cfg=replace(CONFIG, steps=10**6, time_budget=0.3, min_lr_ratio=0.0))
    assert result.stopped == "time" and 0.3 <= result.seconds < 0.31 and result.steps < 300
    rates = [r["lr"] for r in result.history if r["split"] == "train"]
    assert rates[-1] < 0.3 * max(rates)


@pytest.mark.parametrize("bad, words", [
    ({"steps": 0}, "1 to"), ({"batch_size": 10**9}, "1 to 1,048,576"), ({"micro_batch_size": 0}, "1 to"), ({"valid_rows": 0}, "1 to"),
    ({"learning_rate": 0}, "1e-12 to"), ({"learning_rate": math.nan}, "1e-12 to"), ({"min_lr_ratio": 2}, "0 to 1"),
    ({"warmup_steps": 2000}, "0 to 1,000"), ({"schedule": "linear"}, "wsd or cosine or constant"),
    ({"decay_fraction": 0}, "1e-09 to 1"), ({"optimizer": "sgd"}, "adamw or muon"), ({"weight_decay": -1}, "0 to"),
    ({"precision": "fp16"}, "bf16"), ({"clip": 0.0}, "1e-12 to"), ({"seed": -1}, "0 to 4,294,967,295"),
    ({"time_budget": 0}, "1e-06 to"), ({"resume": True, "overwrite": True}, "exclude")])
def test_config_is_checked(bad, words):
    with pytest.raises(UserError, match=f"{next(iter(bad))} is .*{words}"):
        TrainConfig(**bad)


# --- optimizers -----------------------------------------------------------------------------------

def test_groups_take_each_parameter_once():
    model = net()
    model.tied = model.embed  # shared: must not appear twice
    names = {id(p): n for n, p in model.named_parameters()}
    assert {g: [names[id(p)] for p in ps] for g, ps in parameter_groups(model).items()} == {
        "hidden": ["layers.0.weight"], "matrix": ["lm_head.weight"],
        "plain": ["embed.weight", "norm.weight", "norm.bias", "layers.0.bias"]}
    kinds = {type(o).__name__: sum(len(g["params"]) for g in o.param_groups)
             for o in make_optimizers(model, replace(CONFIG, optimizer="muon"))}
    assert kinds == {"Muon": 1, "AdamW": 5}


def test_decay_shrinks_matrices_only():
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in make_optimizers(model, TrainConfig(learning_rate=0.1, weight_decay=0.5)):
        optimizer.step()
    shrunk = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert shrunk == {"layers.0.weight", "lm_head.weight"}
    torch.testing.assert_close(model.lm_head.weight, before["lm_head.weight"] * 0.95)


@pytest.mark.parametrize(("optimizer", "expected"), (("muon", {"Muon": {0.01}, "AdamW": {0.03}}), ("adamw", {"AdamW": {0.01}})))
def test_the_rest_learns_at_its_own_rate_beside_muon(optimizer, expected):
    model = net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    made = make_optimizers(model, TrainConfig(optimizer=optimizer, adamw_ratio=3.0))
    apply_gradients(model, made, 0.01, None)
    assert {type(o).__name__: {round(g["lr"], 9) for g in o.param_groups} for o in made} == expected


def test_what_no_optimizer_can_do_is_refused():
    with pytest.raises(UserError, match="no trainable parameters"):
        make_optimizers(net().requires_grad_(False), CONFIG)


def test_frozen_parameters_stay(tmp_path):
    model = net()
    model.embed.weight.requires_grad_(False)
    before = model.embed.weight.clone()
    go(model, out=tmp_path)
    assert torch.equal(model.embed.weight, before)


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_an_update_runs_on_the_meta_device(monkeypatch, kind):
    "No hidden synchronisation: forward, backward, clipping and Muon's step with all tensors on `meta`."
    monkeypatch.setattr(processes, "pick_device", lambda name: torch.device("meta"))
    with torch.device("meta"):
        model = Backbone(preset("toy", 12, objective=kind, mask_token_id=11))
    rows = Rows()
    run = Training(model, Autoregressive() if kind == "ar" else MaskedDiffusion(11), rows,
                   replace(CONFIG, optimizer="muon", device=None))
    for _ in range(2):
        run.update()
    assert run.step == 2 and run.window["norm"].is_meta and run.window["sums"].is_meta


# --- the loop -------------------------------------------------------------------------------------

def test_run_folder_and_records(whole):
    out, model, result = whole
    assert {p.name for p in out.iterdir()} == {"state", "metrics.jsonl", "train_config.json", "model.safetensors", ".lock"}
    record = read_json(out / "train_config.json")
    assert record["learning_rate"] == 1e-2 and record["saved"] == result.saved
    assert read_jsonl(out / "metrics.jsonl") == result.history
    assert [r["step"] for r in result.history if r["split"] == "valid"] == [6, 12, 18, 24]
    assert [r["step"] for r in result.history][0] == 1  # the bar shows a loss from the first update on
    first = result.history[0]
    assert {"step", "split", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"} <= set(first)
    assert result.stopped == "steps" and result.steps == 24 and result.tokens_per_second > 0
    assert not model.training and "mfu" not in first


def test_a_run_can_be_opened_from_its_first_checkpoint_on(tmp_path):
    "user.md H: an interrupted run has its model; the record says of which update."
    with pytest.raises(RuntimeError):
        go(cfg=replace(CONFIG, eval_every=20), out=tmp_path, rows=Rows(hook=lambda call: lights_out(call + 6)))
    assert read_json(tmp_path / "train_config.json")["saved"] == 5
    assert load_file(tmp_path / "model.safetensors").keys() == net().state_dict().keys()


def test_the_saved_weights_are_the_latest_within_an_error_of_the_lowest(tmp_path):
    "user.md B: a small validation set does not choose by noise."
    _, result = go(out=tmp_path)
    tables = {}

    class Spy(Training):
        def validate(self):
            tables[self.step] = measure(self, self.valid)
            return super().validate()
    run = Spy(net(), Toy(), Rows(), CONFIG, VALID)
    for _ in range(24):
        run.update()
        if run.step % 6 == 0:
            run.validate()
    losses = {step: mean_and_error(table)[0] for step, table in tables.items()}
    lowest = min(losses, key=losses.get)
    gaps = {s: mean_and_error(torch.stack([t[0] - tables[lowest][0], t[1]])) for s, t in tables.items() if s > lowest}
    assert result.best["step"] == lowest and result.best["loss"] == pytest.approx(losses[lowest])
    assert result.saved == max([lowest, *(s for s, (gap, error) in gaps.items() if gap < error)])
    saved = net(7)
    saved.load_state_dict(load_file(tmp_path / "model.safetensors"))
    run.model.load_state_dict(saved.state_dict())
    assert mean_and_error(measure(run, VALID))[0] == pytest.approx(losses[result.saved], rel=1e-6)


def test_a_difference_inside_its_error_keeps_the_later_weights():
    run = Training(net(), Toy(), Rows(), CONFIG, VALID)
    nats, sway = measure(run, VALID)[0], torch.tensor([1.0, -1.0] * 5 + [0.2])
    for drop, kept in ((sway, True), (0.05 * nats, False)):  # better by luck; better in every row
        run.best, run.best_nats = {"step": 0, "loss": 0.0}, (nats - drop).tolist()
        assert run.validate() == kept and run.best["step"] == 0


def test_slow_improvements_are_saved_too():
    "code.md 19: there is no least improvement."
    steady = Training(net(), Toy(), Rows(), CONFIG, VALID)
    steady.best, steady.best_nats = {"step": 0, "loss": 1e9}, [1e9] * len(VALID)
    assert steady.validate()
    steady.best["loss"] += 1e-9
    assert steady.validate() and steady.best["step"] == steady.step


def test_validation_noise_is_fixed_and_small_sets_are_seen_often():
    a, b = (list(valid_batches(VALID, Toy())) for _ in range(2))
    assert sum(len(batch["row"]) for batch in a) == 24 * 11 >= 256
    assert all(torch.equal(x["mask"], y["mask"]) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0]["mask"], a[1]["mask"])  # another draw
    assert len(list(valid_batches(VALID, Autoregressive()))) == 1  # without noise once is enough


def test_the_standard_error_is_that_of_the_mean():
    "Over many small sets the spread of the mean is the error that is claimed, within a fifth."
    g = make_generator(0, "error")
    tables = [torch.stack([torch.rand(50, generator=g).double() * n, n]) for n in
              (torch.randint(1, 9, (50,), generator=g).double() for _ in range(400))]
    found = [mean_and_error(table) for table in tables]
    spread = torch.tensor([mean for mean, _ in found]).std().item()
    assert sum(error for _, error in found) / 400 == pytest.approx(spread, rel=0.2)


def test_a_single_row_has_no_error(tmp_path):
    "An infinite one in Python; in the file, which must be JSON everywhere, none at all."
    assert mean_and_error(torch.ones(2, 1)) == (1, math.inf)
    go(out=tmp_path, valid=Rows(1))
    found = [record for record in read_jsonl(tmp_path / "metrics.jsonl") if record["split"] == "valid"]
    assert len(found) == 4 and all("standard_error" not in record for record in found)
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", (tmp_path / "metrics.jsonl").read_text()))


def test_validation_stops_at_so_many_rows():
    run = Training(net(), Toy(), Rows(), replace(CONFIG, valid_rows=4), VALID)
    first = Training(net(), Toy(), Rows(), CONFIG, VALID)
    assert measure(run, VALID).shape == (2, 4) and measure(first, VALID).shape == (2, 11)
    assert {int(n) for batch in valid_batches(VALID, Toy(), 4) for n in batch["row"]} == {0, 1, 2, 3}


def test_without_validation_the_last_weights_are_kept(tmp_path):
    model, result = go(out=tmp_path, valid=None)
    assert result.best is None and result.saved == 24 and all(r["split"] == "train" for r in result.history)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in load_file(tmp_path / "model.safetensors").items())


@pytest.mark.parametrize("where", ["loss", "gradient", "validation"])
def test_not_a_number_stops_before_it_is_saved(tmp_path, where):
    rows = Rows()

    class Sick(Toy):
        def terms(self, model, batch):
            nats, count = super().terms(model, batch)
            if where == "validation":
                return nats * (1 if model.training or rows.calls < 12 else math.nan), count
            if rows.calls == 12:
                zero = (model.lm_head.weight * 0).sum()
                nats = nats * math.nan if where == "loss" else nats + zero.sqrt()  # sqrt'(0) * 0: nan
            return nats, count
    with pytest.raises(UserError, match="(loss|grad_norm) is nan by step 12.*lower the.*step-00000010"):
        go(objective=Sick(), rows=rows, out=tmp_path)
    saved = load_file(latest_state(tmp_path / "state") / "model.safetensors")
    assert all(v.isfinite().all() for v in saved.values())


def test_clipping_bounds_the_gradient_that_is_used(monkeypatch):
    class Huge(Toy):
        def terms(self, model, batch):
            nats, count = super().terms(model, batch)
            return nats * 1e6, count
    norms, real = {}, torch.optim.AdamW.step

    def step(self):
        squares = (p.grad.square().sum().item() for g in self.param_groups for p in g["params"])
        norms.setdefault(clip, []).append(math.sqrt(sum(squares)))
        real(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for clip in (None, 1.0):
        _, result = go(objective=Huge(), cfg=replace(CONFIG, clip=clip))
        assert result.history[0]["grad_norm"] > 1e4  # what is logged is the norm before clipping
    assert min(norms[None]) > 1e4 and max(norms[1.0]) == pytest.approx(1.0, rel=1e-3)


def test_trainings_of_different_precision_in_one_process():
    def dtypes(precision):
        seen = set()

        class Watch(Toy):
            def terms(self, model, batch):
                with torch.no_grad():
                    seen.add(model.lm_head(torch.zeros(1, 8)).dtype)
                return super().terms(model, batch)
        go(objective=Watch(), cfg=replace(CONFIG, steps=4, precision=precision))
        return seen
    assert [dtypes(p) for p in ("no", "bf16", "no")] == [{torch.float32}, {torch.bfloat16}, {torch.float32}]


def test_training_leaves_the_callers_randomness_and_signals_alone(tmp_path):
    model = net()
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)
    go(model, replace(CONFIG, steps=4), tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and signal.getsignal(signal.SIGTERM) is handler


def test_seed_decides_everything():
    a, _ = go()
    torch.manual_seed(123)
    assert same(a, go(net())[0]) and not same(a, go(cfg=replace(CONFIG, seed=1))[0])


def test_compile_is_rehearsed_before_the_clock_and_undone(monkeypatch):
    "code.md 13: every shape is met before the clock starts, and the weights stay."
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.seen = net(), []

        def forward(self, ids):
            self.seen.append((tuple(ids.shape), self.training, torch.is_grad_enabled()))
            return self.model(ids)
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: calls.append((self, dynamic)))
    model, shapes, update = Wrapped(), [], Training.update
    monkeypatch.setattr(Training, "update", lambda run: shapes.append(list(model.seen)) or update(run))
    plain = deepcopy(model)
    go(model, replace(CONFIG, steps=4, compile=True))
    assert calls == [(model.model, True)] and model.model._compiled_call_impl is None
    assert shapes[0] == [((2, 6), True, True), ((2, 6), False, False), ((1, 6), False, False)]
    go(plain, replace(CONFIG, steps=4))
    assert len(calls) == 1 and same(plain, model)  # auto: not on a CPU


def test_padded_and_unpadded_rows_are_both_rehearsed():
    class Padded(Rows):
        def batch(self, indices, generator=None):
            rows = super().batch(indices, generator)
            return rows | {"real": torch.ones_like(rows["scored"]) & (torch.arange(7) < 7 - torch.arange(len(indices))[:, None] % 2)}
    run, kinds = Training(net(), Toy(), Padded(), CONFIG), set()
    terms = run.terms
    run.terms = lambda piece: kinds.add("real" in piece) or terms(piece)
    warm_up(run)
    assert kinds == {True, False} and all(p.grad is None for p in run.model.parameters()) and run.step == 0


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_batch_that_counts_nothing_does_not_end_the_run(share):
    "attack A: rows too short to learn from are passed over; only a run of nothing else is refused."
    class Sparse(Toy):
        def noise(self, rows, generator=None):
            batch = super().noise(rows, generator)
            keep = torch.rand(1, generator=generator) >= share if "row" not in rows and len(rows["ids"]) == 8 else 1
            return batch | {"mask": batch["mask"] & bool(keep), "count": batch["count"] * keep}
    if share == 1.0:
        with pytest.raises(UserError, match="20 updates in a row.*had nothing to learn"):
            go(objective=Sparse(), valid=None)
    else:
        model, result = go(objective=Sparse(), valid=None, cfg=replace(CONFIG, log_every=1))
        assert result.steps == 24 and len(result.history) < 24 and all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(UserError, match="of 0 rows"):
        go(rows=Rows(0))


def test_bar_is_silent_when_off_and_shows_the_clock_of_a_budget(capfd):
    "user.md 17."
    go()
    assert capfd.readouterr() == ("", "")
    go(cfg=replace(CONFIG, progress=True))
    shown = capfd.readouterr()
    assert shown.out == "" and "tok/s" in shown.err and "loss" in shown.err and "24/24" in shown.err
    go(cfg=replace(CONFIG, progress=True, time_budget=77.0))
    assert "/77.0" in capfd.readouterr().err


def test_recompute_is_switched_on_for_the_training_only():
    class Trunk(Net):
        recompute, seen = False, None

        def forward(self, *args):
            self.seen = self.recompute
            return super().forward(*args)
    torch.manual_seed(0)
    plain = Trunk()
    again = deepcopy(plain)
    go(plain, replace(CONFIG, steps=4))
    go(again, replace(CONFIG, steps=4, recompute=True))
    assert (plain.seen, again.seen, again.recompute) == (False, True, False) and same(plain, again)


# --- trackers -------------------------------------------------------------------------------------

def expected_in_a_tracker(out):
    "What metrics.jsonl holds, as {name: [(step, value)]}."
    found = {}
    for record in read_jsonl(out / "metrics.jsonl"):
        for name, value in record.items():
            if name not in ("step", "split"):
                found.setdefault(f"{record['split']}/{name}", []).append((record["step"], value))
    return found


def tensorboard_events(out):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(out / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def as_float32(found):
    return {name: [(step, torch.tensor(value).float().item()) for step, value in points] for name, points in found.items()}


def test_tensorboard_shows_metrics_jsonl_to_the_line_even_after_a_kill(tmp_path, capfd):
    "Saved at 12, logged up to 14: what is done again hides what was shown before."
    cfg = replace(CONFIG, tracker="tensorboard", log_every=1)
    with pytest.raises(RuntimeError, match="lights out"):
        go(cfg=cfg, out=tmp_path / "run", rows=Rows(hook=lambda call: lights_out(call - 2)))
    before = tensorboard_events(tmp_path / "run")
    assert before == as_float32(expected_in_a_tracker(tmp_path / "run")) and before["train/loss"][-1][0] == 14
    assert latest_state(tmp_path / "run" / "state").name == "step-00000012"
    go(net(1), replace(cfg, resume=True), tmp_path / "run")
    shown, expected = tensorboard_events(tmp_path / "run"), as_float32(expected_in_a_tracker(tmp_path / "run"))
    assert shown == expected and {"train/loss", "valid/standard_error"} <= set(shown)
    assert shown["train/tokens"][-1] == (24, 24 * 8 * 7) and capfd.readouterr().out == ""
    go(net(2), replace(cfg, overwrite=True, steps=6), tmp_path / "run")
    assert tensorboard_events(tmp_path / "run") == as_float32(expected_in_a_tracker(tmp_path / "run"))


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_learned(tmp_path, monkeypatch):
    import accelerate.tracking
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    rows = Rows()
    with pytest.raises(UserError, match="^the tracker trackio does not start: not installed: pip install trackio$"):
        go(cfg=replace(CONFIG, tracker="trackio"), out=tmp_path, rows=rows)
    assert rows.calls == 0 and read_json(tmp_path / "train_config.json")["tracker"] == "trackio"
    with pytest.raises(UserError, match="tracker is 'aim'; expected none or tensorboard or trackio or wandb"):
        TrainConfig(tracker="aim")
    with pytest.raises(UserError, match="need the folder"):
        go(cfg=replace(CONFIG, tracker="trackio"))


def test_trackio_goes_on_with_the_run_after_a_signal(tmp_path):
    "By a program, for trackio looks for its folder when it is imported; nothing it prints is output."
    pytest.importorskip("trackio")
    where = {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKER": "trackio"}
    stopped = program("term", tmp_path / "run", **where)
    again = program("again", tmp_path / "run", **where)
    assert (stopped.returncode, again.returncode) == (128 + signal.SIGTERM, 0), stopped.stderr + again.stderr
    assert stopped.stdout == again.stdout == "" and "Resumed existing run" in again.stderr
    [base] = (tmp_path / "trackio").glob("*.db")
    shown = {}
    with sqlite3.connect(base) as table:
        for step, metrics in table.execute("select step, metrics from metrics order by id"):
            for name, value in json.loads(metrics).items():
                shown.setdefault(name, []).append((step, value))
        assert table.execute("select count(distinct run_id) from metrics").fetchall() == [(1,)]
        [(settings,)] = table.execute("select config from configs")
    assert shown == expected_in_a_tracker(tmp_path / "run") and json.loads(settings)["batch_size"] == 8


def test_wandb_keeps_its_files_in_the_run_folder(tmp_path):
    pytest.importorskip("wandb")
    done = program("again", tmp_path / "run", WANDB_MODE="offline", WANDB_SILENT="true", TRACKER="wandb")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    known = (tmp_path / "run" / ".tracker").read_text()
    [made] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert known.startswith("run-") and (made / f"run-{known[-8:]}.wandb").stat().st_size > 1000


# --- utilisation ----------------------------------------------------------------------------------

def test_peaks_are_those_of_the_precision():
    assert peak_flops("NVIDIA H200", "bf16") == peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 990e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12 and peak_flops("Abacus", "bf16") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no") == 156e12  # TF32


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_operations_are_those_that_are_computed(kind):
    "code.md 16: against torch's own counter; attention included, the head at scored places only."
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = Backbone(preset("toy", 60, objective=kind, mask_token_id=59))
    objective = Autoregressive() if kind == "ar" else MaskedDiffusion(59)
    rows = {"ids": torch.randint(1, 50, (4, 32)), "scored": (torch.arange(32) > 9).repeat(4, 1)}
    batch = with_places(objective.noise(rows, make_generator(0, "flops")))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # counts both halves of attention
        objective.terms(model, batch)[0].sum().backward()
    mine = update_flops(model, batch, causal=False)
    norms = sum(p.numel() for p in model.parameters() if p.ndim < 2) * 6 * batch["ids"].numel()
    assert mine - norms == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert update_flops(model, batch, causal=True) < mine


def test_mfu_is_recorded_and_tied_tables_count_once(monkeypatch):
    monkeypatch.setattr(trainer, "peak_flops", lambda *_: 1e12)
    _, result = go()
    first = result.history[0]
    assert 0 < first["mfu"] < 6 * 200 * first["tokens_per_second"] / 1e12
    model, batch = net(), {"ids": torch.zeros(2, 5), "places": torch.arange(3)}
    apart = update_flops(model, batch, causal=True)
    model.lm_head.weight = model.embed.weight
    assert update_flops(model, batch, causal=True) == apart == 6 * (8 * 8 + 8 + 2 * 8) * 10 + 6 * 88 * 3


if __name__ == "__main__":
    main(*sys.argv[1:])
