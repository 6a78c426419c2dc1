"Chapter 15: two models by the clock, the order of a diffusion answer, measures of generated text."

import itertools
import json
import math
from dataclasses import asdict, fields, replace

import pytest
import torch

from nanollada import toy
from nanollada.backbone import Backbone, preset, save_run
from nanollada.compare import (Pair, compare_answers, compare_runs, comparison_markdown,
                               comparison_table, context_ids, distinct_n, draw_comparison, grammatical_share, is_chat,
                               judged_nll, open_pair, ratio_of, read_prompts, repetition_rate, score_questions,
                               score_samples, score_text, settings_for, share_of, time_answer, unigram_entropy,
                               write_comparison)
from nanollada.core import UserError
from nanollada.fast import DIFFUSION_SETTINGS, WriteConfig, write_ids, write_steps
from nanollada.likelihood import chain_rule_log_likelihood
from nanollada.pretrain import cross, score_documents
from nanollada.sft import ChatFormat, Conversation, answer
from nanollada.tokenizer import encode, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(toy.sample(60), 400)


@pytest.fixture(scope="module")
def pair(tokenizer):
    "Twins that have learned nothing."
    torch.manual_seed(0)
    shape = preset("toy", len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=32, objective="ar", mask_token_id=tokenizer.mask_token_id,
                   max_position_embeddings=96, initializer_range=0.5)
    ar = Backbone(shape).eval()
    infos = {name: {"objective": name, "training": None} for name in ("ar", "diffusion")}
    return Pair({"ar": ar, "diffusion": cross(ar).eval()}, tokenizer, infos)


def save(folder, model, tokenizer, chat=False):
    save_run(model, tokenizer, folder)
    record = {"sft": {"data": "toy", "gen_length": 6}} if chat else {"pretrain": {}}
    (folder / "train_config.json").write_text(json.dumps({"steps": 1} | record))


@pytest.fixture(scope="module")
def runs(pair, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for name, model in pair.models.items():
        save(place / name, model, tokenizer)
        save(place / f"{name}_chat", model, tokenizer, chat=True)
    return place


class Slow:
    "A clock in whole seconds that only a test moves."

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch, pair):
    "Every forward pass of the trunk takes one second, everything else nothing."
    clock = Slow()
    monkeypatch.setattr("nanollada.compare.time", clock)

    def tick(*_):
        clock.now += 1.0

    handles = [model.model.register_forward_hook(tick) for model in pair.models.values()]
    yield clock
    for handle in handles:
        handle.remove()


# The clock and the order

@pytest.mark.parametrize("settings, passes", [
    ({"fast": False}, 12), ({"steps": 5}, 5), ({"steps": 4, "block_length": 3}, 4), ({"cfg_scale": 1.0, "steps": 3}, 3),
])
def test_the_clock_counts_the_passes_of_diffusion_and_nothing_else(pair, clock, settings, passes):
    cfg = WriteConfig(gen_length=12, eos="never", **settings)
    side = time_answer(pair.models["diffusion"], [1, 20, 30], pair.tokenizer, cfg)
    assert side["tokens"] == 12 and side["forward_passes"] == passes
    assert side["pass_seconds"] == [float(k) for k in range(1, passes + 1)]


@pytest.mark.parametrize("seed", range(4))
def test_the_clock_counts_the_tokens_of_ar_with_its_eos(pair, clock, seed):
    cfg = WriteConfig(gen_length=12, temperature=1.0, seed=seed)
    side = time_answer(pair.models["ar"], [1, 20, 30], pair.tokenizer, cfg)
    assert side["forward_passes"] == min(side["tokens"] + 1, 12) == side["seconds"]
    assert side["order"] == list(range(1, side["tokens"] + 1)) and side["first_seconds"] == 1.0


@pytest.mark.parametrize("settings", [
    {}, {"fast": False}, {"steps": 4}, {"block_length": 4}, {"remasking": "random", "steps": 6}, {"temperature": 1.0},
])
def test_text_order_and_time_are_of_one_run(pair, settings):
    cfg, context, mask = WriteConfig(gen_length=12, **settings), [1, 50, 51], pair.tokenizer.mask_token_id
    side = time_answer(pair.models["diffusion"], context, pair.tokenizer, cfg)
    canvases = [step.ids[0, 3:].tolist() for step in write_steps(pair.models["diffusion"], [context], pair.tokenizer, cfg)]
    (ids,) = write_ids(pair.models["diffusion"], [context], pair.tokenizer, cfg)
    assert side["text"] == pair.tokenizer.decode(ids, skip_special_tokens=True) and side["tokens"] == len(ids)
    assert side["order"] == [next(k for k, canvas in enumerate(canvases, 1) if canvas[n] != mask) for n in range(len(ids))]
    assert len(side["pass_seconds"]) == len(canvases) == side["forward_passes"]
    assert side["pass_seconds"] == sorted(side["pass_seconds"])


# The same question

def test_a_prompt_is_a_turn_or_a_beginning(tokenizer):
    assert context_ids(tokenizer, "Once", False) == [tokenizer.bos_token_id, *encode(tokenizer, "Once")]
    form = ChatFormat(tokenizer)
    assert context_ids(tokenizer, "Once", True) == form.context(form.encode([{"role": "user", "content": "Once"}]))
    assert tokenizer.eos_token_id not in context_ids(tokenizer, "a<|im_end|>b", False)
    for chat in (False, True):
        with pytest.raises(UserError, match="the prompt is ' '; expected some text"):
            context_ids(tokenizer, " ", chat)


def test_open_pair_gives_twins(runs):
    for ending, chat in (("", False), ("_chat", True)):
        found = open_pair(runs / f"ar{ending}", runs / f"diffusion{ending}", "cpu")
        assert [model.cfg.objective for model in found.models.values()] == ["ar", "diffusion"]
        assert not found.models["ar"].training and is_chat(found.infos["ar"]) == is_chat(found.infos["diffusion"]) == chat


def test_runs_that_do_not_belong_together(runs, pair, tmp_path):
    other = train_tokenizer(toy.sample(60, language="en"), 400)
    save(tmp_path / "other", Backbone(replace(pair.models["ar"].cfg, vocab_size=len(other), objective="diffusion")), other)
    for ar, diffusion, message in [
        (runs / "diffusion", runs / "ar", "are of objective diffusion, ar; expected ar, diffusion"),
        (runs / "ar", runs / "ar", "objective ar, ar"),
        (runs / "ar", tmp_path / "other", "different vocabularies"), (runs / "none", runs / "diffusion", "none"),
        (runs / "ar_chat", runs / "diffusion", "was fine-tuned on conversations"),
        (runs / "ar", runs / "diffusion_chat", "was fine-tuned on conversations"),
    ]:
        with pytest.raises(UserError, match=message):
            open_pair(ar, diffusion, "cpu")


def test_settings_go_to_who_understands_them(pair):
    changed = WriteConfig(gen_length=8, fast=False, steps=4, block_length=2, temperature=0.5, remasking="entropy", cfg_scale=1.5,
                          eos="late", top_k=7, top_p=0.9, seed=11, **{DIFFUSION_SETTINGS[-1]: 0.8})
    own = settings_for(changed, pair.infos["ar"])
    own.policy("ar", 2)  # raises for a setting of diffusion
    for entry in fields(WriteConfig):
        alien = entry.name in DIFFUSION_SETTINGS
        assert getattr(changed, entry.name) != entry.default
        assert getattr(own, entry.name) == (entry.default if alien else getattr(changed, entry.name))
    assert settings_for(changed, pair.infos["diffusion"]) == changed
    for name in set(DIFFUSION_SETTINGS) - {"fast"}:  # exactly what an ar model refuses
        with pytest.raises(UserError, match=f"{name} is .*means nothing to an ar model"):
            replace(WriteConfig(), **{name: getattr(changed, name)}).policy("ar", 2)


# Side by side

def test_a_comparison_by_a_clock_of_our_own(pair, clock):
    cfg = WriteConfig(gen_length=10, steps=5)
    records = compare_answers(pair, ["Once", "On a rainy day"], cfg, repeats=2)
    assert [record["prompt"] for record in records] == ["Once", "On a rainy day"]
    for record in records:
        context = context_ids(pair.tokenizer, record["prompt"], False)
        assert record["context_tokens"] == len(context)
        for name, model in pair.models.items():
            side, alone = record[name], time_answer(model, context, pair.tokenizer, settings_for(cfg, pair.infos[name]))
            assert side == alone and side["seconds"] == side["forward_passes"]
            assert side["tokens_per_second"] == side["tokens"] / side["forward_passes"]
    json.dumps(records, allow_nan=False)


def test_the_middle_round_is_reported_with_its_own_text(pair, monkeypatch):
    rounds = iter([(0.1, "warm-up")] * 2 + [(9.0, "a"), (5.5, "b"), (4.0, "c"), (7.0, "d"), (2.0, "e"), (6.0, "f")])
    monkeypatch.setattr("nanollada.compare.time_answer", lambda *_: dict(zip(("seconds", "text"), next(rounds))))
    (record,) = compare_answers(pair, ["Once"], WriteConfig(gen_length=4), repeats=3)
    assert record["ar"] == {"seconds": 4.0, "text": "c"} and record["diffusion"] == {"seconds": 6.0, "text": "f"}


def test_chat_runs_are_asked_on_the_canvas_they_learned(runs):
    report = compare_runs(runs / "ar_chat", runs / "diffusion_chat", ["Who?"], WriteConfig(), "cpu", 1)
    found = open_pair(runs / "ar_chat", runs / "diffusion_chat", "cpu")
    for name, model in found.models.items():
        said = answer(model, found.tokenizer, ["Who?"], gen_length=6)[0]  # as train_config.json says
        assert report["answers"][0][name]["text"] == said and report["about"]["settings"][name]["gen_length"] == 6
    about = report["about"]
    assert about["prompts_are"] == "questions" and about["device"] == "cpu" and about["torch"] == torch.__version__


def test_prompts_that_cannot_be_asked_stop_before_anything_is_written(pair, monkeypatch):
    monkeypatch.setattr("nanollada.compare.time_answer", None)
    for prompts, settings, message in [
        ([], {}, "0 prompts"), (["Once", ""], {"gen_length": 8}, "prompt 2: the prompt is ''"),
        (["Once", "word " * 90], {"gen_length": 8}, "prompt 2: .*96"), (["Once"], {"gen_length": 96}, "prompt 1: .*96"),
    ]:
        with pytest.raises(UserError, match=message):
            compare_answers(pair, prompts, WriteConfig(**settings))
    with pytest.raises(UserError, match="repeats is 0"):
        compare_answers(pair, ["Once"], WriteConfig(), repeats=0)


# On paper

@pytest.fixture(scope="module")
def report(runs):
    cfg = WriteConfig(gen_length=12, steps=4)
    return compare_runs(runs / "ar", runs / "diffusion", ["Once", "从前"], cfg, "cpu", 1)


def test_three_files(report, tmp_path):
    paths = write_comparison(report, tmp_path / "deep" / "out")
    assert [path.name for path in paths] == ["compare.md", "compare.json", "compare.png"]
    assert json.loads(paths[1].read_text()) == report and paths[2].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert paths[0].read_text(encoding="utf-8") == comparison_markdown(report)
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)


def test_markdown_holds_settings_answers_and_order(report):
    text = comparison_markdown(report)
    for name in ("machine", "torch", "seed"):
        assert f"- {name}: {report['about'][name]}" in text
    assert "'steps': 4" in text and comparison_table(report["answers"]) in text and text.count("## Prompt") == 2
    for record in report["answers"]:
        assert all(f"/{k}" in text for k in record["diffusion"]["order"]) and f"    {record['prompt']}" in text


def test_a_model_cannot_write_markdown_or_move_the_cursor(report):
    "code.md 25: bidirectional controls go too."
    side = report["answers"][0]["ar"] | {"text": "# big\n| a | b |\n\n\x1b[2Jx\u202e"}
    text = comparison_markdown(report | {"answers": [report["answers"][0] | {"ar": side}]})
    assert "\n    # big\n    | a | b |\n    \n    [2Jx" in text and not set("\x1b\u202e") & set(text)


def test_pictures_show_every_token_and_every_pass(report):
    import matplotlib.pyplot as plt
    figure = draw_comparison(report["answers"])
    assert len(figure.axes) == 4
    for (grid, progress), record in zip((figure.axes[:2], figure.axes[2:]), report["answers"]):
        for line, name in zip(progress.get_lines(), ("ar", "diffusion")):
            assert list(line.get_ydata())[-1] == record[name]["tokens"]
            assert len(line.get_xdata()) == record[name]["forward_passes"] + 1
        assert progress.get_xlabel() == "milliseconds" and "tokens" in progress.get_ylabel()
    assert len(draw_comparison(report["answers"] * 5).axes) == 12
    plt.close("all")


def test_read_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffOnce\r\n\n  从前 \nlast".encode())
    assert read_prompts(tmp_path / "p.txt") == ["Once", "从前", "last"]
    lines = ["two\nlines", {"prompt": "a"}, {"question": "b", "answer": "x"}, {"instruction": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_prompts(tmp_path / "p.jsonl") == ["two\nlines", "a", "b", "c"]


@pytest.mark.parametrize("name, content, message", [
    ("none.txt", None, r"none\.txt: no such file"), ("latin.txt", b"fine\ncaf\xe9\n", r"latin\.txt:1: no prompt"),
    ("bad.jsonl", b'"a"\n{"prompt": \n', r"bad\.jsonl:2: not JSON"), ("latin.jsonl", b'"caf\xe9"\n', r"latin\.jsonl:1"),
    ("deep.jsonl", b"[" * 100_000 + b"\n", r"deep\.jsonl:1: not JSON"),
    ("other.jsonl", b'{"text": "a"}\n', r"other\.jsonl:1: no prompt"),
    ("number.jsonl", b"\n7\n", r"number\.jsonl:2: no prompt"),
    ("list.jsonl", b'{"prompt": ["a"]}\n', r"list\.jsonl:1: no prompt"),
])
def test_prompts_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


# Measures, on cases made by hand

@pytest.mark.parametrize("texts, n, expected", [
    (["abcd", "efgh"], 1, 1.0), (["abcd", "abcd"], 1, 0.5), (["abab"], 2, 2 / 3), (["aaaa"], 1, 0.25),
    ([[1, 2, 3], [2, 3, 4]], 2, 3 / 4), (["ab", "b", ""], 1, 2 / 3),
])
def test_distinct(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize("texts, n, expected", [
    (["abcd", "abcd"], 2, 0.0), (["abababab"], 2, 5 / 7), (["aaaaa"], 4, 0.5), (["aaaaa", "abcdefg"], 4, 1 / 6),
    (["aaaaa", "abc"], 4, 0.5),
])
def test_repetition_is_a_ratio_of_sums(texts, n, expected):
    "code.md 21: one way of averaging."
    assert repetition_rate(texts, n) == pytest.approx(expected)


def test_entropy():
    assert unigram_entropy(["ab", "cd"]) == pytest.approx(math.log(4)) and unigram_entropy(["aaa"]) == 0
    assert unigram_entropy(["aab"]) == pytest.approx(2 / 3 * math.log(3 / 2) + math.log(3) / 3)


def test_measures_of_nothing_are_nan():
    found = (distinct_n([], 1), distinct_n(["a"], 2), repetition_rate(["abc"]), unigram_entropy([""]))
    assert all(math.isnan(value) for value in found)


def test_shares_and_ratios():
    assert share_of([True, False, True, True]) == (0.75, pytest.approx((0.75 * 0.25 / 3) ** 0.5)) and math.isnan(share_of([True])[1])
    stories = toy.sample(3, 0, "en")
    assert grammatical_share([*stories, "nonsense"]) == (0.75, pytest.approx((0.75 * 0.25 / 3) ** 0.5))
    assert grammatical_share(stories, "zh")[0] == 0.0
    mean, error = ratio_of(torch.tensor([6.0, 2.0]), torch.tensor([2.0, 2.0]))
    assert (mean, error) == (2.0, pytest.approx(1.0)) and math.isnan(ratio_of(torch.ones(1), torch.ones(1))[1])


def exact(model, tokenizer, text, end):
    "Nats of a text and its tokens, token by token."
    ids = [tokenizer.bos_token_id, *encode(tokenizer, text), *[tokenizer.eos_token_id] * end]
    logits = model(torch.tensor([ids]), causal=True).detach().log_softmax(-1)[0]
    return -sum(float(logits[n - 1, ids[n]]) for n in range(1, len(ids))), len(ids) - 1


def test_one_way_of_averaging(pair, tokenizer):
    "code.md 21: eval, judge and bits per byte are ratios of sums over the same texts."
    texts, ar = ["Once upon", "a", "On a rainy day Lucy"], pair.models["ar"]
    nats, counts = map(torch.tensor, zip(*(exact(ar, tokenizer, text, False) for text in texts)))
    ratio, spread = float(nats.sum() / counts.sum()), nats - nats.sum() / counts.sum() * counts
    error = float((3 / 2 * (spread**2).sum()) ** 0.5 / counts.sum())
    scored = score_text(ar, tokenizer, texts, content_only=True)
    assert judged_nll(ar, tokenizer, [*texts, ""]) == pytest.approx((ratio, error), rel=1e-4)
    assert (scored["nats_per_token"], scored["standard_error"]) == pytest.approx((ratio, error), rel=1e-4)
    assert abs(ratio - float((nats / counts).mean())) > 0.01  # a mean over documents is another number
    size = len("".join(texts))
    assert scored["bits_per_byte"] * size * math.log(2) == pytest.approx(ratio * scored["tokens"], rel=1e-5)


def test_a_judge_must_be_autoregressive_and_texts_must_fit(pair, tokenizer):
    with pytest.raises(UserError, match="the judge is a diffusion model"):
        judged_nll(pair.models["diffusion"], tokenizer, ["a"])
    with pytest.raises(UserError, match="96"):
        judged_nll(pair.models["ar"], tokenizer, ["zq " * 95])
    assert all(math.isnan(value) for value in judged_nll(pair.models["ar"], tokenizer, ["", ""]))


# The parts of eval

@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_score_samples(pair, tokenizer, name):
    cfg, model = WriteConfig(gen_length=8, temperature=1.0), pair.models[name]
    found = score_samples(model, tokenizer, 6, cfg, pair.models["ar"], language=None)
    assert found == score_samples(model, tokenizer, 6, cfg, pair.models["ar"], language=None)
    other = score_samples(model, tokenizer, 6, replace(cfg, seed=4), pair.models["ar"])
    assert found["judged_nats_per_token"] != other["judged_nats_per_token"] and "grammatical_share" not in other
    assert found["grammatical_share"] == 0.0 and found["settings"] == asdict(cfg)
    assert 0 < found["distinct_1"] <= 1 and found["cut_off"] + found["empty"] <= 6


def test_silence_is_null_not_nan(pair, tokenizer, monkeypatch):
    monkeypatch.setattr("nanollada.compare.write_ids", lambda model, contexts, *_: [[] for _ in contexts])
    found = score_samples(pair.models["ar"], tokenizer, 3, WriteConfig(temperature=1.0), pair.models["ar"])
    assert found["empty"] == 3 and found["distinct_1"] is None and found["judged_nats_per_token"] is None
    json.dumps(found, allow_nan=False)


def test_score_text_is_exact_for_ar(pair, tokenizer):
    texts, ar = ["Once upon", "a day", "word " * 95], pair.models["ar"]
    found = score_text(ar, tokenizer, texts)
    nats, counts = zip(*(exact(ar, tokenizer, text, True) for text in texts[:2]))
    assert (found["documents"], found["too_long"], found["tokens"], found["metric"]) == (2, 1, sum(counts), "NLL")
    assert found["nats_per_token"] == pytest.approx(sum(nats) / sum(counts), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / len("Once upona day"), rel=1e-5)
    with pytest.raises(UserError, match="none of 1 documents fits 96 tokens"):
        score_text(ar, tokenizer, texts[2:])
    assert score_text(ar, tokenizer, texts[:1])["standard_error"] is None


def test_score_text_bounds_for_diffusion(pair, tokenizer):
    text, model = "On", pair.models["diffusion"]
    ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
    found = score_text(model, tokenizer, [text] * 64, masks=4)
    assert found["metric"] == "NELBO" and found["masks"] == 4
    orders = list(itertools.permutations(range(len(ids))))
    nats = [-chain_rule_log_likelihood(model.denoise, [tokenizer.bos_token_id], ids, order=order) for order in orders]
    off = found["nats_per_token"] - sum(nats) / len(nats) / len(ids)  # the 64 differ by their masks alone
    assert abs(off) < 4 * found["standard_error"] + 1e-5


def test_questions_end_with_their_answer(pair, tokenizer):
    ar, cfg = pair.models["ar"], WriteConfig(gen_length=4)
    said = answer(ar, tokenizer, ["Who?"], gen_length=4)[0]
    talk = lambda text: Conversation([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": text}], "here")
    found = score_questions(ar, tokenizer, [talk(said), talk("x")], cfg)
    assert found == {"exact_match": 0.5, "standard_error": pytest.approx(0.5), "questions": 2, "settings": asdict(cfg)}
