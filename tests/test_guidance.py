"""Infilling, guidance, and where an answer ends."""

import math

import pytest
import torch
from hash_oracle import EOS_ID, MASK_ID, hash_oracle

from nanollada.backbone import as_denoiser
from nanollada.core import UserError
from nanollada.guidance import RestrictedDenoiser, answer_lengths, infill, trim_answers
from nanollada.sampler import GuidedDenoiser, generate, write
from oracles import exact_sample_distribution


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def holes(seed, shape=(3, 12), share=0.5):
    "Random ids with random masks, at least one in each row."
    ids = torch.randint(0, MASK_ID, shape, generator=seeded(seed))
    where = torch.rand(shape, generator=seeded(seed + 100)) < share
    where[:, 0] = True
    return ids.masked_fill(where, MASK_ID), where


@pytest.mark.parametrize("seed", range(4))
def test_infill_is_generate_when_the_gap_is_the_end(seed):
    prompt = torch.randint(0, MASK_ID, (2, 5), generator=seeded(seed))
    canvas = torch.cat([prompt, torch.full((2, 8), MASK_ID)], 1)
    options = {"steps": 4, "block_length": 4, "cfg_scale": 0.5, "temperature": 0.7}
    a = infill(hash_oracle, canvas, MASK_ID, generator=seeded(seed), **options)
    assert torch.equal(a, generate(hash_oracle, prompt, MASK_ID, 8, generator=seeded(seed), **options))


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("block_length", [None, 3])
def test_gaps_anywhere_row_by_row(cfg_scale, block_length):
    canvas, where = holes(1)
    options = {"cfg_scale": cfg_scale, "block_length": block_length}
    together = infill(hash_oracle, canvas, MASK_ID, **options)
    assert torch.equal(together[~where], canvas[~where]) and (together != MASK_ID).all()
    for row, alone in zip(together, canvas):
        assert torch.equal(row, infill(hash_oracle, alone[None], MASK_ID, **options)[0])


def test_infill_one_mask_takes_the_argmax():
    canvas = torch.tensor([[5, 9, MASK_ID, 3, 8]])
    assert infill(hash_oracle, canvas, MASK_ID)[0, 2] == hash_oracle(canvas)[0, 2].argmax()


def test_infill_ignores_padding_on_both_sides():
    inner = torch.tensor([[7, MASK_ID, 8, MASK_ID]])
    canvas = torch.cat([torch.tensor([[0, MASK_ID]]), inner, torch.tensor([[3]])], 1)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    a = infill(hash_oracle, canvas, MASK_ID, attention_mask=real, cfg_scale=0.5)
    assert torch.equal(a[:, 2:6], infill(hash_oracle, inner, MASK_ID, cfg_scale=0.5))
    assert a[0, [0, 6]].tolist() == [0, 3]


def test_guided_draws_follow_the_formula():
    canvas, w = torch.tensor([[5, 9, MASK_ID, 3]]), 0.5
    blind = torch.tensor([[MASK_ID, 9, MASK_ID, MASK_ID]])
    c, u = hash_oracle(canvas)[0, 2, :MASK_ID].softmax(-1), hash_oracle(blind)[0, 2, :MASK_ID].softmax(-1)
    wanted = c ** (1 + w) / u**w
    wanted = wanted / wanted.sum()
    keep = torch.tensor([[False, True, False, False]])
    drop = (canvas != MASK_ID) & ~keep
    exact = exact_sample_distribution(GuidedDenoiser(as_denoiser(hash_oracle, MASK_ID), drop, w), canvas[0], MASK_ID, 1)
    torch.testing.assert_close(exact[:MASK_ID], wanted)
    n = 3000
    ids = infill(
        hash_oracle,
        canvas.expand(n, -1),
        MASK_ID,
        cfg_scale=w,
        cfg_keep=keep,
        temperature=1.0,
        generator=seeded(0),
    )
    q = ids[:, 2].bincount(minlength=MASK_ID) / n
    assert ((q - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / n).sqrt() + 1e-12).all()


def test_guidance_keeps_the_forbidden_forbidden():
    def hard(ids):
        return hash_oracle(ids).index_fill(-1, torch.tensor([MASK_ID, 3]), -math.inf)

    logits = GuidedDenoiser(as_denoiser(hard, MASK_ID), torch.tensor([[True, False, False]]), 2.0)(
        torch.tensor([[4, 5, MASK_ID]])
    )
    assert not logits.isnan().any() and (logits[..., 3] == -math.inf).all()
    assert (infill(hard, torch.tensor([[4, 5, MASK_ID, MASK_ID]]), MASK_ID, cfg_scale=2.0) != 3).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
def test_suppressed_confidence_comes_last(temperature, remasking):
    late, canvas = tuple(range(24)), torch.tensor([[30, 31] + [MASK_ID] * 12])
    settings = dict(temperature=temperature, remasking=remasking, suppress_confidence=late)
    steps = list(write(hash_oracle, canvas, mask_id=MASK_ID, generator=seeded(0), **settings))
    for step in steps:  # a late token is committed only where nothing else was on offer
        offered = step.proposed[step.confidence.isfinite()]
        assert (step.ids[step.committed] >= 24).all() or (offered < 24).all()
    assert any((step.proposed[step.confidence.isfinite()] < 24).any() for step in steps)


def test_suppressed_tokens_never_come():
    late = tuple(range(24))
    ids = generate(
        hash_oracle,
        torch.tensor([[30, 31]]),
        MASK_ID,
        12,
        temperature=1.0,
        suppress_tokens=late,
        generator=seeded(0),
    )
    assert (ids >= 24).all()


@pytest.mark.parametrize("seed", range(5))
def test_answers_end_at_the_first_eos(seed):
    ids = torch.randint(0, 4, (6, 9), generator=seeded(seed))
    for row, n, answer in zip(
        ids.tolist(), answer_lengths(ids, EOS_ID, 2).tolist(), trim_answers(ids, EOS_ID, 2)
    ):
        tail = row[2:] + [EOS_ID]
        assert answer == tail[: tail.index(EOS_ID)] and n == len(answer)


def test_restricted_positions():
    ids, positions = holes(3, (2, 6))[0], torch.tensor([[1, 1, 0, 0, 1, 0]]).bool()
    restricted = RestrictedDenoiser(hash_oracle, (EOS_ID, 4), positions, MASK_ID)
    logits, free = restricted(ids), hash_oracle(ids)
    banned = torch.zeros_like(free, dtype=torch.bool)
    banned[..., [EOS_ID, 4]] = positions[0][:, None]
    assert (logits[banned] == -math.inf).all() and torch.equal(logits[~banned], free[~banned])
    places = (ids == MASK_ID).flatten().nonzero()[:, 0]
    assert torch.equal(restricted.at(ids, places), logits.flatten(0, 1)[places])


def test_denoisers_stack():
    canvas = torch.tensor([[5, 9] + [MASK_ID] * 6])
    early = torch.arange(8)[None] < 6
    ids = infill(RestrictedDenoiser(hash_oracle, range(1, 40), early, MASK_ID), canvas, cfg_scale=1.0)
    assert all(i == 0 or i >= 40 for i in ids[0, 2:6].tolist())


@pytest.mark.parametrize("wrong, message", [
    ({"canvas": torch.tensor([[1, 2, 3]])}, "no masks"),
    ({"canvas": torch.tensor([1, MASK_ID])}, "expected int64 ids"),
    ({"steps": 0}, "steps is 0"),
    ({"steps": 3, "block_length": 1}, "3 steps do not divide among 2 blocks"),
    ({"cfg_scale": -0.5}, "cfg_scale is -0.5"),
    ({"suppress_tokens": range(48)}, "suppressed"),
    ({"canvas": torch.tensor([[1, 2, MASK_ID]]), "attention_mask": torch.tensor([[1, 1, 0]])}, "no masks"),
    ({"attention_mask": torch.tensor([[0, 1]])}, "attention_mask is"),
    ({"denoiser": lambda ids: hash_oracle(ids) * math.nan}, "NaN"),
])  # fmt: skip
def test_errors_say_what_is_wrong(wrong, message):
    good = {"denoiser": hash_oracle, "canvas": torch.tensor([[1, MASK_ID, MASK_ID]]), "mask_id": MASK_ID}
    with pytest.raises(UserError, match=message):
        infill(**(good | wrong))


def test_restricted_length_must_fit():
    with pytest.raises(UserError, match="positions is"):
        RestrictedDenoiser(hash_oracle, (1,), torch.ones(1, 3, dtype=torch.bool), MASK_ID)(torch.tensor([[1, 2]]))
