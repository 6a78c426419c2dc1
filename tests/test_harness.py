"lm-evaluation-harness on our runs: against transformers, lm-eval's own reader, exact sums over masks, and our own writing."
import json
import logging
import math
import sys

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from nanollada import toy
from nanollada.backbone import Backbone, load_run, preset, save_run
from nanollada.blocks import block_log_likelihood
from nanollada.core import UserError, make_generator
from nanollada.data import toy_tokenizer
from nanollada.elbo import exact_nelbo
from nanollada.fast import BlockDenoiser, WriteConfig, generate_text, write_ids
from nanollada.harness import (
    BenchmarkConfig, ar_log_likelihoods, asked_settings, benchmark, benchmark_table, change, cut_at, harness_model, model_class,
    pairs_of, shared_bounds, writes_greedily,
)
from nanollada.likelihood import chain_rule_log_likelihood, greedy_match, log_likelihood, score_choices
from nanollada.sft import answer
from nanollada.tokenizer import encode

KINDS = {"ar": dict(objective="ar"), "diffusion": {}, "joint": dict(shift=True), "block": dict(objective="block", block_length=4),
         "causal": dict(objective="block", block_length=3, causal_clean=True), "editing": dict(edits=True)}
WORDS = toy_tokenizer()
STORIES = toy.sample(12, 3, "en")


def model_of(kind, room=96, **shape):
    torch.manual_seed(0)
    return Backbone(preset("toy", len(WORDS), mask_token_id=WORDS.mask_token_id, max_position_embeddings=room, initializer_range=0.15,
                           **KINDS[kind] | shape)).eval()


def harness(kind, room=96, words=WORDS, **settings):
    model = model_of(kind, room)
    return harness_model((model, words, {"training": None}), **{"masks": 8} | settings)


def asks(kind, arguments, task="t", docs=None):
    docs = range(len(arguments)) if docs is None else docs
    return [Instance(kind, {}, given, 0, (task, doc, 1)) for given, doc in zip(arguments, docs)]


def nats(lm, arguments, **about):
    return [value for value, _ in lm.loglikelihood(asks("loglikelihood", arguments, **about))]


def split(text, n=-4):
    "The ids of a text behind bos, the last |n| of them as an answer; and the two as lm-eval gives them."
    ids = encode(WORDS, text)
    left = WORDS.decode(ids[:n])
    return [WORDS.bos_token_id, *ids[:n]], ids[n:], (left, text[len(left) :])


PAIRS = [split(text, -n) for n, text in zip((1, 4, 7, 2, 5, 3), STORIES)]
TEXTS = [texts for *_, texts in PAIRS]


@pytest.fixture(scope="module")
def ar_folder(tmp_path_factory):
    save_run(model_of("ar"), WORDS, folder := tmp_path_factory.mktemp("ar"))
    return folder


@torch.no_grad()
def by_transformers(reader, context, right):
    "Log p and greed of an answer, by transformers' own model on the same folder, one pair and one token at a time."
    total, greedy = 0.0, True
    for n, token in enumerate(right):
        logp = reader(torch.tensor([[*context, *right[:n]]])).logits[0, -1].double().log_softmax(-1)
        total, greedy = total + logp[token].item(), greedy and int(logp.argmax()) == token
    return total, greedy


# autoregressive: exact


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_ar_is_what_transformers_says(ar_folder, batch_size):
    lm, reader = harness_model(ar_folder, device="cpu", batch_size=batch_size), AutoModelForCausalLM.from_pretrained(ar_folder).eval()
    found = lm.loglikelihood(asks("loglikelihood", TEXTS))
    for (context, right, _), (ours, greedy) in zip(PAIRS, found):
        theirs, likeliest = by_transformers(reader, context, right)
        assert abs(ours - theirs) < 1e-3 and greedy == likeliest
    (written,) = write_ids(lm.model, [PAIRS[0][0]], WORDS, WriteConfig(gen_length=3))
    assert [greedy for _, greedy in lm.score([(PAIRS[0][0], written), (PAIRS[0][0], [*written[:2], 7])], [(0,), (1,)])] == [True, False]


def test_ar_is_what_the_harness_itself_says(ar_folder):
    ours = harness_model(ar_folder, device="cpu")
    theirs = HFLM(pretrained=str(ar_folder), device="cpu", dtype="float32", batch_size=4, add_bos_token=True)
    long = " ".join(STORIES[:3])
    cases = [*TEXTS, ("Once ", "upon a time"), ("", " hello you"), (" ", "x"), ("one\n", "two"), (long, " the end"), ("on", "e")]
    for mine, yours in zip(ours.loglikelihood(asks("loglikelihood", cases)), theirs.loglikelihood(asks("loglikelihood", cases))):
        assert mine[0] == pytest.approx(yours[0], rel=1e-4) and mine[1] == yours[1]
    assert ours.counts["truncated"] == 1
    theirs = HFLM(pretrained=str(ar_folder), device="cpu", dtype="float32", batch_size=4, add_bos_token=False)  # else it scores bos
    texts = [(STORIES[0],), (long,), ("a",)]
    mine, yours = (lm.loglikelihood_rolling(asks("loglikelihood_rolling", texts)) for lm in (ours, theirs))
    assert mine == pytest.approx(yours, rel=1e-4)


# diffusion: bounds


@pytest.mark.parametrize("kind", ["diffusion", "joint", "block", "causal", "editing"])
@torch.no_grad()
def test_one_token_answers_are_one_pass_with_one_mask(kind):
    lm, (context, (right,), texts) = harness(kind, masks=1), split(STORIES[0], -1)
    ids = torch.tensor([[*context, WORDS.mask_token_id]])
    logits = (BlockDenoiser(lm.model, len(context)) if "block" in str(KINDS[kind]) else lm.model.denoise)(ids)[0, -1]
    assert nats(lm, [texts])[0] == pytest.approx(logits.double().log_softmax(-1)[right].item(), abs=1e-4)
    assert lm.get_model_info()["nanollada"]["tasks"]["t"] == {"answers": 1, "exact": 1, "standard_error": 0.0, "questions": 0, "in_doubt": 0}


@pytest.mark.parametrize("kind", ["diffusion", "joint"])
def test_with_masks_enough_a_bound_is_the_sum_over_all_of_them(kind):
    lm = harness(kind, masks=127)
    for (context, right, _), value in zip(PAIRS, nats(lm, TEXTS)):
        ids = torch.tensor([[*context, *right]])
        exact = -exact_nelbo(lm.model.denoise, ids, maskable=torch.arange(ids.shape[1])[None] >= len(context)).item()
        assert value == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("kind", ["block", "causal"])
def test_the_bound_of_a_block_model_is_the_sum_of_its_blocks(kind):
    lm = harness(kind, masks=15)
    for (context, right, _), value in zip(PAIRS, nats(lm, TEXTS)):
        assert value == pytest.approx(block_log_likelihood(lm.model, context, right, n_samples=15).mean, abs=1e-3)


@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_estimates_lie_within_their_error_of_the_exact_sum(kind):
    model, pairs = model_of(kind, **({"block_length": 7} if kind == "block" else {})), [pair[:2] for pair in PAIRS[2:3]] * 40
    exact = shared_bounds(model, pairs[:1], 127)
    assert exact.exact.all()
    off = []
    for seed in range(40):
        found = shared_bounds(model, pairs[:1], 24, generator=make_generator(seed))
        assert not found.exact.any() and found.standard_error[0] > 0
        off.append(((found.mean - exact.mean) / found.standard_error).item())
    off = torch.tensor(off)  # Student's t with 5 degrees of freedom: variance 5/3
    assert abs(off.mean()) < 4 * (5 / 3 / 40) ** 0.5 and 0.4 < off.std() < 2.5


@pytest.mark.parametrize("kind", KINDS)
def test_batches_order_and_company_change_nothing_but_rounding(kind):
    usual = nats(harness(kind), TEXTS)
    assert nats(harness(kind, batch_size=1), TEXTS) == pytest.approx(usual, abs=1e-3)
    assert nats(harness(kind), TEXTS[2:3], docs=[2]) == pytest.approx(usual[2:3], abs=1e-3)
    back = nats(harness(kind), TEXTS[::-1], docs=list(range(len(TEXTS)))[::-1])
    assert back[::-1] == pytest.approx(usual, abs=1e-3)
    other = nats(harness(kind, seed=1), TEXTS)
    limit = {"ar": math.inf, "causal": math.inf}.get(kind, 3)  # blocks of 3 have 7 masks, and are exact with 8
    assert [abs(a - b) > 1e-3 for a, b in zip(usual, other)] == [len(right) > limit for _, right, _ in PAIRS]


@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_the_choices_of_a_question_share_their_masks(kind):
    lm, (_, _, (left, right)) = harness(kind), split(STORIES[1], -9)
    same, other = nats(lm, [(left, right)] * 3, docs=[0, 0, 1])[:2], nats(lm, [(left, right)], docs=[1])
    assert same[0] == pytest.approx(same[1], abs=1e-4) and abs(same[0] - other[0]) > 1e-3
    told = lm.get_model_info()["nanollada"]
    assert told["tasks"]["t"]["questions"] == 0 and told["likelihood"] == "bound"  # of the last call
    nats(one := harness(kind, masks=1), [(left, right)] * 2, docs=[0, 0])
    told = one.get_model_info()["nanollada"]["tasks"]["t"]
    assert told["standard_error"] is None and told["in_doubt"] == 1  # a single mask cannot tell


def test_choices_are_scored_as_score_choices_does():
    lm, (context, _, (left, _)) = harness("diffusion", masks=16), split(STORIES[1], -9)
    choices = [split(text, -9)[1] for text in STORIES[:3]]
    found = nats(lm, [(left, WORDS.decode(ids)) for ids in choices], docs=[5] * 3)
    ours = score_choices(lm.model.denoise, context, choices, n_samples=16, generator=make_generator(0, "masks", "t", 5, True))
    assert found == pytest.approx(ours.scores.tolist(), abs=1e-3)
    told = lm.get_model_info()["nanollada"]["tasks"]["t"]
    assert told["questions"] == 1 and told["in_doubt"] == (ours.margin.mean < 2 * ours.margin.standard_error)
    assert told["standard_error"] == pytest.approx(ours.likelihoods.standard_error.square().mean().sqrt().item(), rel=1e-3)


def test_guidance_is_that_of_log_likelihood():
    lm, (context, right, texts) = harness("diffusion", masks=15, cfg_scale=1.5), split(STORIES[1], -4)
    assert nats(lm, [texts])[0] == pytest.approx(log_likelihood(lm.model.denoise, context, right, n_samples=15, cfg_scale=1.5).mean, abs=1e-3)
    assert abs(nats(lm, [texts])[0] - nats(harness("diffusion", masks=15), [texts])[0]) > 0.1


@pytest.mark.parametrize("kind", ["diffusion", "joint", "block", "causal"])
@torch.no_grad()
def test_the_chain_is_token_by_token(kind):
    lm = harness(kind, likelihood="chain")
    for (context, right, _), value in zip(PAIRS, nats(lm, TEXTS)):
        total, size = 0.0, lm.model.cfg.block_length or len(right)
        for n, token in enumerate(right):  # the rest of the answer's block is hidden; of later blocks nothing is there
            end = min(len(right), (n // size + 1) * size)
            ids = torch.tensor([[*context, *right[:n]] + [WORDS.mask_token_id] * (end - n)])
            reader = BlockDenoiser(lm.model, len(context)) if lm.model.cfg.block_length else lm.model.denoise
            total += reader(ids)[0, len(context) + n].double().log_softmax(-1)[token].item()
        assert value == pytest.approx(total, abs=1e-3)
    assert lm.get_model_info()["nanollada"]["tasks"]["t"]["exact"] == len(PAIRS)
    if kind == "diffusion":
        assert value == pytest.approx(chain_rule_log_likelihood(lm.model.denoise, context, right), abs=1e-4)


@pytest.mark.parametrize("kind", ["diffusion", "joint", "block"])
def test_greedy_is_what_is_written(kind, caplog):
    lm, (context, right, texts) = harness(kind, check_greedy=True, masks=1), split(STORIES[2], -5)
    (written,) = write_ids(lm.model, [context], WORDS, WriteConfig(gen_length=5, fast=False, eos="never"))
    assert len(written) == 5 and written != right
    assert [greedy for _, greedy in lm.score([(context, written), (context, right)], [(0,), (1,)])] == [True, False]
    if kind != "block":
        assert writes_greedily(lm.model, context, right) == greedy_match(lm.model.denoise, context, right)
    assert not caplog.records
    assert harness(kind).loglikelihood(asks("loglikelihood", [texts]))[0][1] is False
    assert "check_greedy is off" in caplog.text


# ids


def test_spaces_go_with_the_answer_and_the_text_is_cut_as_a_whole():
    lm = harness("diffusion")
    (context, right), (other, _), (empty, _) = pairs_of(lm, [("The dog sat ", "down"), ("The dog sat", " down"), ("", "a")], 96)
    assert context == other == [WORDS.bos_token_id, *encode(WORDS, "The dog sat")] and WORDS.decode(right) == " down"
    assert empty == [WORDS.bos_token_id]
    assert pairs_of(harness("diffusion", bos=False), [("The dog sat", " down"), ("", "a")], 96) == [(context[1:], right), (empty, encode(WORDS, "a"))]
    assert lm.counts["seams"] == 0
    joint = encode(WORDS, "own")
    assert joint != [*encode(WORDS, "ow"), *encode(WORDS, "n")]  # a word that is one token
    pairs_of(lm, [("ow", "n")], 96)
    assert lm.counts["seams"] == 1
    with pytest.raises(UserError, match="is empty"):
        pairs_of(lm, [("The dog", "")], 96)


@pytest.mark.parametrize("kind", ["ar", "diffusion", "block"])
def test_what_is_too_long_loses_its_beginning_and_says_so(kind, caplog):
    lm, text = harness(kind, room=40), " ".join(STORIES[:2])
    (context, right, texts) = split(text, -3)
    assert math.isfinite(nats(lm, [texts])[0]) and lm.counts["truncated"] == 1
    assert "cut on the left, to fit 40 tokens" in caplog.text
    kept = context[-37 - (kind == "ar") :]
    again = ar_log_likelihoods(lm.model, [(kept, right)])[0] if kind == "ar" else shared_bounds(lm.model, [(kept, right)], 8)
    assert nats(lm, [texts])[0] == pytest.approx(again.mean.item(), abs=1e-3)
    with pytest.raises(UserError, match="do not fit the context of 40"):
        nats(lm, [("On", text)])


@pytest.mark.parametrize("kind", ["ar", "diffusion", "block"])
def test_long_texts_are_read_in_windows_that_share_nothing(kind):
    lm, text = harness(kind, room=24, masks=2), STORIES[0]
    ids, size = encode(WORDS, text), 24 if kind == "ar" else 23
    seen = []
    plain, lm.score = lm.score, lambda pairs, keys: (seen.extend(pairs), plain(pairs, keys))[1]
    found = lm.loglikelihood_rolling(asks("loglikelihood_rolling", [(text,), ("",), (STORIES[1],)]))
    assert found[1] == 0.0 and found[0] != found[2]
    mine = seen[: -(-len(ids) // size)]
    assert [token for _, part in mine for token in part] == ids and all(len(part) <= size for _, part in mine)
    whole, at = [WORDS.bos_token_id, *ids], 1
    for n, (context, part) in enumerate(mine):  # the last window is full: it has more context
        assert context == whole[at - len(context) : at] and (len(context) == 1 or n == len(mine) - 1)
        assert len(context) + len(part) == size + 1
        at += len(part)
    assert found[0] == pytest.approx(sum(value for value, _ in plain(mine, [("t", 0, n) for n in range(len(mine))])), abs=1e-3)


# writing


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_generate_text_up_to_their_end(kind):
    lm = harness(kind, batch_size=2)
    prompts = [text[:30] for text in STORIES[:5]]
    found = lm.generate_until(asks("generate_until", [(text, {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False}) for text in prompts]))
    usual = generate_text((lm.model, WORDS), prompts, gen_length=12)
    assert found == usual and len(set(usual)) > 1
    end = usual[0][2:4]
    cut = lm.generate_until(asks("generate_until", [(prompts[0], {"until": [end, ""], "max_gen_toks": 12})]))
    assert cut == [usual[0].partition(end)[0]]


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_drawn_texts_do_not_depend_on_their_neighbours(kind):
    how = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0, "top_k": 50}
    prompts = [(text[:30], how) for text in STORIES[:3]]
    many = harness(kind).generate_until(asks("generate_until", [*prompts, prompts[1]]))
    alone = harness(kind, batch_size=1).generate_until(asks("generate_until", prompts[1:2]))
    assert alone == many[1:2] and many[1] != many[3]
    assert harness(kind, seed=7).generate_until(asks("generate_until", prompts)) != many[:3]


def test_what_a_task_asks_of_writing():
    assert asked_settings({}, None) == {"gen_length": 256, "temperature": 0.0}
    assert asked_settings({"max_new_tokens": 9, "do_sample": False, "temperature": 0.7}, 5) == {"gen_length": 5, "temperature": 0.0}
    hot = {"temperature": 0.7, "top_p": 0.9}
    assert asked_settings({"max_gen_toks": 9, "top_k": 0} | hot, 50) == {"gen_length": 9} | hot
    assert asked_settings({"do_sample": True}, None)["temperature"] == 1.0
    assert (cut_at("one. two; three", [";", "."]), cut_at("one", []), cut_at("a b", " ")) == ("one", "one", "a")
    with pytest.raises(UserError, match="200 tokens behind a question do not fit the context of 96.*gen_length"):
        harness("diffusion").generate_until(asks("generate_until", [("On", {"max_gen_toks": 200})]))
    assert harness("diffusion", gen_length=4).generate_until(asks("generate_until", [("On", {"max_gen_toks": 200})]))


def test_conversations_are_those_of_fine_tuning():
    lm, asked = harness("ar"), f"{STORIES[0]}\nWhat is <|im_end|> here?"
    text = lm.apply_chat_template([{"role": "user", "content": asked}])
    assert text == WORDS.apply_chat_template([{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True)
    (made,) = lm.generate_until(asks("generate_until", [(text, {"max_gen_toks": 10})]))
    assert made == answer(lm.model, WORDS, [asked], gen_length=10)[0]
    ((context, right),) = pairs_of(lm, [(text, "Lucy")], 97)
    assert right == encode(WORDS, "Lucy") and context == lm.form.context(lm.form.encode([{"role": "user", "content": asked}]))
    assert context.count(WORDS.eos_token_id) == 1  # the mark in the question is text
    begun = lm.apply_chat_template([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is"}], False)
    assert lm.talks[begun][-2:] == encode(WORDS, "It is")[-2:] and begun.endswith("It is")
    assert harness("ar").tokenizer_name.startswith("nanollada")


# end to end


def write_tasks(folder, texts, said=None):
    "Three tasks over a local file: which sentence ends a story, which word, and what a text costs."
    rows = []
    for n, text in enumerate(texts):
        start, cut = text.index(" Together"), text.rindex(" ")
        wrong = [other[other.index("Together") :] for other in texts[:n] + texts[n + 1 :]][:2]
        rows.append({"text": text[:start], "endings": [*wrong, text[start + 1 :]], "right": 2, "start": text[:cut], "last": said[n] if said else "?"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "test_split": "test",
              "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}}
    choice = {"task": "endings", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{endings}}",
              "doc_to_target": "{{right}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    match = {"task": "words", "output_type": "generate_until", "doc_to_text": "{{start}}", "doc_to_target": "{{last}}",
             "generation_kwargs": {"until": ["."], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match", "ignore_case": True}]}
    roll = {"task": "prices", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}]}
    for task in (choice, match, roll):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | shared))
    return rows, [task | shared for task in (choice, match, roll)]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return folder, *write_tasks(folder, STORIES[:6])


@pytest.mark.parametrize("kind", ["ar", "diffusion", "joint", "block"])
def test_local_tasks_from_end_to_end(kind, local, tmp_path):
    "Accuracy, exact matches and bits per byte are those of our own scores and texts."
    lm = harness(kind, masks=4)
    written = generate_text((lm.model, WORDS), [row["start"] for row in local[1]], ["."], gen_length=4)
    rows, _ = write_tasks(tmp_path, STORIES[:6], [text + "x" * (n > 3) for n, text in enumerate(written)])  # two are wrong
    save_run(lm.model, WORDS, tmp_path / "run")
    cfg = BenchmarkConfig("endings, words,prices", tmp_path, masks=4, device="cpu", batch_size=5)
    found = benchmark(tmp_path / "run", cfg)
    results = found["results"]
    asked = [(row["text"], f" {ending}") for row in rows for ending in row["endings"]]
    ours = torch.tensor(nats(lm, asked, task="endings", docs=[n // 3 for n in range(18)])).view(6, 3)
    assert results["endings"]["metrics"]["acc"]["value"] == pytest.approx((ours.argmax(1) == 2).double().mean().item())
    sizes = torch.tensor([len(ending) for row in rows for ending in row["endings"]]).view(6, 3)
    assert results["endings"]["metrics"]["acc_norm"]["value"] == pytest.approx(((ours / sizes).argmax(1) == 2).double().mean().item())
    assert results["words"]["metrics"]["exact_match"]["value"] == pytest.approx(4 / 6)
    total = sum(lm.loglikelihood_rolling(asks("loglikelihood_rolling", [(row["text"],) for row in rows], task="prices")))
    size = sum(len(row["text"].encode()) for row in rows)
    assert results["prices"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    told = found["likelihoods"]
    assert told["tasks"]["endings"]["questions"] == 6 and told["tasks"]["prices"]["answers"] == 6 and told["truncated"] == 0
    assert (told["tasks"]["endings"]["standard_error"] == 0) == (kind == "ar") == (told["likelihood"] == "exact")
    assert json.loads(json.dumps(found))["settings"]["writing"]["seed"] == 0 and found["lm_eval"] and found["torch"]
    assert "| endings | 6 | acc |" in benchmark_table(found)
    if kind == "diffusion":
        again = benchmark(tmp_path / "run", change(cfg, {"limit": 2, "tasks": "endings"}))
        assert again["results"]["endings"]["questions"] == 2 and benchmark(tmp_path / "run", cfg)["results"] == results


def test_a_right_answer_counts_as_one_and_a_wrong_one_as_none(local):
    "The scores themselves are replaced: accuracy must follow them."
    for right, accuracy in ((2, 1.0), (0, 0.0)):
        lm = harness("diffusion")
        lm.score = lambda pairs, keys: [(float(n % 3 == right), False) for n in range(len(pairs))]
        import lm_eval
        found = lm_eval.simple_evaluate(lm, tasks=local[2][:1], task_manager=lm_eval.tasks.TaskManager(include_defaults=False))
        assert found["results"]["endings"]["acc,none"] == accuracy


def test_the_harness_finds_it_by_name_and_keeps_the_report(local, ar_folder, tmp_path):
    import lm_eval
    model_class()
    save_run(model_of("diffusion"), WORDS, tmp_path / "run")
    found = lm_eval.simple_evaluate("nanollada", f"run={tmp_path / 'run'},masks=4,seed=3,gen_length=4,device=cpu", tasks=local[2][:2], batch_size="8",
                                    task_manager=lm_eval.tasks.TaskManager(include_defaults=False), limit=3)
    assert found["config"]["nanollada"]["tasks"]["endings"]["answers"] == 9
    ours = benchmark(tmp_path / "run", BenchmarkConfig(masks=4, limit=3, writing=BenchmarkConfig().writing.__class__(seed=3)), local[2][:1])
    assert ours["results"]["endings"]["metrics"]["acc"]["value"] == found["results"]["endings"]["acc,none"]


def test_what_cannot_be_is_one_line(monkeypatch, local, ar_folder):
    with pytest.raises(UserError, match="there is no setting maskes"):
        harness("diffusion", maskes=3)
    with pytest.raises(UserError, match="masks is 0; expected 1"):
        harness("diffusion", masks=0)
    with pytest.raises(UserError, match=f"no task endingz in {local[0]}"):
        benchmark(ar_folder, BenchmarkConfig("endings,endingz", local[0], device="cpu"))
    with pytest.raises(UserError, match="likelihood is 'chance'; expected bound or chain"):
        harness("diffusion", likelihood="chance")
    with pytest.raises(UserError, match="no task was named; expected --tasks arc_easy"):
        benchmark(ar_folder, BenchmarkConfig(include=local[0], device="cpu"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"pip install 'nanollada\[eval\]'"):
        model_class.__wrapped__()


def test_nan_is_refused():
    lm = harness("ar")
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="NaN"):
        nats(lm, TEXTS)


def test_nothing_is_logged_or_printed_without_need(capsys, caplog):
    with caplog.at_level(logging.INFO, "nanollada"):
        nats(harness("diffusion"), TEXTS[:2], docs=[0, 0])
    assert not caplog.records and not capsys.readouterr().out
