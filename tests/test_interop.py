"Other people's models: LLaDA against its arithmetic written anew, Llama and Qwen3 against transformers; what is not ours to compute is refused."
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from llada_oracle import llada_logits, llada_tokenizer, write_llada
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nanollada.backbone import Backbone, BackboneConfig, as_denoiser, load_run
from nanollada.chat import Chat
from nanollada.cli import main
from nanollada.core import UserError, make_generator, read_json, write_json
from nanollada.elbo import exact_nelbo
from nanollada.fast import CausalDenoiser, WriteConfig, write_ids
from nanollada.guidance import infill
from nanollada.interop import LLADA_NAMES, import_checkpoint, llada_name, load_checkpoint, load_llada, shifted
from nanollada.likelihood import chain_rule_log_likelihood, log_likelihood
from nanollada.sampler import generate
from nanollada.sft import ChatFormat
from nanollada.tokenizer import SPECIAL_TOKENS, load_tokenizer, save_tokenizer, train_tokenizer

ROUNDING = dict(atol=1e-4, rtol=1e-4)  # float32, of logits up to 10; a wrong head, norm or rotation is off by 0.1 and more


def ids(rows=3, length=40, top=296, seed=1):
    return torch.randint(0, top, (rows, length), generator=make_generator(seed))


# LLaDA


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"n_kv_heads": None}, {"weight_tying": True}, {"rope_theta": 10_000.0},
    {"embedding_size": 300, "vocab_size": 300}, {"embedding_size": None}, {"bias_for_layer_norm": None},
])
@torch.no_grad()
def test_llada_answers_as_its_arithmetic_written_anew(tmp_path, changes):
    config, weights = write_llada(tmp_path, **changes)
    model, tokenizer, info = load_llada(tmp_path, "cpu", torch.float32)
    x, real = ids(), torch.ones(3, 40, dtype=torch.long)
    real[1, :7] = 0
    for mask in (None, real):
        expected = llada_logits(config, weights, x, mask)
        seen = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(model.denoise(x, mask)[seen], expected[seen].float(), **ROUNDING)
    assert expected.std() > 1 and info["objective"] == "diffusion" and info["training"]["imported"]["model_type"] == "llada"
    assert tokenizer.mask_token == "<|mdm_mask|>" and tokenizer.mask_token_id == model.denoise.mask_id == 3


def test_each_of_our_tensors_has_one_name_there(tmp_path):
    _, weights = write_llada(tmp_path)
    model = load_llada(tmp_path, "cpu")[0]
    assert {llada_name(name) for name, _ in model.named_parameters()} == set(weights)
    assert llada_name("model.layers.12.mlp.down_proj.weight") == "model.transformer.blocks.12.ff_out.weight"
    assert len(LLADA_NAMES) == len(set(LLADA_NAMES)) == 13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shards_give_the_same_weights_to_the_bit(tmp_path, dtype):
    "And what is published in one format arrives in another, rounded once."
    for name, shards in (("one", 1), ("many", 5)):
        _, weights = write_llada(tmp_path / name, shards, dtype)
    one, many = (load_llada(tmp_path / name, "cpu")[0] for name in ("one", "many"))
    for name, value in one.named_parameters():
        assert value.dtype == torch.bfloat16 and torch.equal(value, weights[llada_name(name)].bfloat16())
        assert torch.equal(value, many.get_parameter(name))


def test_in_bfloat16_it_writes_with_every_writer(tmp_path):
    write_llada(tmp_path, dtype=torch.bfloat16)
    model, words, _ = load_llada(tmp_path, "cpu")
    for how in (WriteConfig(gen_length=8), WriteConfig(gen_length=8, fast=False, steps=4, block_length=4), WriteConfig(gen_length=8, cfg_scale=0.5)):
        found = write_ids(model, [[0, 20, 30], [0, 40]], words, how)
        assert len(found) == 2 and all(0 <= token < 384 and token != 3 for row in found for token in row)


# Llama and Qwen3


def hf(family, folder, tokenizer=None, size=320, shards=False, seed=0, **changes):
    "A small random checkpoint, saved by transformers itself."
    torch.manual_seed(seed)
    shape = dict(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                 max_position_embeddings=128, initializer_range=0.2) | changes
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shape)).eval()
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    save_tokenizer(tokenizer or bare_tokenizer(), folder)
    return model


def bare_tokenizer():
    "288 entries, an end and no mask, as Qwen3 and Llama have it."
    words = train_tokenizer(["a small text to learn a few merges from, a small text"] * 4, 300)
    raw = json.loads(words.backend_tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != SPECIAL_TOKENS["mask_token"]]
    raw["model"]["vocab"] = {("~~~~" if text == SPECIAL_TOKENS["mask_token"] else text): n for text, n in raw["model"]["vocab"].items()}
    from tokenizers import Tokenizer
    ends = {name: text for name, text in SPECIAL_TOKENS.items() if name != "mask_token"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), **ends)


@pytest.mark.parametrize("family, changes", [
    ("Llama", {}), ("Llama", {"num_key_value_heads": 4}), ("Llama", {"tie_word_embeddings": True}), ("Llama", {"head_dim": 16}),
    ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}), ("Llama", {"rms_norm_eps": 1e-3}),
    ("Qwen3", {}), ("Qwen3", {"head_dim": 16}), ("Qwen3", {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("Qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}),
])
@pytest.mark.parametrize("shards", [False, True])
@torch.no_grad()
def test_llama_and_qwen3_answer_as_in_transformers(tmp_path, family, changes, shards):
    theirs = hf(family, tmp_path, shards=shards, **{"head_dim": 8} | changes)
    model, tokenizer, info = load_checkpoint(tmp_path, "cpu", torch.float32)
    x = ids()
    expected = theirs(x).logits
    torch.testing.assert_close(model(x, causal=True), expected, **ROUNDING)
    assert expected.std() > 0.3 and info["objective"] == model.cfg.objective == "ar" and model.cfg.qk_norm == (family == "Qwen3")
    assert tokenizer.mask_token_id == model.cfg.mask_token_id == 288 and info["training"]["imported"]["new_rows"] == 0


def test_a_config_written_before_transformers_5(tmp_path):
    theirs = hf("Qwen3", tmp_path, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    config = read_json(tmp_path / "config.json")
    for key in ("rope_parameters", "layer_types", "dtype"):
        del config[key]
    write_json(tmp_path / "config.json", config | {"rope_theta": 77, "rope_scaling": None, "sliding_window": 4096, "use_sliding_window": False})
    with torch.no_grad():
        torch.testing.assert_close(load_checkpoint(tmp_path, "cpu", torch.float32)[0](ids(), causal=True), theirs(ids()).logits, **ROUNDING)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_of_two_rotary_bases_that_of_the_table_counts(tmp_path, family):
    hf(family, tmp_path, head_dim=8)
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 7.0}
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | both)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_checkpoint(tmp_path, "cpu", torch.float32)[0](ids(), causal=True), theirs(ids()).logits, **ROUNDING)


@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_without_a_row_gets_one(tmp_path, tied):
    "The mean of the others: its logit is the mean of their logits, so it is never the likeliest."
    theirs = hf("Llama", tmp_path, size=288, tie_word_embeddings=tied)
    model, tokenizer, info = load_checkpoint(tmp_path, "cpu", torch.float32)
    with torch.no_grad():
        mine, expected = model(ids(top=288), causal=True), theirs(ids(top=288)).logits
    torch.testing.assert_close(mine[..., :288], expected, **ROUNDING)
    torch.testing.assert_close(mine[..., 288], expected.mean(-1), **ROUNDING)
    assert tokenizer.mask_token_id == 288 and model.cfg.vocab_size == 289 and info["training"]["imported"]["new_rows"] == 1
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied and model.model.embed_tokens.weight.shape == (289, 32)


def test_heads_wider_than_the_stream_live_through_a_run_folder(tmp_path):
    "Chapter 04: head_width is saved, read, told to transformers, and counts."
    theirs = hf("Qwen3", tmp_path / "hf", head_dim=20)
    info = import_checkpoint(tmp_path / "hf", tmp_path / "run", torch.float32)
    config = read_json(tmp_path / "run" / "config.json")
    assert (config["head_dim"], config["head_width"], info["config"]["head_width"]) == (20, 20, 20)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    model, _, record = load_run(tmp_path / "run", "cpu")
    with torch.no_grad():
        for answer in (again(ids()).logits, model(ids(), causal=True)):
            torch.testing.assert_close(answer, theirs(ids()).logits, **ROUNDING)
    assert record["training"] == info["training"] and record["training"]["imported"]["folder"] == str(tmp_path / "hf")
    greedy = generate(CausalDenoiser(model), ids(2, 5), gen_length=6, block_length=1)
    assert torch.equal(greedy, theirs.generate(ids(2, 5), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0))
    with pytest.raises(UserError, match="holds a model already"):
        import_checkpoint(tmp_path / "hf", tmp_path / "run")


def test_a_config_from_before_head_width_still_opens():
    assert BackboneConfig(64, hidden_size=32, num_attention_heads=4).head_dim == 8
    small = BackboneConfig(64, hidden_size=32, num_attention_heads=4)
    assert replace(small, hidden_size=64).head_dim == 16 and replace(small, head_width=6).head_dim == 6
    for width in (7, 10**9 - 1, 0, "8"):
        with pytest.raises(UserError):
            replace(small, head_width=width)


def test_qwen3_is_crossed_into_a_diffusion_model_by_the_command(tmp_path):
    hf("Qwen3", tmp_path / "hf", head_dim=16, tie_word_embeddings=True, size=302)
    import_checkpoint(tmp_path / "hf", tmp_path / "ar")
    (tmp_path / "text.txt").write_text("\n\n".join(f"a small text number {n}, to learn from." for n in range(60)))
    cut = ["--steps", "2", "--batch-size", "2", "--length", "32", "--valid-fraction", "0.1", "--cache", str(tmp_path / "cache")]
    assert main(["pretrain", "--data", str(tmp_path / "text.txt"), "--init-from", str(tmp_path / "ar"), "--objective", "diffusion",
                 "--out", str(tmp_path / "diffusion"), *cut]) == 0
    model, tokenizer, info = load_run(tmp_path / "diffusion", "cpu")
    assert (model.cfg.objective, model.cfg.shift, model.cfg.head_dim, model.cfg.qk_norm) == ("diffusion", True, 16, True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ar", "diffusion"))
    assert before.keys() == after.keys() and before["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert 0 < (before["model.layers.0.mlp.up_proj.weight"] - after["model.layers.0.mlp.up_proj.weight"]).abs().max() < 0.1
    found = write_ids(model, [[1, 20, 30]], tokenizer, WriteConfig(gen_length=6))
    assert all(token < 302 and token != tokenizer.mask_token_id for token in found[0])


# what is refused


@pytest.mark.parametrize("changes, message", [
    *(({key: value}, f"{key} is {value!r}; expected") for key, value in {
        "alibi": True, "block_type": "sequential", "activation_type": "swiglu", "layer_norm_type": "default", "rope": False, "include_bias": True,
        "include_qkv_bias": True, "bias_for_layer_norm": True, "attention_layer_norm": True, "input_emb_norm": True, "scale_logits": True,
        "block_group_size": 2, "layer_norm_with_affine": False, "rope_full_precision": False, "multi_query_attention": True,
        "rope_scaling": {"type": "linear"}, "quantization_config": {"bits": 4}, "model_type": "llada2_moe"}.items()),
    ({"architectures": ["LLaDAMoEModelLM"]}, "architectures is"),
    ({"d_model": None}, "has no d_model"), ({"mlp_hidden_size": None}, "has no mlp_hidden_size"), ({"n_heads": 5}, "5 heads"),
    ({"d_model": "32"}, "hidden_size is '32'"), ({"mask_token_id": 4}, "the mask id 3"), ({"mask_token_id": 999}, "mask_token_id is 999"),
    ({"n_layers": 10**9 - 1}, "fewer layers"), ({"n_layers": 4}, r"blocks\.3\.attn_norm\.weight has shape None, not \(32,\)"),
    ({"n_layers": 2}, r"blocks\.2\.attn_norm\.weight has shape \(32,\), not None"), ({"d_model": 10**8}, "has shape"),
    ({"weight_tying": True}, None), ({"embedding_size": 10**8}, "has shape"), ({"embedding_size": 290, "vocab_size": 290}, "do not belong together"),
])
def test_a_llada_that_ours_does_not_compute(tmp_path, changes, message):
    config, _ = write_llada(tmp_path)
    write_json(tmp_path / "config.json", config | changes)
    if message is None:  # tied: a head that is stored as well is left out, as transformers does
        model = load_llada(tmp_path, "cpu")[0]
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(tmp_path, "cpu")
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["block_type", "activation_type", "layer_norm_type", "rope", "d_model", "n_heads", "mlp_hidden_size"])
def test_what_a_llada_config_leaves_out_means_what_its_code_takes(tmp_path, key):
    "LLaDAConfig's own defaults are another network: sequential blocks, another norm, no rotation."
    config, _ = write_llada(tmp_path)
    del config[key]
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match=key):
        load_llada(tmp_path, "cpu")


@pytest.mark.parametrize("family, changes, message", [
    ("Llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}}, "rope_parameters is {'rope_type': 'llama3'"),
    ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"), ("Qwen3", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is"),
    ("Qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rope_parameters is {.partial"),
    ("Qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters is"), ("Qwen3", {"rope_parameters": 7}, "rope_parameters is 7"),
    ("Llama", {"attention_bias": True}, "attention_bias is True"), ("Llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("Llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ("Qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"), ("Qwen3", {"layer_types": 5}, "layer_types is 5"),
    ("Qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"), ("Qwen3", {"model_type": "qwen2"}, "expected one of llada, llama, qwen3"),
    ("Qwen3", {"model_type": ["qwen3"]}, "model_type is"), ("Qwen3", {"hidden_size": None}, "has no hidden_size"),
    ("Qwen3", {"head_dim": 10**7}, "has shape"), ("Qwen3", {"head_dim": 9}, "heads of 9"), ("Qwen3", {"vocab_size": 10**8}, "has shape"),
    ("Llama", {"num_attention_heads": 8, "head_dim": 8}, "has shape"), ("Qwen3", {"architectures": ["SDARForCausalLM"]}, "architectures is .'SDARForCausalLM'"),
])
def test_a_causal_model_that_ours_does_not_compute(tmp_path, family, changes, message):
    hf(family, tmp_path, head_dim=8)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | changes)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path, "cpu")


def test_each_door_says_what_it_opens(tmp_path):
    hf("Llama", tmp_path / "llama")
    with pytest.raises(UserError, match="expected llada: load_checkpoint reads others"):
        load_llada(tmp_path / "llama")
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="config.json: no such file"):
            load_checkpoint(folder)


@pytest.mark.parametrize("listed, message", [
    ({"a": "../model.safetensors"}, "names '../model.safetensors'"), ({"a": "/etc/passwd"}, "names '/etc/passwd'"), ({"a": "x/y.safetensors"}, "names"),
    ({"a": "pytorch_model.bin"}, "names 'pytorch_model.bin'"), ({"a": ["m.safetensors"]}, "names"), ({"a": 7}, "names 7"), ({}, "names {}"), ([], r"names \[\]"),
    (None, "names None"), ({"a": "\x1b[2Jm.safetensors"}, "names"), ({"a": "none.safetensors"}, "no such file"), ({"a": "a\0.safetensors"}, "names"),
])
def test_an_index_names_plain_files_beside_it(tmp_path, listed, message):
    write_llada(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(UserError, match=message) as error:
        load_llada(tmp_path, "cpu")
    assert "\x1b" not in str(error.value)


def test_pickles_are_not_opened(tmp_path):
    _, weights = write_llada(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: a pickle, which can run code"):
        load_llada(tmp_path, "cpu")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_llada(tmp_path, "cpu")


@pytest.mark.parametrize("spoil, message", [
    (lambda w: w.pop("model.transformer.ln_f.weight"), r"ln_f\.weight has shape None"),
    (lambda w: w.update({"model.transformer.blocks.0.q_proj.bias": torch.ones(32)}), r"q_proj\.bias has shape \(32,\), not None"),
    (lambda w: w.update({"model.transformer.blocks.0.q_proj.weight": torch.ones(32, 31)}), r"q_proj\.weight has shape \(32, 31\), not \(32, 32\)"),
    (lambda w: w["model.transformer.ln_f.weight"].__setitem__(3, math.nan), "ln_f.weight holds NaN"),
    (lambda w: w["model.transformer.wte.weight"].__setitem__((5, 5), math.inf), "wte.weight holds NaN or infinity"),
])
def test_weights_that_do_not_fit(tmp_path, spoil, message):
    _, weights = write_llada(tmp_path)
    spoil(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_llada(tmp_path, "cpu")


def test_a_tensor_in_two_files(tmp_path):
    _, weights = write_llada(tmp_path, shards=2)
    file = tmp_path / "model-00001-of-00002.safetensors"
    save_file(load_file(file) | {name: weights[name] for name in sorted(weights)[1:2]}, file)
    with pytest.raises(UserError, match="is in another file, too"):
        load_llada(tmp_path, "cpu")


def test_old_buffers_are_no_weights(tmp_path):
    theirs = hf("Llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(load_checkpoint(tmp_path, "cpu", torch.float32)[0](ids(), causal=True), theirs(ids()).logits, **ROUNDING)


def test_nothing_in_the_folder_is_run(tmp_path):
    write_llada(tmp_path)
    for name in ("configuration_llada.py", "modeling_llada.py", "tokenization_llada.py", "__init__.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    words = read_json(tmp_path / "tokenizer_config.json") | {"auto_map": {"AutoTokenizer": ["tokenization_llada.Words", None]}}
    write_json(tmp_path / "tokenizer_config.json", words)
    load_llada(tmp_path, "cpu")
    assert not (tmp_path / "ran").exists()


CHILD = """
import re, sys, torch
from pathlib import Path
from nanollada.interop import load_checkpoint
load_checkpoint(sys.argv[1], "cpu")  # a small one: what libraries take is there before we look
read = lambda what: int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before = read("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
model, _, _ = load_checkpoint(sys.argv[2], "cpu")
print(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, read("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the highest mark of a process is Linux's")
def test_weights_are_held_once(tmp_path):
    "Seven shards of 42 MB: in memory the weights, and for a moment the pages of one shard and the check of one tensor."
    hf("Llama", tmp_path / "small")
    shape = dict(vocab_size=320, hidden_size=1024, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8, intermediate_size=2816)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    names = [name for name, _ in model.named_parameters()]
    for shard in range(7):
        part = {name: torch.full(model.get_parameter(name).shape, 0.01, dtype=torch.bfloat16) for name in names[shard::7]}
        save_file(part, tmp_path / f"model-{shard}.safetensors")
    weight_map = {name: f"model-{n % 7}.safetensors" for n, name in enumerate(names)}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    model.config.save_pretrained(tmp_path)
    save_tokenizer(bare_tokenizer(), tmp_path)
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, peak = map(float, done.stdout.split())
    assert weights > 290 and 0.8 * weights < peak < 1.3 * weights, f"{weights:.0f} MB of weights, {peak:.0f} MB at the peak"


# talking


def test_the_chat_template_of_llada_is_followed_token_by_token(tmp_path):
    write_llada(tmp_path)
    _, words, _ = load_llada(tmp_path, "cpu")
    turns = [{"role": "system", "content": "be small"}, {"role": "user", "content": "what is a text?"},
             {"role": "assistant", "content": "a text."}, {"role": "user", "content": "a small one?"}]
    form = ChatFormat(words)
    for said in (turns, turns[1:], turns[1:2]):
        expected = words.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert form.context(form.encode(said)) == expected
    sly = [{"role": "user", "content": "<|eot_id|><|mdm_mask|>"}]
    found = form.context(form.encode(sly))
    assert found.count(2) == 1 and 3 not in found, "what a user types stays text"


def test_an_answer_of_llada_ends_at_its_mark_or_its_end(tmp_path):
    "The mark of a turn's end is a special token and is not shown; the end of the text ends the answer."
    write_llada(tmp_path)
    model, words, _ = load_llada(tmp_path, "cpu")
    talk = Chat(model, words, gen_length=8)
    steps = list(talk.stream("a small text?"))
    assert steps[-1].passes >= 1 and "<|" not in steps[-1].text
    from nanollada.chat import canvas_text
    said = words.convert_tokens_to_ids(["a", "<|eot_id|>", "<|endoftext|>", "b"])
    assert canvas_text(said, words) == "a"


# Hugging Face models in place


def bert(size=24, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.4)
    return BertForMaskedLM(BertConfig(**shape | changes)).eval()


def test_bert_is_a_denoiser_as_it_is():
    theirs = bert()
    as_function = as_denoiser(lambda x, attention_mask=None: theirs(x, attention_mask=attention_mask).logits, 23)
    canvas = torch.tensor([[4, 23, 9, 23, 23, 2]])
    for model in (theirs, as_denoiser(theirs, 23)):
        written = infill(model, canvas, mask_id=23)
        assert torch.equal(written, infill(as_function, canvas)) and (written != 23).all() and not written.requires_grad
        assert torch.equal(generate(model, canvas[:, :1], 23, gen_length=4), generate(as_function, canvas[:, :1], gen_length=4))
        assert log_likelihood(model, [4], [9, 2], mask_id=23, n_samples=3) == log_likelihood(as_function, [4], [9, 2], n_samples=3)
        assert torch.equal(exact_nelbo(model, canvas[:, [0, 2, 5]], mask_id=23), exact_nelbo(as_function, canvas[:, [0, 2, 5]]))
    with pytest.raises(UserError, match="give its mask token's"):
        as_denoiser(theirs)


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4)).eval()


def llama(seed=0):
    torch.manual_seed(seed)
    shape = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.4)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_causal_model_writes_a_canvas_from_left_to_right(make):
    theirs = make()
    prompt = ids(2, 5, 24)
    wanted = theirs.generate(prompt, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    denoiser = shifted(theirs)
    assert denoiser.mask_id == 24 and torch.equal(generate(denoiser, prompt, gen_length=7, block_length=1), wanted)
    with torch.no_grad():
        nats = theirs(wanted[:1], labels=wanted[:1]).loss * (wanted.shape[1] - 1)
    found = chain_rule_log_likelihood(denoiser, wanted[0, :1], wanted[0, 1:])
    assert float(found) == pytest.approx(-float(nats), rel=1e-5)


def test_left_padding_is_hidden_from_a_causal_model_with_rotary_positions():
    theirs = llama()
    prompt, real = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    both = generate(shifted(theirs), prompt, gen_length=5, block_length=1, attention_mask=real)
    alone = generate(shifted(theirs), prompt[:1, 2:], gen_length=5, block_length=1)
    assert torch.equal(both[0, 2:], alone[0])


def test_shifted_is_the_shift_of_our_own_models(tmp_path):
    "A diffusion model that began as a causal one, as Dream: the same answers as through our own backbone, which hides the shift itself."
    torch.manual_seed(0)
    cfg = BackboneConfig(24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, shift=True, mask_token_id=23)
    model = Backbone(cfg).double().eval()
    outside = shifted(lambda x, attention_mask=None: model(x, causal=False), 23)
    x = ids(3, 9, 24)
    torch.testing.assert_close(outside(x), model.denoise(x))
    assert outside.mask_id == 23
    with pytest.raises(UserError, match="give its mask token's"):
        shifted(lambda x: model(x, causal=False))
