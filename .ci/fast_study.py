"""The long measurements of chapter 13, into nbs/results/fast_cpu.json (about half an hour on one core).

    python .ci/fast_study.py quality few_greedy few_drawn toy    # on the toy model whose weights are in nbs/weights
    python .ci/fast_study.py poetry_greedy poetry_drawn    # needs runs/tang_ar and runs/tang_diffusion_from_ar
    python .ci/fast_study.py toy --small          # the same road in seconds, numbers without worth

Each part replaces its own entry of the file. Seconds are those this process computed, on one thread.
"""
import argparse
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanollada import toy
from nanollada.ar import ar_terms, decode
from nanollada.backbone import Backbone, BackboneConfig, load_run
from nanollada.core import make_generator, read_json, write_json
from nanollada.corpus import read_documents
from nanollada.fast import VARIANTS, fast_generate, few_passes, machine_record
from nanollada.guidance import trim_answers
from nanollada.tokenizer import encode, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "nbs" / "results" / "fast_cpu.json"
FREE = ("toy fact", "colour", "toy", "tool fact", "tool", "friend fact", "verb", "feeling")  # choices that depend on nothing
DIALS = {  # a model of open text is seldom sure: its dials must be bolder
    "toy": {"threshold": (0.99, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2), "factor": (0.25, 0.5, 1.0, 2.0, 4.0), "settled": (4, 3, 2, 1),
            "entropy_bounded": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "hierarchical": (0.99, 0.95, 0.9, 0.8, 0.6, 0.4)},
    "poetry": {"threshold": (0.9, 0.5, 0.3, 0.2, 0.1, 0.05), "factor": (1.0, 2.0, 4.0, 8.0, 16.0), "settled": (4, 3, 2, 1),
               "entropy_bounded": (0.3, 1.0, 3.0, 10.0, 30.0), "hierarchical": (0.9, 0.5, 0.3, 0.2, 0.1)},
}


@dataclass
class Bench:
    "The toy model and everything needed to judge it."
    model: Backbone
    tokenizer: object
    language: toy.ToyLanguage

    def prompts(self, n: int, seed: int) -> Tensor:
        "First sentences (n, 17) of stories that no setting was chosen on."
        openings = [story.split(". ")[0] + "." for story in toy.sample(n, seed, self.language)]
        return torch.tensor([[self.tokenizer.bos_token_id, *self.tokenizer.encode(opening)] for opening in openings])

    def stories(self, ids: Tensor) -> list[dict | None]:
        "The choices of the first story of each row, None where it is not grammatical."
        answers = trim_answers(ids, self.tokenizer.eos_token_id, 1)
        return [toy.read_story(self.tokenizer.decode(answer), self.language) for answer in answers]

    def judge(self, ids: Tensor) -> Tensor:
        "1 for a grammatical story, else 0."
        return torch.tensor([float(story is not None) for story in self.stories(ids)])


def open_toy() -> Bench:
    "As at the beginning of chapter 13."
    words = {name: text.partition("|")[0] for name, text in toy.ENGLISH["words"].items()}
    language = toy.ToyLanguage("common", words, toy.ENGLISH["sentences"], toy.ENGLISH["asks"], toy.RULES)
    tokenizer = train_tokenizer(toy.sample(3000, 0, language), 2000)
    shape = BackboneConfig(len(tokenizer), 96, 4, 4, None, 256, 1024, objective="diffusion", shift=True,
                           mask_token_id=tokenizer.mask_token_id, qk_norm=True)
    model = Backbone(shape).eval()
    weights = load_file(ROOT / "nbs" / "weights" / "13_fast.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return Bench(model, tokenizer, language)


def mean_se(scores: Tensor) -> list[float]:
    "Mean and standard error."
    scores = scores.double()
    return [round(scores.mean().item(), 5), round((scores.std() / len(scores) ** 0.5).item(), 5)]


def in_batches(write, prompts: Tensor, rows: int) -> Tensor:
    "Apply a writer to some rows at a time."
    return torch.cat([write(part) for part in prompts.split(rows)])


PLAN = ((32, ("one_per_pass", "one_per_pass_dual", "threshold_dual", "threshold_dual_near", "threshold_ahead", "settled_ahead",
              "factor_ahead", "entropy_bounded_ahead", "hierarchical_ahead")),  # block length, variants
        (16, ("one_per_pass", "threshold_prefix", "threshold_dual", "threshold_dual_near")))


def quality(small: bool) -> dict:
    "Grammatical share at 256 tokens against the plain loop with the same blocks on the same prompts. The first story counts."
    bench, found = open_toy(), {}
    n, mask_id, eos_id = (4 if small else 512), bench.model.cfg.mask_token_id, bench.tokenizer.eos_token_id
    prompts = bench.prompts(n, seed=1001)
    for length, names in PLAN:
        for name in names:  # eos_id ends a row when its first story is complete: the same story, sooner
            began, rules = time.process_time(), VARIANTS[name] | dict(block_length=length, eos_id=eos_id)
            ids = in_batches(lambda rows: fast_generate(bench.model, rows, mask_id, 256, **rules), prompts, 128)
            score, told = bench.judge(ids), trim_answers(ids, eos_id, 1)
            if name == "one_per_pass":  # the answer of `plain_loop`, token for token
                first, reference = told, score
            same = torch.tensor([float(a == b) for a, b in zip(told, first)])
            label = "plain_loop" if name == "one_per_pass" else name
            found[f"{label}, {length}"] = {"variant": label, "block_length": length, "share": mean_se(score),
                                           "difference": mean_se(score - reference), "same_story": mean_se(same)}
            print(found[f"{label}, {length}"], f"{time.process_time() - began:.0f} s", flush=True)
    return {"prompts": n, "gen_length": 256, "variants": found}


def more(small: bool) -> dict:
    "The recommended variant against the plain loop on four times as many prompts (12 minutes)."
    bench, score = open_toy(), {}
    n, mask_id, eos_id = (4 if small else 2048), bench.model.cfg.mask_token_id, bench.tokenizer.eos_token_id
    prompts = bench.prompts(n, seed=3001)
    for name in ("one_per_pass", "settled_ahead"):
        rules = VARIANTS[name] | dict(block_length=32, eos_id=eos_id)
        ids = in_batches(lambda rows: fast_generate(bench.model, rows, mask_id, 256, **rules), prompts, 128)
        score[name] = bench.judge(ids)
    plain, ours = score["one_per_pass"], score["settled_ahead"]
    return {"prompts": n, "plain_loop": mean_se(plain), "settled_ahead": mean_se(ours), "difference": mean_se(ours - plain)}


def choice_nats(stories: list[dict | None]) -> float:
    "Entropy of the free choices of the grammatical stories, summed over the choices (exact language: 9.01 nats)."
    good = [story for story in stories if story is not None]
    total = 0.0
    for slot in FREE if len(good) > 1 else ():
        p = torch.tensor(list(Counter(story[slot] for story in good).values()), dtype=torch.float64) / len(good)
        total -= (p * p.log()).sum().item() - (len(p) - 1) / (2 * len(good))  # Miller and Madow's correction
    return total


def few(heat: float, small: bool) -> dict:
    "A whole answer of 48 tokens in 5, 10 and 20 passes: schedules, orders, correctors."
    bench = open_toy()
    n, mask_id = (8 if small else 384), bench.model.cfg.mask_token_id
    prompts = bench.prompts(n, seed=1002)
    methods = {f"{schedule}, corrector {c}": dict(schedule=schedule, corrector=c)
               for schedule in ("uniform", "cosine", "entropy") for c in (0.0, 0.5, 1.0)}
    methods |= {f"random order, corrector {c}": dict(remasking="random", corrector=c) for c in (0.0, 0.5)}
    table = sum(toy.entropy_table(bench.language)[slot] for slot in FREE)
    found = []
    for passes in (5, 10, 20, 48):
        for name, settings in methods.items():
            is_plain = name in ("uniform, corrector 0.0", "random order, corrector 0.0")
            if (passes == 48 and not is_plain) or (heat == 0 and "random" in name):
                continue
            generator = make_generator(0, name, passes)
            ids = in_batches(lambda rows: few_passes(bench.model.denoise, rows, mask_id, 48, passes, temperature=heat,
                                                     generator=generator, **settings), prompts, 128)
            stories = bench.stories(ids)
            score = torch.tensor([float(story is not None) for story in stories])
            found.append({"method": name, "passes": passes, "share": mean_se(score), "choice_nats": round(choice_nats(stories), 3)})
            print(found[-1], flush=True)
    return {"prompts": n, "gen_length": 48, "temperature": heat, "language_choice_nats": round(table, 3), "runs": found}


def settings_of(rule: str, value: float) -> dict:
    "A point of the frontier as settings of `fast_generate`."
    dials = {"factor": {"factor": value}, "entropy_bounded": {"gamma": value}, "settled": {"patience": int(value)},
             "threshold": {"threshold": value}, "hierarchical": {"threshold": value, "low_threshold": value / 2}}
    return {"rule": "threshold" if rule == "settled" else rule} | dials[rule]


def sweep(dials: dict, model: Backbone, prompts: Tensor, n: int, rows: int, score, small: bool, **common) -> list[dict]:
    "Every rule and dial, the uncached reference and the cached one: speed, passes, and what `score` says of the ids."
    mask_id, found, ways = model.cfg.mask_token_id, [], [("uncached", 0, dict(rule="quota", cache="none")),
                                                        ("one_per_pass", 0, dict(rule="quota", refresh="near"))]
    ways += [(rule, value, settings_of(rule, value) | dict(refresh="near"))
             for rule, values in dials.items() for value in (values[-1:] if small else values)]
    first = None
    for rule, value, settings in ways:
        settings, ids, nfe, began = common | settings, [], 0, time.process_time()
        for number, part in enumerate(prompts.split(rows)):
            stats = {}
            ids.append(fast_generate(model, part, mask_id, n, block_length=16, stats=stats, **settings,
                                     generator=make_generator(0, "sweep", number)))
            nfe += stats["nfe"]
        seconds, ids = time.process_time() - began, torch.cat(ids)
        first = ids if first is None else first
        same = (ids == first)[:, prompts.shape[1]:].float().mean(1)
        found.append({"rule": rule, "dial": value, "tokens_per_second": round(len(prompts) * n / seconds, 1),
                      "tokens_per_pass": round(n * -(-len(prompts) // rows) / nfe, 3), "same_tokens": mean_se(same), **score(ids)})
        print(found[-1], flush=True)
    return found


def toy_frontier(small: bool) -> dict:
    "The frontier on the toy model."
    bench = open_toy()
    prompts = bench.prompts(16 if small else 512, seed=1003)
    runs = sweep(DIALS["toy"], bench.model, prompts, 48, 16, lambda ids: {"quality": mean_se(bench.judge(ids))}, small)
    return {"prompts": len(prompts), "gen_length": 48, "batch_size": 16, "runs": runs}


def texture(ar: Backbone, eos_id: int, start: int, ids: Tensor) -> dict:
    "Nats per token of what was written (to the first end mark) under the autoregressive twin, and its variety."
    after = ids[:, start:]
    kept = ((after == eos_id).cumsum(1) - (after == eos_id).long() == 0)  # the end mark itself counts
    real = torch.cat([torch.zeros_like(ids[:, :start], dtype=torch.bool), kept], dim=1)
    with torch.no_grad():
        nats = torch.cat([ar_terms(ar, part, scored) for part, scored in zip(ids.split(32), real.split(32))])
    counts = kept.sum(1)
    words = [row[keep].tolist() for row, keep in zip(after, kept)]
    pairs = [pair for row in words for pair in zip(row, row[1:])]
    single = torch.tensor(list(Counter(word for row in words for word in row).values()), dtype=torch.float64)
    p = single / single.sum()
    mean = nats.sum() / counts.sum()
    error = ((nats - mean * counts).std() / len(ids) ** 0.5 / counts.float().mean()).item()  # of a ratio
    return {"quality": [round(mean.item(), 4), round(error, 4)], "distinct_2": round(len(set(pairs)) / max(1, len(pairs)), 4),
            "unigram_nats": round(-(p * p.log()).sum().item(), 4), "length": round(counts.float().mean().item(), 1)}


def poetry(heat: float, small: bool) -> dict:
    "The frontier on poems: the first line of held-out poems is given, 48 tokens are written."
    model, tokenizer, _ = load_run(ROOT / "runs" / "tang_diffusion_from_ar", "cpu")
    ar, _, _ = load_run(ROOT / "runs" / "tang_ar", "cpu")
    poems = [[tokenizer.bos_token_id, *encode(tokenizer, text)] for text in read_documents(ROOT / "data" / "tang" / "valid.jsonl")]
    P, n, eos_id = 17, 48, tokenizer.eos_token_id  # the first line and a little more
    whole = torch.tensor([poem[: P + n] for poem in poems if len(poem) >= P + n][: 4 if small else 64])
    score, prompts = (lambda ids: texture(ar, eos_id, P, ids)), whole[:, :P]
    found = {"prompts": len(whole), "prompt_length": P, "gen_length": n, "batch_size": 16, "temperature": heat, "human": score(whole)}
    found["runs"] = sweep(DIALS["poetry"], model, prompts, n, 16, score, small, temperature=heat)
    began = time.process_time()
    ids = torch.cat([decode(ar, part, n, temperature=heat, generator=make_generator(0, "ar")) for part in prompts.split(16)])
    found["ar"] = {"tokens_per_second": round(len(whole) * n / (time.process_time() - began), 1), **score(ids)}
    return found


def main() -> None:
    parts = {"quality": quality, "more": more, "few_greedy": partial(few, 0.0), "few_drawn": partial(few, 1.0), "toy": toy_frontier,
             "poetry_greedy": partial(poetry, 0.0), "poetry_drawn": partial(poetry, 0.7)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--small", action="store_true", help="a few rows, and nothing is stored")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.parts:
        began = time.process_time()
        result = parts[name](chosen.small)
        result |= {"machine": machine_record(torch.device("cpu")), "seconds": round(time.process_time() - began)}
        if not chosen.small:
            write_json(OUT, (read_json(OUT) if OUT.is_file() else {}) | {name: result})


if __name__ == "__main__":
    main()
