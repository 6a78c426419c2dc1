"The autoregressive objective: exact scores, the same by every road."
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from nanollada.ar import Autoregressive, Objective, ar_loss, filter_logits, token_nll, with_places
from nanollada.backbone import Backbone, BackboneConfig, save_run
from nanollada.core import UserError
from nanollada.tokenizer import train_tokenizer

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


def ar_terms(model, x, scored=None, **more):
    "Nats of each row, by the objective."
    objective = Autoregressive()
    rows = {"ids": x, "scored": torch.ones_like(x, dtype=torch.bool) if scored is None else scored, **more}
    return objective.terms(model, with_places(objective.noise(rows)))[0]


def test_loss_equals_that_of_transformers(model, tmp_path):
    save_run(model, train_tokenizer(["some text"], 260), tmp_path)
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


def rows_with_padding():
    "Three rows of 20 columns, of which the last four hold nothing."
    real = torch.arange(20)[None] < torch.tensor([[16], [9], [4]])
    scored = real & (torch.arange(20)[None] >= torch.tensor([[4], [2], [1]]))
    return {"ids": ids(3).masked_fill(~real, 0), "scored": scored, "real": real}


def test_padding_changes_nothing_and_empty_columns_are_cut(model):
    rows, objective = rows_with_padding(), Autoregressive()
    batch = with_places(objective.noise(rows))
    assert batch["ids"].shape == batch["mask"].shape == batch["real"].shape == (3, 16) and batch["weight"].shape == (3, 1)
    assert batch["places"].tolist() == batch["mask"].flatten().nonzero()[:, 0].tolist()
    nats, count = objective.terms(model, batch)
    assert count.tolist() == [12.0, 7.0, 3.0]
    for i, length in enumerate((16, 9, 4)):
        alone = ar_terms(model, rows["ids"][i : i + 1, :length], rows["scored"][i : i + 1, :length])
        torch.testing.assert_close(nats[i], alone[0], rtol=1e-4, atol=1e-4)
    full = with_places(objective.noise(rows | {"real": torch.ones(3, 20, dtype=torch.bool)}))
    assert "real" not in full and full["ids"].shape == (3, 20)


def test_each_row_counts_the_same_in_fine_tuning(model):
    "LLaDA divides a row's nats by the length of its answer."
    rows = rows_with_padding()
    nats, tokens = Autoregressive().terms(model, with_places(Autoregressive().noise(rows)))
    shares, count = Autoregressive(per="row").terms(model, with_places(Autoregressive(per="row").noise(rows)))
    assert count.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(shares, nats / tokens)
    torch.testing.assert_close(Autoregressive(per="row").loss(model, rows), (nats / tokens).mean())


def test_a_row_without_an_answer_counts_nothing(model):
    rows = rows_with_padding()
    rows["scored"][1] = False
    for per in ("token", "row"):
        nats, count = Autoregressive(per).terms(model, with_places(Autoregressive(per).noise(rows)))
        assert nats[1] == 0 and count[1] == 0 and nats.isfinite().all()


def test_the_loss_of_the_chapter_is_the_loss_that_trains(model):
    scored, documents = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) < 0.5, torch.arange(20).expand(4, -1) // 7
    rows = {"ids": ids(), "scored": scored, "document_ids": documents}
    objective = Autoregressive()
    nats, count = objective.terms(model, with_places(objective.noise(rows)))
    assert torch.equal(objective.loss(model, rows), nats.sum() / count.sum())
    assert not torch.isclose(ar_loss(model, ids(), scored), nats.sum() / count.sum())
    assert objective.denoiser(model) is None and isinstance(objective, Objective)


def test_terms_run_forward_and_backward_without_values():
    "design.md: on the meta device anything that waits for a value raises."
    objective = Autoregressive()
    batch = {name: value.to("meta") for name, value in with_places(objective.noise(rows_with_padding())).items()}
    with torch.device("meta"):
        shape = Backbone(CFG)
    nats, count = objective.terms(shape, batch)
    (nats.sum() / count.sum()).backward()
    assert nats.shape == count.shape == (3,) and shape.lm_head.weight.grad.device.type == "meta"


def test_filters_keep_what_they_promise():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = {p: int((filter_logits(logits, top_p=p) > -math.inf).sum()) for p in (0.01, 0.39, 0.41, 0.69, 0.71, 0.91, 1.0)}
    assert kept == {0.01: 1, 0.39: 1, 0.41: 2, 0.69: 2, 0.71: 3, 0.91: 4, 1.0: 4}
    assert [int((filter_logits(logits, top_k=k) > -math.inf).sum()) for k in (1, 2, 4, 9)] == [1, 2, 4, 4]


@pytest.mark.parametrize("dials", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.5}])
def test_filtered_logits_keep_the_proportions_of_what_stays(dials):
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(3))
    kept = filter_logits(logits, **dials)
    stays = kept > -math.inf
    sharp = (logits / dials.get("temperature", 1.0)).softmax(-1) * stays
    torch.testing.assert_close(kept.softmax(-1), sharp / sharp.sum(-1, keepdim=True))
    assert stays.any(-1).all() and stays.gather(1, logits.argmax(-1, keepdim=True)).all()


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
