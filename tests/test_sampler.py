"""The sampler: official answers, schedules, distributions, batches, errors."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hash_oracle import EOS_ID, MASK_ID, hash_oracle

from nanollada.backbone import Denoiser, as_denoiser
from nanollada.core import UserError
from nanollada.sampler import (CONFIDENCE_RULES, RANDOM_RULES, GuidedDenoiser, Policy, blocks_of, by_threshold, choose_tokens, confidence,
                               left_pad, most_confident, num_transfer_tokens, prompt_canvas, write)
from oracles import exact_sample_distribution

GOLDEN = json.loads((Path(__file__).parent / "golden" / "official_generate.json").read_text())
RULES = CONFIDENCE_RULES + RANDOM_RULES


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def fill(denoiser, canvas, where, mask_id, policy=None, on_step=None, **more):
    "Write to the end, and show each step to `on_step`."
    for step in write(denoiser, canvas, policy, mask_id=mask_id, maskable=where, **more):
        if on_step is not None:
            on_step(step)
    return step.ids


def generate(denoiser, prompt, mask_id, gen_length, steps=None, block_length=None, attention_mask=None, **more):
    "As `sampler.generate`, with steps to watch."
    made = prompt_canvas(prompt, mask_id, gen_length, attention_mask)
    return fill(denoiser, made["canvas"], made["maskable"], mask_id, attention_mask=made["attention_mask"], steps=steps,
                block_length=block_length, **more)


class Counted:
    "A denoiser that counts its calls, answers in a given dtype, and notes whether it was told of padding."

    def __init__(self, denoiser, dtype=torch.float64):
        self.denoiser, self.dtype, self.calls, self.padded = denoiser, dtype, 0, False

    def __call__(self, ids, **kwargs):
        self.calls, self.padded = self.calls + 1, self.padded or bool(kwargs)
        return self.denoiser(ids, **kwargs).to(self.dtype)


class TableDenoiser:
    "True conditionals of a joint distribution over strings; the last id is the mask."

    def __init__(self, joint):
        self.joint, self.width = joint, joint.shape[0]
        self.strings = torch.cartesian_prod(*[torch.arange(self.width)] * joint.ndim)

    def __call__(self, ids):
        fits = ((ids[:, None] == self.strings) | (ids[:, None] == self.width - 1)).all(-1)
        onehot = torch.nn.functional.one_hot(self.strings, self.width).double()
        return torch.einsum("bn,nlv->blv", fits * self.joint.reshape(-1), onehot).log()


def random_table(seed, length=3, letters=3):
    joint = torch.zeros((letters + 1,) * length, dtype=torch.float64)
    weights = torch.rand((letters,) * length, generator=seeded(seed), dtype=torch.float64) ** 4
    joint[(slice(letters),) * length] = weights / weights.sum()
    return TableDenoiser(joint)


def blank(table, n=None):
    canvas = torch.full((table.joint.ndim,), table.width - 1)
    return canvas if n is None else canvas.expand(n, -1)


def draw(table, n, seed, **options):
    canvas = blank(table, n)
    return fill(
        table,
        canvas,
        canvas == table.width - 1,
        table.width - 1,
        Policy(**options),
        generator=seeded(seed),
    )


# The official answers


def replay(case, denoiser, **changes):
    settings = {
        key: case[key]
        for key in ("steps", "gen_length", "block_length", "temperature", "cfg_scale", "remasking")
    }
    generator = None if case["seed"] is None else seeded(case["seed"])
    return generate(
        denoiser,
        torch.tensor(case["prompt_ids"]),
        MASK_ID,
        generator=generator,
        attention_mask=torch.tensor(case["attention_mask"]),
        **(settings | changes),
    )


def test_oracle_is_the_one_described():
    check = GOLDEN["oracle_check"]
    logits = hash_oracle(torch.tensor(check["ids"]))
    assert logits.argmax(-1).tolist() == check["argmax"]
    torch.testing.assert_close(logits[0, 4], torch.tensor(check["logits_0_4"], dtype=torch.float64))
    torch.testing.assert_close(logits[1, 0], torch.tensor(check["logits_1_0"], dtype=torch.float64))
    assert logits.sum().item() == pytest.approx(check["sum"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", GOLDEN["generate"], ids=lambda case: case["name"])
def test_official_answers(case, dtype):
    denoiser = Counted(hash_oracle, dtype)
    assert replay(case, denoiser).tolist() == case["output_ids"]
    assert denoiser.calls == min(
        case["forward_calls"], case["gen_length"]
    )  # steps that commit nothing are skipped
    assert denoiser.padded == (0 in sum(case["attention_mask"], []))


def test_guidance_needs_no_attention_mask():
    case = next(case for case in GOLDEN["generate"] if case["cfg_scale"])
    ids = generate(
        hash_oracle,
        torch.tensor(case["prompt_ids"]),
        MASK_ID,
        case["gen_length"],
        case["steps"],
        case["block_length"],
        cfg_scale=case["cfg_scale"],
    )
    assert ids.tolist() == case["output_ids"]


@pytest.mark.parametrize("case", GOLDEN["num_transfer_tokens"])
def test_official_schedule(case):
    assert num_transfer_tokens(case["mask_counts"], case["steps"]).tolist() == case["answer"]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_schedule_shares_evenly(steps):
    counts = torch.arange(40)
    plan = num_transfer_tokens(counts, steps)
    assert plan.shape == (40, steps) and torch.equal(plan.sum(1), counts)
    assert (plan.max(1).values - plan.min(1).values <= 1).all() and (plan.diff(dim=1) <= 0).all()


def plain_official(prompt, length, steps, block, cfg, forbidden, late):
    "The official loop at temperature 0, one row, written down naively."
    row, p = prompt + [MASK_ID] * length, len(prompt)
    for start in range(p, p + length, block):
        for quota in num_transfer_tokens([block], steps * block // length)[0].tolist():
            logits = hash_oracle(torch.tensor([row]))[0]
            if cfg:
                other = hash_oracle(torch.tensor([[MASK_ID] * p + row[p:]]))[0]
                logits = other + (cfg + 1) * (logits - other)
            logits[:, forbidden] = -math.inf
            best = logits.argmax(-1)
            logits[:, late] = -math.inf
            sure = logits.softmax(-1)
            open_now = [i for i in range(start, start + block) if row[i] == MASK_ID]
            ranked = sorted(open_now, key=lambda i: (-sure[i, best[i]].item(), i))
            for i in ranked[:quota]:
                row[i] = best[i].item()
    return row


@pytest.mark.parametrize("seed", range(12))
def test_same_as_a_naive_loop(seed):
    g = seeded(seed)
    prompt = torch.randint(0, MASK_ID, (int(torch.randint(0, 7, (1,), generator=g)),), generator=g).tolist()
    length, steps, block = [(12, 12, 12), (12, 6, 4), (12, 3, 12), (16, 8, 4)][seed % 4]
    cfg, forbidden, late = (
        [0.0, 1.0][seed % 2],
        [[], [EOS_ID, 5]][seed // 2 % 2],
        [[], [2, 3, 30, 31, 32]][seed // 4 % 2],
    )
    ids = generate(
        hash_oracle,
        torch.tensor([prompt], dtype=torch.long).view(1, -1),
        MASK_ID,
        length,
        steps,
        block,
        cfg_scale=cfg,
        suppress_tokens=forbidden,
        suppress_confidence=late,
    )
    assert ids[0].tolist() == plain_official(prompt, length, steps, block, cfg, forbidden, late)


# The pieces


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_tempered_softmax(temperature):
    n, logits = 40_000, torch.tensor([1.0, -1.0, 0.3, 2.0, -math.inf], dtype=torch.float64)
    u = torch.rand(n, 5, generator=seeded(0), dtype=torch.float64)
    p, q = (
        (logits / temperature).softmax(-1),
        choose_tokens(logits.expand(n, -1), temperature, u).bincount(minlength=5) / n,
    )
    assert ((p - q).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def test_argmax_at_temperature_zero_takes_the_first():
    assert choose_tokens(torch.tensor([[1.0, 2.0, 2.0]]), 0.0).tolist() == [1]


def test_a_zero_uniform_is_harmless():
    u = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64)
    assert choose_tokens(torch.tensor([[9.0, 0.0, 1.0]]), 1.0, u).tolist() == [2]


def test_confidence_is_what_it_says():
    logits, tokens = torch.randn(50, 7, generator=seeded(1)), torch.randint(0, 7, (50,), generator=seeded(2))
    p = logits.double().softmax(-1)
    best = p.sort(-1, descending=True).values
    wanted = {
        "low_confidence": p[torch.arange(50), tokens],
        "margin": best[:, 0] - best[:, 1],
        "entropy": (p * p.log()).sum(-1),
    }
    for rule, value in wanted.items():
        torch.testing.assert_close(confidence(logits.double(), tokens, rule), value)
        assert confidence(logits.bfloat16(), tokens, rule).dtype == torch.float32
    assert confidence(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]), "entropy").tolist() == [0.0]


@pytest.mark.parametrize("seed", range(20))
def test_most_confident_by_sorting(seed):
    score = torch.randint(0, 4, (5, 9), generator=seeded(seed)).float()  # many ties
    score[torch.rand(5, 9, generator=seeded(seed)) < 0.3] = -math.inf
    quota = torch.randint(0, 10, (5,), generator=seeded(seed))
    for row, k, taken in zip(score.tolist(), quota.tolist(), most_confident(score, quota).tolist()):
        ranked = sorted((i for i in range(9) if row[i] > -math.inf), key=lambda i: (-row[i], i))
        assert [i for i in range(9) if taken[i]] == sorted(ranked[:k])


def test_blocks_count_the_wanted_positions():
    where = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]]).bool()
    found = [(lo, hi, inside.nonzero().tolist()) for lo, hi, inside in blocks_of(where, 2)]
    assert found == [(0, 3, [[0, 1], [0, 2], [1, 0]]), (4, 6, [[0, 0], [0, 1]]), (6, 7, [[0, 0]])]


# What is drawn


@pytest.mark.parametrize("rule", ["margin", "entropy", "random"])
@pytest.mark.parametrize("seed", range(3))
def test_one_token_a_step_is_exact(rule, seed):
    table = random_table(seed)
    drawn = exact_sample_distribution(table, blank(table), table.width - 1, steps=3, remasking=rule)
    torch.testing.assert_close(drawn, table.joint, rtol=0, atol=1e-12)


def test_low_confidence_is_not_exact():
    table = random_table(0)
    drawn = exact_sample_distribution(table, blank(table), table.width - 1, steps=3)
    assert drawn.sum().item() == pytest.approx(1) and (drawn - table.joint).abs().sum() > 0.05


@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_the_product_of_the_marginals(rule):
    table = random_table(4)
    p = table(blank(table, 1))[0].softmax(-1)
    drawn = exact_sample_distribution(table, blank(table), table.width - 1, steps=1, remasking=rule)
    torch.testing.assert_close(drawn, torch.einsum("a,b,c->abc", *p), rtol=0, atol=1e-12)


def ancestral_by_times(table, steps):
    "The reverse process written as an average over the steps at which each position is revealed."
    mask_id, length, total = table.width - 1, table.joint.ndim, torch.zeros_like(table.joint)
    for x in itertools.product(range(mask_id), repeat=length):
        for times in itertools.product(range(steps), repeat=length):
            p = 1.0
            for step in range(steps):
                seen = torch.tensor([[v if t < step else mask_id for v, t in zip(x, times)]])
                probs = table(seen)[0].softmax(-1)
                p *= math.prod(probs[i, x[i]].item() for i in range(length) if times[i] == step)
            total[x] += p / steps**length
    return total


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_ancestral_against_enumeration_of_times(steps):
    table = random_table(5, letters=2)
    drawn = exact_sample_distribution(table, blank(table), 2, steps, "ancestral")
    torch.testing.assert_close(drawn, ancestral_by_times(table, steps), rtol=0, atol=1e-12)


def test_ancestral_approaches_the_truth():
    table = random_table(6)
    far = [
        (exact_sample_distribution(table, blank(table), 3, k, "ancestral") - table.joint).abs().sum()
        for k in (1, 4, 16, 64)
    ]
    assert far[0] > 2 * far[1] > 4 * far[2] > 8 * far[3]  # the error falls like one over the steps


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3])
def test_draws_follow_the_exact_distribution(rule, steps):
    table, n = random_table(7), 8000
    p = exact_sample_distribution(table, blank(table), 3, steps, rule).reshape(-1)
    ids = draw(table, n, seed=steps, steps=steps, temperature=1.0, remasking=rule)
    q = (ids * torch.tensor([16, 4, 1])).sum(1).bincount(minlength=64) / n
    assert (
        (p - q).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-12
    ).all()  # 64 cells: 4.5 is one false alarm in 2000


def test_bernoulli_at_temperature_zero_is_exact_too():
    table, n = random_table(8), 4000
    p = exact_sample_distribution(table, blank(table), 3, 2, "random_bernoulli", temperature=0.0).reshape(-1)
    ids = draw(table, n, seed=0, steps=2, remasking="random_bernoulli")
    q = (ids * torch.tensor([16, 4, 1])).sum(1).bincount(minlength=64) / n
    assert ((p - q).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-12).all() and (p > 0).sum() < 8


def test_exact_distribution_keeps_what_is_given():
    table = random_table(9)
    drawn = exact_sample_distribution(table, torch.tensor([3, 1, 3]), 3, 2, "entropy")
    wanted = table.joint[:, 1] / table.joint[:, 1].sum()
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-12)


# The loop


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options", [{}, {"steps": 4}, {"steps": 40}, {"block_length": 3, "steps": 8}, {"temperature": 1.0}]
)
def test_fills_everything_and_nothing_else(rule, options):
    g = seeded(3)
    canvas = torch.randint(0, MASK_ID, (3, 14), generator=g)
    where = torch.rand(3, 14, generator=g) < torch.tensor([[0.2], [0.5], [0.8]])
    needed = -(-int(where.sum(1).max()) // options.get("block_length", 14))
    if "block_length" in options:
        options = options | {"steps": 2 * needed}
    seen = []
    policy = Policy(remasking=rule, **options)
    ids = fill(hash_oracle, canvas, where, MASK_ID, policy, seen.append, generator=g)
    assert torch.equal(ids[~where], canvas[~where]) and (ids != MASK_ID).all()
    assert torch.equal(sum(step.committed.int() for step in seen), where.int())  # each position once
    assert [step.nfe for step in seen] == list(range(1, len(seen) + 1)) and torch.equal(seen[-1].ids, ids)
    assert [step.block for step in seen] == sorted(step.block for step in seen)
    for step in seen:
        assert torch.equal(step.ids[step.committed], step.proposed[step.committed])
        assert step.confidence[step.committed].isfinite().all()


@pytest.mark.parametrize("rule", CONFIDENCE_RULES)
def test_a_step_tells_probabilities(rule):
    for step in write(hash_oracle, torch.full((2, 9), MASK_ID), mask_id=MASK_ID, block_length=4, remasking=rule):
        seen = step.ids.masked_fill(step.committed | step.after, MASK_ID)  # the canvas before the pass
        p = hash_oracle(seen)[..., :MASK_ID].softmax(-1)
        here = step.confidence.isfinite()
        wanted = p.gather(-1, step.proposed[..., None].clamp(max=MASK_ID - 1))[..., 0]
        assert here.any() and torch.allclose(step.confidence[here], wanted[here], atol=1e-12)


def test_blocks_go_left_to_right():
    seen = []
    generate(hash_oracle, torch.tensor([[3, 4]]), MASK_ID, 12, 12, 4, on_step=seen.append)
    where_to = [int(info.committed[0].nonzero()[0]) for info in seen]
    assert [(i - 2) // 4 for i in where_to] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_rows_are_independent(rule, temperature, cfg_scale):
    prompts = [[24, 38, 9], [31, 45, 16, 34, 9, 31], [7], []]
    options = {"gen_length": 8, "steps": 4, "block_length": 4, "remasking": rule, "cfg_scale": cfg_scale}
    if rule != "ancestral":
        options["temperature"] = temperature
    ids, real = left_pad(prompts, pad_id=0)
    together = generate(
        hash_oracle, ids, MASK_ID, attention_mask=real, generator=[seeded(i) for i in range(4)], **options
    )
    for i, prompt in enumerate(prompts):
        alone = generate(
            hash_oracle,
            torch.tensor([prompt], dtype=torch.long).view(1, -1),
            MASK_ID,
            generator=[seeded(i)],
            **options,
        )
        assert together[i, -8:].tolist() == alone[0, -8:].tolist()


def test_rows_with_fewer_masks_are_independent_too():
    canvas = torch.full((2, 10), MASK_ID)
    canvas[0, :7] = torch.arange(7)  # three masks; with ten steps seven of them are not for this row
    rules = Policy(steps=10, temperature=1.0)
    together = fill(hash_oracle, canvas, canvas == MASK_ID, MASK_ID, rules, generator=[seeded(0), seeded(1)])
    alone = fill(hash_oracle, canvas[:1], canvas[:1] == MASK_ID, MASK_ID, rules, generator=[seeded(0)])
    assert together[0].tolist() == alone[0].tolist()


@pytest.mark.parametrize("rule", RULES)
def test_same_seed_same_answer(rule):
    heat = 0.0 if rule == "ancestral" else 0.9
    a, b, c = (
        generate(
            hash_oracle,
            torch.tensor([[5, 6]]),
            MASK_ID,
            10,
            5,
            temperature=heat,
            remasking=rule,
            generator=seeded(seed),
        ).tolist()
        for seed in (1, 1, 2)
    )
    assert a == b != c


def tail_to_eos(ids, start):
    "Everything after the first EOS becomes EOS."
    ended = (ids[:, start:] == EOS_ID).cumsum(1) > 0
    return torch.cat([ids[:, :start], ids[:, start:].masked_fill(ended, EOS_ID)], 1)


def likes_eos(ids, attention_mask=None):
    logits = hash_oracle(ids, attention_mask)
    logits[..., EOS_ID] += 1.5
    return logits


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_length", [None, 4])
def test_early_stop_changes_nothing_before_eos(rule, block_length):
    heat, saved = 0.0 if rule in ("ancestral", "low_confidence") else 0.8, 0
    for seed in range(6):
        prompt = torch.randint(2, MASK_ID, (3, 4), generator=seeded(seed))
        full, early = [], []
        options = {
            "gen_length": 16,
            "steps": 16,
            "block_length": block_length,
            "temperature": heat,
            "remasking": rule,
        }
        streams = ([seeded(10 * seed + i) for i in range(3)] for _ in range(2))
        a = generate(likes_eos, prompt, MASK_ID, generator=next(streams), on_step=full.append, **options)
        b = generate(
            likes_eos, prompt, MASK_ID, generator=next(streams), on_step=early.append, eos_id=EOS_ID, **options
        )
        assert torch.equal(b, tail_to_eos(a, 4))
        saved += len(full) - len(early)
        assert len(early) <= len(full)
    assert saved > 0 or block_length is None  # without blocks the beginning may come last


def test_ancestral_skips_empty_steps():
    denoiser = Counted(hash_oracle)
    generate(denoiser, torch.tensor([[5]]), MASK_ID, 6, 600, remasking="ancestral", generator=seeded(0))
    assert denoiser.calls <= 6


def test_only_open_positions_are_asked_for():
    class Sparse(Denoiser):
        asked, mask_id = 0, MASK_ID

        def at(self, ids, places, attention_mask=None):
            Sparse.asked += len(places)
            return hash_oracle(ids).flatten(0, 1)[places]

    ids = generate(Sparse(), torch.tensor([[41, 10, 26, 44, 19]]), MASK_ID, 16, 8, 8)
    assert ids.tolist() == GOLDEN["generate"][1]["output_ids"]
    assert Sparse.asked == 2 * (8 + 6 + 4 + 2)


def test_the_mask_is_never_predicted():
    def leaky(ids):
        return hash_oracle(ids).index_fill(-1, torch.tensor([MASK_ID]), 9.0)

    prompt = torch.tensor([[4, 5]])
    assert (generate(leaky, prompt, MASK_ID, 8, 8) != MASK_ID).all()
    assert (generate(leaky, prompt, MASK_ID, 8, 8, subs=False)[:, 2:] == MASK_ID).all()


def test_mask_id_outside_the_vocabulary():
    ids = generate(lambda ids: hash_oracle(ids)[..., :MASK_ID], torch.tensor([[4, 5]]), MASK_ID, 8, 8)
    assert ids.tolist() == generate(hash_oracle, torch.tensor([[4, 5]]), MASK_ID, 8, 8).tolist()


def test_padding_may_be_anything():
    mask = torch.tensor([[0, 0, 1, 1]])
    answers = [
        generate(
            hash_oracle, torch.tensor([[pad, pad, 7, 8]]), MASK_ID, 6, 6, attention_mask=mask, cfg_scale=0.5
        )[0, 4:].tolist()
        for pad in (0, 3, MASK_ID)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_the_input_is_left_alone():
    prompt, canvas = torch.tensor([[4, 5]]), torch.full((1, 4), MASK_ID)
    generate(hash_oracle, prompt, MASK_ID, 4, 4)
    fill(hash_oracle, canvas, canvas == MASK_ID, MASK_ID, Policy())
    assert prompt.tolist() == [[4, 5]] and (canvas == MASK_ID).all()


def test_half_precision_logits():
    ids = generate(
        lambda ids: hash_oracle(ids).bfloat16(),
        torch.tensor([[4, 5]]),
        MASK_ID,
        8,
        4,
        temperature=0.5,
        generator=seeded(0),
    )
    assert (ids != MASK_ID).all()


def test_steps_beyond_the_masks_cost_nothing():
    "attack: `--steps 10^30`"
    for rule in RULES:
        denoiser = Counted(hash_oracle)
        ids = generate(denoiser, torch.tensor([[4, 5]]), MASK_ID, 6, 10**30, remasking=rule, generator=seeded(0))
        assert denoiser.calls <= 6 and (ids != MASK_ID).all()


BAD_LOGITS = {
    "all NaN": lambda ids: hash_oracle(ids) * math.nan,
    "one NaN": lambda ids: hash_oracle(ids).index_fill(-1, torch.tensor([3]), math.nan),
    "one place": lambda ids: hash_oracle(ids).index_fill(1, torch.tensor([5]), math.nan),
    "infinite": lambda ids: hash_oracle(ids).index_fill(-1, torch.tensor([3]), math.inf),
}


@pytest.mark.parametrize("name", BAD_LOGITS)
@pytest.mark.parametrize("options", [
    {}, dict(steps=2), dict(block_length=4), dict(block_length=1), dict(eos_id=EOS_ID), dict(patience=1), dict(temperature=1.0),
    *(dict(remasking=rule) for rule in RULES[1:]), dict(commit=by_threshold), dict(commit=by_threshold, patience=1),
    dict(commit=by_threshold, eos_id=EOS_ID, temperature=1.0), dict(suppress_confidence=(1, 3)),
])  # fmt: skip
def test_nan_logits_end_in_an_error(name, options):
    "attack C: no mode of writing may loop for ever, or write something, on logits that are NaN"
    denoiser = Counted(BAD_LOGITS[name])
    with pytest.raises(UserError, match="NaN"):
        generate(denoiser, torch.tensor([[4, 5]]), MASK_ID, 8, generator=seeded(0), **({} | options))
    assert denoiser.calls <= 8


def test_a_function_that_commits_nothing_is_an_error():
    with pytest.raises(UserError, match="chose nothing"):
        generate(hash_oracle, torch.tensor([[4, 5]]), MASK_ID, 8, commit=lambda score, policy: score > 2)


# Guided denoisers


def test_guidance_formula_and_shapes():
    "code.md 3: int64 places of a guided denoiser are guided too"
    ids, places = torch.randint(0, MASK_ID, (3, 6), generator=seeded(0)), torch.tensor([0, 4, 7, 17])
    drop = torch.arange(6)[None] < 2
    c, u = hash_oracle(ids), hash_oracle(ids.masked_fill(drop, MASK_ID))
    guided = GuidedDenoiser(as_denoiser(hash_oracle, MASK_ID), drop, 1.5)
    torch.testing.assert_close(guided(ids), u + 2.5 * (c - u))
    torch.testing.assert_close(guided.at(ids, places), guided(ids).flatten(0, 1)[places])


# Bad input


GOOD = {
    "denoiser": hash_oracle,
    "prompt": torch.tensor([[4, 5]]),
    "mask_id": MASK_ID,
    "gen_length": 8,
    "steps": 8,
}


@pytest.mark.parametrize("wrong, message", [
    ({"steps": 0}, "steps is 0"),
    ({"steps": 2.5}, "whole number"),
    ({"steps": 3, "block_length": 4}, "3 steps do not divide among 2 blocks"),
    ({"block_length": 0}, "block_length is 0"),
    ({"gen_length": 0}, "gen_length is 0"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": 1e-300}, "temperature is 1e-300"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_k": 0}, "top_k is 0"),
    ({"patience": 0}, "patience is 0"),
    ({"commit": "best"}, "commit is best"),
    ({"limit": math.nan}, "limit is nan"),
    ({"remasking": "random", "commit": by_threshold}, "confidence"),
    ({"cfg_scale": -1.0}, "cfg_scale is -1.0"),
    ({"cfg_scale": math.nan}, "cfg_scale is nan"),
    ({"remasking": "best"}, "remasking is best"),
    ({"remasking": "ancestral", "temperature": 0.5}, "1 for ancestral"),
    ({"remasking": "random", "suppress_confidence": (1,)}, "for suppress_confidence"),
    ({"prompt": torch.tensor([4, 5])}, "expected int64 ids"),
    ({"prompt": torch.tensor([[4.0]])}, "expected int64 ids"),
    ({"prompt": torch.tensor([[4, MASK_ID]])}, "contains the mask id"),
    ({"attention_mask": torch.tensor([[1, 0]])}, "on the left"),
    ({"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask is"),
    ({"denoiser": lambda ids: hash_oracle(ids) * math.nan}, "NaN"),
    ({"denoiser": lambda ids: hash_oracle(ids).index_fill(-1, torch.tensor([3]), math.nan), "remasking": "random"}, "NaN"),
    ({"suppress_tokens": range(48)}, "suppressed"),
    ({"generator": [seeded(0), seeded(1)]}, "2 generators for 1 rows"),
])  # fmt: skip
def test_errors_say_what_is_wrong(wrong, message):
    with pytest.raises(UserError, match=message):
        generate(**(GOOD | wrong))


def test_canvas_errors():
    canvas = torch.tensor([[1, 2, MASK_ID]])
    for wrong, message in [
        ({"maskable": torch.zeros_like(canvas, dtype=torch.bool)}, "no masks"),
        ({"canvas": torch.tensor([[1, 2]])}, "no masks"),
        ({"canvas": canvas.float()}, "expected int64"),
        ({"attention_mask": torch.tensor([[1, 1]])}, "attention_mask is"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "no masks"),
        ({"mask_id": None}, "mask"),
    ]:
        with pytest.raises(UserError, match=message):
            write(**({"denoiser": hash_oracle, "canvas": canvas, "mask_id": MASK_ID} | wrong))
    with pytest.raises(UserError, match="steps is 0"):
        num_transfer_tokens([3], 0)
