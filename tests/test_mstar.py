"""The loop and its stages: what is asked, kept, trained on and carried over; and bad input."""
import itertools
import json
import random
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import mstar
import prm as prm_module
from data import Tokenizer, build_world
from evaluate import describe_round, grade, unique_correct
from model import Example, ModelConfig, Optimizer, Policy, adamw, collate, fit
from mstar import METHODS, PRESETS, Config, Run, parse
from prm import RewardModel
from weights.base import RECIPES, arithmetic

TINY = ["--preset", "test", "--epochs", "0.5"]
BASE = str(Path(mstar.__file__).parent / "weights/base.safetensors")
EIGHT = ["--labeled", "8", "--warmup_questions", "2", "--prm_questions", "2"]
METRICS = {"greedy_accuracy": 0, "pass_at_1": 0, "pass_at_k": 0, "k": 4, "unsound": 0,
           "entropy": 0, "unparseable": 0, "truncated": 0}


def config(*flags):
    return parse([*TINY, *flags])[0]


def sizes(tokenizer):
    return ModelConfig(len(tokenizer), **RECIPES["test"].sizes)


@pytest.fixture
def run(tmp_path, tokenizer):
    return Run(tmp_path, "another method", tokenizer, "cpu")


# ---------------------------------------------------------------- what is trained on

def test_targets_are_the_response_and_nothing_else():
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    examples = [Example(image, [1, 50, 2], [60, 61, 3]),
                Example(image, [1, 50, 51, 52, 2], [70, 3])]
    images, prompts, lengths, owner, ids, targets = collate(examples + examples[:1])
    assert prompts.tolist() == [[1, 50, 0, 0], [1, 50, 51, 52]] and lengths.tolist() == [2, 4]
    assert ids.tolist() == [[2, 60, 61], [2, 70, 0], [2, 60, 61]]
    assert targets.tolist() == [[60, 61, 3], [70, 3, -1], [60, 61, 3]]
    assert len(images) == 2 and owner.tolist() == [0, 1, 0]


def test_training_lowers_the_loss_on_what_it_trains(policy, prompts, tokenizer):
    cfg = config("--batch_size", "4")
    kept = [(i, f"answer: {i + 10}") for i in range(8)]
    examples = [Example(*prompts[i], tokenizer.response(text)) for i, text in kept]
    before = policy.loss(*collate(examples)).item()
    optimizer = Optimizer([adamw(policy.parameters(), 3e-3)], 2)
    trained = mstar.sft(cfg, policy, optimizer, prompts, kept, 30, "test")
    assert trained["updates"] == 30 == optimizer.updates
    assert policy.loss(*collate(examples)).item() < before / 4


def test_without_anything_to_train_on_nothing_is_done(policy, prompts, capsys):
    optimizer = Optimizer([adamw(policy.parameters(), 3e-3)], 2)
    trained = mstar.sft(config(), policy, optimizer, prompts, [], 30, "test")
    assert trained == {"updates": 0, "loss": None} and optimizer.updates == 0
    assert "nothing to train on" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_training(policy, prompts):
    policy.embed.weight.data[60] = float("nan")
    optimizer = Optimizer([adamw(policy.parameters(), 1e-3)], 2)
    with pytest.raises(FloatingPointError, match="bad: the loss or gradient of update 1 "):
        mstar.sft(config(), policy, optimizer, prompts, [(0, "answer: 7")], 3, "bad")


def test_unique_correct_keeps_correct_different_ones(world):
    questions = world["test"][:3]
    a, b, c = (question.answer for question in questions)
    texts = [[f"answer: {a}", f"answer: {a}", f"answer: 0{a}", "answer: 0", "hm"],
             ["answer: 0"] * 5, [f"1 + 1 = 2\nanswer: {c}"] * 5]
    unique, outcomes = unique_correct(questions, texts)
    assert unique == [(0, f"answer: {a}"), (0, f"answer: 0{a}"), (2, f"1 + 1 = 2\nanswer: {c}")]
    assert outcomes == {"correct": 8, "wrong": 6, "unparseable": 1}


def test_arithmetic_of_the_base_is_true():
    rng = random.Random(0)
    for _ in range(200):
        for line in arithmetic(rng).split("\n"):
            left, result = line.split(" = ")
            assert eval(left) == int(result) and 1 <= int(result) <= 99
        Tokenizer().encode(line)


# ---------------------------------------------------------------- what is asked

def test_all_questions_are_asked_before_any_again():
    """Three an iteration out of seven: all seven, then all seven in another order, ..."""
    cfg = Config(labeled=7, interval=3 / 7)
    asked = []
    for iteration in range(1, 8):
        questions, num_labeled = mstar.questions_for_iteration(
            cfg, {"labeled": list(range(7)), "unlabeled": []}, iteration)
        assert num_labeled == 3
        asked += questions
    rounds = [asked[start:start + 7] for start in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in rounds) and rounds[0] != rounds[1]


def test_only_the_last_questions_are_asked_if_so_wished():
    cfg = Config(labeled=8, evolve_questions=4, interval=0.5, epochs=3)
    assert cfg.questions_per_iteration == 2 and cfg.iterations == 6
    world, asked = {"labeled": list(range(8)), "unlabeled": []}, []
    for iteration in range(1, 7):
        asked += mstar.questions_for_iteration(cfg, world, iteration)[0]
    assert sorted(asked) == sorted([4, 5, 6, 7] * 3) and sorted(asked[:4]) == [4, 5, 6, 7]


@pytest.mark.parametrize("mix_in, first", [(0.0, 1), (0.25, 3), (0.5, 5), (0.75, 7)])
def test_unlabeled_questions_join_as_half_of_the_questions(mix_in, first):
    """Eight iterations of six out of 24: never more than six, none twice before all have come, the
    labeled ones first and in the order that they have without unlabeled ones."""
    world = {"labeled": list(range(24)), "unlabeled": list(range(100, 124))}
    cfg = Config(labeled=24, interval=0.25, unlabeled="vote", mix_in=mix_in)
    without = Config(labeled=24, interval=0.25)
    alone, labeled, unlabeled = [], [], []
    for iteration in range(1, 9):
        alone += mstar.questions_for_iteration(without, world, iteration)[0]
        questions, known = mstar.questions_for_iteration(cfg, world, iteration)
        assert len(questions) == 6 and known == (6 if iteration < first else 3)
        labeled += questions[:known]
        unlabeled += questions[known:]
    assert labeled == alone[:len(labeled)] and min(unlabeled) >= 100
    assert len(set(unlabeled)) == len(unlabeled) == 3 * (9 - first)

@pytest.mark.parametrize("mix_in, interval", [(0.75, 1.0), (0.99, 0.25)])
def test_unlabeled_questions_join_before_the_end_however_few_rounds_there_are(mix_in, interval):
    """Two rounds times 0.75, and eight times 0.99, round to all of them."""
    world = {"labeled": list(range(24)), "unlabeled": list(range(100, 124))}
    cfg = Config(labeled=24, interval=interval, epochs=2, unlabeled="vote", mix_in=mix_in)
    questions, known = mstar.questions_for_iteration(cfg, world, cfg.iterations)
    assert len(questions) == 2 * known


def test_pseudo_answers_are_votes_weighted_by_the_lowest_step(world, tokenizer, monkeypatch):
    """Two of three say 5, but the third is trusted more; where nobody answers, nothing is correct;
    the true answers are not looked at; labeled questions keep theirs."""
    rewards = {"1 + 4 = 5\nanswer: 5": 0.2, "5\nanswer: 5": 0.3, "answer: 7": 0.6, "red": 1, "7": 1}

    def known(prm, prompts, tokens):
        assert prompts == ["second", "third"]                      # those without an answer
        return [[rewards[tokenizer.decode(t)] for t in group] for group in tokens]

    monkeypatch.setattr(prm_module, "response_rewards", known)
    prm = SimpleNamespace(tokenizer=tokenizer)
    questions = world["labeled"][:1] + world["unlabeled"][:2]
    texts = [["answer: 5"] * 3, ["1 + 4 = 5\nanswer: 5", "5\nanswer: 5", "answer: 7"],
             ["red", "red", "7"]]
    prompts = ["first", "second", "third"]
    voted = prm_module.pseudo_answered(prm, questions, 1, prompts, texts)
    assert [q.answer for q in voted] == [questions[0].answer, 7, ""]
    assert [q.text for q in voted] == [q.text for q in questions]
    assert unique_correct(voted, [[], ["answer: 7", "answer: 5"], ["red", "answer: 1"]])[0] == \
        [(1, "answer: 7")]


def test_votes_and_not_the_hidden_answers_are_trained_on(world, tokenizer, run, monkeypatch):
    """In the loop: of two responses to a question, the wrong one has the larger R_p."""
    cfg = config(*EIGHT, "--method", "vote_0", "--interval", "0.5", "--keep_top", "1")
    small = {split: world[split][:8] for split in ("labeled", "unlabeled")} | {"validation": []}
    asked = {question.text: question for question in small["labeled"] + small["unlabeled"]}
    kept = {"labeled": [], "unlabeled": []}

    def respond(policy, prompts, how, title):
        return [[f"answer: {asked[tokenizer.decode(p.ids)].answer}", "answer: 1"]
                for p in prompts], None

    def trust(prm, prompts, tokens):
        return [[0.1, 0.9][:len(group)] for group in tokens]

    def watch(cfg, policy, optimizer, prompts, pairs, *rest):
        for i, text in pairs:
            question = asked[tokenizer.decode(prompts[i].ids)]
            kept[question.id.split("/")[0]].append((text, f"answer: {question.answer}"))
        return {"updates": 1, "loss": 0.0}

    monkeypatch.setattr(prm_module, "response_rewards", trust)
    for name, fake in (("sample_texts", respond), ("response_rewards", trust), ("sft", watch),
                       ("write_samples", lambda *a: None), ("validate", lambda *a: METRICS)):
        monkeypatch.setattr(mstar, name, fake)
    mstar.self_evolve(cfg, Policy(sizes(tokenizer), tokenizer),
                      SimpleNamespace(tokenizer=tokenizer), small, run)
    assert [text for text, _ in kept["unlabeled"]] == ["answer: 1"] * 2
    assert len(kept["labeled"]) == 2 and all(text == gold for text, gold in kept["labeled"])


# ---------------------------------------------------------------- the stages before the loop

def test_warm_up_and_direct_sft_train_a_copy_of_the_base_on_what_they_should(world, tokenizer,
                                                                             monkeypatch):
    """Warm-up: asked with the answer; trained without it, on correct responses. Direct SFT: from
    the base, on the answers alone, for as many updates as the others make together."""
    cfg = config(*EIGHT, "--evolve_updates", "2")
    torch.manual_seed(0)
    base, sft, make_prompts = Policy(sizes(tokenizer), tokenizer), mstar.sft, mstar.make_prompts
    before, labeled, ways, calls = weights(base), world["labeled"][:8], [], []

    def respond(policy, prompts, how, title):
        assert policy is base and how[:2] == (cfg.warmup_rollouts, 1.0)
        assert [prompt.ids for prompt in prompts] == [
            tokenizer.prompt(question.text, question.answer) for question in labeled[:2]]
        return [[f"answer: {question.answer}", "answer: 0"] for question in labeled[:2]], None

    def prompts_of(policy, questions, **how):
        ways.append(how)
        return make_prompts(policy, questions, **how)

    def watch(cfg, policy, optimizer, prompts, kept, updates, title, **more):
        assert same(before, weights(policy)) and policy is not base
        calls.append(([prompt.ids for prompt in prompts], kept, updates, optimizer.full_lr,
                      optimizer.decay_over))
        return sft(cfg, policy, optimizer, prompts, kept, updates, title, **more)

    for name, fake in (("sample_texts", respond), ("make_prompts", prompts_of), ("sft", watch)):
        monkeypatch.setattr(mstar, name, fake)
    pi_0, _ = mstar.stage_warmup(cfg, base, world)
    mstar.direct_sft(cfg, base, {"labeled": labeled}, SimpleNamespace(fit=fit))
    assert ways == [{"with_answer": True}, {}, {"direct": True}]
    assert same(before, weights(base)) and not same(before, weights(pi_0))
    for call, questions, updates in zip(calls, (labeled[:2], labeled), (3, 3 + 2), strict=True):
        answers = [(i, f"answer: {question.answer}") for i, question in enumerate(questions)]
        assert call == ([tokenizer.prompt(question.text) for question in questions], answers,
                        updates, [cfg.warmup_lr], updates)         # its rate decays


# ---------------------------------------------------------------- the loop

def evolve(world, tokenizer, run, monkeypatch, *flags):
    """self_evolve on the test preset with known correct responses: (pi_0, what each SFT saw)."""
    cfg = config(*EIGHT, "--validation", "2", "--epochs", "1", "--method", "continuous",
                 "--interval", "0.25", *flags)
    torch.manual_seed(0)
    pi_0, calls, real, seeds = Policy(sizes(tokenizer), tokenizer), [], mstar.sft, set()
    small = {"labeled": world["labeled"][:8], "validation": world["validation"][:2]}
    correct = {question.text: f"answer: {question.answer}" for question in small["labeled"]}

    def respond(policy, prompts, how, title):
        seeds.add(how.seed)
        return [[correct[tokenizer.decode(p.ids)]] * how.rollouts for p in prompts], None

    def spy(cfg, policy, optimizer, *rest, **more):
        assert optimizer.full_lr == [cfg.evolve_lr] and not optimizer.decay_over
        call = {"start": weights(policy), "updates_before": optimizer.updates,
                "has_state": bool(optimizer.tensors())}            # moments of the gradients
        trained = real(cfg, policy, optimizer, *rest, **more)
        calls.append({**call, "end": weights(policy), "updates": trained["updates"]})
        return trained

    monkeypatch.setattr(mstar, "write_samples", lambda *a: None)
    monkeypatch.setattr(mstar, "validate", lambda *a: METRICS)
    monkeypatch.setattr(mstar, "sample_texts", respond)
    monkeypatch.setattr(mstar, "sft", spy)
    before = weights(pi_0)
    mstar.self_evolve(cfg, pi_0, None, small, run)
    assert same(before, weights(pi_0))                             # it is used again by others
    assert len(seeds) == len(calls)                                # other responses in each round
    return pi_0, calls


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_continuous_carries_weights_and_optimizer_over(world, tokenizer, run, monkeypatch):
    pi_0, calls = evolve(world, tokenizer, run, monkeypatch, "--evolve_updates", "10")
    assert [call["updates"] for call in calls] == [2, 3, 3, 2]
    assert [call["updates_before"] for call in calls] == [0, 2, 5, 8]         # it lives on
    assert [call["has_state"] for call in calls] == [False, True, True, True]
    assert same(calls[0]["start"], weights(pi_0))
    for first, second in zip(calls, calls[1:]):
        assert same(first["end"], second["start"]) and not same(first["start"], first["end"])


def test_rest_em_starts_from_pi_0_with_a_new_optimizer(world, tokenizer, run, monkeypatch):
    pi_0, calls = evolve(world, tokenizer, run, monkeypatch, "--evolve_updates", "10",
                         "--start_from", "pi_0", "--optimizer", "reset")
    assert [call["updates_before"] for call in calls] == [0, 0, 0, 0]
    assert not any(call["has_state"] for call in calls)
    assert all(same(call["start"], weights(pi_0)) for call in calls)


def test_methods_are_equal_when_there_is_one_iteration(world, tokenizer, tmp_path, monkeypatch):
    ends = []
    for method in ("continuous", "iterative_rft", "rest_em"):
        with monkeypatch.context() as patch:
            run = Run(tmp_path / method, "another method", tokenizer, "cpu")
            flags = "--method", method, "--interval", "1.0"
            ends.append(evolve(world, tokenizer, run, patch, *flags)[1][-1]["end"])
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_an_iteration_without_correct_responses_goes_on(world, tokenizer, run, capsys):
    cfg = config("--method", "mstar")
    torch.manual_seed(0)
    policy = Policy(sizes(tokenizer), tokenizer)
    prm = RewardModel(policy.config, tokenizer)
    small = {"labeled": world["labeled"][:48], "validation": world["validation"][:5]}
    mstar.self_evolve(cfg, policy, prm, small, run)
    lines = (run.out / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert lines[1]["num_kept"] == lines[1]["updates"] == 0 and "loss" not in lines[1]
    assert "nothing to train on" in capsys.readouterr().out


def test_selection_trains_on_the_highest_rewards_only(world, tokenizer, run, monkeypatch):
    """Five of eight responses are correct, with a known reward: top-2 trains on the two best, and
    asks the PRM about no wrong one."""
    cfg = config("--method", "prm", *EIGHT, "--interval", "0.5", "--keep_top", "2")
    questions, seen, asked = world["labeled"][:8], [], []
    asked_in = {question.text: question for question in questions}

    def respond(policy, prompts, how, title):
        texts = []
        for prompt in prompts:
            gold = asked_in[tokenizer.decode(prompt.ids)].answer
            asked.append(gold)
            texts.append([f"{i} + 1 = {i + 1}\nanswer: {gold if i < 5 else 0}" for i in range(8)])
        return texts, None

    def rewards(prm, prompts, tokens):
        for prompt, (response,) in zip(prompts, tokens):
            question = asked_in[tokenizer.decode(prompt.ids)]
            assert grade(tokenizer.decode(response), question) == "correct"
        return [[float(tokenizer.decode(response)[0])] for (response,) in tokens]

    def spy(cfg, policy, optimizer, prompts, kept, *rest):
        seen.append(kept)
        return {"updates": 1, "loss": 0.0}

    for name, fake in (("sample_texts", respond), ("response_rewards", rewards), ("sft", spy),
                       ("write_samples", lambda *a: None), ("validate", lambda *a: METRICS)):
        monkeypatch.setattr(mstar, name, fake)
    policy = Policy(sizes(tokenizer), tokenizer)
    prm = SimpleNamespace(tokenizer=tokenizer)
    mstar.self_evolve(cfg, policy, prm, {"labeled": questions, "validation": []}, run)
    (kept,) = seen
    assert [text[0] for _, text in kept] == ["3", "4"] * 4 and len(asked) == 4
    assert run.lines[1]["num_unique_correct"] == 20 and run.lines[1]["num_kept"] == 8


@pytest.mark.parametrize("how, kept", [("all", "01234"), ("threshold", "34"), ("top", "34")])
def test_every_way_to_select(how, kept, tokenizer, monkeypatch):
    monkeypatch.setattr(mstar, "response_rewards",
                        lambda prm, prompts, tokens: [[int(tokenizer.decode(t)[-1]) / 10]
                                                      for (t,) in tokens])
    correct = [(0, f"answer: {i}") for i in range(5)]
    cfg = config("--method", "continuous", "--select", how, "--threshold", "0.25")
    chosen = mstar.select(cfg, SimpleNamespace(tokenizer=tokenizer), [None], correct, 1)
    assert "".join(text[-1] for _, text in chosen) == kept
    by_chance = mstar.select(config("--method", "random_2"), None, [None], correct, 1)
    assert len(by_chance) == 2 and set(by_chance) < set(correct)
    many, cfg = [(0, f"answer: {i}") for i in range(90)], config("--method", "random_2")
    rounds = {tuple(mstar.select(cfg, None, [None], many, iteration)) for iteration in (1, 2, 3)}
    assert len(rounds) > 1                                         # not the same ones every time


def test_the_swept_temperature_is_the_next_one_sampled_at(world, tokenizer, run, monkeypatch):
    cfg = config("--method", "mstar", *EIGHT, "--epochs", "2", "--interval", "0.5", "--sweep_every",
                 "2")
    used, chosen, swept = [], iter((0.4, 1.3)), []

    def respond(policy, prompts, how, title):
        used.append(how.temperature)
        return [["hm"] for _ in prompts], None

    def choose(cfg, policy, prm, world, current):
        swept.append(current)
        return next(chosen), {"chosen": "known"}

    for name, fake in (("sample_texts", respond), ("choose_temperature", choose),
                       ("write_samples", lambda *a: None), ("validate", lambda *a: METRICS),
                       ("select", lambda *a: [])):
        monkeypatch.setattr(mstar, name, fake)
    policy = Policy(sizes(tokenizer), tokenizer)
    small = {"labeled": world["labeled"][:8], "validation": []}
    mstar.self_evolve(cfg, policy, None, small, run)
    assert used == [0.4, 0.4, 1.3, 1.3] and swept == [1.0, 0.4]
    assert [line["temperature"] for line in run.lines] == [1.0, 0.4, 0.4, 1.3, 1.3]
    assert ["sweep" in line for line in run.lines] == [False, True, False, True, False]


# ---------------------------------------------------------------- looking at validation questions

def test_a_sweep_equals_a_look_at_each_temperature(policy, world, monkeypatch):
    def by_length(text, gold):                                     # a random policy is never right
        return "correct" if len(text) % 3 == 0 else "wrong"

    monkeypatch.setattr(evaluate, "grade", by_length)
    cfg = config("--monitor_rollouts", "3", "--max_new_tokens", "12", "--watches", "2",
                 "--rollouts_per_question", "3")
    torch.manual_seed(3)
    prm = RewardModel(policy.config, policy.tokenizer)
    torch.nn.init.normal_(prm.head.weight)
    small = {"validation": world["validation"][:6]}
    watched = mstar.validate(cfg, policy, prm, small, 0.7, 0)["watched"]["surface"]
    _, sweep = mstar.choose_temperature(cfg, policy, prm, small, 0.7)
    assert sweep["surface"] == watched and list(watched) == [str(t) for t in mstar.GRID]
    assert len(mstar.GRID) == 14 and mstar.GRID[0] == 0.3 and mstar.GRID[-1] == 1.6
    assert len({tuple(values.values()) for values in watched.values()}) > 3
    for t in (0.3, 0.7, 1.6):
        alone = mstar.validate(replace(cfg, watches=0), policy, prm, small, t, 0)
        assert watched[str(t)] == {name: alone[name] for name in watched[str(t)]}
        look = mstar.look_at(cfg, policy, prm, small["validation"], [t], 3)[t]
        good, bad = look.rewards[look.is_correct], look.rewards[~look.is_correct]
        higher = [(a > b) + (a == b) / 2 for a, b in itertools.product(good, bad)]
        assert alone["reward_auc"] == pytest.approx(np.mean(higher))


@pytest.mark.parametrize("adapt_by, aim, best", [("reward_pass_at_k", "reward_pass_at_2", 0.7),
                                                 ("pass_at_k", "pass_at_k", 1.3)])
def test_the_temperature_is_the_best_one_by_its_aim_if_it_is_clearly_better(adapt_by, aim, best,
                                                                            monkeypatch):
    peaks = {"reward_pass_at_2": 0.7, "pass_at_k": 1.3}
    cfg = config("--method", "continuous", "--adapt_by", adapt_by)

    def metrics(cfg, t):                                           # half of 40 questions, or all
        return {name: 1.0 * (np.arange(40) < (40 if t == peak else 20))
                for name, peak in peaks.items()}

    monkeypatch.setattr(mstar, "look_at", lambda *a: {t: t for t in mstar.GRID})
    monkeypatch.setattr(mstar, "pass_metrics", metrics)
    chosen, sweep = mstar.choose_temperature(cfg, None, None, {"validation": []}, 1.0)
    assert chosen == sweep["chosen"] == sweep["best"] == best
    assert (sweep["aim"], sweep["before"], sweep["gain"][0]) == (aim, 1.0, 0.5)

    def hardly(cfg, t):                                            # two more, and one less
        values = 1.0 * (np.arange(40) < 20)
        if t == 0.4:
            values[[0, 20, 21]] = 0, 1, 1
        return dict.fromkeys(peaks, values)

    monkeypatch.setattr(mstar, "pass_metrics", hardly)
    chosen, sweep = mstar.choose_temperature(cfg, None, None, {"validation": []}, 0.9)
    assert (chosen, sweep["best"], sweep["chosen"]) == (0.9, 0.4, 0.9)


@pytest.mark.parametrize("L, keep_top", [(8, 16), (3, 4), (8, 9), (1, 2)])
def test_a_sweep_finds_its_aim_for_any_keep_top(policy, world, L, keep_top):
    cfg = config("--rollouts_per_question", str(L), "--keep_top", str(keep_top),
                 "--monitor_rollouts", "8", "--max_new_tokens", "4")
    prm = RewardModel(policy.config, policy.tokenizer)
    small = {"validation": world["validation"][:2]}
    assert mstar.choose_temperature(cfg, policy, prm, small, 1.0)[1]["aim"].endswith(
        f"_{min(L, keep_top)}")


def test_greedy_accuracy_is_of_greedy_responses(policy, world, monkeypatch):
    def respond(policy, prompts, how, title):
        assert how.temperature == [0.0, 0.8, 0.8] and list(how.streams) == [0, 1, 2]
        texts = []
        for question in world["validation"][:3]:
            texts.append([f"answer: {question.answer}", "answer: 0", "hm"])
        response = SimpleNamespace(log_probs=[-2.0], complete=False)
        return texts, [[response] * 3 for _ in texts]

    monkeypatch.setattr(evaluate, "sample_texts", respond)
    small = {"validation": world["validation"][:3]}
    cfg = config("--monitor_rollouts", "2", "--method", "continuous")
    metrics = mstar.validate(cfg, policy, None, small, 0.8, 1)
    assert metrics["greedy_accuracy"] == 1 and metrics["pass_at_k"] == metrics["pass_at_1"] == 0
    assert metrics["unparseable"] == 0.5 and metrics["truncated"] == 1 and metrics["entropy"] == 2


def test_a_round_is_described_by_what_was_done(world):
    questions = world["labeled"][:2] + world["unlabeled"][:2]
    answered = questions[:2] + [questions[2], replace(questions[3], answer=-1)]
    outcomes = Counter(correct=3, wrong=4, unparseable=1)
    kept = [(0, "red is 3\nanswer: 7")]
    counts = describe_round(questions, answered, 2, outcomes, kept * 2, kept)
    assert counts == {"num_questions": 4, "num_responses": 8, "num_correct": 3,
                      "num_unique_correct": 2, "num_kept": 1, "unsound_correct": 1.0,
                      "unsound_kept": 1.0, "num_unlabeled": 2, "pseudo_answers_true": 0.5}


# ---------------------------------------------------------------- flags

def test_the_expected_minutes_count_everything_that_takes_long(policy, world, monkeypatch):
    """A clock that says: a question's responses take 1 s (so its sweep 5 s), an update 100 s."""
    clock = [0.0]
    monkeypatch.setattr(mstar.time, "time", lambda: clock[0])

    def look_at(cfg, policy, prm, questions, temperatures, rollouts):
        clock[0] += len(questions)
        return {1.0: SimpleNamespace(texts=[["answer: 7"]] * len(questions))}

    def sft(cfg, policy, optimizer, prompts, kept, updates, title):
        assert len(kept) == len(prompts)
        clock[0] += 100 * updates

    monkeypatch.setattr(mstar, "look_at", look_at)
    monkeypatch.setattr(mstar, "sft", sft)
    cfg = config("--arms", "sft,prm,mstar", "--evolve_updates", "2000", "--labeled", "48",
                 "--interval", "0.25", "--epochs", "2", "--sweep_every", "3", "--validations", "4")
    arms = mstar.arms_of(cfg)
    text = mstar.expected(cfg, arms, policy, {"labeled": world["test"][:1] * 32})
    asked = 2 * 8 * 12 + 3 * 4 * 10        # two arms of 8 rounds of 12; four validations of each
    swept = 3 * 10 + 20                                            # validation; step labels
    updates = 3 * 2000
    minutes = round((asked + 5 * swept + 100 * (updates + 3 + 3)) / 60)
    assert f"about {minutes} minutes" in text
    assert f"{2 * 8 * 12 * 2:,} responses" in text and f"{updates:,} updates" in text
    short = mstar.expected(config("--arms", "prm"), mstar.arms_of(config("--arms", "prm")), policy,
                           {})
    assert "about" not in short                                    # nothing is measured


def test_labels_are_asked_for_only_where_an_arm_needs_the_prm():
    """Else 12 labeled questions are enough: 10 of the warm-up."""
    assert config("--arms", "sft,continuous", "--labeled", "12").labeled == 12
    with pytest.raises(SystemExit):
        config("--arms", "sft,prm", "--labeled", "12")

@pytest.mark.parametrize("preset", ["cpu", "smolvlm"])
def test_rows_of_table_1_have_the_interval_in_their_name(preset, monkeypatch):
    monkeypatch.setattr(mstar, "check", lambda cfg: None)          # has no public weights
    for name, switches in mstar.METHODS.items():
        share = name.removeprefix("continuous_")
        if share != name:
            assert switches["interval"] == float(share) / 100
    cfg, _ = mstar.parse(["--preset", preset, "--arms", "continuous_6.25,continuous_100"])
    assert [arm.interval for arm in mstar.arms_of(cfg)] == [0.0625, 1.0]

@pytest.mark.parametrize("interval, epochs, times", [("0.0625", "2", 8), ("0.0625", "2.2", 8),
                                                     ("0.25", "2", 8), ("1", "2", 8),
                                                     ("0.12", "2", 4), ("0.1", "2", 3)])
def test_what_happens_some_times_is_spread_evenly_and_ends_with_the_last_iteration(interval, epochs,
                                                                                   times):
    cfg = config("--interval", interval, "--epochs", epochs, "--method", "prm")
    due = [i for i in range(cfg.iterations + 1) if cfg.due(i, times)]
    between = [after - before for before, after in zip(due, due[1:])]
    assert due[0] == 0 and due[-1] == cfg.iterations and max(between) - min(between) <= 1
    assert len(between) == min(times, cfg.iterations)
    assert not any(cfg.due(i, 0) for i in range(cfg.iterations + 1))


def test_methods_and_presets_name_fields_that_are_there():
    names = {f.name for f in fields(Config)}
    for values in (*METHODS.values(), *PRESETS.values()):
        assert values.keys() <= names


@pytest.mark.parametrize("flags, arms, method, select", [
    ([], "sft,continuous,prm,mstar", "mstar", "top"),
    (["--interval", "0.25", "--keep_top", "4"], "sft,continuous,prm,mstar", "mstar", "top"),
    (["--method", "continuous"], "continuous", "continuous", "all"),
    (["--arms", "sft,prm"], "sft,prm", "prm", "top"),
    (["--method", "continuous", "--select", "random"], "continuous", "continuous", "random"),
    (["--arms", "continuous,prm", "--method", "continuous"], "continuous,prm", "continuous",
     "all"),
    (["--arms", "prm,prm", "--method", "mstar"], "prm,mstar", "mstar", "top")])
def test_what_is_run(flags, arms, method, select):
    """Everything by default, a method alone when it is named; what is typed is for all arms."""
    cfg = config(*flags)
    assert (cfg.arms, cfg.method, cfg.select) == (arms, method, select)
    by_method = {arm.method: arm for arm in mstar.arms_of(cfg)}
    assert list(by_method) == arms.split(",") and by_method[method] == cfg
    if "prm" in by_method:
        assert by_method["prm"].select == "top"
    assert all(arm.select == "all" for name, arm in by_method.items() if name == "continuous"
               and name != method)
    assert len({(arm.interval, arm.keep_top, arm.epochs) for arm in by_method.values()}) == 1


@pytest.mark.parametrize("flags, named", [
    (["--interval", "0"], "--interval"), (["--interval", "1.5"], "--interval"),
    (["--interval", "nan"], "--interval"), (["--epochs", "inf"], "--epochs"),
    (["--temperature", "-1"], "--temperature"), (["--temperature", "nan"], "--temperature"),
    (["--temperature", "0"], "--temperature"), (["--temperature", "1e-40"], "--temperature"),
    (["--temperature", "warm"], "--temperature"), (["--temp", "1"], "--temp"),
    (["--preset", "huge"], "huge"), (["--method", "magic"], "magic"),
    (["--nonsense", "1"], "--nonsense"), (["--batch_size", "0"], "--batch_size"),
    (["--micro_batch", "0"], "--micro_batch"), (["--evolve_lr", "-0.1"], "--evolve_lr"),
    (["--seed", "x"], "--seed"), (["--seed", "99999999999999999999999"], "--seed"),
    (["--policy", "nowhere.safetensors"], "nowhere"), (["--device", "abacus"], "--device"),
    (["--arms", "mstar,magic"], "magic"),
    (["--temperature", "0.7"], "mstar is made of --temperature adaptive"),
    (["--method", "top_4", "--keep_top", "3"], "top_4 is made of --keep_top 4"),
    # as it is, but not for the other arm, whichever is named last
    (["--arms", "continuous,prm", "--select", "top"], "prm is made of --select top"),
    (["--arms", "prm,continuous", "--select", "random"], "prm is made of --select top"),
    (["--policy", BASE, "--recipe", "cpu-small"], "--recipe cpu-small"),
    # a base has seen pictures that only the tests of its own world leave out
    (["--policy", BASE, "--world_seed", "1"], "has seen pictures of these tests"),
    (["--policy", BASE, "--test", "751"], "has seen pictures of these tests"),
    (["--policy", BASE, "--testbed_questions", "251"], "has seen pictures of these tests"),
    (["--preset", "tiny"], "tiny"),
    (["--preset", "smolvlm", "--policy", BASE], "--preset smolvlm"),   # rates of the other kind
    (["--preset", "smolvlm", "--policy", "scratch"], "--preset smolvlm"),
    (["--arms", "prm,top_1", "--keep_top", "3"], "--keep_top 3"),
    (["--keep_top", "0"], "--keep_top"), (["--prm_questions", "1"], "--prm_questions"),
    (["--select", "best"], "--select"), (["--adapt_by", "luck"], "--adapt_by"),
    (["--recipe", "huge"], "huge"), (["--evolve_questions", "49"], "--labeled 48"),
    (["--prm_questions", "40"], "--labeled 48"),
    (["--unlabeled", "some"], "--unlabeled"), (["--mix_in", "1"], "--mix_in"),
    (["--test", "4"], "--test"), (["--labeled", "1"], "--labeled"),
    (["--resume", ""], "--resume"), (["--resume", "nowhere"], "nowhere"),
    (["--device", "\n"], "--device"),
    (["--rollouts_per_question", "2147483648"], "--rollouts_per_question"),
    (["--max_new_tokens", "1001"], "--max_new_tokens"),
    (["--arms", "continuous,continuous_100", "--epochs", "1", "--labeled", "41"], "--labeled 41")])
def test_wrong_use_exits_2_with_one_line_and_writes_nothing(flags, named, tmp_path, monkeypatch,
                                                            capsys):
    monkeypatch.chdir(tmp_path)
    flags = flags if "--resume" in flags else [*TINY, *flags]
    with pytest.raises(SystemExit) as stop:
        mstar.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and named in error
    assert not list(tmp_path.iterdir())


def test_arms_without_rounds_need_not_ask_equally_many_questions():
    assert config("--arms", "sft,continuous_100", "--epochs", "1.6").iterations == 2


def test_stopped_before_anything_was_begun_it_leaves_nothing(tmp_path, capsys, monkeypatch):
    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(mstar, "world_of", stop)
    with pytest.raises(SystemExit) as stopped:
        mstar.main([*TINY, "--out", str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert stopped.value.code == 130 and "stopped" in error and "--resume" not in error
    assert not list(tmp_path.iterdir())


def test_a_world_without_enough_pictures_is_one_line(tmp_path, capsys, monkeypatch):
    (always,) = build_world({"test": 1})["test"]                   # a world with one picture
    monkeypatch.setattr(data, "_make", lambda *rest: always)
    with pytest.raises(SystemExit) as stop:
        mstar.main([*TINY, "--out", str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--labeled" in error
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_never_written_to(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for out, word in ((tmp_path, "new name"), (tmp_path / "file", "new name"),
                      (tmp_path / "file" / "below", "directory")):
        with pytest.raises(SystemExit) as stop:
            mstar.main([*TINY, "--out", str(out)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and word in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine.txt"]


def test_default_folder_gets_a_number_instead_of_overwriting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [mstar.new_folder(config()).name for _ in range(3)]
    assert names == ["test-mstar-seed0", "test-mstar-seed0-2", "test-mstar-seed0-3"]
