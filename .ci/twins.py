"""Fine-tune the twins and measure them: the numbers of chapter 15 and the README (under an hour on one core).

    python .ci/twins.py toy poetry          # each part starts from the pretrained runs
    python .ci/twins.py toy --small         # the same road in a minute; its numbers mean nothing

It starts from the run folders of the pretrained twins (`nanollada demo` for toy; the README's poetry commands), fine-tunes
both on the same conversations in the same order, asks what was held out, and writes nbs/results/twins_cpu.json.
"""
import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import torch

from nanollada import toy
from nanollada.ar import ar_terms
from nanollada.backbone import load_run
from nanollada.core import make_generator, read_json, read_jsonl, write_json
from nanollada.corpus import is_held_out, read_poems
from nanollada.fast import machine_record
from nanollada.likelihood import log_likelihood_batch
from nanollada.pretrain import score_documents
from nanollada.sft import (ChatFormat, SftConfig, exact_match, poem_questions, sft, sft_schedule,
                           toy_conversations, write_conversations)

RUNS = Path("runs")
POEMS = dict(dynasty="tang", min_chars=20, max_chars=120)  # the poems of the README's commands


def schedule(steps, rate, micro=None, precision="auto"):
    "LLaDA's schedule of fine-tuning, the same for both twins."
    return replace(sft_schedule(), steps=steps, batch_size=16, micro_batch_size=micro, learning_rate=rate,
                   optimizer="muon", precision=precision, eval_every=max(1, steps // 4),
                   save_every=steps, log_every=max(1, steps // 50), progress=False, device="cpu")


def tune(name, start, data, steps, rate, micro=None, precision="auto", **settings):
    "Fine-tune one run, or with --measure find it done; seconds, steps, the last validation loss and the curve."
    out = RUNS / name
    if not ARGS.measure:
        learn = schedule(steps, rate, micro, precision)
        sft(SftConfig(str(data), start, out, overwrite=True, train=learn, **settings))
    history = read_jsonl(out / "metrics.jsonl")
    curve = [(r["step"], round(r["loss"], 5)) for r in history if r["split"] == "train"]
    return {"seconds": history[-1]["seconds"], "steps": history[-1]["step"], "valid_loss": history[-1]["loss"], "rows": 16,
            "learning_rate": rate, "curve": curve}


def asked_both_ways(model, tokenizer, asked, **settings):
    "Exact match with its standard error in each direction."
    return {way: exact_match(model, tokenizer, those, **settings) for way, those in asked.items()}


def speeds(model, tokenizer, asked, gen_length, steps, judge=None, **extra):
    "Exact match, tokens/s up to EOS, and nats per token under a judge, a question at a time, by forward passes."
    found = []
    settings = [{}] if model.cfg.objective == "ar" else [{"steps": n, **extra} for n in steps]
    for chosen in settings:
        exact_match(model, tokenizer, asked[:2], gen_length=gen_length, batch_size=1, **chosen)  # warm-up
        said, began = [], time.perf_counter()
        share, error = exact_match(model, tokenizer, asked, said, gen_length=gen_length, batch_size=1, **chosen)
        seconds = time.perf_counter() - began
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in said)
        found.append({"steps": chosen.get("steps"), "tokens_per_second": tokens / seconds, "seconds": seconds / len(asked),
                      "exact_match": share, "standard_error": error, "questions": len(asked)})
        if judge is not None:
            found[-1]["judged_nats_per_token"], found[-1]["judged_error"] = judged(judge, tokenizer, asked, said)
    return found


def bound(model, tokenizer, texts, **settings):
    "Held-out NLL or NELBO per token of plain documents, for a pretrained model."
    nats, counts = score_documents(model, tokenizer, texts, **settings)
    each = nats / counts
    return {"metric": "NLL" if model.cfg.objective == "ar" else "NELBO", "nats_per_token": each.mean().item(),
            "standard_error": (each.std() / len(each) ** 0.5).item(), "documents": len(texts)}


def matched(model, tokenizer, asked, rng, samples=32):
    """How often an answer is likelier after its own question than after three others, with the standard error.

    The same answer under four questions: how common its words are cannot decide, only what it has to do with the question.
    """
    chat, right = ChatFormat(tokenizer), []
    for number, conversation in enumerate(asked):
        own, text = (turn["content"] for turn in conversation.turns)
        others = sorted(c.turns[0]["content"] for c in asked if c is not conversation)
        others = [question for question in others if len(question) == len(own)]
        if len(others) < 3:
            continue  # a line of unusual length
        prompts = [chat.prompt([{"role": "user", "content": question}]) for question in (own, *rng.sample(others, 3))]
        option = chat.answer(text)
        if model.cfg.objective == "ar":
            scores = -torch.stack([nll(model, prompt, option) for prompt in prompts])
        else:
            found = log_likelihood_batch(model.denoise, prompts, [option] * 4, model.cfg.mask_token_id, samples,
                                         shared_masks=True, generator=make_generator(0, "matched", number))
            scores = torch.tensor([found[n][0] for n in range(4)])
        right.append(int(scores.argmax() == 0))
    share = sum(right) / len(right)
    return share, (share * (1 - share) / len(right)) ** 0.5


def judged(judge, tokenizer, asked, said):
    "Nats per token of answers, EOS included, after their questions under an autoregressive model; the standard error."
    chat, each = ChatFormat(tokenizer), []
    for conversation, text in zip(asked, said):
        option = chat.answer(text)
        each.append(nll(judge, chat.prompt(conversation.turns[:1]), option) / len(option))
    each = torch.stack(each)
    return each.mean().item(), (each.std() / len(each) ** 0.5).item()


@torch.no_grad()
def nll(model, prompt, option):
    "Nats of an answer after its question."
    ids = torch.tensor([prompt + option])
    return ar_terms(model, ids, torch.arange(ids.shape[1])[None] >= len(prompt))[0]


def toy_twins(small):
    "Questions about an English story that stands in the prompt, by the README's commands."
    n, models = (10 if small else 500), {}
    asked = {way: toy_conversations(n, 1_000_003, "en", way) for way in ("forward", "backward")}
    mixed, texts = toy_conversations(n // 5, 1_000_004, "en"), toy.sample(10 if small else 200, 1_000_005)
    for objective, start, rate in (("ar", "demo/ar", 4e-3), ("diffusion", "demo/diffusion_from_ar", 2e-3)):
        training = tune(f"toy_{objective}", RUNS / start, "toy", 10 if small else 5000, rate,
                        precision="no", language="en", length=160, bucket=4, limit=200 if small else None)
        model, tokenizer, _ = load_run(RUNS / f"toy_{objective}", "cpu")
        before, _, _ = load_run(RUNS / start, "cpu")
        canvases = (32,) if objective == "ar" else (4, 8, 16, 32)
        models[objective] = {
            "bound": bound(before, tokenizer, texts, canvas=58),
            "by_canvas": {str(size): asked_both_ways(model, tokenizer, asked, gen_length=size) for size in canvases},
            "speed": speeds(model, tokenizer, mixed, 4, (1, 2, 4)), "training": training,
            "settings": {"gen_length": 8, "questions": n, "temperature": 0.0}}
        models[objective]["exact_match"] = models[objective]["by_canvas"]["32" if objective == "ar" else "8"]
        print(objective, models[objective], flush=True)
    return {"models": models}


def poems_of(small):
    "Poems of the corpus, those held out of pretraining apart."
    seen, parts = set(), ([], [])
    for poem in read_poems(**POEMS):
        if len(seen) >= (3_000 if small else 21_000):
            break
        if poem["text"] not in seen:
            seen.add(poem["text"])
            parts[is_held_out(poem["text"], 0.01)].append(poem)
    return parts


def poetry_twins(small):
    "Instructions about poems: what can be said of poems never seen."
    known, unseen = poems_of(small)
    rng, folder = random.Random(0), RUNS / "poem_talks"
    write_conversations(folder / "train.jsonl", [c for poem in known for c in poem_questions(poem, rng)])
    write_conversations(folder / "valid.jsonl", [c for poem in unseen for c in poem_questions(poem, rng)])
    unseen = unseen[: 20 if small else 200]
    asked = {way: [c for poem in unseen for c in poem_questions(poem, random.Random(poem["text"]), [kind])]
             for way, kind in (("forward", "next"), ("backward", "previous"))}
    models = {}
    for objective, start in (("ar", "tang_ar"), ("diffusion", "tang_diffusion_from_ar")):
        training = tune(f"tang_{objective}_sft", RUNS / start, folder, 10 if small else 600, 2e-3, 4, length=240)
        model, tokenizer, _ = load_run(RUNS / f"tang_{objective}_sft", "cpu")
        judge = model if objective == "ar" else judge
        before, _, _ = load_run(RUNS / start, "cpu")
        end = {"eos": "late"} if objective == "diffusion" else {}  # or it falls silent (chapter 14)
        models[objective] = {
            "bound": bound(before, tokenizer, [poem["text"] for poem in unseen], score_end=False),
            "matched": {way: matched(model, tokenizer, those, random.Random(1)) for way, those in asked.items()},
            "exact_match": asked_both_ways(model, tokenizer, asked, gen_length=16, **end),
            "speed": speeds(model, tokenizer, asked["forward"][:100], 16, (2, 4, 8, 16), judge, **end),
            "training": training,
            "settings": {"gen_length": 16, "poems": len(unseen), "temperature": 0.0, "masks": 32, **end}}
        print(objective, models[objective], flush=True)
    return {"models": models}


PARTS = {"toy": toy_twins, "poetry": poetry_twins}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="a minute, to see whether the road is free")
    parser.add_argument("--measure", action="store_true", help="measure the fine-tuned runs that are there")
    parser.add_argument("--out", type=Path, default=Path("nbs/results/twins_cpu.json"))
    ARGS = parser.parse_args()
    for part in ARGS.parts:
        found = PARTS[part](ARGS.small)
        report = read_json(ARGS.out) if ARGS.out.exists() else {}
        report |= {"machine": machine_record(torch.device("cpu")) | {"seed": 0}, part: found}
        write_json(ARGS.out, report)
