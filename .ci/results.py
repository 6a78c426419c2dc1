"""Fill the tables of RESULTS.md and README.md from nbs/results/*.json: `python .ci/results.py` (or `--check`).

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a key of TABLES. So every number there is in a saved file.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from nanollada.core import read_json
from nanollada.demo import MODELS, report_table
from nanollada.studies import how_made, study_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGES = ROOT / "nbs" / "results", ("RESULTS.md", "README.md", "README_zh.md")


def study(name: str, found: tuple = (), by: tuple = (), **only: object) -> str:
    "The table of a study, of the rows that are as `only` says or have a value for what was found."
    report = read_json(RESULTS / f"{name}.json", dict)
    rows = [row for row in report["rows"] if all(row.get(k) == v for k, v in only.items()) and (not found or row.get(found[0]) is not None)]
    return f"{study_table(rows, by or report['by'], *found)}\n\n{how_made(report)}"


def demo() -> str:
    "The tables of the demo, without its samples."
    report = read_json(RESULTS / "demo_cpu.json", dict)
    return report_table(report).split("\n\nWritten by")[0]


def seeds() -> str:
    "The demo of three seeds: what each model has learned, and the text it writes by default."
    reports = [read_json(RESULTS / f"demo_cpu{end}.json", dict) for end in ("", "_1", "_2")]
    floor = reports[0]["entropy"]["per_document"]

    def cell(value: Callable[[dict], float], form: str) -> str:
        found = [value(report) for report in reports]
        return f"{statistics.mean(found):{form}} ± {statistics.stdev(found):{form}}"

    lines = ["| model | above the entropy | left to right | grammatical | distinct pairs | tokens/s |", "|---" * 6 + "|",
             f"| the language | 0 | 0 | 100% | {cell(lambda r: r['language']['distinct_2'], '.3f')} | |"]
    for name, (_, score) in MODELS.items():
        key = f"{name}_{score}"
        lines.append(f"| {name}, {score.upper()} | {cell(lambda r: r[key]['per_document'] / floor - 1, '.1%')} "
                     f"| {cell(lambda r: r[key]['chain_rule'] / floor - 1, '.1%')} "
                     f"| {cell(lambda r: r['grammatical_share'][name], '.0%')} "
                     f"| {cell(lambda r: r['writing'][name]['default']['distinct_2'], '.3f')} "
                     f"| {cell(lambda r: r['tokens_per_second'][name], ',.0f')} |")
    each = {report["training"][name]["seconds"] for report in reports for name in MODELS}
    return "\n".join([*lines, "", f"`nanollada demo --seed N`, N = {', '.join(str(r['seed']) for r in reports)}: ± is the standard deviation over seeds; "
                      f"{min(each):.0f} to {max(each):.0f} seconds a model; {reports[0]['machine']}, torch {reports[0]['torch']}; 100 stories written together at temperature 0.5."])


def poems() -> str:
    "What the models of poems know, one training each."
    rows = read_json(RESULTS / "poems.json", dict)["rows"]
    lines = [f"| {row['way']} | {row['metric']} | {row['nats_per_token']:.3f} ± {row['standard_error']:.3f} | "
             f"{row['bits_per_character']:.2f} | {row['updates']:,} |" for row in rows]
    return "\n".join(["| way | metric | nats per token | bits per character | updates |", "|---" * 5 + "|", *lines])


def poem_speed() -> str:
    "How fast poems are written, by each batch size and way, one training each."
    about, *records = json.loads((RESULTS / "poems_speed.json").read_text(encoding="utf-8"))
    ar = {row["rows"]: row["times_plain"] for row in records if row["variant"] == "ar"}
    lines = [f"| {row['rows']} | {row['variant']} | {row['tokens_per_second']:,.0f} | {row['times_plain'] / ar[row['rows']]:.2f} | "
             f"{row['judge']:.2f} ± {row['judge_error']:.2f} | {row['distinct_2']:.2f} |" for row in records]
    return "\n".join(["| rows | way | tokens/s | times AR | NLL under the AR twin | distinct pairs |", "|---" * 6 + "|", *lines, "",
                      f"`{about['command']}`: one thread; {about['machine']}, torch {about['torch']}."])


def poem_drafts() -> str:
    "How much drafts save on poems, one training."
    rows = read_json(RESULTS / "poems_drafts.json", dict)["rows"]
    return study_table(rows, ("task", "way"), "passes", "passes_saved", "times_left", "same", "nats")


WRITTEN = ("grammatical_share", "distinct_2", "word_entropy")
TABLES = {
    "demo": demo, "seeds": seeds, "poems": poems, "poem speed": poem_speed,
    "recipe": lambda: study("recipe", ("dev", "test", "default_grammatical_share", "default_distinct_2", "default_word_entropy",
                                        "everywhere_grammatical_share", "updates")),
    "reversal": lambda: study("reversal"),
    "order": lambda: study("order", ("grammatical_share", "namesakes", "distinct_2", "word_entropy"), ("way",), task="stories"),
    "heat": lambda: study("order", ("grammatical_share", "namesakes", "distinct_2", "word_entropy"), ("way",), task="temperature 1"),
    "chains": lambda: study("order", ("excess", "excess_left", "excess_surest"), ("task",), way="scores", task="stories"),
    "sudoku": lambda: study("order", ("solved",), ("way",), task="sudoku"),
    "twins": lambda: study("twins", ("steps", "excess", "excess_left", "excess_surest")),
    "data": lambda: study("data", ("epochs", "excess", "excess_left", "excess_surest"), ("stories", "way", "steps")),
    "tuned": lambda: study("questions", ("dev_nats", "forward_nats", "second turn_nats", "backward_nats", "forward_chosen",
                                         "backward_chosen"), ("tuning",), ends="what it knows"),
    "ends": lambda: study("questions", ("short", "stories", "story_tokens")),
    "lengths": lambda: study("lengths", ("excess", "beginnings_nats_per_token")),
    "guidance": lambda: study("guidance", WRITTEN, ("scale",), task="continue"),
    "choices": lambda: study("guidance", ("right",), ("scale", "masks"), task="choose"),
    "speed": lambda: study("speed", ("tokens_per_second", "times_ar", *WRITTEN)),
    "blocks": lambda: study("blocks", ("excess", "excess_left", *WRITTEN)),
    "poem drafts": poem_drafts,
    "drafts": lambda: study("speculation", ("passes", "passes_saved", "times_left", "same")),
    "edits": lambda: study("editing", ("passes", *WRITTEN), ("way", "policy", "limit"), task="draw"),
    "planted": lambda: study("editing", ("before", "after", "restored", "clean_right"), ("way", "policy"), task="planted"),
    "edit bounds": lambda: study("editing", ("excess",), ("way",), task="bound"),
    "gaps": lambda: study("gaps", ("right", "same", "rounds")),
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
