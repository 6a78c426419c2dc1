"Chapter 08: the trainer. As a script (`test_trainer.py MODE OUT`) this file is the program that gets killed."

import atexit
import errno
import json
import math
import os
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn
from torch.nn import functional as F

from nanollada import trainer
from nanollada.core import UserError, make_generator, read_json, read_jsonl
from nanollada.trainer import (Meter, TrainConfig, epoch_order, latest_checkpoint, lr_at, make_accelerator,
                               make_optimizers, matmul_parameters, parameter_groups, peak_flops, rows_of_step,
                               split_batch, train, utilisation)

CONFIG = TrainConfig(steps=24, batch_size=8, micro_batch_size=2, learning_rate=1e-2, warmup_steps=4,
                     eval_every=6, save_every=5, log_every=4, precision="no", progress=False, device="cpu")


class Net(nn.Module):
    "A bigram network with one of everything the optimizer treats differently, and dropout."

    def __init__(self, vocab=11, width=8, dropout=0.1):
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab, width), nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.mid, self.lm_head = nn.Linear(width, width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        return self.lm_head(self.drop(self.mid(self.norm(self.embed(ids))).tanh()))


class Toy:
    "Next-symbol prediction in which noise drops positions, so that counts differ from row to row."

    def __init__(self, rows=40, length=7, n_valid=10, vocab=11, hook=None):
        self.ids = torch.randint(vocab, (rows + n_valid, length), generator=make_generator(0, "toy"))
        self.n_train, self.n_valid, self.hook, self.calls = rows, n_valid, hook, 0

    def noisy(self, ids, generator):
        t = torch.rand(len(ids), 1, generator=generator)
        return {"ids": ids, "keep": torch.rand(ids.shape, generator=generator) < t}

    def train_batch(self, indices, generator):
        self.calls += 1
        if self.hook:
            self.hook(self.calls)
        return self.noisy(self.ids[indices], generator)

    def valid_batches(self, batch_size):
        generator = make_generator(1, "valid")
        for rows in self.ids[self.n_train:].split(batch_size):
            yield self.noisy(rows, generator)

    def count(self, batch):
        return batch["keep"][:, 1:].sum()

    def loss(self, model, batch):
        ids, keep = batch["ids"], batch["keep"][:, 1:]
        nll = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        logs = {"copy": (nll * keep).sum(), "kept": (keep.sum(), keep.numel())}
        return (nll * keep).sum(), logs


def net(seed=0, **kw):
    torch.manual_seed(seed)
    return Net(**kw)


def saver(model, folder):
    save_model(model, str(folder / "model.safetensors"))


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def timeless(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


# --- the program that is killed, or launched twice ------------------------------------------------

def lights_out(call):
    if call == 13:
        raise RuntimeError("lights out")


def killer(mode):
    "What happens inside `train_batch`, or None."
    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM}.get(mode)
    return (lambda call: os.kill(os.getpid(), number) if call == 13 else None) if number else None


def kill_in_mid_write(step):
    "Die half-way through the optimizer file of the checkpoint of `step`."
    def save(value, path):
        if f"{step:08d}" in str(path):
            Path(path).write_bytes(b"half a fi")
            os.kill(os.getpid(), signal.SIGKILL)
        real(value, path)
    real, trainer.torch.save = torch.save, save


def write_threads(out):
    "Names of this process's threads, as Linux knows them."
    names = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    (out / f"threads-{os.environ['RANK']}.json").write_text(json.dumps(names))


def main(mode, out):
    torch.set_num_threads(1)
    if mode == "two":
        atexit.register(write_threads, Path(out))  # before the trainer registers anything, so it is called after that
        model = net(dropout=0.0).double()
        train(model, Toy(n_valid=11), CONFIG, out, saver)
    else:
        if mode == "write":
            kill_in_mid_write(10)
        if mode == "full":
            import resource
            size = (latest_checkpoint(Path(out) / "state") / "optimizer.pt").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            train(net(), Toy(hook=killer(mode)), CONFIG, out, saver, resume=mode == "full")
        except UserError as error:
            sys.exit(f"UserError: {error}")


def program(mode, out):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, __file__, mode, str(out)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody disturbed."
    out, model = tmp_path_factory.mktemp("whole") / "run", net()
    return out, model, train(model, Toy(), CONFIG, out, saver)


# --- resume ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, code, step", [("kill", -signal.SIGKILL, 10), ("write", -signal.SIGKILL, 5),
                                              ("term", 128 + signal.SIGTERM, 13)])
def test_killed_and_resumed_is_bitwise_the_whole_run(whole, tmp_path, mode, code, step):
    done = program(mode, tmp_path / "run")
    assert done.returncode == code, done.stderr
    assert latest_checkpoint(tmp_path / "run/state").name == f"step-{step:08d}"
    model = net(seed=99)  # the weights must come from the checkpoint
    result = train(model, Toy(), CONFIG, tmp_path / "run", saver, resume=True)
    assert same(model, whole[1]) and result.best == whole[2].best
    ours, theirs = tmp_path / "run/model.safetensors", whole[0] / "model.safetensors"
    assert all(torch.equal(v, load_file(theirs)[k]) for k, v in load_file(ours).items())
    if mode != "term":  # stopping by a signal closes a logging window early
        assert timeless(result.history) == timeless(whole[2].history)
    assert [p.name for p in (tmp_path / "run/state").iterdir()] == ["step-00000024"]


def test_two_legs_of_moments_are_equal_too(whole, tmp_path):
    with pytest.raises(RuntimeError, match="lights out"):
        train(net(), Toy(hook=lights_out), CONFIG, tmp_path / "run")
    train(net(1), Toy(), CONFIG, tmp_path / "run", resume=True)
    def moments(out):
        states = torch.load(out / "state/step-00000024/optimizer.pt", weights_only=True)
        return [v for o in states for s in o["state"].values() for v in s.values()]
    pairs = list(zip(moments(tmp_path / "run"), moments(whole[0]), strict=True))
    assert len(pairs) == 3 * 6 and all(torch.equal(x, y) for x, y in pairs)


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    out, model = tmp_path / "run", net()
    train(model, Toy(), CONFIG, out, saver)
    task, again = Toy(), net(5)
    result = train(again, task, CONFIG, out, saver, resume=True)
    assert same(model, again) and task.calls == 0 and result.steps == 24
    assert timeless(result.history) == timeless(whole[2].history)


def test_resume_of_a_run_killed_before_its_first_checkpoint_starts_anew(whole, tmp_path):
    (tmp_path / "train_config.json").write_text("{}")
    model = net()
    train(model, Toy(), CONFIG, tmp_path, resume=True)
    assert same(model, whole[1])


def test_resume_elsewhere_and_double_use_are_refused(whole, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        train(net(), Toy(), CONFIG, tmp_path, resume=True)
    with pytest.raises(UserError, match="in `out`"):
        train(net(), Toy(), CONFIG, resume=True)
    with pytest.raises(UserError, match="already holds a run, at step-00000024"):
        train(net(), Toy(), CONFIG, whole[0])


def test_overwrite_begins_again(tmp_path):
    short = replace(CONFIG, steps=6, warmup_steps=1)
    train(net(), Toy(), CONFIG, tmp_path)
    train(net(), Toy(), short, tmp_path, overwrite=True)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000006"]
    assert max(r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")) == 6


def test_resume_names_every_setting_that_differs(whole):
    with pytest.raises(UserError, match="seed was 0 and is 3.*n_train was 40 and is 39") as caught:
        other = replace(CONFIG, seed=3, log_every=2, micro_batch_size=4)
        train(net(), Toy(rows=39), other, whole[0], resume=True)
    assert "log_every" not in str(caught.value) and "micro" not in str(caught.value)
    with pytest.raises(UserError, match="parameters was"):
        train(net(width=9), Toy(), CONFIG, whole[0], resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer.json"])
@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_damaged_checkpoint_names_the_file(tmp_path, name, harm):
    cfg = replace(CONFIG, steps=4, warmup_steps=1)
    train(net(), Toy(), cfg, tmp_path)
    path = tmp_path / "state/step-00000004" / name
    content = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[:len(content) // 2])
    with pytest.raises(UserError, match=name):
        train(net(), Toy(), cfg, tmp_path, resume=True)


class Trap:
    "An object that leaves a mark when it is unpickled."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_state_that_is_not_tensors_is_not_unpickled(tmp_path):
    cfg = replace(CONFIG, steps=4, warmup_steps=1)
    train(net(), Toy(), cfg, tmp_path)
    path = tmp_path / "state/step-00000004/optimizer.pt"
    torch.save([Trap(tmp_path / "mark")], path)
    with pytest.raises(UserError, match="optimizer.pt"):
        train(net(), Toy(), cfg, tmp_path, resume=True)
    assert not (tmp_path / "mark").exists()


def test_another_model_of_the_same_size_is_refused(tmp_path):
    class Renamed(Net):
        def __init__(self):
            super().__init__()
            self.middle = self.mid
            del self.mid
    cfg = replace(CONFIG, steps=4, warmup_steps=1)
    train(net(), Toy(), cfg, tmp_path)
    with pytest.raises(UserError, match="model.safetensors: damaged, or made for another model"):
        train(Renamed(), Toy(), cfg, tmp_path, resume=True)


# --- disk -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("file write failed")])
def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, whole, error):
    real = torch.save

    def save(value, path):
        if "00000010" in str(path):
            raise error
        real(value, path)
    words = "step-00000010: could not be written.*step-00000005"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=words):
        patch.setattr(trainer.torch, "save", save)
        train(net(), Toy(), CONFIG, tmp_path)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000005"]
    model = net(3)
    train(model, Toy(), CONFIG, tmp_path, resume=True)
    assert same(model, whole[1])


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes")
def test_write_that_the_system_refuses(tmp_path):
    with pytest.raises(RuntimeError, match="lights out"):
        train(net(), Toy(hook=lights_out), CONFIG, tmp_path)
    done = program("full", tmp_path)
    assert "UserError" in done.stderr and "could not be written" in done.stderr
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000010"]


# --- one batch, cut in many ways ------------------------------------------------------------------

def final(cfg, task=None, **kw):
    model = net(dropout=0.0).double()
    result = train(model, task or Toy(n_valid=11), cfg, **kw)
    return model, result


def close(a, b, tolerance=1e-9):
    """Adam divides by the gradient's own size, so float64's 2e-16 grows by 1 / (smallest relative gradient);
    1e-9 leaves six digits for that, and a wrong average differs by 1e-3 (the test of the mean of means)."""
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters())) < tolerance


def test_micro_batches_do_not_change_the_result():
    whole_batch, _ = final(replace(CONFIG, micro_batch_size=8))
    assert all(close(whole_batch, final(replace(CONFIG, micro_batch_size=m))[0]) for m in (1, 2, 4))


def test_a_mean_of_means_would_be_another_result():
    class MeanOfMeans(Toy):
        def count(self, batch):
            return torch.tensor(8 / CONFIG.micro_batch_size)  # number of micro-batches

        def loss(self, model, batch):
            loss, _ = super().loss(model, batch)
            return loss / batch["keep"][:, 1:].sum().clamp(min=1), {}
    assert not close(final(CONFIG)[0], final(CONFIG, MeanOfMeans())[0], tolerance=1e-3)


def test_two_processes_agree_with_one(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               __file__, "two", str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if sys.platform == "linux":  # threads of the process group that outlive Python abort the process now and then
        threads = [read_json(tmp_path / f"run/threads-{rank}.json") for rank in (0, 1)]
        assert all(threads) and not any("gloo" in name for names in threads for name in names), threads
    model, result = final(CONFIG)
    assert read_json(tmp_path / "run/train_config.json")["processes"] == 2
    two = net(dropout=0.0).double()
    two.load_state_dict(load_file(tmp_path / "run/state/step-00000024/model.safetensors"))
    assert close(model, two)
    for a, b in zip(result.history, read_jsonl(tmp_path / "run/metrics.jsonl"), strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        for key in {"loss", "copy", "kept", "lr", "grad_norm"} & set(a):  # losses are summed in float32
            assert a[key] == pytest.approx(b[key], rel=1e-5)


def test_batch_must_divide():
    with pytest.raises(UserError, match="batch_size is 8; expected a multiple of 3 x 1"):
        train(net(), Toy(), replace(CONFIG, micro_batch_size=3))


def test_split_batch_shares_all_rows_once():
    batch = {"ids": torch.arange(24)}
    pieces = [p["ids"] for rank in range(3) for p in split_batch(batch, 2, rank, 3)]
    assert len(pieces) == 12 and torch.equal(torch.cat(pieces).sort().values, batch["ids"])
    with pytest.raises(UserError, match="mask"):
        split_batch({"ids": torch.zeros(4), "mask": torch.zeros(3)}, 2)


# --- order of the data ----------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch", [(10, 3), (10, 10), (3, 10), (1, 4), (7, 1)])
def test_rows_are_epochs_laid_end_to_end(n, batch):
    steps = 2 * n
    rows = torch.cat([rows_of_step(s, n, batch, seed=4) for s in range(steps)])
    assert len(rows) == steps * batch
    for epoch in rows[:len(rows) // n * n].view(-1, n):
        assert torch.equal(epoch.sort().values, torch.arange(n))


def test_order_depends_on_seed_and_epoch():
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


# --- schedule -------------------------------------------------------------------------------------

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
    assert [TrainConfig(steps=n).warmup for n in (1, 8, 200, 10_000)] == [0, 2, 50, 50]
    assert TrainConfig(steps=1000, warmup_steps=7).warmup == 7 and TrainConfig(steps=2, warmup_steps=2).warmup == 2
    cfg = TrainConfig(steps=1000)
    assert lr_at(24, cfg) == pytest.approx(cfg.learning_rate / 2) and lr_at(50, cfg) == cfg.learning_rate


def test_time_budget_moves_the_schedule():
    cfg = TrainConfig(steps=1000, warmup_steps=0, min_lr_ratio=0.0, time_budget=10.0, decay_fraction=0.5)
    assert lr_at(1, cfg, elapsed=5.0) == cfg.learning_rate
    assert lr_at(1, cfg, elapsed=7.5) == pytest.approx(cfg.learning_rate / 2)
    assert lr_at(750, cfg, elapsed=1.0) == pytest.approx(cfg.learning_rate / 2)  # whichever is further


def test_time_budget_stops_the_run(monkeypatch):
    looks = count()  # a clock that moves by a millisecond whenever it is looked at
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 1000))
    result = train(net(), Toy(), replace(CONFIG, steps=10**6, time_budget=0.3, min_lr_ratio=0.0))
    assert result.stopped == "time" and 0.3 <= result.seconds < 0.31 and result.steps < 300
    rates = [r["lr"] for r in result.history if r["split"] == "train"]
    assert rates[-1] < 0.3 * max(rates)


@pytest.mark.parametrize("bad, words", [
    ({"steps": 0}, "0; expected an integer of at least 1"), ({"batch_size": 2.5}, "2.5; expected an integer"),
    ({"learning_rate": 0}, "above 0"), ({"learning_rate": math.nan}, "above 0"),
    ({"min_lr_ratio": 2}, "share"), ({"warmup_steps": 2000}, "0 to steps"),
    ({"schedule": "linear"}, "wsd, cosine or constant"),
    ({"decay_fraction": 0}, "share"), ({"optimizer": "sgd"}, "adamw or muon"),
    ({"betas": (0.9, 1.0)}, "below 1"), ({"weight_decay": -1}, "0 or more"), ({"precision": "fp16"}, "bf16"),
    ({"compile": "yes"}, "True or False"),
    ({"clip": 0.0}, "above 0"), ({"patience": 0}, "at least 1"), ({"min_delta": -1}, "0 or more"),
    ({"seed": -1}, "integer"), ({"time_budget": 0}, "above 0"), ({"eval_batches": 0}, "at least 1"),
    ({"micro_batch_size": 0}, "at least 1")])
def test_config_is_checked(bad, words):
    with pytest.raises(UserError, match=f"TrainConfig.{next(iter(bad))} is .*{words}"):
        TrainConfig(**bad)


# --- optimizers -----------------------------------------------------------------------------------

def test_groups_take_each_parameter_once():
    model = net()
    model.tied = model.embed  # shared: must not appear twice
    groups = parameter_groups(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {g: [names[id(p)] for p in ps] for g, ps in groups.items()} == {
        "hidden": ["mid.weight"], "matrix": ["lm_head.weight"],
        "plain": ["embed.weight", "norm.weight", "norm.bias", "mid.bias"]}


def test_decay_shrinks_matrices_only():
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in make_optimizers(model, TrainConfig(learning_rate=0.1, weight_decay=0.5)):
        optimizer.step()
    shrunk = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert shrunk == {"mid.weight", "lm_head.weight"}
    torch.testing.assert_close(model.mid.weight, before["mid.weight"] * 0.95)


def test_a_wholly_frozen_model_is_refused():
    with pytest.raises(UserError, match="no trainable parameters"):
        make_optimizers(net().requires_grad_(False), CONFIG)


def test_frozen_parameters_stay():
    model = net()
    model.embed.weight.requires_grad_(False)
    before = model.embed.weight.clone()
    train(model, Toy(), CONFIG)
    assert torch.equal(model.embed.weight, before)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_learns_and_resumes(tmp_path):
    cfg = replace(CONFIG, optimizer="muon", muon_lr_scale=0.5)
    made = make_optimizers(net(), cfg)
    kinds = {type(o).__name__: [tuple(p.shape) for g in o.param_groups for p in g["params"]] for o in made}
    assert kinds["Muon"] == [(8, 8)] and len(kinds["AdamW"]) == 5
    model = net()
    result = train(model, Toy(), cfg)
    losses = [r["loss"] for r in result.history if r["split"] == "train"]
    assert losses[-1] < losses[0]
    with pytest.raises(RuntimeError):
        train(net(), Toy(hook=lights_out), cfg, tmp_path)
    again = net(1)
    train(again, Toy(), cfg, tmp_path, resume=True)
    assert same(model, again)


def test_muon_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match="use adamw"):
        make_optimizers(net(), replace(CONFIG, optimizer="muon"))


# --- the loop -------------------------------------------------------------------------------------

def test_run_folder_and_records(whole):
    out, model, result = whole
    files = {"state", "metrics.jsonl", "train_config.json", "model.safetensors"}
    assert {p.name for p in out.iterdir()} == files
    assert read_json(out / "train_config.json")["learning_rate"] == 1e-2
    assert read_jsonl(out / "metrics.jsonl") == result.history
    assert [r["step"] for r in result.history if r["split"] == "valid"] == [6, 12, 18, 24]
    assert all(r["copy"] == pytest.approx(r["loss"]) and 0 < r["kept"] < 1 for r in result.history)
    first = result.history[0]
    assert {"step", "split", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"} <= set(first)
    assert result.stopped == "steps" and result.steps == 24 and result.tokens_per_second > 0
    assert not model.training and "mfu" not in first


def test_best_weights_are_those_of_the_lowest_validation(whole):
    out, _, result = whole
    losses = {r["step"]: r["loss"] for r in result.history if r["split"] == "valid"}
    assert result.best == {"step": min(losses, key=losses.get), "loss": min(losses.values())}
    model, task = net(), Toy()
    model.load_state_dict(load_file(out / "model.safetensors"))
    model.eval()
    with torch.no_grad():
        sums = [(task.loss(model, b)[0], task.count(b)) for b in task.valid_batches(2)]
    mean = sum(s for s, _ in sums).item() / sum(c for _, c in sums).item()
    assert mean == pytest.approx(result.best["loss"], rel=1e-5)


def test_without_validation_the_last_weights_are_kept(tmp_path):
    model = net()
    result = train(model, Toy(n_valid=0), CONFIG, tmp_path, saver)
    assert result.best is None and all(r["split"] == "train" for r in result.history)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved and all(torch.equal(v, model.state_dict()[k]) for k, v in saved.items())


def test_patience_counts_evaluations_without_progress():
    cfg = replace(CONFIG, learning_rate=1e-9, eval_every=2, patience=3, min_delta=0.01)
    result = train(net(), Toy(), cfg)
    assert result.stopped == "patience" and result.steps == 2 + 3 * 2 and result.best["step"] == 2


def test_patience_survives_resume(tmp_path):
    cfg = replace(CONFIG, learning_rate=1e-9, eval_every=2, patience=3, min_delta=0.01)
    train(net(), Toy(), cfg, tmp_path)
    result = train(net(), Toy(), cfg, tmp_path, resume=True)
    assert result.stopped == "patience" and result.steps == 8


@pytest.mark.parametrize("where", ["loss", "gradient", "validation"])
def test_not_a_number_stops_before_it_is_saved(tmp_path, where):
    class Sick(Toy):
        def loss(self, model, batch):
            loss, logs = super().loss(model, batch)
            if where == "validation":
                return loss * (1 if model.training or self.calls < 12 else math.nan), logs
            if self.calls == 12:
                zero = (model.mid.weight * 0).sum()
                loss = loss * math.nan if where == "loss" else loss + zero.sqrt()  # sqrt'(0) * 0: nan
            return loss, logs
    with pytest.raises(UserError, match="(loss|grad_norm) is nan by step 12.*lower the.*step-00000010"):
        train(net(), Sick(), CONFIG, tmp_path)
    saved = load_file(latest_checkpoint(tmp_path / "state") / "model.safetensors")
    assert all(v.isfinite().all() for v in saved.values())


def norm_of(optimizer):
    squares = (p.grad.square().sum().item() for g in optimizer.param_groups for p in g["params"])
    return math.sqrt(sum(squares))


def test_clipping_bounds_the_gradient_that_is_used():
    class Huge(Toy):
        def loss(self, model, batch):
            loss, logs = super().loss(model, batch)
            return loss * 1e6, logs
    steps = {}
    for clip in (None, 1.0):
        seen = []
        real = torch.optim.AdamW.step
        try:
            torch.optim.AdamW.step = lambda self: (seen.append(norm_of(self)), real(self))[1]
            result = train(net(), Huge(), replace(CONFIG, clip=clip))
        finally:
            torch.optim.AdamW.step = real
        steps[clip] = seen
        assert result.history[0]["grad_norm"] > 1e4  # what is logged is the norm before clipping
    assert min(steps[None]) > 1e4 and max(steps[1.0]) == pytest.approx(1.0, rel=1e-3)


def test_trainings_of_different_precision_in_one_process():
    def dtypes(precision):
        seen = set()

        class Watch(Toy):
            def loss(self, model, batch):
                with torch.no_grad():
                    seen.add(model.lm_head(torch.zeros(1, 8)).dtype)
                loss, logs = super().loss(model, batch)
                return loss, logs
        train(net(), Watch(), replace(CONFIG, steps=4, precision=precision))
        return seen
    assert [dtypes(p) for p in ("no", "bf16", "no")] == [{torch.float32}, {torch.bfloat16}, {torch.float32}]


def test_training_leaves_the_callers_randomness_and_signals_alone(tmp_path):
    torch.manual_seed(3)
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)
    model = Net()
    torch.set_rng_state(before)
    train(model, Toy(), replace(CONFIG, steps=4), tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and signal.getsignal(signal.SIGTERM) is handler


def test_seed_decides_everything():
    a, b, c = net(), net(), net()
    train(a, Toy(), CONFIG)
    torch.manual_seed(123)
    train(b, Toy(), CONFIG)
    train(c, Toy(), replace(CONFIG, seed=1))
    assert same(a, b) and not same(a, c)


def test_compile_keeps_names_and_is_undone(monkeypatch):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = net()

        def forward(self, ids):
            return self.model(ids)
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: calls.append(self))
    model = Wrapped()
    names = list(model.state_dict())
    train(model, Toy(), replace(CONFIG, steps=4, compile=True))
    assert calls == [model.model] and list(model.state_dict()) == names
    assert model.model._compiled_call_impl is None
    train(model, Toy(), replace(CONFIG, steps=4))
    assert len(calls) == 1  # auto: not on a CPU


def test_empty_tasks_are_refused():
    with pytest.raises(UserError, match="no training rows"):
        train(net(), Toy(rows=0), CONFIG)

    class Nothing(Toy):
        def count(self, batch):
            return 0
    with pytest.raises(UserError, match="counts 0.0 tokens in the batch of step 0"):
        train(net(), Nothing(), CONFIG)


def test_out_of_memory_is_explained():
    def full(call):
        raise torch.OutOfMemoryError("no memory")
    with pytest.raises(UserError, match="out of memory at step 0 with 2 rows per forward pass"):
        train(net(), Toy(hook=full), CONFIG)


def test_bar_is_silent_when_off(capfd):
    train(net(), Toy(), CONFIG)
    assert capfd.readouterr() == ("", "")
    train(net(), Toy(), replace(CONFIG, progress=True))
    shown = capfd.readouterr()
    assert shown.out == "" and "tok/s" in shown.err and "loss" in shown.err


# --- utilisation ----------------------------------------------------------------------------------

def test_peaks_and_utilisation():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 990e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("Abacus") is None
    assert utilisation(1e6, 10**8, 1e15) == pytest.approx(0.6)
    result = train(net(), Toy(), replace(CONFIG, peak_flops=1e12))
    first = result.history[0]
    assert first["mfu"] == pytest.approx(6 * (8 * 8 + 8 + 11 * 8 + 2 * 8) * first["tokens_per_second"] / 1e12)


def test_tied_tables_count_once():
    model = net()
    free = matmul_parameters(model)
    model.lm_head.weight = model.embed.weight
    assert matmul_parameters(model) == free


def test_meter_averages_sums_and_pairs():
    meter, accelerator = Meter(), make_accelerator(CONFIG)
    for loss, hits, of in ((6.0, 1.0, 2.0), (2.0, 5.0, 6.0)):
        logs = {"share": (torch.tensor(hits), torch.tensor(of)), "plain": torch.tensor(4.0)}
        meter.add(torch.tensor(loss), logs)
        meter.end_step(torch.tensor(1.0), 2, 10)
    assert meter.means(accelerator) == {"loss": 2.0, "share": 0.75, "plain": 2.0}


if __name__ == "__main__":
    main(*sys.argv[1:])


def test_recompute_is_switched_on_for_the_training_only():
    class Trunk(Net):
        recompute, seen = False, None

        def forward(self, *args):
            self.seen = self.recompute
            return super().forward(*args)
    torch.manual_seed(0)
    plain = Trunk()
    again = deepcopy(plain)
    train(plain, Toy(), replace(CONFIG, steps=4))
    train(again, Toy(), replace(CONFIG, steps=4, recompute=True))
    assert (plain.seen, again.seen, again.recompute) == (False, True, False) and same(plain, again)
    with pytest.raises(UserError, match="recompute is on, which a Net does not know"):
        train(net(), Toy(), replace(CONFIG, steps=4, recompute=True))


def test_a_task_may_finish_rows_on_the_cpu():
    seen = []

    class Finishing(Toy):
        def finish(self, batch):
            seen.append(len(batch["ids"]))
            return batch | {"extra": torch.tensor(7)}

        def loss(self, model, batch):
            assert batch["extra"] == 7
            return super().loss(model, batch)
    train(net(), Finishing(), replace(CONFIG, steps=4, micro_batch_size=CONFIG.batch_size // 2, eval_every=4))
    assert seen[:4] == [CONFIG.batch_size // 2] * 4 and len(seen) > 4  # and the validation rows
