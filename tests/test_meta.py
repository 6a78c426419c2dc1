"""Ready for a GPU without one: on the meta device there are no values, so whatever would make a GPU wait for the host raises.

The one exception, named: `sampler.unfinished`, once a pass. Plans, noise levels and places are made on the CPU beforehand.
"""
import pytest
import torch

from nanollada import sampler
from nanollada.ar import Autoregressive, with_places
from nanollada.backbone import Backbone, preset
from nanollada import editing
from nanollada.blocks import BlockDiffusion, BlockNoise
from nanollada.editing import EditPolicy, Editing, Levenshtein
from nanollada.elbo import MaskedDiffusion
from nanollada.fast import BlockDenoiser, CachedDenoiser, CausalDenoiser
from nanollada.guidance import RestrictedDenoiser
from nanollada.sampler import Policy, by_threshold, finish, generate, prompt_canvas, write
from nanollada.trainer import TrainConfig, make_optimizers

V, MASK = 40, 39


def model_on_meta(objective="diffusion", **changes):
    if objective == "block":
        changes = {"block_length": 4, "causal_clean": True} | changes
    with torch.device("meta"):
        return Backbone(preset("toy", V, objective=objective, mask_token_id=MASK, **changes))


def rows(B=4, L=12, padded=False, documents=False):
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(0, MASK, (B, L), generator=made)
    found = {"ids": ids, "scored": (torch.arange(L) >= 3).expand(B, L).clone()}
    if padded:
        found["real"] = torch.arange(L) < torch.tensor([L, L - 1, L - 2, L])[:, None]
        found["scored"] &= found["real"]
    if documents:
        found["document_ids"] = (torch.arange(L) // 5).expand(B, L)
    return found


OBJECTIVES = {
    "ar": (Autoregressive(), {}),
    "ar by rows": (Autoregressive(per="row"), {}),
    "diffusion": (MaskedDiffusion(MASK), {}),
    "diffusion, shifted, by counts, by rows": (MaskedDiffusion(MASK, shift=True, by="count", per="row"), {}),
    "diffusion, padded": (MaskedDiffusion(MASK), {"padded": True}),
    "diffusion, documents apart": (MaskedDiffusion(MASK), {"documents": True}),
    "ar, documents apart": (Autoregressive(), {"documents": True}),
    "blocks": (BlockDiffusion(MASK, BlockNoise(4), causal=True, confidence=1.0), {}),
    "blocks, padded, by rows, in pairs": (BlockDiffusion(MASK, BlockNoise(4, complementary=True), per="row"), {"padded": True}),
    "blocks, documents apart": (BlockDiffusion(MASK, BlockNoise(4), causal=True), {"documents": True}),
    "edits": (Editing(MASK, True, vocab_size=V), {}),
    "edits of its own proposals, padded": (Editing(MASK, vocab_size=V, own=1.0, per="row", by="count"), {"padded": True}),
    "edits, documents apart": (Editing(MASK, vocab_size=V, own=1.0), {"documents": True}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_forward_and_backward(name):
    objective, kind = OBJECTIVES[name]
    model = model_on_meta(objective.name).train()
    batch = with_places(objective.noise(rows(**kind), torch.Generator().manual_seed(1)))
    batch = {key: value.to("meta") for key, value in batch.items()}
    nats, count = objective.terms(model, batch)
    assert nats.shape == count.shape == (len(batch["ids"]),) and nats.device.type == "meta"
    (nats.sum() / count.sum()).backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_of_the_weights(optimizer):
    model = model_on_meta()
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for one in optimizers:
        one.step()
        one.zero_grad(set_to_none=True)


@pytest.fixture
def asked(monkeypatch):
    "The one question of a pass, answered as if each pass had written the leftmost open column; counts the questions."
    state = {"questions": 0}

    def unfinished(todo):
        assert todo.device.type == "meta"
        state["questions"] += 1
        state["open"][:, int(state["open"].any(0).float().argmax())] = False
        return state["open"].clone()

    monkeypatch.setattr(sampler, "unfinished", unfinished)
    return state


def run(denoiser, asked, policy, attention_mask=None):
    prompt = torch.zeros(3, 4, dtype=torch.long, device="meta")
    canvas = prompt_canvas(prompt, MASK, 8, attention_mask)
    blind = type(policy) is Policy and policy.commit == "quota" and policy.eos_id is None  # asks once, at the very end
    asked["open"] = canvas["maskable"].clone() if not blind else torch.zeros_like(canvas["maskable"])
    steps = list(write(denoiser, policy=policy, **canvas))
    assert steps[-1].ids.shape == (3, 12) and steps[-1].ids.device.type == "meta"
    return steps


COMMITS = [Policy(block_length=4, commit=by_threshold, limit=0.9, patience=2, eos_id=1),
           Policy(block_length=4, commit=by_threshold, limit=0.9, temperature=0.7), Policy(block_length=4, cfg_scale=1.0),
           Policy(block_length=4, remasking="entropy", temperature=1.0, top_k=5, top_p=0.9),
           Policy(block_length=4, suppress_confidence=(1,), suppress_tokens=(2,))]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", COMMITS, ids=range(len(COMMITS)))
@pytest.mark.parametrize("shift", [False, True])
def test_the_cached_writer_asks_once_a_pass(asked, policy, shift, padded):
    model = model_on_meta(shift=shift).eval()
    real = torch.ones(3, 4, dtype=torch.long, device="meta") if padded else None
    steps = run(CachedDenoiser(model), asked, policy, real)
    assert asked["questions"] <= len(steps) + 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_autoregressive_decoding_asks_once_a_token(asked, temperature):
    model = model_on_meta("ar").eval()
    steps = run(CausalDenoiser(model), asked, Policy(block_length=1, temperature=temperature, eos_id=1))
    assert len(steps) == 8 and asked["questions"] <= 9


@pytest.mark.parametrize("padded", [False, True])
def test_the_block_writer_asks_once_a_pass(asked, padded):
    real = torch.ones(3, 4, dtype=torch.long, device="meta") if padded else None
    steps = run(BlockDenoiser(model_on_meta("block").eval()), asked, COMMITS[0], real)
    assert asked["questions"] <= len(steps) + 1


def test_deleting_and_splitting_learn_without_a_question():
    how = Levenshtein(mask_id=MASK, eos_id=1, delete=V, split=V + 1)
    with torch.device("meta"):
        model = Backbone(preset("toy", V + 2, objective="diffusion", mask_token_id=MASK))
    ids = torch.randint(2, MASK, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 1
    batch = with_places(how.noise({"ids": ids}, torch.Generator().manual_seed(1)))
    nats, count = how.terms(model, {key: value.to("meta") for key, value in batch.items()})
    (nats.sum() / count.sum()).backward()
    assert nats.shape == count.shape == (4,)


@pytest.mark.parametrize("policy", [EditPolicy(block_length=4), EditPolicy(edit=0.0, temperature=0.7, post=2), EditPolicy(edit=None, cfg_scale=1.0)], ids=str)
def test_the_editing_writer_asks_once_a_pass(asked, monkeypatch, policy):
    monkeypatch.setattr(editing, "unfinished", lambda told: torch.cat([sampler.unfinished(told[:, :12]), torch.zeros(3, told.shape[1] - 12).bool()], 1))
    steps = run(model_on_meta(edits=True).eval().denoise, asked, policy)
    assert asked["questions"] <= len(steps) + 1


def test_the_official_algorithm_asks_nothing_before_its_end(asked):
    model = model_on_meta().eval()
    banned = RestrictedDenoiser(model.denoise, [1], torch.ones(1, 12, dtype=torch.bool, device="meta"))
    asked["open"] = torch.zeros(3, 12, dtype=torch.bool)
    for denoiser in (model.denoise, banned):
        asked["questions"] = 0
        prompt = torch.zeros(3, 4, dtype=torch.long, device="meta")
        assert generate(denoiser, prompt, gen_length=8, temperature=0.5).shape == (3, 12)
        assert asked["questions"] <= 1
    assert finish is sampler.finish
