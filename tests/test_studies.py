"The studies: their protocol (resuming, seeds, provenance), what they count, and each at the smallest size."
import itertools
import math
import re
import time
from pathlib import Path

import pytest
import torch

from nanollada import toy
from nanollada.backbone import as_denoiser
from nanollada.cli import main
from nanollada.core import UserError, read_json
from nanollada.data import toy_tokenizer
from nanollada.elbo import exact_nelbo
from nanollada.likelihood import chain_rule_log_likelihood
from nanollada.sft import encode_pairs, toy_conversations
from nanollada.studies import (DEV, ROW, TEST, Rows, Study, StudyConfig, chain_nats, conduct, friendships, guess_name, judge_stories,
                               new_model, score_stories, shape_of, story_rows, study_table, summarize, with_dropout)
from nanollada.beyond import STUDIES
from nanollada.writing import CutRows, Flat, PaddedRows, answer_nats, endings, namesakes, short_and_long, sudoku_grids, sudoku_puzzles, tempted


def plan_two(budget: str) -> list[dict]:
    return [{"way": way, "seed": 1} for way in "ab"]


def note(way: str, seed: int) -> list[dict]:
    "A job that counts how often it was done, and fails where a file says so."
    folder = Path(torch.os.environ["STUDY_TEST"])
    if (folder / f"fail_{way}").exists():
        while (folder / "other").exists() and not (folder / "done_b").exists():
            time.sleep(0.1)  # until the other has begun
        raise UserError(f"{way} cannot be done")
    with open(folder / f"done_{way}", "a") as file:
        file.write("x")
    time.sleep((folder / "other").exists() * 1.0)
    return [{"loss": float(len(way))}]


TINY = Study("tiny", "Does it work?", plan_two, note, ("way",))


def test_a_study_resumes_and_keeps_what_was_done(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_TEST", str(tmp_path))
    (tmp_path / "fail_b").touch()
    cfg = StudyConfig("smoke", tmp_path / "out", jobs=1)
    with pytest.raises(UserError, match="b cannot be done"):
        conduct(TINY, cfg)
    assert not (tmp_path / "out" / "tiny_smoke.json").exists()
    (tmp_path / "fail_b").unlink()
    report = conduct(TINY, cfg)
    assert (tmp_path / "done_a").read_text() == "x", "a finished job was done again"
    assert [(row["way"], row["loss"]) for row in report["rows"]] == [("a", 1.0), ("b", 1.0)]
    assert report == read_json(tmp_path / "out" / "tiny_smoke.json") | {"by": ("way",)}
    assert report["command"] == "nanollada study tiny --budget smoke" and report["seeds"] == [1]
    (made,) = report["made"]
    assert {"commit", "nanollada", "torch", "machine", "threads", "python"} <= made.keys()


@pytest.mark.parametrize("name", STUDIES)
def test_every_plan_has_three_seeds_and_a_file_for_each_job(name):
    for budget in ("smoke", "cpu", "gpu"):
        plan = STUDIES[name].plan(budget)
        files = ["_".join(map(str, settings.values())) for settings in plan]
        assert len(set(files)) == len(plan) and all(set(one) == set(plan[0]) for one in plan)
        assert {settings["seed"] for settings in plan} == ({1} if budget == "smoke" else {1, 2, 3})
        assert 0 not in {settings["seed"] for settings in plan}, "the stories to learn from have seed 0"


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_at_the_smallest_size(name, monkeypatch):
    monkeypatch.setenv("NANOLLADA_BUDGET", "smoke")
    study = STUDIES[name]
    some = {"order": slice(None), "reversal": slice(None), "questions": slice(2)}  # of the others the last
    plan = study.plan("smoke")[some.get(name, slice(-1, None))]
    rows = [settings | row for settings in plan for row in study.run(**settings)]
    assert study_table(rows, study.by).count("\n") >= 2
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


def test_what_runs_beside_a_job_that_fails_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_TEST", str(tmp_path))
    for name in ("fail_a", "other"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="a cannot be done"):
        conduct(TINY, StudyConfig("smoke", tmp_path / "out", jobs=2))
    assert [file.name for file in (tmp_path / "out" / "tiny_smoke").iterdir()] == ["b_1.json"]


def test_learning_choosing_and_reporting_use_different_stories():
    parts = [set(toy.sample(300, seed, "en")) for seed in (0, DEV, TEST)]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))


def test_summaries_group_by_settings_and_spread_over_seeds():
    rows = [{"way": "a", "seed": s, "loss": x} for s, x in ((1, 1.0), (2, 2.0), (3, 3.0))] + [{"way": "b", "seed": 1, "loss": 5.0}]
    first, second = summarize(rows, ["way"], "loss")
    assert first == {"way": "a", "seeds": 3, "loss": (2.0, 1.0)} and second["loss"][0] == 5.0 and math.isnan(second["loss"][1])
    assert study_table(rows, ["way"]).splitlines()[2:] == ["| a | 3 | 2 ± 1 |", "| b | 1 | 5 |"]
    mixed = [{"way": "a", "loss": 1.0}, {"way": "b", "share": 0.5}]
    assert study_table(mixed, ["way"]).splitlines() == [
        "| way | seeds | loss | share |", "| --- | --- | --- | --- |", "| a | 1 | 1 |  |", "| b | 1 |  | 0.5 |"]


def oracle(ids):
    "Logits that depend on everything seen, and on the place."
    seen = torch.where(ids == 7, 0, ids + 1).double()
    sums = (seen * torch.arange(1, ids.shape[1] + 1)).sum(1, keepdim=True)
    return torch.sin(sums[..., None] * torch.arange(1, 8) + torch.arange(ids.shape[1])[:, None]) * 2


def test_the_chain_from_left_to_right_is_that_of_chapter_12():
    denoiser, ids = as_denoiser(oracle, 7), torch.randint(0, 7, (3, 6))
    expected = [-chain_rule_log_likelihood(denoiser, row[:1], row[1:]) for row in ids]
    torch.testing.assert_close(chain_nats(denoiser, ids), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_the_surest_next_is_the_chain_in_that_order():
    denoiser, ids = as_denoiser(oracle, 7), torch.randint(0, 7, (3, 6))
    for row, nats in zip(ids, chain_nats(denoiser, ids, surest=True)):
        xt, order = row.clone(), []
        xt[1:] = 7
        while (xt == 7).any():
            sure = denoiser(xt[None])[0].softmax(-1).amax(-1).masked_fill(xt != 7, -1)
            order.append(int(sure.argmax()))
            xt[order[-1]] = row[order[-1]]
        found = chain_rule_log_likelihood(denoiser, row[:1], row[1:], order=[at - 1 for at in order])
        assert -found == pytest.approx(float(nats), rel=1e-5)


def test_orders_of_a_consistent_denoiser_agree():
    uniform = as_denoiser(lambda ids: torch.zeros(*ids.shape, 7), 7)
    ids = torch.randint(0, 7, (2, 5))
    for surest in (False, True):
        torch.testing.assert_close(chain_nats(uniform, ids, surest), torch.full((2,), 4 * math.log(7), dtype=torch.float64))


@pytest.mark.parametrize("n", (6, 99))
def test_facts_are_never_told_the_way_they_are_asked(n):
    facts = friendships(n, seed=3)
    told = {tuple(row) for row in facts.told.tolist()}
    assert all(tuple(row) in told for row in facts.seen.tolist())
    assert not any(tuple(row) in told for row in facts.turned.tolist())
    turned = {(b, a) for _, a, _, b, _ in facts.seen.tolist()}
    assert turned == {(a, b) for _, a, _, b, _ in facts.turned.tolist()}
    both = [row for row in told if any(other[1] == row[3] and other[3] == row[1] for other in told)]
    assert len(both) == 2 * (n // 3), "a third is told both ways"


def test_guessing_a_first_name_tries_all_sentences():
    facts = friendships(6, seed=0)
    model = new_model("ar", 17, 16, seed=1)[0].eval()
    right = 0
    for row in facts.seen:
        scores = []
        for name in range(facts.names):
            tried = row.clone()
            tried[1] = name
            logp = model(tried[None], causal=True).log_softmax(-1)[0, :-1]
            scores.append(logp.gather(1, tried[1:, None]).sum().item())
        right += max(range(facts.names), key=scores.__getitem__) == row[1]
    assert guess_name(model, facts.seen, 1, torch.arange(facts.names)) == pytest.approx(right / len(facts.seen))


@pytest.mark.parametrize("kind", ("ar", "diffusion"))
def test_a_guess_is_among_the_names_allowed(kind):
    facts = friendships(6, seed=0)
    model = new_model(kind, 17, 16, seed=1)[0].eval()
    for column in (1, 3):
        for row in facts.seen:
            assert guess_name(model, row[None], column, row[column][None]) == 1.0
            assert guess_name(model, row[None], column, (row[column][None] + 1) % facts.names) == 0.0


def test_there_are_288_grids_and_puzzles_have_one_solution():
    grids = sudoku_grids()
    quarters = grids.view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)
    for lines in (grids.view(-1, 4, 4), grids.view(-1, 4, 4).mT, quarters):
        assert (lines.sort(-1).values == torch.arange(4)).all()
    assert len(grids) == 288 == len({tuple(grid) for grid in grids.tolist()})
    puzzles = sudoku_puzzles(grids[:20], 6, torch.Generator().manual_seed(0))
    for puzzle, grid in zip(puzzles, grids):
        fits = ((grids == puzzle) | (puzzle < 0)).all(1)
        assert fits.sum() == 1 and (puzzle >= 0).sum() == 6 and torch.equal(grids[fits][0], grid)


def test_only_the_first_ending_is_possible():
    for text in toy.sample(30, 5, "en"):
        start, ends = endings(toy.read_story(text, toy.toy_language("en")))
        assert start + ends[0] == text
        assert [toy.is_valid(start + end, "en") for end in ends] == [True, False, False, False]


def test_dropout_is_for_training_only():
    model = with_dropout(new_model("ar", 17, 16, seed=1)[0], 0.5)
    ids = torch.randint(0, 16, (2, 5))
    a, b = (model.train()(ids, True) for _ in range(2))
    assert not torch.equal(a, b)
    a, b = (model.eval()(ids, True) for _ in range(2))
    assert torch.equal(a, b)


def test_a_perfect_model_has_no_excess(monkeypatch):
    from nanollada import studies
    model = new_model("ar", 2048, 2047, seed=1)[0].eval()
    perfect = lambda model, words, texts, **how: (-torch.tensor([toy.log_prob(t, "en") for t in texts]), None)
    monkeypatch.setattr(studies, "score_documents", perfect)
    assert abs(score_stories(model, n=20)["excess"]) < 1e-5


def test_somebody_who_meets_himself_is_found():
    fresh = toy.sample(40, 3, "en")
    assert namesakes(fresh) == 0
    hero, other = re.findall(r"(\w+) the", fresh[0])[:2]
    assert namesakes([fresh[0].replace(other, hero), *fresh[1:]]) == 1 / 40


def test_an_untrained_model_is_far_above_the_entropy():
    words = story_rows(2)
    assert words.ids.shape == (2, ROW)
    model = new_model("diffusion", 2048, 2047, seed=1, **shape_of(64))[0].eval()
    found = score_stories(model, n=2)
    assert all(found[name] > 100 for name in ("excess", "excess_left", "excess_surest"))


def test_fresh_stories_are_grammatical_and_diverse():
    judged = judge_stories(toy.sample(50, 3, "en"))
    assert judged["grammatical_share"] == 1.0 and judged["word_entropy"] > 4


def test_the_command_names_the_studies_it_knows(capsys):
    assert main(["study", "nonsense"]) == 1
    assert "expected one of recipe, twins" in capsys.readouterr().err


def talks(*sizes):
    "Encoded conversations with a context and an answer of so many tokens; the answer ends with EOS (2)."
    return [([([1] * context, [7] * (reply - 1) + [2])], 0.5) for context, reply in sizes]


def test_rows_as_llada_fills_them_are_learned_to_the_end_of_the_longest():
    rows = PaddedRows(talks((3, 2), (4, 6), (9, 3)), toy_tokenizer(), 64, 1, 0)
    batch = rows.batch(torch.arange(3), torch.Generator().manual_seed(0))
    end = rows.tokenizer.eos_token_id
    for row, (context, reply) in enumerate(((3, 2), (4, 6), (9, 3))):  # shortest first
        assert batch["ids"][row].tolist() == [1] * context + [7] * (reply - 1) + [2] + [end] * (12 - context - reply)
        assert batch["scored"][row].tolist() == [False] * context + [True] * (12 - context)
    assert batch["real"].all()


def test_flat_weights_are_the_mean_over_what_is_scored():
    rows = {"ids": torch.full((4, 9), 5), "scored": torch.arange(9).expand(4, 9) > torch.tensor([[0], [2], [4], [7]])}
    for per, expected in (("row", [1 / 8, 1 / 6, 1 / 4, 1.0]), ("token", [1.0] * 4)):
        batch = Flat(3, by="count", per=per).noise(rows, torch.Generator().manual_seed(0))
        torch.testing.assert_close(batch["weight"].flatten(), torch.tensor(expected))


def test_so_many_batches_are_cut():
    rows, draws = CutRows(Rows(torch.arange(200).view(2, 100)), 0.01), torch.Generator().manual_seed(0)
    widths = [rows.batch([0, 1], draws)["ids"].shape[1] for _ in range(4000)]
    cut = [width for width in widths if width < 100]
    assert 20 <= len(cut) <= 62 and min(widths) >= 2  # 40, give or take 3.5 errors
    assert 35 < sum(cut) / len(cut) < 67 and len(rows) == 2


def test_short_and_long_conversations_are_about_the_same_stories():
    for short, long in zip(*short_and_long(20, 0)):
        (ask, home), (wish, told) = ((turn["content"] for turn in talk.turns) for talk in (short, long))
        story = toy.read_story(told, toy.toy_language("en"))
        assert home == story["home"] and story["kind"] in ask and wish == f"Tell a story of {story['hero']}."


def test_temptations_are_the_other_thing_or_the_other_name():
    for way in ("forward", "backward"):
        talks = toy_conversations(40, 0, "en", way)
        for right, wrong in (found := tempted(talks)):
            text, ask = right.turns[0]["content"].split("\n")
            story = toy.read_story(text, toy.toy_language("en"))
            both = {right.turns[1]["content"], wrong.turns[1]["content"]}
            assert both == ({story["toy"], story["tool"]} if way == "forward" else {story["hero"], story["other"]})
            assert wrong.turns[0] == right.turns[0] and "friend" not in ask * (way == "forward")
        assert len(found) == (sum("friend" not in talk.turns[0]["content"].split("\n")[1] for talk in talks) if way == "forward" else 40)


def test_nats_of_an_answer_are_exact_for_both_kinds():
    words, talks = toy_tokenizer(), toy_conversations(3, 0, "en", "forward")
    for kind in ("ar", "joint"):
        model = new_model(kind, len(words), words.mask_token_id, 0, max_position_embeddings=256)[0].eval()
        found = answer_nats(model, talks)
        for (pairs, _), nats in zip(encode_pairs(talks, words, 128)[0], found):
            (context, reply), = pairs
            if kind == "ar":
                ids = torch.tensor([[*context, *reply]])
                expected = torch.nn.functional.cross_entropy(model(ids, causal=True)[0, :-1], ids[0, 1:], reduction="none")[-len(reply):].sum()
            else:
                ids = torch.tensor([[*context, *reply]])
                scored = torch.arange(ids.shape[1])[None] >= len(context)
                expected = exact_nelbo(model.denoise, ids, maskable=scored)[0]
            assert abs(float(nats) - float(expected)) < 1e-3


def test_the_shipped_weights_say_how_they_were_made():
    from safetensors.torch import load_file
    folder = Path(__file__).parent.parent / "nbs" / "weights"
    about, weights = read_json(folder / "13_fast.json", dict), load_file(folder / "13_fast.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == about["parameters"]
    assert about["command"] == "python .ci/weights.py" and about["made"]["commit"]
    assert 0 < about["nelbo_nats_per_story"] - about["entropy_nats_per_story"] < 5
