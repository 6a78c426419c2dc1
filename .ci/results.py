"""Fill the tables of RESULTS.md and README.md from nbs/results/*.json: `python .ci/results.py` (or `--check`).

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a key of TABLES. So every number there is in a saved file.
"""

import re
import sys
from pathlib import Path

from nanollada.core import read_json
from nanollada.demo import report_table
from nanollada.studies import study_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGES = ROOT / "nbs" / "results", ("RESULTS.md", "README.md")


def about(report: dict) -> str:
    "How a study was made, in a line."
    made = sorted({f"{each['machine']}, torch {each['torch']}, commit {each['commit']}" for each in report["made"]})
    jobs = f"{report['jobs']} jobs, {report['side_by_side']} side by side, {report['job_seconds'] / 60:.0f} minutes of one thread"
    return f"`{report['command']}`: seeds {', '.join(map(str, report['seeds']))}; {jobs}; {'; '.join(made)}."


def study(name: str, found: tuple = (), by: tuple = (), **only: object) -> str:
    "The table of a study, of the rows that are as `only` says or have a value for what was found."
    report = read_json(RESULTS / f"{name}.json", dict)
    rows = [row for row in report["rows"] if all(row.get(k) == v for k, v in only.items()) and (not found or row.get(found[0]) is not None)]
    return f"{study_table(rows, by or report['by'], *found)}\n\n{about(report)}"


def demo() -> str:
    "The tables of the demo, without its samples."
    report = read_json(RESULTS / "demo_cpu.json", dict)
    return report_table(report).split("\n\nWritten by")[0]


WRITTEN = ("grammatical_share", "distinct_2", "word_entropy")
TABLES = {
    "demo": demo,
    "recipe": lambda: study("recipe", ("dev", "test", "default_grammatical_share", "default_distinct_2", "default_word_entropy",
                                        "everywhere_grammatical_share", "updates")),
    "reversal": lambda: study("reversal"),
    "order": lambda: study("order", ("grammatical_share", "namesakes", "distinct_2", "word_entropy"), ("way",), task="stories"),
    "heat": lambda: study("order", ("grammatical_share", "namesakes", "distinct_2", "word_entropy"), ("way",), task="temperature 1"),
    "chains": lambda: study("order", ("excess", "excess_left", "excess_surest"), ("task",), way="scores", task="stories"),
    "sudoku": lambda: study("order", ("solved",), ("way",), task="sudoku"),
    "speed": lambda: study("speed", ("tokens_per_second", "times_ar", *WRITTEN)),
}


def filled(text: str) -> str:
    "A page with its tables as the saved files have them."
    def fill(found: re.Match) -> str:
        return f"<!-- table {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"
    return re.sub(r"<!-- table (.+?) -->\n.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    for page in (ROOT / name for name in PAGES):
        text = page.read_text(encoding="utf-8")
        if "--check" in sys.argv:
            assert filled(text) == text, f"{page.name} differs from nbs/results: run python .ci/results.py"
        else:
            page.write_text(filled(text), encoding="utf-8")
