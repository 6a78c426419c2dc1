"The forward process: what is hidden, how often, with which weight."

import pytest
import torch
from nanollada.core import UserError
from nanollada.masking import (
    Noised, Schedule, check_maskable, complementary, fixed_count_batch, get_schedule, logits_at, mask_exactly,
    mask_tokens, noise_batch, sample_t, subs_logits,
)

MASK = 99
SCHEDULES = ("linear", "cosine", "polynomial")


def gen(seed):
    return torch.Generator().manual_seed(seed)


def ids(*shape, seed=0):
    return torch.randint(MASK, shape, generator=gen(seed))


@pytest.mark.parametrize("seed", range(20))
def test_masked_is_mask_visible_is_clean_forbidden_is_visible(seed):
    x0, maskable = ids(7, 13, seed=seed), torch.rand(7, 13, generator=gen(seed)) < 0.5
    for noised in (
        noise_batch(x0, MASK, maskable, gen(seed)),
        fixed_count_batch(x0, MASK, maskable, gen(seed)),
        Noised(*mask_tokens(x0, 0.7, MASK, maskable, gen(seed)), torch.ones(7), torch.ones(7, 1)),
    ):
        assert (noised.xt[noised.mask] == MASK).all()
        assert torch.equal(noised.xt[~noised.mask], x0[~noised.mask])
        assert not (noised.mask & ~maskable).any()
        assert noised.xt.dtype == x0.dtype and noised.weight.shape == (7, 1)


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
        assert all(torch.equal(a, b) for a, b in zip(first, second))
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


def test_independent_t_is_uniform():
    u = sample_t(200_000, gen(0), stratified=False).double()
    for power in (1, 2, 3):  # E[u^k] = 1 / (k + 1)
        error = (u**power).std() / len(u) ** 0.5
        assert abs((u**power).mean() - 1 / (power + 1)) < 4 * error


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_schedules(name):
    schedule = get_schedule(name)
    ends = torch.tensor([0.0, 1.0])
    assert torch.allclose(schedule.alpha(ends), torch.tensor([1.0, 0.0]), atol=1e-7)
    t = torch.linspace(0.001, 1, 500, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    assert torch.allclose(slope, schedule.dalpha(t)) and (schedule.rate(t) >= 0).all()
    assert torch.allclose(schedule.weight(t), -slope / (1 - schedule.alpha(t)))
    assert get_schedule(schedule) is schedule


def test_polynomial_power_one_is_linear():
    t = torch.linspace(0.01, 1, 50)
    assert torch.allclose(get_schedule("polynomial", 1.0).weight(t), 1 / t)
    assert isinstance(get_schedule("polynomial", 3.0), Schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_every_token_counts_once(schedule, eps):
    noised = noise_batch(torch.zeros(60_000, 8, dtype=torch.long), MASK, None, gen(0), schedule, False, eps)
    counted = (noised.weight * noised.mask).double().mean(1)
    expected = get_schedule(schedule).alpha(torch.tensor(eps)) / (1 - eps)
    assert abs(counted.mean() - expected) < 4 * counted.std() / len(counted) ** 0.5


def test_linear_weight_is_one_over_the_probability_used():
    noised = noise_batch(ids(64, 5), MASK, generator=gen(0), eps=0.3)
    assert noised.t.min() >= 0.3 and torch.equal(noised.weight[:, 0], 1 / noised.t)
    given = noise_batch(ids(2, 5), MASK, t=torch.tensor([1.0, 0.25]))
    assert given.mask[0].all() and given.weight[:, 0].tolist() == [1, 4]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_counts_are_uniform_and_positions_equal(n):
    rows = 40_000
    maskable = torch.zeros(rows, 10, dtype=torch.bool)
    maskable[:, 1 : 1 + n] = True
    noised = fixed_count_batch(torch.zeros(rows, 10, dtype=torch.long), MASK, maskable, gen(n))
    assert torch.allclose((noised.weight * noised.mask).sum(1), torch.full((rows,), float(n)))
    share = torch.bincount(noised.mask.sum(1), minlength=n + 1)[1:] / rows
    assert ((share - 1 / n).abs() <= 4 * (1 / n * (1 - 1 / n) / rows) ** 0.5).all()
    p = (n + 1) / 2 / n  # expected share of masked tokens
    assert ((noised.mask[:, 1 : 1 + n].double().mean(0) - p).abs() <= 4 * (p * (1 - p) / rows) ** 0.5).all()


def test_stratified_counts_cover_each_count_equally():
    for n in (3, 8):
        for seed in range(50):
            noised = fixed_count_batch(ids(2 * n, n), MASK, None, gen(seed), stratified=True)
            assert (torch.bincount(noised.mask.sum(1), minlength=n + 1)[1:] == 2).all()


def test_counts_from_given_levels_and_rows_with_nothing_to_mask():
    noised = fixed_count_batch(ids(4, 5), MASK, t=torch.tensor([0.2, 0.6, 0.61, 1.0]))
    assert noised.mask.sum(1).tolist() == [1, 3, 4, 5]
    maskable = torch.tensor([[1, 1], [0, 0]])
    noised = fixed_count_batch(ids(2, 2), MASK, maskable, gen(0))
    assert not noised.mask[1].any() and noised.weight[1] == 0 and torch.isfinite(noised.weight).all()


def test_complementary_covers_each_token_once():
    x0, maskable = ids(9, 12), torch.rand(9, 12, generator=gen(0)) < 0.7
    noised = noise_batch(x0, MASK, maskable, gen(1), t=torch.linspace(0.1, 1.0, 9))
    mirrored = complementary(x0, noised, MASK, maskable)
    assert torch.equal(noised.mask ^ mirrored.mask, maskable) and not (noised.mask & mirrored.mask).any()
    assert torch.allclose(mirrored.weight[:-1, 0], 1 / (1 - noised.t[:-1]))
    assert mirrored.weight[-1] == 0 and not mirrored.mask[-1].any()  # t = 1 leaves nothing to mirror


def test_logits_at_prefers_at_and_passes_padding_only_when_given():
    seen = []

    def plain(ids, **padding):
        seen.append(padding)
        return torch.arange(ids.numel() * 3.0).view(*ids.shape, 3)

    x, where = ids(2, 4), torch.tensor([[True, False, False, True], [False, True, False, False]])
    expected = plain(x)[where]
    assert torch.equal(logits_at(plain, x, where), expected)
    assert torch.equal(logits_at(plain, x, where, torch.ones(2, 4)), expected)
    assert [sorted(s) for s in seen] == [[], [], ["attention_mask"]]

    class WithAt:
        def at(self, ids, where, attention_mask=None):
            return torch.full((int(where.sum()), 3), 7.0)

    assert (logits_at(WithAt(), x, where) == 7).all()
    assert logits_at(plain, x, torch.zeros(2, 4, dtype=torch.bool)).shape == (0, 3)
    assert torch.equal(logits_at(plain, x, where.flatten().nonzero()[:, 0]), expected)


def test_subs_is_a_distribution_without_mask_and_certain_where_visible():
    logits = torch.randn(2, 5, 6, generator=gen(0), dtype=torch.float64)
    before = logits.clone()
    xt = torch.tensor([[0, 5, 2, 5, 4], [5, 5, 1, 1, 0]])
    p = subs_logits(logits, 5, xt).softmax(-1)
    assert torch.equal(logits, before)
    assert (p[..., 5] == 0).all() and torch.allclose(p.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    visible = xt != 5
    assert (p[visible].gather(1, xt[visible][:, None]) == 1).all()
    renormalised = logits[..., :5].softmax(-1)
    assert torch.allclose(p[~visible][:, :5], renormalised[~visible])
    assert torch.equal(subs_logits(logits, 77), logits)  # MASK is not in this vocabulary


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: mask_tokens(x, 1.2, MASK), "p_mask runs"),
        (lambda x: mask_tokens(x, float("nan"), MASK), "p_mask runs"),
        (lambda x: mask_tokens(x, torch.rand(2), MASK), "p_mask has shape"),
        (lambda x: mask_tokens(x, 0.5, int(x[0, 0])), "contain the mask token"),
        (lambda x: mask_tokens(x[0], 0.5, MASK), "ids have shape"),
        (lambda x: mask_tokens(x.float(), 0.5, MASK), "ids have shape"),
        (lambda x: mask_tokens(x, 0.5, MASK, torch.ones(2, 2)), "maskable is"),
        (lambda x: noise_batch(x, MASK, torch.zeros(2, 3)), "no position"),
        (lambda x: noise_batch(x, MASK, t=torch.tensor([0.0, 0.5])), "t has shape"),
        (lambda x: noise_batch(x, MASK, t=torch.rand(3)), "t has shape"),
        (lambda x: noise_batch(x, MASK, schedule="wsd"), "schedule is 'wsd'"),
        (lambda x: get_schedule("polynomial", power=0), "power is 0"),
        (lambda x: sample_t(0), "batch_size is 0"),
        (lambda x: sample_t(2, eps=1.0), "eps 1.0"),
        (lambda x: mask_exactly(x, torch.tensor([1, 4]), MASK), "counts are"),
        (lambda x: mask_exactly(x, torch.tensor([1]), MASK), "counts are"),
        (lambda x: complementary(x, noise_batch(x, MASK, schedule="cosine"), MASK), "weights of 1/t"),
        (lambda x: logits_at(lambda i: i, x, x > 0), "logits are"),
        (lambda x: logits_at(lambda i: i, x, x), "where is"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(UserError, match=message):
        call(ids(2, 3) % 7 + 1)


def test_mask_id_is_fine_where_it_may_not_be_masked():
    x0 = torch.tensor([[MASK, 1, 2]])
    assert check_maskable(x0, MASK, torch.tensor([[0, 1, 1]])).tolist() == [[False, True, True]]
