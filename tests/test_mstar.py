"""The stages and the loop: what is learned, what is carried over, what a run leaves behind, and bad input."""
import json
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mstar
from data import TESTBEDS, Tokenizer
from evaluate import grade
from model import Example, collate, new_optimizers
from mstar import Checkpoint, Config, keep_right, parse
from prm import RewardModel

TINY = ["--preset", "test", "--passes", "0.5"]
UNKEPT = SimpleNamespace(training=None)                            # a training that is not saved


@pytest.fixture
def done(tmp_path, tokenizer):
    return Checkpoint(tmp_path / "checkpoint", tokenizer, "cpu")


def test_targets_are_the_response_and_nothing_else():
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    examples = [Example(image, [1, 50, 2], [60, 61, 3]), Example(image, [1, 50, 51, 52, 2], [70, 3])]
    images, prompts, lengths, owner, ids, targets = collate(examples + examples[:1])
    assert prompts.tolist() == [[1, 50, 0, 0], [1, 50, 51, 52]] and lengths.tolist() == [2, 4]
    assert ids.tolist() == [[2, 60, 61], [2, 70, 0], [2, 60, 61]]
    assert targets.tolist() == [[60, 61, 3], [70, 3, -1], [60, 61, 3]]
    assert len(images) == 2 and owner.tolist() == [0, 1, 0]


def test_training_lowers_the_loss_on_what_it_trains(policy):
    cfg = Config(batch_size=4, lr_warmup_updates=2)
    image = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8)
    examples = [Example(image, [1, 50 + i, 2], [60 + i, 70 - i, 3]) for i in range(8)]
    before = policy.loss(*collate(examples)).item()
    mstar.train(policy, *new_optimizers(policy, 3e-3, 2), examples, 30, cfg, "test", UNKEPT)
    assert policy.loss(*collate(examples)).item() < before / 4


def test_keep_right_keeps_right_different_ones(world):
    questions = world["test"][:3]
    a, b, c = (question.answer for question in questions)
    texts = [[f"answer: {a}", f"answer: {a}", f"answer: 0{a}", "answer: 0", "hm"], ["answer: 0"] * 5, [f"1 + 1 = 2\nanswer: {c}"] * 5]
    kept, counts = keep_right(questions, texts)
    assert kept == [(0, f"answer: {a}"), (0, f"answer: 0{a}"), (2, f"1 + 1 = 2\nanswer: {c}")]
    assert counts == {"responses": 15, "right": 8, "wrong": 6, "unparseable": 1, "none_right": 1, "all_right": 1}


def test_arithmetic_is_true():
    rng = random.Random(0)
    for _ in range(200):
        for line in mstar.arithmetic(rng).split("\n"):
            left, right = line.split(" = ")
            assert eval(left) == int(right) and 1 <= int(right) <= 99
        Tokenizer().encode(line)


def test_all_questions_are_asked_before_any_again():
    """Three an iteration out of seven: the iterations' questions in a row are all seven, then all seven in another order, ..."""
    cfg = Config(labeled=7, interval=3 / 7)
    asked = [q for iteration in range(1, 8) for q in mstar.questions_of(cfg, iteration, {"labeled": list(range(7))})[0]]
    rounds = [asked[start:start + 7] for start in (0, 7, 14)]
    assert all(sorted(r) == list(range(7)) for r in rounds) and rounds[0] != rounds[1]


def test_unlabeled_questions_join_as_half_of_the_questions_after_their_share_of_the_iterations():
    """Eight iterations of six out of 24: never more than six, none twice before all have come, the labeled ones first and in their order."""
    world = {"labeled": list(range(24)), "unlabeled": list(range(100, 124))}
    alone = [q for i in range(1, 9) for q in mstar.questions_of(Config(labeled=24), i, world)[0]]
    for mix_in, first in ((0.0, 1), (0.25, 3), (0.5, 5), (0.75, 7)):
        cfg = Config(labeled=24, unlabeled="vote", mix_in=mix_in)
        parts = [mstar.questions_of(cfg, i, world) for i in range(1, 9)]
        assert [known for _, known in parts] == [6 if i < first else 3 for i in range(1, 9)] and all(len(questions) == 6 for questions, _ in parts)
        labeled, unlabeled = [q for questions, known in parts for q in questions[:known]], [q for questions, known in parts for q in questions[known:]]
        assert labeled == alone[:len(labeled)] and len(set(unlabeled)) == len(unlabeled) == 3 * (9 - first) and min(unlabeled, default=100) >= 100


def test_pseudo_answers_are_votes_weighted_by_the_lowest_step(world, tokenizer, monkeypatch):
    """Two of three say 5, but the third is trusted more; where nobody answers, nothing is right; the true answers are not looked at."""
    rewards = {"1 + 4 = 5\nanswer: 5": [0.9, 0.2], "5\nanswer: 5": [0.3, 0.9], "answer: 7": [0.6], "red": [1.0], "7": [1.0]}
    monkeypatch.setattr(mstar, "score", lambda prm, prompts, tokens, tok: [[rewards[tok.decode(t)] for t in group] for group in tokens])
    questions = world["unlabeled"][:2]
    texts = [["1 + 4 = 5\nanswer: 5", "5\nanswer: 5", "answer: 7"], ["red", "red", "7"]]
    voted = mstar.pseudo_labeled(Config(unlabeled="vote"), "a PRM", questions, [None, None], texts, tokenizer)
    assert [q.answer for q in voted] == [7, -1] and [q.text for q in voted] == [q.text for q in questions]
    assert keep_right(voted, [["answer: 7", "answer: 5"], ["red", "answer: 1"]])[0] == [(0, "answer: 7")]
    assert mstar.pseudo_labeled(Config(unlabeled="oracle"), "a PRM", questions, [None, None], texts, tokenizer) == questions


def evolve(world, tokenizer, tmp_path, monkeypatch, *flags):
    """self_evolve on the test preset with known right responses; returns what each call of train saw."""
    cfg, *_ = parse([*TINY, "--validation", "2", "--labeled", "8", "--passes", "1", "--method", "continuous", "--interval", "0.25", *flags])
    torch.manual_seed(0)
    warm, calls = mstar.new_policy(cfg, tokenizer), []
    small = {"labeled": world["labeled"][:8], "validation": world["validation"][:2]}
    monkeypatch.setattr(mstar, "write_samples", lambda *a: None)
    monkeypatch.setattr(mstar, "monitor", lambda *a, **k: {"temperature": 1.0, "greedy_accuracy": 0, "pass_at_1": 0, "pass_at_k": 0, "k": 4, "false_step": 0,
                                                           "distinct": 0, "entropy": 0, "unparseable": 0, "truncated": 0})
    right = {question.text: f"answer: {question.answer}" for question in small["labeled"]}
    monkeypatch.setattr(mstar, "generate", lambda policy, prompts, tok, cfg, *rest: ([[right[tok.decode(p.ids)]] * cfg.rollouts_per_question for p in prompts], 0, 0))
    real = mstar.train

    def spy(policy, optimizers, schedules, examples, updates, cfg, title, done, seed):
        start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        already = sum(int(state["step"]) for state in list(optimizers[0].state.values())[:1])
        loss = real(policy, optimizers, schedules, examples, updates, cfg, title, done, seed)
        calls.append({"start": start, "end": {n: t.clone() for n, t in policy.state_dict().items()}, "done_before": already, "updates": updates,
                      "examples": examples})
        return loss

    monkeypatch.setattr(mstar, "train", spy)
    before = {name: tensor.clone() for name, tensor in warm.state_dict().items()}
    mstar.self_evolve(cfg, cfg.method, warm, None, small, tokenizer, Checkpoint(Path(tempfile.mkdtemp(dir=tmp_path)) / "checkpoint", tokenizer, "cpu"))
    assert all(torch.equal(before[name], tensor) for name, tensor in warm.state_dict().items())     # pi_0 is used again by others
    return warm, calls


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_continuous_carries_weights_and_optimizer_over(world, tokenizer, tmp_path, monkeypatch):
    warm, calls = evolve(world, tokenizer, tmp_path, monkeypatch, "--evolve_updates", "10")
    assert [call["updates"] for call in calls] == [2, 3, 3, 2] and sum(call["updates"] for call in calls) == 10
    assert [call["done_before"] for call in calls] == [0, 2, 5, 8]                                    # the optimizer lives on
    assert same(calls[0]["start"], warm.state_dict())
    assert all(same(first["end"], second["start"]) and not same(first["start"], first["end"]) for first, second in zip(calls, calls[1:]))


def test_rest_em_starts_from_pi_0_with_a_new_optimizer(world, tokenizer, tmp_path, monkeypatch):
    warm, calls = evolve(world, tokenizer, tmp_path, monkeypatch, "--start_from", "warmup", "--optimizer", "reset", "--evolve_updates", "10")
    assert [call["done_before"] for call in calls] == [0, 0, 0, 0]
    assert all(same(call["start"], warm.state_dict()) for call in calls)


def test_methods_are_equal_when_there_is_one_iteration(world, tokenizer, tmp_path, monkeypatch):
    ends = []
    for method in ("continuous", "iterative_rft", "rest_em"):
        with monkeypatch.context() as patch:
            ends.append(evolve(world, tokenizer, tmp_path, patch, "--method", method, "--interval", "1.0")[1][-1]["end"])
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_an_iteration_without_right_responses_goes_on(world, tokenizer, tmp_path, done, monkeypatch, capsys):
    monkeypatch.setattr(mstar, "write_samples", lambda *a: None)
    cfg, *_ = parse([*TINY, "--method", "mstar", "--passes", "0.5"])
    torch.manual_seed(0)
    policy = mstar.new_policy(cfg, tokenizer)
    prm = RewardModel(policy.config)
    mstar.self_evolve(cfg, "mstar", policy, prm, {"labeled": world["labeled"][:48], "validation": world["validation"][:5]}, tokenizer, done)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[1]["kept"] == 0 and lines[1]["updates"] == 0 and lines[1]["loss"] is None and lines[1]["none_right"] == 12
    assert "nothing to train on" in capsys.readouterr().out


def test_selection_trains_on_the_highest_rewards_only(world, tokenizer, done, monkeypatch):
    """Eight right responses per question, whose reward is known: top-2 trains on the two best and asks the PRM about no wrong one."""
    cfg, *_ = parse([*TINY, "--method", "prm", "--labeled", "8", "--passes", "0.5", "--interval", "0.5", "--keep_top", "2"])
    questions, seen = world["labeled"][:8], []
    answer = {question.text: question.answer for question in questions}

    def texts(policy, prompts, tok, *rest):
        return [[f"{i} + 1 = {i + 1}\nanswer: {answer[tok.decode(p.ids)] if i < 5 else 0}" for i in range(8)] for p in prompts], 0, 0

    def rewards(prm, prompts, kept, tok):
        assert all(grade(text, questions_of[-1][i].answer) == "right" for i, text in kept)
        return [float(text[0]) for _, text in kept]

    questions_of, real = [], mstar.keep_right
    monkeypatch.setattr(mstar, "keep_right", lambda qs, t: questions_of.append(qs) or real(qs, t))
    monkeypatch.setattr(mstar, "write_samples", lambda *a: None)
    monkeypatch.setattr(mstar, "monitor", lambda *a: {"temperature": 1.0, "greedy_accuracy": 0, "pass_at_1": 0, "pass_at_k": 0, "k": 4, "false_step": 0,
                                                      "distinct": 0, "entropy": 0, "unparseable": 0, "truncated": 0})
    monkeypatch.setattr(mstar, "generate", texts)
    monkeypatch.setattr(mstar, "response_rewards", rewards)
    monkeypatch.setattr(mstar, "train", lambda policy, o, s, examples, *rest, **more: seen.append([tokenizer.decode(e.response)[0] for e in examples]) or 0.0)
    torch.manual_seed(0)
    _, metrics = mstar.self_evolve(cfg, "prm", mstar.new_policy(cfg, tokenizer), None, {"labeled": questions, "validation": []}, tokenizer, done)
    assert seen == [["3", "4"] * 4] and metrics[1]["right"] == 20 and metrics[1]["kept"] == 8 and metrics[1]["none_right"] == metrics[1]["all_right"] == 0


def test_a_sweep_equals_a_run_at_each_temperature(policy, world, tokenizer, monkeypatch):
    monkeypatch.setattr(mstar, "grade", lambda text, gold: "right" if len(text) % 3 == 0 else "wrong")       # a random policy is never right
    cfg, *_ = parse([*TINY, "--image_size", "64", "--patch_size", "8", "--monitor_rollouts", "3", "--max_new_tokens", "12"])
    torch.manual_seed(3)
    prm = RewardModel(policy.config)
    torch.nn.init.normal_(prm.head.weight)
    small = {"validation": world["validation"][:6]}
    swept = mstar.monitor(cfg, policy, prm, small, tokenizer, 0, 0.7, True)
    assert list(swept["sweep"]["surface"]) == [str(t) for t in mstar.GRID] and len(mstar.GRID) == 14 and mstar.GRID[-1] == 1.6
    assert len({tuple(values.values()) for values in swept["sweep"]["surface"].values()}) > 3
    for t in (0.3, 0.7, 1.6):
        alone = mstar.monitor(cfg, policy, prm, small, tokenizer, 0, t, False)
        assert swept["sweep"]["surface"][str(t)] == {name: alone[name] for name in swept["sweep"]["surface"][str(t)]}
        if t == 0.7:
            assert alone == {name: pytest.approx(value) for name, value in swept.items() if name != "sweep"}


def test_the_swept_temperature_is_the_next_one_sampled_at(world, tokenizer, done, monkeypatch):
    cfg, *_ = parse([*TINY, "--method", "mstar", "--labeled", "8", "--passes", "2", "--interval", "0.5", "--sweep_every", "2"])
    used, chosen = [], iter((0.4, 1.3))
    monkeypatch.setattr(mstar, "generate", lambda policy, prompts, tok, cfg, temperature, *rest: (used.append(temperature), ([["hm"] for _ in prompts], 0, 0))[1])
    monkeypatch.setattr(mstar, "response_rewards", lambda *a: [])
    monkeypatch.setattr(mstar, "log", lambda *a: None)
    monkeypatch.setattr(mstar, "write_samples", lambda *a: None)
    monkeypatch.setattr(mstar, "monitor", lambda cfg, policy, prm, world, tok, iteration, temperature, sweep:
                        {"temperature": temperature} | ({"sweep": {"chosen": next(chosen)}} if sweep else {}))
    _, metrics = mstar.self_evolve(cfg, "mstar", mstar.new_policy(cfg, tokenizer), None, {"labeled": world["labeled"][:8], "validation": []}, tokenizer, done)
    assert used == [0.4, 0.4, 1.3, 1.3] and [m["temperature"] for m in metrics] == [1.0, 0.4, 0.4, 1.3, 1.3]


def test_the_reward_of_a_response_is_its_lowest_step(prompts, tokenizer, monkeypatch):
    monkeypatch.setattr(mstar, "score", lambda prm, prompts, responses, tok: [[[0.9, 0.2, 0.7]], [[0.6]]])
    assert mstar.response_rewards(None, prompts, [(0, "red is 3\n3 + 4 = 7\nanswer: 7"), (1, "answer: 7")], tokenizer) == [0.2, 0.6]


def test_the_best_temperature_wins_and_a_tie_keeps_the_current_one():
    values = {t: np.tile(np.array(v, float), 20) for t, v in {0.3: [1, 0, 0], 0.7: [1, 1, 0], 1.0: [0, 1, 1], 1.3: [0, 0, 0]}.items()}
    assert mstar.choose_temperature(values, 1.0)["chosen"] == 1.0 and mstar.choose_temperature(values, 0.7)["chosen"] == 0.7
    assert mstar.choose_temperature(values, 0.3)["chosen"] == 0.7 and mstar.choose_temperature(values, 1.3)["chosen"] == 1.0
    values[1.3] = np.ones(60)
    chosen = mstar.choose_temperature(values, 1.0)
    assert chosen["chosen"] == chosen["best"] == 1.3 and chosen["best_value"] == 1 and chosen["current_value"] == pytest.approx(2 / 3)
    for won, lost, tie in ((2, 1, True), (8, 5, True), (9, 4, False), (3, 0, False), (5, 5, True)):      # won - lost against sqrt(won + lost)
        current, other = np.array([0.0] * won + [1.0] * lost + [1.0] * 50), np.array([1.0] * won + [0.0] * lost + [1.0] * 50)
        chosen = mstar.choose_temperature({1.0: current, 1.2: other}, 1.0)
        assert chosen["chosen"] == (1.0 if tie else 1.2) and chosen["best"] == (1.2 if won > lost else 1.0)


def test_reward_pass_is_over_as_many_responses_as_a_training_question_gets(policy, world, tokenizer, monkeypatch):
    """n = 4 watched, L = 2 in training: the mean over the two pairs, counted by hand."""
    cfg, *_ = parse([*TINY, "--image_size", "64", "--patch_size", "8", "--monitor_rollouts", "4", "--rollouts_per_question", "2"])
    small, rng = {"validation": world["validation"][:5]}, random.Random(2)
    right = [[rng.random() < 0.4 for _ in range(5)] for _ in range(5)]
    rewards = [[rng.random() for _ in range(5)] for _ in range(5)]
    answers = [[f"answer: {q.answer + (not r)}" for r in row] for q, row in zip(small["validation"], right)]
    responses = [[type("R", (), {"tokens": [i, j], "log_probs": [0.0], "complete": True}) for j in range(5)] for i in range(5)]
    monkeypatch.setattr(mstar, "sample_texts", lambda *a, **k: (answers, responses))
    monkeypatch.setattr(mstar, "score", lambda prm, prompts, tokens, tok: [[[1.0, rewards[i][j]] for i, j in group] for group in tokens])
    metrics = mstar.monitor(cfg, policy, "a PRM", small, tokenizer, 0, 1.0, False)
    best = [[max(pair, key=lambda j: rewards[i][j]) for pair in ((1, 2), (3, 4))] for i in range(5)]     # place 0 is the greedy one
    assert metrics["reward_pass_at_1"] == pytest.approx(np.mean([right[i][j] for i in range(5) for j in best[i]]))
    assert metrics["reward_pass_at_2"] == pytest.approx(np.mean([right[i][a] or right[i][a + 1] for i in range(5) for a in (1, 3)]))
    assert metrics["pass_at_k"] == np.mean([any(row[1:]) for row in right]) and "reward_pass_at_4" not in metrics


# ---------------------------------------------------------------- the whole run

@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("runs") / name for name in "ab"]
    return folders, [mstar.main([*TINY, "--out", str(folder)]) for folder in folders]


def test_a_run_writes_its_files(two_runs):
    folders, (report, _) = two_runs
    assert sorted(path.name for path in folders[0].iterdir()) == [
        "audit.json", "config.json", "labels.json", "metrics.jsonl", "policy.json", "policy.safetensors", "prm.json", "prm.safetensors", "report.html", "report.json",
        "samples", "warmup.json", "warmup.safetensors"]
    assert json.loads((folders[0] / "report.json").read_text()) == report
    assert [row["name"] for row in report["rows"]] == ["base", "+ warm-up", "SFT (direct answers)", "continuous", "+ PRM re-rank", "M-STaR"]
    assert {"command", "preset", "method", "seed", "versions", "device", "seconds", "config", "rows", "iterations"} <= report.keys()
    assert [line["iteration"] for line in report["iterations"]] == [0, 1, 2] * 3


def test_arms_get_equal_responses_and_updates_and_their_own_switches(two_runs):
    report = two_runs[1][0]
    arms = {arm: [line for line in report["iterations"] if line["arm"] == arm] for arm in ("continuous", "prm", "mstar")}
    for name in ("responses", "queries", "iteration"):
        assert len({tuple(line.get(name) for line in lines) for lines in arms.values()}) == 1
    assert "sweep" in arms["mstar"][0] and not any("sweep" in line for arm in ("continuous", "prm") for line in arms[arm])


def test_the_work_that_is_announced_is_the_work_that_is_done(two_runs):
    report = two_runs[1][0]
    responses, updates = mstar.work_of(Config(**report["config"]))
    done = {name: sum(line.get(name, 0) for line in report["iterations"]) for name in ("responses", "updates")}
    assert responses["self-evolving"] == done["responses"] and updates["self-evolving"] >= done["updates"]      # without a right response there is no update
    assert report["stages"].keys() == {"start", "base", "warm-up", "PRM", "audit", "tests", "sft", "continuous", "prm", "mstar"}
    assert report["seconds"] == pytest.approx(sum(report["stages"].values()), abs=1)


def test_minutes_scale_a_run_once(tmp_path, tokenizer, monkeypatch, capsys):
    """Twice the time for everything but the tests, from a made-up price of 0.5 minutes per update of the base."""
    monkeypatch.setattr(mstar, "expected_minutes", lambda cfg, *rest: {"base": 0.5 * cfg.base_updates, "tests": 1.0})
    cfg, preset, _ = parse([*TINY, "--minutes", "5"])
    policy = mstar.new_policy(cfg, tokenizer)
    done = Checkpoint(tmp_path / "checkpoint", tokenizer, "cpu")
    scaled = mstar.announce(cfg, preset, tmp_path, "cpu", policy, {}, tokenizer, done, to_be_scaled=True)
    assert scaled.base_updates == 2 * cfg.base_updates and scaled.passes == 2 * cfg.passes and scaled.evolve_updates == 2 * cfg.evolve_updates and scaled.test == cfg.test
    screen = capsys.readouterr().out
    assert "scaled    by 2.00 to fit 5 minutes" in screen and "expected  5.0 minutes" in screen
    assert mstar.announce(scaled, preset, tmp_path, "cpu", policy, {}, tokenizer, done, to_be_scaled=False) == scaled
    (tmp_path / "checkpoint" / "base.safetensors").touch()         # what is there is not expected again
    mstar.announce(scaled, preset, tmp_path, "cpu", policy, {}, tokenizer, done, to_be_scaled=False)
    assert "expected  1.0 minutes" in capsys.readouterr().out


def test_samples_show_fixed_questions_with_a_verdict_per_step(two_runs):
    shown = [json.loads((two_runs[0][0] / "samples" / f"{iteration}.json").read_text()) for iteration in range(3)]
    ids = [[question["id"] for question in part["questions"]] for part in shown]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 2 * 10 and {name.split("/")[0] for name in ids[0]} == {"validation", *TESTBEDS}
    for response in (response for part in shown for question in part["questions"] for response in question["responses"]):
        assert len(response["scores"]) == len(response["labels"]) == len(response["oracle"]) == response["text"].count("\n") + 1
        assert not response["selected"] or response["grade"] == "right"


def test_same_seed_same_rows_and_bytes(two_runs):
    (a, b), reports = two_runs
    assert reports[0]["rows"] == reports[1]["rows"]
    assert (a / "policy.safetensors").read_bytes() == (b / "policy.safetensors").read_bytes()


def test_a_finished_run_can_be_scored_again(two_runs, capsys):
    import evaluate
    import prm
    evaluate.main([str(two_runs[0][0])])
    assert "in-domain accuracy" in capsys.readouterr().out.splitlines()[-1]
    prm.main([str(two_runs[0][0])])
    assert "AUC" in capsys.readouterr().out.splitlines()[-1] and json.loads((two_runs[0][0] / "audit.json").read_text())["responses"] == 320


def test_a_run_without_a_prm_ends_with_a_report_and_can_be_watched(tmp_path):
    report = mstar.main([*TINY, "--method", "continuous", "--watch_every", "2", "--out", str(tmp_path)])
    assert report["prm"] is None and [line["sweep"]["aim"] for line in report["iterations"] if "sweep" in line] == ["pass_at_k"] * 2
    assert all(line["temperature"] == 1.0 for line in report["iterations"])
    assert "data-outcome" in (tmp_path / "report.html").read_text() and not (tmp_path / "prm.safetensors").exists()


def test_a_run_stopped_in_its_first_seconds_can_be_begun_again(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt
    flags = [*TINY, "--method", "continuous", "--out", str(tmp_path / "mine")]
    with monkeypatch.context() as patch:
        patch.setattr(mstar, "expected_minutes", stop)
        for _ in range(2):
            with pytest.raises(SystemExit) as stopped:
                mstar.main(flags)
            assert stopped.value.code == 130 and f"go on with: python mstar.py {' '.join(flags)}\n" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(mstar, "stage_base", stop)
        with pytest.raises(SystemExit):
            mstar.main(flags)
        assert f"go on with: python mstar.py --resume {tmp_path / 'mine'}\n" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:                     # now there is something that could be lost
        mstar.main(flags)
    assert stopped.value.code == 2 and "not empty" in capsys.readouterr().err


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, named", [
    (["--interval", "0"], "--interval"), (["--interval", "1.5"], "--interval"), (["--temperature", "-1"], "--temperature"), (["--temperature", "nan"], "--temperature"),
    (["--preset", "huge"], "huge"), (["--method", "magic"], "magic"), (["--nonsense", "1"], "--nonsense"), (["--batch_size", "0"], "--batch_size"),
    (["--evolve_lr", "-0.1"], "--evolve_lr"), (["--seed", "x"], "--seed"), (["--image_size", "100"], "--image_size"), (["--device", "abacus"], "--device"),
    (["--temp", "1"], "--temp"), (["--temperature", "warm"], "--temperature"), (["--arms", "prm", "--method", "mstar"], "--arms"), (["--arms", "mstar,magic"], "magic"),
    (["--keep_top", "0"], "--keep_top"), (["--prm_questions", "1"], "--prm_questions"), (["--select", "best"], "--select"), (["--adapt_by", "luck"], "--adapt_by"), (["--vision_width", "20"], "--vision_width"), (["--kv_heads", "0"], "--kv_heads"),
    (["--unlabeled", "some"], "--unlabeled"), (["--mix_in", "1"], "--mix_in"), (["--experiment", "table9"], "table9"), (["--experiment", "table1", "--interval", "0.5"], "--interval"),
    (["--experiment", "table1", "--seed", "1"], "--seed"), (["--experiment", "table1", "--seeds", "0"], "--seeds"), (["--seeds", "3"], "--seeds"),
    (["--experiment", "table1"], "--passes 0.5"), (["--arms", "rest_em,mstar", "--passes", "1", "--minutes", "5"], "--minutes"),
    (["--arms", "continuous,continuous_6.25", "--passes", "1", "--labeled", "41"], "--labeled 41"), (["--experiment", "dynamics", "--rollouts_per_question", "1"], "--rollouts_per_question"),
    (["--experiment", "table5", "--heads", "1", "--kv_heads", "1"], "in the small policy"), (["--test", "4"], "--test"), (["--labeled", "1"], "--labeled")])
def test_wrong_use_exits_2_with_one_line_and_writes_nothing(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        mstar.main([*TINY, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and named in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, arms, method, select", [
    ([], "sft,continuous,prm,mstar", "mstar", "top"), (["--method", "continuous"], "continuous", "continuous", "all"),
    (["--arms", "sft,prm"], "sft,prm", "prm", "top"), (["--arms", "continuous,prm", "--method", "continuous", "--select", "random"], "continuous,prm", "continuous", "random")])
def test_what_is_run(flags, arms, method, select):
    """Everything by default, a method alone when it is named, and its switches are those that were typed."""
    cfg, *_ = parse([*TINY, *flags])
    assert (cfg.arms, cfg.method, cfg.select) == (arms, method, select) and mstar.arms_of(cfg)[method] is cfg
    assert "prm" not in arms or method == "prm" or mstar.arms_of(cfg)["prm"].select == "top"


def test_a_folder_in_use_is_never_written_to(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for out, word in ((tmp_path, "new name"), (tmp_path / "file", "exists"), (tmp_path / "file" / "below", "directory")):
        with pytest.raises(SystemExit) as stop:
            mstar.main([*TINY, "--out", str(out)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and word in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine.txt"]


def test_default_folder_gets_a_number_instead_of_overwriting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg, preset, _ = parse(TINY)
    names = []
    for _ in range(3):
        folder = mstar.new_folder(cfg, preset)
        (folder / "something").touch()
        names.append(folder.name)
    assert names == ["test-mstar-seed0", "test-mstar-seed0-2", "test-mstar-seed0-3"]


def test_a_loss_that_is_not_finite_stops_the_training(policy):
    policy.embed.weight.data[60] = float("nan")
    cfg, image = Config(batch_size=2), torch.zeros(64, 64, 3, dtype=torch.uint8)
    with pytest.raises(FloatingPointError, match="bad: the loss or gradient of update 1 "):
        mstar.train(policy, *new_optimizers(policy, 1e-3, 2), [Example(image, [1, 50, 2], [60, 3])], 3, cfg, "bad", UNKEPT)
