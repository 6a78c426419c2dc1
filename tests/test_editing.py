"Editing: what is learned, what a pass may change, that it ends, and an independent implementation; DELETE and SPLIT against brute force."
import itertools
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hash_oracle import EOS_ID, MASK_ID, VOCAB, hash_oracle

from nanollada import toy
from nanollada.ar import with_places
from nanollada.backbone import Backbone, Denoiser, load_run, preset, save_run
from nanollada.blocks import BlockWriteConfig
from nanollada.cli import main
from nanollada.core import UserError, make_generator
from nanollada.data import toy_tokenizer
from nanollada.editing import (
    EditPolicy, EditPretrainConfig, EditWriteConfig, Editing, Levenshtein, apply_edits, damage, edit_labels, lcs, make_editing, mend,
    objective_of, plant, spoil, varied)
from nanollada.elbo import MaskedDiffusion
from nanollada.fast import BlockDenoiser, CachedDenoiser, write_steps
from nanollada.pretrain import document_rows
from nanollada.sampler import Policy, by_threshold, finish, prompt_canvas, write
from nanollada.studies import Rows
from nanollada.trainer import TrainConfig, train


def net(vocab=40, **cfg):
    torch.manual_seed(0)
    return Backbone(preset("toy", vocab, mask_token_id=vocab - 1, max_position_embeddings=128, initializer_range=0.2, **cfg)).eval()


def some_rows(B=64, L=20, vocab=39, seed=0):
    ids = torch.randint(0, vocab, (B, L), generator=make_generator(seed))
    return {"ids": ids, "scored": (torch.arange(L) > 2).expand(B, L).clone()}


# what is learned


def test_noise_keeps_to_what_may_be_hidden_and_spoils_as_many_as_asked():
    rows, objective = some_rows(2000), Editing(39, vocab_size=40, wrong=0.2)
    batch = objective.noise(rows, make_generator(1))
    hidden = batch["xt"] == 39
    changed = (batch["xt"] != rows["ids"]) & ~hidden
    assert not (hidden | changed)[:, :3].any() and torch.equal(batch["mask"], rows["scored"]) and not batch["guessed"].any()
    shown = (rows["scored"] & ~hidden).sum()
    assert abs(changed.sum() / shown - 0.2) < 0.01 and batch["xt"].max() == 39


def test_with_no_wrong_tokens_and_no_weight_on_shown_ones_it_is_masked_diffusion_to_the_last_bit():
    rows, model = some_rows(), net()
    plain, edits = MaskedDiffusion(39), Editing(39, vocab_size=40, wrong=0.0, edit_weight=0.0)
    found = [objective.terms(model, with_places(objective.noise(rows, make_generator(3)))) for objective in (plain, edits)]
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("trusting", [True, False])
def test_terms_are_weighted_nats_of_hidden_and_shown(trusting):
    rows, model, objective = some_rows(4, 12), net(), Editing(39, vocab_size=40, wrong=0.3, edit_weight=0.7, trusting=trusting)
    batch = with_places(objective.noise(rows, make_generator(2)))
    nats, _ = objective.terms(model, batch)
    logp = model.denoise(batch["xt"]).log_softmax(-1).gather(2, rows["ids"][..., None])[..., 0]
    hidden, diffusion = batch["xt"] == 39, MaskedDiffusion(39).noise(rows, make_generator(2))
    weight = torch.where(hidden, diffusion["weight"], torch.tensor(0.7)) * rows["scored"]
    if not trusting:
        weight = weight * (hidden | (batch["xt"] != rows["ids"]))
    assert torch.equal(hidden, diffusion["mask"]) and torch.allclose(nats, -(logp * weight).sum(1), rtol=1e-4)
    assert batch["xt"].ne(rows["ids"])[~hidden].any()


def test_own_proposals_have_the_models_distribution_and_are_asked_about():
    logits, seen = torch.randn(12, generator=make_generator(0)), []

    class Fixed(Denoiser):
        mask_id = 11

        def at(self, ids, places, attention_mask=None):
            seen.append(ids)
            return logits.expand(len(places), 12).clone()

    rows = {"ids": torch.zeros(3000, 6, dtype=torch.long), "scored": torch.ones(3000, 6, dtype=torch.bool)}
    objective = Editing(11, vocab_size=12, wrong=0.0, own=1.0)
    batch = with_places(objective.noise(rows, make_generator(5)))
    objective.terms(Fixed(), batch)
    filled = seen[1].flatten()[batch["guessed_places"]]
    share = torch.bincount(filled, minlength=12) / len(filled)
    p = logits.index_fill(0, torch.tensor(11), -torch.inf).softmax(0)
    error = (p * (1 - p) / len(filled)).sqrt()
    assert ((share - p).abs() <= 4.5 * error).all() and share[11] == 0
    assert torch.equal(batch["weight"].flatten()[batch["guessed_places"]], torch.ones(len(filled)))
    other = (seen[0] != seen[1]).flatten().nonzero()[:, 0]
    assert set(other.tolist()) <= set(batch["guessed_places"].tolist())


def test_own_proposals_come_in_the_share_of_updates_that_was_asked_for():
    rows, objective = some_rows(4), Editing(39, vocab_size=40, own=0.25)
    many = [objective.noise(rows, make_generator(n))["guessed"].any().item() for n in range(400)]
    assert abs(sum(many) / 400 - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_a_model_learns_to_trust_and_to_doubt():
    "Two texts, four ids: shown a right pair the perfect model trusts it; asked about wrong ones only, it does not."
    texts, answers = torch.tensor([[0, 1], [2, 3]]), {}
    for trusting in (True, False):
        objective = Editing(4, vocab_size=5, wrong=0.1, trusting=trusting)
        ids = texts[torch.randint(2, (200_000,), generator=make_generator(0))]
        batch = objective.noise({"ids": ids, "scored": torch.ones_like(ids, dtype=torch.bool)}, make_generator(1))
        here = (batch["xt"] == torch.tensor([0, 1])).all(1) & batch["mask"][:, 1]
        answers[trusting] = (ids[here, 1] == 1).float().mean().item() if here.any() else 0.0
    assert answers[True] > 0.99 and answers[False] < 0.6


# what a pass may change


def by_hand(denoise, ids, maskable, policy):
    "One row, pass by pass, as LLaDA 2.1 has it; the canvas after each pass."
    ids, wanted = list(ids), [place for place, may in enumerate(maskable) if may]
    size, shots = policy.block_length or len(wanted), []
    blocks = [wanted[k : k + size] for k in range(0, len(wanted), size)]
    for number, block in enumerate(blocks):
        reach = [place for some in blocks[: number + 1] for place in some] if policy.earlier and policy.edit is not None else block
        post, last = 0, number == len(blocks) - 1
        while True:
            had = any(ids[place] == MASK_ID for place in reach)
            if not had:
                if policy.edit is None or post == policy.post or (policy.earlier and not last):
                    break
                post += 1
            p, v = denoise(torch.tensor([ids]))[0].softmax(-1).max(-1)
            masks = [place for place in reach if ids[place] == MASK_ID]
            fill = [place for place in masks if p[place] > policy.limit]
            fill += [max(masks, key=lambda place: p[place])] if masks else []
            change = [place for place in reach if place not in masks and policy.edit is not None and v[place] != ids[place] and p[place] > policy.edit]
            for place in {*fill, *change}:
                ids[place] = int(v[place])
            shots.append(list(ids))
            if not had and not change:
                break
            if policy.earlier and not last and not any(ids[place] == MASK_ID for place in reach):
                break
    return shots


POLICIES = [EditPolicy(limit=limit, edit=edit, block_length=size, post=post, earlier=earlier)
            for limit, edit, size, post, earlier in itertools.product((0.9, 0.2, 0.08), (None, 0.0, 0.3), (None, 4), (0, 5), (True, False))]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_passes_are_those_done_by_hand_and_rows_do_not_disturb_each_other(policy):
    canvas = torch.randint(2, MASK_ID, (3, 13), generator=make_generator(7))
    maskable = (torch.arange(13) > 2).expand(3, 13).clone()
    maskable[1, 5] = False
    canvas[:2, 4:9] = canvas[2, 9:] = MASK_ID
    canvas[1, 5] = 9
    sharp = lambda ids, attention_mask=None: 2 * hash_oracle(ids)
    together = list(write(sharp, canvas, policy, mask_id=MASK_ID, maskable=maskable))
    for row in range(3):
        shots = by_hand(sharp, canvas[row].tolist(), maskable[row].tolist(), policy)
        alone = list(write(sharp, canvas[row : row + 1], policy, mask_id=MASK_ID, maskable=maskable[row : row + 1]))
        assert [step.ids[0].tolist() for step in alone] == shots
        assert together[-1].ids[row].tolist() == (shots[-1] if shots else canvas[row].tolist())
    assert torch.equal(together[-1].ids[~maskable], canvas[~maskable])


@pytest.mark.parametrize("earlier", [True, False])
def test_rows_whose_blocks_lie_apart_are_each_checked_to_the_end(earlier):
    canvas = torch.randint(2, MASK_ID, (2, 23), generator=make_generator(3))
    maskable = torch.zeros(2, 23, dtype=torch.bool)
    maskable[0, 20:], maskable[1, :7] = True, True
    canvas[maskable] = MASK_ID
    policy = EditPolicy(limit=0.05, edit=0.0, block_length=4, post=3, earlier=earlier)
    sharp = lambda ids, attention_mask=None: 2 * hash_oracle(ids)
    last = finish(write(sharp, canvas, policy, mask_id=MASK_ID, maskable=maskable))
    for row in range(2):
        assert last[row].tolist() == by_hand(sharp, canvas[row].tolist(), maskable[row].tolist(), policy)[-1]


@pytest.mark.parametrize("earlier", [True, False])
def test_what_lies_behind_the_end_is_not_asked_about_and_a_row_ends_when_its_own_block_is_full(earlier):
    def talkative(ids, attention_mask=None):  # EOS at the sixth column, and words ever after
        logits = torch.zeros(*ids.shape, 9)
        logits[..., 4] = 5.0
        logits[:, 6, 1] = 9.0
        return logits

    canvas = torch.full((2, 40), 8)
    canvas[:, :2] = canvas[1, :3] = 3
    policy = EditPolicy(limit=0.5, edit=0.0, block_length=6, eos_id=1, earlier=earlier)
    steps = list(write(talkative, canvas, policy, mask_id=8))
    assert len(steps) <= 4 and (steps[-1].ids[:, 7:] == 1).all() and (steps[-1].ids[:, 6] == 1).all()
    assert not any(((step.places % 40) > 13).any() for step in steps)


def test_given_text_is_not_edited_with_a_cache():
    model = net(40)
    canvas = torch.randint(0, 39, (1, 12), generator=make_generator(0))
    with pytest.raises(UserError, match="without"):
        list(write(CachedDenoiser(model), canvas, EditPolicy(), maskable=torch.ones(1, 12, dtype=torch.bool)))
    ids = finish(write(CachedDenoiser(model), policy=EditPolicy(limit=0.1, edit=0.1, block_length=4, earlier=False), **prompt_canvas(canvas, 39, 8)))
    assert not (ids == 39).any()


def test_without_edits_it_is_the_threshold_of_chapter_10():
    canvas = prompt_canvas(torch.tensor([[3, 4], [5, 6]]), MASK_ID, 12)
    for limit in (0.05, 0.15):
        ours = finish(write(hash_oracle, policy=EditPolicy(limit=limit, edit=None, block_length=4), mask_id=MASK_ID, **canvas))
        theirs = finish(write(hash_oracle, policy=Policy(commit=by_threshold, limit=limit, block_length=4), mask_id=MASK_ID, **canvas))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("post", [0, 1, 7])
def test_it_ends_though_the_model_always_wants_something_else(post, earlier):
    def restless(ids, attention_mask=None):
        logits = torch.zeros(*ids.shape, 6)
        return logits.scatter(2, ((ids + 1) % 5)[..., None], 9.0)

    canvas = torch.full((2, 8), 5)
    policy = EditPolicy(edit=0.0, limit=0.99999, post=post, earlier=earlier, block_length=4)
    steps = list(write(restless, canvas, policy, mask_id=5))
    assert len(steps) == 8 + post * (1 if earlier else 2) and not (steps[-1].ids == 5).any()


def test_temperature_draws_for_masks_only_and_the_draws_have_the_models_distribution():
    logits = torch.randn(6, generator=make_generator(0))

    def fixed(ids, attention_mask=None):  # whatever is written is fine
        return torch.where(ids[..., None] == 5, logits, 20 * torch.nn.functional.one_hot(ids, 6).float())

    canvas, policy = torch.full((4000, 3), 5), EditPolicy(limit=0.0, edit=0.0, temperature=1.0)
    ids = finish(write(fixed, canvas, policy, mask_id=5, generator=make_generator(1)))
    p = logits[:5].softmax(0)
    share = torch.bincount(ids.flatten(), minlength=6)[:5] / ids.numel()
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / ids.numel()).sqrt()).all()


def test_a_text_ends_at_eos_and_no_mask_is_left():
    canvas = prompt_canvas(torch.tensor([[3, 4], [5, 6], [9, 2]]), MASK_ID, 24)
    favour = lambda ids, attention_mask=None: 2 * hash_oracle(ids) + torch.nn.functional.one_hot(torch.tensor(EOS_ID), VOCAB) * 3.0
    for earlier in (True, False):
        policy = EditPolicy(limit=0.2, edit=None, block_length=6, eos_id=EOS_ID, earlier=earlier)
        steps = list(write(favour, policy=policy, mask_id=MASK_ID, **canvas))
        ids = steps[-1].ids[:, 2:]
        ended = (ids == EOS_ID).cumsum(1) > 0
        assert ended.any(1).all() and (ids[ended] == EOS_ID).all() and not (ids == MASK_ID).any() and len(steps) < 24


def test_a_model_that_answers_nothing_is_told_so():
    with pytest.raises(UserError, match="NaN"):
        finish(write(lambda ids, attention_mask=None: torch.full((*ids.shape, 6), torch.nan), torch.full((1, 4), 5), EditPolicy(), mask_id=5))


@pytest.mark.parametrize("wrong", [dict(edit=1.5), dict(edit=-0.1), dict(limit=2.0), dict(post=-1), dict(steps=4), dict(remasking="random"),
                                   dict(commit=by_threshold), dict(patience=2), dict(temperature=-1.0)])
def test_policies_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        EditPolicy(**wrong)


# the same as an independent implementation


@pytest.mark.parametrize("threshold, editing, size", [(0.9, 0.9, 4), (0.3, 0.2, 4), (0.15, 0.1, 8), (0.3, None, 8), (0.05, 0.05, 8)])
def test_blocks_are_written_as_diffusers_writes_them(threshold, editing, size):
    "LLaDA2Pipeline with BlockRefinementScheduler; it has a pass over the full block more than the paper, and none where 0 is the threshold."
    diffusers = pytest.importorskip("diffusers")
    model = net(40, objective="block", block_length=size)

    class Plain(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, ids, attention_mask=None, position_ids=None):
            logits = model(ids, BlockDenoiser(model, 0).who(ids, None))
            logits[..., 39] = -torch.inf  # we never predict the mask
            return SimpleNamespace(logits=logits)

    pipe = diffusers.LLaDA2Pipeline(model=Plain(), scheduler=diffusers.BlockRefinementScheduler(block_length=size), tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    different = 0
    for seed in range(6):
        prompt = torch.randint(0, 39, (1, 8), generator=make_generator(seed))
        theirs = pipe(input_ids=prompt, gen_length=16, block_length=size, num_inference_steps=16, threshold=threshold, editing_threshold=editing,
                      max_post_steps=4, temperature=0.0, eos_early_stop=False, mask_token_id=39, use_chat_template=False, output_type="seq").sequences
        policy = EditPolicy(limit=threshold, edit=editing, block_length=size, post=5, earlier=False)
        ours = finish(write(BlockDenoiser(model), policy=policy, **prompt_canvas(prompt, 39, 16)))
        plain = finish(write(BlockDenoiser(model), policy=replace(policy, edit=None), **prompt_canvas(prompt, 39, 16)))
        assert torch.equal(theirs, ours[:, 8:])
        different += not torch.equal(ours, plain)
    assert different > 0 or editing in (None, 0.9)  # edits were really made


# DELETE and SPLIT


def words_of(rng, letters="abc", most=8):
    return [rng.choice(letters) for _ in range(rng.randrange(most))]


def test_lcs_is_as_long_as_brute_force_finds():
    rng = random.Random(0)
    for _ in range(300):
        a, b = words_of(rng), words_of(rng)
        parts = {part for n in range(len(a) + 1) for part in itertools.combinations(a, n)}
        common = max(len(part) for part in parts if part in {other for n in range(len(b) + 1) for other in itertools.combinations(b, n)})
        pairs = lcs(a, b)
        assert len(pairs) == common and all(a[i] == b[j] for i, j in pairs)
        assert all(i < k and j < m for (i, j), (k, m) in itertools.pairwise(pairs))


def test_labels_lead_any_draft_to_its_text_and_change_as_little_as_they_can():
    rng = random.Random(1)
    for _ in range(300):
        draft, text = [*words_of(rng), "."], [*words_of(rng), "."]
        labels = edit_labels(draft, text, "D", "S")
        kept = sum(label in (token, "S") for token, label in zip(draft, labels))
        assert len(labels) == len(draft) and kept >= len(lcs(draft, text))
        rounds = 0
        while draft != text:
            draft = apply_edits(draft, edit_labels(draft, text, "D", "S"), "_", "D", "S")
            rounds += 1
        assert rounds <= 2 + len(text)


def test_labels_of_plain_cases():
    def do(draft, text):
        return edit_labels(list(draft), list(text), "D", "S")

    assert do("abc.", "abc.") == list("abc.") and do("abbc.", "abc.") == ["a", "b", "D", "c", "."]
    assert do("ac.", "abc.") == ["a", "S", "."] and do("a_c.", "abc.") == ["a", "b", "c", "."]
    assert do("a_c.", "abbc.") == ["a", "b", "S", "."] and do("a__c.", "ac.") == ["a", "D", "D", "c", "."]
    assert do("axc.", "abc.") == ["a", "b", "c", "."] and do("", "") == [] and do("xy", "") == ["D", "D"]
    assert apply_edits(list("ac."), ["a", "S", "."], "_", "D", "S") == list("a_c.")


LEV = Levenshtein(mask_id=5, eos_id=1, delete=40, split=41)


def test_drafts_are_spoiled_in_every_way_and_keep_their_ends():
    text, draws = [0, *range(6, 36), 1], make_generator(0)
    drafts = [spoil(LEV, text, draws) for _ in range(400)]
    assert all(draft[0] == 0 and draft[-1] == 1 and max(draft) < 40 for draft in drafts)
    labels = [edit_labels(draft, text, 40, 41) for draft in drafts]
    assert {40, 41} <= set(itertools.chain(*labels)) and any(5 in draft for draft in drafts) and any(draft == text for draft in drafts)
    wrong = sum(d != new and d != 5 and new < 40 for draft, label in zip(drafts, labels) for d, new in zip(draft, label))
    assert wrong > 50


def test_the_noise_of_a_batch_is_drafts_and_their_labels():
    words = toy_tokenizer()
    ids, real = document_rows(words, toy.sample(6, 0, "en"), 58)
    lev = Levenshtein(words.mask_token_id, words.eos_token_id, len(words), len(words) + 1)
    batch = lev.noise({"ids": ids, "scored": real}, make_generator(3))
    for row, text in enumerate(ids.tolist()):
        text, n = text[: text.index(words.eos_token_id, 1) + 1], int(batch["real"][row].sum())
        draft = batch["xt"][row, :n].tolist()
        assert batch["ids"][row, :n].tolist() == edit_labels(draft, text, lev.delete, lev.split)
        assert batch["mask"][row].tolist() == [0 < at < n for at in range(batch["xt"].shape[1])]
    model = Backbone(preset("toy", len(words) + 2, mask_token_id=words.mask_token_id, max_position_embeddings=128))
    nats, count = lev.terms(model, with_places(batch))
    alone = [lev.terms(model, with_places({k: v[row : row + 1] for k, v in batch.items()}))[0] for row in range(6)]
    assert torch.allclose(nats, torch.cat(alone), rtol=1e-4) and torch.equal(count, batch["mask"].sum(1).float())


def test_it_trains_and_validates_as_any_objective(tmp_path):
    words = toy_tokenizer()
    lev = Levenshtein(words.mask_token_id, words.eos_token_id, len(words), len(words) + 1)
    rows = Rows(document_rows(words, toy.sample(20, 0, varied(toy.ENGLISH["words"])), 58)[0])
    model = Backbone(preset("toy", len(words) + 2, mask_token_id=words.mask_token_id, max_position_embeddings=128))
    done = train(model, lev, rows, TrainConfig(steps=3, batch_size=4, progress=False, eval_every=1), rows)
    assert [record["split"] for record in done.history].count("valid") >= 2 and done.steps == 3
    with pytest.raises(UserError, match="a row has no end"):
        lev.noise({"ids": torch.full((1, 9), 7)})


def test_varied_stories_have_many_lengths_and_a_grammar():
    language, words = varied(toy.ENGLISH["words"]), toy_tokenizer()
    texts = toy.sample(300, 0, language)
    assert all(toy.is_valid(text, language) for text in texts) and len({len(words.encode(text)) for text in texts}) >= 7
    assert toy.is_valid(toy.sample(1, 0, "en")[0], language) and not toy.is_valid(texts[0] + " The end.", language)


class Oracle(torch.nn.Module):
    "Knows for each draft, by its first token, what it should become."

    def __init__(self, texts):
        super().__init__()
        self.texts, self.lm_head, self.cfg = {text[0]: text for text in texts}, SimpleNamespace(weight=torch.zeros(1)), SimpleNamespace(max_position_embeddings=60)

    def forward(self, ids, who):
        logits = torch.zeros(*ids.shape, 42)
        for row, draft in enumerate(ids.tolist()):
            draft = draft[: int(who.real[row].sum())]
            for at, label in enumerate(edit_labels(draft, self.texts[draft[0]], 40, 41)):
                logits[row, at, label] = 9.0
        return logits


def test_mending_ends_where_the_model_says_and_rows_go_at_their_own_pace():
    texts = [[20, *range(6, 14), 1], [21, *range(8, 19), 1], [22, 7, 1]]
    drafts = [texts[0], [21, 8, 5, 18, 1], [22, 9, 9, 9, 7, 1]]
    rounds = list(mend(Oracle(texts), LEV, drafts))
    assert rounds[-1] == texts and rounds[0][2] == texts[2] and len(rounds) > 5 and drafts[1] == [21, 8, 5, 18, 1]
    short = list(mend(Oracle(texts), LEV, drafts, longest=8))[-1]
    assert short[0] == texts[0] and short[2] == texts[2] and len(short[1]) <= 8 and short[1][-1] == 1  # no end is cut off
    assert len(list(mend(Oracle(texts), LEV, drafts, rounds=2))) == 2


def test_damage_and_plant_do_what_they_say():
    ids = [0, *range(6, 26), 1]
    for seed in range(30):
        draws = make_generator(seed)
        assert len(damage(ids, "missing", 3, 5, draws)) == 19 and len(damage(ids, "doubled", 3, 5, draws)) == 25
        gap = damage(ids, "gap", 4, 5, draws)
        assert len(gap) == 19 and gap.count(5) == 1 and gap[0] == 0 and gap[-1] == 1
    rows = torch.tensor([ids, ids])
    spoiled, where = plant(rows, [[6, 7, 8], [20, 21]], make_generator(0))
    assert where.sum(1).tolist() == [1, 1] and torch.equal(spoiled != rows, where)
    assert all(int(spoiled[where][k]) in (6, 7, 8, 20, 21) for k in range(2))


# the commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "An editing run of a few updates, and its parent."
    home = tmp_path_factory.mktemp("editing")
    (home / "stories.txt").write_text("\n\n".join(toy.sample(60, 0, "en")))
    toy_tokenizer().save_pretrained(home / "words")
    train = TrainConfig(steps=4, batch_size=4, progress=False, eval_every=2)
    how = dict(data=str(home / "stories.txt"), tokenizer=str(home / "words"), cache=home / "cache", preset="toy", length=64, pack=False, train=train)
    from nanollada.blocks import pretrain_any
    pretrain_any(EditPretrainConfig(out=home / "parent", objective="joint", **how))
    pretrain_any(EditPretrainConfig(out=home / "new", objective="editing", own=0.5, **how))
    pretrain_any(EditPretrainConfig(out=home / "child", objective="editing", init_from=home / "parent", **how))
    return home


def test_a_run_remembers_that_it_edits(run):
    for name in ("new", "child"):
        model, _, info = load_run(run / name)
        assert model.cfg.edits and model.cfg.shift and info["objective"] == "diffusion" and info["training"]["pretrain"]["objective"] == "editing"
    assert not load_run(run / "parent")[0].cfg.edits


def test_training_on_with_another_objective_forgets_it(run, tmp_path):
    from nanollada.blocks import pretrain_any
    train = TrainConfig(steps=1, batch_size=4, progress=False)
    pretrain_any(EditPretrainConfig(out=tmp_path / "plain", objective="diffusion", init_from=run / "new", data=str(run / "stories.txt"), cache=run / "cache",
                                    length=64, pack=False, train=train))
    assert not load_run(tmp_path / "plain")[0].cfg.edits


def test_an_editing_run_writes_by_edits_and_in_the_usual_ways(run, capsys):
    assert main(["generate", str(run / "new"), "--way", "edits", "--commit", "0.1", "--edit", "0", "--gen-length", "12"]) == 0
    assert main(["generate", str(run / "new"), "--gen-length", "12"]) == 0
    assert main(["generate", str(run / "new"), "--way", "edits", "--edit", "None", "--gen-length", "12", "--temperature", "0.7", "--samples", "2"]) == 0
    assert capsys.readouterr().out.count("\n") >= 3


@pytest.mark.parametrize("flags, said", [
    ("parent --way edits", "way is edits; expected a run of pretrain --objective editing"), ("new --way edits --edit 1.5", "edit is 1.5"),
    ("new --way edits --commit 2", "commit is 2"), ("new --way edits --doubt 2", "doubt is 2.0, which means nothing"),
    ("new --commit 0.5", "commit is 0.5, which means nothing without --way edits"), ("new --way edits --steps 8", "steps is 8"),
    ("new --way edits --eos late", "eos is late"), ("new --way drafts", "way is drafts"), ("new --way edits --post -1", "post is -1")])
def test_bad_requests_get_one_line(run, capsys, flags, said):
    folder, *rest = flags.split()
    assert main(["generate", str(run / folder), "--gen-length", "8", *rest]) in (1, 2)
    assert said in capsys.readouterr().err


def test_bad_trainings_get_one_line(run, tmp_path, capsys):
    for flags, said in ((["--wrong", "0.9"], "wrong is 0.9"), (["--own", "2"], "own is 2"), (["--edit-weight", "-1"], "edit_weight is -1")):
        assert main(["pretrain", "--data", str(run / "stories.txt"), "--out", str(tmp_path / "x"), "--objective", "editing", *flags]) in (1, 2)
        assert said in capsys.readouterr().err


def test_fine_tuning_goes_on_learning_to_edit(run):
    model = load_run(run / "new")[0]
    objective = objective_of(model)
    assert isinstance(objective, Editing) and objective.per == "row" and objective.by == "count" and objective.at(0.0) is objective
    assert isinstance(objective_of(load_run(run / "parent")[0]), MaskedDiffusion)
    rows = some_rows(8, 16, vocab=100)
    rows["ids"].clamp_(min=4)  # 3 is the mask
    nats, count = objective.terms(model, with_places(objective.noise(rows, make_generator(0))))
    assert nats.isfinite().all() and torch.equal(count, torch.ones(8))


def test_a_killed_training_of_edits_goes_on_to_the_same_bits(run, tmp_path):
    from nanollada.blocks import pretrain_any
    how = dict(data=str(run / "stories.txt"), tokenizer=str(run / "words"), cache=run / "cache", preset="toy", length=64, pack=False, objective="editing", own=0.5)
    ends = dict(batch_size=4, progress=False, save_every=2)
    pretrain_any(EditPretrainConfig(out=tmp_path / "whole", **how, train=TrainConfig(steps=6, **ends)))
    code = (f"from nanollada.editing import EditPretrainConfig\nfrom nanollada.blocks import pretrain_any\nfrom nanollada.trainer import TrainConfig\n"
            f"import nanollada.trainer as t\nfrom pathlib import Path\n"
            f"how = {dict(how, cache=str(how['cache']))!r}\nhow['cache'] = Path(how['cache'])\n"
            f"update, done = t.Learner.update, []\n"
            f"def stop(self):\n    done.append(1)\n    if len(done) == 5: import os; os._exit(9)\n    return update(self)\n"
            f"t.Learner.update = stop\n"
            f"pretrain_any(EditPretrainConfig(out=Path({str(tmp_path / 'cut')!r}), **how, train=TrainConfig(steps=6, **{ends!r})))\n")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    pretrain_any(EditPretrainConfig(out=tmp_path / "cut", **how, train=TrainConfig(steps=6, resume=True, **ends)))
    one, two = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_settings_of_edits_mean_nothing_to_other_kinds(run):
    model, words, _ = load_run(run / "parent")
    ar = replace(model.cfg, objective="ar", shift=False)
    twin = Backbone(ar)
    with pytest.raises(UserError, match="edits"):
        list(write_steps(twin, [[words.bos_token_id]], words, EditWriteConfig(way="edits", gen_length=4)))
    assert EditWriteConfig(way="edits", eos="never").edit_policy(3).suppress_tokens == (3,)
    assert make_editing(model.cfg, own=0.3).own == 0.3 and BlockWriteConfig.alien != EditWriteConfig.alien
    save_run(model, words, run / "again")
    assert load_run(run / "again")[0].cfg == model.cfg
