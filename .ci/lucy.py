"""Train the two small models that the index, chapters 10 to 12, the README and the page in the browser read: nbs/weights/lucy, lucy_ar.

    python .ci/lucy.py lucy       diffusion, after a quarter of its updates as an AR model; one core, half an hour
    python .ci/lucy.py lucy_ar    its autoregressive twin, with half the updates

Both learn English stories of the toy language, none of them twice, and are stored in bfloat16: two megabytes together.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanollada import toy
from nanollada.backbone import save_run
from nanollada.core import make_generator, write_json
from nanollada.fast import by_entropy
from nanollada.pretrain import RECIPE, document_rows, score_documents
from nanollada.sampler import Policy, write
from nanollada.studies import DEV, Rows, chain_nats, new_model, provenance
from nanollada.tokenizer import train_tokenizer
from nanollada.trainer import train
from nanollada.viz import draw_film, pieces_of, save_gif

SHAPE = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256)
KINDS = {"lucy": ("joint", 5000), "lucy_ar": ("ar", 2500)}

name = sys.argv[1]
kind, steps = KINDS[name]
torch.set_num_threads(1)
tokenizer = train_tokenizer(toy.sample(20_000, 0, "en"), 1000)
model, objective = new_model(kind, len(tokenizer), tokenizer.mask_token_id, 0, **SHAPE)
cfg = replace(RECIPE, steps=steps, device="cpu", progress=False)
rows = Rows(document_rows(tokenizer, toy.sample(steps * cfg.batch_size, 0, "en"))[0])
done = train(model, objective, rows, cfg)
model = model.bfloat16().float().eval()  # what is stored is what is scored

texts = toy.sample(500, DEV, "en")
ids = document_rows(tokenizer, texts)[0]
floor = -torch.tensor([toy.log_prob(text, "en") for text in texts], dtype=torch.float64)
excess = score_documents(model, tokenizer, texts)[0] - floor  # of the bound, or exact for AR
above = {"excess": excess.mean().item(), "stories_error": excess.std().item() / len(texts) ** 0.5}
if kind == "joint":
    above |= {f"excess_{name}": (chain_nats(model.denoise, ids, name == "surest") - floor).mean().item() for name in ("left", "surest")}
folder = Path(__file__).parent.parent / "nbs" / "weights" / name
save_run(model, tokenizer, folder, {name: weight.bfloat16() for name, weight in model.state_dict().items()})
write_json(folder / "about.json", {
    "command": f"python .ci/lucy.py {name}", "made": provenance(), "kind": kind, "updates": done.steps, "seconds": done.seconds,
    "stories": len(rows), "parameters": sum(p.numel() for p in model.parameters()), "entropy": toy.entropy("en"),
    "above_the_language": above})
print(open(folder / "about.json").read())

if kind == "joint":  # the film of the index and the README: a story written anywhere on the canvas, as many words a pass as are hardly in doubt
    canvas = torch.full((1, rows.ids.shape[1]), tokenizer.mask_token_id)
    canvas[0, 0], canvas[0, -1] = tokenizer.bos_token_id, tokenizer.eos_token_id
    how = Policy(remasking="entropy", commit=by_entropy, limit=0.1, temperature=0.5)
    steps = list(write(model.denoise, canvas, how, generator=make_generator(0, "film")))
    frames = [pieces_of(ids[0, 1:-1], tokenizer) for ids in (canvas, *(step.ids for step in steps))]
    save_gif(frames, folder.parent.parent / "images" / "unmasking.gif", columns=11, seconds=8)

    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="#0b4f71")  # the card that other sites show of this one
    figure.text(0.06, 0.82, "nanollada", fontsize=54, color="white", weight="bold")
    figure.text(0.06, 0.68, "A book that runs: masked-diffusion language models\nand their autoregressive twins, step by step", fontsize=22, color="white")
    axis = figure.add_axes((0.06, 0.08, 0.88, 0.5))
    draw_film(axis, [frames[n][:11] for n in (0, 4, 8, 12, len(frames) - 1)], [""] * 5)
    axis.set_axis_off()
    axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, facecolor="white", zorder=-1))
    figure.savefig(folder.parent.parent / "card.png")
