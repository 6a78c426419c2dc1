"The backbone against independent implementations: transformers, and attention written out."
import math
import re
import resource

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanollada.backbone import (
    PRESETS, Backbone, BackboneConfig, BackboneDenoiser, Denoiser, KVCache, Visibility, as_denoiser, attend, from_huggingface,
    load_run, preset, save_run, to_huggingface
)
from nanollada.core import UserError, read_json, write_json
from nanollada.tokenizer import encode, save_tokenizer, train_tokenizer

SMALL = dict(vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80)
VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "qk_norm": {"qk_norm": True, "num_key_value_heads": 2},
    "far": {"max_position_embeddings": 128, "rope_theta": 1e6},
}


def build(**changes) -> Backbone:
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(**SMALL | changes)).eval()
    for name, weight in model.named_parameters():  # weights that would show a forgotten norm or a swapped matrix
        torch.nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.2)
    return model


def ids(B=3, L=40, seed=1) -> torch.Tensor:
    return torch.randint(0, 61, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text to learn from"] * 3, 270)


def save(model, folder, tokenizer):
    "As a run, whose vocabulary is larger than the model's: only `transformers` opens it."
    save_run(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_ar_run_opens_in_transformers_with_the_same_logits(tmp_path, variant, tokenizer):
    model = build(objective="ar", **VARIANTS[variant])
    save(model, tmp_path, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if variant == "qk_norm" else "LlamaForCausalLM")
    with torch.no_grad():
        ours, reference = model(ids(), causal=True), theirs(ids()).logits
    # float32: 2^-23 relative per operation, a few hundred in a row, on logits of this size
    torch.testing.assert_close(ours, reference, atol=300 * 2**-23 * reference.abs().max().item(), rtol=0)


def test_a_diffusion_run_does_not_open_as_a_causal_model(tmp_path, tokenizer):
    save(build(objective="diffusion"), tmp_path, tokenizer)
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
    together = model(row, Visibility(causal, documents=documents))
    # rotary positions enter through differences only, so each document alone must give the same logits
    torch.testing.assert_close(together[:, :5], model(row[:, :5], causal), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[:, 5:], model(row[:, 5:], causal), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_left_padding_changes_nothing(causal):
    model, row = build(), ids(1, 10)
    padded, real = torch.cat([ids(1, 6, seed=9), row], 1), torch.tensor([[0] * 6 + [1] * 10])
    torch.testing.assert_close(model(padded, Visibility(causal, real))[:, 6:], model(row, causal), atol=1e-5, rtol=1e-5)


def seen_by_hand(causal, real, documents, past, seen):
    "The definition, position by position."
    B, T = real.shape
    return torch.tensor([[[bool(real[b, j]) and documents[b, i] == documents[b, j] and (j <= i or not causal)
                           for j in range(seen)] for i in range(past, T)] for b in range(B)])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("past, seen", [(0, 8), (3, 8), (7, 8)])
@pytest.mark.parametrize("given", ["real", "documents", "both"])
def test_tables_equal_the_definition(causal, past, seen, given):
    g = torch.Generator().manual_seed(past)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]) if given != "documents" else torch.ones(2, 8, dtype=torch.long)
    documents = torch.randint(0, 2, (2, 8), generator=g) if given != "real" else torch.zeros(2, 8, dtype=torch.long)
    who = Visibility(causal, None if given == "documents" else real, None if given == "real" else documents)
    table = who.table(ids(2, 8)[:, past:], past, seen).expand(2, 1, 8 - past, seen)[:, 0]
    expected = seen_by_hand(causal, real, documents, past, seen)
    expected = expected | ~expected.any(-1, keepdim=True)  # who sees nobody sees all, or a softmax would be 0/0
    assert torch.equal(table, expected)


def test_no_table_where_the_kernel_needs_none():
    row = ids(2, 8)
    assert Visibility(True).table(row) is None and Visibility(False).table(row) is None
    assert Visibility(True).table(row[:, 7:], 7) is None and Visibility(False).table(row[:, 3:], 3) is None
    assert Visibility(True).table(row[:, 3:], 3).shape == (1, 1, 5, 8)


def test_padded_decoding_builds_no_square_table():
    "code.md 10: every token built a table of (B, T, T)."
    real = torch.ones(3, 500)
    assert Visibility(True, real).table(ids(3, 1), past=499).shape == (3, 1, 1, 500)
    assert Visibility(False, real).table(ids(3, 500)).shape == (3, 1, 1, 500)


def test_fully_padded_queries_give_numbers():
    assert build()(ids(1, 4), Visibility(True, torch.zeros(1, 4))).isfinite().all()
    assert build()(ids(1, 4), Visibility(False, torch.zeros(1, 4))).isfinite().all()


@pytest.mark.parametrize("shift", [False, True])
def test_denoiser_answers_at_chosen_places(shift):
    model = build(shift=shift, mask_token_id=60)
    where = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    where[:, 0] = True  # the first position of a row is nobody's neighbour
    plain = model(ids(), causal=False)
    expected = torch.cat([plain[:, :1], plain[:, :-1]], 1) if shift else plain
    assert torch.equal(model.denoise(ids()), expected) and model.denoise.mask_id == 60
    torch.testing.assert_close(model.denoise.at(ids(), where.flatten().nonzero()[:, 0]), expected[where], atol=1e-5, rtol=1e-5)


def test_documents_reach_the_denoiser():
    model, documents = build(mask_token_id=60), torch.tensor([[0] * 5 + [1] * 7])
    denoiser = BackboneDenoiser(model, documents=documents)
    assert torch.equal(denoiser(ids(1, 12)), model(ids(1, 12), Visibility(documents=documents)))
    assert not torch.allclose(denoiser(ids(1, 12)), model.denoise(ids(1, 12)))


def test_any_function_becomes_a_denoiser():
    seen = []

    def function(x, attention_mask=None):
        seen.append(attention_mask)
        return F.one_hot(x, 61).float()

    denoiser, real = as_denoiser(function, 60), torch.ones(3, 40)
    assert isinstance(denoiser, Denoiser) and denoiser.mask_id == 60 and as_denoiser(denoiser, 60) is denoiser
    assert torch.equal(denoiser.at(ids(), torch.tensor([41, 7])), function(ids())[[1, 0], [1, 7]])
    denoiser(ids(), real)
    assert seen[0] is None and seen[-1] is real
    assert as_denoiser(lambda x: F.one_hot(x, 61), 60)(ids()).shape == (3, 40, 61)  # which knows no mask


@pytest.mark.parametrize("wrong, mask_id, message", [
    (lambda x: x, None, "mask_id is None"), (lambda x: x, 60, "not logits"), (lambda x: {"logits": x}, 60, "dict"),
    (Backbone(BackboneConfig(**SMALL, mask_token_id=5)).denoise, 60, "5"),
    (Backbone(BackboneConfig(**SMALL)).denoise, None, "give its mask token's"),
])
def test_what_is_no_denoiser(wrong, mask_id, message):
    with pytest.raises(UserError, match=message):
        as_denoiser(wrong, mask_id)(ids())


def test_the_default_of_a_denoiser_asks_everywhere():
    class Counting(Denoiser):
        mask_id = 0

        def at(self, x, places, attention_mask=None):
            return places[:, None].expand(-1, 4)

    assert torch.equal(Counting()(ids(2, 3))[..., 0], torch.arange(6).view(2, 3))


@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (7, 1, 20, 12)])
def test_cached_equals_uncached(pieces):
    model, row = build(num_key_value_heads=2), ids(2)
    cache, outputs, done = KVCache(model.cfg, 2, 40), [], 0
    for piece in pieces:
        outputs.append(model(row[:, done : done + piece], True, cache=cache))
        done += piece
    torch.testing.assert_close(torch.cat(outputs, 1), model(row, True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pieces", [(12,) + (1,) * 8, (5, 7, 1, 1, 6)])
def test_cached_equals_uncached_with_padding(pieces):
    model, row = build(num_key_value_heads=2), ids(3, 20)
    real = torch.ones(3, 25, dtype=torch.long)  # wider than what is read: a canvas
    real[1, :3], real[2, :10] = 0, 0
    cache, outputs, done = KVCache(model.cfg, 3, 20), [], 0
    for piece in pieces:
        outputs.append(model(row[:, done : done + piece], Visibility(True, real), cache=cache))
        done += piece
    whole = model(row, Visibility(True, real[:, :20]))
    torch.testing.assert_close(torch.cat(outputs, 1)[real[:, :20] > 0], whole[real[:, :20] > 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_a_canvas_is_read_again_in_its_middle(padded, shift):
    "What chapter 13 does: the stretch 8..14 of a canvas of 20 is written anew, and sees what the first pass left up to 16."
    model, canvas, real = build(), ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    real[1, :4] = 0 if padded else 1
    who, cache = Visibility(real=real) if padded else Visibility(), KVCache(model.cfg, 2, 20)
    first = model(canvas, who, cache=cache, shift=shift)
    assert cache.length == 20
    torch.testing.assert_close(first[real > 0], model(canvas, Visibility(real=real), shift=shift)[real > 0], atol=1e-4, rtol=1e-4)
    cache.length, cache.seen = 8, 20
    places = torch.tensor([1, 5, 7, 11])  # columns 9 and 13 of both rows
    again = model(canvas[:, 8:14], who, cache=cache, at=places, shift=shift)
    torch.testing.assert_close(again, first[[0, 0, 1, 1], [9, 13, 9, 13]], atol=1e-4, rtol=1e-4)  # nothing had changed
    cache.length, cache.seen = 8, 16
    shorter = model(canvas[:, 8:14], who, cache=cache)
    assert not torch.allclose(shorter, first[:, 8:14])
    cache.store[:, :, :, :, 16:] = 100.0
    cache.length = 8
    assert torch.equal(model(canvas[:, 8:14], who, cache=cache), shorter)


def test_a_full_cache_says_so():
    model = build()
    with pytest.raises(AssertionError, match="holds 5 tokens, 6 are"):
        model(ids(1, 6), True, cache=KVCache(model.cfg, 1, 5))


def test_published_sizes():
    with torch.device("meta"):
        shapes = {"llada-1b": 126_464, "llada-8b": 126_464, "30m": 6401}
        counts = {name: sum(p.numel() for p in Backbone(preset(name, size)).parameters()) for name, size in shapes.items()}
    assert round(counts["llada-1b"] / 1e9, 2) == 1.49 and round(counts["llada-8b"] / 1e9, 2) == 8.02
    # two 6401 x 512 tables and 8 blocks of 4 x 512^2 + 3 x 512 x 1408, plus 17 norms of 512 and 16 of 64
    assert counts["30m"] == 32_244_736 + 17 * 512 + 16 * 64


@pytest.mark.parametrize("wrong, message", [
    ({"vocab_size": 0}, "vocab_size is 0"), ({"hidden_size": 50}, "hidden_size 50"), ({"num_key_value_heads": 3}, "evenly"),
    ({"objective": "x"}, "objective is 'x'; expected ar or diffusion"), ({"mask_token_id": 61}, "expected -1 < mask_token_id < 61"),
    ({"vocab_size": "300"}, "vocab_size is '300'; expected int"), ({"vocab_size": 300.5}, "vocab_size is 300.5"),
    ({"num_key_value_heads": -4}, "num_key_value_heads is -4"), ({"rope_theta": math.nan}, "rope_theta is nan"),
    ({"rope_theta": 0}, "rope_theta is 0"), ({"rope_theta": -5.0}, "rope_theta is -5"), ({"rope_theta": "x"}, "rope_theta is 'x'"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps"), ({"mask_token_id": "x"}, "mask_token_id is 'x'"), ({"mask_token_id": -1}, "is -1"),
    ({"shift": "no"}, "shift is 'no'; expected bool"), ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"hidden_size": [8]}, "hidden_size is"), ({"objective": None}, "objective is None"),
])
def test_impossible_shapes(wrong, message):
    "attack.md: sizes of other types, rope_theta nan, 0 and -5 accepted in silence, kv heads -4."
    with pytest.raises(UserError, match=message):
        BackboneConfig(**SMALL | wrong)


def test_possible_shapes():
    cfg = BackboneConfig(**SMALL, rope_theta=100, mask_token_id=0)
    assert cfg.num_key_value_heads == cfg.num_attention_heads == 4 and cfg.head_dim == 12


def test_unknown_preset():
    with pytest.raises(UserError, match="toy, mini, small, 30m"):
        preset("giant", 10)
    assert preset("llada-8b", 300, hidden_size=64).vocab_size == 300


@pytest.mark.parametrize("name", PRESETS)
def test_config_round_trip(name):
    cfg = preset(name, 6401, mask_token_id=6400, shift=True)
    assert from_huggingface(to_huggingface(cfg)) == cfg


@pytest.mark.parametrize("bad, message", [
    (torch.zeros(1, 0, dtype=torch.long), "0 tokens"), (torch.full((1, 3), 61), "vocabulary"), (torch.full((1, 3), -1), "vocabulary"),
    (torch.zeros(1, 4097, dtype=torch.long), r"expected 1 to 4096 \(the context\)"),
])
def test_bad_ids(bad, message):
    with pytest.raises(UserError, match=message):
        build()(bad, causal=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("run")
    changes = dict(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, objective="diffusion", shift=True)
    save_run(Backbone(BackboneConfig(**SMALL | changes)), tokenizer, folder)
    return folder


def test_load_run_gives_back_what_was_saved(run):
    model, tokenizer, info = load_run(run, device="cpu")
    assert model.cfg.shift and not model.training and info["objective"] == "diffusion"
    assert tokenizer.decode(encode(tokenizer, "some text")) == "some text"
    assert tokenizer.mask_token_id == model.cfg.mask_token_id
    assert all(torch.equal(value, load_file(run / "model.safetensors")[name]) for name, value in model.named_parameters())
    messages = [{"role": "user", "content": "hello"}]
    assert "hello" in tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_model_trains_and_computes_as_the_one_saved(tmp_path, tokenizer, tied):
    "code.md 11: built on the meta device, so ties and rotary frequencies have to be put back."
    cfg = BackboneConfig(**SMALL | dict(vocab_size=len(tokenizer), mask_token_id=3, tie_word_embeddings=tied))
    model = Backbone(cfg).eval()
    save_run(model, tokenizer, tmp_path)
    again = load_run(tmp_path, "cpu")[0]
    assert torch.equal(again(ids(), False), model(ids(), False))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    again(ids(), True).sum().backward()
    assert all(weight.grad is not None for weight in again.parameters())


def test_weights_are_not_initialised_before_they_are_loaded(run, monkeypatch):
    "code.md 11: 32 GB of random numbers for an 8B model, thrown away."
    made = []
    real = torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda t, *a, **k: made.append(t.device.type) or real(t, *a, **k))
    load_run(run, "cpu")
    assert set(made) <= {"meta"}


def test_weights_load_in_bfloat16(run):
    "code.md 11: no inference precision."
    model = load_run(run, "cpu", dtype=torch.bfloat16)[0]
    exact = load_run(run, "cpu")[0]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.frequencies.dtype == torch.float32  # positions need more than 8 bits
    difference = (model(ids(), False).float() - exact(ids(), False)).norm() / exact(ids(), False).norm()
    assert 0 < difference < 2**-5  # a rounding is 2**-8; three layers, each some roundings deep
    cache = KVCache(model.cfg, 3, 40, "cpu", torch.bfloat16)
    assert model(ids(), True, cache=cache).dtype == torch.bfloat16


def test_transformers_stops_and_knows_the_beginning(tmp_path, tokenizer):
    "user.md D: `transformers.generate` ran past the end, and prompts lacked the token that every text begins with."
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(**SMALL | dict(vocab_size=len(tokenizer), objective="ar", mask_token_id=3)))
    nn = torch.nn.init
    nn.zeros_(model.lm_head.weight)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 1.0  # its logit is the sum of the hidden vector
    save_run(model, tokenizer, tmp_path)
    theirs, its = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = its("some text", return_tensors="pt")["input_ids"]
    assert prompt[0].tolist() == [tokenizer.bos_token_id, *encode(tokenizer, "some text")]
    assert encode(load_run(tmp_path, "cpu")[1], "some text") == encode(tokenizer, "some text")  # ours adds none
    theirs.lm_head.weight.data.mul_(theirs.model(prompt).last_hidden_state[0, -1].sum().sign())
    written = theirs.generate(prompt, max_new_tokens=20, do_sample=False)
    assert written.shape[1] < prompt.shape[1] + 20 and written[0, -1] == tokenizer.eos_token_id
    for name in ("bos", "eos", "pad"):
        assert getattr(theirs.config, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")


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
    write_json(folder / "config.json", read_json(run / "config.json") | {"intermediate_size": 48})  # a size that is there
    with pytest.raises(UserError, match="has shape"):
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
    with pytest.raises(UserError, match="no such file"):
        load_run(tmp_path / "none")


@pytest.mark.parametrize("changes", [
    *({"vocab_size": size} for size in (None, "300", 300.5, 10**7, 10**12, 10**25)), {"hidden_size": 10**9},
    {"hidden_size": 48 * 10**20}, {"hidden_size": 48 * 10**6}, {"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**8}, {"num_key_value_heads": -4}, {"rope_theta": "x"},
    {"rope_theta": float("nan")}, {"rms_norm_eps": []}, {"mask_token_id": "x"}, {"mask_token_id": 5},
    {"tie_word_embeddings": True}, {"intermediate_size": {}}, {"objective": "gan"},
])
def test_malformed_configs_cost_one_line_and_no_memory(run, tmp_path, changes):
    "attack.md: config.json with sizes of any kind; tied with an untied head."
    folder = copy(run, tmp_path)
    write_json(folder / "config.json", read_json(run / "config.json") | changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        load_run(folder)
    assert len(str(error.value).splitlines()) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("name, content", [
    ("config.json", "[]"), ("config.json", "null"), ("config.json", "[" * 100_000), ("config.json", "{"), ("config.json", "{}"),
    ("tokenizer.json", "[" * 100_000), ("tokenizer_config.json", "[" * 100_000), ("tokenizer.json", "{}"),
    ("train_config.json", "[]"),
])
def test_malformed_files(run, tmp_path, name, content):
    "attack.md: config.json `[]`, `null`, deep nesting; the tokenizer's files too; train_config `[]`."
    folder = copy(run, tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=re.split("[._]", name)[0]):
        load_run(folder)


def test_weights_that_are_not_numbers(run, tmp_path):
    "attack.md: NaN weights were accepted in silence."
    folder, weights = copy(run, tmp_path), load_file(run / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight holds NaN"):
        load_run(folder)


def test_a_tokenizer_that_does_not_belong(run, tmp_path, tokenizer):
    "attack.md G: only size and mask id were compared."
    folder = copy(run, tmp_path)
    other = train_tokenizer(["quite other words make other merges"] * 3, len(tokenizer))
    assert (len(other), other.mask_token_id) == (len(tokenizer), tokenizer.mask_token_id)
    save_tokenizer(other, folder)
    with pytest.raises(UserError, match="do not belong together"):
        load_run(folder)


def test_a_run_from_before_there_were_fingerprints_still_opens(run, tmp_path):
    folder, entries = copy(run, tmp_path), read_json(run / "config.json")
    del entries["tokenizer_fingerprint"]
    write_json(folder / "config.json", entries)
    load_run(folder, "cpu")


def test_loading_never_unpickles(run, tmp_path):
    folder = copy(run, tmp_path)
    torch.save({"payload": print}, folder / "model.safetensors")
    with pytest.raises(UserError):
        load_run(folder)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [False, True])
def test_the_trunk_compiles_without_a_graph_break_and_runs_without_memory(causal, documents):
    model, row = build(qk_norm=True), ids(2, 16)
    who = Visibility(causal, documents=torch.arange(16)[None].expand(2, -1) // 8 if documents else None)
    arguments = row, who.positions(row), who.table(row), causal, None
    assert torch._dynamo.explain(model.model)(*arguments).graph_break_count == 0
    with torch.device("meta"):
        shape = Backbone(model.cfg)
    cache, meta = KVCache(model.cfg, 2, 16, "meta"), row.to("meta")
    out = shape(meta, Visibility(causal, torch.ones(2, 16, device="meta")), cache=cache, at=torch.tensor([3], device="meta"))
    assert out.shape == (1, 61) and out.device.type == "meta"
    shape(meta, causal).sum().backward()


@pytest.mark.parametrize("case", ["everywhere", "causal", "table", "grouped", "grouped table", "one query"])
def test_products_equal_the_kernel(case):
    g = torch.Generator().manual_seed(0)
    heads, queries = (2 if "grouped" in case else 4), (1 if case == "one query" else 48)
    q, k, v = (torch.randn(2, h, n, 16, generator=g).bfloat16().requires_grad_()
               for h, n in ((4, queries), (heads, 48), (heads, 48)))
    table = torch.rand(2, 1, 48, 48, generator=g) < 0.5 if "table" in case else None
    table = None if table is None else table | torch.eye(48, dtype=torch.bool)
    grouped, causal = "grouped" in case, case == "causal"
    answers = (attend(q, k, v, table, causal),
               F.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), table, is_causal=causal, enable_gqa=grouped))
    gradients = [torch.autograd.grad(answer.float().square().sum(), (q, k, v)) for answer in answers]
    # scores below 8 rounded to 8 bits: 2**-6, which moves a probability by as large a share, and the sums with it
    for ours, exact in zip((answers[0], *gradients[0]), (answers[1], *gradients[1])):
        assert (ours.float() - exact.float()).norm() < 2**-5 * exact.float().norm()
    assert answers[0].dtype == torch.bfloat16


def test_groups_with_a_table_are_spread_for_the_kernel(monkeypatch):
    "code.md 17: groups and a table together may fall to the slow kernel; cuDNN's gives NaN gradients with tables."
    calls = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **more: calls.append((k.shape[1], more)) or real(q, k, v, **more))
    model, documents = build(num_key_value_heads=2), torch.zeros(1, 8, dtype=torch.long)
    model(ids(1, 8), Visibility(documents=documents))
    model(ids(1, 8), False)
    assert [(heads, more["enable_gqa"]) for heads, more in calls] == [(4, False)] * 3 + [(2, True)] * 3
    assert not torch.backends.cuda.cudnn_sdp_enabled()


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
