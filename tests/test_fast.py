"Chapter 13: cached and parallel sampling against the uncached sampler, and each rule against its definition."

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanollada.backbone import Backbone, BackboneConfig, save_model, save_tokenizer
from nanollada.core import UserError, make_generator
from nanollada.fast import (BenchConfig, FastRules, bench_sample, by_entropy, by_factor, by_hierarchy, by_threshold, fast_generate,
                            few_passes, least_trusted, pass_quotas, plain_loop, share_by_entropy)
from nanollada.sampler import exact_sample_distribution, generate
from nanollada.tokenizer import train_tokenizer
from oracles import RandomDenoiser

MASK, EOS, N = 22, 3, 12
PADDING = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
PARALLEL = ("threshold", "factor", "entropy_bounded", "hierarchical")
LOOSE = dict(threshold=0.2, low_threshold=0.1, factor=8.0, gamma=3.0)


def make_model(shift=False, seed=0):
    "A random network in float64: sharp enough to be decided, exact enough that ties do not matter."
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    cfg = BackboneConfig(MASK + 1, **shape, max_position_embeddings=64, shift=shift, mask_token_id=MASK, initializer_range=0.3)
    return Backbone(cfg).double().eval()


def make_prompt(rows, length, seed=0):
    return torch.randint(0, MASK, (rows, length), generator=make_generator(seed))


# A cache that is refreshed before every pass is no approximation.


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize(("steps", "block"), [(12, 12), (12, 4), (6, 4)])
def test_refreshed_every_pass_is_exact(cache, shift, length, steps, block):
    model, prompt = make_model(shift), make_prompt(3, length)
    wanted = generate(model.denoise, prompt, MASK, N, steps=steps, block_length=block)
    found = fast_generate(model, prompt, MASK, N, rule="quota", steps=steps, block_length=block, cache=cache, refresh_every=1)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("eos", [None, EOS])
def test_exact_with_padding_and_end(shift, eos):
    model, prompt = make_model(shift), make_prompt(3, 5)
    wanted = generate(model.denoise, prompt, MASK, N, steps=N, block_length=4, attention_mask=PADDING, eos_id=eos)
    settings = dict(rule="quota", block_length=4, cache="dual", refresh_every=1, eos_id=eos)
    assert torch.equal(fast_generate(model, prompt, MASK, N, attention_mask=PADDING, **settings), wanted)


def test_exact_at_a_temperature():
    model, prompt = make_model(), make_prompt(2, 0)
    wanted = generate(model.denoise, prompt, MASK, N, steps=N, temperature=1.0, generator=make_generator(7))
    settings = dict(rule="quota", block_length=N, cache="prefix", refresh_every=1, temperature=1.0)
    assert torch.equal(fast_generate(model, prompt, MASK, N, generator=make_generator(7), **settings), wanted)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_stale_cache_computes_less_and_may_differ(cache):
    differ = 0
    for seed in range(5):
        model, prompt = make_model(seed=seed), make_prompt(3, 5, seed)
        exact, cheap = {}, {}
        wanted = fast_generate(model, prompt, MASK, N, rule="quota", block_length=4, cache="none", stats=exact)
        found = fast_generate(model, prompt, MASK, N, rule="quota", block_length=4, cache=cache, stats=cheap)
        assert cheap["nfe"] == exact["nfe"] == N and cheap["positions"] < exact["positions"] == 3 * N * (5 + N)
        differ += int((found != wanted).sum())
    assert differ > 0  # else nothing was cached


@pytest.mark.parametrize("shift", [False, True])
def test_near_refresh_computes_two_blocks(shift):
    stats = {}
    fast_generate(make_model(shift), make_prompt(1, 5), MASK, N, rule="quota", block_length=4, refresh="near", stats=stats)
    assert stats["positions"] == (17 + 3 * (4 + shift)) + 2 * ((8 + shift) + 3 * (4 + shift))


# A canvas that grows with the text.


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
def test_with_no_masks_ahead_each_block_is_a_canvas_of_its_own(cache, shift):
    model, prompt = make_model(shift), make_prompt(3, 5)
    found = fast_generate(model, prompt, MASK, N, rule="quota", block_length=4, cache=cache, refresh_every=1, ahead=0)
    wanted = prompt
    for _ in range(N // 4):
        wanted = generate(model.denoise, wanted, MASK, 4, steps=4)
    assert torch.equal(found, wanted)


def test_masks_ahead_are_part_of_the_canvas():
    model, prompt = make_model(), make_prompt(3, 5)
    found = fast_generate(model, prompt, MASK, N, rule="quota", block_length=4, cache="none", ahead=4, attention_mask=PADDING)
    wanted, mask = prompt, PADDING
    for _ in range(N // 4):  # a canvas of 8 masks, of which the first four are kept
        room = min(8, 5 + N - wanted.shape[1])
        wanted = generate(model.denoise, wanted, MASK, room, steps=room, block_length=4, attention_mask=mask)
        wanted, mask = wanted[:, : mask.shape[1] + 4], torch.cat([mask, torch.ones_like(mask[:, :4])], dim=1)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_enough_masks_ahead_change_nothing(cache):
    model, prompt = make_model(), make_prompt(3, 5)
    settings = dict(rule="threshold", threshold=0.3, block_length=4, cache=cache)
    wanted = fast_generate(model, prompt, MASK, N, **settings)
    assert torch.equal(fast_generate(model, prompt, MASK, N, ahead=N, **settings), wanted)


def test_near_refresh_computes_the_masks_that_are_new():
    stats, settings = {}, dict(rule="quota", block_length=4, refresh="near", ahead=2)
    fast_generate(make_model(), make_prompt(1, 5), MASK, N, stats=stats, **settings)
    assert stats["positions"] == (5 + 4 + 2) + (4 + 4 + 2) + (4 + 4) + 3 * 3 * 4


# A row does not depend on its neighbours, although batches shrink and rows change places.


@pytest.mark.parametrize("rule", PARALLEL)
@pytest.mark.parametrize(("cache", "ahead"), [("none", None), ("prefix", None), ("prefix", 2), ("dual", None), ("dual", 2)])
def test_rows_are_independent(rule, cache, ahead):
    model, prompt = make_model(), make_prompt(3, 5)
    settings = dict(block_length=5, rule=rule, cache=cache, ahead=ahead, eos_id=EOS, patience=3, temperature=0.7, **LOOSE)
    streams = [make_generator(0, row) for row in range(3)]
    together = fast_generate(model, prompt, MASK, N, attention_mask=PADDING, generator=streams, **settings)
    for row in range(3):
        part = slice(row, row + 1)
        alone = fast_generate(model, prompt[part], MASK, N, attention_mask=PADDING[part], generator=[make_generator(0, row)],
                              **settings)
        assert torch.equal(together[part], alone)
    assert torch.equal(together[:, :5], prompt) and (together != MASK).all()


def test_finished_rows_are_not_computed():
    model, prompt, stats, alone = make_model(), make_prompt(4, 5), {}, []
    settings = dict(block_length=N, rule="threshold", cache="dual", threshold=0.3)
    fast_generate(model, prompt, MASK, N, stats=stats, **settings)
    for row in range(4):
        alone.append({})
        fast_generate(model, prompt[row : row + 1], MASK, N, stats=alone[-1], **settings)
    assert stats["positions"] == sum(each["positions"] for each in alone)
    assert stats["nfe"] == max(each["nfe"] for each in alone)


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


def slow_hierarchy(row, tau, low):
    keep, runs = slow_threshold(row, tau), []
    for i in sorted(row):
        runs = [*runs[:-1], [*runs[-1], i]] if runs and runs[-1][-1] == i - 1 else [*runs, [i]]
    best = {max(run, key=lambda i: (row[i], -i)) for run in runs}
    return keep | {i for i in best if row[i] > low}


@pytest.mark.parametrize("seed", range(20))
def test_rules_follow_their_definitions(seed):
    generator = make_generator(seed)
    score = torch.rand(6, 9, generator=generator, dtype=torch.float64) ** 0.5
    score = torch.where(score > 0.7, (score * 8).round() / 8, score)  # ties
    is_open = torch.rand(6, 9, generator=generator) < 0.7
    is_open[:, 4] = True
    score, entropy = score.masked_fill(~is_open, -math.inf), (1 - score).masked_fill(~is_open, math.inf)
    found = (by_threshold(score, 0.8), by_factor(score, 1.0), by_entropy(entropy, 0.3), by_hierarchy(score, 0.8, 0.4))
    for r in range(6):
        row = {i: score[r, i].item() for i in range(9) if is_open[r, i]}
        doubt = {i: 1 - p for i, p in row.items()}
        wanted = (slow_threshold(row, 0.8), slow_factor(row, 1.0), slow_entropy(doubt, 0.3), slow_hierarchy(row, 0.8, 0.4))
        for rule, commit, slow in zip(PARALLEL, found, wanted, strict=True):
            assert set(commit[r].nonzero()[:, 0].tolist()) == slow, rule


def test_a_row_with_nothing_open_commits_nothing():
    score = torch.full((1, 4), -math.inf)
    for commit in (by_threshold(score), by_factor(score), by_entropy(-score), by_hierarchy(score)):
        assert not commit.any()


@pytest.mark.parametrize("rule", PARALLEL)
def test_timid_settings_commit_one_token_a_pass(rule):
    stats, timid = {}, dict(threshold=1.0, low_threshold=1.0, factor=1e-9, gamma=0.0)
    prompt = make_prompt(1, 5)
    found = fast_generate(make_model(), prompt, MASK, N, rule=rule, block_length=4, cache="none", stats=stats, **timid)
    kind = "entropy" if rule == "entropy_bounded" else "low_confidence"
    assert stats["nfe"] == N
    assert torch.equal(found, generate(make_model().denoise, prompt, MASK, N, steps=N, block_length=4, remasking=kind))


# Passes that are not made.


def test_useless_steps_are_skipped():
    stats = {}
    fast_generate(make_model(), make_prompt(1, 3), MASK, N, rule="quota", steps=30, block_length=4, stats=stats)
    assert stats["nfe"] == N


def test_the_last_block_may_be_shorter():
    steps = []
    ids = fast_generate(make_model(), make_prompt(2, 3), MASK, 10, rule="quota", block_length=4, on_step=steps.append)
    assert (ids != MASK).all() and [s.block for s in steps] == [0] * 4 + [1] * 4 + [2] * 2


def test_end_of_text_stops_a_row():
    model, stats = make_model(), {}
    model.lm_head.weight.data.zero_()  # all logits equal: the first token wins, and that is made EOS
    settings = dict(rule="quota", block_length=4, eos_id=0, stats=stats)
    ids = fast_generate(model, make_prompt(2, 3), MASK, N, **settings)
    assert stats["nfe"] == 1 and (ids[:, 3:] == 0).all()


def test_settled_blocks_are_committed():
    slow, quick, prompt = {}, {}, make_prompt(2, 3)
    model = make_model()
    model.lm_head.weight.data.zero_()  # the proposals never change
    fast_generate(model, prompt, MASK, N, rule="quota", block_length=6, stats=slow)
    fast_generate(model, prompt, MASK, N, rule="quota", block_length=6, patience=1, stats=quick)
    assert slow["nfe"] == N and quick["nfe"] == 4  # two blocks, two passes each


class SyncCounter(TorchDispatchMode):
    "Counts the operations that make a GPU wait for the host or the host for a GPU."

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, indices = func.overloadpacket.__name__, args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        by_bool = name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in indices)
        self.count += by_bool or name in ("nonzero", "_local_scalar_dense", "masked_select", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["quota", *PARALLEL])
def test_no_synchronisation_grows_with_the_passes(rule):
    counts = []
    for length in (4, 8):
        with SyncCounter() as counter:
            fast_generate(make_model(), make_prompt(2, 3), MASK, length, rule=rule, block_length=length)
        counts.append(counter.count)
    assert counts[0] == counts[1]


def test_steps_are_reported_in_the_order_of_the_prompt():
    model, prompt, steps = make_model(), make_prompt(4, 5), []
    ids = fast_generate(model, prompt, MASK, N, rule="threshold", threshold=0.3, block_length=6, on_step=steps.append)
    before = torch.full_like(ids, MASK)
    before[:, :5] = prompt
    for number, step in enumerate(steps, 1):
        assert step.nfe == number and torch.equal(torch.where(step.committed, step.predicted, before), step.ids)
        assert not (step.confidence.isfinite() & (before != MASK)).any()
        before = step.ids
    assert torch.equal(before, ids)


# Few passes.


@pytest.mark.parametrize("schedule", ["uniform", "cosine"])
@pytest.mark.parametrize(("n", "passes"), [(1, 1), (7, 7), (48, 5), (48, 20), (40, 39)])
def test_quotas_share_out_everything(schedule, n, passes):
    quotas = pass_quotas(n, passes, schedule)
    assert len(quotas) == passes and sum(quotas) == n and min(quotas) >= 1


def test_cosine_commits_few_first():
    quotas = pass_quotas(100, 10, "cosine")
    assert quotas[0] <= 2 and quotas == sorted(quotas)


def test_entropy_is_shared_among_passes():
    entropy = torch.tensor([[0.0, 0.0, 1.0, 1.0, math.inf], [2.0, 2.0, math.inf, math.inf, math.inf]])
    assert share_by_entropy(entropy, 2).tolist() == [3, 1]
    assert share_by_entropy(entropy, 1).tolist() == [4, 2]
    assert share_by_entropy(entropy, 4).tolist()[0] == 1  # each later pass needs a token


@pytest.mark.parametrize("schedule", ["uniform", "cosine", "entropy"])
@pytest.mark.parametrize("corrector", [0.0, 0.5, 1.0])
def test_few_passes_takes_exactly_so_many(schedule, corrector):
    model, calls = make_model(), []
    ids = few_passes(lambda x: calls.append(1) or model.denoise(x), make_prompt(3, 4), MASK, 20, 6, schedule, corrector)
    assert len(calls) == 6 and (ids != MASK).all()


@pytest.mark.parametrize("passes", [3, 20])
def test_without_corrector_few_passes_is_the_sampler(passes):
    model, prompt = make_model(), make_prompt(3, 4)
    wanted = generate(model.denoise, prompt, MASK, 20, steps=passes)
    assert torch.equal(few_passes(model.denoise, prompt, MASK, 20, passes), wanted)


def test_few_passes_in_random_order_draws_what_the_sampler_draws():
    table, n = RandomDenoiser(3, 4, seed=2), 4000
    denoiser = lambda ids, attention_mask=None: table(ids)
    exact = exact_sample_distribution(denoiser, torch.full((4,), 3), 3, 2, "random")  # (4, 4, 4, 4)
    ids = few_passes(denoiser, torch.zeros(n, 0, dtype=torch.long), 3, 4, 2, temperature=1.0, generator=make_generator(0),
                     remasking="random")
    for text in exact.flatten().topk(5).indices:
        p = exact.flatten()[text].item()
        share = ((ids * 4 ** torch.arange(3, -1, -1)).sum(1) == text).double().mean().item()
        assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_the_corrector_takes_back_the_least_trusted():
    trust = torch.tensor([[0.9, 0.2, 0.5, 0.7, math.inf]])
    assert least_trusted(trust, 0.4, 0.8, 1.0).tolist() == [[False, True, True, False, False]]  # (1 - 0.8) / 0.4 of four
    assert not least_trusted(trust, 0.4, 0.8, 0.0).any() and not least_trusted(trust, 0.8, 1.0, 1.0).any()


# The benchmark.


def test_plain_loop_is_the_official_algorithm():
    model, prompt = make_model(), make_prompt(3, 5)
    wanted = generate(model.denoise, prompt, MASK, N, steps=N, block_length=4)
    assert torch.equal(plain_loop(model.denoise, prompt, MASK, N, 4), wanted)


def test_bench_records():
    cfg = BenchConfig(gen_length=8, block_length=4, batch_sizes=(1, 2), repeats=2, plain_passes=2, quality_rows=2, quality_length=8,
                      variants=("one_per_pass", "threshold_dual"), vocab_size=30, device="cpu", clock="cpu")
    head, *records = json.loads(json.dumps(bench_sample(cfg)))
    assert {"machine", "torch", "preset", "seed", "threads"} <= head.keys()
    assert [(r["variant"], r["batch_size"]) for r in records] == [
        (name, batch) for batch in (1, 2) for name in ("plain_loop", "ar_kv_cache", "one_per_pass", "threshold_dual")]
    for record in records:
        assert record["tokens_per_second_min"] <= record["tokens_per_second"] <= record["tokens_per_second_max"]
        assert record["tokens_per_forward"] == record["batch_size"] * 8 / record["forward_passes"]
    assert [r["quality"] for r in records if r["variant"] in ("plain_loop", "one_per_pass")] == [1.0] * 4


def test_bench_asks_a_judge():
    cfg = BenchConfig(gen_length=4, block_length=4, batch_sizes=(1,), repeats=1, variants=(), quality_rows=2, quality_length=4,
                      vocab_size=30, device="cpu")
    records = bench_sample(cfg, judge=lambda ids: torch.tensor([0.0, 1.0]))
    assert {r["quality"] for r in records[1:]} == {0.5} and records[0]["quality"] == "judge"


# Every error has a way to be reached.


@pytest.mark.parametrize(("settings", "message"), [
    (dict(rule="best"), "rule is 'best'"), (dict(cache="all"), "cache is 'all'"), (dict(refresh="far"), "refresh is 'far'"),
    (dict(block_length=0), "block_length is 0"), (dict(refresh_every=0), "refresh_every is 0"), (dict(patience=0), "patience is 0"),
    (dict(steps=1.5), "steps is 1.5"), (dict(threshold=1.1), "threshold is 1.1"), (dict(low_threshold=-1), "low_threshold is -1"),
    (dict(factor=0), "factor is 0"), (dict(gamma=-1), "gamma is -1"), (dict(ahead=-1), "ahead is -1"),
    (dict(temperature=-1), "temperature is -1"),
])
def test_bad_rules(settings, message):
    with pytest.raises(UserError, match=message):
        FastRules(**settings)


def test_bad_calls():
    model, prompt = make_model(), make_prompt(2, 5)
    with pytest.raises(UserError, match="do not fit the context of 64"):
        fast_generate(model, prompt, MASK, 60)
    with pytest.raises(UserError, match="contains the mask id"):
        fast_generate(model, torch.full_like(prompt, MASK), MASK, 4)
    with pytest.raises(UserError, match="1 generators for 2 rows"):
        fast_generate(model, prompt, MASK, 4, generator=[make_generator(0)])
    with pytest.raises(UserError, match="use a multiple of 3"):
        fast_generate(model, prompt, MASK, 12, rule="quota", steps=4, block_length=4)
    with pytest.raises(UserError, match="5 passes for 4 tokens"):
        few_passes(model.denoise, prompt, MASK, 4, 5)
    with pytest.raises(UserError, match="schedule is 'sine'"):
        few_passes(model.denoise, prompt, MASK, 4, 2, "sine")
    with pytest.raises(UserError, match="corrector is 2"):
        few_passes(model.denoise, prompt, MASK, 4, 2, corrector=2)
    with pytest.raises(UserError, match="remasking is 'ancestral'"):
        few_passes(model.denoise, prompt, MASK, 4, 2, remasking="ancestral")
    with pytest.raises(UserError, match="variant is 'magic'"):
        BenchConfig(variants=("magic",))
    with pytest.raises(UserError, match="repeats is 0"):
        BenchConfig(repeats=0)
    with pytest.raises(UserError, match="clock is 'sun'"):
        BenchConfig(clock="sun")


def test_bench_refuses_exchanged_runs(tmp_path):
    tokenizer = train_tokenizer(["a b c"], 260)
    cfg = BackboneConfig(len(tokenizer), 32, 1, 4, 2, 48, 64, objective="ar", mask_token_id=tokenizer.mask_token_id)
    save_model(Backbone(cfg), tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(UserError, match="exchange the two"):
        bench_sample(BenchConfig(run=tmp_path, device="cpu"))
