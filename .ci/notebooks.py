"""Move notebooks to percent scripts and back, run them, and check what a machine can check of their style.

    python .ci/notebooks.py scripts                 notebooks -> scripts/ (for editing and reviewing)
    python .ci/notebooks.py notebooks [NAME ...]    scripts/ -> notebooks, cell ids kept, readable ids for exports
    python .ci/notebooks.py run [--budget cpu] [NAME ...]   execute in a fresh kernel and store the outputs
    python .ci/notebooks.py test [NAME ...]         execute every notebook at the smoke budget, storing nothing
"""

import argparse
import ast
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, SCRIPTS = ROOT / "nbs", ROOT / "scripts"


def chosen(folder: Path, suffix: str, names: list[str]) -> list[Path]:
    "The files of a folder whose stem contains one of the names; all of them without names."
    files = sorted(folder.glob(f"*{suffix}"))
    return [file for file in files if not names or any(name in file.stem for name in names)]


def jupytext(*arguments: str) -> None:
    "Call jupytext, quietly."
    subprocess.run([sys.executable, "-m", "jupytext", "--quiet", *arguments], check=True)


def readable_id(source: str) -> str | None:
    "The name an exporting cell defines (`imports` for imports), or None for a cell that exports nothing."
    if not source.lstrip().startswith("#| export"):
        return None
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return node.name.strip("_")
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            return target.id.strip("_") if isinstance(target, ast.Name) else None
    return "imports"


def set_ids(path: Path) -> None:
    "Give exporting cells the name of what they define, so that the package's breadcrumbs read well and stay calm."
    notebook = nbformat.read(path, as_version=4)
    names = [readable_id(cell.source) if cell.cell_type == "code" else None for cell in notebook.cells]
    exported = "\n".join(cell.source for name, cell in zip(names, notebook.cells) if name)
    taken = {*names, *re.findall(r"^(?:def|class) (\w+)", exported, re.M)}  # the site's headings have these ids
    seen: set[str] = set()
    for name, cell in zip(names, notebook.cells):
        if name:
            while name in seen:
                name += "-more"
            cell.id = name
        elif cell.id.removesuffix("-more") in taken:  # what was cut off from an exporting cell
            cell.id = uuid.uuid4().hex[:8]
        seen.add(cell.id)
    nbformat.write(notebook, path)


def to_scripts(names: list[str]) -> None:
    SCRIPTS.mkdir(exist_ok=True)
    for path in chosen(NOTEBOOKS, ".ipynb", names):
        jupytext("--to", "py:percent", "-o", str(SCRIPTS / f"{path.stem}.py"), str(path))


def to_notebooks(names: list[str]) -> None:
    for path in chosen(SCRIPTS, ".py", names):
        target = NOTEBOOKS / f"{path.stem}.ipynb"
        jupytext("--update", "--to", "ipynb", "-o", str(target), str(path))
        set_ids(target)


def execute(path: Path, budget: str, output: Path) -> float:
    "Run one notebook in a fresh kernel, writing the executed copy to `output`; seconds taken."
    start = time.perf_counter()
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--log-level=WARN", "--to", "notebook", "--execute", str(path)]
    where = ["--output-dir", str(output.parent), "--output", output.name]
    # IN_TEST: without the export step, for a test must not write to the package it tests. One thread: notebooks share the cores.
    environment = os.environ | {"NANOLLADA_BUDGET": budget, "IN_TEST": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    for _ in range(3):  # two kernels that start at once may choose the same port, and one dies before a cell has run
        done = subprocess.run(command + where, stderr=subprocess.PIPE, text=True, env={"OMP_NUM_THREADS": "1"} | environment, cwd=ROOT)
        if "Kernel died before replying" not in done.stderr:
            break
    sys.stderr.write(done.stderr)
    done.check_returncode()
    return time.perf_counter() - start


def smaller(png: str) -> str:
    "A picture (PNG in base64) with a palette of 128 colours, if that makes it smaller."
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    return min(base64.b64encode(small.getvalue()).decode(), png, key=len)


def tidy(path: Path) -> None:
    "Remove warnings and progress bars from the stored outputs, and make pictures small."
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for data in (output.data for output in cell.outputs if "image/png" in output.get("data", {})):
                data["image/png"] = smaller(data["image/png"])
    nbformat.write(notebook, path)


def run(names: list[str], budget: str) -> None:
    for path in chosen(NOTEBOOKS, ".ipynb", names):
        print(f"{path.name}: {execute(path, budget, path):.0f} s", flush=True)
        tidy(path)
        subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", str(path)], check=True)


def test(names: list[str], budget: str) -> None:
    "Execute notebooks, as many at a time as there are cores; store nothing."
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        def attempt(path: Path) -> bool:
            try:
                print(f"{path.name}: {execute(path, budget, Path(folder) / path.name):.0f} s", flush=True)
            except subprocess.CalledProcessError:
                print(f"{path.name}: FAILED", flush=True)
                return False
            return True

        paths = chosen(NOTEBOOKS, ".ipynb", names)
        failed = [path.name for path, passed in zip(paths, pool.map(attempt, paths)) if not passed]
    if failed:
        sys.exit(f"failed: {' '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["scripts", "notebooks", "run", "test"])
    parser.add_argument("names", nargs="*", help="only notebooks whose name contains one of these")
    parser.add_argument("--budget", choices=["smoke", "cpu", "gpu"])
    arguments = parser.parse_args()
    if arguments.verb == "scripts":
        to_scripts(arguments.names)
    elif arguments.verb == "notebooks":
        to_notebooks(arguments.names)
    elif arguments.verb == "run":
        run(arguments.names, arguments.budget or "cpu")
    else:
        test(arguments.names, arguments.budget or "smoke")


if __name__ == "__main__":
    main()
