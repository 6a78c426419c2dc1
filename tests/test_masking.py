"The forward process: what is hidden, how often, with which weight."

import math

import pytest
import torch
from nanollada.core import UserError
from nanollada.masking import (
    SCHEDULES, Schedule, check_maskable, fixed_count_batch, get_schedule, mask_exactly, mask_tokens, noise_batch,
    sample_t,
)

MASK = 99


def gen(seed):
    return torch.Generator().manual_seed(seed)


def ids(*shape, seed=0):
    return torch.randint(MASK, shape, generator=gen(seed))


@pytest.mark.parametrize("seed", range(20))
def test_masked_is_mask_visible_is_clean_forbidden_is_visible(seed):
    x0, maskable = ids(7, 13, seed=seed), torch.rand(7, 13, generator=gen(seed)) < 0.5
    for noised in (noise_batch(x0, MASK, maskable, gen(seed)), fixed_count_batch(x0, MASK, maskable, gen(seed))):
        xt, mask = noised["xt"], noised["mask"]
        assert (xt[mask] == MASK).all() and torch.equal(xt[~mask], x0[~mask]) and not (mask & ~maskable).any()
        assert xt.dtype == x0.dtype and noised["weight"].shape == (7, 1) and noised["t"].shape == (7,)


def test_probabilities_zero_and_one_are_certain_and_shapes_broadcast():
    x0 = ids(50, 40)
    assert not mask_tokens(x0, 0.0, MASK, generator=gen(0))[1].any()
    assert mask_tokens(x0, 1, MASK, generator=gen(0))[1].all()
    per_token = torch.zeros(50, 40)
    per_token[:, ::2] = 1
    assert torch.equal(mask_tokens(x0, per_token, MASK, generator=gen(0))[1], per_token.bool())
    per_row = torch.arange(50)[:, None] % 2
    assert torch.equal(mask_tokens(x0, per_row, MASK, generator=gen(0))[1], per_row.bool().expand(50, 40))


def test_tokens_are_masked_independently():
    mask = mask_tokens(torch.zeros(40_000, 3, dtype=torch.long), 0.3, MASK, generator=gen(1))[1].double()
    error = (0.3 * 0.7 / 40_000) ** 0.5
    assert ((mask.mean(0) - 0.3).abs() < 4 * error).all()
    for i, j in ((0, 1), (1, 2), (0, 2)):  # P(both) = p^2
        assert abs((mask[:, i] * mask[:, j]).mean() - 0.09) < 4 * (0.09 * 0.91 / 40_000) ** 0.5


def test_same_seed_same_batch_and_masks_nest():
    x0 = ids(4, 30)
    for make in (noise_batch, fixed_count_batch):
        first, second = make(x0, MASK, generator=gen(3)), make(x0, MASK, generator=gen(3))
        assert all(torch.equal(first[name], second[name]) for name in first)
    masks = [mask_tokens(x0, p, MASK, generator=gen(4))[1] for p in (0.2, 0.5, 0.9)]
    assert (masks[0] <= masks[1]).all() and (masks[1] <= masks[2]).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.2])
def test_stratified_t_has_one_level_per_stratum_and_uniform_rows(batch_size, eps):
    generator = gen(batch_size)
    t = torch.stack([sample_t(batch_size, generator, eps=eps) for _ in range(3000)])
    assert t.dtype == torch.float32 and (t > 0).all() and (t >= eps).all() and (t <= 1).all()
    u = ((t.double() - eps) / (1 - eps)).clamp(1e-9, 1)
    strata = (u * batch_size - 1e-5).ceil().clamp(min=1).sort(1).values
    assert (strata == torch.arange(1, batch_size + 1)).double().mean() > 0.999  # rounding at the edges
    assert ((u.mean(0) - 0.5).abs() < 4.5 * (1 / 12 / 3000) ** 0.5).all()


def test_stratified_t_is_dealt_out_in_random_order():
    "code.md 12: in order, micro-batches had mean levels of .82/.57/.32/.30, and one rank all the work."
    t = torch.stack([sample_t(64, gen(seed)) for seed in range(400)]).view(400, 4, 16).mean(2)
    spread = (1 / 12 / 16 * 48 / 63) ** 0.5  # of the mean of 16 drawn from 64 without replacement
    assert (t.std(0) / spread - 1).abs().max() < 4 / 800**0.5
    assert ((t.mean(0) - 0.5).abs() < 4 * spread / 20).all()


def test_independent_t_is_uniform():
    u = sample_t(200_000, gen(0), stratified=False).double()
    for power in (1, 2, 3):  # E[u^k] = 1 / (k + 1)
        error = (u**power).std() / len(u) ** 0.5
        assert abs((u**power).mean() - 1 / (power + 1)) < 4 * error


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_schedules(name):
    schedule = get_schedule(name)
    ends = torch.tensor([0.0, 1.0])
    assert torch.allclose(schedule.p_mask(ends), ends, atol=1e-7)
    t = torch.linspace(0.001, 1, 500, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.p_mask(t).sum(), t)
    assert torch.allclose(slope, schedule.rate(t)) and (schedule.rate(t) >= 0).all()
    assert torch.allclose(schedule.weight(t), slope / schedule.p_mask(t))
    assert get_schedule(schedule) is schedule and isinstance(schedule, Schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_every_number_of_hidden_tokens_counts_once(schedule, eps):
    "Not only every token, which a constant weight of 2 does as well: see test_elbo for what that is worth."
    n, rows = 6, 200_000
    noised = noise_batch(torch.zeros(rows, n, dtype=torch.long), MASK, None, gen(0), schedule, False, eps)
    hidden = noised["mask"].sum(1, keepdim=True)
    counted = torch.where(hidden == torch.arange(1, n + 1), noised["weight"] * hidden, 0.0).double()
    t = eps + (1 - eps) * (torch.arange(100_000).double()[:, None] + 0.5) / 100_000
    k, how = torch.arange(1, n + 1), get_schedule(schedule)
    ways = torch.tensor([math.comb(n, i) for i in k.tolist()])
    expected = (how.weight(t) * k * ways * how.p_mask(t) ** k * (1 - how.p_mask(t)) ** (n - k)).mean(0)
    assert ((counted.mean(0) - expected).abs() < 4 * counted.std(0) / rows**0.5).all()
    assert eps > 0.01 or (expected - 1).abs().max() < 0.02  # what eps leaves out


def test_linear_weight_is_one_over_the_probability_used():
    noised = noise_batch(ids(64, 5), MASK, generator=gen(0), eps=0.3)
    assert noised["t"].min() >= 0.3 and torch.equal(noised["weight"][:, 0], 1 / noised["t"])
    given = noise_batch(ids(2, 5), MASK, t=torch.tensor([1.0, 0.25]))
    assert given["mask"][0].all() and given["weight"][:, 0].tolist() == [1, 4]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_counts_are_uniform_and_positions_equal(n):
    rows = 40_000
    maskable = torch.zeros(rows, 10, dtype=torch.bool)
    maskable[:, 1 : 1 + n] = True
    noised = fixed_count_batch(torch.zeros(rows, 10, dtype=torch.long), MASK, maskable, gen(n))
    assert torch.allclose((noised["weight"] * noised["mask"]).sum(1), torch.full((rows,), float(n)))
    share = torch.bincount(noised["mask"].sum(1), minlength=n + 1)[1:] / rows
    assert ((share - 1 / n).abs() <= 4 * (1 / n * (1 - 1 / n) / rows) ** 0.5).all()
    p = (n + 1) / 2 / n  # expected share of masked tokens
    assert ((noised["mask"][:, 1 : 1 + n].double().mean(0) - p).abs() <= 4 * (p * (1 - p) / rows) ** 0.5).all()


def test_stratified_counts_cover_each_count_equally():
    for n in (3, 8):
        for seed in range(50):
            noised = fixed_count_batch(ids(2 * n, n), MASK, None, gen(seed), stratified=True)
            assert (torch.bincount(noised["mask"].sum(1), minlength=n + 1)[1:] == 2).all()


def test_counts_from_given_levels_and_rows_with_nothing_to_mask():
    noised = fixed_count_batch(ids(4, 5), MASK, t=torch.tensor([0.2, 0.6, 0.61, 1.0]))
    assert noised["mask"].sum(1).tolist() == [1, 3, 4, 5]
    maskable = torch.tensor([[1, 1], [0, 0]])
    noised = fixed_count_batch(ids(2, 2), MASK, maskable, gen(0))
    assert not noised["mask"][1].any() and noised["weight"][1] == 0 and torch.isfinite(noised["weight"]).all()


def test_a_token_hidden_at_t_was_hidden_at_s_with_probability_s_over_t():
    "The reverse process: with the same coins at both levels, as in the film strip."
    x0, t, s = torch.zeros(100_000, 3, dtype=torch.long), 0.8, 0.3
    late, early = (mask_tokens(x0, p, MASK, generator=gen(0))[1] for p in (t, s))
    assert (early <= late).all()
    share = (early[late]).double().mean()
    assert abs(share - s / t) < 4 * (s / t * (1 - s / t) / late.sum()) ** 0.5


def test_nothing_is_asked_of_a_gpu():
    "On the meta device any question to a value raises."
    x0 = torch.zeros(4, 6, dtype=torch.long, device="meta")
    for noised in (noise_batch(x0, MASK), fixed_count_batch(x0, MASK, stratified=True)):
        assert {value.device.type for value in noised.values()} == {"meta"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: mask_tokens(x, 1.2, MASK), "p_mask runs"),
        (lambda x: mask_tokens(x, float("nan"), MASK), "p_mask runs"),
        (lambda x: mask_tokens(x, 0.5, int(x[0, 0])), "contain the mask token"),
        (lambda x: mask_tokens(x[0], 0.5, MASK), "expected int"),
        (lambda x: mask_tokens(x.float(), 0.5, MASK), "expected int"),
        (lambda x: mask_tokens(x, 0.5, MASK, torch.ones(2, 2)), "maskable"),
        (lambda x: noise_batch(x, MASK, torch.zeros(2, 3)), "nothing to learn"),
        (lambda x: noise_batch(x, MASK, t=torch.tensor([0.0, 0.5])), "t runs"),
        (lambda x: noise_batch(x, MASK, schedule="wsd"), "schedule is 'wsd'"),
        (lambda x: sample_t(0), "batch_size is 0"),
        (lambda x: sample_t(2, eps=1.0), "eps 1.0"),
        (lambda x: mask_exactly(x, torch.tensor([1, 4]), MASK), "counts are"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(UserError, match=message):
        call(ids(2, 3) % 7 + 1)


def test_mask_id_is_fine_where_it_may_not_be_masked():
    x0 = torch.tensor([[MASK, 1, 2]])
    assert check_maskable(x0, MASK, torch.tensor([[0, 1, 1]])).tolist() == [[False, True, True]]
