"""Shared by all tests: the project's folder on the path, one thread (equal results whatever the machine), a small world and policy."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)

from data import TESTBEDS, Tokenizer, build_world                  # noqa: E402  (after the path is set)
from evaluate import make_prompts                                  # noqa: E402
from model import ModelConfig, Policy                              # noqa: E402


@pytest.fixture(scope="session")
def world():
    return build_world(dict.fromkeys(("test", "validation", *TESTBEDS, "labeled", "unlabeled", "base"), 60))


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer()


@pytest.fixture
def policy(tokenizer):
    """A random policy, its head scaled up so that its choices are decided, as a trained one's are."""
    torch.manual_seed(1)
    policy = Policy(ModelConfig(len(tokenizer), image_size=64, patch_size=8, vision_width=16, vision_layers=1, width=32, layers=2, heads=4, kv_heads=2))
    policy.embed.weight.data *= 8
    return policy.eval()


@pytest.fixture
def prompts(world, tokenizer):
    return make_prompts(world["test"][:12], tokenizer, 64)
