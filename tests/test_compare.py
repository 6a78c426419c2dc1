"Chapter 15: two models by the clock, the order of a diffusion answer, measures of generated text."

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch

from nanollada import toy
from nanollada.ar import decode
from nanollada.backbone import Backbone, preset, save_model, save_tokenizer
from nanollada.compare import (DIALS, Pair, compare_answers, compare_runs, comparison_markdown, comparison_table, context_ids,
                               dials_of, distinct_n, draw_comparison, draw_order, draw_progress, grammatical_share, is_chat,
                               judged_nll, ngrams, open_pair, read_prompts, repetition_rate, score_questions, score_samples,
                               score_text, self_bleu, settings_of, share_of, time_answer, unigram_entropy, watch_answer,
                               write_comparison, write_samples)
from nanollada.core import UserError, make_generator
from nanollada.guidance import trim_answers
from nanollada.likelihood import chain_rule_log_likelihood
from nanollada.pretrain import cross
from nanollada.sampler import generate
from nanollada.sft import AnswerConfig, ChatFormat, Conversation, answer, toy_conversations
from nanollada.tokenizer import encode, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(toy.sample(60), 400)


@pytest.fixture(scope="module")
def pair(tokenizer):
    "Twins that have learned nothing."
    torch.manual_seed(0)
    shape = preset("toy", len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                   objective="ar", mask_token_id=tokenizer.mask_token_id, max_position_embeddings=96, initializer_range=0.5)
    ar = Backbone(shape).eval()
    return Pair(ar, cross(ar).eval(), tokenizer, False)


def save(folder, model, tokenizer, chat=False):
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    (folder / "train_config.json").write_text(json.dumps({"steps": 1} | ({"sft": {"data": "toy"}} if chat else {"pretrain": {}})))
    return folder


@pytest.fixture(scope="module")
def runs(pair, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for name, model in (("ar", pair.ar), ("diffusion", pair.diffusion)):
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
    "Every forward pass takes one second, everything else nothing."
    clock = Slow()
    monkeypatch.setattr("nanollada.compare.time", clock)

    def tick(*_):
        clock.now += 1.0

    handles = [model.register_forward_hook(tick) for model in (pair.ar, pair.diffusion)]
    yield clock
    for handle in handles:
        handle.remove()


# The clock

@pytest.mark.parametrize("settings, passes", [
    ({}, 12), ({"steps": 5}, 5), ({"steps": 4, "block_length": 3}, 4), ({"cfg_scale": 1.0, "steps": 3}, 3), ({"steps": 100}, 12),
])
def test_the_clock_counts_the_passes_of_diffusion_and_nothing_else(pair, clock, settings, passes):
    ids, times = time_answer(pair.diffusion, [1, 20, 30], pair.tokenizer, AnswerConfig(gen_length=12, eos="never", **settings))
    assert len(ids) == 12 and times == [float(k) for k in range(1, passes + 1)]


@pytest.mark.parametrize("seed", range(4))
def test_the_clock_counts_the_tokens_of_ar_with_its_eos(pair, clock, seed):
    ids, times = time_answer(pair.ar, [1, 20, 30], pair.tokenizer, AnswerConfig(gen_length=12, temperature=1.0, seed=seed))
    assert times == [float(k) for k in range(1, min(len(ids) + 1, 12) + 1)]


def test_the_clock_leaves_no_hook_behind_even_after_an_error(pair):
    before = len(pair.ar._forward_pre_hooks)
    with pytest.raises(UserError, match="means nothing to an ar model"):
        time_answer(pair.ar, [1, 2], pair.tokenizer, AnswerConfig(steps=3))
    time_answer(pair.ar, [1, 2], pair.tokenizer, AnswerConfig(gen_length=2))
    assert len(pair.ar._forward_pre_hooks) == before


@pytest.mark.parametrize("seed", range(3))
def test_a_timed_answer_is_the_answer(pair, seed):
    cfg = AnswerConfig(gen_length=8, temperature=1.0, seed=seed)
    prompt, eos = torch.tensor([[1, 40, 41]]), pair.tokenizer.eos_token_id
    noise = make_generator(seed, "answer")
    expected = trim_answers(decode(pair.ar, prompt, 8, 1.0, eos_id=eos, generator=noise), eos, 3)[0]
    assert time_answer(pair.ar, prompt[0].tolist(), pair.tokenizer, cfg)[0] == expected
    noise = make_generator(seed, "answer")
    ids = generate(pair.diffusion.denoise, prompt, pair.diffusion.cfg.mask_token_id, 8, None, temperature=1.0, eos_id=eos, generator=noise)
    assert time_answer(pair.diffusion, prompt[0].tolist(), pair.tokenizer, cfg)[0] == trim_answers(ids, eos, 3)[0]


# The order

@pytest.mark.parametrize("settings", [{}, {"steps": 4}, {"block_length": 4}, {"remasking": "random", "steps": 6}, {"temperature": 1.0}])
def test_the_order_is_that_of_the_canvases(pair, settings):
    cfg, context = AnswerConfig(gen_length=12, **settings), [1, 50, 51]
    canvases = []
    generate(pair.diffusion.denoise, torch.tensor([context]), pair.diffusion.cfg.mask_token_id, 12, cfg.steps, cfg.block_length,
             cfg.temperature, remasking=cfg.remasking, generator=make_generator(0, "answer"), eos_id=pair.tokenizer.eos_token_id,
             on_step=lambda step: canvases.append(step.ids[0, 3:].tolist()))
    ids, order = watch_answer(pair.diffusion, context, pair.tokenizer, cfg)
    mask = pair.diffusion.cfg.mask_token_id
    assert order == [next(k for k, canvas in enumerate(canvases, 1) if canvas[n] != mask) for n in range(len(ids))]
    assert ids == canvases[-1][: len(ids)]


def test_the_order_of_an_autoregressive_answer_is_left_to_right(pair):
    ids, order = watch_answer(pair.ar, [1, 50], pair.tokenizer, AnswerConfig(gen_length=9))
    assert order == list(range(1, len(ids) + 1))


# The same question

def test_a_prompt_is_a_turn_or_a_beginning(tokenizer):
    assert context_ids(tokenizer, "Once", False) == [tokenizer.bos_token_id, *encode(tokenizer, "Once")]
    assert context_ids(tokenizer, "Once", True) == ChatFormat(tokenizer).prompt([{"role": "user", "content": "Once"}])
    assert tokenizer.eos_token_id not in context_ids(tokenizer, "a<|im_end|>b", False)
    for chat in (False, True):
        with pytest.raises(UserError, match="the prompt is ' '; expected some text"):
            context_ids(tokenizer, " ", chat)


def test_is_chat_reads_the_record():
    assert is_chat({"training": {"sft": {}}})
    assert not is_chat({"training": {"pretrain": {}}}) and not is_chat({"training": None})


def test_open_pair_gives_twins(runs):
    pair, talkers = open_pair(runs / "ar", runs / "diffusion", "cpu"), open_pair(runs / "ar_chat", runs / "diffusion_chat", "cpu")
    assert (pair.ar.cfg.objective, pair.diffusion.cfg.objective) == ("ar", "diffusion") and not pair.ar.training
    assert not pair.chat and talkers.chat


def test_runs_that_do_not_belong_together(runs, pair, tmp_path):
    other = train_tokenizer(toy.sample(60, language="en"), 400)
    save(tmp_path / "other", Backbone(replace(pair.ar.cfg, vocab_size=len(other), objective="diffusion")), other)
    for ar, diffusion, message in [
        (runs / "diffusion", runs / "ar", "objective diffusion; expected ar"), (runs / "ar", runs / "ar", "objective ar; expected diffusion"),
        (runs / "ar", tmp_path / "other", "different vocabularies"), (runs / "none", runs / "diffusion", "no such run folder"),
        (runs / "ar_chat", runs / "diffusion", r"ar_chat was fine-tuned on conversations, \S*diffusion was not"),
        (runs / "ar", runs / "diffusion_chat", r"diffusion_chat was fine-tuned on conversations, \S*ar was not"),
    ]:
        with pytest.raises(UserError, match=message):
            open_pair(ar, diffusion, "cpu")


def test_dials_go_to_who_understands_them():
    changed = AnswerConfig(8, 4, 2, 0.5, "entropy", 1.5, "late", 7, 0.9, 11)
    for name, alien in (("ar", DIALS["diffusion"]), ("diffusion", DIALS["ar"])):
        own = dials_of(changed, name)
        own.check(name)
        for entry in fields(AnswerConfig):
            expected = entry.default if entry.name in alien else getattr(changed, entry.name)
            assert getattr(own, entry.name) == expected
        assert set(settings_of(changed, name)) == {entry.name for entry in fields(AnswerConfig)} - set(alien)


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_dials_are_exactly_what_the_other_kind_refuses(objective):
    changed = dict(gen_length=8, steps=4, block_length=2, temperature=0.5, remasking="entropy", cfg_scale=1.5, eos="late",
                   top_k=7, top_p=0.9, seed=11)
    refused = set()
    for name, value in changed.items():
        try:
            AnswerConfig(**{name: value}).check(objective)
        except UserError:
            refused.add(name)
    assert refused == set(DIALS["diffusion" if objective == "ar" else "ar"])


# Side by side

def test_a_comparison_by_a_clock_of_our_own(pair, clock):
    records = compare_answers(pair, ["Once", "On a rainy day"], AnswerConfig(gen_length=10, steps=5), repeats=2)
    assert [record["prompt"] for record in records] == ["Once", "On a rainy day"]
    for record in records:
        context = context_ids(pair.tokenizer, record["prompt"], False)
        assert record["context_tokens"] == len(context)
        for name in ("ar", "diffusion"):
            side = record[name]
            ids, order = watch_answer(getattr(pair, name), context, pair.tokenizer, dials_of(AnswerConfig(gen_length=10, steps=5), name))
            assert side["tokens"] == len(ids) == len(side["pieces"]) == len(side["order"]) and side["order"] == order
            assert side["text"] == pair.tokenizer.decode(ids, skip_special_tokens=True)
            assert side["seconds"] == side["forward_passes"] == len(side["pass_seconds"]) and side["first_seconds"] == 1.0
            assert side["tokens_per_second"] == len(ids) / side["forward_passes"]
            assert max(order, default=1) <= side["forward_passes"]
    json.dumps(records, allow_nan=False)


def test_the_middle_round_is_reported(pair, monkeypatch):
    rounds = iter([[1.0, 9.0], [5.0, 5.5], [1.0, 4.0], [2.0, 7.0], [1.0, 2.0], [3.0, 6.0]])  # ar and diffusion in turn
    monkeypatch.setattr("nanollada.compare.time_answer", lambda *_: ([], next(rounds)))
    (record,) = compare_answers(pair, ["Once"], AnswerConfig(gen_length=4), repeats=3)
    assert record["ar"]["pass_seconds"] == [1.0, 4.0] and record["diffusion"]["pass_seconds"] == [3.0, 6.0]


def test_answers_repeat_with_their_seed(pair):
    def texts(seed):
        records = compare_answers(pair, ["Once"], AnswerConfig(gen_length=8, temperature=1.0, seed=seed), repeats=1)
        return [records[0][name]["text"] for name in ("ar", "diffusion")]
    assert texts(1) == texts(1) != texts(2)


def test_chat_runs_are_asked_and_answer_as_in_chapter_14(runs):
    report = compare_runs(runs / "ar_chat", runs / "diffusion_chat", ["Who?"], AnswerConfig(gen_length=6), "cpu", 1)
    pair = open_pair(runs / "ar_chat", runs / "diffusion_chat", "cpu")
    for name in ("ar", "diffusion"):
        assert report["answers"][0][name]["text"] == answer(getattr(pair, name), pair.tokenizer, ["Who?"], gen_length=6)[0]
    about = report["about"]
    assert about["prompts_are"] == "questions" and about["device"] == "cpu" and about["torch"] == torch.__version__
    assert about["settings"]["ar"]["gen_length"] == 6 and "steps" not in about["settings"]["ar"] and about["seed"] == 0


def test_prompts_that_cannot_be_asked_stop_before_anything_is_written(pair, monkeypatch):
    monkeypatch.setattr("nanollada.compare.watch_answer", None)
    for prompts, settings, message in [
        ([], {}, "no prompts to answer"), (["Once", ""], {}, "prompt 2: the prompt is ''"),
        (["Once", "word " * 90], {}, "prompt 2: .* do not fit the context of 96"), (["Once"], {"gen_length": 96}, "prompt 1: .* gen_length 96"),
    ]:
        with pytest.raises(UserError, match=message):
            compare_answers(pair, prompts, AnswerConfig(**settings))
    with pytest.raises(UserError, match="repeats is 0"):
        compare_answers(pair, ["Once"], repeats=0)


# On paper

@pytest.fixture(scope="module")
def report(runs):
    return compare_runs(runs / "ar", runs / "diffusion", ["Once", "从前"], AnswerConfig(gen_length=12, steps=4), "cpu", 1)


def test_three_files(report, tmp_path):
    paths = write_comparison(report, tmp_path / "deep" / "out")
    assert [path.name for path in paths] == ["compare.md", "compare.json", "compare.png"]
    assert json.loads(paths[1].read_text()) == report and paths[2].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert paths[0].read_text(encoding="utf-8") == comparison_markdown(report)
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)  # nothing half-written


def test_markdown_holds_settings_answers_and_order(report):
    text = comparison_markdown(report)
    for name in ("machine", "torch", "seed"):
        assert f"- {name}: {report['about'][name]}" in text
    assert "'steps': 4" in text and comparison_table(report["answers"]) in text and text.count("## Prompt") == 2
    for record in report["answers"]:
        side = record["diffusion"]
        assert all(f"/{k}" in text for k in side["order"]) and f"    {record['prompt']}" in text


def test_a_model_cannot_write_markdown_or_move_the_cursor(report):
    side = report["answers"][0]["ar"] | {"text": "# big\n| a | b |\n\x1b[2Jx"}
    text = comparison_markdown(report | {"answers": [report["answers"][0] | {"ar": side}]})
    assert "\n    # big\n    | a | b |\n    [2Jx" in text and "\x1b" not in text


def test_pictures_show_every_token_and_every_pass(report):
    import matplotlib.pyplot as plt
    figure = draw_comparison(report["answers"])
    assert len(figure.axes) == 4
    for row, record in enumerate(report["answers"]):
        side = record["diffusion"]
        grid, progress = figure.axes[2 * row : 2 * row + 2]
        assert [text.get_text() for text in grid.texts[1::2]] == [str(k) for k in side["order"]]
        assert len(grid.patches) == side["tokens"]
        line = progress.get_lines()[2]
        assert list(line.get_ydata())[-1] == side["tokens"] and len(line.get_xdata()) == side["forward_passes"] + 1
        assert progress.get_xlabel() == "milliseconds" and "tokens" in progress.get_ylabel()
    plt.close(figure)


def test_pictures_of_little(report):
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2)
    draw_order(axes[0], [], [])
    draw_order(axes[0], ["$x", "a\ufffd"], [1, 2])
    empty = {"order": [], "pass_seconds": [0.1], "forward_passes": 1}
    draw_progress(axes[1], {"ar": empty, "diffusion": empty})
    figure.canvas.draw()
    assert [text.get_text() for text in axes[0].texts[::2]][0] == "·"
    plt.close(figure)
    many = draw_comparison(report["answers"] * 5)
    assert len(many.axes) == 12
    plt.close(many)


def test_read_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffOnce\r\n\n  从前 \nlast".encode())
    assert read_prompts(tmp_path / "p.txt") == ["Once", "从前", "last"]
    lines = ["two\nlines", {"prompt": "a"}, {"question": "b", "answer": "x"}, {"instruction": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_prompts(tmp_path / "p.jsonl") == ["two\nlines", "a", "b", "c"]


@pytest.mark.parametrize("name, content, message", [
    ("none.txt", None, r"none\.txt: no such file"), ("empty.txt", b"\n \n", r"empty\.txt: no prompts"),
    ("latin.txt", b"fine\ncaf\xe9\n", r"latin\.txt:2: not UTF-8"), ("bad.jsonl", b'"a"\n{"prompt": \n', r"bad\.jsonl:2: not JSON"),
    ("latin.jsonl", b'"caf\xe9"\n', r"latin\.jsonl:1: not JSON in UTF-8"), ("other.jsonl", b'{"text": "a"}\n', r"other\.jsonl:1: no prompt here"),
    ("number.jsonl", b"\n7\n", r"number\.jsonl:2: no prompt here"), ("blank.jsonl", b'" "\n', r"blank\.jsonl:1: no prompt here"),
    ("list.jsonl", b'{"prompt": ["a"]}\n', r"list\.jsonl:1: no prompt here"),
])
def test_prompts_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


# Measures, on cases made by hand

def test_ngrams():
    assert ngrams("abcd", 2) == [("a", "b"), ("b", "c"), ("c", "d")] and ngrams([1, 2], 3) == [] and ngrams("ab", 2) == [("a", "b")]
    with pytest.raises(UserError, match="n is 0"):
        ngrams("abc", 0)


@pytest.mark.parametrize("texts, n, expected", [
    (["abcd", "efgh"], 1, 1.0), (["abcd", "abcd"], 1, 0.5), (["abab"], 2, 2 / 3), (["aaaa"], 1, 0.25), ([[1, 2, 3], [2, 3, 4]], 2, 3 / 4),
    (["ab", "b", ""], 1, 2 / 3),
])
def test_distinct(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize("texts, n, expected", [
    (["abcd", "abcd"], 2, 0.0), (["abababab"], 2, 5 / 7), (["aaaaa"], 4, 0.5), (["aaaaa", "abcde"], 4, 0.25), (["aaaaa", "abc"], 4, 0.5),
])
def test_repetition(texts, n, expected):
    assert repetition_rate(texts, n) == pytest.approx(expected)


def test_entropy():
    assert unigram_entropy(["ab", "cd"]) == pytest.approx(math.log(4)) and unigram_entropy(["aaa"]) == 0
    assert unigram_entropy(["aab"]) == pytest.approx(2 / 3 * math.log(3 / 2) + math.log(3) / 3)


def test_measures_of_nothing_are_nan():
    assert all(math.isnan(value) for value in (distinct_n([], 1), distinct_n(["a"], 2), repetition_rate(["abc"]), unigram_entropy([""])))


NLTK = [  # texts, self-BLEU with n up to 2 and up to 4: nltk 3.10.4, sentence_bleu with SmoothingFunction().method1
    (["abcde", "abcde"], 1.0, 1.0),
    (["abcde", "abxde"], 0.6324555320336759, 0.16068568378893033),
    (["abcde", "vwxyz"], 0.0, 0.0),
    (["abcdefgh", "abcd"], 0.415394745528859, 0.35680011290669167),
    (["aabb", "abab", "bbaa"], 0.9388321936425754, 0.2573702437026581),
    (["ab", "abc", "a"], 0.564561321011598, 0.2073093836638312),
    (["the cat sat on the mat".split(), "the cat sat on a hat".split(), "a dog sat on the mat today".split()],
     0.7391973383430072, 0.6117819530757376),
    (["aaaa", "aaab", "caaa", "xyz"], 0.5303300858899106, 0.298226523287644),
]


@pytest.mark.parametrize("texts, of_2, of_4", NLTK)
def test_self_bleu_is_that_of_nltk(texts, of_2, of_4):
    assert self_bleu(texts, 2) == pytest.approx(of_2, rel=1e-12) and self_bleu(texts) == pytest.approx(of_4, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_self_bleu_against_all_pairs(seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abc", k=rng.randint(0, 9))) for _ in range(12)]
    scores = []
    for c, text in enumerate(texts):
        others, product = texts[:c] + texts[c + 1 :], 1.0
        for n in range(1, 5):
            have = Counter(ngrams(text, n))
            hits = sum(min(k, max(Counter(ngrams(other, n))[g] for other in others)) for g, k in have.items())
            product *= 0.0 if n == 1 and not hits else (hits or 0.1) / max(1, len(text) - n + 1)
        r = min((abs(len(other) - len(text)), len(other)) for other in others)[1]
        penalty = 1.0 if len(text) >= r else 0.0 if not text else math.exp(1 - r / len(text))
        scores.append(penalty * product**0.25)
    assert self_bleu(texts) == pytest.approx(sum(scores) / 12, rel=1e-9)


def test_self_bleu_does_not_care_for_order_and_needs_two():
    texts = ["abcd", "bcda", "abab", "dcba"]
    assert self_bleu(texts) == pytest.approx(self_bleu(texts[::-1]), rel=1e-12)
    assert self_bleu(["", ""]) == 0.0
    for few in ([], ["abc"]):
        with pytest.raises(UserError, match="expected at least 2"):
            self_bleu(few)


def test_shares():
    assert share_of([True, False, True, True]) == (0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5)) and share_of([True]) == (1.0, 0.0)
    with pytest.raises(UserError, match="nothing to count"):
        share_of([])
    stories = toy.sample(3, 0, "en")
    assert grammatical_share([*stories, "nonsense"]) == (0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5))
    assert grammatical_share(stories, "zh")[0] == 0.0


# The judge

def test_the_judge_agrees_with_the_chain_rule(pair, tokenizer):
    texts = ["Once upon", "a", "On a rainy day Lucy", ""]
    nll, error = judged_nll(pair.ar, tokenizer, texts, batch_size=2)
    nats, counts = [], []
    for text in texts[:3]:
        ids = encode(tokenizer, text)
        logits = pair.ar(torch.tensor([[tokenizer.bos_token_id, *ids]]), causal=True).detach().log_softmax(-1)[0]
        nats.append(-sum(float(logits[n, token]) for n, token in enumerate(ids)))
        counts.append(len(ids))
    mean = sum(nats) / sum(counts)
    assert nll == pytest.approx(mean, rel=1e-5)
    spread = sum((x - mean * n) ** 2 for x, n in zip(nats, counts)) / 2
    assert error == pytest.approx((3 * spread) ** 0.5 / sum(counts), rel=1e-4)


def test_a_judge_must_be_autoregressive_and_texts_must_fit(pair, tokenizer):
    with pytest.raises(UserError, match="the judge is a diffusion model"):
        judged_nll(pair.diffusion, tokenizer, ["a"])
    with pytest.raises(UserError, match="whose context has 96"):
        judged_nll(pair.ar, tokenizer, ["zq " * 95])
    assert all(math.isnan(value) for value in judged_nll(pair.ar, tokenizer, ["", ""]))
    one = judged_nll(pair.ar, tokenizer, ["Once"])
    assert math.isfinite(one[0]) and math.isnan(one[1])


# The parts of eval

def test_samples_repeat_with_their_seed_and_do_not_depend_on_the_batch(pair, tokenizer):
    cfg = AnswerConfig(gen_length=6, temperature=1.0, seed=3)
    rows = write_samples(pair.diffusion, tokenizer, 5, cfg)
    assert rows == write_samples(pair.diffusion, tokenizer, 5, cfg) != write_samples(pair.diffusion, tokenizer, 5, replace(cfg, seed=4))
    assert len(rows) == 5 and len(write_samples(pair.ar, tokenizer, 5, cfg, batch_size=2)) == 5
    batches = write_samples(pair.ar, tokenizer, 4, cfg, batch_size=2)
    assert batches[:2] != batches[2:]  # each batch has noise of its own
    with pytest.raises(UserError, match="samples is 0"):
        write_samples(pair.ar, tokenizer, 0, cfg)


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_score_samples(pair, tokenizer, name):
    cfg = AnswerConfig(gen_length=8, temperature=1.0)
    model = getattr(pair, name)
    found = score_samples(model, tokenizer, 6, cfg, pair.ar, language=None)
    rows = write_samples(model, tokenizer, 6, cfg)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert found["distinct_2"] == distinct_n(rows, 2) and found["self_bleu"] == self_bleu(rows)
    assert found["judged_nats_per_token"] == judged_nll(pair.ar, tokenizer, texts)[0] and found["grammatical_share"] == 0.0
    assert found["settings"] == settings_of(cfg, name) and found["cut_off"] + found["empty"] <= 6
    assert "grammatical_share" not in score_samples(model, tokenizer, 2, cfg)
    with pytest.raises(UserError, match="samples is 1; expected at least 2"):
        score_samples(model, tokenizer, 1, cfg)


def test_silence_is_null_not_nan(pair, tokenizer, monkeypatch):
    monkeypatch.setattr("nanollada.compare.write_ids", lambda model, contexts, *_: [[] for _ in contexts])
    found = score_samples(pair.ar, tokenizer, 3, AnswerConfig(temperature=1.0), pair.ar)
    assert found["empty"] == 3 and found["distinct_1"] is None and found["judged_nats_per_token"] is None
    json.dumps(found, allow_nan=False)


def test_score_text_is_exact_for_ar(pair, tokenizer):
    texts = ["Once upon", "a day", "word " * 95]
    found = score_text(pair.ar, tokenizer, texts)
    nats, counts = [], []
    for text in texts[:2]:
        ids = [tokenizer.bos_token_id, *encode(tokenizer, text), tokenizer.eos_token_id]
        logits = pair.ar(torch.tensor([ids]), causal=True).detach().log_softmax(-1)[0]
        nats.append(-sum(float(logits[n - 1, ids[n]]) for n in range(1, len(ids))))
        counts.append(len(ids) - 1)
    each = [a / b for a, b in zip(nats, counts)]
    assert (found["documents"], found["too_long"], found["tokens"], found["metric"]) == (2, 1, sum(counts), "NLL")
    assert found["nats_per_token"] == pytest.approx(sum(each) / 2, rel=1e-5)
    assert found["standard_error"] == pytest.approx(abs(each[0] - each[1]) / 2, rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / len("Once upona day"), rel=1e-5)
    with pytest.raises(UserError, match="none of 1 documents fits 96 tokens"):
        score_text(pair.ar, tokenizer, texts[2:])
    assert score_text(pair.ar, tokenizer, texts[:1])["standard_error"] is None


def test_score_text_bounds_for_diffusion(pair, tokenizer):
    text = "On"
    ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
    found = score_text(pair.diffusion, tokenizer, [text] * 64, masks=4)
    assert found["metric"] == "NELBO" and found["masks"] == 4
    exact = [-chain_rule_log_likelihood(pair.diffusion.denoise, [tokenizer.bos_token_id], ids, tokenizer.mask_token_id, order)
             for order in itertools.permutations(range(len(ids)))]
    off = found["nats_per_token"] - sum(exact) / len(exact) / len(ids)  # the 64 differ by their masks alone
    assert abs(off) < 4 * found["standard_error"] + 1e-5


def test_questions_end_with_their_answer(pair, tokenizer):
    asked = toy_conversations(3, language="en")
    short = [Conversation([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "x"}], "here") for _ in asked]
    loose = [Conversation([*turns, {"role": "user", "content": "And?"}], place) for turns, place in short]
    cfg = AnswerConfig(gen_length=4)
    found = score_questions(pair.ar, tokenizer, short, cfg)
    assert found == score_questions(pair.ar, tokenizer, loose, cfg) and found["questions"] == 3
    said = answer(pair.ar, tokenizer, ["Who?"], gen_length=4)[0]
    right = [Conversation([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": said}], "here"), *short[:1]]
    assert score_questions(pair.ar, tokenizer, right, cfg) == {"exact_match": 0.5, "standard_error": (0.25 / 2) ** 0.5, "questions": 2,
                                                               "settings": settings_of(cfg, "ar")}
    with pytest.raises(UserError, match="no conversations to score"):
        score_questions(pair.ar, tokenizer, [], cfg)
