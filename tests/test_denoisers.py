"One contract for everything that answers for hidden tokens: `denoiser(ids)`, `denoiser.at(ids, places)`, `denoiser.mask_id`."

import pytest
import torch
from hash_oracle import MASK_ID, VOCAB, hash_oracle
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from nanollada.backbone import Backbone, BackboneConfig, as_denoiser
from nanollada.core import UserError, make_generator
from nanollada.fast import BlockDenoiser, CachedDenoiser, CausalDenoiser
from nanollada.guidance import RestrictedDenoiser
from nanollada.interop import shifted
from nanollada.sampler import GuidedDenoiser, Policy, finish, generate, write

LENGTH = 9


def network(objective="diffusion", shift=False, **blocks):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    cfg = BackboneConfig(VOCAB, **shape, max_position_embeddings=64, objective=objective, shift=shift, mask_token_id=MASK_ID,
                         initializer_range=0.3, **blocks)
    return Backbone(cfg).double().eval()


def guided(inner):
    return GuidedDenoiser(inner, (torch.arange(LENGTH) < 3)[None], 0.7)


def restricted(inner):
    return RestrictedDenoiser(inner, (1, 5), (torch.arange(LENGTH) > 4)[None])


def foreign(model, config):
    "A small random model of transformers."
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.3)
    return model(config(vocab_size=VOCAB, **shape)).double().eval()


DENOISERS = {
    "function": lambda: as_denoiser(hash_oracle, MASK_ID),
    "backbone": lambda: network().denoise,
    "shifted": lambda: network(shift=True).denoise,
    "cached": lambda: CachedDenoiser(network(shift=True)),
    "causal": lambda: CausalDenoiser(network("ar")),
    "blocks": lambda: BlockDenoiser(network("block", block_length=3, causal_clean=True), 2),
    "blocks read by blocks": lambda: BlockDenoiser(network("block", block_length=4)),
    "guided": lambda: guided(as_denoiser(hash_oracle, MASK_ID)),
    "guided cached": lambda: guided(CachedDenoiser(network())),
    "bert": lambda: as_denoiser(foreign(BertForMaskedLM, BertConfig), MASK_ID),
    "llama, shifted": lambda: shifted(foreign(LlamaForCausalLM, LlamaConfig), MASK_ID),
    "restricted": lambda: restricted(network().denoise),
    "restricted guided": lambda: restricted(guided(as_denoiser(hash_oracle, MASK_ID))),
}


def canvas(rows=3):
    ids = torch.randint(0, MASK_ID, (rows, LENGTH), generator=make_generator(1))
    ids[:, -4:] = MASK_ID
    return ids


@pytest.fixture(params=DENOISERS)
def denoiser(request):
    with torch.no_grad():
        yield DENOISERS[request.param]()


def test_places_are_parts_of_the_whole(denoiser):
    "code.md 3: int64 places, in any order, also twice"
    ids, places = canvas(), torch.tensor([26, 0, 8, 9, 9, 17])
    logits = denoiser(ids)
    assert logits.shape == (3, LENGTH, VOCAB) and denoiser.mask_id == MASK_ID
    torch.testing.assert_close(denoiser.at(ids, places), logits.flatten(0, 1)[places])
    assert denoiser.at(ids, places[:0]).shape == (0, VOCAB)


def test_rows_answer_for_themselves(denoiser):
    ids = canvas()
    torch.testing.assert_close(torch.cat([denoiser(row[None]) for row in ids]), denoiser(ids))


def test_padding_is_not_seen(denoiser):
    ids = canvas()
    real = torch.ones_like(ids)
    real[1, :2] = 0
    answers = [denoiser(ids.index_fill(1, torch.tensor([0, 1]), pad), real)[1, 3:] for pad in (0, 7)]  # a shift asks the vector before
    torch.testing.assert_close(*answers)


def test_the_question_is_left_alone(denoiser):
    ids, kept = canvas(), canvas()
    first = denoiser.at(ids, torch.arange(5))
    assert torch.equal(ids, kept) and torch.equal(denoiser.at(ids, torch.arange(5)), first)


def test_as_denoiser_keeps_it(denoiser):
    assert as_denoiser(denoiser) is denoiser and as_denoiser(denoiser, MASK_ID) is denoiser
    with pytest.raises(UserError, match="mask_id is 3"):
        as_denoiser(denoiser, 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_opened_it_writes_the_same(denoiser, temperature):
    "A cache is refreshed before each pass, or exact: writing with it is writing without it, padding, early ends and all."
    if isinstance(getattr(denoiser, "denoiser", denoiser), CachedDenoiser):
        (getattr(denoiser, "denoiser", denoiser)).refresh = "always"
    if isinstance(denoiser, BlockDenoiser):
        denoiser.model.cfg.block_length = 1  # blocks are written one by one
    ids, real = canvas(4), torch.ones(4, LENGTH, dtype=torch.long)
    real[1, :2] = real[2, :4] = 0
    streams = lambda: [make_generator(0, row) for row in range(4)]
    policy = Policy(block_length=1, temperature=temperature, eos_id=13)

    wanted = finish(write(as_denoiser(lambda ids, attention_mask=None: denoiser(ids, attention_mask), MASK_ID), ids, policy,
                          attention_mask=real, generator=streams()))
    found = finish(write(denoiser, ids, policy, attention_mask=real, generator=streams()))
    assert torch.equal(found, wanted) and (found != MASK_ID).all()


def test_ids_outside_the_vocabulary_are_an_error():
    for made in (network().denoise, CachedDenoiser(network()), CausalDenoiser(network("ar"))):
        with pytest.raises(UserError, match="vocabulary"):
            generate(made, torch.tensor([[VOCAB + 3, 1]]), gen_length=2, block_length=1)


def test_each_kind_of_model_has_its_writer():
    with pytest.raises(UserError, match="CachedDenoiser takes diffusion"):
        CachedDenoiser(network("ar"))
    with pytest.raises(UserError, match="CausalDenoiser takes ar"):
        CausalDenoiser(network())
    with pytest.raises(UserError, match="one token"):
        generate(CausalDenoiser(network("ar")), torch.tensor([[1, 2]]), gen_length=4, block_length=2)
    with pytest.raises(UserError, match="such as bos"):
        generate(CausalDenoiser(network("ar")), torch.zeros(1, 0, dtype=torch.long), gen_length=4, block_length=1)
