"What the site promises and a machine can check without Quarto: rhythm, captions, answers, links, citations, the glossary."
import json
import re
import statistics
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CELLS = {path: nbformat.read(path, as_version=4).cells for path in sorted(NBS.glob("*.ipynb"))}
CHAPTERS = [path for path in CELLS if path.stem[:2].isdigit() and path.stem < "95"]
TEXT = {path: "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown") for path, cells in CELLS.items()}
PAGES = [path for path in [*CELLS, *NBS.glob("*.qmd")]]
by_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
by_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def text_of(path: Path) -> str:
    "A page's own words, without code."
    return re.sub(r"```.*?```|`[^`\n]*`", "", TEXT.get(path) or path.read_text(encoding="utf-8"), flags=re.S)


def is_picture(cell: nbformat.NotebookNode) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


@by_chapter
def test_cells_have_the_rhythm_of_good_books(path):
    lines = [[line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
             for cell in CELLS[path] if cell.cell_type == "code" and not re.search(r"^#\| (default_exp|hide)", cell.source, re.M)]
    sizes = sorted(len(each) for each in lines if each)
    assert statistics.median(sizes) <= 7 and sizes[int(0.9 * len(sizes))] < 20 and sizes[-1] <= 40, sizes


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_pictures_have_captions_and_alternative_text(path):
    for cell in CELLS[path]:
        if is_picture(cell):
            given = dict(re.findall(r"^#\| (fig-cap|fig-alt): (.+)$", cell.source, re.M))
            assert all(len(given.get(name, "")) > 20 for name in ("fig-cap", "fig-alt")), cell.source[:200]
        if cell.cell_type == "markdown":
            assert not re.search(r"!\[\]\(", cell.source), cell.source[:200]


@by_chapter
def test_a_chapter_answers_two_exercises_and_says_what_comes_next(path):
    if any("## Try this" in cell.source for cell in CELLS[path]):
        assert len(re.findall(r"<summary>Answer to [12]</summary>", TEXT[path])) == 2
        assert re.search(r"\*\*Next:\*\*.*\]\(\w+\.ipynb\)", TEXT[path], re.S)


@by_page
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+?)(?:#[^)\s]*)?\)", text_of(path)):
        if not re.match(r"https?:|mailto:", target):
            made = target == "package.qmd"  # when the pages are staged
            assert made or (NBS / target).exists(), f"{path.name} links to {target}"


@by_page
def test_citations_are_in_the_bibliography(path):
    known = set(re.findall(r"^@\w+\{(\w+),", (NBS / "references.bib").read_text(encoding="utf-8"), re.M))
    cited = set(re.findall(r"(?<![\w.])@(?!fig-|eq-|tbl-|sec-)([a-z]\w*)", text_of(path)))
    assert cited <= known, cited - known


@by_page
def test_cross_references_of_a_page_have_their_target(path):
    whole = (json.dumps([cell.source for cell in CELLS[path]]) if path in CELLS else path.read_text(encoding="utf-8"))
    for kind, name in set(re.findall(r"@(fig|eq|tbl|sec)-([\w-]+)", text_of(path))):
        assert re.search(rf"#{kind}-{name}\}}|label: {kind}-{name}\b", whole), f"{path.name}: @{kind}-{name}"


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(ROOT / ".ci"))
    import pages
    yield pages
    sys.path.remove(str(ROOT / ".ci"))


@pytest.fixture(scope="module")
def staged(pages, tmp_path_factory):
    "Chapter 06 as Quarto gets it."
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults
    notebook = read_nb(NBS / "06_masking.ipynb")
    notebook.path_ = str(NBS / "06_masking.ipynb")
    FilterDefaults()(notebook)
    return notebook.cells


def test_exported_code_stays_in_sight(staged):
    code = [cell.source for cell in staged if cell.cell_type == "code" and "source" in cell]
    assert sum("def mask_tokens(" in source and "torch.where" in source for source in code) == 1
    assert not any("default_exp" in source or "nbdev_export" in source or "#| export" in source for source in code)
    headings = [text for cell in staged for output in cell.get("outputs", []) for text in output.get("data", {}).get("text/markdown", [])]
    assert any("### mask_tokens" in text and "```" not in text and "|" not in text for text in headings)


def test_pages_are_numbered_and_their_chapters_linked(staged, pages):
    assert "6 · Masking" in staged[0].source and "colab.research.google.com" in staged[0].source
    files = {"10": "10_sampler.ipynb", "14a": "14a_chat.ipynb"}
    for said, links in (("see chapter 10.", 1), ("chapters 10 and 14a", 2), ("Chapter 99 is not", 0), ("of 10 to 14 words", 0),
                        ("[chapter 10](10_sampler.ipynb)", 1), ("chapter 10 % of", 0)):
        assert pages.with_links(said, files).count("](") == links, said


def test_the_api_page_has_every_public_name(pages):
    page = pages.api_page()
    for path in (ROOT / "nanollada").glob("*.py"):
        for name in re.findall(r"^(?:def|class) ([A-Za-z]\w*)", path.read_text(encoding="utf-8"), re.M):
            assert path.stem.startswith("_") or f"[`{name}`]" in page, f"{path.stem}.{name}"


def test_no_two_pages_have_one_address():
    "nbdev leaves the number of a notebook out of its page's name; a page of another kind may have it already."
    names = [re.sub(r"^\d\d[a-z]?_", "", path.stem) for path in NBS.glob("*.ipynb")]
    names += [path.stem for path in NBS.glob("*.qmd")] + ["package"]  # which is made when the pages are staged
    assert "api" in names and len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


def test_what_the_site_is_made_of_is_there():
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    wanted = [*site["project"]["resources"], site["bibliography"], site["website"]["favicon"], site["website"]["image"]]
    wanted += [sheet for theme in site["format"]["html"]["theme"].values() for sheet in theme if sheet.endswith(".scss")]
    missing = [name for name in wanted if not list(NBS.glob(name))]
    assert not missing
    listed = re.findall(r"[\w/]+\.(?:ipynb|qmd)", json.dumps(site["website"]))
    assert not [name for name in listed if not (NBS / name).exists() and name != "package.qmd"]
    assert "fonts.googleapis" not in "".join((NBS / name).read_text() for name in ("custom.scss", "dark.scss"))


def test_chapter_00_is_short_and_exports_nothing():
    cells = [cell for cell in CELLS[NBS / "00_masks.ipynb"] if cell.cell_type == "code" and "COLAB" not in cell.source]
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
    assert len(lines) < 60 and not any("#| export" in cell.source or "default_exp" in cell.source for cell in cells)


def test_every_page_has_a_name_of_its_own():
    names = [re.sub(r"^\d+[a-z]?_", "", path.stem) for path in PAGES]  # nbdev leaves the number out
    assert len(set(names)) == len(names), sorted(names)


def test_the_first_code_cell_installs_what_colab_needs(monkeypatch):
    first = {path: next(cell.source for cell in CELLS[path] if cell.cell_type == "code") for path in CELLS}
    plain = {re.sub(r"'(/content/nanollada)\[[a-z,]+\]'( openai| tensorboard)?", r"\1", source) for source in first.values()}  # some need an extra
    assert len(plain) == 1, [path.name for path, source in first.items() if "COLAB" not in source]
    source, done = next(iter(first.values())), []
    monkeypatch.setattr("os.system", done.append)
    monkeypatch.setattr("os.chdir", done.append)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    exec(source, {})
    assert not done
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    exec(source, {})
    assert "pip install" in done[0] and done[1].endswith("/nbs")
