"The tokenizer: what a text becomes, where the mask sits, and every error a user can reach."

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanollada import tokenizer as module
from nanollada.core import UserError
from nanollada.tokenizer import (
    SPECIAL_TOKENS,
    encode,
    encode_batch,
    hub_is_reachable,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

SHARED = Path(os.environ.get("NANOLLADA_SHARED", Path(__file__).parents[2] / "shared"))
MINIMIND = SHARED / "tokenizers" / "minimind"
TEXTS = [
    "the cat sat on the mat",
    "the dog sat on the cat",
    "猫坐在垫子上",
    "狗坐在垫子上，猫也坐在垫子上",
] * 3
ODD = [
    "",
    " ",
    "plain English.",
    "床前明月光，疑是地上霜。",
    "𠮷野家",
    "😀👩‍👩‍👧🇨🇳",
    "\x00\x01\x07\x1b[0m\x7f",
    "tabs\tand\r\nlines\n\n",
    "  two  spaces , before punctuation !",
    "é e\u0301 ﬁ \u200b\u202e\ufeff",
    "".join(map(chr, range(0x20, 0x300))),
]
needs_minimind = pytest.mark.skipif(
    not MINIMIND.is_dir(), reason=f"{MINIMIND} is not there (set NANOLLADA_SHARED)"
)


@pytest.fixture(scope="module")
def ours() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def save_raw(folder: Path, vocab: dict[str, int], special: tuple[str, ...] = (), **settings: object) -> Path:
    "A folder with a tokenizer.json that `transformers` did not write."
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens(list(special))
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    return folder


# Training


def test_special_ids_are_fixed_and_counted(ours):
    assert [ours.pad_token_id, ours.bos_token_id, ours.eos_token_id, ours.mask_token_id] == [0, 1, 2, 3]
    assert len(ours) == 300 and sorted(ours.get_vocab().values()) == list(range(300))


@pytest.mark.parametrize("text", ODD + ["<|mask|>", "a<|im_end|>b<|endoftext|>"])
def test_round_trip(ours, text):
    assert ours.decode(encode(ours, text)) == text


def test_training_is_deterministic_and_takes_an_iterator(ours):
    assert tokenizer_fingerprint(train_tokenizer(iter(TEXTS), 300)) == tokenizer_fingerprint(ours)


def test_smallest_vocabulary_is_bytes():
    small = train_tokenizer(["anything"], 260)
    assert len(small) == 260 and all(len(encode(small, text)) == len(text.encode()) for text in ODD)


def test_vocabulary_stops_when_pairs_run_out():
    assert 260 < len(train_tokenizer(["ab ab"], 1000)) < 270


@pytest.mark.parametrize(
    "texts, size, words",
    [
        ([], 300, "empty"),
        (iter(()), 300, "empty"),
        ([1], 300, "int"),
        ("abc", 300, "one string"),
        (["a"], 259, "259"),
        (["a"], 0, "260"),
    ],
)
def test_training_errors(texts, size, words):
    with pytest.raises(UserError, match=words):
        train_tokenizer(texts, size)


# Saving and opening


def test_saved_copy_is_equal(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')  # as in a run folder
    copy = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(ours)
    assert copy.special_tokens_map == ours.special_tokens_map and copy.chat_template == ours.chat_template
    assert encode_batch(copy, ODD) == encode_batch(ours, ODD)
    assert copy.decode(encode(copy, "a , b")) == "a , b"


def test_fingerprint_ignores_padding_state_but_not_the_mask(ours, tmp_path):
    before = tokenizer_fingerprint(ours)
    ours(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(ours) == before
    save_raw(tmp_path, {"a": 0, "b": 1})
    assert tokenizer_fingerprint(load_tokenizer(tmp_path, "<x>")) != tokenizer_fingerprint(
        load_tokenizer(tmp_path, "<y>")
    )


def test_bare_tokenizer_is_completed_and_mask_is_last(tmp_path):
    tokenizer = load_tokenizer(save_raw(tmp_path, {"a": 0, "b": 1}))
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id, len(tokenizer)) == (2, 3, 4)
    assert tokenizer.bos_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id


def test_existing_ends_are_found_by_spelling(tmp_path):
    folder = save_raw(tmp_path, {"a": 0}, ("<s>", "</s>"), pad_token="<s>")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.mask_token_id) == (
        "<s>",
        "</s>",
        "<s>",
        3,
    )


def test_undeclared_mask_is_adopted(tmp_path):
    tokenizer = load_tokenizer(save_raw(tmp_path, {"a": 0}, ("<|endoftext|>", "<|mdm_mask|>")))
    assert tokenizer.mask_token == "<|mdm_mask|>" and tokenizer.mask_token_id == 2 and len(tokenizer) == 3


def test_declared_mask_is_kept(tmp_path):
    tokenizer = load_tokenizer(
        save_raw(tmp_path, {"a": 0}, ("[M]", "</s>"), mask_token="[M]"), mask_token="<|other|>"
    )
    assert tokenizer.mask_token == "[M]" and "<|other|>" not in tokenizer.get_vocab()


def test_mask_must_not_be_a_word_or_an_end(tmp_path):
    with pytest.raises(UserError, match="ordinary word"):
        load_tokenizer(save_raw(tmp_path, {"a": 0, "b": 1}), mask_token="a")
    with pytest.raises(UserError, match="also pad, bos or eos"):
        load_tokenizer(save_raw(tmp_path, {"a": 0}, ("</s>",), mask_token="</s>", eos_token="</s>"))


@pytest.mark.parametrize(
    "vocab, special, name", [({"a": 0, "b": 4, "c": 5}, ("</s>",), "mask"), ({"a": 0, "b": 2}, (), "eos")]
)
def test_a_vocabulary_with_holes_is_refused(tmp_path, vocab, special, name):
    with pytest.raises(UserError, match=f"new {name}_token got id .* already in use"):
        load_tokenizer(save_raw(tmp_path, vocab, special))


@needs_minimind
def test_minimind_gets_row_6400():
    tokenizer = load_tokenizer(MINIMIND)
    assert (tokenizer.mask_token_id, len(tokenizer)) == (6400, 6401)
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    for text in ODD:
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert max(encode(tokenizer, "a<|mask|>b<|im_end|>")) < 6400


# Text that spells a special token


@pytest.mark.parametrize("special", SPECIAL_TOKENS.values())
def test_text_never_yields_special_ids(ours, special):
    text = f"x{special}y {special}{special}"
    assert not set(encode(ours, text)) & set(ours.all_special_ids)
    assert encode(ours, special, allow_special=True) == [ours.convert_tokens_to_ids(special)]
    assert encode_batch(ours, [text, text]) == [encode(ours, text)] * 2, "the switch must not stick"


def test_encode_batch_ignores_state_left_by_other_calls(ours):
    expected = encode_batch(ours, ["a", "the cat sat"])
    ours(["a", "the cat sat"], padding=True, truncation=True, max_length=2)
    assert encode_batch(ours, ["a", "the cat sat"]) == expected and encode_batch(ours, []) == []


@pytest.mark.parametrize(
    "text, words", [(None, "NoneType"), (["a"], "list"), ("half \ud83d emoji", "surrogate")]
)
def test_encode_errors(ours, text, words):
    with pytest.raises(UserError, match=words):
        encode(ours, text)


def test_chat_template(ours):
    talk = [{"role": "user", "content": "hi"}]
    expected = "<|im_start|>user\nhi<|im_end|>\n"
    assert ours.apply_chat_template(talk, tokenize=False) == expected
    assert (
        ours.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        == expected + "<|im_start|>assistant\n"
    )


# Folders that are no tokenizers


def test_missing_folder_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "file")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_not_json(tmp_path, name):
    save_raw(tmp_path, {"a": 0})
    (tmp_path / name).write_text("{oops")
    with pytest.raises(UserError, match=f"{name}: not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[1, 2]", '{"model": {"type": "Nonsense"}}'])
def test_json_but_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_hub_offline_is_one_quick_line(monkeypatch):
    monkeypatch.setattr(module, "hub_is_reachable", lambda: False)
    with pytest.raises(UserError, match="hub does not answer") as caught:
        load_tokenizer("somebody/some-model-that-is-not-cached")
    assert "\n" not in str(caught.value)


def test_hub_reachability_respects_offline_switch(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_is_reachable() is False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "getproxies", dict)
    monkeypatch.setattr(
        module.socket, "create_connection", lambda *a, **k: (_ for _ in ()).throw(OSError("no route"))
    )
    assert hub_is_reachable() is False


def test_hub_folder_is_opened(monkeypatch, tmp_path):
    save_raw(tmp_path, {"a": 0})
    monkeypatch.setattr(module, "fetch_from_hub", lambda repo, files: tmp_path)
    assert load_tokenizer("somebody/model").mask_token_id == 2
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer.json"):
        load_tokenizer("somebody/model")
