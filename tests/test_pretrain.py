"Pretraining end to end on the toy language, crossing, scoring, and what goes wrong."
import json
import math

import pytest
import torch

from nanollada import toy
from nanollada.backbone import load_run
from nanollada.core import UserError, make_generator, read_json, read_jsonl
from nanollada.corpus import toy_tokenizer
from nanollada.elbo import exact_nelbo
from nanollada.pretrain import PretrainConfig, TextTask, cross, document_rows, open_data, pretrain, score_documents, start_model
from nanollada.trainer import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    toy_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def config(folder, name="run", steps=4, **changes) -> PretrainConfig:
    train = dict(steps=steps, batch_size=4, warmup_steps=1, eval_every=2, save_every=2, log_every=1, progress=False, precision="no")
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
    tasks = {}
    for objective in ("ar", "diffusion"):
        cfg = config(folder, objective=objective)
        train, valid, tokenizer = open_data(cfg)
        tasks[objective] = TextTask(train, valid, start_model(cfg, tokenizer).cfg, random_length=0.0)
    rows = {name: task.train_batch(torch.arange(4), make_generator(0, "noise", 1)) for name, task in tasks.items()}
    assert torch.equal(rows["ar"]["ids"], rows["diffusion"]["ids"])
    assert tasks["ar"].count(rows["ar"]) == tasks["diffusion"].count(rows["diffusion"]) == 4 * 63
    assert not rows["diffusion"]["mask"][:, 0].any() and rows["diffusion"]["mask"][:, 1:].any()


def test_validation_noise_is_fixed(folder):
    cfg = config(folder)
    train, valid, tokenizer = open_data(cfg)
    task = TextTask(train, valid, start_model(cfg, tokenizer).cfg)
    first, second = ([batch["xt"] for batch in task.valid_batches(2)] for _ in range(2))
    assert len(first) == math.ceil(task.n_valid / 2) and all(map(torch.equal, first, second))


def test_training_learns(folder):
    result = pretrain(config(folder, "learns", steps=25, train={"batch_size": 8, "learning_rate": 3e-3, "log_every": 5, "eval_every": 25}))
    losses = [r["loss"] for r in result.history if r["split"] == "train"]
    assert losses[0] > 5 and losses[-1] < losses[0] - 1
    assert {f"ce_{n}_{n + 20}" for n in range(0, 100, 20)} <= result.history[0].keys()


def test_resume_is_exact(folder):
    whole = pretrain(config(folder, "whole", steps=4))
    half = config(folder, "half", steps=4, train={"save_every": 2})
    from nanollada import trainer

    class Stop(Exception):
        pass

    saved, original = [], trainer.save_checkpoint

    def save_then_die(*args, **kwargs):
        saved.append(original(*args, **kwargs))
        raise Stop

    trainer.save_checkpoint = save_then_die
    try:
        with pytest.raises(Stop):
            pretrain(half)
    finally:
        trainer.save_checkpoint = original
    resumed = pretrain(config(folder, "half", steps=4, resume=True))
    assert resumed.steps == whole.steps
    record = read_json(folder / "half" / "train_config.json")
    with pytest.raises(UserError, match="cannot be resumed with other settings: document_mask was False and is True"):
        pretrain(config(folder, "half", steps=4, resume=True, document_mask=True))
    assert read_json(folder / "half" / "train_config.json") == record
    weights = [load_run(folder / name, device="cpu")[0].state_dict() for name in ("whole", "half")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


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


def test_scores_of_an_ar_model_are_sums_of_log_probabilities(ar):
    model, tokenizer, _ = load_run(ar, device="cpu")
    texts = toy.sample(3, seed=5)
    nats, counts = score_documents(model, tokenizer, texts, batch_size=2)
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
    _, _, tokenizer = open_data(cfg)
    model = start_model(cfg, tokenizer).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    texts = ["Lucy the bee met", "Lucy", "the fox met"]
    estimates = torch.stack([score_documents(model, tokenizer, texts, n_samples=64, seed=seed)[0] for seed in range(12)])
    for n, text in enumerate(texts):
        ids, real = document_rows(tokenizer, [text])
        where = real & (torch.arange(ids.shape[1]) > 0)
        exact = exact_nelbo(model.denoise, ids, model.cfg.mask_token_id, where).item()
        error = estimates[:, n].std().item() / 12**0.5
        assert abs(estimates[:, n].mean().item() - exact) < 5 * error + 1e-3


def test_a_canvas_makes_diffusion_pay_for_the_length(folder):
    cfg = config(folder, "canvas")
    _, _, tokenizer = open_data(cfg)
    model = start_model(cfg, tokenizer).eval()
    short, own = score_documents(model, tokenizer, ["Lucy"], n_samples=8)
    long, counts = score_documents(model, tokenizer, ["Lucy"], n_samples=8, canvas=64)
    assert long.item() > 10 * short.item() and torch.equal(counts, own)
    with pytest.raises(UserError, match="make rows longer"):
        score_documents(model, tokenizer, toy.sample(1, 0), canvas=10)
    with pytest.raises(UserError, match="masks is 0; expected at least 1"):
        score_documents(model, tokenizer, ["Lucy"], n_samples=0)


@pytest.mark.parametrize("changes, message", [
    ({"objective": "gan"}, "objective is 'gan'"), ({"length": 1}, "length is 1"), ({"resume": True, "overwrite": True}, "exclude"),
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
    from nanollada.tokenizer import train_tokenizer
    train_tokenizer(toy.sample(50, 0), 400).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer"):
        pretrain(config(folder, "x", init_from=ar, tokenizer=str(tmp_path / "other"), cache=tmp_path / "data"))
    diffusion = start_model(config(folder), open_data(config(folder))[2])
    with pytest.raises(UserError, match="expected an ar one"):
        cross(diffusion)
    with pytest.raises(UserError, match="mask_row is 'zero'"):
        cross(load_run(ar, device="cpu")[0], mask_row="zero")


def test_train_config_is_json(ar):
    json.dumps(read_json(ar / "train_config.json"))
