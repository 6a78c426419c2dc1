"The tokenizer: what a text becomes, where the mask sits, and every error a user can reach."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanollada import tokenizer as module
from nanollada.core import UserError
from nanollada.tokenizer import (
    SPECIAL_TOKENS, encode, encode_batch, load_tokenizer, save_tokenizer, tokenizer_fingerprint, train_tokenizer,
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
        ([], 300, "at least one text"),
        (iter(()), 300, "at least one text"),
        ([1], 300, "at least one text"),
        (["a", None], 300, "at least one text"),
        (["a", "\ud800"], 300, "no half surrogate pair"),
        (["a"], 259, "259"),
        (["a"], 0, "260"),
        (["a"], 10**12, "to 1048576"),
        (["a"], 10**30, "to 1048576"),
    ],
)
def test_training_errors(texts, size, words):
    "attack.md: half a surrogate pair; a vocabulary of 10^12 (which aborted the process) or 10^30 (OverflowError)."
    with pytest.raises(UserError, match=words):
        train_tokenizer(texts, size)


def test_one_string_is_one_document(ours):
    assert tokenizer_fingerprint(train_tokenizer("ab ab", 300)) == tokenizer_fingerprint(train_tokenizer(["ab ab"], 300))


def test_an_error_of_the_documents_is_not_hidden():
    def broken():
        yield "abc"
        raise UserError("line 7: not JSON")
    with pytest.raises(UserError, match="line 7"):
        train_tokenizer(broken(), 300)


# Saving and opening


def test_saved_copy_is_equal(ours, tmp_path):
    save_tokenizer(ours, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')  # as in a run folder
    copy = load_tokenizer(tmp_path / "run")
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(ours)
    assert copy.special_tokens_map == ours.special_tokens_map and copy.chat_template == ours.chat_template
    assert encode_batch(copy, ODD) == encode_batch(ours, ODD)
    assert copy.decode(encode(copy, "a , b")) == "a , b"
    save_tokenizer(copy, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_transformers_adds_bos_knows_the_ends_and_our_encode_adds_nothing(ours, tmp_path):
    "user.md D: the package's own prompts begin with bos, and so must those of somebody who opens the folder."
    save_tokenizer(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = encode(ours, "the cat 猫")
    assert theirs("the cat 猫")["input_ids"] == [ours.bos_token_id, *expected]
    assert encode(theirs, "the cat 猫") == encode(load_tokenizer(tmp_path), "the cat 猫") == expected
    names = [f"{name}_id" for name in SPECIAL_TOKENS]
    assert [getattr(theirs, name) for name in names] == [getattr(ours, name) for name in names] == [0, 1, 2, 3]
    talk = [{"role": "user", "content": "hi"}]
    text = ours.apply_chat_template(talk, tokenize=False)
    ids = theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
    assert ids == encode(ours, text, allow_special=True) and ids.count(ours.bos_token_id) == 1


def test_a_tokenizer_that_adds_its_own_ends_keeps_its_way(ours, tmp_path):
    save_tokenizer(ours, tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    eos = (ours.eos_token, ours.eos_token_id)
    raw.post_processor = processors.TemplateProcessing(["$A", eos[0]], None, [eos])
    raw.save(str(tmp_path / "tokenizer.json"))
    save_tokenizer(load_tokenizer(tmp_path), tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy")("a")["input_ids"] == [*encode(ours, "a"), ours.eos_token_id]


def test_saving_into_a_file_is_an_error_and_not_silence(ours, tmp_path):
    "attack.md E: `--out EXISTING_FILE` exited with 0 and wrote nothing."
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        save_tokenizer(ours, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


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
    with pytest.raises(UserError, match=f"new {name}_token .* already in use"):
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
    "text", [None, ["a"], 3, "half \ud83d emoji"]
)
def test_encode_errors(ours, text):
    with pytest.raises(UserError, match="not a string, or holds half a surrogate pair"):
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
    with pytest.raises(UserError, match="not here"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path / "file")


@pytest.mark.parametrize("content", [
    "{oops", "[]", "null", "[1, 2]", "[" * 10**5, '{"a":' * 10**5, '{"a":' * 500, "1" * 5000,
])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_strange_file_is_one_clear_line(tmp_path, name, content):
    "attack.md: both files nested 10^5 deep (RecursionError)."
    save_raw(tmp_path, {"a": 0})
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="not JSON|holds a|not a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "Nonsense"}}', '{"model": {"type": "BPE", "vocab": 3}}'])
def test_json_but_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_hub_folder_is_opened_and_only_files_of_tokenizers_are_asked_for(monkeypatch, tmp_path):
    save_raw(tmp_path, {"a": 0})
    asked = []
    monkeypatch.setattr(module, "fetch_from_hub", lambda repo, files: asked.append((repo, files)) or tmp_path)
    assert load_tokenizer("somebody/model").mask_token_id == 2
    assert asked == [("somebody/model", ["*token*.json", "*.jinja"])]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        load_tokenizer("somebody/model")


def test_importing_it_is_quick():
    code = "import sys, nanollada.tokenizer; assert not {'transformers', 'tokenizers', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
