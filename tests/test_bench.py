"Training steps compared: all variants learn the same, and the records say what was measured."

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanollada import bench as module
from nanollada.backbone import Backbone, preset
from nanollada.bench import STEPS, RandomRows, TrainBenchConfig, bench_table, bench_train, plain_loss, plain_step
from nanollada.core import UserError, make_generator
from nanollada.pretrain import TextTask

SMALL = TrainBenchConfig(preset="toy", vocab_size=60, length=12, batch_size=4, repeats=2, device="cpu",
                         variants=tuple(name for name in STEPS if name != "ours_compiled"))


@pytest.fixture(scope="module")
def records():
    return bench_train(SMALL)


def task_of(objective: str, rows: int = 32, length: int = 12) -> tuple[Backbone, TextTask]:
    torch.manual_seed(0)
    model = Backbone(preset("toy", 60, objective=objective, mask_token_id=59))
    return model, TextTask(RandomRows(rows, length, 60), None, model.cfg, random_length=0.0)


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_plain_loss_is_the_trainers_loss_with_the_same_gradient(objective):
    model, task = task_of(objective)
    batch = task.train_batch(torch.arange(8), make_generator(0, "noise"))
    plain, lean = plain_loss(model, batch), task.loss(model, batch)[0]
    torch.testing.assert_close(plain, lean)
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in (plain, lean)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_plain_step_descends():
    model, task = task_of("ar")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = task.train_batch(torch.arange(8), make_generator(0, "noise"))
    losses = [plain_step(model, optimizer, batch, float(task.count(batch))).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and model.lm_head.weight.grad is None


def test_records_say_what_was_measured(records):
    head, *lines = records
    assert head["preset"] == "toy" and head["length"] == 12 and head["left_out"] == {} and head["device"] == "cpu"
    assert [(r["objective"], r["variant"]) for r in lines] == [(o, v) for o in SMALL.objectives for v in SMALL.variants]
    for r in lines:
        assert 0 < r["tokens_per_second_min"] <= r["tokens_per_second"] <= r["tokens_per_second_max"]
        assert r["forward_passes"] == 2 + SMALL.repeats * SMALL.steps and r["tokens_per_forward"] == 48 and r["mfu"] is None


def test_nothing_changed_but_the_speed(records):
    loss = {(r["objective"], r["variant"]): r["quality"] for r in records[1:]}
    for objective in SMALL.objectives:
        plain = loss[objective, "plain_step"]
        for name in ("fused_adamw", "scored_logits"):
            assert loss[objective, name] == pytest.approx(plain, abs=1e-4)
        for name in ("bf16", "ours_adamw"):  # bfloat16 has 8 bits: 0.4 %
            assert loss[objective, name] == pytest.approx(plain, rel=2**-8)
        assert loss[objective, "ours_recompute"] == loss[objective, "ours"] != loss[objective, "ours_adamw"]


def test_the_table_divides_by_the_plain_variant_of_the_same_group():
    base = {"tokens_per_second_min": 1, "tokens_per_second_max": 9, "peak_memory_bytes": 2e6, "quality": 1.5}
    train_records = [{"machine": "x"}] + [
        {"variant": v, "objective": o, "tokens_per_second": s, **base}
        for o, v, s in (("ar", "plain_step", 2), ("ar", "ours", 5), ("diffusion", "plain_step", 4), ("diffusion", "ours", 6))]
    lines = bench_table(train_records).splitlines()
    assert lines[0] == "| objective | variant | tokens/s (slowest, fastest) | × plain | memory, MB | loss |"
    assert lines[3] == "| ar | `ours` | 5 (1, 9) | 2.50 | 2 | 1.5000 |" and "| 1.50 |" in lines[5] and len(lines) == 6
    sample_records = [{}] + [
        {"variant": v, "batch_size": 1, "tokens_per_second": s, "forward_passes": 7, **base, "peak_memory_bytes": None}
        for v, s in (("plain_loop", 2), ("ar_kv_cache", 4), ("threshold_dual", 8))]
    assert bench_table(sample_records).splitlines()[-1] == "| 1 | `threshold_dual` | 8 (1, 9) | 4.00 | 2.00 |  | 7 | 1.500 |"


def test_the_table_names_the_measure_and_leaves_out_what_means_nothing():
    record = {"batch_size": 1, "tokens_per_second": 4, "tokens_per_second_min": 1, "tokens_per_second_max": 9, "forward_passes": 7,
              "peak_memory_bytes": 0, "quality": 0.5}
    records = [record | {"variant": name} for name in ("plain_loop", "ar_kv_cache")]
    head = {"quality": "agreement with plain_loop", "trained": False}
    titles, _, plain, ar, *note = bench_table([head, *records]).splitlines()
    assert titles.endswith("| memory, MB | passes | agreement with plain_loop |")
    assert plain.endswith("|  | 7 | 0.500 |") and ar.endswith("|  | 7 | - |") and note == ["", "untrained weights: speed only"]
    titles, _, _, ar = bench_table([{"quality": "judge", "trained": True}, *records]).splitlines()
    assert titles.endswith("| judge |") and ar.endswith("| 0.500 |")


def test_a_machine_that_cannot_compile_leaves_that_out_and_says_why(monkeypatch):
    real = module._train_step

    def step(run):
        if run.cfg.compile is True:
            raise RuntimeError("no compiler here\nlong story")
        real(run)

    monkeypatch.setattr(module, "_train_step", step)
    head, *lines = bench_train(replace(SMALL, variants=("ours", "ours_compiled"), objectives=("ar",), repeats=1))
    assert head["left_out"] == {"ours_compiled": "no compiler here"} and [r["variant"] for r in lines] == ["ours"]
    monkeypatch.setattr(module, "_train_step", lambda run: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        bench_train(replace(SMALL, variants=("ours",)))


def test_random_rows_are_reproducible_and_leave_the_mask_out():
    a, b, c = RandomRows(50, 40, 30), RandomRows(50, 40, 30), RandomRows(50, 40, 30, seed=1)
    assert torch.equal(a.ids, b.ids) and not torch.equal(a.ids, c.ids) and a.ids.max() <= 28 and len(a) == 50
    counts = torch.bincount(a.ids.flatten(), minlength=29).float() / a.ids.numel()
    expected = F.normalize(1 / torch.arange(1.0, 30), p=1, dim=0)
    assert ((counts - expected).abs() < 5 * (expected / a.ids.numel()).sqrt()).all()  # five standard errors


@pytest.mark.parametrize("wrong, message", [
    (dict(preset="huge"), "preset is 'huge'; expected one of toy"),
    (dict(clock="sun"), "clock is 'sun'; expected one of wall, cpu"),
    (dict(variants=("ours", "mine")), "variants holds 'mine'"),
    (dict(variants=()), "variants holds 'nothing'"),
    (dict(objectives=("image",)), "objectives holds 'image'"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(repeats=0), "repeats is 0"),
    (dict(steps=0), "steps is 0"),
    (dict(length=1), "length is 1"),
    (dict(device="abacus"), "device is 'abacus'"),
])
def test_bad_settings(wrong, message):
    with pytest.raises(UserError, match=message):
        bench_train(replace(SMALL, **wrong))
