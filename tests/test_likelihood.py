"""Likelihood: exact sums over masks, the golden references, honest error bars, batching, and every error message."""

import json
import math
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
from hash_oracle import MASK_ID, VOCAB, hash_oracle

from nanollada.backbone import Denoiser
from nanollada.core import UserError
from nanollada.elbo import exact_nelbo
from nanollada.likelihood import (
    bits_per_byte, chain_rule_log_likelihood, greedy_match, log_likelihood, log_likelihood_batch, score_choices,
)
from nanollada.sampler import generate
from oracles import order_log_probs

GOLDEN = json.loads((Path(__file__).parent / "golden" / "official_generate.json").read_text())["log_likelihood"]


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brute_force(denoiser, prompt, answer, mask_id, cfg_scale=0.0):
    "The expectation of Eq. 6, one mask at a time: l uniform on 1..L, a uniform subset of size l, weight L / l."
    length, total = len(answer), 0.0
    for size in range(1, length + 1):
        subsets = list(combinations(range(length), size))
        for subset in subsets:
            xt = torch.tensor(prompt + [mask_id if i in subset else v for i, v in enumerate(answer)])[None]
            logits = denoiser(xt)[0]
            if cfg_scale:
                un = xt.clone()
                un[0, : len(prompt)] = mask_id
                un = denoiser(un)[0]
                logits = un + (cfg_scale + 1) * (logits - un)
            logp = logits.log_softmax(-1)
            total += sum(logp[len(prompt) + i, answer[i]].item() for i in subset) * (length / size) / length / len(subsets)
    return total


class Counting:
    "A denoiser that remembers the shapes it saw, and whether it was given an attention mask."

    def __init__(self):
        self.calls = []

    def __call__(self, ids, attention_mask=None):
        self.calls.append((tuple(ids.shape), attention_mask is not None))
        return hash_oracle(ids, attention_mask)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"L={len(c['answer_ids'])}")
def test_golden_reference(case):
    args = hash_oracle, case["prompt_ids"], case["answer_ids"], MASK_ID
    exact = log_likelihood(*args, n_samples=256, cfg_scale=case["cfg_scale"])
    assert exact.standard_error == 0
    assert exact.mean == pytest.approx(case["reference"], abs=1e-9 + 4 * case["reference_se"])
    if len(case["answer_ids"]) > 1:  # few enough samples that it must draw: 15 masks for L = 5, 240 for L = 8
        n = 2 ** len(case["answer_ids"]) - 2  # one mask too few to try them all: 30 (7 replicates) or 254 (16)
        few = log_likelihood(*args, n_samples=n, cfg_scale=case["cfg_scale"], generator=stream(0))
        assert 0 < few.standard_error < 10
        assert abs(few.mean - case["reference"]) < 6 * few.standard_error  # Student's t with 6 degrees: 0.1 %


def test_tight_estimate_tells_the_reference_from_the_biased_expectation():
    case = GOLDEN[-1]
    tries = log_likelihood_batch(
        hash_oracle, [case["prompt_ids"]] * 100, [case["answer_ids"]] * 100, MASK_ID, n_samples=200, generator=stream(1)
    )
    mean, error = tries.mean.mean().item(), tries.standard_error.square().sum().sqrt().item() / 100
    assert abs(mean - case["reference"]) < 4 * error
    assert abs(mean - case["exact_official"]) > 4 * error


def test_one_token_is_one_forward_pass_and_exact():
    model = Counting()
    mean, error = log_likelihood(model, [1, 2], [3], MASK_ID, n_samples=1)
    assert model.calls == [((1, 3), False)] and error == 0
    exact = hash_oracle(torch.tensor([[1, 2, MASK_ID]]))[0, 2].log_softmax(-1)[3].item()
    assert mean == pytest.approx(exact, abs=1e-14)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("prompt", [[], [5, 9], [7, 7, 2, 30]])
def test_exact_equals_brute_force(prompt, cfg_scale):
    answer = [4, 40, 4, 11]
    found = log_likelihood(hash_oracle, prompt, answer, MASK_ID, cfg_scale=cfg_scale)
    assert found.mean == pytest.approx(brute_force(hash_oracle, prompt, answer, MASK_ID, cfg_scale), abs=1e-10)


def test_agrees_with_the_exact_bound_and_the_orders_of_chapter_7():
    x0, maskable = torch.tensor([[9, 4, 30, 31, 2, 8]]), torch.tensor([[False, True, True, True, True, True]])
    found = log_likelihood(hash_oracle, x0[0, :1], x0[0, 1:], MASK_ID).mean
    assert found == pytest.approx(-exact_nelbo(hash_oracle, x0, MASK_ID, maskable).item(), abs=1e-8)
    orders = order_log_probs(hash_oracle, x0, MASK_ID, maskable)[0].tolist()
    ours = [chain_rule_log_likelihood(hash_oracle, x0[0, :1], x0[0, 1:], MASK_ID, o) for o in permutations(range(5))]
    assert sorted(ours) == pytest.approx(sorted(orders), abs=1e-9)


def test_guidance_asks_for_both_rows_in_one_call():
    model = Counting()
    log_likelihood(model, [1, 2], [3, 4], MASK_ID, cfg_scale=1.0)
    assert model.calls == [((6, 4), False)]


def test_guidance_keeps_a_forbidden_token_forbidden():
    def no_mask(ids, attention_mask=None):
        logits = hash_oracle(ids, attention_mask)
        logits[..., MASK_ID] = -torch.inf
        return logits

    plain = log_likelihood(hash_oracle, [1, 2], [3, 4], MASK_ID, cfg_scale=1.0).mean
    assert log_likelihood(no_mask, [1, 2], [3, 4], MASK_ID, cfg_scale=1.0).mean == pytest.approx(plain, abs=1e-9)


def test_an_impossible_answer_has_likelihood_zero():
    def never_three(ids, attention_mask=None):
        logits = hash_oracle(ids, attention_mask)
        logits[..., 3] = -torch.inf
        return logits

    assert log_likelihood(never_three, [1], [3, 4], MASK_ID) == (-math.inf, 0)
    mean, error = log_likelihood(never_three, [1], [3] * 9, MASK_ID, n_samples=32)
    assert mean == -math.inf and error == math.inf


def test_error_bars_are_honest_over_many_models():
    z = []
    for seed in range(150):
        ids = torch.randint(2, VOCAB - 1, (11,), generator=stream(seed)).tolist()
        exact = log_likelihood(hash_oracle, ids[:4], ids[4:], MASK_ID)
        mean, error = log_likelihood(hash_oracle, ids[:4], ids[4:], MASK_ID, n_samples=48, generator=stream(1000 + seed))
        assert exact.standard_error == 0
        z.append((mean - exact.mean) / error)
    z = torch.tensor(z)
    student = math.sqrt(11 / 9)  # 48 samples, 12 replicates: Student's t with 11 degrees of freedom
    assert abs(z.mean()) < 4 * student / math.sqrt(150)
    assert abs(z.std() / student - 1) < 4 * 0.07  # kurtosis 3.86: relative error of the spread sqrt(2.86 / 4 / 150) = 0.07


def test_one_sample_cannot_tell_its_error():
    assert log_likelihood(hash_oracle, [1], [2] * 9, MASK_ID, n_samples=1).standard_error == math.inf


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_batch_size_changes_nothing_but_the_calls(batch_size):
    model = Counting()
    args = [3, 1], list(range(10, 20)), MASK_ID
    found = log_likelihood(model, *args, n_samples=50, batch_size=batch_size, generator=stream(0))
    assert found == pytest.approx(log_likelihood(hash_oracle, *args, n_samples=50, generator=stream(0)), abs=1e-9)
    assert [shape[0] for shape, _ in model.calls] == [min(batch_size, 50 - a) for a in range(0, 50, batch_size)]


def test_rows_of_a_padded_batch_equal_single_rows():
    prompts = [[1, 2, 3], [], [9], [4, 5]]
    answers = [[7, 8], [10, 11, 12, 13, 14], [20] * 6, [30]]
    for cfg_scale in (0.0, 1.0):
        together = log_likelihood_batch(hash_oracle, prompts, answers, MASK_ID, cfg_scale=cfg_scale, batch_size=13)
        for i in range(4):
            alone = log_likelihood(hash_oracle, prompts[i], answers[i], MASK_ID, cfg_scale=cfg_scale)
            assert together[i].mean == pytest.approx(alone.mean, abs=1e-9)
    assert len(together) == len(list(together)) == 4 and together.standard_error.tolist() == [0] * 4


def test_sampled_rows_of_a_padded_batch_agree_within_their_errors():
    prompts, answers = [[1, 2, 3], [9]], [list(range(10, 19)), list(range(20, 32))]
    together = log_likelihood_batch(hash_oracle, prompts, answers, MASK_ID, n_samples=256, generator=stream(5))
    for i in range(2):
        alone = log_likelihood(hash_oracle, prompts[i], answers[i], MASK_ID, n_samples=256, generator=stream(6))
        assert abs(alone.mean - together[i].mean) < 4 * math.hypot(alone.standard_error, together[i].standard_error)


def test_attention_mask_only_when_padded():
    same, mixed = Counting(), Counting()
    log_likelihood_batch(same, [[1, 2], [3]], [[4], [5, 6]], MASK_ID)  # 3 tokens each
    log_likelihood_batch(mixed, [[1, 2], [3]], [[4], [5]], MASK_ID)
    assert [padded for _, padded in same.calls] == [False] and [padded for _, padded in mixed.calls] == [True]


def test_at_is_used_and_half_precision_is_summed_in_float32():
    class Half(Denoiser):
        mask_id = MASK_ID

        def at(self, ids, places, attention_mask=None):
            return hash_oracle(ids, attention_mask).flatten(0, 1)[places].bfloat16()

    def full(ids, attention_mask=None):
        return hash_oracle(ids, attention_mask).bfloat16()

    answer = [1, 2, 3, 4, 5]
    assert log_likelihood(Half(), [6], answer) == log_likelihood(full, [6], answer, MASK_ID)
    rounded = brute_force(lambda ids: full(ids).double(), [6], answer, MASK_ID)
    assert log_likelihood(Half(), [6], answer).mean == pytest.approx(rounded, abs=1e-4)  # bfloat16 sums would be off by 0.1


def test_same_seed_same_number():
    args = hash_oracle, [1, 2], list(range(10, 20)), MASK_ID
    one, two, three = (log_likelihood(*args, n_samples=16, generator=stream(s)) for s in (0, 0, 1))
    assert one == two != three


def test_chain_rule_by_hand_and_averaged_over_orders():
    prompt, answer = [8, 3], [5, 6, 7, 5]
    by_hand = 0.0
    for k in range(4):
        xt = torch.tensor([prompt + answer[:k] + [MASK_ID] * (4 - k)])
        by_hand += hash_oracle(xt)[0, 2 + k].log_softmax(-1)[answer[k]].item()
    assert chain_rule_log_likelihood(hash_oracle, prompt, answer, MASK_ID) == pytest.approx(by_hand, abs=1e-10)
    for cfg_scale in (0.0, 0.7):
        orders = [
            chain_rule_log_likelihood(hash_oracle, prompt, answer, MASK_ID, order, cfg_scale, batch_size=3)
            for order in permutations(range(4))
        ]
        eq6 = log_likelihood(hash_oracle, prompt, answer, MASK_ID, cfg_scale=cfg_scale).mean
        assert sum(orders) / 24 == pytest.approx(eq6, abs=1e-10)


def test_chain_rule_is_a_probability():
    def small(ids, attention_mask=None):
        return torch.cat([hash_oracle(ids, attention_mask)[..., :3], torch.full((*ids.shape, 1), -torch.inf)], -1)

    total = sum(math.exp(chain_rule_log_likelihood(small, [0], [a, b, c], 3, order=[1, 2, 0]))
                for a in range(3) for b in range(3) for c in range(3))
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_greedy_match_is_the_sampler(cfg_scale):
    for seed in range(5):
        prompt = torch.randint(0, 40, (1, 3), generator=stream(seed))
        written = generate(hash_oracle, prompt, MASK_ID, 6, steps=6, cfg_scale=cfg_scale)[0, 3:]
        assert greedy_match(hash_oracle, prompt[0], written, MASK_ID, cfg_scale)
        written[seed] = (written[seed] + 1) % 40
        assert not greedy_match(hash_oracle, prompt[0], written, MASK_ID, cfg_scale)


def test_choices_share_masks_and_differences_know_it():
    choices = [list(range(10, 20)), list(range(10, 19)) + [5], [1, 2]]
    found = score_choices(hash_oracle, [1, 2], choices, MASK_ID, n_samples=64, generator=stream(0))
    twice = score_choices(hash_oracle, [1, 2], [choices[0]] * 2, MASK_ID, n_samples=64, generator=stream(0))
    apart = log_likelihood_batch(hash_oracle, [[1, 2]] * 2, [choices[0]] * 2, MASK_ID, n_samples=64, generator=stream(0))
    assert twice.difference(0, 1) == (0, 0) and apart[0].mean != apart[1].mean
    assert found.likelihoods.exact.tolist() == [False, False, True]
    assert found.difference(0, 2).mean == pytest.approx(found.likelihoods[0].mean - found.likelihoods[2].mean)
    assert found.difference(0, 2).standard_error == pytest.approx(found.likelihoods[0].standard_error)
    order = found.scores.argsort(descending=True).tolist()
    assert found.best == order[0] and found.margin == found.difference(order[0], order[1])


def test_error_bars_of_differences_are_honest():
    "Also between choices of different length, which share random numbers instead of masks."
    choices = torch.randint(2, 46, (8,), generator=stream(3)).tolist(), torch.randint(2, 46, (9,), generator=stream(4)).tolist()
    exact = [log_likelihood(hash_oracle, [9], choice, MASK_ID, n_samples=511).mean for choice in choices]
    z = []
    for seed in range(150):
        found = score_choices(hash_oracle, [9], choices, MASK_ID, n_samples=48, generator=stream(seed)).difference(0, 1)
        z.append((found.mean - exact[0] + exact[1]) / found.standard_error)
    z, student = torch.tensor(z), math.sqrt(11 / 9)
    assert abs(z.mean()) < 4 * student / math.sqrt(150) and abs(z.std() / student - 1) < 4 * 0.07


def test_choices_pick_what_the_exact_scores_pick():
    for seed in range(10):
        choices = torch.randint(2, 46, (4, 5), generator=stream(seed))
        exact = [brute_force(hash_oracle, [9, 4], c.tolist(), MASK_ID) for c in choices]
        found = score_choices(hash_oracle, [9, 4], choices, MASK_ID)
        assert found.scores.tolist() == pytest.approx(exact, abs=1e-9) and found.best == exact.index(max(exact))
        assert found.margin.mean == pytest.approx(sorted(exact)[-1] - sorted(exact)[-2], abs=1e-9)
        assert found.margin.standard_error == 0


def test_normalising_is_asked_for():
    choices = [[10, 11, 12], [5]]
    plain = score_choices(hash_oracle, [1], choices, MASK_ID)
    tokens = score_choices(hash_oracle, [1], choices, MASK_ID, normalize="tokens")
    by_bytes = score_choices(hash_oracle, [1], choices, MASK_ID, normalize=[7, 2])
    assert plain.scores.tolist() == plain.likelihoods.mean.tolist()
    assert tokens.scores.tolist() == pytest.approx((plain.scores / torch.tensor([3, 1])).tolist())
    assert by_bytes.scores.tolist() == pytest.approx((plain.scores / torch.tensor([7, 2])).tolist())
    assert by_bytes.difference(0, 1).mean == pytest.approx((by_bytes.scores[0] - by_bytes.scores[1]).item())


def test_bits_per_byte():
    assert bits_per_byte(math.log(2) * 80, 10) == pytest.approx(8)


def test_a_real_network_walks_in():
    from nanollada.backbone import Backbone, BackboneConfig

    torch.manual_seed(0)
    config = BackboneConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            num_key_value_heads=2, intermediate_size=32, mask_token_id=19)
    model = Backbone(config).eval()
    prompts, answers = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]]
    together = log_likelihood_batch(model.denoise, prompts, answers)
    for i in range(2):
        alone = brute_force(lambda ids: model(ids, causal=False), prompts[i], answers[i], 19)
        assert together[i].mean == pytest.approx(alone, abs=1e-4)  # float32


BAD = [
    (dict(answer=[]), "answer 0 is .* expected one row"),
    (dict(answer=[3, MASK_ID]), "answer 0 contains 47 at position 1"),
    (dict(prompt=[MASK_ID]), "prompt 0 contains 47"),
    (dict(answer=[3, -100]), "-100"),
    (dict(answer=torch.tensor([[3, 4]])), "one row"),
    (dict(answer=[0.5]), "integer ids"),
    (dict(n_samples=0), "n_samples 0"),
    (dict(batch_size=0), "batch_size 0"),
    (dict(mask_id=None), "mask_id is None"),
    (dict(cfg_scale=-1.0), "cfg_scale is -1.0"),
    (dict(cfg_scale=math.nan), "cfg_scale is nan"),
    (dict(answer=[VOCAB]), "outside the vocabulary of 48"),
    (dict(denoiser=lambda ids: hash_oracle(ids) * math.nan), "NaN"),
    (dict(denoiser=lambda ids: hash_oracle(ids) + math.inf), "NaN or"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    arguments = dict(denoiser=hash_oracle, prompt=[1, 2], answer=[3, 4], mask_id=MASK_ID) | change
    with pytest.raises(UserError, match=message):
        log_likelihood(**arguments)


@pytest.mark.parametrize("call, message", [
    (lambda: log_likelihood_batch(hash_oracle, [[1]], [], MASK_ID), "1 prompts for 0 answers"),
    (lambda: chain_rule_log_likelihood(hash_oracle, [1], [], MASK_ID), "answer 0 is .* expected one row"),
    (lambda: chain_rule_log_likelihood(hash_oracle, [1], [2, 3], MASK_ID, order=[0, 0]), r"order is \[0, 0\]"),
    (lambda: greedy_match(hash_oracle, [MASK_ID], [2], MASK_ID), "prompt 0 contains 47"),
    (lambda: greedy_match(lambda ids: hash_oracle(ids) * math.nan, [1], [2], MASK_ID), "NaN"),
    (lambda: chain_rule_log_likelihood(lambda ids: hash_oracle(ids) * math.nan, [1], [2], MASK_ID), "NaN"),
    (lambda: score_choices(hash_oracle, [1], [], MASK_ID), "not none"),
    (lambda: score_choices(hash_oracle, [1], [[2]], MASK_ID).margin, "at least two"),
    (lambda: score_choices(hash_oracle, [1], [[2]], MASK_ID, normalize="words"), "normalize is 'words'"),
    (lambda: score_choices(hash_oracle, [1], [[2]], MASK_ID, normalize=[0]), r"normalize is \[0\]"),
    (lambda: score_choices(hash_oracle, [1], [[2]], MASK_ID, normalize=[1, 2]), "1 sizes"),
    (lambda: bits_per_byte(1.0, 0), "n_bytes is 0"),
])
def test_more_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
