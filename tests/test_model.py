"""The network and its sampler, against slow and obvious references."""
import copy
import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import model
from data import Tokenizer
from model import Example, ModelConfig, Muon, Policy, Products, Prompt, batches, collate, draw, fit, load_policy, sample, sample_plainly, sample_without_cache, save_policy

END = Tokenizer.EOS


def pad(prompts, extra=()):
    ids = [torch.tensor(prompt.ids + list(extra)) for prompt in prompts]
    return torch.stack([prompt.image for prompt in prompts]), torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


def test_batch_equals_rows_one_by_one(policy, prompts):
    images, ids = pad(prompts)
    together = policy(images, ids)
    for row, prompt in enumerate(prompts):
        alone = policy(prompt.image[None], torch.tensor([prompt.ids]))[0]
        torch.testing.assert_close(together[row, :len(prompt.ids)], alone, rtol=1e-4, atol=1e-4)


def test_loss_of_shared_beginnings_equals_the_loss_of_whole_rows(policy, prompts):
    """Values and gradients, against one causal sequence per row: images and prompts read once for several rows, in mixed order, of
    unequal lengths, one image with two prompts, one prompt of a single token."""
    asked = [(prompts[2].image, prompts[2].ids), (prompts[0].image, prompts[0].ids), (prompts[1].image, prompts[1].ids), (prompts[1].image, prompts[1].ids[-1:])]
    examples = [Example(*asked[q], [20 + i] * (3 + 2 * i) + [END]) for i, q in enumerate((0, 1, 0, 2, 1, 0, 3))]
    batch = collate(examples)
    assert len(batch[0]) == 4 and all(torch.equal(batch[0][n], e.image) for n, e in zip(batch[3], examples))
    losses = [F.cross_entropy(policy(e.image[None], torch.tensor([e.prompt + e.response]))[0, len(e.prompt) - 1:-1], torch.tensor(e.response), reduction="sum") for e in examples]
    results = []
    for loss in (policy.loss(*batch), sum(losses) / sum(len(e.response) for e in examples)):
        results.append([loss.detach(), *torch.autograd.grad(loss, list(policy.parameters()))])
    for shared, alone in zip(*results):
        torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-5)


def test_batches_hold_every_example_once_and_images_together(prompts):
    examples = [Example(prompts[q].image, prompts[q].ids, [10 * q + r, END]) for q in range(12) for r in range(1 + q % 7)]
    stream = batches(examples, 8, random.Random(0), together=4)
    for _ in range(2):                                             # twice around
        seen, images = [], 0
        for _ in range(math.ceil(len(examples) / 8)):
            batch = next(stream)
            seen += [example.response[0] for example in batch]
            images += len({id(example.image) for example in batch})
        assert sorted(seen) == sorted(example.response[0] for example in examples)
        assert images <= sum(math.ceil((1 + q % 7) / 4) for q in range(12)) + len(examples) / 8      # a group is cut only where a batch ends


def test_patches_are_embedded_as_by_the_convolution(policy, prompts):
    tower, seen = policy.vision, []
    hook = tower.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = pad(prompts[:3])[0]
    tower(images)
    hook.remove()
    expected = tower.patch(images.permute(0, 3, 1, 2).float() / 127.5 - 1).flatten(2).transpose(1, 2) + tower.position
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_later_tokens_never_change_earlier_logits_and_images_matter(policy, prompts):
    images, ids = pad(prompts[:2])
    before, changed = policy(images, ids), ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % policy.config.vocabulary
    after = policy(images, changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.allclose(before, policy(images.flip(0), ids))


def test_pixel_shuffle_keeps_neighbours_together(tokenizer):
    """Image token i must hold exactly the patches of its own square: a change in one square changes one input of the projector."""
    policy = Policy(ModelConfig(len(tokenizer), image_size=64, vision_layers=0, patch_size=8))
    image = torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    for square in range(16):
        other, (row, column) = image.clone(), divmod(square, 4)
        other[0, row * 16 + 3, column * 16 + 11] = 0
        changed = (policy.vision(image) != policy.vision(other)).any(dim=-1)[0]
        assert changed.nonzero().flatten().tolist() == [square]


def test_grouped_query_attention_equals_explicit_attention(policy, prompts):
    """The decoder block against attention written out with loops over heads."""
    block, x = policy.blocks[0], torch.randn(2, 9, policy.config.width)
    cos, sin = policy.rope(torch.arange(9)[None])
    q, k, v = block.project(x, cos, sin)
    heads = []
    for head in range(policy.config.heads):
        group = head // (policy.config.heads // policy.config.kv_heads)
        scores = q[:, head] @ k[:, group].transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v[:, group])
    expected = block.finish(x, torch.stack(heads, 1))
    torch.testing.assert_close(block(x, cos, sin, model.causal(9, x.device))[0], expected, rtol=1e-4, atol=1e-5)


def test_rope_depends_on_distance_only(policy):
    D = policy.config.width // policy.config.heads
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)
    from model import rotate
    def score(i, j):
        return (rotate(q, *policy.rope(torch.tensor([[i]]))) * rotate(k, *policy.rope(torch.tensor([[j]])))).sum()
    torch.testing.assert_close(score(7, 3), score(19, 15), rtol=1e-4, atol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-4


# ---------------------------------------------------------------- sampler

def test_sampler_equals_the_path_without_cache(policy, prompts):
    """Prefill + decode with a shared prefix, unequal prompts, mixed temperatures and rows that leave = a full forward per token."""
    temperatures, length = [0.0, 0.6, 1.0, 1.5], 24
    assert len({len(prompt.ids) for prompt in prompts}) > 3
    endless = sample(policy, prompts, 4, torch.tensor(temperatures), length, 3, -1)
    end = Counter(token for group in endless for response in group for token in response.tokens).most_common(3)[2][0]   # one that does occur
    got = sample(policy, prompts, 4, torch.tensor(temperatures), length, 3, end)
    uniforms = torch.rand(len(prompts), 4, length, generator=torch.Generator().manual_seed(3))
    ended = 0
    for q, prompt in enumerate(prompts):
        for l, temperature in enumerate(temperatures):
            expected = sample_without_cache(policy, prompt, temperature, uniforms[q, l], end)
            assert got[q][l].tokens == expected.tokens and got[q][l].complete == expected.complete
            torch.testing.assert_close(got[q][l].log_probs, expected.log_probs, rtol=1e-3, atol=1e-4)
            ended += expected.complete
    assert 0 < ended < 4 * len(prompts)                            # both ways to end occurred


def test_same_seed_same_responses_whatever_the_batch(policy, prompts):
    whole = sample(policy, prompts, 3, 1.0, 20, 5, END)
    for rows in (1, 4, 7, 1000):
        assert [[r.tokens for r in group] for group in sample(policy, prompts, 3, 1.0, 20, 5, END, rows=rows)] == [[r.tokens for r in group] for group in whole]
    other = sample(policy, prompts, 3, 1.0, 20, 6, END)
    assert [[r.tokens for r in group] for group in other] != [[r.tokens for r in group] for group in whole]


def test_same_responses_with_one_worker_or_three(policy, prompts, monkeypatch):
    """To the bit, log-probabilities too: what is computed together does not depend on who computes it."""
    found = []
    for workers in (1, 3):
        monkeypatch.setattr(model, "WORKERS", workers)
        found.append(sample(policy, prompts, 5, torch.tensor([0.0, 0.5, 1.0, 1.0, 1.5]), 20, 5, END))
    assert found[0] == found[1]


def test_temperatures_in_one_batch_equal_separate_runs(policy, prompts):
    mixed = sample(policy, prompts, 2, torch.tensor([0.5, 1.2]), 20, 5, END)
    for l, temperature in enumerate((0.5, 1.2)):
        alone = sample(policy, prompts, 2, temperature, 20, 5, END)
        assert [group[l].tokens for group in mixed] == [group[l].tokens for group in alone]


@pytest.mark.parametrize("cached", [True, False])
def test_the_plain_sampler_of_the_benchmark_gives_the_same_responses(policy, prompts, cached):
    """It must do the same work, or the comparison of speeds means nothing."""
    end = Counter(token for (r,) in sample(policy, prompts, 1, 1.0, 20, 5, -1) for token in r.tokens).most_common(1)[0][0]
    expected = [group[0].tokens for group in sample(policy, prompts, 1, 1.0, 20, 5, end)]
    uniforms = torch.rand(len(prompts), 1, 20, generator=torch.Generator().manual_seed(5))
    with Products() as products:
        assert sample_plainly(policy, prompts, 1.0, uniforms[:, 0], end, cached) == expected
    with Products() as twice:
        sample_plainly(policy, prompts * 2, 1.0, uniforms[:, 0].repeat(2, 1), end, cached)
    assert sum(a.numel() * b[-1] for a, b in twice.shapes) == 2 * sum(a.numel() * b[-1] for a, b in products.shapes)      # nothing is shared
    assert len({len(tokens) for tokens in expected}) > 2


def test_common_random_numbers_over_temperatures(policy, prompts):
    """One call for a sweep = one call per temperature, when responses of the same stream share their random numbers."""
    swept = sample(policy, prompts, 6, torch.tensor([0.3, 0.3, 0.8, 0.8, 1.6, 1.6]), 20, 5, END, streams=[0, 1, 0, 1, 0, 1])
    for i, temperature in enumerate((0.3, 0.8, 1.6)):
        alone = sample(policy, prompts, 2, temperature, 20, 5, END)
        assert [[r.tokens for r in group[2 * i:2 * i + 2]] for group in swept] == [[r.tokens for r in group] for group in alone]


def test_rollouts_continue_exactly_their_prefix(policy, prompts):
    """Unequal prefixes, unequal numbers of them, one question with none: each rollout = a prompt that ends with the prefix."""
    prefixes = [[[20, 21], [20, 21, 22, 23]], [[]], [], [[30] * 7, [31], [30] * 8]][:len(prompts)]
    got = sample(policy, prompts[:4], 2, 1.0, 20, 5, END, prefixes=prefixes, rows=7)
    uniforms = torch.rand(4, 2, 20, generator=torch.Generator().manual_seed(5))
    assert [len(group) for group in got] == [4, 2, 0, 6]
    for q, prompt in enumerate(prompts[:4]):
        for i, response in enumerate(got[q]):
            prefix = prefixes[q][i // 2]
            rest = sample_without_cache(policy, Prompt(prompt.image, prompt.ids + prefix), 1.0, uniforms[q, i % 2, len(prefix):], END)
            assert response.tokens == prefix + rest.tokens and response.complete == rest.complete


def test_equal_beginnings_share_a_row(policy, prompts, monkeypatch):
    """One forward pass per different beginning: rows decoded = different proper beginnings of the responses, counted by hand."""
    fed, decode = [], model._decode
    monkeypatch.setattr(model, "_decode", lambda policy, tokens, *rest: fed.append(len(tokens)) or decode(policy, tokens, *rest))
    got = sample(policy, prompts, 6, torch.tensor([0.0, 0.0, 0.3, 0.3, 1.0, 1.0]), 12, 5, END, rows=20)
    beginnings = {(q, tuple(response.tokens[:n])) for q, group in enumerate(got) for response in group for n in range(1, len(response.tokens))}
    assert sum(fed) == len(beginnings) < sum(len(response.tokens) for group in got for response in group)


def test_greedy_takes_the_most_likely_token_and_leaves_the_policy_as_it_was(policy, prompts):
    policy.train()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    (response,), = sample(policy, prompts[:1], 1, 0, 10, 0, END)
    ids = list(prompts[0].ids)
    for token in response.tokens:
        assert token == policy(prompts[0].image[None], torch.tensor([ids]))[0, -1].argmax().item()
        ids.append(token)
    assert policy.training and all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def test_draw_follows_the_distribution():
    logits, n = torch.tensor([[2.0, 0.0, -1.0, 1.0]]), 20_000
    uniform = (torch.arange(n) + 0.5) / n                          # an even grid instead of chance: shares must be exact to 1/n
    for temperature in (0.5, 1.0, 2.0):
        tokens, log_probs = draw(logits.expand(n, 4), torch.full((n,), temperature), uniform, torch.full((n,), -1))
        expected = (logits[0] / temperature).softmax(0)
        torch.testing.assert_close(torch.bincount(tokens, minlength=4) / n, expected, rtol=0, atol=2 / n)
        torch.testing.assert_close(log_probs, expected.log()[tokens])
    assert draw(logits, torch.tensor([1.0]), torch.tensor([1 - 2**-24]), torch.tensor([-1]))[0].item() == 3      # the last number below 1 stays inside


def test_sampler_refuses_bad_input(policy, prompts):
    with pytest.raises(ValueError, match="-1"):
        sample(policy, prompts, 2, -1.0, 5, 0, END)
    with pytest.raises(ValueError, match="empty prompt"):
        sample(policy, [Prompt(prompts[0].image, [])], 1, 1.0, 5, 0, END)
    with pytest.raises(ValueError, match="prefix of 5 tokens"):
        sample(policy, prompts[:1], 1, 1.0, 5, 0, END, prefixes=[[[20] * 5]])


# ---------------------------------------------------------------- training

def test_fit_makes_the_update_of_the_whole_batch(policy, prompts, monkeypatch):
    """Two parts of unequal numbers of tokens, by one worker or two: the gradient of the mean loss over all of them, and equal bits."""
    examples = [Example(prompts[q].image, prompts[q].ids, [20 + q] * (1 + 3 * q) + [END]) for q in range(7)]
    start, updated = copy.deepcopy(policy.state_dict()), []
    policy.loss(*collate(examples)).backward()
    expected = [p.grad.clone() / max(1.0, torch.nn.utils.get_total_norm([q.grad for q in policy.parameters()]).item()) for p in policy.parameters()]
    for workers in (1, 2):
        monkeypatch.setattr(model, "WORKERS", workers)
        policy.load_state_dict(start)
        sgd = torch.optim.SGD(policy.parameters(), lr=1.0)
        fit(policy, [sgd], [torch.optim.lr_scheduler.LambdaLR(sgd, lambda update: 1.0)], iter([examples]), 1, "test")
        updated.append([start[name] - p.detach() for name, p in policy.named_parameters()])
    for one, two, gradient in zip(*updated, expected):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, gradient, rtol=1e-3, atol=1e-5)


def test_muon_makes_the_updates_of_torch():
    """Ours in fp32 against torch.optim.Muon, which rounds to bf16: the same path within that rounding, for tall, wide and equal shapes."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((24, 8), (8, 24), (24, 8), (16, 16))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - p).norm()


# ---------------------------------------------------------------- benchmark

def test_products_are_all_there_forward_and_backward(policy, prompts):
    """Arithmetic of the noted products = counted by hand: every weight once forward and twice backward (not towards pixels and ids)."""
    images, ids = pad(prompts[:3])
    with Products() as products:
        torch.autograd.grad(policy(images, ids).sum(), list(policy.parameters()))
    noted = sum(a.numel() * b[-1] for a, b in products.shapes)
    patches, image, text = 3 * 64, 3 * policy.image_tokens, ids.numel()
    block = sum(p.numel() for p in policy.blocks[0].parameters() if p.dim() == 2)
    vision = sum(p.numel() for p in policy.vision.blocks.parameters() if p.dim() == 2)
    expected = 3 * (patches * vision + image * policy.vision.project.weight.numel() + (image + text) * 2 * block + text * policy.embed.weight.numel())
    assert noted == expected + 2 * patches * policy.vision.patch.weight.numel()
    forward = []
    for mode in (torch.enable_grad, torch.inference_mode):         # in which products reach the notes as mm or as linear
        with mode(), Products() as products:
            policy(images, ids)
        forward.append(sum(a.numel() * b[-1] for a, b in products.shapes))
    assert 0 < forward[0] == forward[1] < noted


def test_shared_beginnings_are_read_once_and_not_at_all_in_the_last_block(policy, prompts):
    """Arithmetic of an update on 6 rows of 2 questions, counted by hand: what makes it cheaper than whole rows."""
    batch = collate([Example(*prompts[q], [20, 21, END]) for q in (0, 0, 0, 1, 1, 1)])
    with Products() as products, torch.no_grad():
        policy.loss(*batch)
    of = {name: p.numel() for name, p in policy.blocks[0].named_parameters() if p.dim() == 2}
    beginnings, rows = 2 * (policy.image_tokens + batch[1].shape[1]), 6 * 3
    vision = 2 * (64 * (policy.vision.patch.weight.numel() + sum(p.numel() for p in policy.vision.blocks.parameters() if p.dim() == 2)) + policy.image_tokens * policy.vision.project.weight.numel())
    expected = vision + beginnings * (sum(of.values()) + of["kv.weight"] + of["q.weight"]) + rows * (2 * sum(of.values()) + policy.embed.weight.numel())
    assert sum(a.numel() * b[-1] for a, b in products.shapes) == expected


@pytest.mark.parametrize("kind", ["sampling", "parts", "growth"])
def test_the_benchmark_measures_everything_it_names(policy, prompts, tokenizer, kind):
    line_break = tokenizer.ids["\n"]
    examples = [Example(*prompt, [20, 21, END]) for prompt in prompts[:4]]
    found = {"sampling": lambda: model.bench_sampling(policy, prompts, END, line_break, 12, 1), "parts": lambda: model.bench_parts(policy, prompts, examples, END, 12, 1),
             "growth": lambda: model.bench_growth(policy, prompts, END, 12)}[kind]()
    assert found and all(speed > 0 for speeds in found.values() for speed in speeds.values())


def test_bench_names_a_folder_that_is_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        model.main(["--bench", str(tmp_path)])
    assert stop.value.code == 2 and str(tmp_path) in capsys.readouterr().err


# ---------------------------------------------------------------- weights on disk

def test_saved_policy_is_the_same_policy(policy, prompts, tokenizer, tmp_path):
    save_policy(policy, tmp_path / "policy.safetensors", tokenizer.symbols)
    loaded, vocabulary = load_policy(tmp_path / "policy.safetensors")
    assert torch.equal(loaded.eval()(*pad(prompts)), policy(*pad(prompts))) and vocabulary == tokenizer.symbols
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]


def test_damaged_weights_are_named(policy, tokenizer, tmp_path):
    path = tmp_path / "policy.safetensors"
    save_policy(policy, path, tokenizer.symbols)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="policy.safetensors"):
        load_policy(path)
    path.write_bytes(whole)
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(ValueError, match="policy.safetensors"):
        load_policy(path)
