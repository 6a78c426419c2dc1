"""Train and score models of Tang poems, and write nbs/results/poems.json: `python .ci/poems.py --tokenizer FOLDER`.

Each run is a command of its own and is kept in runs/poems; what is there already is not done again. About an hour of one core.
By default a run lasts so many seconds; `--updates` counts updates instead, for a machine that does other work at the same time.
`--race` lets the block model write poems by drafts and from left to right, in turns, and writes nbs/results/poems_drafts.json.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from nanollada.backbone import load_run
from nanollada.beyond import race_drafts
from nanollada.core import read_json, write_json
from nanollada.studies import provenance

ROOT = Path(__file__).resolve().parent.parent
DATA = "data poetry --dynasty tang --min-chars 20 --max-chars 120 --limit 21500 --out data/tang"
TRAIN = "pretrain --data data/tang --preset mini --length 128 --document-mask --batch-size 16"
WAYS = {"ar": ("--objective ar", 1), "diffusion": ("--objective diffusion", 1), "joint": ("--objective joint", 1),
        "joint, twice as long": ("--objective joint", 2),  # its arguments, and how many times the seconds
        "blocks of 4, after ar": ("--objective block --block-length 4 --init-from runs/poems/ar_{seed}", 0.6)}
EVAL = "--data data/tang --content-only --limit 200 --masks 32 --json"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer of Chinese")
parser.add_argument("--seconds", type=float, default=700.0, help="for each run of one share")
parser.add_argument("--updates", type=int, help="instead of seconds")
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--ways", nargs="+", default=list(WAYS))
parser.add_argument("--race", action="store_true", help="drafts against left to right")
parser.add_argument("--report", type=Path, default=ROOT / "nbs" / "results" / "poems.json")
args = parser.parse_args()


def nanollada(words: str) -> None:
    "Run a command of the package, as a user would."
    subprocess.run([sys.executable, "-m", "nanollada", *shlex.split(words)], check=True)


if not Path("data/tang").is_dir():
    nanollada(DATA)
report = read_json(args.report, dict) if args.report.exists() else {"data": f"nanollada {DATA}", "rows": []}
for seed, way in ((seed, way) for seed in args.seeds for way in args.ways):
    if any((row["way"], row["seed"]) == (way, seed) for row in report["rows"]):
        continue
    objective, share = WAYS[way]
    length = (f"--steps {round(args.updates * share)}" if args.updates
              else f"--steps 100000 --time-budget {args.seconds * share:g}")
    out = Path("runs/poems", f"{way.replace(', ', '_').replace(' ', '_')}_{seed}")
    words = f"{TRAIN} {objective.format(seed=seed)} {length} --seed {seed} --out {out}"
    nanollada(f"{words} --tokenizer {shlex.quote(args.tokenizer)} --overwrite")
    nanollada(f"eval {out} {EVAL} {out}.json")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = ("metric", "nats_per_token", "standard_error", "bits_per_character", "documents", "masks")
    report["rows"].append({"way": way, "seed": seed, "command": f"nanollada {words}", "made": provenance(),
                           "updates": lines[-1]["step"], "train_seconds": lines[-1]["seconds"]} |
                          {name: value for name, value in read_json(f"{out}.json", dict).items() if name in kept})
    write_json(args.report, report)

if args.race:
    torch.set_num_threads(1)
    model, tokenizer, _ = load_run("runs/poems/blocks_of_4_after_ar_0", "cpu")
    poems = [json.loads(line)["text"] for line in Path("data/tang/valid.jsonl").read_text(encoding="utf-8").splitlines()[:12]]
    prompts = [[tokenizer.bos_token_id, *tokenizer.encode(poem, add_special_tokens=False)[:3]] for poem in poems]
    rows = [{"task": f"temperature {heat}"} | row for heat in (0.0, 0.5, 1.0)
            for row in race_drafts(model, prompts, 48, heat, tokenizer.eos_token_id, 1)]
    write_json(ROOT / "nbs" / "results" / "poems_drafts.json", {"made": provenance(), "rows": rows})
