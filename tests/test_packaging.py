"What is given away: a wheel and a source distribution, built as pip builds them, in a copy of the checkout and without a network."
import ast
import configparser
import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import setuptools.build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
OURS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nanollada").iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The folder with both."
    pytest.importorskip("setuptools", "77")
    copy = tmp_path_factory.mktemp("checkout") / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(
        ".git", ".venv", "runs", "data", "scripts", "_proc", "_docs", "build", "dist", "*.egg-info", "__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == OURS and "nanollada/py.typed" in names
    assert sum(info.file_size for info in wheel.infolist()) < 2_000_000
    assert wheel.testzip() is None and any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_source_distribution_has_tests_and_no_book(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert OURS | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "tests/conftest.py",
                   "tests/golden/official_generate.json"} <= names
    assert not [name for name in names if name.startswith(("nbs", ".", "_"))]
    assert path.stat().st_size < 1_000_000


def test_the_wheel_can_be_made_from_the_source_distribution(built, tmp_path):
    (path,) = built.glob("*.tar.gz")
    shutil.unpack_archive(path, tmp_path)
    (source,) = tmp_path.iterdir()
    subprocess.run([sys.executable, "-c", "import setuptools.build_meta as b; b.build_wheel('dist')"], cwd=source, check=True, capture_output=True)
    names = lambda file: {(info.filename, info.CRC) for info in zipfile.ZipFile(file).infolist() if info.filename in OURS}
    assert names(next((source / "dist").glob("*.whl"))) == names(next(built.glob("*.whl")))


def test_the_metadata_say_what_a_reader_of_an_index_needs(metadata):
    version = re.search(r'"(.*)"', (ROOT / "nanollada" / "__init__.py").read_text()).group(1)
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("nanollada", version, ">=3.10")
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Description-Content-Type"] == "text/markdown"
    assert {link.split(",")[0] for link in metadata.get_all("Project-URL")} >= {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    minors = {entry.rpartition("3.")[2] for entry in metadata.get_all("Classifier") if "Python :: 3." in entry}
    assert minors == {"10", "11", "12", "13"}
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.M)


def test_heavy_libraries_are_extras(metadata):
    needs = {re.match(r"[\w-]+", need).group().lower() for need in metadata.get_all("Requires-Dist") if "extra ==" not in need}
    assert {"torch", "transformers", "tyro"} <= needs
    assert not needs & {"datasets", "gradio", "lm-eval", "fastapi", "openai", "playwright", "jieba", "opencc", "nbdev", "pytest", "wandb"}
    assert {"dev", "eval", "web", "hub", "chinese"} == set(metadata.get_all("Provides-Extra"))


def test_the_command_and_nbdev_find_their_way_in(wheel):
    entries = configparser.ConfigParser(delimiters="=")
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    entries.read_string(wheel.read(name).decode())
    assert dict(entries["console_scripts"]) == {"nanollada": "nanollada.cli:main"} and dict(entries["nbdev"]) == {"nanollada": "nanollada._modidx:d"}


def test_what_is_imported_is_declared(metadata):
    "Top-level modules that the package imports anywhere, also inside functions, belong to Python, a dependency or an extra."
    known = {"yaml": "pyyaml", "PIL": "matplotlib", "mpl_toolkits": "matplotlib", "jinja2": "torch", "huggingface_hub": "transformers",
             "uvicorn": "gradio", "fastapi": "gradio", "starlette": "gradio", "pydantic": "gradio", "pandas": "gradio", "IPython": "nbdev"}
    declared = {re.match(r"[\w-]+", need).group().lower().replace("-", "_") for need in metadata.get_all("Requires-Dist")}
    for path in (ROOT / "nanollada").glob("[!_]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else [alias.name for alias in getattr(node, "names", [])] \
                if isinstance(node, ast.Import) else []
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"nanollada"}:
                assert known.get(name, name).lower() in declared, f"{path.name} imports {name}, which is no dependency"


def test_the_code_is_of_the_oldest_python():
    "A parser of Python 3.10, and the names that came later. (The whole was run on 3.10 before the release: CONTRIBUTING.md.)"
    later = {"tomllib", "batched", "Self", "override", "StrEnum", "ExceptionGroup", "chdir", "UTC", "assert_never", "TaskGroup", "file_digest"}
    for path in [*(ROOT / "nanollada").glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        allowed = {"chdir"} if path.parent.name == "tests" else set()  # os.chdir and monkeypatch.chdir are old
        assert not (used & later) - allowed, f"{path.name}: {used & later}"


def test_importing_takes_no_time():
    "0.3 s is the bound; the package itself loads nothing, and an interpreter's own start is not counted."
    code = "import time; began = time.perf_counter(); import nanollada; print(time.perf_counter() - began)"
    times = [float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(times) < 0.3, times


def test_it_can_be_imported_first_of_all():
    "In an interpreter that has loaded nothing, as an editable installation never is: its hook for what is imported next must not ask for itself."
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import nanollada, colorsys; print(nanollada.__version__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout), done.stderr
