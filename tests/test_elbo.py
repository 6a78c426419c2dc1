"The loss is a bound: enumeration agrees with itself, with the data, and with every estimator."

import math

import pytest
import torch
from nanollada.core import UserError
from nanollada.elbo import (
    METHODS, ce_by_noise, elbo_loss, elbo_terms, enumerate_ce, estimate_nelbo, exact_log_likelihood,
    exact_nelbo, exact_nelbo_fixed_count, exact_nelbo_orders, masked_ce, order_log_probs, subset_weights,
)
from nanollada.masking import Noised, complementary, fixed_count_batch, noise_batch
from oracles import RandomDenoiser, TableDenoiser, random_table

SCHEDULES = ("linear", "cosine", "polynomial")


def gen(seed):
    return torch.Generator().manual_seed(seed)


def mixture(first, second, share):
    return lambda ids: torch.lerp(first(ids).softmax(-1), second(ids).softmax(-1), share).log()


# the bound, by enumeration


@pytest.mark.parametrize("vocab, length", [(2, 1), (2, 2), (3, 4), (5, 3), (2, 7)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("subs", [False, True])
def test_all_forms_of_the_nelbo_agree(vocab, length, seed, subs):
    model, x0 = RandomDenoiser(vocab, length, seed), torch.randint(vocab, (3, length), generator=gen(seed))
    reference = exact_nelbo_orders(model, x0, vocab, subs=subs)
    for schedule in SCHEDULES:
        assert (exact_nelbo(model, x0, vocab, subs=subs, schedule=schedule) - reference).abs().max() < 1e-10
    assert (exact_nelbo_fixed_count(model, x0, vocab, subs=subs) - reference).abs().max() < 1e-10


@pytest.mark.parametrize("n", [1, 2, 5, 9, 16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_subset_weights_are_beta_functions(n, schedule):
    beta = [math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n) for k in range(1, n + 1)]
    weights = subset_weights(n, schedule)
    beta = torch.tensor(beta, dtype=torch.float64)
    assert weights[0] == 0 and torch.allclose(weights[1:], beta, atol=1e-13)
    counted = sum(w * k * math.comb(n, k) for k, w in enumerate(weights.tolist()))
    assert abs(counted - n) < 1e-10  # every token counts once


def test_only_maskable_tokens_are_enumerated():
    model, x0 = RandomDenoiser(3, 5, 0), torch.tensor([[0, 1, 2, 1, 0]])
    maskable = torch.tensor([[0, 1, 0, 1, 1]])
    roads = [exact_nelbo(model, x0, 3, maskable), exact_nelbo_fixed_count(model, x0, 3, maskable),
             exact_nelbo_orders(model, x0, 3, maskable)]
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
    assert abs(exact_log_likelihood(model, texts, vocab, subs=True).exp().sum() - 1) < 1e-12
    assert exact_log_likelihood(model, texts, vocab).exp().sum() < 0.95  # some of it went to MASK


def test_subs_lowers_each_term_by_the_wasted_mass():
    model, x0 = RandomDenoiser(3, 4, 0), torch.tensor([[0, 1, 2, 0]])
    masks, plain = enumerate_ce(model, x0[0], torch.arange(4), 3)
    _, subs = enumerate_ce(model, x0[0], torch.arange(4), 3, subs=True)
    wasted = model(torch.where(masks, 3, x0)).softmax(-1)[..., 3]
    assert torch.allclose(subs, torch.where(masks, plain + (1 - wasted).log(), 0.0))


def test_enumerated_masks_do_not_depend_on_the_batch_size():
    model, x = RandomDenoiser(2, 5, 0), torch.tensor([0, 1, 1, 0, 1])
    (masks, whole), (_, parts) = (enumerate_ce(model, x, torch.arange(5), 2, batch_size=b) for b in (99, 7))
    assert torch.equal(whole, parts) and len(masks.unique(dim=0)) == 32 and (whole[~masks] == 0).all()


# the loss


@pytest.mark.parametrize("make", [noise_batch, fixed_count_batch])
@pytest.mark.parametrize("seed", range(5))
def test_terms_are_the_sum_in_the_paper(make, seed):
    model, x0 = RandomDenoiser(3, 5, seed), torch.randint(3, (4, 5), generator=gen(seed))
    noised = make(x0, 3, generator=gen(seed))
    logp = model(noised.xt).log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    expected = -(noised.weight * noised.mask * logp).sum(1)
    assert torch.allclose(elbo_terms(model, x0, noised), expected)
    assert torch.allclose(elbo_loss(model, x0, 3, noised=noised), expected.sum() / 20)


def test_loss_ignores_padding_and_passes_the_attention_mask():
    model, x0 = RandomDenoiser(3, 6, 0), torch.randint(3, (8, 6), generator=gen(0))
    attention = torch.ones(8, 6, dtype=torch.long)
    attention[:, 4:] = 0
    calls = []

    def padded(ids, attention_mask=None):
        calls.append(attention_mask)
        return model(ids)

    loss, logs = elbo_loss(padded, x0, 3, generator=gen(1), attention_mask=attention, n_bins=5)
    assert torch.equal(calls[0], attention) and logs["tokens"] == 32
    noised = noise_batch(x0, 3, attention.bool(), gen(1))
    assert torch.allclose(loss, elbo_terms(model, x0, noised).sum() / 32)
    assert logs["ce_count"].sum() == noised.mask.sum() and not noised.mask[:, 4:].any()


def test_logs_are_sorted_by_noise_level_and_add_up():
    x0 = torch.zeros(4, 3, dtype=torch.long)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    noised = Noised(torch.where(mask, 3, x0), mask, torch.tensor([0.05, 0.1, 1.0, 0.5]), torch.ones(4, 1))
    sums, counts = ce_by_noise(mask * 2.0, noised, 10)
    assert sums.tolist() == [6, 0, 0, 0, 0, 0, 0, 0, 0, 6] and counts.tolist() == [3] + [0] * 8 + [3]


def test_a_batch_without_masks_has_loss_zero_and_a_gradient():
    weight = torch.zeros(3, 4, requires_grad=True)
    x0 = torch.zeros(1, 2, dtype=torch.long)
    nothing = Noised(x0, torch.zeros(1, 2, dtype=torch.bool), torch.tensor([1e-3]), torch.tensor([[1e3]]))
    loss = elbo_loss(lambda ids: weight[ids], x0, 2, noised=nothing)
    loss.backward()
    assert loss == 0 and (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_cross_entropy_is_taken_in_float32_or_better(dtype):
    logits = (20 * torch.randn(4, 8, 50, generator=gen(0))).to(dtype)
    x0 = torch.randint(49, (4, 8), generator=gen(1))
    noised = noise_batch(x0, 49, generator=gen(2), t=torch.ones(4))
    ce = masked_ce(lambda ids: logits, x0, noised)
    exact = -logits.double().log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    assert ce.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(ce.double(), exact, rtol=1e-5, atol=1e-5)


def test_only_masked_positions_are_projected_and_the_gradient_is_the_same():
    embed = torch.randn(6, 4, generator=gen(0), dtype=torch.float64)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.asked = torch.nn.Parameter(embed.clone()), 0

        def forward(self, ids, attention_mask=None):
            return embed[ids] @ self.head.T

        def at(self, ids, where, attention_mask=None):
            self.asked += int(where.sum())
            return embed[ids[where]] @ self.head.T

    network, x0 = Network(), torch.randint(5, (3, 7), generator=gen(1))
    noised = noise_batch(x0, 5, generator=gen(2))
    gradients = []
    for denoiser in (network, lambda ids: network(ids)):
        network.zero_grad()
        elbo_loss(denoiser, x0, 5, noised=noised).backward()
        gradients.append(network.head.grad.clone())
    assert torch.allclose(*gradients) and network.asked == noised.mask.sum()


# the estimators


def span(method, eps):
    "The noise levels a method averages over."
    return (0.0, 1.0) if method.endswith("count") else (eps, 1 - eps if method == "complementary" else 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("subs", [False, True])
def test_estimators_are_unbiased(method, subs):
    scores, eps = [], 0.02
    for seed in range(25):
        model, x0 = RandomDenoiser(3, 4, seed), torch.randint(3, (1, 4), generator=gen(seed))
        mean, error = estimate_nelbo(model, x0, 3, 2500, method, 2500, gen(seed + 100), subs=subs, eps=eps)
        scores.append((mean - exact_nelbo(model, x0, 3, subs=subs, t_range=span(method, eps))) / error)
    z = torch.cat(scores)
    assert z.abs().max() < 4 and abs(z.mean()) < 4 / 25**0.5


@pytest.mark.parametrize("method", METHODS)
def test_standard_errors_are_honest(method):
    model, x0 = RandomDenoiser(3, 4, 0), torch.tensor([[0, 1, 2, 0]]).expand(1500, 4)
    mean, error = estimate_nelbo(model, x0, 3, 64, method, 4096, gen(0), eps=0.05)
    ratio = error.square().mean() / mean.var()  # both estimate the variance of the mean
    assert abs(ratio - 1) < 0.25  # 1500 repeats: the variance itself is known to about 5 %, heavy tails aside


def exact_variances(model, x, eps):
    "Variance of one sample by enumeration: independent t in (eps, 1), t spread perfectly, uniform counts."
    n, t = x.shape[1], eps + (1 - eps) * (torch.arange(50_000).double() + 0.5)[:, None] / 50_000
    masks, ce = enumerate_ce(model, x[0], torch.arange(n), 3)
    k, total = masks.sum(1), ce.sum(1)
    chance = t**k * (1 - t) ** (n - k)  # of each mask at each noise level
    given_t = (chance * total / t).sum(1)
    independent = (chance * (total / t) ** 2).sum(1).mean() - given_t.mean() ** 2
    count = [1 / n / math.comb(n, j) if j else 0.0 for j in k.tolist()]
    weighted = total * n / k.clamp(min=1)
    counts = (torch.tensor(count) * weighted**2).sum() - (torch.tensor(count) * weighted).sum() ** 2
    return {"t": independent, "stratified": independent - given_t.var(), "fixed_count": counts}


@pytest.mark.parametrize("seed", range(3))
def test_variances_are_what_enumeration_says(seed):
    model, x0, eps = RandomDenoiser(3, 4, seed), torch.tensor([[0, 1, 2, 0]]), 0.05
    variance = {}
    for method in METHODS:
        means = estimate_nelbo(model, x0.expand(4000, 4), 3, 64, method, 65536, gen(seed), eps=eps)[0]
        variance[method] = 64 * means.var()
    for method, exact in exact_variances(model, x0, eps).items():
        assert abs(variance[method] / exact - 1) < 4 * (2 / 4000) ** 0.5  # s.e. of a variance of normals
    assert variance["stratified_count"] < variance["fixed_count"] < variance["t"]


def test_rows_of_different_length_and_one_token_answers():
    model, x0 = RandomDenoiser(3, 4, 0), torch.tensor([[0, 1, 2, 0], [2, 1, 0, 0]])
    maskable = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    mean, error = estimate_nelbo(model, x0, 3, 64, "fixed_count", 10, gen(0), maskable)
    assert torch.allclose(mean[0], exact_nelbo(model, x0, 3, maskable)[0], rtol=1e-6) and error[0] < 1e-6
    assert abs(mean[1] - exact_nelbo(model, x0, 3, maskable)[1]) < 4 * error[1]


@pytest.mark.parametrize("batch_size, calls", [(1, 36), (7, 12), (8, 9), (1000, 1)])
@pytest.mark.parametrize("method", ["stratified_count", "complementary"])
def test_passes_are_batched_and_batch_size_need_not_divide(batch_size, calls, method):
    model, count = RandomDenoiser(2, 3, 0), [0]

    def counting(ids):
        count[0] += 1
        assert len(ids) <= max(batch_size, 2)
        return model(ids)

    x0 = torch.randint(2, (6, 3), generator=gen(0))
    mean, error = estimate_nelbo(counting, x0, 2, 12, method, batch_size, gen(0))
    assert mean.shape == error.shape == (6,) and count[0] == calls


def test_one_group_has_no_standard_error():
    model, x0 = RandomDenoiser(2, 3, 0), torch.tensor([[0, 1, 1]])
    assert estimate_nelbo(model, x0, 2, 1, generator=gen(0))[1].isnan().all()


def test_pairs_cover_each_token_once():
    asked = []

    def denoiser(ids):
        asked.append(ids)
        return torch.zeros(*ids.shape, 3)

    estimate_nelbo(denoiser, torch.tensor([[0, 1, 1, 0]]), 2, 10, "complementary", 4, gen(0))
    hidden = torch.cat(asked) == 2
    assert (hidden[::2] ^ hidden[1::2]).all()


# the mistakes


def test_forcing_a_mask_inflates_short_texts_sevenfold():
    x0 = torch.zeros(200_000, 1, dtype=torch.long)
    noised = noise_batch(x0, 1, generator=gen(0), stratified=False)

    def uniform(ids):  # every token costs log 2
        return torch.zeros(*ids.shape, 2, dtype=torch.float64)

    honest, forced = elbo_terms(uniform, x0, noised), elbo_terms(uniform, x0, noised._replace(mask=x0 == 0))
    for losses, factor in ((honest, 1.0), (forced, math.log(1000) / (1 - 1e-3))):
        assert abs(losses.mean() / math.log(2) - factor) < 4 * losses.std() / math.log(2) / 200_000**0.5


def test_mirrored_batch_is_unbiased_alone():
    model, x0 = RandomDenoiser(3, 4, 0), torch.tensor([[0, 1, 2, 0]]).expand(40_000, 4)
    t = 0.02 + 0.96 * torch.rand(40_000, generator=gen(0))
    noised = noise_batch(x0, 3, generator=gen(1), t=t)
    terms = elbo_terms(model, x0, complementary(x0, noised, 3))
    exact = exact_nelbo(model, x0[:1], 3, t_range=(0.02, 0.98))
    assert abs(terms.mean() - exact) < 4 * terms.std() / 200


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: elbo_loss(m, x, 3, torch.zeros(2, 4)), "no position"),
        (lambda m, x: elbo_loss(m, torch.full((2, 4), 3), 3), "contain the mask token"),
        (lambda m, x: elbo_terms(m, x, noise_batch(x, 3), subs=True), "needs mask_id"),
        (lambda m, x: exact_nelbo(m, torch.zeros(1, 17, dtype=torch.long), 3), "at most 16"),
        (lambda m, x: exact_log_likelihood(m, torch.zeros(1, 9, dtype=torch.long), 3), "at most 8"),
        (lambda m, x: estimate_nelbo(m, x, 3, method="eq3"), "method is 'eq3'"),
        (lambda m, x: estimate_nelbo(m, x, 3, 0), "n_samples is 0"),
        (lambda m, x: estimate_nelbo(m, x, 3, 5, "complementary"), "even number"),
        (lambda m, x: estimate_nelbo(m, x, 3, maskable=torch.tensor([[1] * 4, [0] * 4])), "a row has no"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(UserError, match=message):
        call(RandomDenoiser(3, 4, 0), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]]))


def test_places_known_beforehand_change_nothing():
    model, x0 = RandomDenoiser(3, 5, 0), torch.randint(3, (6, 5), generator=gen(0))
    noised = noise_batch(x0, 3, generator=gen(1))
    places = noised.mask.flatten().nonzero()[:, 0]
    assert torch.equal(masked_ce(model, x0, noised, places=places), masked_ce(model, x0, noised))
