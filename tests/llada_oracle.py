"LLaDA's published layout and arithmetic, written down from its public modelling code: float64, one head and one position at a time in mind."

import json

import torch
from safetensors.torch import save_file

from nanollada.tokenizer import SPECIAL_TOKENS, save_tokenizer, train_tokenizer

CONFIG = {  # what the config.json of LLaDA-8B says, with a small shape
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False, "block_group_size": 1,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "block_type": "llama", "d_model": 32, "embedding_dropout": 0.0, "embedding_size": 384, "eos_token_id": 1, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
    "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 3, "max_sequence_length": 64,
    "mlp_hidden_size": 48, "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3,
    "pad_token_id": 1, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True,
    "rope_theta": 500000.0, "scale_logits": False, "use_cache": False, "vocab_size": 384, "weight_tying": False,
}
TEMPLATE = (  # as LLaDA-8B-Instruct's
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def llada_tokenizer():
    "A small tokenizer with LLaDA's special tokens: the mask is only one of the additional ones, as in the published file."
    words = train_tokenizer(["user assistant: a small text to learn a few merges from, a small text"] * 4, 300)
    raw = json.loads(words.backend_tokenizer.to_str())
    spell = dict(zip(SPECIAL_TOKENS.values(), ("<|startoftext|>", "<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>")))
    raw["model"]["vocab"] = {spell.get(text, text): number for text, number in raw["model"]["vocab"].items()}
    for token in raw["added_tokens"]:
        token["content"] = spell[token["content"]]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), chat_template=TEMPLATE, **TOKENS)
    words.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>"]})
    return words


def llada_weights(config, seed=0):
    "Random tensors under the published names; float32."
    g, D, size = torch.Generator().manual_seed(seed), config["d_model"], config["embedding_size"] or config["vocab_size"]
    narrow, F = D // config["n_heads"] * (config["n_kv_heads"] or config["n_heads"]), config["mlp_hidden_size"]
    shapes = {"wte": (size, D), "ln_f": (D,)} | ({} if config["weight_tying"] else {"ff_out": (size, D)})
    for n in range(config["n_layers"]):
        block = {"attn_norm": (D,), "q_proj": (D, D), "k_proj": (narrow, D), "v_proj": (narrow, D), "attn_out": (D, D),
                 "ff_norm": (D,), "ff_proj": (F, D), "up_proj": (F, D), "ff_out": (D, F)}
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    scale = lambda shape: 1.0 if len(shape) == 1 else 1.5 / shape[-1] ** 0.5
    return {f"model.transformer.{name}.weight": (len(shape) == 1) + scale(shape) * torch.randn(shape, generator=g) * (0.3 if len(shape) == 1 else 1)
            for name, shape in shapes.items()}


def write_llada(folder, shards=1, dtype=torch.float32, tokenizer=None, **changes):
    "A folder as LLaDA is published; its config and weights."
    config = CONFIG | changes
    weights = {name: value.to(dtype) for name, value in llada_weights(config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer or llada_tokenizer(), folder)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return config, weights
    names, files = sorted(weights), [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    index = {name: files[n % shards] for n, name in enumerate(names)}
    for file in files:
        save_file({name: weights[name] for name in names if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return config, weights


def llada_logits(config, weights, ids, real=None):
    "Logits (B, L, V), float64: pairs (i, i + half) of a head are complex numbers, turned by position; everybody sees all that is real."
    w = {name.removeprefix("model.transformer.").removesuffix(".weight"): value.double() for name, value in weights.items()}
    H, groups = config["n_heads"], config["n_kv_heads"] or config["n_heads"]
    half = config["d_model"] // H // 2
    speeds = config["rope_theta"] ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones(ids.shape[1], half).double(), torch.arange(ids.shape[1]).double()[:, None] * speeds)

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()

    def turned(x):
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    hidden = real is not None and torch.where(real.bool(), 0.0, -torch.inf)[:, None].double()
    x = w["wte"][ids]
    for n in range(config["n_layers"]):
        block = {name.removeprefix(f"blocks.{n}."): value for name, value in w.items() if name.startswith(f"blocks.{n}.")}
        y, heads = norm(x, block["attn_norm"]), []
        for h in range(H):
            rows = lambda name, k: y @ block[name][2 * half * k : 2 * half * (k + 1)].T
            k = h * groups // H
            scores = turned(rows("q_proj", h)) @ turned(rows("k_proj", k)).mT / (2 * half) ** 0.5 + hidden
            heads.append(scores.softmax(-1) @ rows("v_proj", k))
        x = x + torch.cat(heads, -1) @ block["attn_out"].T
        y = norm(x, block["ff_norm"])
        gate = y @ block["ff_proj"].T
        x = x + (gate * gate.sigmoid() * (y @ block["up_proj"].T)) @ block["ff_out"].T
    return norm(x, w["ln_f"]) @ (w["wte"] if config["weight_tying"] else w["ff_out"]).T
