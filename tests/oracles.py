"""Denoisers small enough to know everything about: V words, ids 0 .. V-1, and MASK is id V. All float64."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from nanollada.sampler import CONFIDENCE_RULES, Policy, confidence, most_confident, num_transfer_tokens
from nanollada.masking import get_schedule


class RandomDenoiser:
    "Fixed random logits (V + 1 of them, MASK included) for every canvas of length L."

    def __init__(self, vocab, length, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.base = (vocab + 1) ** torch.arange(length)
        shape = ((vocab + 1) ** length, length, vocab + 1)
        self.table = torch.randn(shape, generator=generator, dtype=torch.float64)

    def __call__(self, ids, attention_mask=None):
        return self.table[(ids * self.base).sum(1)]


class TableDenoiser:
    "True conditionals of a table p of shape (V,) * L: the distribution of each token given what is visible."

    def __init__(self, p):
        self.vocab, self.length, self.p = len(p), p.dim(), p.flatten().double()
        self.texts = torch.cartesian_prod(*[torch.arange(self.vocab)] * self.length).view(-1, self.length)
        self.onehot = F.one_hot(self.texts, self.vocab).flatten(1).double()

    def __call__(self, ids, attention_mask=None):
        fits = (self.texts == ids[:, None]) | (ids[:, None] == self.vocab)
        weight = fits.all(-1) * self.p
        share = (weight @ self.onehot).view(len(ids), self.length, self.vocab) / weight.sum(1)[:, None, None]
        return F.pad(share, (0, 1)).log()


def random_table(vocab, length, seed=0, sharpness=2.0):
    "A random probability for each of the vocab ** length texts."
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab**length, generator=generator, dtype=torch.float64)
    return (sharpness * logits).softmax(0).view((vocab,) * length)


# the NELBO by other roads than the package's: a table of all masks, integrals over the noise level, all orders


def enumerate_ce(denoiser, x, where, mask_id):
    "Every way to hide positions `where` of a text; row m hides where[i] if bit i of m is 1. Masks and nats (2**n, n)."
    n = len(where)
    masks = torch.tensor([[m >> i & 1 for i in range(n)] for m in range(2**n)]).bool()
    hidden = torch.zeros(2**n, len(x), dtype=torch.bool)
    hidden[:, where] = masks
    logp = denoiser(torch.where(hidden, mask_id, x)).double().log_softmax(-1)
    ce = -logp.gather(-1, x.expand(2**n, -1)[..., None])[:, where, 0]
    return masks, torch.where(masks, ce, 0.0)


def subset_weights(n, schedule="linear", t_range=(0.0, 1.0)):
    "What the weight of one mask that hides k = 0 ... n tokens adds up to over all noise levels (Gauss-Legendre)."
    schedule, (low, high) = get_schedule(schedule), t_range
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(128))
    t = low + (high - low) * (nodes + 1) / 2
    p, k = schedule.p_mask(t)[:, None], torch.arange(n + 1)
    share = schedule.rate(t)[:, None] * p ** (k - 1) * (1 - p) ** (n - k)
    return (weights[:, None] / 2 * share).sum(0) * (k > 0)


def nelbo_by_table(denoiser, x0, mask_id, maskable=None, schedule="linear", t_range=(0.0, 1.0)):
    "The NELBO of each row: masks of the table, weighted by the integral over the noise level."
    answers = []
    for x, allowed in zip(x0, torch.ones_like(x0) if maskable is None else maskable):
        masks, ce = enumerate_ce(denoiser, x, allowed.nonzero()[:, 0], mask_id)
        answers.append((subset_weights(masks.shape[1], schedule, t_range)[masks.sum(1)] * ce.sum(1)).sum())
    return torch.stack(answers)


def nelbo_by_count(denoiser, x0, mask_id, maskable=None):
    "LLaDA Eq. 6 word by word: l uniform on 1..n, a uniform subset of that size, weight n/l."
    answers = []
    for x, allowed in zip(x0, torch.ones_like(x0) if maskable is None else maskable):
        masks, ce = enumerate_ce(denoiser, x, allowed.nonzero()[:, 0], mask_id)
        n = masks.shape[1]
        weights = ce.new_tensor([0.0] + [1 / n * n / k / math.comb(n, k) for k in range(1, n + 1)])
        answers.append((weights[masks.sum(1)] * ce.sum(1)).sum())
    return torch.stack(answers)


def order_log_probs(denoiser, x0, mask_id, maskable=None):
    "The log-probability of each row, asked token by token, in every order: a list of (n!,)."
    answers = []
    for x, allowed in zip(x0, torch.ones_like(x0) if maskable is None else maskable):
        where = allowed.nonzero()[:, 0]
        n, ce = len(where), enumerate_ce(denoiser, x, where, mask_id)[1]
        orders = torch.tensor(list(itertools.permutations(range(n))))  # (n!, n)
        revealed = (2**orders).cumsum(1) - 2**orders  # bits known before each step
        answers.append(-ce[2**n - 1 - revealed, orders].sum(1))
    return answers


def nelbo_by_orders(denoiser, x0, mask_id, maskable=None):
    "The average over all orders of the any-order autoregressive negative log-likelihood."
    return torch.stack([-logp.mean() for logp in order_log_probs(denoiser, x0, mask_id, maskable)])


def exact_log_likelihood(denoiser, x0, mask_id, maskable=None):
    "Log-probability that writing token by token in a uniformly random order ends in each row."
    logps = order_log_probs(denoiser, x0, mask_id, maskable)
    return torch.stack([logp.logsumexp(0) - math.log(len(logp)) for logp in logps])


@torch.no_grad()
def exact_sample_distribution(denoiser, canvas, mask_id, steps, remasking="low_confidence", temperature=1.0):
    "What `write` draws from (V,) * masks, by following every path of the sampler on a small canvas (L,)."
    rules, holes = Policy(steps=steps, temperature=temperature, remasking=remasking), canvas == mask_id
    ids, weight = canvas[None], torch.ones(1, dtype=torch.float64)  # the states, and how likely each is
    for step, quota in enumerate(num_transfer_tokens([int(holes.sum())], steps)[0].tolist()):
        logits = denoiser(ids).index_fill(-1, torch.tensor([mask_id]), -math.inf)
        hazard = 1 / (steps - step)
        parts = [_branches(row, table, mask_id, rules, quota, hazard) for row, table in zip(ids, logits)]
        chance = torch.cat([w * p for w, (_, p) in zip(weight, parts)])
        ids, which = torch.unique(torch.cat([x for x, _ in parts]), dim=0, return_inverse=True)
        weight = torch.zeros(len(ids), dtype=torch.float64).index_add(0, which, chance)
    answer = torch.zeros((logits.shape[-1],) * int(holes.sum()), dtype=torch.float64)
    answer[tuple(ids[:, holes].T)] = weight
    return answer


def _branches(row, logits, mask_id, rules, quota, hazard):
    "Every canvas that one step can lead to from `row` (L,), with its probability; a canvas may occur twice."
    here = row == mask_id
    logits, n, width = logits[here], int(here.sum()), logits.shape[-1]
    if n == 0:
        return row[None], torch.ones(1, dtype=torch.float64)
    heat = 1.0 if rules.remasking == "ancestral" else rules.temperature
    probs = (logits.double() / (heat or 1)).softmax(-1)
    if not heat:
        probs = torch.eye(width, dtype=torch.float64)[logits.argmax(-1)]
    drawn = torch.cartesian_prod(*[torch.arange(width)] * n).view(-1, n)  # every proposal (V ** n, n)
    chance = probs[torch.arange(n), drawn].prod(-1)
    drawn, chance = drawn[chance > 0], chance[chance > 0]
    found = []
    for commit, share in _choices(logits, drawn, rules, quota, hazard):
        after = row.repeat(len(drawn), 1)
        after[:, here] = torch.where(commit, drawn, mask_id)
        found.append((after, chance * share))
    return torch.cat([ids for ids, _ in found]), torch.cat([p for _, p in found])


def _choices(logits, drawn, rules, quota, hazard):
    "Each way to commit some of the proposals (G, n), a bool mask, with its probability."
    n = drawn.shape[1]
    if rules.remasking in CONFIDENCE_RULES:
        score = confidence(logits.repeat(len(drawn), 1), drawn.reshape(-1), rules.remasking).view(-1, n)
        yield most_confident(score, torch.full((len(drawn),), quota)), 1.0
    elif rules.remasking == "random":
        for subset in itertools.combinations(range(n), quota):
            yield torch.isin(torch.arange(n), torch.tensor(subset, dtype=torch.long)), 1 / math.comb(n, quota)
    else:
        for subset in itertools.product([False, True], repeat=n):
            share = hazard ** sum(subset) * (1 - hazard) ** (n - sum(subset))
            if share:
                yield torch.tensor(subset), share
