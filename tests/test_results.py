"Every table of README.md and RESULTS.md is what the saved files say."
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanollada.core import read_json

ROOT = Path(__file__).resolve().parent.parent


def test_the_pages_show_what_was_saved():
    done = subprocess.run([sys.executable, ".ci/results.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_table_is_empty():
    for page in ("README.md", "RESULTS.md"):
        tables = re.findall(r"<!-- table (.+?) -->\n(.*?)<!-- end -->", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
        assert tables and not [name for name, table in tables if table.count("\n") < 3], page


@pytest.mark.parametrize("name", ("recipe", "twins", "data", "reversal", "order", "questions", "lengths", "guidance", "speed",
                                  "blocks", "speculation", "editing", "gaps"))
def test_a_saved_study_says_how_it_was_made(name):
    report = read_json(ROOT / "nbs" / "results" / f"{name}.json", dict)
    assert report["command"] == f"nanollada study {name} --budget cpu" and report["seeds"] == [1, 2, 3]
    for made in report["made"]:
        assert made["commit"] and {"machine", "torch", "threads", "python", "nanollada"} <= made.keys()
    assert not re.search(r"/(root|home|work|tmp)/", str(report))
