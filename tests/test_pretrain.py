"Pretraining end to end on the toy language, crossing, scoring, and what goes wrong."
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanollada import toy
from nanollada.backbone import load_run
from nanollada.core import UserError, make_generator, read_json, read_jsonl
from nanollada.data import Windows, toy_tokenizer
from nanollada.elbo import exact_nelbo
from nanollada.engines import export_llada
from nanollada.pretrain import (RECIPE, Joint, PretrainConfig, cross, document_rows, make_objective, open_rows, pretrain,
                                score_documents, start_model)
from nanollada.tokenizer import save_tokenizer, train_tokenizer
from nanollada.trainer import TrainConfig, draw_update


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    save_tokenizer(toy_tokenizer(), folder / "tokenizer")
    return folder


def config(folder, name="run", steps=4, **changes) -> PretrainConfig:
    train = dict(steps=steps, batch_size=4, warmup_steps=1, eval_every=2, save_every=2, log_every=1, progress=False, precision="no", device="cpu")
    settings = dict(data="toy", out=folder / name, preset="toy", tokenizer=str(folder / "tokenizer"), length=64, limit=60,
                    valid_fraction=0.1, cache=folder / "data")
    return PretrainConfig(**settings | changes | {"train": TrainConfig(**train | changes.get("train", {}))})


@pytest.fixture(scope="module")
def ar(folder):
    pretrain(config(folder, "ar", objective="ar"))
    return folder / "ar"


def test_a_run_folder_has_all_it_should(ar):
    names = {path.name for path in ar.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "train_config.json", "metrics.jsonl", "state"} <= names
    records = read_jsonl(ar / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "valid"] == [2, 4]
    assert read_json(ar / "train_config.json")["pretrain"]["objective"] == "ar"
    model, tokenizer, info = load_run(ar, device="cpu")
    assert info["objective"] == "ar" and len(tokenizer) == model.cfg.vocab_size


def test_both_objectives_see_the_same_rows_and_score_the_same_tokens(folder):
    batches = {}
    for objective in ("ar", "diffusion"):
        cfg = config(folder, objective=objective, random_length=0.0)
        rows, _, tokenizer = open_rows(cfg)
        learn = make_objective(start_model(cfg, tokenizer).cfg)
        batches[objective] = draw_update(learn, rows, cfg.train, step=1)
    ar, diffusion = batches["ar"], batches["diffusion"]
    assert torch.equal(ar["ids"], diffusion["ids"])
    assert ar["count"].sum() == diffusion["count"].sum() == 4 * 63
    assert not diffusion["mask"][:, 0].any() and diffusion["mask"][:, 1:].any()


def test_a_joint_model_is_first_an_ar_model_then_a_diffusion_model(folder, ar):
    pretrain(config(folder, "joint", objective="joint", ar_share=1.0))
    model, _, info = load_run(folder / "joint", device="cpu")
    assert info["objective"] == "diffusion" and model.cfg.shift and info["training"]["pretrain"]["objective"] == "joint"
    last = [load_file(run / "state" / "step-00000004" / "model.safetensors") for run in (folder / "joint", ar)]
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].items())
    objective = Joint(mask_id=9, shift=True, ar_share=0.5)
    rows = {"ids": torch.arange(8).view(2, 4), "scored": torch.ones(2, 4, dtype=torch.bool)}
    kinds = [objective.at(done).noise(rows).keys() for done in (0.0, 0.49, 0.5, 1.0)]
    assert ["xt" in batch for batch in kinds] == [False, False, True, True]


def test_a_joint_model_learns_both(folder):
    result = pretrain(config(folder, "both", steps=40, objective="joint", ar_share=0.5, train={"learning_rate": 3e-3}))
    records = [record for record in result.history if record["split"] == "train"]
    first, then = ([r for r in records if (r["step"] <= 20) == early] for early in (True, False))
    assert not any(value for r in first for name, value in r.items() if name.startswith("ce_"))
    assert all(sum(value for name, value in r.items() if name.startswith("ce_")) > 5 for r in then)
    for part in (first, then):
        assert sum(r["loss"] for r in part[-3:]) < sum(r["loss"] for r in part[:3]) - 0.5


@pytest.mark.parametrize("seed", [7, 11, 35])
def test_no_update_of_the_default_pretraining_is_empty(folder, seed):
    "code.md 1, attack A: with these seeds a batch of the README's 1,180 updates was cut to one column."
    cfg = config(folder, length=128, train={"steps": 1180, "batch_size": 16, "seed": seed})
    rows, _, tokenizer = open_rows(cfg)
    learn = make_objective(start_model(cfg, tokenizer).cfg)
    columns = []
    for step in range(cfg.train.steps):
        stream = make_generator(seed, "noise", step)
        short = int(torch.randint(2, 129, (1,), generator=stream))  # what the rows are cut to, if they are
        if torch.rand(1, generator=stream).item() < cfg.random_length:
            columns.append(short)
            batch = draw_update(learn, rows, cfg.train, step)
            assert batch["ids"].shape == (16, short) and batch["count"].sum() == 16 * (short - 1) > 0
    assert len(columns) > 3


def test_the_context_is_four_lengths_and_only_grows(folder, ar):
    "What is written may be longer than a window; a run begun from another keeps the larger context."
    tokenizer = load_run(ar, device="cpu")[1]
    wide = lambda **changes: start_model(config(folder, **changes), tokenizer).cfg.max_position_embeddings
    assert wide() == 256 and wide(context=100) == 100
    assert wide(init_from=ar, context=64) == 256 and wide(init_from=ar, context=999) == 999


def test_training_learns(folder):
    result = pretrain(config(folder, "learns", steps=25, train={"batch_size": 8, "learning_rate": 3e-3, "log_every": 5, "eval_every": 25}))
    losses = [r["loss"] for r in result.history if r["split"] == "train"]
    assert losses[0] > 5 and losses[-1] < losses[0] - 1
    assert {f"ce_{n}_{n + 20}" for n in range(0, 100, 20)} <= result.history[0].keys()


def test_resume_is_exact_also_of_a_moved_folder(folder, monkeypatch):
    "attack F."
    whole = pretrain(config(folder, "whole", steps=4))

    class Stop(Exception):
        pass

    def draw_or_die(objective, rows, cfg, step, now):
        if step == 3:
            raise Stop
        return draw_update(objective, rows, cfg, step, now)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("nanollada.trainer.draw_update", draw_or_die)
        pretrain(config(folder, "half", steps=4))
    (folder / "half").rename(folder / "moved")
    resumed = pretrain(config(folder, "moved", steps=4, train={"resume": True}))
    assert (resumed.steps, resumed.best, resumed.saved) == (whole.steps, whole.best, whole.saved)
    record = read_json(folder / "moved" / "train_config.json")
    with pytest.raises(UserError, match="cannot be resumed with other settings: document_mask was False and is True"):
        pretrain(config(folder, "moved", steps=4, document_mask=True, train={"resume": True}))
    with pytest.raises(UserError, match="text was"):
        pretrain(config(folder, "moved", steps=4, limit=90, train={"resume": True}))
    assert read_json(folder / "moved" / "train_config.json") == record
    weights = [load_run(folder / name, device="cpu")[0].state_dict() for name in ("whole", "moved")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def command(*arguments, launcher=(), **environment):
    "`nanollada` with these arguments, perhaps launched several times."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    return subprocess.run([sys.executable, *launcher, "-m", "nanollada", *map(str, arguments)], env=env,
                          capture_output=True, text=True, timeout=200)


def flags(folder, out, **changes):
    settings = {"data": "toy", "preset": "toy", "tokenizer": folder / "tokenizer", "limit": 60, "length": 32,
                "cache": folder / "data", "steps": 6, "batch-size": 4, "save-every": 3, "eval-every": 3, "log-every": 1,
                "precision": "no", "device": "cpu", "objective": "ar", "out": out} | changes
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize("shards", ["false", "true"])
def test_launched_twice_by_the_command_line_it_trains_one_model(folder, tmp_path, shards):
    "attack B, user.md A: README's torchrun line on a CPU; sharded, as accelerate's configuration asks for it."
    alone = pretrain(config(folder, "alone", steps=6, objective="ar", length=32, train={
        **asdict(RECIPE), "steps": 6, "batch_size": 4, "save_every": 3, "eval_every": 3, "log_every": 1, "precision": "no",
        "progress": False, "device": "cpu", "overwrite": True}))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = ("pretrain", *flags(folder, tmp_path / "two"), "--no-progress")
    done = command(*arguments, launcher=launcher, ACCELERATE_USE_FSDP=shards)
    assert done.returncode == 0, done.stderr
    record, history = read_json(tmp_path / "two/train_config.json"), read_jsonl(tmp_path / "two/metrics.jsonl")
    assert record["processes"] == 2 and record["sharded"] == (shards == "true")
    assert [r["step"] for r in history] == [r["step"] for r in alone.history]
    for ours, theirs in zip(history, alone.history):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)  # float32, another order of additions
    model, tokenizer, _ = load_run(tmp_path / "two", device="cpu")
    assert score_documents(model, tokenizer, ["Lucy the bee met"])[0].isfinite().all()


def test_what_would_fill_the_memory_or_is_no_unicode_gets_a_line(folder, tmp_path):
    "attack, bad input: --batch-size and --length of 10^9, an --out that is not UTF-8."
    for changes in ({"batch-size": 10**9}, {"length": 10**9}, {"batch-size": 65536, "length": 4096}):
        done = command("pretrain", *flags(folder, tmp_path / "big", **changes))
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr and not (tmp_path / "big").exists()
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    done = command("pretrain", "--data", "toy", "--out", os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    assert done.returncode == 2 and "is not UTF-8" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("mask_row", ["random", "mean", "keep"])
def test_crossing_changes_only_what_it_says(ar, shift, mask_row):
    model = load_run(ar, device="cpu")[0]
    crossed = cross(model, shift, mask_row)
    assert crossed.cfg.objective == "diffusion" and crossed.cfg.shift == shift
    for (name, before), after in zip(model.state_dict().items(), crossed.state_dict().values(), strict=True):
        if name == "model.embed_tokens.weight":
            same = (before == after).all(1)
            assert same[torch.arange(len(same)) != model.cfg.mask_token_id].all()
            assert same[model.cfg.mask_token_id] == (mask_row == "keep")
            norms = before.norm(dim=1)
            if mask_row == "random":
                assert after[model.cfg.mask_token_id].norm().item() == pytest.approx(norms.median().item(), rel=0.05)
        else:
            assert torch.equal(before, after), name


def test_a_crossed_model_remembers_its_shift(folder, ar):
    pretrain(config(folder, "crossed", objective="diffusion", init_from=ar, tokenizer=None))
    model, tokenizer, _ = load_run(folder / "crossed", device="cpu")
    assert model.cfg.shift
    ids = torch.randint(4, 100, (2, 10))
    plain = model(ids, causal=False)
    torch.testing.assert_close(model.denoise(ids)[:, 1:], plain[:, :-1])


def test_scores_of_an_ar_model_are_sums_of_log_probabilities(ar, monkeypatch):
    monkeypatch.setattr("nanollada.pretrain.ROWS", 2)
    model, tokenizer, _ = load_run(ar, device="cpu")
    texts = toy.sample(3, seed=5)
    nats, counts = score_documents(model, tokenizer, texts)
    for text, total, count in zip(texts, nats, counts, strict=True):
        ids, real = document_rows(tokenizer, [text])
        with torch.no_grad():
            log_probs = model(ids, causal=True).log_softmax(-1)
        expected = -log_probs[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
        assert total.item() == pytest.approx(expected, rel=1e-4) and count == real.sum() - 1
    content, fewer = score_documents(model, tokenizer, texts, score_end=False)
    assert (content < nats).all() and torch.equal(fewer, counts - 1)


def test_scores_of_a_diffusion_model_agree_with_enumeration(folder):
    cfg = config(folder, "score")
    _, _, tokenizer = open_rows(cfg)
    model = start_model(cfg, tokenizer).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    texts = ["Lucy the bee met", "Lucy", "the fox met"]
    estimates = torch.stack([score_documents(model, tokenizer, texts, n_samples=64, seed=seed)[0] for seed in range(12)])
    for n, text in enumerate(texts):
        ids, real = document_rows(tokenizer, [text])
        where = real & (torch.arange(ids.shape[1]) > 0)
        exact = exact_nelbo(model.denoise, ids, maskable=where).item()
        error = estimates[:, n].std().item() / 12**0.5
        assert abs(estimates[:, n].mean().item() - exact) < 5 * error + 1e-3


def test_a_canvas_makes_diffusion_pay_for_the_length(folder):
    cfg = config(folder, "canvas")
    _, _, tokenizer = open_rows(cfg)
    model = start_model(cfg, tokenizer).eval()
    short, own = score_documents(model, tokenizer, ["Lucy"], n_samples=8)
    long, counts = score_documents(model, tokenizer, ["Lucy"], n_samples=8, canvas=64)
    assert long.item() > 10 * short.item() and torch.equal(counts, own)
    with pytest.raises(UserError, match="make rows longer"):
        score_documents(model, tokenizer, toy.sample(1, 0), canvas=10)
    with pytest.raises(UserError, match="0 masks and 1 documents; expected at least 1"):
        score_documents(model, tokenizer, ["Lucy"], n_samples=0)


def test_a_small_model_may_be_without_qk_norm_and_leaves_as_a_llada(folder, tmp_path):
    assert [start_model(config(folder, qk_norm=asked), toy_tokenizer()).cfg.qk_norm for asked in (None, True, False)] == [True, True, False]
    pretrain(config(folder, "plain", objective="diffusion", qk_norm=False))
    assert not any("q_norm" in name for name in load_file(folder / "plain" / "model.safetensors"))
    export_llada(folder / "plain", tmp_path / "llada")
    assert read_json(tmp_path / "llada" / "config.json", dict)["model_type"] == "llada"


def test_a_wrong_preset_is_refused_before_data_are_prepared(tmp_path):
    with pytest.raises(UserError, match="preset is 'huge'; expected toy or mini"):
        PretrainConfig(data="toy", out=tmp_path / "run", preset="huge", cache=str(tmp_path / "data"))


@pytest.mark.parametrize("changes, message", [
    ({"objective": "gan"}, "objective is 'gan'"), ({"length": 1}, "length is 1"), ({"random_length": float("nan")}, "random_length is nan"),
    ({"random_length": -1}, "0 to 1"), ({"train": {"valid_rows": -1}}, "expected 1 to"), ({"context": 8}, "expected 64 to"),
    ({"train": {"resume": True, "overwrite": True}}, "exclude"),
    ({"data": "nowhere.jsonl"}, "nowhere.jsonl"), ({"preset": "huge"}, "preset is 'huge'"), ({"init_from": "nowhere"}, "nowhere"),
])
def test_bad_settings(folder, changes, message):
    with pytest.raises(UserError, match=message):
        pretrain(config(folder, "bad", **changes))


def test_a_run_in_the_way_is_not_overwritten(folder, ar):
    before = (ar / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(config(folder, "ar", objective="ar"))
    assert (ar / "model.safetensors").read_bytes() == before


def test_runs_that_do_not_fit_the_data_or_objective(folder, ar, tmp_path):
    save_tokenizer(train_tokenizer(toy.sample(50, 0), 400), tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer"):
        pretrain(config(folder, "x", init_from=ar, tokenizer=str(tmp_path / "other"), cache=tmp_path / "data"))
    diffusion = start_model(config(folder), open_rows(config(folder))[2])
    with pytest.raises(UserError, match="expected an ar one"):
        cross(diffusion)
    with pytest.raises(UserError, match="mask_row 'zero'"):
        cross(load_run(ar, device="cpu")[0], mask_row="zero")


def test_train_config_is_json(ar):
    json.dumps(read_json(ar / "train_config.json"))
