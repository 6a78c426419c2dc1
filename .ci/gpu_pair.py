"""The `30m` twins on one GPU by public verbs, in three parts of under ten minutes each; tried at a small scale on a CPU only.

Beforehand, where there is a network: nanollada data poetry --out data/poems; nanollada tokenizer --data data/poems --out data/poems
Then: python .ci/gpu_pair.py --part 1    # benchmark of a training step; the AR twin
      python .ci/gpu_pair.py --part 2    # diffusion from scratch
      python .ci/gpu_pair.py --part 3    # diffusion from the AR twin; benchmark of writing with this pair
Each leaves metrics, scores and weights (bf16, in shards) in --out. A part that was cut goes on when called again."""
import argparse
import os
import shutil
from pathlib import Path
import torch
from huggingface_hub import save_torch_state_dict

from nanollada.backbone import load_run
from nanollada.checkpoint import latest_state
from nanollada.cli import main as nanollada

PARTS = {1: "ar", 2: "diffusion", 3: "diffusion_from_ar"}
FULL = ["--preset", "30m", "--length", 256, "--batch-size", 256, "--warmup-steps", 200]
SMALL = ["--preset", "toy", "--length", 64, "--context", 256, "--batch-size", 8, "--warmup-steps", 5, "--eval-every", 20, "--valid-rows", 8]


def call(*words: object) -> None:
    "Run a verb of the command; its failure is ours."
    if nanollada([str(word) for word in words]):
        raise SystemExit(f"failed: nanollada {' '.join(map(str, words))}")


def main(argv: list[str] | None = None) -> None:
    "Run one part."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, required=True, help="see above")
    parser.add_argument("--data", type=Path, default=Path("data/poems"), help="train.jsonl, valid.jsonl, tokenizer")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="run folders and token streams")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu/out")), help="what is to be kept")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    s = parser.parse_args(argv)
    name, folder = PARTS[s.part], s.runs / PARTS[s.part]
    (s.out / name).mkdir(parents=True, exist_ok=True)
    if s.part == 1:
        tiny = ["--preset", "toy", "--seconds", 0.1, "--length", 32, "--variants", "plain_step", "ours"] * s.small
        call("bench", "train", "--json", s.out / "bench_train.json", "--batch-size", 64, *tiny)
    more = ["--init-from", s.runs / "ar"] * (s.part == 3) + ["--resume"] * (latest_state(folder / "state") is not None)
    call("pretrain", "--data", s.data, "--tokenizer", s.data, "--cache", s.runs / "tokens", "--out", folder,
         "--objective", name.split("_")[0], "--steps", 10**6, "--time-budget", 60 * s.minutes, "--no-progress",
         *(SMALL if s.small else FULL), *more)
    judge = ["--judge", s.runs / "ar"] * (s.runs / "ar").is_dir()
    call("eval", folder, "--data", s.data, "--samples", 16, "--temperature", 0.8, *judge,
         "--limit", 8 if s.small else 500, "--gen-length", 32 if s.small else 128, "--json", s.out / name / "eval.json")
    shutil.copy(folder / "metrics.jsonl", s.out / name)
    save_torch_state_dict(load_run(folder, "cpu", torch.bfloat16)[0].state_dict(), s.out / name, max_shard_size="14MB")
    if s.part == 3:
        tiny = ["--seconds", 0.1, "--batch-sizes", 1] * s.small
        call("bench", "sample", "--run", folder, "--ar-run", s.runs / "ar", "--json", s.out / "bench_sample.json", *tiny)


if __name__ == "__main__":
    main()
