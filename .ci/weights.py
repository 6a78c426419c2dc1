"""Train the weights that chapters 13 and 15 read, nbs/weights/13_fast.safetensors: `python .ci/weights.py`, one core, minutes.

The language, the tokenizer and the shape are those in the section on longer texts of chapter 13; beside the weights a .json says how they were made.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanollada import toy
from nanollada.backbone import Backbone, BackboneConfig
from nanollada.core import write_json
from nanollada.data import Windows, build_stream
from nanollada.pretrain import RECIPE, Joint, score_documents
from nanollada.studies import provenance
from nanollada.tokenizer import train_tokenizer
from nanollada.trainer import train

STEPS, ROWS, LENGTH = int(sys.argv[1]) if len(sys.argv) > 1 else 1500, 12, 272
OUT = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent.parent / "nbs" / "weights") / "13_fast.safetensors"

torch.set_num_threads(1)
words = {name: text.partition("|")[0] for name, text in toy.ENGLISH["words"].items()}
language = toy.ToyLanguage("common", words, toy.ENGLISH["sentences"], toy.ENGLISH["asks"], toy.RULES)
tokenizer = train_tokenizer(toy.sample(3000, 0, language), 2000)
shape = BackboneConfig(len(tokenizer), 96, 4, 4, None, 256, 1024, objective="diffusion", shift=True, qk_norm=True,
                       mask_token_id=tokenizer.mask_token_id, initializer_range=0.08)
with tempfile.TemporaryDirectory() as folder:
    windows = Windows(build_stream(toy.sample(20_000, 0, language), tokenizer, Path(folder, "stream")), LENGTH)
    torch.manual_seed(0)
    model = Backbone(shape)
    done = train(model, Joint(tokenizer.mask_token_id, True), windows, replace(RECIPE, steps=STEPS, batch_size=ROWS, device="cpu"))
save_file({name: weight.bfloat16() for name, weight in model.named_parameters()}, OUT)

texts = toy.sample(200, 1, language)
nats = score_documents(model.eval(), tokenizer, texts)[0].mean().item()
write_json(OUT.with_suffix(".json"), {
    "command": "python .ci/weights.py", "made": provenance(), "updates": done.steps, "tokens": done.steps * ROWS * LENGTH,
    "seconds": done.seconds, "stories": 20_000, "parameters": sum(p.numel() for p in model.parameters()),
    "nelbo_nats_per_story": nats, "entropy_nats_per_story": toy.entropy(language), "stories_scored": len(texts)})
