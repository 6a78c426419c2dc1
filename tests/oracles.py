"""Denoisers small enough to know everything about: V words, ids 0 .. V-1, and MASK is id V. All float64."""

import torch
import torch.nn.functional as F


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
