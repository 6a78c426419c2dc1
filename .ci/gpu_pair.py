"""The `30m` twins on one GPU, in three commands of under ten minutes each. Not run by the tests at full scale.

Beforehand, where there is a network: nanollada data poetry --simplified --out data/poems
                                      nanollada tokenizer --data data/poems --vocab-size 6400 --out data/poems
Then, on the machine with the GPU, which needs no network:
    PYTHONPATH=. python .ci/gpu_pair.py --part 1    # benchmark of a training step; the AR twin
    PYTHONPATH=. python .ci/gpu_pair.py --part 2    # diffusion from scratch
    PYTHONPATH=. python .ci/gpu_pair.py --part 3    # diffusion from the AR twin; benchmark of sampling with this pair

Each part ends with one model's metrics, held-out score, samples and bf16 weights in shards under 15 MiB, at most 8 files
in all, in $OUT (or --out). A part that was cut goes on with --resume if the folder of --runs is still there; part 3 trains
the AR twin first if --runs has lost it (then halve --minutes). `--small` does all this with a tiny model, in half a minute a
part on a CPU.
Python packages: torch with CUDA, numpy, transformers, tokenizers, safetensors, accelerate, tqdm; neither tyro, datasets nor
matplotlib. Pure wheels of what is missing can travel in a folder named in PYTHONPATH.
"""
import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanollada.ar import decode
from nanollada.backbone import Backbone, count_parameters, load_run, to_huggingface
from nanollada.bench import TrainBenchConfig, bench_table, bench_train
from nanollada.core import UserError, make_generator, read_jsonl, write_json
from nanollada.corpus import read_documents
from nanollada.fast import BenchConfig, bench_sample, fast_generate, machine_record
from nanollada.guidance import trim_answers
from nanollada.likelihood import bits_per_byte
from nanollada.pretrain import PretrainConfig, pretrain, score_documents
from nanollada.tokenizer import encode
from nanollada.trainer import TrainConfig, latest_checkpoint

PARTS = {1: "ar", 2: "diffusion", 3: "diffusion_from_ar"}
SHARD = 15 * 2**20  # bytes
SCALES = {  # minutes of training; a window of 256 holds three to six poems
    "full": dict(preset="30m", length=256, batch_size=256, minutes=5.0, scored=500, masks=32, samples=16, gen_length=256, rows=64),
    "small": dict(preset="toy", length=64, batch_size=8, minutes=0.4, scored=8, masks=4, samples=2, gen_length=32, rows=2),
}


def settings(argv: list[str] | None) -> argparse.Namespace:
    "What was asked for, with the numbers of the scale."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/poems"), help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("--tokenizer", help="its folder; default: that of --data")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="run folders and token streams")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu/out")), help="what is to be kept")
    parser.add_argument("--minutes", type=float, help="of training, for one model")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--resume", action="store_true", help="go on with a training that was cut")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args(argv)
    scale = SCALES["small" if given.small else "full"]
    chosen = argparse.Namespace(**scale | {k: v for k, v in vars(given).items() if v is not None})
    for name in ("train.jsonl", "valid.jsonl"):
        if not (chosen.data / name).is_file():
            raise UserError(f"{chosen.data / name}: no such file; prepare the corpus with `nanollada data poetry --out {chosen.data}`")
    return chosen


def train_one(s: argparse.Namespace, name: str) -> Path:
    "Train one of the three for so many minutes, unless it is done; its run folder."
    folder = s.runs / name
    if (folder / "done").is_file():
        return folder
    start = train_one(s, "ar") if name == "diffusion_from_ar" else None
    cut = latest_checkpoint(folder / "state") is not None
    if cut and not s.resume:
        raise UserError(f"{folder}: holds a training that was cut; add --resume, or remove the folder")
    every = 10 if s.small else 500
    recipe = TrainConfig(steps=10**6, batch_size=s.batch_size, learning_rate=s.learning_rate, warmup_steps=10 if s.small else 200,
                         decay_fraction=0.5, min_lr_ratio=0.02, optimizer="muon", time_budget=60 * s.minutes, eval_every=every,
                         save_every=every, log_every=every // 10, progress=False)
    pretrain(PretrainConfig(
        data=str(s.data), out=folder, objective="ar" if name == "ar" else "diffusion", preset=s.preset,
        tokenizer=str(getattr(s, "tokenizer", s.data)), init_from=start, length=s.length, valid_windows=8 if s.small else 256,
        cache=s.runs / "tokens", processes=min(8, os.cpu_count() or 1), resume=cut, train=recipe))
    (folder / "done").touch()
    return folder


def training_record(folder: Path) -> dict:
    "Curves, speed and utilisation of a run."
    history = read_jsonl(folder / "metrics.jsonl")
    middle = lambda name: statistics.median([r[name] for r in history if name in r] or [0.0])
    keep = ("step", "split", "loss", "seconds", "tokens_per_second", "mfu")
    return {"tokens_per_second": middle("tokens_per_second"), "mfu": middle("mfu") or None, "steps": history[-1]["step"],
            "history": [{k: r[k] for k in keep if k in r} for r in history]}


def score(s: argparse.Namespace, model: Backbone, tokenizer: object, poems: list[str]) -> dict:
    "NLL or NELBO of held-out poems."
    nats, counts = score_documents(model, tokenizer, poems, s.masks)
    each = nats / counts
    return {"metric": "NLL" if model.cfg.objective == "ar" else "NELBO", "nats_per_token": each.mean().item(),
            "standard_error": (each.std() / len(each) ** 0.5).item(),
            "bits_per_byte": bits_per_byte(nats.sum().item(), sum(len(p.encode()) for p in poems)),
            "documents": len(poems), "masks": s.masks, "per_document": nats.mean().item(), "tokens": int(counts.sum())}


def openings(s: argparse.Namespace, tokenizer: object, poems: list[str], n: int) -> torch.Tensor:
    "The first tokens (n, 8) of held-out poems, again from the first where there are too few."
    rows = [[tokenizer.bos_token_id, *encode(tokenizer, poem)][:8] for poem in poems]
    rows = [row for row in rows if len(row) == 8]
    return torch.tensor([rows[i % len(rows)] for i in range(n)])


def samples(s: argparse.Namespace, model: Backbone, tokenizer: object, poems: list[str]) -> list[str]:
    "Poems written after their first tokens."
    device, eos_id = model.lm_head.weight.device, tokenizer.eos_token_id
    prompt = openings(s, tokenizer, poems, s.samples).to(device)
    if model.cfg.objective == "ar":
        ids = decode(model, prompt, s.length // 2, 0.8, eos_id=eos_id, generator=make_generator(0, "samples"))
    else:
        ids = fast_generate(model, prompt, model.cfg.mask_token_id, s.length // 2, temperature=0.8, eos_id=eos_id,
                            generator=make_generator(0, "samples"))
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in trim_answers(ids.cpu(), eos_id, 1)]


def save_shards(model: Backbone, out: Path, name: str) -> dict:
    "bf16 weights in safetensors files under 15 MiB, and the index that Hugging Face reads; the config goes with the metrics."
    shards, sizes = [{}], [0]
    for key, value in model.state_dict().items():
        value = value.detach().to("cpu", torch.bfloat16).contiguous()
        size = 2 * value.numel()
        if shards[-1] and sizes[-1] + size > SHARD - 2**16:  # room for the header
            shards, sizes = [*shards, {}], [*sizes, 0]
        shards[-1][key], sizes[-1] = value, sizes[-1] + size
    files = [f"{name}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        save_file(shard, out / file, metadata={"format": "pt"})
    where = {key: file for file, shard in zip(files, shards) for key in shard}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": where}


def bench_pair(s: argparse.Namespace, model: Backbone, tokenizer: object, poems: list[str]) -> list[dict]:
    "Ways of sampling with the trained pair; quality is agreement with the plain loop."
    ar, _, _ = load_run(s.runs / "ar", model.lm_head.weight.device)
    cfg = BenchConfig(gen_length=s.gen_length, quality_length=s.gen_length, quality_rows=s.rows, repeats=1 if s.small else 3,
                      plain_passes=4 if s.small else 32, batch_sizes=(1,) if s.small else (1, 16))
    return bench_sample(cfg, model, ar, openings(s, tokenizer, poems, max(16, s.rows)))


def main(argv: list[str] | None = None) -> dict:
    "Run one part and return what it wrote to metrics.json."
    s, began = settings(argv), time.time()
    torch.set_float32_matmul_precision("high")  # sampling and scoring run in TF32, training in bf16 by itself
    s.out.mkdir(parents=True, exist_ok=True)
    name, found = PARTS[s.part], {"scale": {k: str(v) if isinstance(v, Path) else v for k, v in vars(s).items()}}
    if s.part == 1:
        least = dict(batch_size=2, repeats=1, variants=("plain_step", "ours")) if s.small else dict(batch_size=64)
        cfg = TrainBenchConfig(preset=s.preset, length=s.length, **least)
        found["bench_train"] = bench_train(cfg)
        print(bench_table(found["bench_train"]), flush=True)
    folder = train_one(s, name)
    model, tokenizer, _ = load_run(folder)
    poems = [poem for poem in read_documents(s.data / "valid.jsonl") if len(encode(tokenizer, poem)) < s.length][: s.scored]
    found |= {"model": name, "parameters": count_parameters(model), "config": to_huggingface(model.cfg),
              "machine": machine_record(model.lm_head.weight.device), "training": training_record(folder)}
    write_json(s.out / f"{name}.json", found)  # something is kept if the rest is cut
    found |= {"score": score(s, model, tokenizer, poems), "samples": samples(s, model, tokenizer, poems)}
    write_json(s.out / f"{name}.safetensors.index.json", save_shards(model, s.out, name))
    write_json(s.out / f"{name}.json", found)
    if s.part == 3:
        found["bench_sample"] = bench_pair(s, model, tokenizer, poems)
        print(bench_table(found["bench_sample"]))
    write_json(s.out / f"{name}.json", found | {"seconds": time.time() - began})
    print(f"{name}: {found['training']['steps']} steps, {found['training']['tokens_per_second']:,.0f} tokens/s, "
          f"MFU {found['training']['mfu']}, {found['score']['metric']} {found['score']['nats_per_token']:.4f} nats per token")
    return found


if __name__ == "__main__":
    main()
