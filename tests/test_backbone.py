"The backbone against independent implementations: transformers, and attention written out."
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanollada.backbone import (
    PRESETS, Backbone, BackboneConfig, KVCache, attention_table, count_parameters, from_huggingface, load_run, preset,
    rope_frequencies, save_model, save_tokenizer, to_huggingface, attend
)
from nanollada.core import UserError, read_json, write_json
from nanollada.tokenizer import train_tokenizer

SMALL = dict(vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80)
VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "qk_norm": {"qk_norm": True, "num_key_value_heads": 2},
    "yarn": {"yarn_factor": 4.0, "yarn_original_length": 32, "max_position_embeddings": 128, "rope_theta": 1e6},
}


def build(**changes) -> Backbone:
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(**SMALL | changes)).eval()
    for name, weight in model.named_parameters():  # weights that would show a forgotten norm or a swapped matrix
        torch.nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.2)
    return model


def ids(B=3, L=40, seed=1) -> torch.Tensor:
    return torch.randint(0, 61, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_ar_run_opens_in_transformers_with_the_same_logits(tmp_path, variant):
    model = build(objective="ar", **VARIANTS[variant])
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if variant == "qk_norm" else "LlamaForCausalLM")
    with torch.no_grad():
        ours, reference = model(ids(), causal=True), theirs(ids()).logits
    # float32: 2^-23 relative per operation, a few hundred in a row, on logits of this size
    torch.testing.assert_close(ours, reference, atol=300 * 2**-23 * reference.abs().max().item(), rtol=0)


def test_a_diffusion_run_does_not_open_as_a_causal_model(tmp_path):
    save_model(build(objective="diffusion"), tmp_path)
    with pytest.raises(ValueError, match="nanollada"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", ["plain", "grouped", "qk_norm"])
def test_forward_equals_the_network_written_out(causal, variant):
    model = build(**VARIANTS[variant]).double()
    cfg, weights, x0 = model.cfg, model.state_dict(), ids(2, 9)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + cfg.rms_norm_eps).sqrt() * weight

    def turn(x):  # (B, L, H, hd): rotate the pair (i, i + hd/2) of position p by p * theta^(-2i/hd)
        half = cfg.head_dim // 2
        angle = torch.arange(9.0)[:, None] * cfg.rope_theta ** (-torch.arange(half) / half)
        pair = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[None, :, None].to(torch.complex128)
        return torch.cat([pair.real, pair.imag], -1)

    x = weights["model.embed_tokens.weight"][x0]
    for n in range(cfg.num_hidden_layers):
        w = {name.split(f"layers.{n}.")[1]: value for name, value in weights.items() if f"layers.{n}." in name}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, cfg.head_dim)) for p in "qkv")
        if cfg.qk_norm:
            q, k = norm(q, w["self_attn.q_norm.weight"]), norm(k, w["self_attn.k_norm.weight"])
        group = cfg.num_attention_heads // cfg.num_key_value_heads
        q, k, v = turn(q), turn(k).repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(cfg.head_dim)
        if causal:
            scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + mixed @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        gate = h @ w["mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    expected = norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    # angles are computed in float32: 2^-24 relative
    torch.testing.assert_close(model(x0, causal), expected, atol=1e-4, rtol=1e-5)


def test_causal_never_looks_ahead_and_bidirectional_looks_everywhere():
    model, before = build(), ids(1, 12)
    for position in range(12):
        after = before.clone()
        after[0, position] = (before[0, position] + 1) % 61
        moved = (model(before, True) - model(after, True)).abs().amax(-1)[0] > 0
        assert not moved[:position].any() and moved[position:].all()
        assert ((model(before, False) - model(after, False)).abs().amax(-1)[0] > 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_see_each_other(causal):
    model, row = build(), ids(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    together = model(row, causal, document_ids=documents)
    # rotary positions enter through differences only, so each document alone must give the same logits
    torch.testing.assert_close(together[:, :5], model(row[:, :5], causal), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[:, 5:], model(row[:, 5:], causal), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_left_padding_changes_nothing(causal):
    model, row = build(), ids(1, 10)
    padded, real = torch.cat([ids(1, 6, seed=9), row], 1), torch.tensor([[0] * 6 + [1] * 10])
    torch.testing.assert_close(model(padded, causal, attention_mask=real)[:, 6:], model(row, causal), atol=1e-5, rtol=1e-5)


def test_fully_padded_queries_give_numbers():
    table = attention_table(ids(1, 4), True, torch.zeros(1, 4))
    assert table.any(-1).all()
    assert build()(ids(1, 4), True, attention_mask=torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("shift", [False, True])
def test_denoiser_answers_at_chosen_positions(shift):
    model = build(shift=shift)
    where = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    plain = model(ids(), causal=False)
    expected = torch.cat([plain[:, :1], plain[:, :-1]], 1) if shift else plain
    torch.testing.assert_close(model.denoise(ids()), expected)
    torch.testing.assert_close(model.denoise.at(ids(), where), expected[where], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (7, 1, 20, 12)])
def test_cached_equals_uncached(pieces):
    model, row = build(num_key_value_heads=2), ids(2)
    cache, outputs, done = KVCache(model.cfg, 2, 40), [], 0
    for piece in pieces:
        outputs.append(model(row[:, done : done + piece], True, cache=cache))
        done += piece
    torch.testing.assert_close(torch.cat(outputs, 1), model(row, True), atol=1e-4, rtol=1e-4)


def test_a_full_cache_says_so():
    model = build()
    with pytest.raises(UserError, match="holds 5 tokens, and 6"):
        model(ids(1, 6), True, cache=KVCache(model.cfg, 1, 5))


def test_published_sizes():
    with torch.device("meta"):
        counts = {name: count_parameters(Backbone(preset(name))) for name in ("llada-1b", "llada-8b")}
        thirty = count_parameters(Backbone(preset("30m", 6401)))
    assert round(counts["llada-1b"] / 1e9, 2) == 1.49 and round(counts["llada-8b"] / 1e9, 2) == 8.02
    # two 6401 x 512 tables and 8 blocks of 4 x 512^2 + 3 x 512 x 1408, plus 17 norms of 512 and 16 of 64
    assert thirty == 32_244_736 + 17 * 512 + 16 * 64


def test_frequencies_without_yarn_are_the_plain_powers():
    frequencies, factor = rope_frequencies(BackboneConfig(**SMALL))
    assert factor == 1.0
    torch.testing.assert_close(frequencies, torch.tensor([10_000 ** (-2 * i / 12) for i in range(6)]))


@pytest.mark.parametrize("wrong, message", [
    ({"vocab_size": 0}, "vocab_size is 0"), ({"hidden_size": 50}, "does not divide"), ({"num_key_value_heads": 3}, "evenly"),
    ({"objective": "x"}, "objective is 'x'"), ({"mask_token_id": 61}, "outside the vocabulary"), ({"yarn_factor": 0.5}, "yarn"),
])
def test_impossible_shapes(wrong, message):
    with pytest.raises(UserError, match=message):
        BackboneConfig(**SMALL | wrong)


def test_unknown_preset_and_missing_vocabulary():
    with pytest.raises(UserError, match="toy, mini, small, 30m"):
        preset("giant", 10)
    with pytest.raises(UserError, match="vocab_size"):
        preset("toy")


@pytest.mark.parametrize("name", PRESETS)
def test_config_round_trip(name):
    cfg = preset(name, 6401, mask_token_id=6400, shift=True)
    assert from_huggingface(to_huggingface(cfg)) == cfg


@pytest.mark.parametrize("bad, message", [
    (torch.zeros(2, 3, 4, dtype=torch.long), "shape"), (torch.zeros(1, 0, dtype=torch.long), "shape"),
    (torch.full((1, 3), 61), "vocabulary"), (torch.full((1, 3), -1), "vocabulary"),
    (torch.zeros(1, 4097, dtype=torch.long), "context of 4096"),
])
def test_bad_ids(bad, message):
    with pytest.raises(UserError, match=message):
        build()(bad, causal=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("run"), train_tokenizer(["some text to learn from"] * 3, 270)
    changes = dict(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, objective="diffusion", shift=True)
    save_model(Backbone(BackboneConfig(**SMALL | changes)), folder)
    save_tokenizer(tokenizer, folder)
    return folder


def test_load_run_gives_back_what_was_saved(run):
    model, tokenizer, info = load_run(run, device="cpu")
    assert model.cfg.shift and not model.training and info["objective"] == "diffusion"
    assert tokenizer.decode(tokenizer("some text")["input_ids"]) == "some text"
    assert tokenizer.mask_token_id == model.cfg.mask_token_id
    messages = [{"role": "user", "content": "hello"}]
    assert "hello" in tokenizer.apply_chat_template(messages, tokenize=False)


def copy(run, tmp_path):
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_truncated_weights(run, tmp_path):
    folder = copy(run, tmp_path)
    path = folder / "model.safetensors"
    for length in (0, 7, 100, path.stat().st_size - 1):
        path.write_bytes((run / "model.safetensors").read_bytes()[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_run(folder)


def test_weights_of_another_shape_or_name(run, tmp_path):
    folder = copy(run, tmp_path)
    write_json(folder / "config.json", read_json(run / "config.json") | {"intermediate_size": 96})
    with pytest.raises(UserError, match="different models"):
        load_run(folder)
    copy(run, tmp_path)
    weights = load_file(run / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape None"):
        load_run(folder)


def test_a_foreign_config_and_missing_files(run, tmp_path):
    folder = copy(run, tmp_path)
    write_json(folder / "config.json", {"model_type": "gpt2"})
    with pytest.raises(UserError, match="'gpt2'"):
        load_run(folder)
    copy(run, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        load_run(folder)
    with pytest.raises(UserError, match="no such run folder"):
        load_run(tmp_path / "none")


def test_a_tokenizer_that_does_not_belong(run, tmp_path):
    folder = copy(run, tmp_path)
    save_tokenizer(train_tokenizer([f"word{i} other{i}" for i in range(200)], 400), folder)
    with pytest.raises(UserError, match="do not belong together"):
        load_run(folder)


def test_loading_never_unpickles(run, tmp_path):
    folder = copy(run, tmp_path)
    torch.save({"payload": print}, folder / "model.safetensors")
    with pytest.raises(UserError):
        load_run(folder)


def test_configs_differ_in_one_field_only_where_told():
    cfg = preset("toy", 300)
    assert replace(cfg, shift=True) != cfg and replace(cfg) == cfg


@pytest.mark.parametrize("case", ["everywhere", "causal", "table", "grouped", "one query"])
def test_products_equal_the_kernel(case):
    g = torch.Generator().manual_seed(0)
    heads, queries = (2 if case == "grouped" else 4), (1 if case == "one query" else 48)
    q, k, v = (torch.randn(2, h, n, 16, generator=g).bfloat16().requires_grad_()
               for h, n in ((4, queries), (heads, 48), (heads, 48)))
    table = torch.rand(2, 1, 48, 48, generator=g) < 0.5 if case == "table" else None
    table = None if table is None else table | torch.eye(48, dtype=torch.bool)
    grouped, causal = case == "grouped", case == "causal"
    answers = (attend(q, k, v, table, causal),
               F.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), table, is_causal=causal, enable_gqa=grouped))
    gradients = [torch.autograd.grad(answer.float().square().sum(), (q, k, v)) for answer in answers]
    # scores below 8 rounded to 8 bits: 2**-6, which moves a probability by as large a share, and the sums with it
    for ours, exact in zip((answers[0], *gradients[0]), (answers[1], *gradients[1])):
        assert (ours.float() - exact.float()).norm() < 2**-5 * exact.float().norm()
    assert answers[0].dtype == torch.bfloat16


def test_long_rows_and_float32_take_the_kernel(monkeypatch):
    called = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: called.append(1) or real(*args, **more))
    for length, dtype, expected in ((1024, torch.bfloat16, 0), (1025, torch.bfloat16, 1), (8, torch.float32, 2)):
        x = torch.randn(1, 1, length, 4, dtype=dtype)
        attend(x, x, x, None, False)
        assert len(called) == expected


@pytest.mark.parametrize("causal", [True, False])
def test_recomputing_gives_the_same_gradients_bit_for_bit_and_keeps_less(causal):
    model, x = build().train(), ids(4, 40)
    found = {}
    for again in (False, True):
        model.model.recompute, kept = again, []
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model(x, causal).square().mean()
        loss.backward()
        found[again] = ([weight.grad.clone() for weight in model.parameters()], sum(kept))
    assert all(torch.equal(a, b) for a, b in zip(found[False][0], found[True][0]))
    assert found[True][1] < found[False][1] / 3
    model.eval()
    torch.testing.assert_close(model(x, causal).square().mean(), loss)  # outside training it has no effect


@pytest.mark.parametrize("shift", [False, True])
def test_places_choose_the_same_logits_as_a_mask(shift):
    model = build(shift=shift)
    where = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    places = where.flatten().nonzero()[:, 0]
    assert torch.equal(model.denoise.at(ids(), where), model.denoise.at(ids(), places))
