"""The sampler: official answers, schedules, distributions, batches, errors."""

import json
from pathlib import Path

import pytest
import torch

from nanollada.sampler import generate, num_transfer_tokens
from hash_oracle import MASK_ID, hash_oracle

GOLDEN = json.loads((Path(__file__).parent / "golden" / "official_generate.json").read_text())


class Counted:
    "A denoiser that counts its calls, answers in a given dtype, and notes whether it was told of padding."

    def __init__(self, denoiser, dtype=torch.float64):
        self.denoiser, self.dtype, self.calls, self.padded = denoiser, dtype, 0, False

    def __call__(self, ids, **kwargs):
        self.calls, self.padded = self.calls + 1, self.padded or bool(kwargs)
        return self.denoiser(ids, **kwargs).to(self.dtype)


def replay(case, denoiser, **changes):
    "Run one golden case."
    settings = {key: case[key] for key in ("steps", "gen_length", "block_length", "temperature", "cfg_scale", "remasking")}
    seed = case["seed"]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return generate(denoiser, torch.tensor(case["prompt_ids"]), MASK_ID, attention_mask=torch.tensor(case["attention_mask"]),
                    generator=generator, **(settings | changes))


def test_oracle_is_the_one_described():
    check = GOLDEN["oracle_check"]
    logits = hash_oracle(torch.tensor(check["ids"]))
    assert logits.argmax(-1).tolist() == check["argmax"]
    torch.testing.assert_close(logits[0, 4], torch.tensor(check["logits_0_4"], dtype=torch.float64))
    torch.testing.assert_close(logits[1, 0], torch.tensor(check["logits_1_0"], dtype=torch.float64))
    assert logits.sum().item() == pytest.approx(check["sum"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", GOLDEN["generate"], ids=lambda case: case["name"])
def test_official_answers(case, dtype):
    denoiser = Counted(hash_oracle, dtype)
    assert replay(case, denoiser).tolist() == case["output_ids"]
    useful = min(case["forward_calls"], case["gen_length"])  # steps that commit nothing are skipped
    assert denoiser.calls == useful
    assert denoiser.padded == (0 in sum(case["attention_mask"], []))


@pytest.mark.parametrize("case", GOLDEN["num_transfer_tokens"])
def test_official_schedule(case):
    assert num_transfer_tokens(case["mask_counts"], case["steps"]).tolist() == case["answer"]
