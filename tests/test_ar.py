"The autoregressive model: exact scores, and a cache that changes nothing."
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from nanollada.ar import ar_loss, ar_terms, decode, draw_token, filter_logits, scored_places, token_nll
from nanollada.backbone import Backbone, BackboneConfig, save_model
from nanollada.core import UserError

CFG = BackboneConfig(31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, objective="ar",
                     max_position_embeddings=64)


@pytest.fixture(scope="module")
def model() -> Backbone:
    torch.manual_seed(0)
    model = Backbone(CFG).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def ids(B=4, L=20, seed=0):
    return torch.randint(0, 31, (B, L), generator=torch.Generator().manual_seed(seed))


def test_loss_equals_that_of_transformers(model, tmp_path):
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ar_loss(model, ids()).item() == pytest.approx(theirs(ids(), labels=ids()).loss.item(), rel=1e-5)


@torch.no_grad()
def test_terms_are_sums_of_conditionals_where_scored(model):
    x, scored = ids(), torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = torch.zeros(4)
    for i in range(1, 20):
        log_probs = model(x[:, :i], causal=True)[:, -1].log_softmax(-1)
        expected -= torch.where(scored[:, i], log_probs.gather(1, x[:, i : i + 1])[:, 0], torch.zeros(4))
    torch.testing.assert_close(ar_terms(model, x, scored), expected, atol=1e-4, rtol=1e-5)
    assert ar_loss(model, x, scored).item() == pytest.approx((expected.sum() / scored[:, 1:].sum()).item(), rel=1e-4)


@torch.no_grad()
def test_probabilities_of_all_texts_sum_to_one():
    torch.manual_seed(1)
    tiny = Backbone(BackboneConfig(4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).double()
    rest = torch.cartesian_prod(*[torch.arange(4)] * 4)
    texts = torch.cat([torch.zeros(len(rest), 1, dtype=torch.long), rest], 1)
    # the loss is computed in float32: 2^-24 relative, four terms
    assert (-ar_terms(tiny, texts)).double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_gradient_reaches_every_weight(model):
    ar_loss(model, ids()).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())
    model.zero_grad()


def test_nothing_to_score(model):
    with pytest.raises(UserError, match="no token to predict"):
        ar_loss(model, ids(2, 1))
    with pytest.raises(UserError, match="no token to predict"):
        ar_loss(model, ids(), torch.zeros(4, 20, dtype=torch.bool))


@pytest.mark.parametrize("dials", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.6, "temperature": 0.7}])
def test_cached_equals_uncached(model, dials):
    texts = [decode(model, ids(3, 6), 30, use_cache=cached, generator=torch.Generator().manual_seed(2), **dials) for cached in (True, False)]
    assert torch.equal(*texts)


def test_rows_of_a_padded_batch_equal_single_rows(model):
    prompts = [ids(1, n, seed=n) for n in (3, 5, 8)]
    batch = torch.cat([torch.nn.functional.pad(p, (8 - p.shape[1], 0)) for p in prompts])
    real = torch.tensor([[0] * (8 - p.shape[1]) + [1] * p.shape[1] for p in prompts])
    together = decode(model, batch, 20, temperature=0, attention_mask=real)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[8 - prompt.shape[1] :], decode(model, prompt, 20, temperature=0)[0])


def test_rows_end_at_eos_and_stay_ended(model):
    free = decode(model, ids(4, 3), 30, temperature=0)
    eos = free[0, 8].item()
    ended = decode(model, ids(4, 3), 30, temperature=0, eos_id=eos)
    for row, long in zip(ended, free, strict=True):
        hits = (long[3:] == eos).nonzero()
        cut = 3 + hits[0, 0].item() + 1 if len(hits) else len(row)
        assert torch.equal(row[:cut], long[:cut]) and (row[cut:] == eos).all()


def test_draws_follow_the_distribution():
    logits, n = torch.randn(1, 6, generator=torch.Generator().manual_seed(3)), 20_000
    for dials in ({"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}):
        draws = draw_token(logits.expand(n, 6), generator=torch.Generator().manual_seed(4), **dials)
        p = filter_logits(logits, **dials).softmax(-1)[0]
        share = draws.bincount(minlength=6) / n
        assert ((share - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt()).all()


def test_filters_keep_what_they_promise():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = {p: int((filter_logits(logits, top_p=p) > -math.inf).sum()) for p in (0.01, 0.39, 0.41, 0.69, 0.71, 0.91, 1.0)}
    assert kept == {0.01: 1, 0.39: 1, 0.41: 2, 0.69: 2, 0.71: 3, 0.91: 4, 1.0: 4}
    assert [int((filter_logits(logits, top_k=k) > -math.inf).sum()) for k in (1, 2, 4, 9)] == [1, 2, 4, 4]


@pytest.mark.parametrize("wrong, message", [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"max_new_tokens": 60}, "context of 64"), ({"temperature": -1.0}, "temperature -1"),
    ({"top_k": 0}, "top_k 0"), ({"top_p": 1.5}, "top_p 1.5"),
])
def test_bad_settings(model, wrong, message):
    with pytest.raises(UserError, match=message):
        decode(model, ids(1, 6), **{"max_new_tokens": 5} | wrong)


def test_empty_prompt(model):
    with pytest.raises(UserError, match="at least one token"):
        decode(model, torch.zeros(1, 0, dtype=torch.long), 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_token_nll_is_the_cross_entropy_with_its_gradient(dtype, rows):
    g = torch.Generator().manual_seed(rows)
    logits = (5 * torch.randn(rows, 6400, generator=g)).to(dtype).requires_grad_()  # 200 rows are three pieces
    targets, weights = torch.randint(0, 6400, (rows,), generator=g), torch.rand(rows, generator=g)
    before = logits.detach().clone()
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    ours = token_nll(logits, targets)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    (mine,), (theirs,) = (torch.autograd.grad((weights * nll).sum(), logits) for nll in (ours, exact))
    assert mine.dtype == dtype and torch.equal(logits, before)
    unit = torch.finfo(dtype).eps  # one rounding, of numbers below 1
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=unit, atol=1e-6)


def test_token_nll_of_forbidden_tokens_and_of_nothing():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    loss = token_nll(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(loss.sum(), logits)[0].tolist()[0] == pytest.approx([-0.5, 0.0, 0.5])
    assert token_nll(logits, torch.tensor([1])).item() == math.inf
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = token_nll(empty, torch.zeros(0, dtype=torch.long))
    assert loss.shape == (0,) and torch.autograd.grad(loss.sum(), empty)[0].shape == (0, 3)


def test_places_known_beforehand_change_nothing(model):
    scored = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    scored[:, 0] = True  # never counts
    places = scored_places(scored)
    assert places.tolist() == [20 * b + i for b in range(4) for i in range(1, 20) if scored[b, i]]
    assert torch.equal(ar_terms(model, ids(), scored, places=places), ar_terms(model, ids(), scored))
