"Blocks: the pass over [noisy | clean], the bounds, the exact cache, drafts that change nothing, runs of this kind."
import io
import itertools
import json

import pytest
import torch

from nanollada.ar import Autoregressive, with_places
from nanollada.backbone import Backbone, load_run, preset
from nanollada.blocks import (BlockDiffusion, BlockNoise, BlockPretrainConfig, BlockWriteConfig, Doubled, Drafted, average_runs, block_log_likelihood,
                              block_nats, branches, confident_entropy, make_blocks, pretrain_any, speculate)
from nanollada.cli import main
from nanollada.core import UserError, make_generator
from nanollada.elbo import exact_nelbo
from nanollada.fast import BlockDenoiser, CachedDenoiser, CausalDenoiser, WriteConfig, block_limits, generate_text
from nanollada.sampler import generate
from nanollada.trainer import TrainConfig

MASK = 10


def make_model(size: int = 4, causal: bool = True, vocab: int = 11, **shape) -> Backbone:
    torch.manual_seed(0)
    shape = dict(max_position_embeddings=96, initializer_range=0.2) | shape
    return Backbone(preset("toy", vocab, mask_token_id=vocab - 1, objective="block", block_length=size, causal_clean=causal, **shape)).eval()


def make_rows(rows: int = 3, length: int = 9, seed: int = 0) -> dict:
    ids = torch.randint(0, 10, (rows, length), generator=make_generator(seed, "rows"))
    return {"ids": ids, "scored": (torch.arange(length) > 0).expand(rows, length)}


def sees(table: torch.Tensor, asks: int, answers: int) -> bool:
    return bool(table[0, 0, asks, answers])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("borders", [[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2], [0] * 7])
def test_the_table_is_the_rule_entry_by_entry(causal, borders):
    "LLaDA 2.0: noisy sees its own noisy block and clean blocks before; clean sees clean, never noisy."
    blocks, n = torch.tensor([borders]), len(borders)
    real, documents = torch.tensor([[1, 1, 1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    who = Doubled(causal, real, documents, blocks=blocks)
    table = who.table(torch.zeros(1, 2 * n, dtype=torch.long))
    for i, j in itertools.product(range(2 * n), repeat=2):
        a, b, noisy, of_noisy = borders[i % n], borders[j % n], i < n, j < n
        rule = ((a == b) if of_noisy else (a > b)) if noisy else not of_noisy and (i >= j if causal else a >= b)
        rule = rule and bool(real[0, j % n]) and documents[0, i % n] == documents[0, j % n]
        nobody = not table[0, 0, i].logical_and(torch.ones(2 * n, dtype=torch.bool)).any()
        assert sees(table, i, j) == bool(rule) or table[0, 0, i].all() or nobody, (i, j)
    assert who.positions(torch.zeros(1, 2 * n, dtype=torch.long)).tolist() == [[*range(n), *range(n)]]


def naive(model: Backbone, batch: dict) -> torch.Tensor:
    "The diffusion part of the loss, each block on a canvas that ends with it."
    nats = torch.zeros(len(batch["ids"]))
    for row, blocks in enumerate(batch["blocks"]):
        for number in blocks.unique():
            columns = (blocks == number).nonzero()[:, 0]
            start, end = int(columns[0]), int(columns[-1]) + 1
            canvas = torch.cat([batch["ids"][row, :start], batch["xt"][row, start:end]])[None]
            logp = model(canvas, BlockDenoiser(model, start or end).who(canvas, None))[0, start:end].log_softmax(-1)
            right = -logp.gather(1, batch["ids"][row, start:end, None])[:, 0]
            nats[row] += (right * batch["weight"][row, start:end] * batch["mask"][row, start:end]).sum()
    return nats


HOW = [{}, {"anywhere": False}, {"shares": (0.3, 0.8), "rest": 0.2}, {"full": 0.5}, {"complementary": True},
       {"complementary": True, "full": 0.3, "weighted": False}]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("size, causal", [*itertools.product((1, 3, 4, 9), (False, True))])
def test_one_pass_is_one_block_at_a_time(size, causal, how):
    model = make_model(size, causal)
    objective = BlockDiffusion(MASK, BlockNoise(size, **how), causal)
    batch = with_places(objective.noise(make_rows(), make_generator(size, "n")))
    found = naive(model, batch)
    if causal:
        ar = Autoregressive()
        found = found + ar.terms(model, with_places(ar.noise({k: batch[k] for k in ("ids", "scored")})))[0]
    nats, count = objective.terms(model, batch)
    torch.testing.assert_close(nats, found, rtol=1e-4, atol=1e-4)
    assert count.tolist() == [8.0] * len(nats)
    got = torch.autograd.grad(nats.sum(), model.model.embed_tokens.weight)[0]
    want = torch.autograd.grad(found.sum(), model.model.embed_tokens.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_padding_and_documents_are_as_if_they_were_not_there():
    "A row padded on the right, and two documents in a row, cost what they cost alone."
    model, rows = make_model(3), make_rows(1, 9)
    objective = BlockDiffusion(MASK, BlockNoise(3, anywhere=False), True)
    batch = objective.noise(rows, make_generator(1, "n"))
    alone = objective.terms(model, with_places(batch))[0]
    wide = {k: torch.nn.functional.pad(v, (0, 4)) if v.dim() == 2 and v.shape[1] == 9 else v for k, v in batch.items()}
    wide["blocks"] = torch.cat([batch["blocks"], torch.full((1, 4), 9)], 1)
    wide["real"] = torch.arange(13)[None] < 9
    wide["ids"] = torch.cat([wide["ids"][:, :9], torch.full((1, 4), 5)], 1)
    both = {k: torch.cat([v, v]) for k, v in wide.items()}  # a second row keeps the columns
    both["real"] = torch.stack([wide["real"][0], torch.ones(13, dtype=torch.bool)])
    nats = objective.terms(model, with_places(both))[0]
    torch.testing.assert_close(nats[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", HOW[:-1], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_every_way_of_drawing_estimates_the_same_bound(how, causal):
    model, rows, n = make_model(4, causal), make_rows(2), 1500
    exact = torch.tensor([-block_log_likelihood(model, row[:1], row[1:]).mean for row in rows["ids"].tolist()])
    objective = make_blocks(model.cfg, BlockNoise(4, **(how | {"anywhere": False})), ar_weight=0.0)
    if how.get("shares"):  # unbiased where every count can be drawn
        objective = make_blocks(model.cfg, BlockNoise(4, **(how | {"anywhere": False, "rest": 0.3})), ar_weight=0.0)
    many = {k: v.repeat(n, 1) for k, v in rows.items()}
    with torch.no_grad():
        nats = objective.terms(model, with_places(objective.noise(many, make_generator(3, "n"))))[0]
    nats = nats.view(-1, n, 2).mean(0)
    off = (nats.mean(0) - exact) / (nats.std(0) / n**0.5 + 1e-4)
    assert off.abs().max() < 4.5, (off, exact)


def test_blocks_of_one_are_the_chain_rule_and_one_block_is_the_nelbo():
    model, rows = make_model(1), make_rows(2)
    for row in rows["ids"].tolist():
        chain = sum(float(BlockDenoiser(model, 1)(torch.tensor([row[:cut] + [MASK]]))[0, -1].log_softmax(-1)[row[cut]])
                    for cut in range(1, 9))
        found = block_log_likelihood(model, row[:1], row[1:])
        assert abs(found.mean - chain) < 1e-4 and found.standard_error == 0
    whole = make_model(9, causal=False)
    exact = exact_nelbo(BlockDenoiser(whole, 1), rows["ids"], maskable=rows["scored"])
    drawn = block_nats(whole, rows, 3000, 500, make_generator(0, "n"))
    assert ((drawn - exact).abs() < 0.05 * exact).all()


def test_block_sizes_change_in_the_course_of_a_run():
    objective = BlockDiffusion(MASK, BlockNoise(32, sizes=(1, 4, 32, 128)))
    sizes = [objective.at(step / 100).how.size for step in range(100)]
    assert sizes == sorted(sizes[:-15]) + sizes[-15:] and sizes[0] == 1 and sizes[-1] == 32 and set(sizes) == {1, 4, 32, 128}
    assert sizes.count(128) == max(map(sizes.count, {1, 4, 128}))
    assert objective.at(1.0).how.size == 32 and BlockDiffusion(MASK, BlockNoise(8)).at(0.0).how.size == 8


def test_confident_entropy_counts_right_answers_only():
    logits = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 9.0]], requires_grad=True)
    sure = confident_entropy(logits, torch.tensor([0, 1, 2]))
    p = torch.tensor([3.0, 0.0, 0.0]).softmax(0)
    assert sure[1] == 0 and torch.allclose(sure[0], -(p * p.log()).sum()) and 0 < sure[2] < sure[0]
    model, rows = make_model(4), make_rows()
    batch = with_places(BlockDiffusion(MASK, BlockNoise(4), True).noise(rows, make_generator(0, "n")))
    plain, more = (BlockDiffusion(MASK, BlockNoise(4), True, confidence=c).terms(model, batch)[0] for c in (0.0, 1.0))
    assert (more >= plain - 1e-5).all()


def test_limits_by_hand():
    ids = torch.tensor([[5, 6, 7, MASK, 8, 9, 1, MASK]])
    assert block_limits(ids, MASK, 3, 2, False).tolist() == [[2, 2, 5, 5, 5, 8, 8, 8]]
    assert block_limits(ids, MASK, 3, 2, True).tolist() == [[1, 2, 5, 5, 5, 8, 8, 8]]
    ids[0, 3] = 4
    assert block_limits(ids, MASK, 3, 2, True).tolist() == [[1, 2, 3, 4, 5, 8, 8, 8]]


@pytest.mark.parametrize("causal, size, prompt", [*itertools.product((False, True), (1, 3, 4), (1, 4, 6))])
def test_the_cache_is_exact(causal, size, prompt):
    model, canvas = make_model(size, causal), make_rows(2, prompt)["ids"]
    whole = generate(lambda ids: BlockDenoiser(model, prompt)(ids), canvas, MASK, gen_length=10, block_length=size)
    assert torch.equal(whole, generate(BlockDenoiser(model), canvas, gen_length=10, block_length=size))


def test_texts_of_different_lengths_are_written_together_as_alone():
    model, prompts = make_model(4), [[3], [4, 5, 6], [7, 8, 9, 1, 2]]
    from nanollada.sampler import left_pad
    ids, real = left_pad(prompts, 0)
    together = generate(BlockDenoiser(model), ids, gen_length=8, block_length=4, attention_mask=real)
    for row, prompt in zip(together, prompts):
        alone = generate(BlockDenoiser(model), torch.tensor([prompt]), gen_length=8, block_length=4)
        assert row[5:].tolist() == alone[0, len(prompt):].tolist()


@pytest.mark.parametrize("draft, tree, prompt", [*itertools.product((0, 1, 2, 8), (1, 2, 9), (1, 5))])
def test_drafts_do_not_change_a_letter(draft, tree, prompt):
    model, canvas = make_model(), make_rows(1, prompt)["ids"]
    steps = list(speculate(model, canvas, BlockWriteConfig(gen_length=24, draft=draft, tree=tree)))
    assert torch.equal(steps[-1].ids, generate(CausalDenoiser(model), canvas, gen_length=24, block_length=1))
    assert sum(int(step.committed.sum()) for step in steps) == 24 and [step.nfe for step in steps] == [*range(1, len(steps) + 1)]
    assert draft or len(steps) == 24


def test_drafts_end_where_the_text_ends():
    model, canvas = make_model(), make_rows(1, 5)["ids"]
    plain = generate(CausalDenoiser(model), canvas, gen_length=24, block_length=1)[0, 5:].tolist()
    eos = plain[7]
    *_, last = speculate(model, canvas, BlockWriteConfig(gen_length=24), eos)
    cut = plain.index(eos)
    assert last.ids[0, 5:].tolist() == plain[:cut] + [eos] * (24 - cut) and not last.after.any()


@pytest.mark.parametrize("settings", [{}, {"tree": 1}, {"top_k": 2}, {"sure": 0.4}], ids=str)
def test_drawn_drafts_have_the_distribution_of_the_causal_half(settings):
    model, n, temperature = make_model(vocab=4, hidden_size=32, intermediate_size=48, initializer_range=0.1), 1500, 0.8
    from nanollada.ar import filter_logits
    expected = {}
    for word in itertools.product(range(3), repeat=4):
        with torch.no_grad():
            logits = model(torch.tensor([[0, *word]]), True)[0].double()
        logits[:, 3] = -torch.inf
        logp = filter_logits(logits, temperature, settings.get("top_k")).log_softmax(-1)
        expected[word] = n * sum(logp[place, token] for place, token in enumerate(word)).exp().item()
    cfg, draws = BlockWriteConfig(gen_length=4, draft=4, temperature=temperature, **settings), make_generator(1, "d")
    told = [tuple(list(speculate(model, torch.zeros(1, 1, dtype=torch.long), cfg, generator=draws))[-1].ids[0, 1:].tolist())
            for _ in range(n)]
    assert all(told.count(word) == 0 for word in expected if expected[word] == 0)
    likely = [word for word in expected if expected[word] >= 5]
    chi = sum((told.count(word) - expected[word]) ** 2 / expected[word] for word in likely)
    assert chi < len(likely) + 4.5 * (2 * len(likely)) ** 0.5, (chi, len(likely))


def test_the_drafted_table_by_hand():
    "One token in the cache, a last token and a draft of one, two masks behind each of 2 and 3 columns."
    who = Drafted(behind=torch.tensor([2, 3]), size=2)
    row = torch.zeros(1, 6, dtype=torch.long)
    assert who.positions(row, past=1).tolist() == [[1, 2, 2, 3, 3, 4]]
    assert who.table(row, past=1)[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 1, 1]]


def test_masks_stand_where_the_draft_may_end():
    "Ends behind 0, 1, 2, 3 guesses: 0.1, 0.9 * 0.4 = 0.36, 0.54 * 0.01, and 0.5346 that all hold."
    q = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.99, 0.01]])
    assert branches(torch.tensor([0, 1, 0]), q, 1).tolist() == [3]
    assert branches(torch.tensor([0, 1, 0]), q, 3).tolist() == [3, 1, 0]
    assert branches(torch.zeros(0, dtype=torch.long), q[:0], 2).tolist() == [0]


@pytest.mark.parametrize("wrong, message", [
    (lambda: BlockNoise(0), "size is 0"), (lambda: BlockNoise(4, shares=(0.8, 0.3)), "shares is"), (lambda: BlockNoise(4, full=2.0), "full is 2.0"),
    (lambda: CachedDenoiser(make_model()), "takes diffusion"), (lambda: make_model(size=None), "block_length is None"),
    (lambda: BlockWriteConfig(draft=-1), "draft is -1"), (lambda: BlockWriteConfig(tree=0), "tree is 0"), (lambda: average_runs([], "x"), "0 runs"),
    (lambda: list(speculate(make_model(), torch.zeros(2, 3, dtype=torch.long), BlockWriteConfig())), "one text, of at least"),
    (lambda: BlockPretrainConfig(data="toy", out="x", length=32, objective="block", block_length=64), "blocks have 64"),
    (lambda: BlockPretrainConfig(data="toy", out="x", length=32, objective="block", sizes=(1, 64)), "blocks have 64"),
])
def test_bad_input_has_a_clear_error(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A block run of a few updates, with its two best models kept."
    folder = tmp_path_factory.mktemp("runs")
    train = TrainConfig(steps=4, batch_size=8, eval_every=1, keep=2, progress=False)
    cfg = BlockPretrainConfig(data="toy", limit=200, out=folder / "blocks", cache=folder / "cache", objective="block", preset="toy",
                              length=64, sizes=(1, 4), train=train)
    pretrain_any(cfg)
    return folder / "blocks"


def test_the_best_are_kept_and_averaged(run):
    losses = {r["step"]: r["loss"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["split"] == "valid"}
    best = sorted(losses, key=losses.get)[:2]
    assert sorted(int(folder.name) for folder in (run / "kept").iterdir()) == sorted(best)
    models = [load_run(run / "kept" / str(step), "cpu")[0].state_dict() for step in best]
    averaged = load_run(run / "averaged", "cpu")[0].state_dict()
    for name, weight in averaged.items():
        torch.testing.assert_close(weight, (models[0][name] + models[1][name]) / 2)


def test_a_run_writes_in_three_ways(run, capsys):
    model, tokenizer, info = load_run(run, "cpu")
    assert info["objective"] == "block" and model.cfg.block_length == 8 and model.cfg.causal_clean
    left, drafts, blocks = (generate_text((model, tokenizer), "Sam", cfg=BlockWriteConfig(way=way, gen_length=12)) for way in ("left", "drafts", "blocks"))
    assert left == drafts and generate_text(run, "Sam", gen_length=12) == blocks
    for words, message in ((["--way", "left", "--steps", "3"], "steps is 3"), (["--block-length", "3"], "trained on blocks of 8")):
        assert main(["generate", str(run), *words]) == 1 and message in capsys.readouterr().err
    assert main(["infill", str(run), "--prompt", "Sam <|mask|>"]) == 1 and "cannot fill gaps" in capsys.readouterr().err
    assert main(["eval", str(run), "--data", "toy", "--limit", "3", "--masks", "2", "--samples", "2", "--temperature", "0.5", "--gen-length", "8"]) == 0
    assert '"metric": "NELBO"' in capsys.readouterr().out


def test_drafts_need_a_block_model(run, tmp_path, capsys):
    model = Backbone(preset("toy", 11, mask_token_id=MASK, max_position_embeddings=64))
    tokenizer = load_run(run, "cpu")[1]
    with pytest.raises(UserError, match="way is drafts"):
        BlockWriteConfig(way="drafts", gen_length=4).begin(model, torch.zeros(1, 1, dtype=torch.long), None, 2, None)
    ar = Backbone(preset("toy", 11, objective="ar", mask_token_id=MASK, max_position_embeddings=64))
    with pytest.raises(UserError, match="means nothing to an ar model"):
        BlockWriteConfig(way="drafts", gen_length=4).begin(ar, torch.zeros(1, 1, dtype=torch.long), None, 2, None)
    assert WriteConfig().rows == BlockWriteConfig().rows == 64 and BlockWriteConfig(way="drafts").rows == 1


def test_block_runs_begin_with_others_and_others_with_them(run, tmp_path):
    small = dict(data="toy", limit=200, cache=run.parent / "cache", preset="toy", length=64)
    train = TrainConfig(steps=2, batch_size=8, progress=False)
    for number, (before, kind) in enumerate(((run, "diffusion"), (None, "ar"), (1, "block"), (2, "block"))):
        before = tmp_path / str(before) if isinstance(before, int) else before
        pretrain_any(BlockPretrainConfig(**small, out=tmp_path / str(number), objective=kind, init_from=before, train=train))
        cfg = load_run(tmp_path / str(number), "cpu")[0].cfg
        assert cfg.objective == kind and (cfg.block_length is not None) == (kind == "block") and not (kind == "block" and cfg.shift)


def test_a_text_may_fill_the_context_to_its_end():
    "The masks of a draft, and the second half of a training row, take no room of the context."
    model = make_model(max_position_embeddings=24)
    prompt = make_rows(1, 4)["ids"]
    *_, last = speculate(model, prompt, BlockWriteConfig(gen_length=20, draft=8, tree=2))
    assert torch.equal(last.ids, generate(CausalDenoiser(model), prompt, gen_length=20, block_length=1))
    objective = make_blocks(model.cfg)
    objective.terms(model, with_places(objective.noise(make_rows(2, 24), make_generator(0, "n"))))
    with pytest.raises(UserError, match="25 tokens"):
        objective.terms(model, with_places(objective.noise(make_rows(2, 25), make_generator(0, "n"))))


def test_pairs_train_and_validate(tmp_path, run):
    train = TrainConfig(steps=2, batch_size=8, eval_every=1, progress=False)
    cfg = BlockPretrainConfig(data="toy", limit=200, out=tmp_path / "pairs", cache=run.parent / "cache", objective="block", preset="toy",
                              length=64, complementary=True, causal_clean=False, full=0.0, weighted=True, confidence=0.5, train=train)
    result = pretrain_any(cfg)
    assert result.steps == 2 and result.best["loss"] > 0
    model, tokenizer, _ = load_run(tmp_path / "pairs", "cpu")
    with pytest.raises(UserError, match="which reads its text causally"):
        generate_text((model, tokenizer), "Sam", cfg=BlockWriteConfig(way="left", gen_length=4))


def test_a_block_run_is_fine_tuned_and_chats(run, tmp_path, capsys, monkeypatch):
    flags = ["--data", "toy", "--limit", "60", "--length", "96", "--steps", "2", "--batch-size", "4", "--no-progress"]
    assert main(["sft", "--init-from", str(run), "--out", str(tmp_path / "chat"), *flags]) == 0
    model, tokenizer, info = load_run(tmp_path / "chat", "cpu")
    assert model.cfg.objective == "block" and "sft" in info["training"]
    for way in ("blocks", "left", "drafts"):
        monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n"))
        assert main(["chat", str(tmp_path / "chat"), "--way", way, "--gen-length", "8"]) == 0
    assert main(["eval", str(tmp_path / "chat"), "--questions", "toy", "--limit", "2", "--way", "drafts"]) == 0
    assert '"exact_match"' in capsys.readouterr().out


def test_a_block_run_is_compared_with_an_ar_twin(run, tmp_path, capsys):
    train = TrainConfig(steps=2, batch_size=8, progress=False)
    pretrain_any(BlockPretrainConfig(data="toy", limit=200, cache=run.parent / "cache", out=tmp_path / "ar", objective="ar", preset="toy", length=64, train=train))
    for way in ("blocks", "drafts"):
        assert main(["compare", str(tmp_path / "ar"), str(run), "--prompt", "Sam", "--gen-length", "8", "--repeats", "1", "--way", way]) == 0
    assert "tokens" in capsys.readouterr().out


def test_a_block_run_is_resumed(run, tmp_path):
    small = dict(data="toy", limit=200, cache=run.parent / "cache", preset="toy", length=64, objective="block", sizes=(1, 4), out=tmp_path / "r")
    for steps, resume in ((2, False), (4, True)):
        train = TrainConfig(steps=steps, batch_size=8, save_every=1, progress=False, resume=resume)
        assert pretrain_any(BlockPretrainConfig(**small, train=train)).steps == steps
    with pytest.raises(UserError, match="sizes was"):
        pretrain_any(BlockPretrainConfig(**(small | {"sizes": (1, 8)}), train=TrainConfig(steps=5, batch_size=8, progress=False, resume=True)))
