"""What every test shares: one thread, no network, and the tokenizer that lies beside the checkout, if it does."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def minimind() -> Path:
    "The folder of a real third-party tokenizer; tests that need it are skipped where it is absent."
    shared = Path(os.environ.get("NANOLLADA_SHARED", Path(__file__).parent.parent.parent / "shared"))
    folder = shared / "tokenizers" / "minimind"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("no minimind tokenizer: set NANOLLADA_SHARED to a folder with tokenizers/minimind")
    return folder
