"Every source, every complaint: one line that names file and line, and no reading without end."

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from nanollada import sources as module
from nanollada.core import UserError
from nanollada.sources import (CORPORA, corpora_table, fetch_minimind, fetch_poetry, hub_id, read_documents, read_poems,
                               read_records, source_files)


ROOT = Path(__file__).parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOLLADA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def test_jsonl_field_bom_blank_lines_and_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeff".encode() + '{"body": "a\u2028b"}\r\n\n  \n{"body": " "}\n{"body": "二"}'.encode())
    assert list(read_documents(path, field="body")) == ["a\u2028b", "二"]


@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_conversations(tmp_path, name):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert list(read_documents(write_jsonl(tmp_path / "a.jsonl", [{name: turns}]))) == ["hi\nyo"]


def test_text_files_are_cut_at_blank_lines_and_lose_carriage_returns(tmp_path):
    "attack.md: CRLF .txt kept a carriage return inside documents."
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\r\n two\r\n\r\n \t\nthree\n\n\n")
    assert list(read_documents(path)) == ["one\n two", "three"]
    assert list(read_documents(path, whole_files=True)) == ["\n\none\n two\n\n \t\nthree\n\n"]


def test_folder_is_read_in_name_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "2"}])
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "c").mkdir()
    write_jsonl(tmp_path / "c" / "d.jsonl", [{"text": "3"}])
    (tmp_path / "ignored.csv").write_text("x")
    (tmp_path / "folder.txt").mkdir()
    assert list(read_documents(tmp_path)) == ["1", "2", "3"]


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["a", "", "b"]})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "three"))
    assert list(read_documents(tmp_path / "one")) == list(read_documents(tmp_path / "two")) == ["a", "b"]
    with pytest.raises(UserError, match="no file, folder or data set with a split 'train'"):
        list(read_documents(tmp_path / "three"))
    with pytest.raises(UserError, match="row 0: .*found 'text'"):
        list(read_documents(tmp_path / "one", field="body"))


class Shards(BaseHTTPRequestHandler):
    "Shards of a data set, 50 rows each; a request for shard `broken` or a later one is cut off in the middle."
    protocol_version, asked, broken = "HTTP/1.1", [], 99

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> bytes:
        number = int(re.search(r"(\d+)\.jsonl", self.path).group(1))
        body = "".join(json.dumps({"text": f"shard {number} row {n}"}) + "\n" for n in range(50)).encode()
        cut = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = body[int(cut[1]) : int(cut[2] or len(body)) + 1] if cut else body
        self.send_response(206 if cut else 200)
        if cut:
            self.send_header("Content-Range", f"bytes {cut[1]}-{int(cut[1]) + len(part) - 1}/{len(body)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return part if number < self.broken else part[: len(part) // 2]

    def do_GET(self) -> None:
        if "Range" in self.headers:  # without one only the size is looked at
            self.asked.append(self.path)
        self.wfile.write(self.do_HEAD())
        self.close_connection = True  # or a client waits for the rest


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A server of this machine in the place of the hub: `datasets` streams its shards as it streams any others."
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(Shards, "asked", [])
    server, load = ThreadingHTTPServer(("127.0.0.1", 0), Shards), datasets.load_dataset
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls, calls = [f"http://127.0.0.1:{server.server_port}/{n}.jsonl" for n in range(8)], []

    def load_dataset(name, config=None, **settings):
        calls.append((name, config, settings))
        return load("json", data_files={"train": urls, "test": urls[-1:]}, **settings)

    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("---\nlanguage: en\nlicense: odc-by\n---\n")
    monkeypatch.setattr(module, "fetch_from_hub", lambda *_: tmp_path / "card")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    yield calls
    server.shutdown()
    server.server_close()


def test_a_stream_stops_where_the_reader_stops_and_stores_nothing(hub, tmp_path):
    wanted = list(islice(read_documents("some/data"), 60))
    assert wanted == [f"shard {n // 50} row {n % 50}" for n in range(60)]
    assert {Path(path).stem for path in Shards.asked} == {"0", "1"}, "the other six shards were never asked for"
    assert hub == [("some/data", None, {"split": "train", "streaming": True})]
    assert sum(path.stat().st_size for path in (tmp_path / "hub").rglob("*") if path.is_file()) == 0


@pytest.mark.parametrize("source, asked", [
    ("tinystories", ("roneneldan/TinyStories", None, "train")),
    ("fineweb-edu", ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")),
    ("opencsg/Fineweb-Edu-Chinese-V2.1:4_5:test", ("opencsg/Fineweb-Edu-Chinese-V2.1", "4_5", "test")),
    ("some/data::test", ("some/data", None, "test")),
])
def test_name_config_and_split_reach_the_hub(hub, source, asked):
    assert hub_id(source) == asked and source_files(source) == []
    assert next(read_documents(source)) == ("shard 7 row 0" if asked[2] == "test" else "shard 0 row 0")
    assert hub == [(asked[0], asked[1], {"split": asked[2], "streaming": True})]


@pytest.mark.parametrize("source", ["some/data.jsonl", "../etc", "some/..", "some/data:x/../y", "some/data:..:train", "some/data\n",
                                    "some/data:a:b:c", "some//data", "/some/data", "some/da ta", "some/dat\x1b[31ma",
                                    "sôme/data", "some/data:a;b", "toy", "", "x" * 5000, "some/" + "x/" * 3000, "a\0b/c"])
def test_what_is_not_written_as_a_data_set_is_never_asked_for(monkeypatch, source):
    monkeypatch.setattr(module, "fetch_from_hub", lambda *_: pytest.fail("asked the hub"))
    assert hub_id(source) is None
    if source:
        with pytest.raises(UserError, match="no such file or folder"):
            list(read_documents(source))


def test_a_stream_that_breaks_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(Shards, "broken", 2)
    documents = read_documents("some/data")
    assert len(list(islice(documents, 100))) == 100
    with pytest.raises(UserError, match=r"some/data: reading stopped after 100 rows, start again \(.*\)$") as caught:
        next(documents)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_split_that_is_not_there_is_said(hub):
    with pytest.raises(UserError, match="some/data::dev: no file, folder or data set with a split 'dev' .*Available") as caught:
        list(read_documents("some/data::dev"))
    assert "\n" not in str(caught.value)


# Licences


def test_licence_and_size_are_said_before_the_first_byte(hub, monkeypatch, caplog):
    monkeypatch.setattr(module.import_module("datasets"), "load_dataset", lambda *_, **__: (_ for _ in [pytest.fail("too early")])
                        if not caplog.messages else iter([{"text": "x"}]))
    for source, words in (("tinystories", r"downloading tinystories: .* about 1 GB in all, streamed as far as it is read, licence CDLA-Sharing-1.0: https://hug"),
                          ("fineweb-edu", r"about 29 GB in all, streamed as far as it is read, licence ODC-By-1.0"),
                          ("some/data:x", r"downloading some/data:x: licence odc-by; .* see https://huggingface.co/datasets/some/data$")):
        caplog.clear()
        assert list(read_documents(source)) == ["x"] and len(caplog.messages) == 1
        assert re.search(words, caplog.messages[0]) and caplog.records[0].levelname == "WARNING"


@pytest.mark.parametrize("card, licence", [("license: mit\n", "mit"), ("license: \"mit\"\n", "mit"), ("license:\n- cc-by-4.0\n- mit\n", "cc-by-4.0"), ("", "not named"),
                                           ("license:\nlanguage: en\n", "not named"), ("# license: mit", "not named"),
                                           ("license: \x1b[31mred", "not named"), ("\udcff license: mit", "not named")])
def test_the_licence_of_any_data_set_is_that_of_its_card(tmp_path, caplog, card, licence):
    (tmp_path / "README.md").write_text(card, errors="surrogateescape")
    module._announce("some/data", tmp_path / "README.md")
    assert f": licence {licence};" in caplog.messages[0]


def test_the_command_shows_the_line_on_stderr(tmp_path):
    "A warning needs no configuration; here the download then fails, for there is no network."
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "NANOLLADA_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-m", "nanollada", "data", "minimind", "--out", "out"], cwd=tmp_path,
                           env={**os.environ, **hub}, capture_output=True, text=True)
    first, second = found.stderr.strip().split("\n")
    assert first.startswith("nanollada: warning: downloading minimind: ") and "1.6 GB, licence Apache-2.0" in first
    assert "not here nor on the hub" in second and found.returncode == 1 and not found.stdout


def test_the_table_has_every_corpus_with_licence_and_size():
    lines = corpora_table().split("\n")
    assert [line.split()[0] for line in lines] == ["name", "toy", "poetry", "minimind", "tinystories", "fineweb-edu"]
    assert all(one.licence in corpora_table() and f"{one.documents:,}" in corpora_table() for one in CORPORA.values())
    assert "2,119,719" in lines[4] and "CDLA-Sharing-1.0" in lines[4] and "ODC-By-1.0" in lines[5] and "MIT" in lines[2]


@pytest.mark.parametrize("library, extra, use", [
    ("datasets", "hub", lambda: next(read_documents("some/data"))),
    ("opencc", "chinese", lambda: next(read_poems(simplified=True))),
])
def test_a_missing_extra_is_one_line_with_its_remedy(monkeypatch, library, extra, use):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library} is not installed: pip install 'nanollada\[{extra}\]'$"):
        use()


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_mistyped_path_is_said_at_once(tmp_path, offline):
    "user.md J: it cost 31 s of retries, because only `load_dataset` asked the hub."
    code = ("import time, datasets\nfrom nanollada.sources import read_documents\nfrom nanollada.core import UserError\n"
            "start = time.monotonic()\n"
            "try: list(read_documents('no-such-name/dta'))\n"
            "except UserError as error: print(time.monotonic() - start); print(error)")
    hub = {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, **hub, "PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True, cwd=tmp_path)
    seconds, message = found.stdout.strip().split("\n")
    assert float(seconds) < 10 and message.startswith("no-such-name/dta: no file, folder or data set")




BAD_LINES = [
    (b'{"text": "cut', r"a.jsonl:2: not JSON"),
    (b'{"body": "x", "id": 1}', r"a.jsonl:2: expected a text in the field 'text'; found 'body', 'id'"),
    (b"{}", r"a.jsonl:2: expected a text in the field 'text'"),
    (b'{"text": 7}', r"a.jsonl:2: expected a text"),
    (b'{"text": null}', r"a.jsonl:2: expected a text"),
    (b'{"text": {"text": "x"}}', r"a.jsonl:2: expected a text"),
    (b'["text"]', r"a.jsonl:2: expected a text in the field 'text'; found list"),
    (b'{"text": "caf\xe9"}', r"a.jsonl:2: not UTF-8 \(character 4\)"),
    (b'{"text": "\\ud83d"}', r"a.jsonl:2: not UTF-8"),
    (b'{"messages": [{"role": "user"}]}', r"a.jsonl:2: expected a text .*found 'messages'"),
    (b'{"messages": "hi"}', r"a.jsonl:2: expected a text .*found 'messages'"),
    (b'{"messages": [{"content": 7}]}', r"a.jsonl:2: expected a text .*found 'messages'"),
    (b"[" * 100_000, r"a.jsonl:2: not JSON"),  # attack.md: nested 10^5 deep
    (b'{"text": "x", "n": ' + b"7" * 5000 + b"}", r"a.jsonl:2: not JSON"),  # attack.md: an integer of 5,000 digits
]


@pytest.mark.parametrize("line, words", BAD_LINES)
def test_bad_lines_are_named_or_skipped_and_counted(tmp_path, caplog, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "also"}\n')
    with pytest.raises(UserError, match=words) as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert list(read_documents(path, skip_bad_lines=True)) == ["fine", "also"]
    assert caplog.record_tuples == [("nanollada.sources", logging.WARNING, f"{path}: 1 bad lines skipped")]


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b"", "no documents"),
    ("a.txt", b"\n \n", "no documents"),
    ("a.csv", b"a,b", "expected a regular .jsonl or .txt file"),
    ("a.txt", "x\n\ncafé".encode("latin-1"), r"a.txt:3: not UTF-8 \(character 4"),
    ("a.txt", "hi".encode("utf-16"), "a.txt:1: not UTF-8"),
    ("a.jsonl", b'{"body": "x"}\n{"body": "y"}\n', "a.jsonl:1: "),
])
def test_unusable_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_documents(tmp_path / name))


def test_all_lines_skipped_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}, {"body": "y"}])
    with pytest.raises(UserError, match="no documents in it .2 bad lines"):
        list(read_documents(path, skip_bad_lines=True))


def test_what_is_no_source(tmp_path):
    for source in (tmp_path / "no.jsonl", "toyy", "./some/data", "some/data.jsonl"):
        with pytest.raises(UserError, match="no such file or folder; named sources are toy"):
            source_files(source)
    with pytest.raises(UserError, match="expected a regular .jsonl or .txt file"):
        source_files(tmp_path)
    (tmp_path / "data").mkdir()
    os.chdir(tmp_path)
    with pytest.raises(UserError, match="data/trian: no such file or folder"):  # not looked for on the hub
        source_files("data/trian")


@pytest.mark.parametrize("kind", ["pipe", "device", "broken link"])
@pytest.mark.parametrize("inside", [True, False])
def test_only_regular_files_are_read(tmp_path, kind, inside):
    "attack.md: a folder with x.jsonl -> /dev/zero ended in MemoryError, a FIFO named x.jsonl in a hang."
    path = tmp_path / "x.jsonl"
    write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}])
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "gone")
    start = time.monotonic()
    with pytest.raises(UserError, match="x.jsonl: expected a regular .jsonl or .txt file"):
        list(read_documents(tmp_path if inside else path))
    assert time.monotonic() - start < 5


def test_records_carry_their_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n[2\n"three"\n')
    (_, first), (place, second), (_, third) = read_records(path)
    assert first == {"a": 1} and isinstance(second, UserError) and place == f"{path}:2" and third == "three"


# Downloads


def put_poems(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, number in (("song", 0), ("tang", 1000), ("tang", 0)):
        poem = {"title": "題", "author": "誰", "paragraphs": ["愛國。", f"{name} {number}"], "id": "1"}
        text = json.dumps([poem, {**poem, "paragraphs": []}])
        (folder / f"poet.{name}.{number}.json").write_text(text, encoding="utf-8")


def test_poems(cache):
    put_poems(cache / "poetry")
    assert [poem["text"] for poem in read_poems()] == ["愛國。\ntang 0", "愛國。\ntang 1000", "愛國。\nsong 0"]
    assert list(read_poems("song")) == [{"dynasty": "song", "title": "題", "author": "誰", "text": "愛國。\nsong 0"}]
    assert len(list(read_poems(max_chars=10))) == 2 and len(list(read_poems(min_chars=11))) == 1



def test_poetry_comes_by_npm_from_one_pinned_version(cache, monkeypatch, tmp_path, caplog):
    put_poems(tmp_path / "package" / "dist" / "quantangshi")
    commands = []

    def npm(command, cwd, **settings):
        commands.append(" ".join(command))
        with tarfile.open(Path(cwd) / "chinese-poetry-2.0.1.tgz", "w:gz") as package:
            package.add(tmp_path / "package", "package")

    monkeypatch.setattr(subprocess, "run", npm)
    assert len(list(fetch_poetry().glob("*.json"))) == 3 == len(list(fetch_poetry().glob("*.json")))
    assert commands == ["npm pack chinese-poetry@2.0.1 --silent"]
    assert len(caplog.messages) == 1 and re.match("downloading poetry: .* about 85 MB, licence MIT: https", caplog.messages[0])
    assert [path.name for path in cache.iterdir()] == ["poetry"], "no download is left behind"


@pytest.mark.parametrize("error", [FileNotFoundError("npm"), subprocess.TimeoutExpired("npm", 1200)])
def test_poetry_without_npm_says_what_to_do(cache, monkeypatch, error):
    def fails(*arguments, **settings):
        raise error

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(UserError, match=f"npm pack chinese-poetry@2.0.1.* into {cache}"):
        fetch_poetry()
    assert not list(cache.iterdir())


def test_npm_that_leaves_no_package_is_a_user_error(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **settings: None)
    with pytest.raises(UserError, match=f"npm pack chinese-poetry@2.0.1.* into {cache}"):
        fetch_poetry()


def test_poetry_fetched_by_another_process_meanwhile(cache, monkeypatch):
    def npm(*arguments, **settings):
        put_poems(cache / "poetry")
        raise OSError("too late")

    monkeypatch.setattr(subprocess, "run", npm)
    assert fetch_poetry() == cache / "poetry"


def test_minimind(cache, monkeypatch, tmp_path, caplog):
    with pytest.raises(UserError, match="minimind_dataset: not here nor on the hub .*HF_ENDPOINT"):
        fetch_minimind()
    asked = []
    monkeypatch.setattr(module, "fetch_from_hub", lambda *arguments: asked.append(arguments) or tmp_path)
    write_jsonl(tmp_path / "pretrain_hq.jsonl", [{"text": "hub"}])
    caplog.clear()
    assert list(read_documents("minimind")) == ["hub"] and len(caplog.messages) == 1
    assert asked == [("jingyaogong/minimind_dataset", ["pretrain_hq.jsonl"], "dataset", asked[0][3])]
    assert re.fullmatch("[0-9a-f]{40}", asked[0][3]), "pinned: the newest version has other files"
    (cache / "minimind").mkdir(parents=True)
    shutil.move(tmp_path / "pretrain_hq.jsonl", cache / "minimind" / "sft_mini_512.jsonl")
    assert fetch_minimind("sft_mini_512.jsonl") == cache / "minimind" / "sft_mini_512.jsonl" and len(caplog.messages) == 1


def test_what_the_hub_library_has_is_not_announced(cache, monkeypatch, caplog):
    revision = []
    monkeypatch.setattr(module, "fetch_from_hub", lambda *arguments: revision.append(arguments[3]) or Path("folder"))
    assert fetch_minimind() == Path("folder/pretrain_hq.jsonl") and len(caplog.messages) == 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    kept = cache / "datasets--jingyaogong--minimind_dataset" / "snapshots" / revision[0] / "pretrain_hq.jsonl"
    write_jsonl(kept, [{"text": "x"}])
    assert fetch_minimind() == kept and len(caplog.messages) == 1


# Simplified characters


@pytest.mark.parametrize("traditional, simplified", [
    ("乾坤", "乾坤"), ("乾燥", "干燥"), ("樹幹", "树干"), ("干戈", "干戈"),  # 乾, 幹 and 干
    ("白髮", "白发"), ("發光", "发光"),  # 髮 and 發
    ("皇后", "皇后"), ("以後", "以后"),  # 后 and 後
    ("宮商角徵羽", "宫商角徵羽"), ("徵兵", "征兵"),  # a note of the scale, and a draft
    ("瞭望", "瞭望"), ("明瞭", "明了"), ("狼藉", "狼藉"), ("憑藉", "凭借"),
    ("春風不度玉門關", "春风不度玉门关"), ("舉頭望山月，低頭思故鄉。", "举头望山月，低头思故乡。"),
])
def test_simplified_poems_where_one_character_stands_for_several(cache, traditional, simplified):
    pytest.importorskip("opencc")
    (cache / "poetry").mkdir(parents=True)
    poem = {"title": traditional, "author": "劉禹錫", "paragraphs": [traditional, traditional]}
    (cache / "poetry" / "poet.tang.0.json").write_text(json.dumps([poem]), encoding="utf-8")
    assert list(read_poems("tang", simplified=True)) == [
        {"title": simplified, "author": "刘禹锡", "dynasty": "tang", "text": f"{simplified}\n{simplified}"}]
    assert next(read_poems("tang"))["text"] == f"{traditional}\n{traditional}"
