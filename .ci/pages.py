"""Stage the site's pages from the notebooks, in _proc: `python .ci/pages.py`; Quarto makes the site of them (`make docs`).

nbdev calls the two processors below, named in settings.ini, for every notebook; without Quarto the result can still be tested.
"""

import ast
import re
import sys
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.process import Processor

ROOT = Path(__file__).resolve().parent.parent
GONE = {"hide", "default_exp", "exporti"}
HEADING = re.compile(r"^(?:---\n+)?(\[source\]\([^)]*\)\{[^}]*\}\n+)?(#+ [^\n]+\n)", re.M)
CHAPTER = re.compile(r"\b(?:chapters?|appendix|appendices)((?:,? ?(?:and|to|or)? ?\d\d[a-z]?\b(?! ?%|\.\d))+)", re.I)
PLAIN = {"entropy", "answer", "nats", "score", "write", "draw", "begin", "turns", "passes", "noise", "log", "attend", "measure",
         "forbid", "opened", "advance", "finish", "train", "demo", "rotate", "cross", "mend", "spoil", "plant", "damage", "varied"}


def chapter_number(path: Path) -> str | None:
    "4 of 04_backbone.ipynb, 14a of 14a_chat.ipynb; None of a page without a number."
    found = re.match(r"(\d\d[a-z]?)_", path.name)
    return found and found[1]


def with_links(text: str, files: dict[str, str]) -> str:
    "A line of prose in which `chapter NN` and its like lead to the pages, as `files` has them by number."
    def link(found: re.Match) -> str:
        return re.sub(r"\d\d[a-z]?", lambda m: f"[{m[0]}]({files[m[0]]})" if m[0] in files else m[0], found[0])
    parts = re.split(r"(\[[^\]]*\]\([^)]*\)|`[^`]*`)", text)  # links and code stay as they are
    return "".join(part if n % 2 else CHAPTER.sub(link, part) for n, part in enumerate(parts))


def is_plumbing(source: str) -> bool:
    "Whether a cell only imports or names constants."
    kinds = (ast.Import, ast.ImportFrom)
    return all(isinstance(node, kinds) for node in ast.parse(source).body)


class show_source(Processor):
    "Exported cells stay in sight, under the headings that links to their names lead to."

    def begin(self) -> None:
        cells, pages = list(self.nb.cells), []
        while cells:
            cell = cells.pop(0)
            kinds = set(getattr(cell, "directives_", None) or ()) if cell.cell_type == "code" else set()
            if kinds & GONE or "source" not in cell:
                continue
            docs = []
            while kinds & {"export", "exports"} and cells and getattr(cells[0], "has_sd", False):
                docs.insert(0, cells.pop(0))
            if cell.cell_type == "code" and cell.source and is_plumbing(cell.source) and "code-fold" not in cell.source:
                cell.source = '#| code-fold: true\n#| code-summary: "Imports"\n' + cell.source
            if kinds & {"export", "exports"}:
                cell.id = f"source-{cell.id}"
            for output in (output for doc in docs for output in doc.get("outputs", [])):
                text = output.get("data", {}).get("text/markdown")
                head = text and HEADING.search("".join(text))
                if head:  # the docstring and the arguments stand in the code below
                    output["data"]["text/markdown"] = ["".join(part or "" for part in head.groups())]
            pages += docs + [cell]
        self.nb.cells = pages


class link_chapters(Processor):
    "Number the page, link every mention of a chapter, offer Colab, and undo links of plain words."

    def begin(self) -> None:
        path, config = Path(self.nb.path_), get_config()
        files = {chapter_number(other): other.name for other in (ROOT / "nbs").glob("*.ipynb")}
        files = {number: name for number, name in files.items() if number and name != path.name}
        about = dict(self.nb.frontmatter_)
        number = chapter_number(path)
        if number:
            about["title"] = f"{number.lstrip('0') or '0'} · {about['title']}"
            where = f"{config.user}/{config.repo}/blob/{config.branch}/nbs/{path.name}"
            about["code-links"] = [{"text": "Open in Colab", "icon": "box-arrow-up-right",
                                    "href": f"https://colab.research.google.com/github/{where}"}]
        self.nb.cells[0].source = f"---\n{yaml.dump(about, allow_unicode=True)}---\n"

        for cell in self.nb.cells[1:]:
            if cell.cell_type == "markdown":
                lines = cell.source.split("\n")
                cell.source = "\n".join(line if line.startswith(("#", "$")) else with_links(line, files) for line in lines)
                cell.source = cell.source.replace("```mermaid", "```{mermaid}")
                cell.source = re.sub(r"\[`(\w+)`\]\([^)]*#[^)]*\)", lambda m: f"`{m[1]}`" if m[1] in PLAIN or m[1][0] == "_" else m[0], cell.source)
                cell.source = re.sub(r"(\.html#\w+)\.\w+\)", r"\1)", cell.source)  # methods stand under their class


def api_page() -> str:
    "All public names, by module: one line each, linked to where the book derives them."
    pages = {p: re.search(r"\.\./nbs/(\w+)\.ipynb", p.read_text()) for p in sorted((ROOT / "nanollada").glob("*.py"))}
    text = ["---\ntitle: The package\ndescription: Every public name, and where the book derives it.\n---\n"]
    for module, page in sorted((page[1], module) for module, page in pages.items() if page):
        tree = ast.parse(page.read_text())
        text.append(f"\n## `{page.stem}` {{#{page.stem}}}\n\n{ast.get_docstring(tree)} [Chapter {module[:3].rstrip('_')}]({module}.ipynb)\n")
        text.append("\n| name | what it is |\n|---|---|")
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                said = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
                text.append(f"| [`{node.name}`]({module}.ipynb#{node.name.lower()}) | {said} |")
    return "\n".join(text) + "\n"


def stage() -> Path:
    "Write every page into _proc; the folder."
    from nbdev.serve import proc_nbs
    folder = proc_nbs(n_workers=0, force=True)
    (folder / "package.qmd").write_text(api_page(), encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    print(stage())
