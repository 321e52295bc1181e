"""Shared by all tests: the project's folder and tests/ on the path, no GPU, one thread (equal
results whatever the machine), a small world and a small random policy."""
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                            # never on a GPU by accident

import pytest                                                      # noqa: E402  (after the above)
import torch                                                       # noqa: E402

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    sys.path.insert(0, str(folder))
torch.set_num_threads(1)                                           # model.WORKERS is read from it
torch.backends.mps.is_available = lambda: False                    # nor on a Mac's GPU

from data import SPLITS, Tokenizer, build_world                    # noqa: E402
from evaluate import make_prompts                                  # noqa: E402
from model import ModelConfig, Policy                              # noqa: E402

@pytest.fixture(scope="session")
def world():
    return build_world(dict.fromkeys(SPLITS, 60))

@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer()

@pytest.fixture
def policy(tokenizer):
    """A random policy, its head scaled up so that its choices are decided, as a trained one's."""
    torch.manual_seed(1)
    policy = Policy(ModelConfig(len(tokenizer), image_size=64, patch_size=8, vision_width=16,
                                vision_layers=1, width=32, layers=2, heads=4, kv_heads=2),
                    tokenizer)
    policy.embed.weight.data *= 8
    return policy.eval()

@pytest.fixture
def prompts(policy, world):
    return make_prompts(policy, world["test"][:12])
