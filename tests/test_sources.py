"Every source, every complaint: one line that names file and line, and no reading without end."

import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from nanollada import sources as module
from nanollada.core import UserError
from nanollada.sources import fetch_minimind, fetch_poetry, read_documents, read_poems, read_records, source_files


ROOT = Path(__file__).parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOLLADA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_jsonl(path: Path, records: list) -> Path:
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


def test_hub_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    data = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a", "b"]})})
    monkeypatch.setattr(module, "fetch_from_hub", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: data)
    assert list(read_documents("some/data")) == ["a", "b"] and asked == [("some/data", ["README.md"], "dataset")]


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



def test_poetry_comes_by_npm_from_one_pinned_version(cache, monkeypatch, tmp_path):
    put_poems(tmp_path / "package" / "dist" / "quantangshi")
    commands = []

    def npm(command, cwd, **settings):
        commands.append(" ".join(command))
        with tarfile.open(Path(cwd) / "chinese-poetry-2.0.1.tgz", "w:gz") as package:
            package.add(tmp_path / "package", "package")

    monkeypatch.setattr(subprocess, "run", npm)
    assert len(list(fetch_poetry().glob("*.json"))) == 3 == len(list(fetch_poetry().glob("*.json")))
    assert commands == ["npm pack chinese-poetry@2.0.1 --silent"]
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


def test_minimind(cache, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="minimind_dataset: not here nor on the hub .*HF_ENDPOINT"):
        fetch_minimind()
    monkeypatch.setattr(module, "fetch_from_hub", lambda repo, files, repo_type: tmp_path)
    write_jsonl(tmp_path / "pretrain_hq.jsonl", [{"text": "hub"}])
    assert list(read_documents("minimind")) == ["hub"]
    (cache / "minimind").mkdir(parents=True)
    shutil.move(tmp_path / "pretrain_hq.jsonl", cache / "minimind" / "sft_mini_512.jsonl")
    assert fetch_minimind("sft_mini_512.jsonl") == cache / "minimind" / "sft_mini_512.jsonl"
