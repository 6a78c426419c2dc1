"From documents to rows: nothing lost on the way, nothing mixed up, and a split that stays as it is."

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from nanollada import data as module
from nanollada.ar import Autoregressive
from nanollada.core import UserError
from nanollada.data import (DataConfig, TokenStream, Windows, build_stream, held_out_rank, interleave, mixture_of,
                            open_source, prepare_data, split_source)
from nanollada.tokenizer import encode, train_tokenizer
from nanollada.toy import sample

ROOT = Path(__file__).parent.parent
TEXTS = [f"story {n} tells of {n * n} cats. 第{n}个故事。" + " more" * (n % 7) for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def stream(tokenizer, tmp_path_factory):
    return build_stream(TEXTS, tokenizer, tmp_path_factory.mktemp("stream"))


def write_jsonl(path: Path, texts: list, field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def split(folder: Path, texts: list, **settings) -> dict:
    write_jsonl(folder / "source.jsonl", texts)
    return split_source(folder / "source.jsonl", folder / "out", **settings)


def parts(folder: Path) -> list[list[str]]:
    lines = ((folder / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "valid"))
    return [[json.loads(line)["text"] for line in part] for part in lines]


def documents_of(stream) -> list[list[int]]:
    return [part.tolist() for part in np.split(stream.tokens, stream.doc_starts[1:-1])]


def texts_of(streams, tokenizer) -> set[str]:
    return {tokenizer.decode(ids[1:-1]) for stream in streams for ids in documents_of(stream)}


# The split


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_membership_is_what_it_always_was(fraction):
    "The first eight bytes of a BLAKE2b hash below the fraction: sets split before stay split the same way."
    for text in [*TEXTS, " 猫 ", "x" * 10_000]:
        digest = blake2b(text.strip().encode(), digest_size=16).digest()
        assert (held_out_rank(text) < fraction) == (int.from_bytes(digest[:8], "big") < fraction * 2**64)
    assert 0.227 <= held_out_rank("猫") < 0.228


def test_split_does_not_depend_on_order_or_company(tmp_path):
    texts = [f"document {n}" for n in range(900)]
    split(tmp_path / "a", texts, valid_fraction=0.2)
    split(tmp_path / "b", [*texts[::2], *texts[::2]][::-1], valid_fraction=0.2)
    (train, valid), (half_train, half_valid) = parts(tmp_path / "a"), parts(tmp_path / "b")
    assert train == [text for text in texts if held_out_rank(text) >= 0.2]
    assert valid == [text for text in texts if held_out_rank(text) < 0.2]
    assert set(half_train) <= set(train) and set(half_valid) <= set(valid) and len(half_train + half_valid) == 450


def test_split_share_is_binomial(tmp_path):
    n = split(tmp_path, [f"document {n}" for n in range(5000)], valid_fraction=0.1)["valid"]["documents"]
    assert abs(n - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize("n, least", [(2, 1), (11, 2), (300, 30), (1500, 64), (3000, 64)])
def test_small_sets_hold_out_at_least_a_tenth_or_64(tmp_path, n, least):
    "user.md B: 450 chats left 4 validation conversations, which chose the checkpoint."
    texts = [f"document {i}" for i in range(n)]
    counts = split(tmp_path, texts + texts[:1], valid_fraction=0.01)
    train, valid = parts(tmp_path)
    assert counts["valid"]["documents"] == len(valid) == max(least, sum(held_out_rank(text) < 0.01 for text in texts))
    assert sorted(train + valid) == sorted(texts) and counts["duplicates"]["documents"] == 1
    assert max(map(held_out_rank, valid)) < min(map(held_out_rank, train)), "chosen by the same numbers"


def test_statistics(tmp_path):
    counts = split(tmp_path, ["  a\n", "a", "bb", "猫猫猫", " ", "c"], valid_fraction=1e-9)
    assert counts == json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert counts["duplicates"] == {"documents": 1, "characters": 1, "bytes": 1}
    totals = Counter(counts["train"]) + Counter(counts["valid"])
    assert totals["documents"] == 4 and totals["characters"] == 4 + 2 + 3 + 1 and totals["bytes"] == 4 + 2 + 9 + 1


@pytest.mark.parametrize("settings, words", [
    ({"valid_fraction": 1.0}, "valid_fraction is 1.0"), ({"valid_fraction": 0.0}, "valid_fraction is 0.0"),
    ({"valid_fraction": float("nan")}, "valid_fraction is nan"), ({"limit": 0}, "limit is 0"),
    ({"limit": -1}, "limit is -1"), ({"limit": 10**19}, "limit is 1000"), ({"limit": 1}, "nothing is left to train on"),
])
def test_split_errors_leave_nothing(tmp_path, settings, words):
    "attack.md: `data F --limit=-1` and 10^19 ended in a ValueError."
    with pytest.raises(UserError, match=words):
        split(tmp_path, ["a", "b"], **settings)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.jsonl"))


def test_a_huge_limit_on_the_toy_language_is_refused():
    "attack.md: `tokenizer --data toy --limit 10^19` never ended."
    with pytest.raises(UserError, match="expected 1 to 1,000,000 documents"):
        open_source("toy", limit=10**7)
    assert list(open_source("toy", limit=3)) == sample(3, 0)


def test_interrupted_split_keeps_the_old_one(tmp_path, monkeypatch):
    split(tmp_path, ["old", "older"])
    before = parts(tmp_path)

    def breaks(*_):
        yield "new"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "read_documents", breaks)
    with pytest.raises(KeyboardInterrupt):
        split_source(tmp_path / "source.jsonl", tmp_path / "out")
    assert parts(tmp_path) == before


def test_a_source_does_not_read_itself(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match="lies inside .* would read itself"):
        prepare_data(tmp_path, cache=tmp_path / "cache")


# Mixtures


def write_two(folder: Path, n: int = 300) -> tuple[Path, Path]:
    "Long documents and short ones; the two files share twenty."
    shared = [f"both {i}" for i in range(20)]
    return (write_jsonl(folder / "long.jsonl", shared + [f"long {i} " + "字" * (i % 40) for i in range(n)]),
            write_jsonl(folder / "short.jsonl", shared + [f"s{i}" for i in range(5 * n)]))


@pytest.mark.parametrize("text, shares", [
    ("a=1+b=3", {"a": 0.25, "b": 0.75}), ("a=.5+b=0.5", {"a": 0.5, "b": 0.5}), ("a=2", {"a": 1.0}), ("a/b=c.txt=1+c=1", {"a/b=c.txt": 0.5, "c": 0.5}),
    ("tinystories=70+HuggingFaceFW/fineweb-edu:sample-10BT=30", {"tinystories": 0.7, "HuggingFaceFW/fineweb-edu:sample-10BT": 0.3}),
    ("toy", {"toy": 1.0}), (Path("a+b.txt"), {"a+b.txt": 1.0}),
])
def test_mixtures_are_read(text, shares):
    assert mixture_of(text) == pytest.approx(shares) and list(mixture_of(text)) == list(shares)


@pytest.mark.parametrize("text", ["", "=", "=1", "a=", "a=0", "a=0.0+b=1", "a=-1+b=1", "a=nan+b=1", "a=inf+b=1", "a=1+", "+a=1", "a=1++b=1", "a=1+a=2",
                                  "a=1+b", "a=1e5+b=1", "a=1_0+b=1", "a=١+b=1", "a= 1+b=1", "a=" + "9" * 5000, "a=1+b=\x1b[31m", "a=1.1.1", "=+" * 10**5])
def test_bad_weights_are_one_line(text):
    start = time.monotonic()
    for attempt in (lambda: mixture_of(text), lambda: DataConfig(text), lambda: open_source(text)):
        with pytest.raises(UserError, match="expected a source, or a mixture NAME=WEIGHT") as caught:
            attempt()
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("text", ["toy=1+toyy=1", "no.jsonl=1+toy=1", "a=b.jsonl=1+toy=1", "x" * 300 + "=1+toy=1", "a\0b=1+toy=1", "\0", "y" * 5000, "~nobody/x"])
def test_an_unknown_part_is_one_line_and_leaves_nothing(tmp_path, text):
    for attempt in (lambda: list(open_source(text)), lambda: split_source(text, tmp_path / "out"),
                    lambda: prepare_data(text, cache=tmp_path / "cache")):
        with pytest.raises(UserError, match="no such file or folder; named sources are toy, poetry|expected a source, or a mixture"):
            attempt()
    assert not (tmp_path / "cache").exists() and not list(tmp_path.rglob("*.jsonl*"))


def test_a_file_is_a_file_whatever_its_name(tmp_path):
    for name in ("a=0.5+b=0.5.txt", "toy=1", "c++.txt"):
        path = tmp_path / name
        path.mkdir() if name == "toy=1" else path.write_text("mine")
        write_jsonl(path / "x.jsonl", ["mine"]) if name == "toy=1" else None
        assert mixture_of(path) == {str(path): 1.0} and list(open_source(path)) == ["mine"]


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_as_asked_within_the_largest_document(seed):
    """With v = bytes / share, the source of the least v is served, so all v lie within D = max(document / its share);
    the mean of v weighted by the shares is all bytes B, hence |bytes - share B| <= share D, at every moment."""
    rng = np.random.default_rng(seed)
    many = int(rng.integers(2, 5))
    shares = dict(zip("abcd", rng.dirichlet(np.ones(many))))
    sources = {name: [f"{name}{i} " + "é" * int(rng.lognormal(3, 1)) for i in range(400)] for name in shares}
    given, largest, order = dict.fromkeys(shares, 0), 0.0, []
    for name, text in interleave(sources, shares):
        size = len(text.encode())
        given[name] += size
        largest = max(largest, size / shares[name])
        order.append((name, text))
        assert all(abs(given[n] - shares[n] * sum(given.values())) <= shares[n] * largest + 1e-6 for n in shares)
    assert order == list(interleave(sources, shares)), "nothing is drawn"
    for name, texts in sources.items():
        assert [text for n, text in order if n == name] == texts[: sum(n == name for n, _ in order)], "in their order, none left out"
    assert max(sum(n == name for n, _ in order) for name in shares) == 400, "until the first source is used up"


def test_a_source_is_read_no_further_than_it_is_used():
    read = Counter()

    def endless(name):
        for i in itertools.count():
            read[name] += 1
            yield f"{name}{i:03}"
    taken = list(itertools.islice(interleave({"a": endless("a"), "b": endless("b")}, {"a": 0.75, "b": 0.25}), 100))
    assert Counter(name for name, _ in taken) == read == {"a": 75, "b": 25}


def test_split_of_a_mixture(tmp_path):
    long, short = write_two(tmp_path)
    counts = split_source(f"{long}=0.7+{short}=0.3", tmp_path / "out", valid_fraction=0.2)
    assert counts == json.loads((tmp_path / "out" / "statistics.json").read_text())
    rows = {part: [json.loads(line) for line in (tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()] for part in ("train", "valid")}
    everything = rows["train"] + rows["valid"]
    assert len({row["text"] for row in everything}) == len(everything), "also none that both sources have"
    assert sum(row["text"].startswith("both") for row in everything) == 20 == counts["duplicates"]["documents"]
    for part, unit in itertools.product(("train", "valid", "duplicates"), ("documents", "characters", "bytes")):
        assert counts[part][unit] == sum(counts["sources"][name][part][unit] for name in (str(long), str(short)))
    for part, name in itertools.product(rows, (str(long), str(short))):
        texts = [row["text"] for row in rows[part] if row["source"] == name]
        assert counts["sources"][name][part] == {"documents": len(texts), "characters": sum(map(len, texts)),
                                                 "bytes": sum(len(text.encode()) for text in texts)}
        assert all((held_out_rank(text) < 0.2) == (part == "valid") for text in texts)
        n = counts["sources"][name]["train"]["documents"] + counts["sources"][name]["valid"]["documents"]
        assert abs(counts["sources"][name]["valid"]["documents"] - 0.2 * n) < 5 * (n * 0.2 * 0.8) ** 0.5, "held out of each source"
    read = {name: sum(counts["sources"][name][part]["bytes"] for part in counts["sources"][name]) for name in counts["sources"]}
    assert abs(read[str(long)] / sum(read.values()) - 0.7) <= 0.7 * 130 / 0.3 / sum(read.values())


def test_a_small_mixture_keeps_its_sources_when_it_is_divided_again(tmp_path):
    long, short = write_two(tmp_path, 40)
    counts = split_source(f"{long}=0.5+{short}=0.5", tmp_path / "out", valid_fraction=0.001)
    total = counts["train"]["documents"] + counts["valid"]["documents"]
    assert counts["valid"]["documents"] == -(-total // 10) and counts["duplicates"]["documents"] > 0
    for part in ("train", "valid", "duplicates"):
        assert counts[part]["documents"] == sum(each[part]["documents"] for each in counts["sources"].values())
    ranks = {part: [held_out_rank(json.loads(line)["text"]) for line in (tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()]
             for part in ("train", "valid")}
    assert max(ranks["valid"]) < min(ranks["train"])


def test_all_kinds_mix_and_each_keeps_its_field(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOLLADA_CACHE", str(tmp_path))
    (tmp_path / "poetry").mkdir()
    poems = [{"title": "", "author": "", "paragraphs": [f"詩{n}"]} for n in range(50)]
    (tmp_path / "poetry" / "poet.tang.0.json").write_text(json.dumps(poems))
    write_jsonl(tmp_path / "minimind" / "pretrain_hq.jsonl", [f"問 {n}" for n in range(50)])
    rows = [("some/data:x:train", {"body": f"row {n}"}) for n in range(50)]
    monkeypatch.setattr("nanollada.sources._rows", lambda source, saved: iter(rows))
    mine = write_jsonl(tmp_path / "mine.jsonl", [f"mine {n}" for n in range(50)], "body")
    asked = f"poetry=1+minimind=1+toy=1+{mine}=1+some/data:x=1"
    found = list(open_source(asked, field="body", dynasty="tang", limit=40))
    assert len(found) == 40 and found[0] == "詩0"
    for begin in ("詩", "問", "mine", "row"):
        assert any(text.startswith(begin) for text in found)
    assert [text for text in found if text[0] not in "詩問mr"] == sample(40, 0)[: sum(text[0] not in "詩問mr" for text in found)]


def test_a_mixture_is_prepared_once_for_its_weights_and_files(tmp_path):
    long, short = write_two(tmp_path)
    settings = {"vocab_size": 300, "cache": tmp_path / "cache"}
    folder = prepare_data(f"{long}=0.7+{short}=0.3", **settings)[0].folder
    assert prepare_data(f"{long}=7+{short}=3", **settings)[0].folder == folder, "the same shares"
    assert prepare_data(f"{long}=0.6+{short}=0.4", **settings)[0].folder != folder
    assert prepare_data(f"{long}=0.7+toy=0.3", **settings)[0].folder != folder
    write_jsonl(short, [f"other {i}" for i in range(700)])
    train, valid, tokenizer = prepare_data(f"{long}=0.7+{short}=0.3", **settings)
    assert train.folder != folder and any(text.startswith("other") for text in texts_of((train, valid), tokenizer))
    with pytest.raises(UserError, match="lies inside .* would read itself"):
        split_source(f"{tmp_path}=0.5+toy=0.5", tmp_path / "out")


def test_a_mixture_of_one_source_is_that_source(tmp_path):
    "Before, toy=1 and toy shared a cache folder, and whoever came first chose its tokenizer."
    assert DataConfig("toy=1") == DataConfig("toy") and DataConfig("toy=1").named == "toy"
    with pytest.raises(UserError, match="expected 1 to 1,000,000 documents"):
        DataConfig("toy=1", limit=10**7)
    for name, texts in (("train", ["a", "b"]), ("valid", ["c"])):
        write_jsonl(tmp_path / "split" / f"{name}.jsonl", texts)
    train, valid, tokenizer = prepare_data(f"{tmp_path / 'split'}=2", cache=tmp_path / "cache", vocab_size=300)
    assert texts_of([train], tokenizer) == {"a", "b"} and texts_of([valid], tokenizer) == {"c"}


def test_a_network_that_fails_leaves_nothing_half(tmp_path, monkeypatch):
    def breaks(*_):
        yield from TEXTS
        raise UserError("some/data: reading stopped after 300 rows")

    _, short = write_two(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_documents", breaks)
        for source in ("some/data", "some/data=0.5+toy=0.5"):
            with pytest.raises(UserError, match="reading stopped"):
                prepare_data(source, limit=10_000, cache=tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".lock"}


def test_resume_on_a_mixture_is_exact_even_if_it_is_prepared_again(tmp_path, monkeypatch):
    from nanollada import trainer
    from nanollada.pretrain import PretrainConfig, pretrain
    long, short = write_two(tmp_path)

    def run(name: str, **train) -> bytes:
        settings = dict(steps=4, batch_size=4, eval_every=2, save_every=2, log_every=1, progress=False, precision="no", device="cpu")
        pretrain(PretrainConfig(data=f"{long}=0.7+{short}=0.3", out=tmp_path / name, preset="toy", vocab_size=300, length=32,
                                cache=tmp_path / "cache", objective="diffusion", train=trainer.TrainConfig(**settings | train)))
        return (tmp_path / name / "model.safetensors").read_bytes()

    def draw_or_die(objective, rows, cfg, step, now, real=trainer.draw_update):
        if step == 3:
            raise KeyboardInterrupt
        return real(objective, rows, cfg, step, now)

    whole = run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "draw_update", draw_or_die)
        run("half")
    shutil.rmtree(tmp_path / "cache")
    assert run("half", resume=True) == whole


# Streams


def test_stream_is_bos_ids_eos(stream, tokenizer):
    assert len(stream.doc_starts) == 301 and stream.meta["eos_id"] == 2
    assert documents_of(stream) == [[1, *encode(tokenizer, text), 2] for text in TEXTS]
    assert len(stream) == stream.doc_starts[-1] == stream.meta["tokens"]
    assert stream.tokens.dtype == np.uint16 and "300 documents" in repr(stream)


def test_batches_of_any_size_give_the_same_files(stream, tokenizer, tmp_path, monkeypatch):
    sizes, encode_batch = [], module.encode_batch
    monkeypatch.setattr(module, "islice", lambda documents, n: itertools.islice(documents, 7))
    monkeypatch.setattr(module, "encode_batch", lambda t, texts: sizes.append(len(texts)) or encode_batch(t, texts))
    build_stream(TEXTS, tokenizer, tmp_path)
    assert sizes == 42 * [7] + [6]
    for name in ("tokens.bin", "documents.bin", "meta.json"):
        assert (tmp_path / name).read_bytes() == (stream.folder / name).read_bytes()


def test_documents_cannot_smuggle_special_tokens(tokenizer, tmp_path):
    ids = build_stream(["a<|mask|>b<|im_end|>", "c"], tokenizer, tmp_path).tokens
    assert (ids == 3).sum() == 0 and (ids == 2).sum() == 2 and (ids == 1).sum() == 2


def test_wide_vocabulary_needs_four_bytes(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{n}": n for n in range(65_537)} | {"</s>": 65_537}, unk_token="w0"))
    wide = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="</s>", eos_token="</s>", pad_token="</s>")
    stream = build_stream(["w65536"], wide, tmp_path)
    assert stream.tokens.dtype == np.uint32 and stream.tokens.tolist() == [65_537, 65_536, 65_537]


def test_interrupted_build_leaves_no_stream(tokenizer, tmp_path):
    build_stream(["old"], tokenizer, tmp_path)

    def breaks():
        yield "new"
        raise UserError("bad line")

    with pytest.raises(UserError, match="bad line"):
        build_stream(breaks(), tokenizer, tmp_path)
    with pytest.raises(UserError, match="no such file"):
        TokenStream(tmp_path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name, damage", [
    ("tokens.bin", lambda p: p.write_bytes(p.read_bytes()[:-1])), ("tokens.bin", lambda p: p.unlink()),
    ("documents.bin", lambda p: p.write_bytes(b"")), ("documents.bin", lambda p: p.write_bytes(bytes(16))), ("meta.json", lambda p: p.write_text("{}")),
    ("meta.json", lambda p: p.write_text('{"dtype": "x", "tokens": "y"}')),
])
def test_damaged_streams_are_refused(tokenizer, tmp_path, name, damage):
    build_stream(["abcdefghijk"], tokenizer, tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UserError, match="damaged .*prepare the data again"):
        TokenStream(tmp_path)


def test_no_documents(tokenizer, tmp_path):
    with pytest.raises(AssertionError, match="no documents"):
        build_stream([], tokenizer, tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl: no documents"):
        prepare_data(tmp_path / "empty.jsonl", cache=tmp_path / "cache")


def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path):
    def peak(n: int) -> int:
        tracemalloc.start()
        build_stream((f"text number {i:06} " * 20 for i in range(n)), tokenizer, tmp_path)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(400)
    small, large = peak(3000), peak(12_000)
    assert large < small + 9000 * 4, "less than four bytes for each further document of 300 characters"


# Windows


@pytest.mark.parametrize("length", [2, 7, 32, 300])
def test_packed_windows_equal_the_slow_way(stream, length):
    owner = np.array([i for i, ids in enumerate(documents_of(stream)) for _ in ids])
    windows = Windows(stream, length, document_mask=True)
    assert len(windows) == len(stream) // length
    rows = [len(windows) - 1, 0, len(windows) // 2]
    batch = windows.batch(torch.tensor(rows))
    for row, n in enumerate(rows):
        cut = slice(n * length, (n + 1) * length)
        assert batch["ids"][row].tolist() == stream.tokens[cut].tolist()
        assert batch["document_ids"][row].tolist() == (owner[cut] - owner[cut][0]).tolist()
    assert batch["scored"][:, 1:].all() and not batch["scored"][:, 0].any()
    assert [t.dtype for t in batch.values()] == [torch.int64, torch.bool, torch.int64]
    assert set(Windows(stream, length).batch(rows)) == {"ids", "scored"}


def test_unpacked_windows_are_documents(stream):
    length = int(np.median(np.diff(stream.doc_starts)))
    batch = Windows(stream, length, pack=False).batch(torch.arange(300))
    for i, document in enumerate(ids[:length] for ids in documents_of(stream)):
        assert batch["ids"][i].tolist() == document + [2] * (length - len(document))
        assert batch["scored"][i].tolist() == [0 < j < len(document) for j in range(length)]
        assert batch["maskable"][i].tolist() == [j > 0 for j in range(length)]
    assert set(batch) == {"ids", "scored", "maskable"} and batch["ids"].dtype == torch.int64


@pytest.mark.parametrize("settings", [{"length": 10**6}, {"length": 1}, {"length": 0},
                                      *({"length": 8, "random_length": x} for x in (-1, 2, float("nan")))])
def test_window_errors(stream, settings):
    "attack.md: --random-length of -1, 2 and nan were accepted in silence."
    with pytest.raises(UserError):
        Windows(stream, **settings)


@pytest.mark.parametrize("rows", [[-1], [10**9], []])
def test_rows_must_exist(stream, rows):
    with pytest.raises(AssertionError, match="of "):
        Windows(stream, 8).batch(rows)


def test_random_length_cuts_whole_batches_uniformly(stream):
    windows, generator = Windows(stream, 10, random_length=1.0, document_mask=True), torch.Generator().manual_seed(0)
    whole, cut = windows.batch(range(3)), [windows.batch(range(3), generator) for _ in range(3600)]
    lengths = Counter(rows["ids"].shape[1] for rows in cut)
    assert sorted(lengths) == list(range(2, 11))
    assert all(abs(n - 400) < 5 * (3600 * (1 / 9) * (8 / 9)) ** 0.5 for n in lengths.values())
    for rows in cut[:20]:
        assert len({value.shape for value in rows.values()}) == 1
        assert all(torch.equal(rows[name], whole[name][:, : rows["ids"].shape[1]]) for name in whole)


@pytest.mark.parametrize("pack", [True, False])
def test_a_cut_batch_always_has_something_to_predict(stream, pack):
    "code.md 1, attack A: a batch cut to one column left nothing to predict, and the run died for good at that update."
    windows = Windows(stream, 4, pack=pack, random_length=1.0)
    for seed in range(50):
        rows = windows.batch([0, 1], torch.Generator().manual_seed(seed))
        assert (Autoregressive().noise(rows)["count"] >= 1).all() and rows["ids"].shape[1] >= 2
    assert Windows(stream, 4, random_length=1.0).batch([0])["ids"].shape == (1, 4), "never cut without a generator"


def test_random_length_draws_the_same_numbers_cut_or_not(stream):
    states = []
    for share in (0.0, 1.0):
        generator = torch.Generator().manual_seed(1)
        rows = Windows(stream, 10, random_length=share).batch([0], generator)
        states.append(generator.get_state())
        assert (rows["ids"].shape[1] < 10) == bool(share)
    assert torch.equal(*states)


# All in one


def test_prepare_data_end_to_end_and_cached(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS, "body")
    cfg = DataConfig(path, vocab_size=300, valid_fraction=0.1, field="body", cache=tmp_path / "cache")
    train, valid, tokenizer = prepare_data(cfg)
    assert texts_of((train, valid), tokenizer) == set(TEXTS) and len(tokenizer) == 300
    assert len(valid.doc_starts) - 1 == sum(held_out_rank(text) < 0.1 for text in TEXTS) or len(valid.doc_starts) == 31
    (folder,) = (tmp_path / "cache").iterdir()
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert not {name for name in kept if name.endswith((".jsonl", ".tmp"))}, "no copy of the text stays"
    for name in ("build_stream", "train_tokenizer", "split_source"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("made again"))
    again = prepare_data(cfg)
    assert len(again[0]) == len(train) and again[2].get_vocab() == tokenizer.get_vocab()


def test_prepare_data_notices_changes(tmp_path):
    path, settings = write_jsonl(tmp_path / "a.jsonl", TEXTS), {"vocab_size": 300, "cache": tmp_path / "cache"}
    train, valid, _ = prepare_data(path, **settings)
    limited = prepare_data(path, limit=100, **settings)
    assert len(train.doc_starts) + len(valid.doc_starts) == 302
    assert len(limited[0].doc_starts) + len(limited[1].doc_starts) == 102
    assert len(prepare_data(path, **settings | {"vocab_size": 310})[2]) == 310
    write_jsonl(path, TEXTS[:50])
    assert len(prepare_data(path, **settings)[0].doc_starts) == 46


def test_two_corpora_of_one_name_do_not_overwrite_each_other(tmp_path):
    "code.md 24: a/poems and b/poems shared a cache folder; even of one size and date they do not."
    paths = [write_jsonl(tmp_path / name / "poems.jsonl", [f"{name} {n}" for n in range(300)]) for name in "ab"]
    for path in paths:
        os.utime(path, (1, 1))
    assert paths[0].stat().st_size == paths[1].stat().st_size
    settings = {"vocab_size": 300, "cache": tmp_path / "cache"}
    made = [prepare_data(path, **settings) for path in paths]
    for name, (train, valid, tokenizer), path in zip("ab", made, paths):
        assert texts_of((train, valid), tokenizer) == {f"{name} {n}" for n in range(300)}
        assert prepare_data(path, **settings)[0].folder == train.folder


def test_builders_of_one_cache_take_turns(tmp_path):
    "Attack D: two files of one name and one cache, started together: some runs trained on the other file."
    for name in "xy":
        write_jsonl(tmp_path / name / "same.jsonl", [f"{name}{n}" for n in range(300)])

    def prepare(name: str) -> set[str]:
        train, valid, tokenizer = prepare_data(tmp_path / name / "same.jsonl", cache=tmp_path / "c", vocab_size=300)
        return {text[0] for text in texts_of((train, valid), tokenizer)}

    with ThreadPoolExecutor(6) as pool:  # the lock is one of open files, so threads meet it as processes do
        assert list(pool.map(prepare, "xyxyxy")) == [{"x"}, {"y"}] * 3
    assert len(list((tmp_path / "c").iterdir())) == 2


KILLED = """
import sys
from nanollada import data
def encode_batch(tokenizer, texts, real=data.encode_batch):
    print("tokenizing", flush=True)
    import time; time.sleep(0.05)
    return real(tokenizer, texts)
data.encode_batch = encode_batch
data.prepare_data(sys.argv[1], cache=sys.argv[2], vocab_size=300)
"""


def test_killed_tokenizing_leaves_no_workers_and_no_litter(tmp_path):
    "user.md F, attack.md: `kill -9` left workers alive, and files named .PID.tmp that nobody removed."
    path = write_jsonl(tmp_path / "a.jsonl", [f"{text} {n}" for n in range(100) for text in TEXTS])
    process = subprocess.Popen([sys.executable, "-c", KILLED, path, tmp_path / "cache"], stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, start_new_session=True)
    assert process.stdout.readline() == "tokenizing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(50):  # whoever is left of the process group
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process outlived the one that was killed")
    left = list((tmp_path / "cache").rglob("*.tmp"))
    assert left, "killed in the middle"
    prepare_data(path, cache=tmp_path / "cache", vocab_size=300)
    assert not list((tmp_path / "cache").rglob("*.tmp")) and not list((tmp_path / "cache").rglob("*.jsonl"))


def test_a_split_killed_in_the_middle_is_cleaned_up_by_the_next(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".train.jsonl.4711.tmp").write_text("half")
    split(tmp_path, TEXTS)
    assert not list((tmp_path / "out").glob("*.tmp")) and not list((tmp_path / "out").glob(".*.tmp"))


def test_a_split_folder_obeys_limit_field_and_skip_bad_lines(tmp_path, tokenizer):
    "code.md 4: a folder with train.jsonl and valid.jsonl ignored all three (limit=10 trained on 400)."
    for name, texts in (("train", TEXTS[:200]), ("valid", TEXTS[200:])):
        write_jsonl(tmp_path / "split" / f"{name}.jsonl", texts, "body")
        with open(tmp_path / "split" / f"{name}.jsonl", "a") as file:
            file.write("not JSON\n")
    settings = {"tokenizer": tokenizer, "cache": tmp_path / "split" / "cache"}
    train, valid, used = prepare_data(tmp_path / "split", field="body", limit=10, **settings)
    assert len(train.doc_starts) == 11 and len(valid.doc_starts) == 11 and used is tokenizer
    with pytest.raises(UserError, match="train.jsonl:1: .*'text'"):
        prepare_data(tmp_path / "split", **settings)
    with pytest.raises(UserError, match="train.jsonl:201: not JSON"):
        prepare_data(tmp_path / "split", field="body", **settings)
    train, valid, _ = prepare_data(tmp_path / "split", field="body", skip_bad_lines=True, **settings)
    assert texts_of([train], tokenizer) == set(TEXTS[:200]) and texts_of([valid], tokenizer) == set(TEXTS[200:])


def test_prepare_data_takes_a_tokenizer_or_its_folder(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folders = set()
    for given in (tokenizer, tmp_path / "tokenizer", str(tmp_path / "tokenizer")):
        train, valid, used = prepare_data(path, tokenizer=given, cache=tmp_path / "cache")
        assert used.get_vocab() == tokenizer.get_vocab() and texts_of((train, valid), used) == set(TEXTS)
        folders.add(train.folder)
    assert len(folders) == 1 and prepare_data(path, cache=tmp_path / "cache", vocab_size=300)[0].folder not in folders


def test_prepare_toy_draws_fresh_validation_stories(tmp_path):
    train, valid, tokenizer = prepare_data("toy", limit=200, valid_fraction=0.1, vocab_size=300, cache=tmp_path)
    assert [tokenizer.decode(ids[1:-1]) for ids in documents_of(train)] == sample(200, 0)
    assert [tokenizer.decode(ids[1:-1]) for ids in documents_of(valid)] == sample(20, 1)
    assert len(prepare_data("toy", limit=200, vocab_size=300, cache=tmp_path)[1].doc_starts) == 21


def test_poetry_obeys_its_options(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOLLADA_CACHE", str(tmp_path))
    for name in ("tang", "song"):
        (tmp_path / "poetry").mkdir(exist_ok=True)
        poems = [{"title": "", "author": "", "paragraphs": [f"{name} {n}"]} for n in range(98, 102)]
        (tmp_path / "poetry" / f"poet.{name}.0.json").write_text(json.dumps(poems))
    assert len(list(open_source("poetry"))) == 8
    assert list(open_source("poetry", dynasty="tang", min_chars=8, limit=1)) == ["tang 100"]
    assert set(open_source("poetry", max_chars=7)) == {f"{name} {n}" for name in ("tang", "song") for n in (98, 99)}
    pytest.importorskip("opencc")
    (tmp_path / "poetry" / "poet.tang.0.json").write_text(json.dumps([{"paragraphs": ["舉頭望山月"]}]))
    assert next(open_source("poetry", simplified=True)) == "举头望山月" and next(open_source("poetry")) == "舉頭望山月"


def test_a_full_disk_is_explained(tokenizer, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_jsonl(tmp_path / "source.jsonl", TEXTS * 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        for attempt in (lambda: split_source(tmp_path / "source.jsonl", tmp_path / "out"),
                        lambda: build_stream(TEXTS, tokenizer, tmp_path / "out")):
            with pytest.raises(UserError, match="disk is full or the file too large"):
                attempt()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}
