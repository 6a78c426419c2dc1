"What CONTRIBUTING.md shows is run; the files and targets that it names exist; the pages for GitHub and for citation can be read."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nanollada import sources

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("code", CODE, ids=("policy", "objective", "corpus"))
def test_the_recipes_work(code, tmp_path):
    if "Corpus" in code and not hasattr(sources, "Corpus"):
        pytest.skip("chapter 97 names no corpora here")
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    if "two_or_sure" in code:
        passes = int(re.match(r"(\d+) passes: ", done.stdout).group(1))
        assert 5 <= passes < 56 / 2 + 5  # two at least in a pass, but for the last of a block


def test_what_it_names_is_there():
    targets = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(re.findall(r"```bash\n(.*?)```|`(make [a-z-]+)`", TEXT, re.S)[0])))
    for target in targets | {"export", "setup", "test", "scripts", "notebooks"}:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for name in set(re.findall(r"`((?:nbs|tests|nanollada|\.ci)/[\w./]+\.\w+)`|(?:python|pytest) ((?:tests|\.ci)/[\w./]+\.py)", TEXT)):
        path = next(filter(None, name))
        assert (ROOT / path).is_file() or "NAME" in path, path
    for name in ("settings.ini", "pyproject.toml", "CITATION.cff", "CHANGELOG.md", "_quarto.yml", "nbs/index.ipynb"):
        assert name in TEXT and (ROOT / name).is_file()


def test_the_files_of_other_sites_can_be_read():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors", "version"} <= cited.keys()
    forms = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")]
    assert len(forms) == 2
    for form in forms:
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])
    assert (ROOT / ".github" / "pull_request_template.md").is_file()
