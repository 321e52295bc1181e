"""The benchmark: its samplers do the same work, its arithmetic is counted right, and it measures
everything that it names."""
import copy
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import bench
from bench import Products, Work, sample_plainly, separate_calls, tokens_written, workloads
from data import Tokenizer
from evaluate import tokens_of
from model import Example, Sampling, collate, sample, save

END = Tokenizer.EOS

def matrices(module):
    """{name: number of weights} of a module's matrices."""
    return {name: p.numel() for name, p in module.named_parameters() if p.dim() == 2}

def multiplications_of_vision(policy, images):
    """Counted by hand: all products of the vision tower for so many images of 64 patches."""
    tower = policy.vision
    per_patch = tower.patch.weight.numel() + sum(matrices(tower.blocks).values())
    return images * (64 * per_patch + policy.image_tokens * tower.project.weight.numel())

# ---------------------------------------------------------------- the plain sampler

@pytest.mark.parametrize("cached", [True, False])
def test_the_plain_sampler_gives_the_same_responses_and_shares_nothing(policy, prompts, cached):
    """It must do the same work, or the comparison of speeds means nothing."""
    policy.tokenizer = SimpleNamespace(EOS=-1)                     # nobody ends
    endless = tokens_of(sample(policy, prompts, Sampling(1, 1.0, 20, seed=5)))
    counts = Counter(token for (tokens,) in endless for token in tokens)
    policy.tokenizer = SimpleNamespace(EOS=counts.most_common(1)[0][0])    # one that does occur
    expected = [tokens for (tokens,) in tokens_of(sample(policy, prompts, Sampling(1, 1.0, 20, 5)))]
    uniforms = torch.rand(len(prompts), 1, 20, generator=torch.Generator().manual_seed(5))[:, 0]
    with Products() as once:
        assert sample_plainly(policy, prompts, 1.0, uniforms, cached) == expected
    with Products() as twice:
        sample_plainly(policy, prompts * 2, 1.0, uniforms.repeat(2, 1), cached)
    assert twice.multiplications == 2 * once.multiplications
    assert len({len(tokens) for tokens in expected}) > 2

# ---------------------------------------------------------------- arithmetic

def test_products_are_all_there_forward_and_backward(policy, prompts):
    """Counted by hand: every weight once forward and twice backward (but not towards pixels)."""
    images = torch.stack([prompt.image for prompt in prompts[:3]])
    ids = torch.randint(4, 100, (3, 9))
    with Products() as both:
        torch.autograd.grad(policy(images, ids).sum(), list(policy.parameters()))
    text, image = ids.numel(), 3 * policy.image_tokens
    block, head = sum(matrices(policy.blocks[0]).values()), policy.embed.weight.numel()
    forward = multiplications_of_vision(policy, 3) + (image + text) * 2 * block + text * head
    not_needed = 3 * 64 * policy.vision.patch.weight.numel()
    assert both.multiplications == 3 * forward - not_needed
    for mode in (torch.enable_grad, torch.inference_mode):         # products come as mm or linear
        with mode(), Products() as one_way:
            policy(images, ids)
        assert one_way.multiplications == forward

def test_shared_beginnings_are_read_once_and_not_at_all_in_the_last_block(policy, prompts):
    """Arithmetic of an update on 6 rows of 2 questions, counted by hand: what makes it cheaper than
    whole rows."""
    batch = collate([Example(*prompts[q], [20, 21, END]) for q in (0, 0, 0, 1, 1, 1)])
    with Products() as products, torch.no_grad():
        policy.loss(*batch)
    block = matrices(policy.blocks[0])
    beginnings, rows = 2 * (policy.image_tokens + batch[1].shape[1]), 6 * 3            # tokens
    # of the last of two blocks, the beginnings need keys and values (and get queries)
    once = sum(block.values()) + block["kv.weight"] + block["q.weight"]
    per_row = 2 * sum(block.values()) + policy.embed.weight.numel()
    expected = multiplications_of_vision(policy, 2) + beginnings * once + rows * per_row
    assert products.multiplications == expected

# ---------------------------------------------------------------- workloads

@pytest.fixture
def small(policy, monkeypatch):
    """A policy that often writes line breaks and never ends, and responses of 8 tokens at most."""
    monkeypatch.setattr(bench, "LONGEST", 8)
    policy.tokenizer = copy.copy(policy.tokenizer)
    policy.tokenizer.EOS = -1
    return policy

def give_line_breaks(policy, prompts):
    """Let the policy's most frequent token be its line break."""
    responses = tokens_of(sample(policy, prompts, Sampling(4, 1.0, 8, seed=0)))
    counts = Counter(token for group in responses for tokens in group for token in tokens)
    policy.tokenizer.breaks = {counts.most_common(1)[0][0]}

def test_all_samplers_are_asked_for_the_same_responses(small, prompts):
    """Separate calls of a workload: as many responses to the same texts at the same temperatures,
    and the tokens that `sample` writes are counted without the prefixes."""
    give_line_breaks(small, prompts)
    found = workloads(small, prompts)
    assert list(found) == ["T = 1", "sweep", "step labels"]
    for work in found.values():
        asked, L = Counter(), work.how.rollouts
        temperatures = work.how.temperature
        if isinstance(temperatures, float):
            temperatures = [temperatures] * L
        for q, prompt in enumerate(work.prompts):
            for prefix in work.prefixes[q] if work.prefixes else [[]]:
                asked.update((q, *prompt.ids, *prefix, t) for t in temperatures)
        number = {id(prompt.image): q for q, prompt in enumerate(prompts)}
        for texts, n, temperature in separate_calls(work):
            for text in texts:
                asked[number[id(text.image)], *text.ids, temperature] -= n
        assert set(asked.values()) == {0}
        given = sum(len(prefix) for group in work.prefixes or [] for prefix in group)
        prefixes = sum(map(len, work.prefixes)) if work.prefixes else len(work.prompts)
        # nobody ends: every response has 8 tokens
        assert tokens_written(small, work) == L * (8 * prefixes - given)

def test_the_steps_that_are_continued_end_with_a_line_break(small, prompts):
    give_line_breaks(small, prompts)
    steps = workloads(small, prompts)["step labels"].prefixes
    ends = {prefix[-1] for group in steps for prefix in group}
    assert ends == small.tokenizer.breaks
    assert all(len(prefix) < 8 for group in steps for prefix in group)

def test_plain_calls_are_cut_into_parts_with_all_responses(small, prompts):
    work = Work(prompts[:3], Sampling(4, [0.5, 0.5, 1.0, 1.0], 8, seed=0))
    calls = separate_calls(work)
    with ThreadPoolExecutor(2) as pool:
        written = bench.tokens_written_plainly(small, calls, pool, rows=5)
    assert written == 3 * 4 * 8 and [n for _, n, _ in calls] == [2, 2]

# ---------------------------------------------------------------- the whole

def test_the_benchmark_measures_everything_it_names(small, prompts, tmp_path, monkeypatch, capsys):
    """From a saved policy to the JSON in the last line; the policy's line break is made frequent by
    the tokenizer that the benchmark loads it with."""
    give_line_breaks(small, prompts)
    save(tmp_path / "policy.safetensors", small)
    tokenizer = small.tokenizer
    tokenizer.prompt = Tokenizer().prompt
    tokenizer.response = Tokenizer().response
    monkeypatch.setattr(bench, "Tokenizer", lambda: tokenizer)
    found = bench.main([str(tmp_path), "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == json.loads(json.dumps(found)) and len(lines) == 14
    assert list(found["sampling"]) == ["T = 1", "sweep", "step labels"]
    assert list(found["sampling"]["T = 1"]) == ["sample", "plain", "no cache"]
    assert list(found["parts"]) == ["prefill", "decode 1024 rows", "sample 1024 responses",
                                    "training"]
    assert list(found["seconds"]) == ["questions", "responses", "tokens", "width"]
    for what in ("sampling", "parts", "seconds"):
        for name, numbers in found[what].items():
            assert len(numbers) >= 2 and min(numbers.values()) > 0, name
    assert found["peak_gb"] > 0.05

def test_a_system_that_does_not_say_its_peak_memory(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)             # as if it were not there
    assert bench.peak_gb("cpu") == "not known"

def test_without_a_run_it_takes_random_weights_of_the_cpu_preset():
    first, second = bench.random_policy("cpu"), bench.random_policy("cpu")
    assert first.config.width == 128 and len(first.blocks) == 3
    assert torch.equal(first.embed.weight, second.embed.weight)

@pytest.mark.parametrize("argv, words", [
    (["nowhere"], "nowhere: not the folder of a finished run"), (["--repeats", "0"], "--repeats 0"),
    (["--repeats", "x"], "invalid int"), (["a", "b"], "unrecognized")])
def test_wrong_use_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
