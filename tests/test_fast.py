"Chapter 13: cached and parallel sampling against the uncached sampler, and each rule against its definition."

import math
from pathlib import Path

import pytest
import torch

from nanollada import sampler
from nanollada.backbone import Backbone, BackboneConfig, load_run, save_run
from nanollada.core import UserError, make_generator
from nanollada.fast import (FAST, CachedDenoiser, CausalDenoiser, WriteConfig, by_entropy, by_factor, check_room,
                            generate_text, write_ids, write_steps)
from nanollada.sampler import Policy, by_threshold, generate, prompt_canvas, write
from nanollada.tokenizer import encode, train_tokenizer

MASK, EOS, N = 22, 3, 12
PADDING = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
PARALLEL = {"threshold": dict(commit=by_threshold, limit=0.3), "factor": dict(commit=by_factor, limit=8.0),
            "entropy": dict(commit=by_entropy, remasking="entropy", limit=3.0)}
TIMID = {"threshold": 1.0, "factor": 1e-9, "entropy": 0.0}


def make_model(shift=False, seed=0, objective="diffusion"):
    "A random network in float64: sharp enough to be decided, exact enough that ties do not matter."
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    cfg = BackboneConfig(MASK + 1, **shape, max_position_embeddings=64, shift=shift, mask_token_id=MASK,
                         initializer_range=0.3, objective=objective)
    return Backbone(cfg).double().eval()


def make_prompt(rows, length, seed=0):
    return torch.randint(0, MASK, (rows, length), generator=make_generator(seed))


class Computed:
    "How many positions go through a model's trunk."

    def __init__(self, model):
        self.positions = 0
        model.model.register_forward_hook(lambda trunk, given, made: setattr(self, "positions", self.positions + given[0].numel()))


def fast_generate(model, prompt, n=N, refresh="near", ahead=None, attention_mask=None, steps=None, **settings):
    made = prompt_canvas(prompt, MASK, n, attention_mask)
    steps = [] if steps is None else steps
    steps.extend(write(CachedDenoiser(model, refresh, ahead), **made, **settings))
    return steps[-1].ids


# A cache that is refreshed before every pass is no approximation.


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize(("steps", "block"), [(12, 12), (12, 4), (6, 4)])
def test_refreshed_every_pass_is_exact(shift, length, steps, block):
    model, prompt = make_model(shift), make_prompt(3, length)
    settings = dict(gen_length=N, steps=steps, block_length=block)
    cached = CachedDenoiser(model, "always", None)
    assert torch.equal(generate(cached, prompt, **settings), generate(model.denoise, prompt, **settings))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exact_with_everything(shift, eos, cfg_scale, temperature):
    "Padding, early ends, guidance and draws: rows leave and change places in the cache, and nothing changes."
    model, prompt = make_model(shift), make_prompt(3, 5)
    settings = dict(gen_length=N, block_length=4, attention_mask=PADDING, eos_id=eos, cfg_scale=cfg_scale,
                    temperature=temperature)
    for rule in ({}, PARALLEL["threshold"], PARALLEL["entropy"]):
        found, wanted = (generate(denoiser, prompt, generator=[make_generator(0, row) for row in range(3)], **settings, **rule)
                         for denoiser in (CachedDenoiser(model, "always", None), model.denoise))
        assert torch.equal(found, wanted)


def test_a_stale_cache_computes_less_and_may_differ():
    differ = 0
    for seed in range(5):
        model, prompt = make_model(seed=seed), make_prompt(3, 5, seed)
        count = Computed(model)
        wanted = fast_generate(model, prompt, refresh="always", block_length=4)
        assert count.positions == 3 * N * (5 + N)
        differ += int((fast_generate(model, prompt, block_length=4) != wanted).sum())
        assert count.positions < 1.5 * 3 * N * (5 + N)
    assert differ > 0  # else nothing was cached


@pytest.mark.parametrize("shift", [False, True])
def test_near_refresh_computes_two_blocks(shift):
    model = make_model(shift)
    count = Computed(model)
    fast_generate(model, make_prompt(1, 5), block_length=4)
    assert count.positions == (17 + 3 * (4 + shift)) + 2 * ((8 + shift) + 3 * (4 + shift))


# A canvas that grows with the text.


@pytest.mark.parametrize("shift", [False, True])
def test_with_no_masks_ahead_each_block_is_a_canvas_of_its_own(shift):
    model, prompt = make_model(shift), make_prompt(3, 5)
    found, wanted = fast_generate(model, prompt, refresh="always", ahead=0, block_length=4), prompt
    for _ in range(N // 4):
        wanted = generate(model.denoise, wanted, gen_length=4)
    assert torch.equal(found, wanted)


def test_masks_ahead_are_part_of_the_canvas():
    model, prompt = make_model(), make_prompt(3, 5)
    found = fast_generate(model, prompt, refresh="always", ahead=4, block_length=4, attention_mask=PADDING)
    wanted, mask = prompt, PADDING
    for _ in range(N // 4):  # a canvas of 8 masks, of which the first four are kept
        room = min(8, 5 + N - wanted.shape[1])
        wanted = generate(model.denoise, wanted, gen_length=room, block_length=4, attention_mask=mask)
        wanted, mask = wanted[:, : mask.shape[1] + 4], torch.cat([mask, torch.ones_like(mask[:, :4])], dim=1)
    assert torch.equal(found, wanted)


def test_enough_masks_ahead_change_nothing():
    model, prompt = make_model(), make_prompt(3, 5)
    settings = dict(block_length=4, refresh="full", **PARALLEL["threshold"])
    assert torch.equal(fast_generate(model, prompt, ahead=N, **settings), fast_generate(model, prompt, **settings))


def test_near_refresh_computes_the_masks_that_are_new():
    model = make_model()
    count = Computed(model)
    fast_generate(model, make_prompt(1, 5), ahead=2, block_length=4)
    assert count.positions == (5 + 4 + 2) + (4 + 4 + 2) + (4 + 4) + 3 * 3 * 4


# A row does not depend on its neighbours, although batches shrink and rows change places.


@pytest.mark.parametrize("rule", PARALLEL)
@pytest.mark.parametrize(("refresh", "ahead"), [("near", None), ("near", 2), ("full", 2), ("always", 2)])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
def test_rows_are_independent(rule, refresh, ahead, cfg_scale):
    model, prompt = make_model(), make_prompt(3, 5)
    settings = dict(block_length=5, refresh=refresh, ahead=ahead, eos_id=EOS, patience=3, temperature=0.7, cfg_scale=cfg_scale,
                    **PARALLEL[rule])
    streams = [make_generator(0, row) for row in range(3)]
    together = fast_generate(model, prompt, attention_mask=PADDING, generator=streams, **settings)
    for row in range(3):
        part = slice(row, row + 1)
        alone = fast_generate(model, prompt[part], attention_mask=PADDING[part], generator=[make_generator(0, row)], **settings)
        assert torch.equal(together[part], alone)
    assert torch.equal(together[:, :5], prompt) and (together != MASK).all()


def test_finished_rows_are_not_computed():
    model, prompt, steps = make_model(), make_prompt(4, 5), []
    count = Computed(model)
    fast_generate(model, prompt, steps=steps, block_length=N, **PARALLEL["threshold"])
    together, alone = count.positions, []
    for row in range(4):
        alone.append([])
        fast_generate(model, prompt[row : row + 1], steps=alone[-1], block_length=N, **PARALLEL["threshold"])
    assert count.positions == 2 * together
    assert steps[-1].nfe == max(each[-1].nfe for each in alone)


def test_two_writings_do_not_disturb_each_other():
    cached, prompts = CachedDenoiser(make_model()), [make_prompt(2, 5, seed) for seed in (0, 1)]
    runs = [write(cached, **prompt_canvas(prompt, MASK, N), block_length=4) for prompt in prompts]
    for pair in zip(*runs):
        pass
    for prompt, step in zip(prompts, pair):
        assert torch.equal(step.ids, generate(cached, prompt, gen_length=N, block_length=4))


# The rules, one row at a time and in so many words.


def slow_threshold(row, tau):
    return {i for i, p in row.items() if p >= tau} | {max(row, key=lambda i: (row[i], -i))}


def slow_factor(row, factor):
    order = sorted(row, key=lambda i: (-row[i], i))
    fitting = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - row[order[n - 1]]) < factor]
    return set(order[: max(fitting, default=1)])


def slow_entropy(row, gamma):
    order = sorted(row, key=lambda i: (row[i], i))
    fitting = [n for n in range(1, len(order) + 1) if sum(row[i] for i in order[:n]) - row[order[n - 1]] <= gamma]
    return set(order[: max(fitting)])


@pytest.mark.parametrize("seed", range(20))
def test_rules_follow_their_definitions(seed):
    generator = make_generator(seed)
    score = torch.rand(6, 9, generator=generator, dtype=torch.float64) ** 0.5
    score = torch.where(score > 0.7, (score * 8).round() / 8, score)  # ties
    is_open = torch.rand(6, 9, generator=generator) < 0.7
    is_open[:, 4] = True
    score, entropy = score.masked_fill(~is_open, -math.inf), (1 - score).masked_fill(~is_open, math.inf)
    at = lambda limit: Policy(limit=limit)
    found = (by_threshold(score, at(0.8)), by_factor(score, at(1.0)), by_entropy(-entropy, at(0.3)))
    for r in range(6):
        row = {i: score[r, i].item() for i in range(9) if is_open[r, i]}
        doubt = {i: 1 - p for i, p in row.items()}
        wanted = (slow_threshold(row, 0.8), slow_factor(row, 1.0), slow_entropy(doubt, 0.3))
        for rule, commit, slow in zip(PARALLEL, found, wanted, strict=True):
            assert set(commit[r].nonzero()[:, 0].tolist()) == slow, rule


@pytest.mark.parametrize("rule", PARALLEL)
def test_timid_settings_commit_one_token_a_pass(rule):
    steps, prompt, kind = [], make_prompt(1, 5), PARALLEL[rule] | {"limit": TIMID[rule]}
    found = fast_generate(make_model(), prompt, refresh="always", steps=steps, block_length=4, **kind)
    assert len(steps) == N
    remasking = kind.get("remasking", "low_confidence")
    assert torch.equal(found, generate(make_model().denoise, prompt, gen_length=N, block_length=4, remasking=remasking))


# Passes that are not made.


def test_the_last_block_may_be_shorter():
    steps = []
    ids = fast_generate(make_model(), make_prompt(2, 3), 10, steps=steps, block_length=4)
    assert (ids != MASK).all() and [s.block for s in steps] == [0] * 4 + [1] * 4 + [2] * 2


def test_end_of_text_stops_a_row():
    model, steps = make_model(), []
    model.lm_head.weight.data.zero_()  # all logits equal: the first token wins, and that is made EOS
    ids = fast_generate(model, make_prompt(2, 3), steps=steps, block_length=4, eos_id=0)
    assert len(steps) == 1 and (ids[:, 3:] == 0).all()


def test_settled_blocks_are_committed():
    slow, quick, prompt = [], [], make_prompt(2, 3)
    model = make_model()
    model.lm_head.weight.data.zero_()  # the proposals never change
    fast_generate(model, prompt, steps=slow, block_length=6)
    fast_generate(model, prompt, steps=quick, block_length=6, patience=1)
    assert len(slow) == N and len(quick) == 4  # two blocks, two passes each


SETTINGS = {"quota": {}, "drawn": dict(temperature=1.0), "ends": dict(eos_id=EOS), "patience": dict(patience=9), **PARALLEL}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu_a_pass_waits_once_at_most(name, causal, monkeypatch):
    "code.md 8 and 9: on the meta device any other question for a value raises; blind settings ask nothing but the end."
    model = make_model(objective="ar" if causal else "diffusion").to("meta")
    prompt, asked, blind = make_prompt(2, 3).to("meta"), [], name in ("quota", "drawn")

    def answer(todo):
        assert todo.device.type == "meta"
        asked.append(1)
        left = torch.arange(3 + N) >= 3 + len(asked)  # the text comes token by token
        return left.expand(2, -1) & torch.tensor(not blind)

    monkeypatch.setattr(sampler, "unfinished", answer)
    denoiser = CausalDenoiser(model) if causal else CachedDenoiser(model)
    settings = SETTINGS[name] | {"block_length": 1 if causal else 4}
    steps = list(write(denoiser, **prompt_canvas(prompt, MASK, N), **settings))
    assert len(steps) == N and len(asked) == (1 if blind else N + 1)
    assert steps[-1].ids.device.type == "meta"


def test_steps_are_reported_in_the_order_of_the_prompt():
    model, prompt, steps = make_model(), make_prompt(4, 5), []
    ids = fast_generate(model, prompt, steps=steps, block_length=6, **PARALLEL["threshold"])
    before = torch.full_like(ids, MASK)
    before[:, :5] = prompt
    for number, step in enumerate(steps, 1):
        assert step.nfe == number and torch.equal(torch.where(step.committed, step.proposed, before), step.ids)
        assert not (step.confidence.isfinite() & (before != MASK)).any()
        before = step.ids
    assert torch.equal(before, ids)


# Autoregressive decoding is the same loop.


def decode(model, prompt, max_new_tokens, *, temperature=1.0, **settings):
    check_room(model, prompt.shape[-1], max_new_tokens)
    return generate(CausalDenoiser(model), prompt, gen_length=max_new_tokens, block_length=1, temperature=temperature, **settings)


def slow_decode(model, prompt, n, pick):
    "Token by token without a cache."
    for _ in range(n):
        with torch.no_grad():
            logits = model(prompt, causal=True)[:, -1]
        logits[:, MASK] = -math.inf
        prompt = torch.cat([prompt, pick(logits)[:, None]], dim=1)
    return prompt


def test_decode_takes_the_likeliest():
    model, prompt = make_model(objective="ar"), make_prompt(3, 5)
    assert torch.equal(decode(model, prompt, N, temperature=0), slow_decode(model, prompt, N, lambda logits: logits.argmax(-1)))


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.6), dict(top_k=3), dict(top_p=0.7)])
def test_decode_draws_from_the_model(settings):
    model, n = make_model(objective="ar"), 6000
    prompt = make_prompt(1, 5)
    logits = model(prompt, causal=True)[:, -1].detach()
    logits[:, MASK] = -math.inf
    p = sampler.filter_logits(logits, **({"temperature": 1.0} | settings))[0].softmax(-1)
    drawn = decode(model, prompt.expand(n, -1), 1, generator=make_generator(0), **settings)[:, -1]
    share = drawn.bincount(minlength=len(p)) / n
    assert ((share - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoded_rows_are_independent(temperature):
    "Rows that end leave the cache, padded or not; each text is the one it would be alone."
    model, prompt, settings = make_model(objective="ar"), make_prompt(3, 5), dict(temperature=temperature, eos_id=EOS)
    together = decode(model, prompt, 40, attention_mask=PADDING, generator=[make_generator(1, i) for i in range(3)], **settings)
    for row in range(3):
        real = PADDING[row].bool()
        alone = decode(model, prompt[row, real][None], 40, generator=[make_generator(1, row)], **settings)
        assert together[row, 5:].tolist() == alone[0, real.sum() :].tolist()
        tail = together[row, 5:].tolist()
        assert EOS not in tail or set(tail[tail.index(EOS) :]) == {EOS}


@pytest.mark.parametrize("wrong, message", [
    (dict(temperature=math.nan), "temperature is nan"), (dict(temperature=1e-300), "temperature is 1e-300"),
    (dict(temperature=-1.0), "temperature is -1.0"), (dict(top_k=0), "top_k is 0"), (dict(top_p=1.5), "top_p is 1.5"),
    (dict(max_new_tokens=60), "do not fit the context of 64"), (dict(max_new_tokens=0), "gen_length is 0"),
    (dict(prompt=torch.zeros(2, 0, dtype=torch.long)), "such as bos"), (dict(prompt=torch.tensor([[99]])), "vocabulary"),
    (dict(model=make_model()), "CausalDenoiser takes ar"),
])  # fmt: skip
def test_bad_decoding(wrong, message):
    good = dict(model=make_model(objective="ar"), prompt=make_prompt(2, 5), max_new_tokens=4)
    with pytest.raises(UserError, match=message):
        decode(**(good | wrong))


# Text in, text out.


TEXTS = ["the cat sees a bird", "a dog", "the small dog sees the cat and eats it"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A run folder of each kind, untrained."
    tokenizer, folders = train_tokenizer(TEXTS, 300), {}
    for objective in ("ar", "diffusion"):
        torch.manual_seed(0)
        cfg = BackboneConfig(len(tokenizer), 32, 2, 4, 2, 48, 64, objective=objective,
                             mask_token_id=tokenizer.mask_token_id, initializer_range=0.3)
        folders[objective] = Path(tmp_path_factory.mktemp(objective))
        save_run(Backbone(cfg), tokenizer, folders[objective])
    return folders


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_generate_text(runs, objective):
    texts = generate_text(runs[objective], TEXTS, gen_length=20)
    assert len(texts) == 3 and texts == generate_text(runs[objective], TEXTS, gen_length=20)
    letter = next(letter for letter in texts[0] if letter.strip())
    cut = generate_text(runs[objective], TEXTS, stop=[letter, "no such text"], gen_length=20)
    assert cut == [text.partition(letter)[0] for text in texts]
    assert generate_text(runs[objective], []) == []


@pytest.mark.parametrize("cfg", [
    WriteConfig(gen_length=12), WriteConfig(gen_length=12, fast=False), WriteConfig(gen_length=12, steps=4),
    WriteConfig(gen_length=12, remasking="random"), WriteConfig(gen_length=12, eos="late"), WriteConfig(gen_length=12, eos="never"),
    WriteConfig(gen_length=12, cfg_scale=0.5), WriteConfig(gen_length=12, temperature=0.7, top_k=5),
])  # fmt: skip
def test_write_ids_keeps_the_order(runs, cfg):
    model, tokenizer, _ = load_run(runs["diffusion"], "cpu", torch.float64)
    contexts = [[tokenizer.bos_token_id, *encode(tokenizer, text)] for text in TEXTS]
    together = write_ids(model, contexts, tokenizer, cfg, batch_size=2)
    steps = list(write_steps(model, contexts[1:2], tokenizer, cfg))
    assert len(together) == 3 and (steps[-1].nfe == 4 if cfg.steps else steps[-1].nfe <= 12)
    if cfg.temperature == 0 and cfg.remasking != "random":
        assert [write_ids(model, [context], tokenizer, cfg)[0] for context in contexts] == together


def test_the_default_is_fast():
    policy = WriteConfig().policy("diffusion", EOS)
    assert policy == Policy(**(vars(FAST) | {"eos_id": EOS})) and not WriteConfig().official
    assert WriteConfig(fast=False).policy("diffusion", EOS) == Policy(eos_id=EOS)  # the official one
    assert WriteConfig(steps=4).official and WriteConfig(remasking="random").official


@pytest.mark.parametrize("wrong, message", [
    (dict(gen_length=0), "gen_length is 0"), (dict(eos="soon"), "eos is 'soon'"), (dict(temperature=math.nan), "temperature is nan"),
    (dict(steps=0), "steps is 0"), (dict(block_length=0), "block_length is 0"), (dict(doubt=-1.0), "limit is -1.0"),
    (dict(remasking="best"), "remasking is 'best'"), (dict(cfg_scale=math.inf), "cfg_scale is inf"), (dict(top_p=0.0), "top_p is 0.0"),
])
def test_bad_settings(wrong, message):
    with pytest.raises(UserError, match=message):
        WriteConfig(**wrong)


def test_settings_of_the_other_kind(runs):
    with pytest.raises(UserError, match="steps is 4, which means nothing to an ar model"):
        generate_text(runs["ar"], "a", steps=4)
    with pytest.raises(UserError, match="do not fit the context of 64"):
        generate_text(runs["diffusion"], "a", gen_length=100)
