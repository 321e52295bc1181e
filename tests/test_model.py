"""The network, its sampler, its training and its files, against slow and obvious references."""
import copy
import errno
import io
import math
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import model
from data import Tokenizer
from model import (Example, ModelConfig, Optimizer, Policy, Prompt, Sampling, adamw, backward,
                   batches, causal, collate, draw, fit, load, load_network, read_json, rotate,
                   sample, sample_without_cache, save, seed_for, write_json, write_whole)
from prm import RewardModel
from weights.base import Muon, split_parameters

END = Tokenizer.EOS
def pad(prompts):
    """Images and prompt ids of a batch, padded on the right."""
    ids = [torch.tensor(prompt.ids) for prompt in prompts]
    images = torch.stack([prompt.image for prompt in prompts])
    return images, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)

def tokens_of(responses):
    """[question][rollout] of Response -> the same of token lists."""
    return [[response.tokens for response in group] for group in responses]

def let_end_by(policy, token):
    """Let a token (-1: none) be the end of a response, instead of <eos>."""
    policy.tokenizer = SimpleNamespace(EOS=token)

def gradients_of(policy):
    return [p.grad.clone() for p in policy.parameters()]

# ---------------------------------------------------------------- the network

def test_batch_equals_rows_one_by_one(policy, prompts):
    together = policy(*pad(prompts))
    for row, prompt in enumerate(prompts):
        alone = policy(prompt.image[None], torch.tensor([prompt.ids]))[0]
        torch.testing.assert_close(together[row, :len(prompt.ids)], alone, rtol=1e-4, atol=1e-4)

def test_loss_of_shared_beginnings_equals_the_loss_of_whole_rows(policy, prompts):
    """Values and gradients, against one causal sequence per row: images and prompts read once for
    several rows, in mixed order, of unequal lengths, one image with two prompts, one prompt of a
    single token."""
    asked = [prompts[2], prompts[0], prompts[1], Prompt(prompts[1].image, prompts[1].ids[-1:])]
    examples = []
    for i, q in enumerate((0, 1, 0, 2, 1, 0, 3)):
        examples.append(Example(*asked[q], [20 + i] * (3 + 2 * i) + [END]))
    batch = collate(examples)
    assert len(batch[0]) == 4                                      # different (image, prompt) pairs
    assert all(torch.equal(batch[0][n], e.image) for n, e in zip(batch[3], examples))
    total = 0.0
    for image, prompt, response, _ in examples:
        logits = policy(image[None], torch.tensor([prompt + response]))[0]
        before = logits[len(prompt) - 1:-1]                        # of what precedes each token
        total = total + F.cross_entropy(before, torch.tensor(response), reduction="sum")
    plain = total / sum(len(example.response) for example in examples)
    shared = policy.loss(*batch)
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-5)
    parameters = list(policy.parameters())
    gradients = torch.autograd.grad(shared, parameters)
    for a, b in zip(gradients, torch.autograd.grad(plain, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

def test_patches_are_embedded_as_by_the_convolution(policy, prompts):
    tower, seen = policy.vision, []
    hook = tower.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = pad(prompts[:3])[0]
    tower(images)
    hook.remove()
    patches = tower.patch(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    expected = patches.flatten(2).transpose(1, 2) + tower.position
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)

def test_later_tokens_never_change_earlier_logits_and_images_matter(policy, prompts):
    images, ids = pad(prompts[:2])
    before, changed = policy(images, ids), ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % policy.config.vocabulary
    after = policy(images, changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.allclose(before, policy(images.flip(0), ids))

def test_pixel_shuffle_keeps_neighbours_together(tokenizer):
    """Image token i must hold exactly the patches of its own square: a change in one square changes
    one input of the projector."""
    config = ModelConfig(len(tokenizer), image_size=64, vision_layers=0, patch_size=8)
    policy = Policy(config, tokenizer)
    image = torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    for square in range(16):
        other, (row, column) = image.clone(), divmod(square, 4)
        other[0, row * 16 + 3, column * 16 + 11] = 0
        changed = (policy.vision(image) != policy.vision(other)).any(dim=-1)[0]
        assert changed.nonzero().flatten().tolist() == [square]

def test_grouped_query_attention_equals_explicit_attention(policy):
    """The decoder block against attention written out with loops over heads."""
    block, x = policy.blocks[0], torch.randn(2, 9, policy.config.width)
    cos, sin = policy.rope(torch.arange(9)[None])
    q, k, v = block.qkv(x, cos, sin)
    heads = []
    for head in range(policy.config.heads):
        group = head // (policy.config.heads // policy.config.kv_heads)
        scores = q[:, head] @ k[:, group].transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v[:, group])
    expected = block.finish(x, torch.stack(heads, 1))
    found = block(x, cos, sin, causal(9, x.device))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

def test_rope_depends_on_distance_only(policy):
    D = policy.config.width // policy.config.heads
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)

    def score(i, j):
        left = rotate(q, *policy.rope(torch.tensor([[i]])))
        return (left * rotate(k, *policy.rope(torch.tensor([[j]])))).sum()

    torch.testing.assert_close(score(7, 3), score(19, 15), rtol=1e-4, atol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-4

# ---------------------------------------------------------------- sampler

def test_sampler_equals_the_path_without_cache(policy, prompts):
    """Prefill and decode with a shared prefix, unequal prompts, mixed temperatures and rows that
    leave = a full forward per token."""
    how = Sampling(4, [0.0, 0.6, 1.0, 1.5], 24, seed=3)
    assert len({len(prompt.ids) for prompt in prompts}) > 3
    let_end_by(policy, -1)
    endless = tokens_of(sample(policy, prompts, how))
    counts = Counter(token for group in endless for tokens in group for token in tokens)
    let_end_by(policy, counts.most_common(3)[2][0])                # a token that does occur
    got = sample(policy, prompts, how)
    uniforms = torch.rand(len(prompts), 4, 24, generator=torch.Generator().manual_seed(3))
    ended = 0
    for q, prompt in enumerate(prompts):
        for l, temperature in enumerate(how.temperature):
            expected = sample_without_cache(policy, prompt, temperature, uniforms[q, l])
            assert got[q][l].tokens == expected.tokens
            assert got[q][l].complete == expected.complete
            torch.testing.assert_close(got[q][l].log_probs, expected.log_probs, rtol=1e-3,
                                       atol=1e-4)
            ended += expected.complete
    assert 0 < ended < 4 * len(prompts)                            # both ways to end occurred

def test_questions_that_are_done_leave_the_batch(policy, prompts, monkeypatch):
    """All in one batch, one response each: as most have ended, the others go on without them, to
    the same tokens."""
    here, decode = [], model._decode

    def counted(policy, tokens, owner, start, *rest):
        here.append(len(start))
        return decode(policy, tokens, owner, start, *rest)

    how = Sampling(1, 2.0, 60, seed=3)
    let_end_by(policy, -1)
    endless = tokens_of(sample(policy, prompts, how))
    counts = Counter(token for (tokens,) in endless for token in set(tokens))
    let_end_by(policy, counts.most_common(1)[0][0])                # most responses have it
    monkeypatch.setattr(model, "_decode", counted)
    got = sample(policy, prompts, how, rows=1000)
    uniforms = torch.rand(len(prompts), 1, 60, generator=torch.Generator().manual_seed(3))
    for prompt, (response,), (line,) in zip(prompts, got, uniforms):
        assert response.tokens == sample_without_cache(policy, prompt, how.temperature, line).tokens
    assert here[0] == len(prompts) and len(set(here)) >= 3 and here[-1] <= 3

def test_same_seed_same_responses_whatever_the_batch(policy, prompts):
    how = Sampling(3, 1.0, 20, seed=5)
    whole = tokens_of(sample(policy, prompts, how))
    for rows in (1, 4, 7, 1000):
        assert tokens_of(sample(policy, prompts, how, rows=rows)) == whole
    assert tokens_of(sample(policy, prompts, how._replace(seed=6))) != whole

def test_same_responses_with_one_worker_or_three(policy, prompts, monkeypatch):
    """To the bit, log-probabilities too: what is computed together does not depend on who does."""
    found = []
    for workers in (1, 3):
        monkeypatch.setattr(model, "WORKERS", workers)
        how = Sampling(5, [0.0, 0.5, 1.0, 1.0, 1.5], 20, seed=5)
        found.append(sample(policy, prompts, how))
    assert found[0] == found[1]

def test_common_random_numbers_over_temperatures(policy, prompts):
    """One call for a sweep = one call per temperature, when responses of the same stream share
    their random numbers."""
    how = Sampling(6, [0.3, 0.3, 0.8, 0.8, 1.6, 1.6], 20, seed=5, streams=[0, 1, 0, 1, 0, 1])
    swept = tokens_of(sample(policy, prompts, how))
    for i, temperature in enumerate((0.3, 0.8, 1.6)):
        alone = tokens_of(sample(policy, prompts, Sampling(2, temperature, 20, seed=5)))
        assert [group[2 * i:2 * i + 2] for group in swept] == alone

def test_rollouts_continue_exactly_their_prefix(policy, prompts, monkeypatch):
    """Unequal prefixes, unequal numbers of them, one question with none and one with more than a
    batch holds: each rollout = a prompt that ends with the prefix, at the temperature and with the
    numbers of its turn."""
    prefixes = [[[20, 21], [20, 21, 22, 23]], [[]], [], [[30] * 7, [31], [30] * 8]]
    temperatures = [0.7, 1.4]
    rows = []                                                      # of each batch

    def watched(policy, prompts, counts, *more):
        rows.append(sum(counts))
        return sample_batch(policy, prompts, counts, *more)

    sample_batch = model._sample_batch
    monkeypatch.setattr(model, "_sample_batch", watched)
    got = sample(policy, prompts[:4], Sampling(2, temperatures, 20, seed=5), prefixes, rows=5)
    assert sum(rows) == 12 and max(rows) <= 5                      # the last question has 6
    uniforms = torch.rand(4, 2, 20, generator=torch.Generator().manual_seed(5))
    assert [len(group) for group in got] == [4, 2, 0, 6]
    for q, prompt in enumerate(prompts[:4]):
        for i, response in enumerate(got[q]):
            prefix, l = prefixes[q][i // 2], i % 2
            longer = Prompt(prompt.image, prompt.ids + prefix)
            rest = sample_without_cache(policy, longer, temperatures[l],
                                        uniforms[q, l, len(prefix):])
            assert response.tokens == prefix + rest.tokens
            assert response.complete == rest.complete

def test_every_response_is_reported_once_as_it_ends(policy, prompts):
    for end in (END, 40):
        let_end_by(policy, end)
        ended = []
        sample(policy, prompts, Sampling(3, 1.0, 20, seed=5), rows=7, progress=ended.append)
        assert sum(ended) == 3 * len(prompts)

def test_without_questions_there_are_no_responses(policy):
    assert sample(policy, [], Sampling(3, 1.0, 20, seed=5)) == []

def cache_of(rows, values):
    """One layer of a sampler's cache, keys and values (rows, 1 head, 2 steps, 1 number): row i
    holds values[i] at step 0; no step 1 was written (NaN)."""
    part = torch.full((rows, 1, 2, 1), math.nan)
    part[:len(values), 0, 0, 0] = torch.tensor(values)
    return [[part.clone(), part.clone() + 100]]

def test_branch_does_its_worked_example():
    """Six responses to one question in two rows: (0, 7) and (1, 5) stay, (0, 9) moves to row 2."""
    suffix = cache_of(6, [10.0, 11.0])
    owner = torch.tensor([3, 4, 0, 0, 0, 0])       # two numbers, to see which of them goes along
    row, feed = model._branch(torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([7, 7, 9, 7, 5, 5]),
                              owner, suffix, t=1, vocabulary=50)
    assert row.tolist() == [0, 0, 2, 0, 1, 1] and feed.tolist() == [7, 5, 9]
    assert owner.tolist() == [3, 4, 3, 0, 0, 0]                    # row 2 is of row 0's question
    for part, first in zip(suffix[0], (10.0, 110.0)):              # keys, then values
        assert part[:3, 0, 0, 0].tolist() == [first, first + 1, first]
        assert part[:, 0, 1].isnan().all()                         # nothing else was touched

def test_branch_closes_gaps():
    """Rows in use are 0 .. B-1: row 3 goes on while 0 and 1 are done, so it moves to row 0, and of
    its two tokens one moves to row 1; row 2 stays with the cache and question it has."""
    suffix = cache_of(4, [10.0, 11.0, 12.0, 13.0])
    owner = torch.tensor([5, 6, 7, 8])
    row, feed = model._branch(torch.tensor([3, 2, 3, 3]), torch.tensor([9, 4, 8, 9]), owner, suffix,
                              t=1, vocabulary=50)
    assert row.tolist() == [1, 2, 0, 1] and feed.tolist() == [8, 9, 4]
    assert owner[:3].tolist() == [8, 8, 7]
    assert suffix[0][0][:3, 0, 0, 0].tolist() == [13.0, 13.0, 12.0]

def test_equal_beginnings_share_a_row(policy, prompts, monkeypatch):
    """One forward pass per different beginning: rows decoded = different proper beginnings of the
    responses, counted by hand."""
    fed, decode = [], model._decode

    def counted(policy, tokens, *rest):
        fed.append(len(tokens))
        return decode(policy, tokens, *rest)

    monkeypatch.setattr(model, "_decode", counted)
    how = Sampling(6, [0.0, 0.0, 0.3, 0.3, 1.0, 1.0], 12, seed=5)
    beginnings, in_all = set(), 0
    for q, group in enumerate(tokens_of(sample(policy, prompts, how, rows=20))):
        for tokens in group:
            beginnings |= {(q, *tokens[:n]) for n in range(1, len(tokens))}
            in_all += len(tokens)
    assert sum(fed) == len(beginnings) < in_all

def test_greedy_takes_the_most_likely_token_and_leaves_the_policy_as_it_was(policy, prompts):
    policy.train()
    before = copy.deepcopy(policy.state_dict())
    (response,), = sample(policy, prompts[:1], Sampling(1, 0, 10, seed=0))
    ids = list(prompts[0].ids)
    for token in response.tokens:
        logits = policy(prompts[0].image[None], torch.tensor([ids]))[0, -1]
        assert token == logits.argmax().item()
        ids.append(token)
    assert policy.training
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())

def test_draw_follows_the_distribution():
    logits, n = torch.tensor([[2.0, 0.0, -1.0, 1.0]]), 20_000
    uniform = (torch.arange(n) + 0.5) / n          # an even grid: shares must be exact to 1/n
    free = torch.full((n,), -1)
    for temperature in (0.5, 1.0, 2.0):
        tokens, log_probs = draw(logits.expand(n, 4), torch.full((n,), temperature), uniform, free)
        expected = (logits[0] / temperature).softmax(0)
        shares = torch.bincount(tokens, minlength=4) / n
        torch.testing.assert_close(shares, expected, rtol=0, atol=2 / n)
        torch.testing.assert_close(log_probs, expected.log()[tokens])
    # the last number below 1 stays inside
    last, _ = draw(logits, torch.tensor([1.0]), torch.tensor([1 - 2**-24]), torch.tensor([-1]))
    assert last.item() == 3

def test_draw_takes_a_forced_token_and_says_how_likely_it_was():
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]]).expand(3, 4)
    temperature, uniform = torch.tensor([1.0, 2.0, 0.0]), torch.zeros(3)
    tokens, log_probs = draw(logits, temperature, uniform, torch.tensor([2, 2, 2]))
    assert tokens.tolist() == [2, 2, 2]
    for i, T in enumerate((1.0, 2.0, 1.0)):                        # greedy: the policy's own, T = 1
        torch.testing.assert_close(log_probs[i], (logits[0] / T).log_softmax(0)[2])

# ---------------------------------------------------------------- training

def examples_of(prompts):
    """Seven examples of unequal lengths, two of them of one question."""
    pairs = [(q, [20 + q] * (1 + 3 * q) + [END]) for q in range(6)] + [(2, [40, END])]
    return [Example(*prompts[q], response) for q, response in pairs]

def test_batches_hold_every_example_once_and_images_together(prompts):
    examples = []
    for q in range(12):
        for number in range(1 + q % 7):
            examples.append(Example(*prompts[q], [10 * q + number, END]))
    groups = sum(math.ceil((1 + q % 7) / 4) for q in range(12))
    stream, number_of_batches = batches(examples, 8, random.Random(0), 4), len(examples) / 8
    together = []                                                  # images of each batch
    for _ in range(2):                                             # twice around
        seen, images = [], 0
        for _ in range(math.ceil(number_of_batches)):
            batch = next(stream)
            seen += [example.response[0] for example in batch]
            together.append(frozenset(id(example.image) for example in batch))
            images += len(together[-1])
        assert sorted(seen) == sorted(example.response[0] for example in examples)
        assert images <= groups + number_of_batches                # a batch's end may cut a group
    half = len(together) // 2
    assert not set(together[:half]) & set(together[half:])         # shuffled anew

def test_micro_batches_of_any_size_give_the_gradient_of_the_whole_batch(policy, prompts):
    examples, found = examples_of(prompts), []
    policy.loss(*collate(examples)).backward()
    expected = gradients_of(policy)
    with ThreadPoolExecutor(2) as pool:
        for micro_batch in (1, 3, len(examples), 100):
            loss = backward(policy, examples, micro_batch, pool)
            found.append((loss, gradients_of(policy)))
    for loss, gradients in found:
        assert loss == pytest.approx(policy.loss(*collate(examples)).item(), rel=1e-5)
        for gradient, whole in zip(gradients, expected):
            torch.testing.assert_close(gradient, whole, rtol=1e-3, atol=1e-6)

def test_fit_makes_the_update_of_the_whole_batch(policy, prompts, monkeypatch):
    """In parts of unequal numbers of tokens, by one worker or two: the clipped gradient of the mean
    loss over all of them, and equal bits."""
    examples, start = examples_of(prompts), copy.deepcopy(policy.state_dict())
    loss = policy.loss(*collate(examples))
    loss.backward()
    norm = torch.nn.utils.get_total_norm(gradients_of(policy)).item()
    expected = [gradient / max(1.0, norm) for gradient in gradients_of(policy)]
    updates = []
    for workers in (1, 2):
        monkeypatch.setattr(model, "WORKERS", workers)
        policy.load_state_dict(start)
        optimizer = Optimizer([torch.optim.SGD(policy.parameters(), lr=1.0)], 1)
        mean = fit(policy, optimizer, iter([examples]), 1, 2, "test")
        assert mean == pytest.approx(loss.item(), rel=1e-5) and optimizer.updates == 1
        updates.append([start[name] - p.detach() for name, p in policy.named_parameters()])
        assert all(p.grad is None for p in policy.parameters())    # pi_0 lives on, without them
    for one, two, gradient in zip(*updates, expected):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, gradient, rtol=1e-3, atol=1e-5)

def test_fit_takes_the_next_batches_and_returns_the_mean_loss_of_the_last_100(policy, prompts,
                                                                              monkeypatch):
    """What is left in the stream is for the next call."""
    losses = iter(range(1000))
    monkeypatch.setattr(model, "backward", lambda *_: next(losses))
    optimizer = Optimizer([torch.optim.SGD(policy.parameters(), lr=1.0)], 1)
    monkeypatch.setattr(optimizer, "step", lambda: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(1.0))
    stream = iter(range(1000))
    assert fit(policy, optimizer, stream, 0, 2, "test") is None and next(stream) == 0
    assert fit(policy, optimizer, stream, 3, 2, "test") == 1 and next(stream) == 4
    assert fit(policy, optimizer, stream, 150, 2, "test") == sum(range(53, 153)) / 100

@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_named_and_not_made(policy, prompts, broken, monkeypatch):
    examples, calls, backward = examples_of(prompts), [], model.backward

    def breaks(policy, *rest):
        loss = backward(policy, *rest)
        calls.append(loss)
        if len(calls) < 3:
            return loss
        if broken == "gradient":
            policy.norm.weight.grad[0] = math.inf
        after_two.append(copy.deepcopy(policy.state_dict()))
        return math.nan if broken == "loss" else loss

    after_two = []
    monkeypatch.setattr(model, "backward", breaks)
    optimizer = Optimizer([adamw(policy.parameters(), 1e-3)], 1)
    with pytest.raises(FloatingPointError, match="a title.* update 3 "):
        fit(policy, optimizer, iter([examples] * 9), 9, 4, "a title")
    assert optimizer.updates == 2
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, after_two[0][name])

def test_the_schedule_is_a_linear_start_then_constant_or_a_cosine():
    for decay_over in (0, 8):
        parameter = torch.nn.Parameter(torch.zeros(3))
        parts = [torch.optim.SGD([parameter], lr=lr) for lr in (1.0, 0.3)]
        optimizer, seen = Optimizer(parts, 4, decay_over), []
        for _ in range(10):
            parameter.grad = torch.zeros(3)
            optimizer.step()
            seen.append([part.param_groups[0]["lr"] for part in parts])
        for update, (first, second) in enumerate(seen):
            expected = min(1.0, (update + 1) / 4)
            if decay_over:                                         # from 1 down to a tenth
                wave = (1 + math.cos(math.pi * min(1.0, update / 8))) / 2
                expected *= 0.1 + 0.9 * wave
            assert first == pytest.approx(expected) and second == pytest.approx(0.3 * expected)

def test_norms_and_biases_do_not_decay(policy):
    decaying, others = adamw(policy.parameters(), 1e-3).param_groups
    assert decaying["weight_decay"] > 0 and others["weight_decay"] == 0
    is_other = {id(p) for p in others["params"]}
    for name, p in policy.named_parameters():
        assert (id(p) in is_other) == (name.endswith("bias") or "norm" in name)
    assert len(decaying["params"]) + len(others["params"]) == len(list(policy.parameters()))

def test_muon_makes_the_updates_of_torch():
    """Ours in fp32 against torch.optim.Muon, which rounds to bf16: the same path within that
    rounding, for tall, wide and equal shapes."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((24, 8), (8, 24), (24, 8), (16, 16))]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    optimizers = [Muon(ours, lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1,
                                   adjust_lr_fn="match_rms_adamw")]
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - p).norm()

def test_muon_gets_the_matrices_inside_and_adamw_the_rest(policy):
    matrices, rest = split_parameters(policy)
    assert len(matrices) + len(rest) == len(list(policy.parameters()))
    is_inside = {id(p) for p in matrices}
    for name, p in policy.named_parameters():
        outside = name in ("embed.weight", "vision.position", "vision.patch.weight")
        assert (id(p) in is_inside) == (p.dim() == 2 and not outside), name

def test_seeds_differ_by_purpose_and_never_change():
    purposes = [(0,), (1,), (0, "base"), (0, "labels"), (0, "generate", 1), (0, "generate", 2)]
    assert len({seed_for(*purpose) for purpose in purposes}) == len(purposes)
    assert seed_for(3, "generate", 2) == 2911408285                # in any process, on any machine

# ---------------------------------------------------------------- files

def assert_same_weights(first, second):
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name

def refused(path, tokenizer, kind=Policy):
    """The one clear ValueError by which a pair of files is refused, which names one of them."""
    with pytest.raises(ValueError) as caught:
        load_network(path, tokenizer, kind=kind)
    error = str(caught.value)
    assert error.startswith((str(path), str(path.with_suffix(".json")))), error
    assert "\n" not in error and len(error) < 1000
    return error

def test_write_whole_replaces_and_leaves_nothing_beside(tmp_path):
    for data in (b"one", b"two" * 1000):
        write_whole(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "file", b"x")
    with pytest.raises(OSError):
        write_whole(tmp_path / "file" / "file", b"x")

def test_json_comes_back_as_it_was_and_never_holds_nan(tmp_path):
    path = tmp_path / "file.json"
    content = {"é": [1, 0.1, 1e-300, None, True, "\n"], "b": {"0.3": 2}, "a": {}}
    write_json(path, content)
    assert read_json(path) == content and "checksum" not in content
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(path, {"numbers": [number]})
    assert read_json(path) == content and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")

def test_json_of_numbered_things_is_read_as_it_was_written(tmp_path):
    """9 before 10, but "10" before "9": the checksum is of what will be read."""
    path = tmp_path / "file.json"
    write_json(path, {"accuracy": {9: 0.5, 10: 0.25}, "mixed": {0.5: 1, "a": 2, None: 3}})
    assert read_json(path) == {"accuracy": {"9": 0.5, "10": 0.25},
                               "mixed": {"0.5": 1, "a": 2, "null": 3}}

@pytest.mark.parametrize("text", ["", "[" * 100_000, "[1]", "3", "null", "{}", '{"checksum": 3}',
                                  '{"a": 1}', "\xff", "nonsense", "1" * 10_000])
def test_json_that_is_not_ours_is_named(text, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: damaged") and len(str(caught.value)) < 500

def test_a_changed_number_in_a_json_is_found(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"seed": 3})
    text = path.read_text()
    path.write_text(text.replace("\n", "").replace('"seed": 3', '"seed":3'))
    assert read_json(path) == {"seed": 3}                          # white space is no content
    path.write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(ValueError, match="file.json.*checksum"):
        read_json(path)

def test_saved_networks_are_the_same_networks(policy, prompts, tokenizer, tmp_path):
    path = tmp_path / "policy.safetensors"
    save(path, policy, loss=0.5)
    loaded = load_network(path, tokenizer)
    assert torch.equal(loaded.eval()(*pad(prompts)), policy(*pad(prompts)))
    assert loaded.config == policy.config and loaded.tokenizer is tokenizer
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["policy.json", path.name]
    about = load(path, Policy(policy.config, tokenizer))
    assert about["loss"] == 0.5 and about["vocabulary"] == tokenizer.symbols
    prm = RewardModel(policy.config, tokenizer)
    save(tmp_path / "prm.safetensors", prm)
    assert_same_weights(load_network(tmp_path / "prm.safetensors", tokenizer, kind=RewardModel),
                        prm)
    refused(path, tokenizer, kind=RewardModel)                     # one is not the other
    refused(tmp_path / "prm.safetensors", tokenizer)
    for name in ("policy.json", "policy.safetensors"):
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError):
            load_network(path, tokenizer)
        save(path, policy)

def test_a_policy_of_another_vocabulary_is_refused(policy, tmp_path):
    """Also of one with the same words in another order: its ids mean other words."""
    path, other = tmp_path / "policy.safetensors", Tokenizer()
    other.symbols = other.symbols[::-1]
    save(path, policy)
    assert "vocabulary" in refused(path, other)

@pytest.mark.parametrize("name", ["policy.safetensors", "policy.json"])
def test_no_damage_is_read_as_something_else(name, policy, tokenizer, tmp_path):
    """Bits flipped all over the file, and truncations: an error that names the file, or, in white
    space of a JSON, the same content."""
    path, rng = tmp_path / "policy.safetensors", random.Random(0)
    save(path, policy, loss=0.5)
    about, whole = read_json(tmp_path / "policy.json"), (tmp_path / name).read_bytes()
    damaged = [whole[:rng.randrange(len(whole))] for _ in range(30)]
    damaged += [whole + b"x", b"", b"\0" * 1000]
    for i in [*range(0, 100, 2), *rng.sample(range(len(whole)), 70)]:
        flipped = bytes([whole[i] ^ 1 << rng.randrange(8)])
        damaged.append(whole[:i] + flipped + whole[i + 1:])
    same = 0
    for data in damaged:
        (tmp_path / name).write_bytes(data)
        try:
            loaded = load_network(path, tokenizer)
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / name))
        else:
            assert name == "policy.json" and read_json(tmp_path / name) == about
            assert_same_weights(loaded, policy)
            same += 1
    assert same <= 0.3 * len(damaged)

def full_after(left):
    """`open` on a disk that is full after `left` bytes."""
    class File(io.FileIO):
        def write(self, data):
            nonlocal left
            written = super().write(data[:left])
            left -= written
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return written

    return lambda path, mode: File(path, mode.replace("b", ""))

def test_a_full_disk_leaves_the_old_file(policy, tokenizer, tmp_path, monkeypatch):
    path, other = tmp_path / "policy.safetensors", Policy(policy.config, tokenizer)
    save(path, policy)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    size = len(old[path.name])
    for left in (0, 1, 100, 10_000, size - 1):
        monkeypatch.setattr(model, "open", full_after(left), raising=False)
        with pytest.raises(OSError, match="space"):
            save(path, other)
        assert {name: (tmp_path / name).read_bytes() for name in old} == old
    assert_same_weights(load_network(path, tokenizer), policy)
    # The weights are written, their description is not: together they are nobody's
    monkeypatch.setattr(model, "open", full_after(size + 10), raising=False)
    with pytest.raises(OSError, match="space"):
        save(path, other)
    assert "not of the JSON beside it" in refused(path, tokenizer)

# ---------------------------------------------------------------- training goes on

def both_optimizers(policy):
    """AdamW and Muon under one schedule, as the base is trained."""
    matrices, rest = split_parameters(policy)
    return Optimizer([adamw(rest, 1e-2), Muon(matrices, lr=1e-2)], 3, decay_over=9)

def stream_of(prompts):
    rng = random.Random(0)
    while True:
        yield rng.sample(examples_of(prompts), 4)

def test_training_that_is_saved_and_loaded_goes_on_to_the_same_bits(policy, prompts, tokenizer,
                                                                    tmp_path):
    path, start = tmp_path / "training.safetensors", copy.deepcopy(policy.state_dict())
    stream = stream_of(prompts)
    fit(policy, both_optimizers(policy), stream, 9, 3, "test")     # without a stop
    stopped = Policy(policy.config, tokenizer)
    stopped.load_state_dict(start)
    optimizer, stream = both_optimizers(stopped), stream_of(prompts)
    fit(stopped, optimizer, stream, 5, 3, "test")
    save(path, stopped, optimizer, number=5)
    resumed = Policy(policy.config, tokenizer)                     # all of it is another's
    optimizer = both_optimizers(resumed)
    about = load(path, resumed, optimizer)
    assert about["number"] == about["updates"] == optimizer.updates == 5
    assert_same_weights(resumed, stopped)
    fit(resumed, optimizer, stream, 4, 3, "test")
    assert_same_weights(resumed, policy)
    assert_same_weights(load_network(path, tokenizer), stopped)    # the weights alone, too

def test_an_optimizer_without_updates_is_saved_and_loaded_too(policy, tmp_path):
    path = tmp_path / "training.safetensors"
    save(path, policy, both_optimizers(policy))
    optimizer = both_optimizers(policy)
    load(path, policy, optimizer)
    assert optimizer.updates == 0 and optimizer.tensors() == {}

def test_a_loaded_network_trains_to_the_same_bits(policy, prompts, tokenizer, tmp_path):
    """Also where its tensors lie in memory must not matter."""
    path = tmp_path / "policy.safetensors"
    save(path, policy)
    loaded = load_network(path, tokenizer)
    for network in (policy, loaded):
        fit(network, both_optimizers(network), stream_of(prompts), 3, 3, "test")
    assert_same_weights(loaded, policy)
