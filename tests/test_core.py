"Streams, devices, budgets and files: the promises everything else rests on."
import errno
import os
import subprocess
import sys

import pytest
import torch

from nanollada.core import (
    UserError, append_jsonl, atomic_path, by_budget, make_generator, pick_device, pick_precision, printable, read_json,
    read_jsonl, write_json,
)


def numbers(generator: torch.Generator) -> list[float]:
    return torch.rand(8, generator=generator).tolist()


def test_a_key_always_gives_the_same_stream_and_no_two_keys_share_one():
    keys = [("noise", step) for step in range(500)] + [("order", step) for step in range(500)] + [(), ("noise",)]
    streams = [tuple(numbers(make_generator(3, *key))) for key in keys]
    assert streams == [tuple(numbers(make_generator(3, *key))) for key in keys]
    assert len(set(streams)) == len(keys)
    assert numbers(make_generator(3, "a")) != numbers(make_generator(4, "a"))


def test_a_key_gives_the_same_stream_in_another_process_and_next_year():
    code = "import torch; from nanollada.core import make_generator as m; print(m(1, 'x', 2).initial_seed())"
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert seen == {"1443202553283129912\n"}


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    "attack.md: `make_generator(-1)`, and so `--seed=-1` of every verb."
    with pytest.raises(UserError, match=f"seed is {seed}; expected an integer from 0 to 4294967295"):
        make_generator(seed, "noise")


def test_a_stream_lives_where_it_is_used():
    assert make_generator(0, "a").device == torch.device("cpu")
    assert make_generator(0, "a", device="meta") is None
    assert torch.rand(3, device="meta", generator=make_generator(0, device=torch.device("meta"))).is_meta


def test_devices(monkeypatch):
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(UserError, match="'gpu'; this machine has"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device() == pick_device("auto") == torch.device("cuda") and pick_device("cuda:0").index == 0
    with pytest.raises(UserError, match="cuda:7"):
        pick_device("cuda:7")


def test_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert (pick_precision(cpu, "bf16"), pick_precision(cpu, "no")) == ("bf16", "no")
    for fast, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"amx_bf16": fast, "avx2": True}, raising=False)
        assert pick_precision(cpu) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (8, 0))
    assert [pick_precision(torch.device("cuda", number)) for number in (0, 1)] == ["bf16", "no"]


def test_budgets(monkeypatch):
    monkeypatch.setenv("NANOLLADA_BUDGET", "gpu")
    assert (by_budget(1, 2), by_budget(1, 2, 3), by_budget(1, 2, 0)) == (2, 3, 0)
    monkeypatch.delenv("NANOLLADA_BUDGET")
    assert by_budget(1, 2, 3) == 2
    monkeypatch.setenv("NANOLLADA_BUDGET", "fast")
    with pytest.raises(UserError, match="'fast'"):
        by_budget(1, 2)


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "deep" / "weights"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
    for error in (KeyboardInterrupt, RuntimeError, OSError(errno.EACCES, "no")):
        with pytest.raises(type(error) if isinstance(error, Exception) else error), atomic_path(path) as temporary:
            temporary.write_text("new")
            raise error
    assert path.read_text() == "old" and os.listdir(path.parent) == ["weights"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EFBIG, "File too large"),
                                   RuntimeError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_one_clear_line(tmp_path, error):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(UserError, match="disk is full or the file too large"), atomic_path(tmp_path / "a.json"):
        raise error
    assert read_json(tmp_path / "a.json") == 1


def test_a_limit_on_file_size_is_one_clear_line_and_harms_nothing(tmp_path):
    "attack.md: RLIMIT_FSIZE (EFBIG), for a library's own exception too."
    code = f"""
import resource, torch
from safetensors.torch import save_file
from nanollada.core import UserError, atomic_path, write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for name, write in (("a.json", lambda path: path.write_text("x" * 5000)),
                    ("a.safetensors", lambda path: save_file({{"w": torch.zeros(5000)}}, path))):
    try:
        with atomic_path({str(tmp_path)!r} + "/" + name) as path:
            write(path)
    except UserError as error:
        print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [line.split(": ", 1)[1] for line in printed.splitlines()] == ["the disk is full or the file too large: make room"] * 2
    assert os.listdir(tmp_path) == []


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, "old")
    code = f"""
import time
from nanollada.core import atomic_path
with atomic_path({str(path)!r}) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"writing"
    process.kill()
    process.wait()
    assert read_json(path) == "old"


def test_records_survive_a_cut_last_line_but_not_a_broken_middle(tmp_path):
    path = tmp_path / "m.jsonl"
    for step in range(3):
        append_jsonl(path, {"step": step, "text": "诗"})
    path.write_text(path.read_text() + '{"step": 3, "te')
    assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2: not JSON"):
        read_jsonl(path)
    path.write_text('{"step": 0}\n[]\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2: holds a list; expected a dict"):
        read_jsonl(path)


@pytest.mark.parametrize("content, words", [
    ("{", "not JSON"), ("[" * 10**5, "not JSON"), ("1" * 5000, "not JSON"), (b"\xff\xfe\x00", "not JSON"), ("", "not JSON"),
    ("[]", "holds a list; expected a dict"), ("null", "holds a NoneType; expected a dict"),
])
def test_broken_json_is_one_clear_line(tmp_path, content, words):
    "attack.md: a JSON file nested 10^5 deep (RecursionError), `[]` or `null` where an object belongs."
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"bad\.json: {words}") as caught:
        read_json(path, dict)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_missing_json_and_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("none.json", ".", "pipe"):
        with pytest.raises(UserError, match="no such file"):
            read_json(tmp_path / name)


def test_any_text_comes_back_from_json(tmp_path):
    "attack.md: `--out` with a byte that is not UTF-8 (a lone surrogate in Python) was a UnicodeEncodeError."
    value = {"诗": 1, "name": "runs/\udcff", "pair": "😀"}
    write_json(tmp_path / "a.json", value)
    append_jsonl(tmp_path / "a.jsonl", value)
    assert read_json(tmp_path / "a.json") == value and read_jsonl(tmp_path / "a.jsonl") == [value]
    assert "诗" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_printable_text_cannot_move_a_cursor_or_hide_its_order():
    "code.md 25."
    unsafe = [*map(chr, range(32)), *map(chr, range(127, 160)), *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\udcff"]
    assert printable("a".join(unsafe)) == "a" * 10 + "\n" + "a" * (len(unsafe) - 11)
    for text in ("小诗, 床前明月光。", "\u05e9\u05dc\u05d5\u05dd", "👩\u200d👩\u200d👧🇨🇳 é e\u0301"):
        assert printable(text) == text


def test_the_package_has_its_chapters_and_nothing_else():
    "torch.compile asks packages for names that they may not have."
    import nanollada
    assert nanollada.toy.sample and not hasattr(nanollada, "torch")
