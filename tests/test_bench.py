"Ways of training and of writing compared: all learn the same, the same text is timed and judged, and nothing is lost on the way."

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanollada import bench as module
from nanollada.backbone import Backbone, preset, save_run
from nanollada.bench import STEPS, Plain, random_rows, SampleBench, TrainBench, bench, bench_sample, bench_table, bench_train, race
from nanollada.core import UserError, make_generator
from nanollada.data import toy_tokenizer
from nanollada.pretrain import make_objective

SMALL = TrainBench(preset="toy", vocab_size=60, length=12, batch_size=4, seconds=0, device="cpu",
                   variants=tuple(name for name in STEPS if name != "ours_compiled"))


@pytest.fixture(scope="module")
def records():
    return list(bench_train(SMALL))


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_the_plain_loss_is_the_trainers_loss_with_the_same_gradient(objective):
    torch.manual_seed(0)
    model = Backbone(preset("toy", 60, objective=objective, mask_token_id=59))
    rows = random_rows(8, 12, 60).batch(torch.arange(8))
    ours = make_objective(model.cfg)
    losses = [way.loss(model, rows, make_generator(0, "noise")) for way in (Plain(ours), ours)]
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_nothing_changed_but_the_speed(records):
    lines = records
    assert [(r["objective"], r["variant"]) for r in lines] == [(o, v) for o in SMALL.objectives for v in SMALL.variants]
    assert all(0 < r["slowest"] <= r["tokens_per_second"] <= r["fastest"] and r["memory"] is None for r in lines)
    loss = {(r["objective"], r["variant"]): r["loss"] for r in lines}
    for objective in SMALL.objectives:
        assert loss[objective, "scored_logits"] == pytest.approx(loss[objective, "plain_step"], abs=1e-4)
        assert loss[objective, "bf16"] == pytest.approx(loss[objective, "plain_step"], rel=2**-8)  # bfloat16 has 8 bits: 0.4 %
        assert loss[objective, "ours_recompute"] == loss[objective, "ours"] != loss[objective, "bf16"]


def test_ours_is_not_compiled_and_ours_compiled_is():
    "code.md 14: with compile='auto' the two were the same on a GPU."
    compiled = {name: module.open_training(SMALL, "ar", name).cfg.compile for name in STEPS}
    assert [name for name, value in compiled.items() if value is not False] == ["ours_compiled"] and compiled["ours_compiled"] is True


def test_what_is_measured_is_compiled_or_recomputes_as_it_says(monkeypatch):
    seen, validate = [], module.Training.validate
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "asked", True))
    monkeypatch.setattr(module.Training, "validate", lambda self: seen.append(
        (hasattr(self.model.model, "asked"), self.model.model.recompute)) or validate(self))
    list(bench_train(replace(SMALL, variants=("ours", "ours_compiled", "ours_recompute"), objectives=("ar",))))
    assert seen == [(False, False), (True, False), (False, True)]


def test_a_machine_that_cannot_compile_leaves_that_out_and_says_why(monkeypatch):
    real = module.Training.update

    def update(self):
        if self.cfg.compile is True:
            raise RuntimeError("no compiler here\nlong story")
        return real(self)

    monkeypatch.setattr(module.Training, "update", update)
    ours, left_out = bench_train(replace(SMALL, variants=("ours", "ours_compiled"), objectives=("ar",)))
    assert ours["variant"] == "ours" and left_out["variant"] == "ours_compiled: no compiler here" and "loss" not in left_out
    monkeypatch.setattr(module.Training, "update", lambda self: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        list(bench_train(replace(SMALL, variants=("ours",))))


def test_a_race_is_the_median_of_ratios_taken_pair_by_pair(monkeypatch):
    "The machine gets slower and slower; both sides of a pair suffer alike."
    now, pace = [0.0], [1.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def work(seconds):
        def turn():
            now[0] += seconds * pace[0]
            pace[0] *= 1.001
            return 10
        return turn

    found = race(work(4.0), work(1.0), 5000.0, torch.device("cpu"))
    assert found["times_plain"] == pytest.approx(4, rel=2e-3) and found["slowest"] < 10 / 2 < found["fastest"] * 0.9
    assert now[0] >= 5000


def test_random_rows_are_reproducible_and_leave_the_mask_out():
    a, b, c = random_rows(50, 40, 30), random_rows(50, 40, 30), random_rows(50, 40, 30, seed=1)
    assert torch.equal(a.ids, b.ids) and not torch.equal(a.ids, c.ids) and a.ids.max() <= 28 and len(a) == 50
    expected = F.normalize(1 / torch.arange(1.0, 30), p=1, dim=0)
    counts = torch.bincount(a.ids.flatten(), minlength=29).float() / a.ids.numel()
    assert ((counts - expected).abs() < 5 * (expected / a.ids.numel()).sqrt()).all()  # five standard errors
    assert not a.batch(torch.arange(2))["scored"][:, 0].any() and a.batch(torch.arange(2))["scored"].sum() == 2 * 39


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    place, tokenizer = tmp_path_factory.mktemp("pair"), toy_tokenizer()
    for seed, objective in enumerate(("ar", "diffusion")):
        torch.manual_seed(seed)
        shape = preset("toy", len(tokenizer), objective=objective, mask_token_id=tokenizer.mask_token_id, max_position_embeddings=256)
        save_run(Backbone(shape), tokenizer, place / objective)
    return SampleBench(run=place / "diffusion", ar_run=place / "ar", gen_length=12, batch_sizes=(1, 3), seconds=0, device="cpu", temperature=1.0)


def test_the_text_that_is_timed_is_the_text_that_is_judged(pair, monkeypatch):
    written, judged = [], []
    real = module.write_ids
    monkeypatch.setattr(module, "write_ids", lambda *given: written.append(real(*given)) or written[-1])
    monkeypatch.setattr(module, "judged_nll", lambda model, tokenizer, texts: judged.append((model.cfg.objective, texts)) or (1.0, 0.1))
    lines = list(bench_sample(replace(pair, variants=("official", "ar", "default"))))
    assert [(r["rows"], r["variant"]) for r in lines] == [(rows, v) for rows in (1, 3) for v in ("official", "ar", "default")]
    assert {objective for objective, _ in judged} == {"ar"} and all(r["judge"] == 1.0 and 0 < r["distinct_2"] <= 1 for r in lines)
    decode = toy_tokenizer().decode
    mine = [[decode(text) for batch in turns for text in batch] for turns in (written[n + 1 : n + 6 : 2] for n in range(0, len(written), 6))]
    assert [texts for _, texts in judged] == mine  # three rounds, plain first; every text of ours and no other


def test_runs_of_blocks_and_of_edits_are_raced_in_their_own_ways(pair, tmp_path):
    tokenizer = toy_tokenizer()
    kinds = {"blocks": (dict(objective="block", block_length=4, causal_clean=True), ("official", "ar", "default", "left", "drafts")),
             "editing": (dict(objective="diffusion", edits=True), ("default", "edits"))}
    for name, (shape, variants) in kinds.items():
        shape = preset("toy", len(tokenizer), mask_token_id=tokenizer.mask_token_id, max_position_embeddings=256, **shape)
        save_run(Backbone(shape).eval(), tokenizer, tmp_path / name)
        found = list(bench_sample(replace(pair, run=tmp_path / name, variants=variants)))
        assert [row["variant"] for row in found] == [*variants] * 2 and all(row["tokens_per_second"] > 0 for row in found)
    with pytest.raises(UserError, match="way is edits"):
        list(bench_sample(replace(pair, variants=("edits",))))


def test_rows_appear_one_by_one_and_are_on_the_disk_at_once(pair, tmp_path):
    lines = bench(replace(pair, json=tmp_path / "b.json", batch_sizes=(1,), variants=("ar", "default")))
    head = [next(lines) for _ in range(5)]
    assert len(json.loads((tmp_path / "b.json").read_text())) == 2 and head[2].startswith("| rows | variant |") and head[4].startswith("| 1 | ar |")
    assert [line.split(" | ")[1] for line in lines] == ["default"]
    stored = json.loads((tmp_path / "b.json").read_text())
    assert bench_table(stored)[:5] == head and stored[0]["gen_length"] == "12" and stored[0]["device"] == "cpu"


@pytest.mark.parametrize("kind, wrong, message", [
    (TrainBench, dict(batch_size=0), "batch_size is 0"), (TrainBench, dict(length=1), "length is 1"), (TrainBench, dict(vocab_size=10**12), "vocab_size is"),
    (TrainBench, dict(seconds=-1.0), "seconds is"), (SampleBench, dict(gen_length=0), "gen_length is 0"), (SampleBench, dict(batch_sizes=(1, 0)), "batch_sizes is 0"),
    (SampleBench, dict(seed=-1), "seed is -1"), (SampleBench, dict(seconds=float("nan")), "seconds is nan")])
def test_bad_settings(kind, wrong, message):
    with pytest.raises(UserError, match=message):
        kind(**wrong)
