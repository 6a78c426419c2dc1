"The loss is a bound: enumeration agrees with itself, with the data, and with every estimator."

import math

import pytest
import torch
from nanollada.ar import with_places
from nanollada.backbone import Denoiser, as_denoiser
from nanollada.core import UserError
from nanollada.elbo import (
    MaskedDiffusion, elbo_loss, elbo_terms, estimate_nelbo, exact_nelbo, mask_plan, mask_weight, masked_ce, mean_and_error,
    nelbo_replicates,
)
from nanollada.masking import fixed_count_batch, noise_batch
from oracles import (
    RandomDenoiser, TableDenoiser, enumerate_ce, exact_log_likelihood, nelbo_by_count, nelbo_by_orders, nelbo_by_table,
    order_log_probs, random_table, subset_weights,
)

SCHEDULES = ("linear", "cosine", "polynomial")


def gen(seed):
    return torch.Generator().manual_seed(seed)


def mixture(first, second, share):
    return lambda ids: torch.lerp(first(ids).softmax(-1), second(ids).softmax(-1), share).log()


def strict(denoiser, mask_id):
    "The denoiser under SUBS: it never answers MASK."
    return lambda ids: denoiser(ids).index_fill(-1, torch.tensor(mask_id), -torch.inf)


# the bound, by enumeration


@pytest.mark.parametrize("vocab, length", [(2, 1), (2, 2), (3, 4), (5, 3), (2, 7)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("subs", [False, True])
def test_all_forms_of_the_nelbo_agree(vocab, length, seed, subs):
    "Three schedules integrated, counts, all orders: five roads to what the engine adds up, to ten decimals."
    model, x0 = RandomDenoiser(vocab, length, seed), torch.randint(vocab, (3, length), generator=gen(seed))
    model = strict(model, vocab) if subs else model
    found = exact_nelbo(model, x0, vocab)
    for schedule in SCHEDULES:
        assert (nelbo_by_table(model, x0, vocab, schedule=schedule) - found).abs().max() < 1e-10
    assert (nelbo_by_count(model, x0, vocab) - found).abs().max() < 1e-10
    assert (nelbo_by_orders(model, x0, vocab) - found).abs().max() < 1e-10
    mean, error = estimate_nelbo(model, x0, vocab, n_samples=2**length - 1)
    assert torch.equal(mean, found) and (error == 0).all()


@pytest.mark.parametrize("n", [1, 2, 5, 9, 16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_subset_weights_are_beta_functions(n, schedule):
    beta = [math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n) for k in range(1, n + 1)]
    weights = subset_weights(n, schedule)
    beta = torch.tensor(beta, dtype=torch.float64)
    assert weights[0] == 0 and torch.allclose(weights[1:], beta, atol=1e-13)
    ours = mask_weight(torch.tensor(n), torch.arange(n + 1))
    assert ours[0] == 0 and torch.allclose(ours[1:], beta, rtol=1e-13, atol=0)
    for k, w in enumerate(weights.tolist()):  # every number of hidden tokens counts once
        assert k == 0 or abs(w * k * math.comb(n, k) - 1) < 1e-10


def test_only_maskable_tokens_are_enumerated():
    model, x0 = RandomDenoiser(3, 5, 0), torch.tensor([[0, 1, 2, 1, 0]])
    maskable = torch.tensor([[0, 1, 0, 1, 1]])
    roads = [f(model, x0, 3, maskable) for f in (exact_nelbo, nelbo_by_table, nelbo_by_count, nelbo_by_orders)]
    assert max(roads) - min(roads) < 1e-10
    one = torch.tensor([[0, 0, 1, 0, 0]])  # a single token: the bound is the conditional itself
    canvas = torch.tensor([[0, 1, 3, 1, 0]])
    expected = -model(canvas).log_softmax(-1)[0, 2, 2]
    assert torch.allclose(exact_nelbo(model, x0, 3, one)[0], expected)
    assert torch.allclose(-exact_log_likelihood(model, x0, 3, one)[0], expected)


@pytest.mark.parametrize("seed", range(5))
def test_true_conditionals_are_tight(seed):
    oracle = TableDenoiser(random_table(3, 4, seed))
    nll = -oracle.p.log()
    assert torch.allclose(exact_nelbo(oracle, oracle.texts, 3), nll, atol=1e-10, rtol=0)
    assert torch.allclose(-exact_log_likelihood(oracle, oracle.texts, 3), nll, atol=1e-10, rtol=0)
    assert all(logp.std() < 1e-10 for logp in order_log_probs(oracle, oracle.texts, 3))  # all orders agree


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_bound_holds_for_every_model(seed, share):
    oracle = TableDenoiser(random_table(3, 3, seed))
    model = mixture(RandomDenoiser(3, 3, seed), oracle, share)
    nelbo = exact_nelbo(model, oracle.texts, 3)
    nll = -exact_log_likelihood(model, oracle.texts, 3)
    entropy = -(oracle.p * oracle.p.log()).sum()
    assert (nelbo > nll).all()  # Jensen, text by text
    assert (oracle.p * nll).sum() > entropy  # Gibbs, on average


def test_a_weight_that_counts_every_token_once_need_not_bound():
    "A constant weight of 2 does, and lies below the NLL of a model that is sure of the first token and lost after it."

    def sure_then_lost(ids):
        logits = torch.where((ids == 2).all(1)[:, None, None], torch.tensor([50.0, 0, 0]), torch.tensor([0.0, 9, 9]))
        return logits.expand(*ids.shape, 3).double()

    text = torch.zeros(1, 2, dtype=torch.long)
    masks, ce = enumerate_ce(sure_then_lost, text[0], torch.arange(2), 2)
    k = masks.sum(1)
    share = torch.tensor([1 / 3 / math.comb(2, j) for j in k.tolist()], dtype=torch.float64)  # of each mask, t uniform
    assert abs((2 * share[:, None] * masks).sum() / 2 - 1) < 1e-12  # every token counts once
    nll = -exact_log_likelihood(sure_then_lost, text, 2)
    assert (2 * share * ce.sum(1)).sum() < 0.7 * nll < exact_nelbo(sure_then_lost, text, 2) + 1e-9


def test_gap_closes_monotonically():
    oracle, nonsense = TableDenoiser(random_table(2, 4, 1)), RandomDenoiser(2, 4, 1)
    models = [mixture(nonsense, oracle, share) for share in (0, 0.25, 0.5, 1.0)]
    nelbo = [(oracle.p * exact_nelbo(model, oracle.texts, 2)).sum() for model in models]
    assert nelbo == sorted(nelbo, reverse=True)
    assert abs(nelbo[-1] + (oracle.p * oracle.p.log()).sum()) < 1e-10


@pytest.mark.parametrize("vocab, length", [(2, 3), (3, 4)])
def test_likelihood_sums_to_one_when_mask_is_forbidden(vocab, length):
    texts = torch.cartesian_prod(*[torch.arange(vocab)] * length)
    model = RandomDenoiser(vocab, length, 3)
    assert abs(exact_log_likelihood(strict(model, vocab), texts, vocab).exp().sum() - 1) < 1e-12
    assert exact_log_likelihood(model, texts, vocab).exp().sum() < 0.95  # some of it went to MASK


def test_subs_lowers_each_term_by_the_wasted_mass():
    model, x0 = RandomDenoiser(3, 4, 0), torch.tensor([[0, 1, 2, 0]])
    masks, plain = enumerate_ce(model, x0[0], torch.arange(4), 3)
    _, subs = enumerate_ce(strict(model, 3), x0[0], torch.arange(4), 3)
    wasted = model(torch.where(masks, 3, x0)).softmax(-1)[..., 3]
    assert torch.allclose(subs, torch.where(masks, plain + (1 - wasted).log(), 0.0))


# the loss


@pytest.mark.parametrize("make", [noise_batch, fixed_count_batch])
@pytest.mark.parametrize("seed", range(5))
def test_terms_are_the_sum_in_the_paper(make, seed):
    model, x0 = RandomDenoiser(3, 5, seed), torch.randint(3, (4, 5), generator=gen(seed))
    noised = make(x0, 3, generator=gen(seed))
    logp = model(noised["xt"]).log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    expected = -(noised["weight"] * noised["mask"] * logp).sum(1)
    assert torch.allclose(elbo_terms(as_denoiser(model, 3), noised), expected)
    by = "level" if make is noise_batch else "count"
    rows = {"ids": x0, "scored": torch.ones_like(x0, dtype=torch.bool)}
    objective = MaskedDiffusion(3, by=by)
    batch = objective.noise(rows, gen(seed))
    nats, count = objective.terms(as_denoiser(model, 3), with_places(batch))
    again = elbo_terms(as_denoiser(model, 3), {name: batch[name] for name in ("ids", "xt", "mask", "weight")})
    assert torch.equal(nats, again) and count.tolist() == [5] * 4
    if by == "level":
        assert torch.allclose(elbo_loss(model, x0, 3, generator=gen(seed)), nats.sum() / 20)


def test_a_row_counts_as_one_if_asked():
    "LLaDA's fine-tuning: nats of a row per scored token of that row; a row with nothing scored counts nothing."
    model, x0 = as_denoiser(RandomDenoiser(3, 5, 0), 3), torch.randint(3, (3, 5), generator=gen(0))
    scored = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    rows = {"ids": x0, "scored": scored}
    token, row = (MaskedDiffusion(3, by="count", per=per).noise(rows, gen(1)) for per in ("token", "row"))
    (nats, count), (share, ones) = (MaskedDiffusion(3).terms(model, batch) for batch in (token, row))
    assert count.tolist() == [4, 2, 0] and ones.tolist() == [1, 1, 0] and nats[2] == 0
    assert torch.allclose(share[:2], nats[:2] / count[:2]) and share[2] == 0


def test_more_may_be_hidden_than_counts():
    "Unpacked windows: the filling behind a document may be hidden, and its nats count, but not its tokens."
    x0, scored = torch.zeros(50, 6, dtype=torch.long), torch.arange(6).expand(50, 6) % 5 == 1
    maskable = (torch.arange(6) > 0).expand(50, 6)
    batch = MaskedDiffusion(3).noise({"ids": x0, "scored": scored, "maskable": maskable}, gen(0))
    assert batch["count"].tolist() == [1] * 50 and not batch["mask"][:, 0].any()
    assert batch["mask"][:, 2:].any()


def test_loss_ignores_padding_and_passes_the_attention_mask():
    model, x0 = RandomDenoiser(3, 6, 0), torch.randint(3, (8, 6), generator=gen(0))
    attention = torch.ones(8, 6, dtype=torch.long)
    attention[:, 4:] = 0
    calls = []

    def padded(ids, attention_mask=None):
        calls.append(attention_mask)
        return model(ids)

    loss = elbo_loss(padded, x0, 3, generator=gen(1), attention_mask=attention)
    assert torch.equal(calls[0], attention)
    noised = noise_batch(x0, 3, attention.bool(), gen(1))
    assert torch.allclose(loss, elbo_terms(as_denoiser(model, 3), noised).sum() / 32)
    assert not noised["mask"][:, 4:].any()


def test_levels_are_sorted_and_add_up():
    x0 = torch.zeros(4, 3, dtype=torch.long)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    t = torch.tensor([0.05, 0.2, 1.0, 0.5])
    batch = {"ids": x0, "mask": mask, "t": t, "weight": 1 / t[:, None]}
    sums, counts = MaskedDiffusion(3).levels(mask.sum(1) * 2.0 / t, batch)
    assert torch.allclose(sums, torch.tensor([6.0, 0, 0, 0, 6])) and counts.tolist() == [3, 0, 0, 0, 3]
    batch["weight"][3] = 0  # a row in which nothing could be hidden
    assert torch.isfinite(MaskedDiffusion(3).levels(mask.sum(1) * 2.0 / t, batch)[0]).all()


def test_levels_are_exact_under_autocast():
    "code.md 15: as a product of matrices they were taken in bfloat16, and 954 tokens became 952."
    mask = torch.ones(1, 954, dtype=torch.bool)
    batch = {"mask": mask, "t": torch.ones(1), "weight": torch.full((1, 1), 1.0)}
    with torch.autocast("cpu", torch.bfloat16):
        sums, counts = MaskedDiffusion(3).levels(torch.tensor([955.0]), batch)
    assert counts.dtype == sums.dtype == torch.float32 and counts[4] == 954 and sums[4] == 955


def test_a_batch_without_masks_has_loss_zero_and_a_gradient():
    weight = torch.zeros(3, 4, requires_grad=True)
    x0 = torch.zeros(1, 2, dtype=torch.long)
    nothing = {"ids": x0, "xt": x0, "mask": torch.zeros(1, 2, dtype=torch.bool), "weight": torch.tensor([[1e3]])}
    loss = elbo_terms(as_denoiser(lambda ids: weight[ids], 2), nothing).sum()
    loss.backward()
    assert loss == 0 and (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_cross_entropy_is_taken_in_float32_or_better(dtype):
    logits = (20 * torch.randn(4, 8, 50, generator=gen(0))).to(dtype)
    x0 = torch.randint(49, (4, 8), generator=gen(1))
    noised = noise_batch(x0, 49, generator=gen(2), t=torch.ones(4))
    ce = masked_ce(as_denoiser(lambda ids: logits, 49), noised)
    exact = -logits.double().log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    assert ce.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(ce.double(), exact, rtol=1e-5, atol=1e-5)


class Network(Denoiser, torch.nn.Module):
    "An embedding and a head, on any device; it remembers how many logits it was asked for."

    mask_id = 5

    def __init__(self, device="cpu"):
        super().__init__()
        embed = torch.randn(6, 4, generator=gen(0), dtype=torch.float64).to(device)
        self.embed, self.head, self.asked = embed, torch.nn.Parameter(embed.clone()), 0

    def at(self, ids, places, attention_mask=None):
        self.asked += len(places)
        return self.embed[ids.flatten()[places]] @ self.head.T


def test_only_masked_positions_are_projected_and_the_gradient_is_the_same():
    network, x0 = Network(), torch.randint(5, (3, 7), generator=gen(1))
    noised = noise_batch(x0, 5, generator=gen(2))
    everywhere = noised | {"places": torch.arange(x0.numel())}  # as on a GPU that was not told where the masks are
    gradients = []
    for batch in (noised, with_places(noised), everywhere):
        network.zero_grad()
        network.asked = 0
        elbo_terms(network, batch).sum().backward()
        gradients.append(network.head.grad.clone())
        assert network.asked == (x0.numel() if batch is everywhere else noised["mask"].sum())
    assert torch.equal(*gradients[:2]) and torch.allclose(gradients[0], gradients[2])


@pytest.mark.parametrize("by", ["level", "count"])
@pytest.mark.parametrize("per", ["token", "row"])
def test_terms_ask_nothing_of_a_gpu(by, per):
    "Forward and backward on the meta device, where .item(), a boolean index or a CPU tensor raises."
    objective = MaskedDiffusion(5, by=by, per=per)
    rows = {"ids": torch.zeros(4, 7, dtype=torch.long), "scored": torch.ones(4, 7, dtype=torch.bool)}
    rows["real"] = torch.arange(7).expand(4, 7) < 6
    batch = {name: value.to("meta") for name, value in with_places(objective.noise(rows, gen(0))).items()}
    network = Network("meta")
    nats, count = objective.terms(network, batch)
    (nats.sum() / count.sum()).backward()
    objective.levels(nats, batch)
    assert network.head.grad.device.type == "meta" and nats.shape == count.shape == (4,)


def test_elbo_loss_asks_nothing_of_a_gpu():
    network = Network("meta")
    elbo_loss(network, torch.zeros(4, 7, dtype=torch.long, device="meta")).backward()
    assert network.head.grad is not None


# the estimators


def z_scores(samples_of, exact_of):
    "Deviations of means from the exact values, in standard errors, over 25 random models."
    scores = []
    for seed in range(25):
        model, x0 = RandomDenoiser(3, 4, seed), torch.randint(3, (1, 4), generator=gen(seed))
        means = samples_of(model, x0, gen(seed + 100))
        scores.append((means.mean() - exact_of(model, x0)) / means.std() * len(means) ** 0.5)
    return torch.cat(scores)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_levels_are_unbiased(schedule):
    def samples(model, x0, generator):
        noised = noise_batch(x0.expand(2500, 4), 3, None, generator, schedule, stratified=False, eps=0.02)
        return elbo_terms(as_denoiser(model, 3), noised)

    z = z_scores(samples, lambda model, x0: nelbo_by_table(model, x0, 3, None, schedule, (0.02, 1.0)))
    assert z.abs().max() < 4 and abs(z.mean()) < 4 / 25**0.5


def test_stratified_batches_are_unbiased():
    def samples(model, x0, generator):
        batches = [noise_batch(x0.expand(10, 4), 3, None, generator, eps=0.02) for _ in range(250)]
        return torch.stack([elbo_terms(as_denoiser(model, 3), batch).mean() for batch in batches])

    z = z_scores(samples, lambda model, x0: nelbo_by_table(model, x0, 3, t_range=(0.02, 1.0)))
    assert z.abs().max() < 4 and abs(z.mean()) < 4 / 25**0.5


def test_counts_are_unbiased():
    def counts(model, x0, generator):
        return elbo_terms(as_denoiser(model, 3), fixed_count_batch(x0.expand(2500, 4), 3, None, generator))

    z = z_scores(counts, lambda model, x0: nelbo_by_table(model, x0, 3, t_range=(0.0, 1.0)))
    assert z.abs().max() < 4 and abs(z.mean()) < 4 / 25**0.5


def test_variances_are_what_enumeration_says():
    "One sample of Eq. 3 and of Eq. 6; and even counts remove what lies between counts, up to the offset of a stratum."
    model, x0, eps, n = RandomDenoiser(3, 4, 0), torch.tensor([[0, 1, 2, 0]]), 0.05, 4
    t = eps + (1 - eps) * (torch.arange(50_000).double() + 0.5)[:, None] / 50_000
    masks, ce = enumerate_ce(model, x0[0], torch.arange(n), 3)
    k, total = masks.sum(1), ce.sum(1)
    chance = t**k * (1 - t) ** (n - k)  # of each mask at each noise level
    level = (chance * (total / t) ** 2).sum(1).mean() - (chance * total / t).sum(1).mean() ** 2
    share = torch.tensor([1 / n / math.comb(n, j) if j else 0.0 for j in k.tolist()], dtype=torch.float64)
    weighted = total * n / k.clamp(min=1)
    count = (share * weighted**2).sum() - (share * weighted).sum() ** 2
    copies = x0.expand(400_000, 4)
    for noised, exact in ((noise_batch(copies, 3, None, gen(0), stratified=False, eps=eps), level),
                          (fixed_count_batch(copies, 3, None, gen(0)), count)):
        terms = elbo_terms(as_denoiser(model, 3), noised)
        squares = (terms - terms.mean()).square()
        assert abs(squares.mean() - exact) < 4 * squares.std() / 400_000**0.5
    mean = estimate_nelbo(model, copies[:20_000], 3, n_samples=12, batch_size=65536, generator=gen(1))[0]  # 3 x 4: each count once
    given_count = [weighted[k == j].mean() for j in range(1, n + 1)]
    squares = 12 * (mean - mean.mean()).square()
    assert abs(squares.mean() - (count - torch.stack(given_count).var(correction=0))) < 4 * squares.std() / 20_000**0.5


@pytest.mark.parametrize("n_samples", [8, 14, 40])
def test_error_bars_cover_the_truth(n_samples):
    "Coverage: over many estimates, the claimed variance is the true one, and the interval of Student's t holds 95 %."
    model, x0 = RandomDenoiser(3, 6, 1), torch.tensor([[0, 1, 2, 0, 1, 1]])
    truth, repeats = nelbo_by_table(model, x0, 3), 3000
    mean, error = estimate_nelbo(model, x0.expand(repeats, 6), 3, n_samples=n_samples, batch_size=65536, generator=gen(0))
    assert abs(mean.mean() - truth) < 4 * mean.std() / repeats**0.5
    squares = error.square()
    spread = (squares.var() + 2 * mean.var() ** 2).sqrt() / repeats**0.5  # of the difference of two variances
    assert abs(squares.mean() - mean.var()) < 4 * spread
    quantile = {8: 12.706, 14: 4.303, 40: 2.262}[n_samples]  # of Student's t with R - 1 degrees of freedom: 1, 2, 9
    inside = ((mean - truth).abs() < quantile * error).double().mean()
    assert abs(inside - 0.95) < 4 * (0.95 * 0.05 / repeats) ** 0.5


@pytest.mark.parametrize("n, n_samples", [(3, 7), (3, 6), (9, 10), (9, 1), (40, 128), (5, 33)])
def test_plans_hold_what_they_promise(n, n_samples):
    plan = mask_plan(torch.tensor([n, n]), n_samples, gen(0))
    assert plan.exact.tolist() == [2**n - 1 <= n_samples] * 2
    assert len(plan.text) == 2 * min(n_samples, 2**n - 1) and plan.count.min() >= 1 and plan.count.max() <= n
    for text in range(2):
        mine = plan.text == text
        sizes = torch.bincount(plan.replicate[mine])
        if not plan.exact[text]:  # each replicate is an estimate of its own, with even counts
            assert sizes.max() - sizes.min() <= 1 and len(sizes) == min(n_samples, max(2, n_samples // 4), 16)
            for r, size in enumerate(sizes):
                counts = plan.count[mine & (plan.replicate == r)]
                times = torch.bincount(counts, minlength=n + 1)[1:]
                assert times.min() >= size // n and times.max() <= -(-size // n)
        each = (plan.weight * plan.count)[mine]  # hidden tokens x weight add up to n in a replicate
        assert torch.allclose(torch.zeros(len(sizes)).double().index_add(0, plan.replicate[mine], each), torch.tensor(float(n)).double())


def test_exact_plans_try_each_mask_once_and_positions_are_equally_likely():
    seen = []

    def denoiser(ids):
        seen.append(ids)
        return torch.zeros(*ids.shape, 3)

    maskable = torch.tensor([[0, 1, 1, 0, 1]]).bool()
    mean, error = estimate_nelbo(denoiser, torch.zeros(1, 5, dtype=torch.long), 2, n_samples=9, maskable=maskable)
    hidden = torch.cat(seen) == 2
    assert len(hidden) == 7 and len(hidden.unique(dim=0)) == 7 and not (hidden & ~maskable).any()
    assert error == 0 and abs(mean - 3 * math.log(3)) < 1e-6
    seen.clear()
    estimate_nelbo(denoiser, torch.zeros(4000, 6, dtype=torch.long), 2, n_samples=10, batch_size=4096, generator=gen(0))
    share = (torch.cat(seen) == 2).double().mean(0)
    assert (share - 3.5 / 6).abs().max() < 4 * 0.5 / 40_000**0.5


def test_rows_of_different_length_and_one_token_answers():
    model, x0 = RandomDenoiser(3, 4, 0), torch.tensor([[0, 1, 2, 0], [2, 1, 0, 0]])
    maskable = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    mean, error = estimate_nelbo(model, x0, 3, n_samples=14, batch_size=10, generator=gen(0), maskable=maskable)
    exact = nelbo_by_table(model, x0, 3, maskable)
    assert abs(mean[0] - exact[0]) < 1e-10 and error[0] == 0 and error[1] > 0
    assert abs(mean[1] - exact[1]) < 12 * error[1]


def test_padding_is_cut_and_never_hidden():
    "Rows sorted by length, batches no wider than their longest row; the answer is that of each row alone."
    shapes, x0 = [], torch.randint(3, (3, 6), generator=gen(0))
    attention = torch.arange(6) < torch.tensor([[2], [6], [4]])
    models = {length: RandomDenoiser(3, length, length) for length in (2, 4, 6)}

    def denoiser(ids, attention_mask=None):
        shapes.append(ids.shape[1])
        lengths = torch.full((len(ids),), ids.shape[1]) if attention_mask is None else attention_mask.sum(1)
        logits = torch.zeros(*ids.shape, 4, dtype=torch.float64)
        for row, length in enumerate(lengths.tolist()):
            logits[row, :length] = models[length](ids[row : row + 1, :length])[0]
        return logits

    mean, error = estimate_nelbo(denoiser, x0, 3, attention_mask=attention, batch_size=15)
    for row, length in enumerate((2, 6, 4)):
        assert abs(mean[row] - nelbo_by_table(models[length], x0[row : row + 1, :length], 3)) < 1e-10
    assert shapes == sorted(shapes, reverse=True) and shapes[-1] < 6 and (error == 0).all()


@pytest.mark.parametrize("batch_size, calls", [(1, 36), (7, 6), (8, 5), (1000, 1)])
def test_passes_are_batched_and_batch_size_changes_nothing_else(batch_size, calls):
    model, count = RandomDenoiser(2, 5, 0), [0]

    def counting(ids):
        count[0] += 1
        assert len(ids) <= batch_size
        return model(ids)

    x0 = torch.randint(2, (3, 5), generator=gen(0))
    mean, error = estimate_nelbo(counting, x0, 2, n_samples=12, batch_size=batch_size, generator=gen(0))
    whole, bars = estimate_nelbo(model, x0, 2, n_samples=12, generator=gen(0))
    assert torch.allclose(mean, whole) and torch.allclose(error, bars) and count[0] == calls


def test_shared_random_numbers_hide_the_same_tokens():
    seen = []

    def denoiser(ids):
        seen.append(ids)
        return torch.zeros(*ids.shape, 3)

    rows = {"ids": torch.zeros(2, 9, dtype=torch.long), "maskable": torch.ones(2, 9, dtype=torch.bool)}
    for shared in (True, False):
        nelbo_replicates(lambda batch: as_denoiser(denoiser, 2), rows, 2, 20, 64, gen(0), shared)
        assert torch.equal(seen[-1][:20], seen[-1][20:]) == shared


def test_one_sample_has_no_standard_error_and_an_impossible_text_an_infinite_one():
    model, x0 = RandomDenoiser(2, 3, 0), torch.tensor([[0, 1, 1]])
    assert estimate_nelbo(model, x0, 2, n_samples=1, generator=gen(0))[1].item() == math.inf
    never = torch.tensor([0.0, -math.inf, 0.0])
    mean, error = estimate_nelbo(lambda ids: never.expand(*ids.shape, 3), x0, 2, n_samples=4, generator=gen(0))
    assert mean.item() == error.item() == math.inf
    mean, error = mean_and_error(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([False, True]))
    assert mean.tolist() == [2, 2] and torch.allclose(error, torch.tensor([1.0, 0.0]))


# the mistakes


def test_forcing_a_mask_inflates_short_texts_sevenfold():
    x0 = torch.zeros(200_000, 1, dtype=torch.long)
    noised = noise_batch(x0, 1, generator=gen(0), stratified=False)

    def uniform(ids):  # every token costs log 2
        return torch.zeros(*ids.shape, 2, dtype=torch.float64)

    uniform = as_denoiser(uniform, 1)
    honest, forced = elbo_terms(uniform, noised), elbo_terms(uniform, noised | {"mask": x0 == 0})
    for losses, factor in ((honest, 1.0), (forced, math.log(1000) / (1 - 1e-3))):
        assert abs(losses.mean() / math.log(2) - factor) < 4 * losses.std() / math.log(2) / 200_000**0.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: elbo_loss(m, x, 3, torch.zeros(2, 4)), "nothing to learn"),
        (lambda m, x: elbo_loss(m, torch.full((2, 4), 3), 3), "contain the mask token"),
        (lambda m, x: elbo_loss(m, x), "mask_id is None"),
        (lambda m, x: estimate_nelbo(lambda ids: m(ids)[..., :2], x, 3), "outside the vocabulary of 2"),
        (lambda m, x: exact_nelbo(m, torch.zeros(1, 17, dtype=torch.long), 3), "at most 16"),
        (lambda m, x: estimate_nelbo(m, x, 3, n_samples=0), "n_samples 0"),
        (lambda m, x: estimate_nelbo(m, x, 3, batch_size=0), "batch_size 0"),
        (lambda m, x: estimate_nelbo(m, x, 3, maskable=torch.tensor([[1] * 4, [0] * 4])), "maskable 0"),
        (lambda m, x: estimate_nelbo(lambda ids: m(ids) * math.nan, x, 3), "NaN"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(UserError, match=message):
        call(RandomDenoiser(3, 4, 0), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]]))
