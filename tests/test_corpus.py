"From documents to batches: every source, every complaint, and nothing lost on the way."

import errno
import json
import pickle
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from nanollada import corpus as module
from nanollada.core import UserError
from nanollada.corpus import (
    TokenStream,
    Windows,
    build_stream,
    fetch_minimind,
    fetch_poetry,
    prepare_data,
    random_length,
    read_documents,
    read_poems,
    source_fingerprint,
    split_documents,
)
from nanollada.tokenizer import encode, train_tokenizer
from nanollada.toy import sample

TEXTS = [f"story {n} tells of {n * n} cats. 第{n}个故事。" + " more" * (n % 7) for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def stream(tokenizer, tmp_path_factory):
    return build_stream(TEXTS, tokenizer, tmp_path_factory.mktemp("stream"), batch_size=64)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOLLADA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


# Reading


def test_jsonl_field_bom_blank_lines_and_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        "\ufeff".encode() + '{"body": "a\u2028b"}\r\n\n  \n{"body": " "}\n{"body": "二"}'.encode()
    )
    assert list(read_documents(path, field="body")) == ["a\u2028b", "二"]


@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_conversations(tmp_path, name):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{name: turns}])
    assert list(read_documents(path)) == ["hi\nyo"]
    assert list(read_documents(path, render=lambda turns: turns[0]["role"])) == ["user"]


def test_text_files_are_cut_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\r\n two\r\n\r\n \t\nthree\n\n\n")
    assert list(read_documents(path)) == ["one\r\n two", "three"]


def test_folder_is_read_in_name_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "2"}])
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "c").mkdir()
    write_jsonl(tmp_path / "c" / "d.jsonl", [{"text": "3"}])
    (tmp_path / "ignored.csv").write_text("x")
    assert list(read_documents(tmp_path)) == ["1", "2", "3"]


def test_saved_dataset_and_hub_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["a", "", "b"]})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "three"))
    assert list(read_documents(tmp_path / "one")) == list(read_documents(tmp_path / "two")) == ["a", "b"]
    with pytest.raises(UserError, match="no split 'train' among test"):
        list(read_documents(tmp_path / "three"))
    with pytest.raises(UserError, match="row 0: no field 'body'; the fields are 'text'"):
        list(read_documents(tmp_path / "one", field="body"))
    monkeypatch.setattr(module, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, download_config: data)
    assert list(read_documents("some/data")) == ["a", "b"]


def test_hub_dataset_offline_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(module, "hub_is_reachable", lambda: False)

    def fail(*_, **__):
        raise ConnectionError("no\nnet")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match=r"some/data: no such file or folder, and no such data set on the hub \(no\)$"
    ):
        read_documents("some/data")


BAD_LINES = [
    (b'{"text": "cut', r"a.jsonl:2: not JSON"),
    (b'{"body": "x", "id": 1}', r"a.jsonl:2: no field 'text'; the fields are 'body', 'id'"),
    (b"{}", r"a.jsonl:2: no field 'text'; the fields are none"),
    (b'{"text": 7}', r"a.jsonl:2: field 'text' is int"),
    (b'{"text": null}', r"a.jsonl:2: field 'text' is NoneType"),
    (b'["text"]', r"a.jsonl:2: expected an object .* found list"),
    (b'"text"', r"a.jsonl:2: expected an object .* found str"),
    (b'{"text": "caf\xe9"}', r"a.jsonl:2: not UTF-8 \(byte 14 of the line\)"),
    (b'{"text": "\\ud83d"}', r"a.jsonl:2: half a surrogate"),
    (b'{"messages": [{"role": "user"}]}', r"a.jsonl:2: a conversation must be"),
    (b'{"messages": []}', r"a.jsonl:2: a conversation must be"),
    (b"[" * 100_000, r"a.jsonl:2: "),
]


@pytest.mark.parametrize("line, words", BAD_LINES)
def test_bad_lines_are_named_or_skipped_and_counted(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "also"}\n')
    with pytest.raises(UserError, match=words) as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value)
    skipped = Counter()
    assert list(read_documents(path, skip_bad_lines=True, skipped=skipped)) == ["fine", "also"]
    assert skipped == {str(path): 1}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b"", "no documents"),
        ("a.txt", b"\n \n", "no documents"),
        ("a.csv", b"a,b", "'.csv'; expected .jsonl"),
        ("a.txt", "x\n\ncafé".encode("latin-1"), r"a.txt:3: not UTF-8 \(byte 4"),
        ("a.txt", "hi".encode("utf-16"), "a.txt:1: not UTF-8"),
    ],
)
def test_unusable_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_documents(tmp_path / name))


def test_missing_source_empty_folder_and_misplaced_option(tmp_path):
    for source in (tmp_path / "no.jsonl", "toyy", "./some/data", "some/data.jsonl"):
        with pytest.raises(UserError, match="no such file or folder; the named corpora are toy"):
            read_documents(source)
    with pytest.raises(UserError, match="no .jsonl or .txt files"):
        read_documents(tmp_path)
    with pytest.raises(UserError, match="option 'dynasty' is only for"):
        read_documents(tmp_path, dynasty="tang")


def test_all_lines_skipped_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}, {"body": "y"}])
    with pytest.raises(UserError, match="2 bad lines"):
        list(read_documents(path, skip_bad_lines=True))


# Named corpora


def test_toy_is_the_toy_language():
    assert list(read_documents("toy", n=5, seed=3, language="zh")) == sample(5, 3, "zh")


def put_poems(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, number in (("song", 0), ("tang", 1000), ("tang", 0)):
        lines = ["愛國。", f"{name} {number}"]
        poem = {"title": "題", "author": "誰", "paragraphs": lines, "id": "1"}
        (folder / f"poet.{name}.{number}.json").write_text(
            json.dumps([poem, {**poem, "paragraphs": []}]), encoding="utf-8"
        )


def test_poems(cache):
    put_poems(cache / "poetry")
    assert [poem["text"] for poem in read_poems()] == [
        "愛國。\ntang 0",
        "愛國。\ntang 1000",
        "愛國。\nsong 0",
    ]
    assert list(read_poems("song")) == [
        {"dynasty": "song", "title": "題", "author": "誰", "text": "愛國。\nsong 0"}
    ]
    assert len(list(read_poems(max_chars=10))) == 2 and len(list(read_poems(min_chars=11))) == 1
    assert next(read_documents("poetry", with_title=True, dynasty="song")) == "題\n誰\n愛國。\nsong 0"
    with pytest.raises(UserError, match="dynasty is 'ming'"):
        read_poems("ming")


def test_simplified_poems(cache, monkeypatch):
    put_poems(cache / "poetry")
    pytest.importorskip("opencc")
    poem = next(read_poems("tang", simplified=True))
    assert (poem["title"], poem["author"], poem["text"]) == ("题", "谁", "爱国。\ntang 0")
    monkeypatch.setitem(__import__("sys").modules, "opencc", None)
    with pytest.raises(UserError, match=r"nanollada\[chinese\]"):
        read_poems(simplified=True)


def test_poetry_falls_back_to_git_then_explains(cache, monkeypatch):
    calls = []

    def fake(*command: str, cwd: Path) -> None:
        calls.append(command[0])
        if command[0] == "npm" or broken:
            raise FileNotFoundError(command[0])
        put_poems(cwd / "repository" / "全唐诗")

    monkeypatch.setattr(module, "_run", fake)
    broken = True
    with pytest.raises(
        UserError, match="npm: not installed; git: not installed.*npm pack chinese-poetry@2.0.1"
    ):
        fetch_poetry()
    assert not list(cache.iterdir())
    broken = False
    assert len(list(fetch_poetry().glob("*.json"))) == 3 and calls == ["npm", "git"] * 2
    fetch_poetry()
    assert len(calls) == 4, "the cache is used"


def test_poetry_from_npm_takes_only_the_poems(cache, monkeypatch, tmp_path):
    import tarfile

    put_poems(tmp_path / "package" / "dist" / "quantangshi")
    put_poems(tmp_path / "package" / "dist" / "quantangshi" / "error")

    def fake(*command: str, cwd: Path) -> None:
        with tarfile.open(cwd / "chinese-poetry-2.0.1.tgz", "w:gz") as package:
            package.add(tmp_path / "package", "package")

    monkeypatch.setattr(module, "_run", fake)
    assert sorted(file.name for file in fetch_poetry().iterdir()) == [
        "poet.song.0.json",
        "poet.tang.0.json",
        "poet.tang.1000.json",
    ]
    assert [path.name for path in cache.iterdir()] == ["poetry"], "no download is left behind"


def test_minimind(cache, monkeypatch, tmp_path):
    def offline(repo, files, repo_type):
        raise UserError(f"{repo}: the hub does not answer")

    monkeypatch.setattr(module, "fetch_from_hub", offline)
    with pytest.raises(
        UserError, match="By hand: get pretrain_hq.jsonl from https://www.modelscope.cn/.*cache/minimind"
    ):
        read_documents("minimind")
    with pytest.raises(UserError, match="expected one of pretrain_hq.jsonl"):
        fetch_minimind("other.jsonl")
    write_jsonl(tmp_path / "pretrain_hq.jsonl", [{"text": "hub"}])
    monkeypatch.setattr(module, "fetch_from_hub", lambda repo, files, repo_type: tmp_path)
    assert list(read_documents("minimind")) == ["hub"]
    (cache / "minimind").mkdir(parents=True)
    write_jsonl(
        cache / "minimind" / "sft_mini_512.jsonl",
        [{"conversations": [{"role": "user", "content": "by hand"}]}],
    )
    assert list(read_documents("minimind", file="sft_mini_512.jsonl")) == ["by hand"]


# Splitting


def parts(folder: Path) -> tuple[set[str], set[str]]:
    return tuple(
        {json.loads(line)["text"] for line in open(folder / f"{name}.jsonl", encoding="utf-8")}
        for name in ("train", "valid")
    )


def test_split_does_not_depend_on_order_or_company(tmp_path):
    split_documents(TEXTS, tmp_path / "a", 0.2)
    split_documents(reversed(TEXTS[::2] + TEXTS[::2]), tmp_path / "b", 0.2)
    (train, valid), (half_train, half_valid) = parts(tmp_path / "a"), parts(tmp_path / "b")
    assert train | valid == set(TEXTS) and not train & valid
    assert half_train <= train and half_valid <= valid and half_train | half_valid == set(TEXTS[::2])


def test_split_share_is_binomial(tmp_path):
    texts = [f"document {n}" for n in range(5000)]
    n = split_documents(texts, tmp_path, 0.1)["valid"]["documents"]
    assert abs(n - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5


def test_growing_the_fraction_only_adds(tmp_path):
    split_documents(TEXTS, tmp_path / "a", 0.1)
    split_documents(TEXTS, tmp_path / "b", 0.3)
    assert parts(tmp_path / "a")[1] < parts(tmp_path / "b")[1]


def test_statistics(tmp_path):
    statistics = split_documents(["  a\n", "a", "bb", "猫猫猫", " "], tmp_path, 0.0, skipped=Counter(x=3))
    assert statistics == json.loads((tmp_path / "statistics.json").read_text())
    assert statistics["train"]["documents"] == 3 and statistics["train"]["characters"] == 4 + 2 + 3
    assert statistics["train"]["bytes"] == 4 + 2 + 9 and statistics["train"]["length_quantiles"]["1"] == 4
    assert (statistics["duplicates"], statistics["blank"], statistics["skipped_lines"]) == (1, 1, 3)
    assert split_documents(["a", "a"], tmp_path, 0.0, deduplicate=False)["train"]["documents"] == 2


def test_given_validation_documents_are_kept_out_of_training(tmp_path):
    split_documents(["a", "b", "c"], tmp_path, valid_documents=["b"])
    assert parts(tmp_path) == ({"a", "c"}, {"b"})


@pytest.mark.parametrize(
    "documents, fraction, words",
    [
        (["a"], 1.0, "valid_fraction is 1.0"),
        (["a"], -0.1, "-0.1"),
        ([], 0.5, "no documents for training"),
        (["a"], 1e-9, "chose none"),
        ([7], 0.5, "a document is int"),
    ],
)
def test_split_errors_leave_nothing(tmp_path, documents, fraction, words):
    with pytest.raises(UserError, match=words):
        split_documents(documents, tmp_path / "out", fraction)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_interrupted_split_keeps_the_old_one(tmp_path):
    split_documents(["old"], tmp_path, 0.0)

    def breaks():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split_documents(breaks(), tmp_path, 0.0)
    assert parts(tmp_path) == ({"old"}, set()) and not list(tmp_path.glob(".*"))


# Streams


def test_stream_is_bos_ids_eos(stream, tokenizer):
    assert stream.n_documents == len(TEXTS) and stream.meta["mask_id"] == 3
    for i in (0, 63, 64, 299):
        assert stream.document(i).tolist() == [1, *encode(tokenizer, TEXTS[i]), 2]
        assert stream.decode(i, tokenizer) == TEXTS[i]
    assert len(stream) == sum(len(stream.document(i)) for i in range(300)) == stream.meta["tokens"]
    assert stream.meta["characters"] == sum(map(len, TEXTS)) and stream.meta["bytes"] == sum(
        len(t.encode()) for t in TEXTS
    )
    assert stream.tokens.dtype == np.uint16 and "300 documents" in repr(stream)


def test_documents_cannot_smuggle_special_tokens(tokenizer, tmp_path):
    ids = build_stream(["a<|mask|>b<|im_end|>", "c"], tokenizer, tmp_path).tokens
    assert (ids == 3).sum() == 0 and (ids == 2).sum() == 2 and (ids == 1).sum() == 2


def test_two_processes_give_the_same_files(stream, tokenizer, tmp_path):
    build_stream(TEXTS, tokenizer, tmp_path, num_proc=2, batch_size=20)
    for name in ("tokens.bin", "documents.bin"):
        assert (tmp_path / name).read_bytes() == (stream.folder / name).read_bytes()


def test_wide_vocabulary_needs_four_bytes(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{n}": n for n in range(65_537)} | {"</s>": 65_537}, unk_token="w0"))
    wide = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="</s>", eos_token="</s>", pad_token="</s>")
    stream = build_stream(["w65536"], wide, tmp_path)
    assert stream.tokens.dtype == np.uint32 and stream.tokens.tolist() == [65_537, 65_536, 65_537]


def test_stream_is_reused_until_source_or_tokenizer_change(tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    built = []
    real = module._write_stream
    monkeypatch.setattr(module, "_write_stream", lambda *args: built.append(1) or real(*args))
    build_stream(path, tokenizer, tmp_path / "s")
    build_stream(path, tokenizer, tmp_path / "s")
    assert len(built) == 1
    build_stream(path, train_tokenizer(TEXTS, 300), tmp_path / "s")
    assert len(built) == 2
    write_jsonl(path, [{"text": "one"}, {"text": "two"}])
    assert (
        build_stream(path, train_tokenizer(TEXTS, 300), tmp_path / "s").n_documents == 2 and len(built) == 3
    )
    build_stream(["x"], tokenizer, tmp_path / "s")
    assert len(built) == 4, "documents without a fingerprint are never taken from the cache"


def test_interrupted_build_leaves_no_stream(tokenizer, tmp_path):
    build_stream(["old"], tokenizer, tmp_path)

    def breaks():
        yield "new"
        raise UserError("bad line")

    with pytest.raises(UserError, match="bad line"):
        build_stream(breaks(), tokenizer, tmp_path)
    with pytest.raises(UserError, match="no finished stream"):
        TokenStream(tmp_path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("tokens.bin", lambda p: p.write_bytes(p.read_bytes()[:-1]), "tokens.bin: found 69, expected 70"),
        ("tokens.bin", lambda p: p.unlink(), "tokens.bin: found nothing"),
        ("documents.bin", lambda p: p.write_bytes(b""), "documents.bin: found 0"),
        ("documents.bin", lambda p: p.write_bytes(bytes(len(p.read_bytes()))), "does not fit"),
        ("meta.json", lambda p: p.write_text("{"), "meta.json: not JSON"),
        ("meta.json", lambda p: p.unlink(), "no finished stream"),
    ],
)
def test_damaged_streams_are_refused(tokenizer, tmp_path, name, damage, words):
    stream = build_stream(["abcdefghijk" * 3], train_tokenizer(["x"], 260), tmp_path)
    assert len(stream) == 35
    damage(tmp_path / name)
    with pytest.raises(UserError, match=words):
        TokenStream(tmp_path)


def test_no_documents(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no documents"):
        build_stream([], tokenizer, tmp_path)


def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path):
    def peak(n: int) -> int:
        tracemalloc.start()
        build_stream((f"text number {i}" for i in range(n)), tokenizer, tmp_path, batch_size=200)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(400)
    small, large = peak(1000), peak(8000)
    assert large < small + 7000 * 4, "less than four bytes for each further document of nine tokens"


def test_pickled_stream_carries_no_tokens(stream):
    data = pickle.dumps(Windows(stream, 16))
    assert len(data) < 1000 and torch.equal(
        pickle.loads(data).batch([1])["ids"], Windows(stream, 16).batch([1])["ids"]
    )


# Windows


@pytest.mark.parametrize("length, offset", [(1, 0), (7, 0), (32, 5), (300, 299)])
def test_packed_windows_equal_the_slow_way(stream, length, offset):
    owner = np.array([i for i in range(stream.n_documents) for _ in stream.document(i)])
    windows = Windows(stream, length, offset=offset)
    assert len(windows) == (len(stream) - offset) // length
    rows = [len(windows) - 1, 0, len(windows) // 2]
    batch = windows.batch(rows)
    for row, n in enumerate(rows):
        cut = slice(offset + n * length, offset + (n + 1) * length)
        assert batch["ids"][row].tolist() == stream.tokens[cut].tolist()
        assert batch["document_ids"][row].tolist() == (owner[cut] - owner[cut][0]).tolist()
    assert batch["real"].all() and {t.dtype for t in batch.values()} == {torch.int64, torch.bool}
    assert windows.n_cut == 0


def test_padded_windows_are_documents(stream):
    length = int(np.median(np.diff(stream.doc_starts)))
    windows = Windows(stream, length, pack=False)
    batch = windows.batch(torch.arange(len(windows)))
    for i in range(stream.n_documents):
        document = stream.document(i)[:length].tolist()
        assert batch["ids"][i].tolist() == document + [2] * (length - len(document))
        assert batch["real"][i].sum() == len(document)
    assert windows.n_cut == sum(len(stream.document(i)) > length for i in range(300)) > 0
    assert batch["document_ids"].sum() == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"length": 10**6},
        {"length": 10**6, "offset": 10**6 - 1},
        {"length": 0},
        {"length": 8, "offset": 8},
        {"length": 8, "offset": -1},
    ],
)
def test_window_errors(stream, settings):
    with pytest.raises(UserError):
        Windows(stream, **settings)


@pytest.mark.parametrize("rows", [[-1], [10**9], []])
def test_rows_must_exist(stream, rows):
    with pytest.raises(IndexError):
        Windows(stream, 8).batch(rows)


def test_random_length_cuts_whole_batches_uniformly(stream):
    batch, generator = Windows(stream, 10).batch(range(3)), torch.Generator().manual_seed(0)
    lengths = Counter(random_length(batch, 1.0, generator)["ids"].shape[1] for _ in range(4000))
    assert sorted(lengths) == list(range(1, 11))
    assert all(abs(n - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5 for n in lengths.values())
    assert random_length(batch, 0.0, generator) is batch
    short = random_length(batch, 1.0, torch.Generator().manual_seed(3))
    assert {value.shape for value in short.values()} == {short["real"].shape}
    assert torch.equal(short["ids"], batch["ids"][:, : short["ids"].shape[1]])


def test_random_length_draws_the_same_numbers_cut_or_not(stream):
    batch, states = Windows(stream, 10).batch([0]), []
    for probability in (0.0, 1.0):
        generator = torch.Generator().manual_seed(1)
        random_length(batch, probability, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


# All in one


def test_prepare_data_end_to_end_and_cached(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in TEXTS])
    settings = {"vocab_size": 300, "valid_fraction": 0.1, "field": "body"}
    train, valid, tokenizer = prepare_data(path, None, tmp_path / "data", **settings)
    texts = {stream.decode(i, tokenizer) for stream in (train, valid) for i in range(stream.n_documents)}
    assert texts == set(TEXTS) and len(tokenizer) == 300 and valid.n_documents > 0
    for name in ("_write_stream", "train_tokenizer", "split_documents"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("made again"))
    again = prepare_data(path, None, tmp_path / "data", **settings)
    assert len(again[0]) == len(train) and again[2].get_vocab() == tokenizer.get_vocab()


def test_prepare_data_notices_changes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    train, valid, _ = prepare_data(path, None, tmp_path / "data", 300, 0.1)
    limited = prepare_data(path, None, tmp_path / "data", 300, 0.1, limit=100)
    assert train.n_documents + valid.n_documents == 300
    assert limited[0].n_documents + limited[1].n_documents == 100
    assert len(prepare_data(path, None, tmp_path / "data", 310, 0.1)[2]) == 310


def test_prepare_data_takes_a_split_folder_and_a_tokenizer(tmp_path, tokenizer):
    split_documents(TEXTS, tmp_path / "split", 0.1)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for given in (tokenizer, tmp_path / "tokenizer"):
        train, valid, used = prepare_data(tmp_path / "split", given, tmp_path / "split")
        assert used.get_vocab() == tokenizer.get_vocab()
        assert train.n_documents + valid.n_documents == 300


def test_prepare_toy_draws_fresh_validation_stories(tmp_path):
    train, valid, tokenizer = prepare_data("toy", None, tmp_path, 300, 0.1, limit=200)
    assert [train.decode(i, tokenizer) for i in range(200)] == sample(200, 0)
    assert [valid.decode(i, tokenizer) for i in range(20)] == sample(20, 1)


def test_prepare_data_reports_skipped_lines(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [*({"text": text} for text in TEXTS), {"no": 1}])
    with pytest.raises(UserError, match="a.jsonl:301"):
        prepare_data(path, None, tmp_path / "data", 300, 0.1)
    prepare_data(path, None, tmp_path / "data", 300, 0.1, skip_bad_lines=True)
    assert "1 bad lines skipped" in caplog.text
    assert json.loads((tmp_path / "data" / "documents" / "statistics.json").read_text())["skipped_lines"] == 1


def test_prepare_data_errors(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    for source, folder, settings, words in (
        (tmp_path, tmp_path / "data", {}, "lies inside the source"),
        (tmp_path / "a.jsonl", tmp_path / "d", {"limit": 0}, "limit is 0"),
        (tmp_path / "a.jsonl", tmp_path / "d", {"valid_fraction": 0.0}, "valid_fraction is 0.0"),
        (
            tmp_path / "a.jsonl",
            tmp_path / "d",
            {"valid_fraction": 0.5, "vocab_size": 10},
            "vocab_size is 10|chose none|no documents",
        ),
    ):
        with pytest.raises(UserError, match=words):
            prepare_data(source, None, folder, **settings)


def test_fingerprint_sees_content_dates_and_settings(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    marks = {source_fingerprint(path), source_fingerprint(path, limit=1), source_fingerprint("toy")}
    write_jsonl(path, [{"text": "xy"}])
    assert len(marks | {source_fingerprint(path)}) == 4
    assert source_fingerprint(path) == source_fingerprint(str(path))


# ---- a build that was killed


KILLED = """
import os, sys
import nanollada.corpus as module
from nanollada.tokenizer import load_tokenizer

def documents():
    for i in range(300):
        if i == 95:
            os._exit(9)  # as `kill -9` would
        yield f"text number {i}"

module.SAVE_EVERY = 2
module.build_stream(documents(), load_tokenizer(sys.argv[1]), sys.argv[2], batch_size=10, source="the same")
"""


def test_a_killed_build_goes_on_where_its_last_note_was(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "tokenizer"), str(tmp_path / "s")]
    assert subprocess.run(command, capture_output=True).returncode == 9
    assert json.loads((tmp_path / "s/partial/progress.json").read_text())["documents"] == 80
    with pytest.raises(UserError, match="no finished stream"):
        TokenStream(tmp_path / "s")
    texts = [f"text number {i}" for i in range(300)]
    encoded, real = [], module._encode_documents
    monkeypatch.setattr(module, "_encode_documents", lambda batch, *rest: encoded.extend(batch) or real(batch, *rest))
    again = build_stream(texts, tokenizer, tmp_path / "s", batch_size=10, source="the same")
    assert encoded == texts[80:] and sorted(p.name for p in again.folder.iterdir()) == ["documents.bin", "meta.json", "tokens.bin"]
    whole = build_stream(texts, tokenizer, tmp_path / "whole", source="the same")
    assert again.meta == whole.meta
    for name in ("tokens.bin", "documents.bin"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize("change", ["source", "tokenizer", "short file"])
def test_what_another_build_left_is_not_continued(tokenizer, tmp_path, monkeypatch, change):
    def broken():
        yield from ["a"] * 50
        raise UserError("stop")

    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    with pytest.raises(UserError, match="stop"):
        build_stream(broken(), tokenizer, tmp_path, batch_size=10, source="one")
    assert (tmp_path / "partial" / "progress.json").is_file()
    if change == "short file":
        (tmp_path / "partial" / "tokens.bin").write_bytes(b"")
    other = train_tokenizer(TEXTS, 300) if change == "tokenizer" else tokenizer
    stream = build_stream(["b"] * 60, other, tmp_path, source="two" if change == "source" else "one")
    assert stream.n_documents == 60 and {stream.decode(i, other) for i in range(60)} == {"b"}


def test_two_builders_of_one_stream_take_turns(tokenizer, tmp_path, monkeypatch):
    built, real = [], module._build
    monkeypatch.setattr(module, "_build", lambda *args: built.append(1) or time.sleep(0.1) or real(*args))
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(build_stream, TEXTS, tokenizer, tmp_path, source="one") for _ in range(2)]
    assert [len(job.result()) for job in jobs] == [len(jobs[0].result())] * 2 and len(built) == 1


def test_a_full_disk_is_explained_and_nothing_noted_is_lost(tokenizer, tmp_path, monkeypatch):
    def full(*files):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_sync", full)
    with pytest.raises(UserError, match="disk is full"):
        build_stream(TEXTS, tokenizer, tmp_path, source="one")
    with pytest.raises(UserError, match="no finished stream"):
        TokenStream(tmp_path)
