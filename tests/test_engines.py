"Runs for engines: the published layout, read back by transformers' own Qwen3 with a block mask; what does not fit is refused."
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from nanollada import toy
from nanollada.backbone import Backbone, preset, save_run
from nanollada.cli import main
from nanollada.core import UserError, make_generator
from nanollada.data import toy_tokenizer
from nanollada.fast import BlockDenoiser
from nanollada.engines import export_gguf_ready, export_llada, export_sdar
from nanollada.hub import export
from nanollada.sampler import finish, prompt_canvas, write
from nanollada.tokenizer import load_tokenizer, train_tokenizer


def run(folder, size=4, **cfg):
    words = toy_tokenizer()
    torch.manual_seed(0)
    shape = dict(objective="block", block_length=size, mask_token_id=words.mask_token_id, max_position_embeddings=96, initializer_range=0.1,
                 rope_theta=10_000.0) | cfg
    model = Backbone(preset("toy", len(words), **shape)).eval()
    save_run(model, words, folder)
    return model, words


def reader_of(folder):
    "An independent reader: it takes the config's keys as they stand and loads the tensors strictly."
    entries = json.loads((folder / "config.json").read_text())
    known = {key: value for key, value in entries.items() if key not in ("architectures", "model_type", "dtype", "block_size", "mask_token_id")}
    reader = Qwen3ForCausalLM(Qwen3Config(**known, attn_implementation="eager"))
    weights = load_file(folder / "model.safetensors")
    missing, unexpected = reader.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if entries["tie_word_embeddings"] else set())
    reader.tie_weights()
    return reader.eval(), entries, weights


def see(size, L):
    block = torch.arange(L) // size
    return torch.where(block[:, None] >= block, 0.0, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups, size", [(4, 4), (2, 8), (1, 1)])
def test_transformers_reads_the_same_logits(tmp_path, groups, size, tied):
    model, words = run(tmp_path / "run", size, num_key_value_heads=groups, tie_word_embeddings=tied)
    export_sdar(tmp_path / "run", tmp_path / "sdar")
    reader, entries, weights = reader_of(tmp_path / "sdar")
    ids = torch.randint(0, len(words), (3, 30), generator=make_generator(0))
    with torch.no_grad():
        theirs = reader(ids, attention_mask=see(size, 30).expand(3, -1, -1, -1), position_ids=torch.arange(30)[None]).logits
        ours = model(ids, BlockDenoiser(model, 0).who(ids, None))
    assert torch.allclose(theirs, ours, atol=2e-5) and ours.std() > 0.05
    assert entries["architectures"] == ["SDARForCausalLM"] and entries["model_type"] == "qwen3" and entries["block_size"] == size
    assert entries["mask_token_id"] == words.mask_token_id and entries["rope_theta"] == 10_000 and entries["vocab_size"] == len(words)
    layer = "model.layers.0."
    assert {layer + name + ".weight" for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                  "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj",
                                                  "mlp.down_proj")} <= set(weights)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(weights)


def test_a_loop_with_transformers_alone_writes_what_we_write(tmp_path):
    model, words = run(tmp_path / "run")
    export_sdar(tmp_path / "run", tmp_path / "sdar")
    reader, entries, _ = reader_of(tmp_path / "sdar")
    prompt = torch.randint(4, len(words), (1, 8), generator=make_generator(1))
    ids, mask = prompt[0].tolist(), entries["mask_token_id"]
    for _ in range(3):
        ids += [mask] * 4
        while mask in ids:
            with torch.no_grad():
                logits = reader(torch.tensor([ids]), attention_mask=see(4, len(ids)), position_ids=torch.arange(len(ids))[None]).logits[0]
            logits[:, mask] = -torch.inf
            p, v = logits.softmax(-1).max(-1)
            place = max((at for at, token in enumerate(ids) if token == mask), key=lambda at: p[at])
            ids[place] = int(v[place])
    ours = finish(write(BlockDenoiser(model), block_length=4, **prompt_canvas(prompt, mask, 12)))
    assert ours[0].tolist() == ids


def test_the_folder_opens_with_the_auto_classes_and_without_remote_code(tmp_path):
    _, words = run(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "sdar"), "--format", "sdar"]) == 0
    cfg, tokenizer = AutoConfig.from_pretrained(tmp_path / "sdar"), AutoTokenizer.from_pretrained(tmp_path / "sdar")
    assert type(cfg).__name__ == "Qwen3Config" and cfg.architectures == ["SDARForCausalLM"] and "auto_map" not in cfg.to_dict()
    text = toy.sample(1, 0, "en")[0]
    assert tokenizer(text)["input_ids"] == load_tokenizer(tmp_path / "run")(text)["input_ids"] and tokenizer.mask_token_id == words.mask_token_id


@pytest.mark.parametrize("change, said", [(dict(objective="diffusion", block_length=None), "objective is diffusion; expected block"),
                                          (dict(causal_clean=True), "causal_clean is True; expected read by blocks"), (dict(qk_norm=False), "qk_norm is False"),
                                          (dict(rope_theta=500_000.0), "rope_theta is 500000.0")])
def test_a_run_that_an_engine_would_misread_is_refused(tmp_path, capsys, change, said):
    run(tmp_path / "run", **({"size": 4} if "block_length" not in change else {}), **change)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "sdar"), "--format", "sdar"]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "sdar").exists()


def test_nothing_is_overwritten(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in ("run", "file", "project"):  # `--format hf` writes a README.md
        for layout in ("sdar", "hf"):
            with pytest.raises(UserError, match=f"{out} is there already"):
                export(tmp_path / "run", tmp_path / out, layout)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def plain_run(folder, words=None, **cfg):
    words = words or toy_tokenizer()
    torch.manual_seed(0)
    shape = dict(mask_token_id=words.mask_token_id, max_position_embeddings=96, initializer_range=0.1, qk_norm=False) | cfg
    model = Backbone(preset("toy", len(words), **shape)).eval()
    save_run(model, words, folder)
    return model, words


def llada_logits(folder, ids, real=None):
    "LLaDA's network, written from its paper and config, in float64: names and sizes come from the folder alone."
    c = json.loads((folder / "config.json").read_text())
    w = {name.removeprefix("model.transformer."): value.double() for name, value in load_file(folder / "model.safetensors").items()}
    H, G, size = c["n_heads"], c["n_kv_heads"], c["d_model"] // c["n_heads"]
    angle = torch.arange(ids.shape[1])[:, None] / c["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones_like(angle), angle)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).rsqrt() * w.pop(name)

    def rope(x):  # coordinate i is the real part, i + size / 2 the imaginary one
        z = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    x = w.pop("wte.weight")[ids]
    for n in range(c["n_layers"]):
        at = f"blocks.{n}."
        h = norm(x, at + "attn_norm.weight")
        q, k, v = (torch.stack((h @ w.pop(f"{at}{name}_proj.weight").T).split(size, -1), 1) for name in "qkv")
        score = rope(q) @ rope(k.repeat_interleave(H // G, 1)).mT / size**0.5
        score = score if real is None else score.masked_fill(real[:, None, None] == 0, -torch.inf)
        x = x + torch.cat((score.softmax(-1) @ v.repeat_interleave(H // G, 1)).unbind(1), -1) @ w.pop(at + "attn_out.weight").T
        h = norm(x, at + "ff_norm.weight")
        gate = h @ w.pop(at + "ff_proj.weight").T
        x = x + (gate * gate.sigmoid() * (h @ w.pop(at + "up_proj.weight").T)) @ w.pop(at + "ff_out.weight").T
    logits = norm(x, "ln_f.weight") @ w.pop("ff_out.weight").T
    assert not w, w.keys()
    return logits, c


@pytest.mark.parametrize("groups, tied, theta", [(4, False, 100.0), (2, True, 10_000.0), (1, False, 500_000.0)])
def test_lladas_network_reads_the_same_logits(tmp_path, groups, tied, theta):
    model, words = plain_run(tmp_path / "run", num_key_value_heads=groups, tie_word_embeddings=tied, rope_theta=theta)
    export_llada(tmp_path / "run", tmp_path / "llada")
    ids = torch.randint(0, len(words), (3, 30), generator=make_generator(0))
    real = torch.ones_like(ids)
    real[1, 20:] = 0
    with torch.no_grad():
        theirs, c = llada_logits(tmp_path / "llada", ids)
        assert torch.allclose(theirs, model.denoise(ids).double(), atol=5e-5) and theirs.std() > 0.05
        theirs, _ = llada_logits(tmp_path / "llada", ids, real)
        assert torch.allclose(theirs[real.bool()], model.denoise(ids, real).double()[real.bool()], atol=5e-5)
    assert (c["architectures"], c["model_type"], c["block_type"]) == (["LLaDAModelLM"], "llada", "llama")
    assert (c["embedding_size"], c["vocab_size"], c["mask_token_id"], c["weight_tying"]) == (len(words), len(words), words.mask_token_id, False)
    assert c["rope"] and not c["attention_layer_norm"] and not c["include_bias"] and "auto_map" not in c


@pytest.mark.parametrize("change, said", [(dict(qk_norm=True), "qk_norm is True; expected False, as LLaDA is"), (dict(shift=True), "shift is True; expected False"),
                                          (dict(objective="ar"), "objective is ar; expected diffusion"), (dict(head_width=16), "head_width is 16; expected None"),
                                          (dict(objective="block", block_length=4), "objective is block; expected diffusion")])
@pytest.mark.parametrize("write", [export_llada, export_gguf_ready])
def test_a_run_that_is_no_llada_is_refused(tmp_path, write, change, said):
    plain_run(tmp_path / "run", **change)
    with pytest.raises(UserError, match=said):
        write(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ready_for_gguf_is_llada_with_a_tokenizer_that_can_be_named(tmp_path):
    words = train_tokenizer(toy.sample(50, 0, "en"), 300)
    plain_run(tmp_path / "run", words)
    export_llada(tmp_path / "run", tmp_path / "llada")
    export_gguf_ready(tmp_path / "run", tmp_path / "gguf")
    names = {path.name for path in (tmp_path / "llada").iterdir()}
    assert names == {path.name for path in (tmp_path / "gguf").iterdir()}
    assert all((tmp_path / "llada" / name).read_bytes() == (tmp_path / "gguf" / name).read_bytes() for name in names)
    said = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, said["pre_tokenizer"]]}
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps(said))
    other = load_tokenizer(tmp_path / "run")
    plain_run(tmp_path / "digits", other)
    export_llada(tmp_path / "digits", tmp_path / "fine")
    with pytest.raises(UserError, match="the tokenizer is not GPT-2's kind"):
        export_gguf_ready(tmp_path / "digits", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
