"""Grades and statistics, against counting by hand."""
import random
import re
import sys
import time
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, permutations
from math import isclose

import numpy as np
import pytest
import torch

import evaluate
from data import TASKS, TESTBEDS, Question, build_world, write_reasoning
from evaluate import (Look, answer_greedily, auc, best_temperature, bootstrap_interval, columns_of,
                      compare, correct_in, evaluate_policy, find_answer, format_table, grade,
                      make_prompts, one_line_errors, paired_gain, pass_at_k, pass_metrics, percent,
                      points, reward_pass_at_k, sample_texts)
from model import Policy, Response, Sampling, pixels_of, read_json, sample, save, write_json
from mstar import Config
from results.tables import sound_accuracy

# ---------------------------------------------------------------- grades

SEVEN = Question("", "FQA", "", "how many?", 7)

def test_grader_takes_every_true_answer_and_no_other(world):
    for question in world["test"] + world["size"]:
        text = write_reasoning(question, random.Random(0))
        assert grade(text, question) == "correct"
        for other in range(1, 100):
            is_correct = grade(f"answer: {other}", question) == "correct"
            assert is_correct == (other == question.answer)

@pytest.mark.parametrize("text, outcome", [
    ("answer: 7", "correct"), ("answer: 7.0", "correct"), ("answer: 07", "correct"),
    ("red is 7\nanswer: 7.\n", "correct"), ("answer: 8\nanswer: 7", "correct"),
    ("answer: 7.5", "wrong"), ("answer: -7", "wrong"), ("answer: 77", "wrong"),
    ("answer: 7\nanswer: 8", "wrong"),
    ("", "unparseable"), ("7", "unparseable"), ("answer:", "unparseable"),
    ("answer: seven", "unparseable"), ("answer: 7 8", "unparseable"),
    ("answer: 7\n7 + 1 = 8", "unparseable"), ("answer: 7 + 0", "unparseable"),
    ("answer: ٧", "unparseable"), ("answer: " + "7" * 5000, "unparseable")])
def test_grade_by_value(text, outcome):
    assert grade(text, SEVEN) == outcome

def test_an_answer_is_a_number_or_none():
    assert find_answer("answer: 7.5", SEVEN) == Fraction(15, 2)
    assert find_answer("answer: .5.", SEVEN) == 0.5 and find_answer("no answer", SEVEN) is None

def test_long_texts_take_no_long_time():
    began = time.time()
    for text in ("answer: " + "9" * 200_000 + "x", "answer: 7" + " " * 200_000 + "x",
                 "answer: " * 50_000, "answer: 7" + "." * 200_000):
        assert find_answer(text, SEVEN) is None
    assert time.time() - began < 5                                 # it was 9 seconds for 20,000

# ---------------------------------------------------------------- statistics

def test_pass_at_k_equals_counting_every_subset():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([i < c for i in range(n)], k))
                share = sum(map(any, draws)) / len(draws)
                assert isclose(pass_at_k(n, c, k), share, abs_tol=1e-12)

def test_reward_pass_at_k_against_every_order():
    """Equal rewards: the value is the share of all orders in which a correct response is among the
    first k."""

    def is_order(p, rewards):
        return all(rewards[a] >= rewards[b] for a, b in zip(p, p[1:]))

    def is_found(p, correct, k):
        return any(correct[i] for i in p[:k])

    rng, every_order = random.Random(0), list(permutations(range(5)))
    for _ in range(40):
        correct = [rng.random() < 0.4 for _ in range(5)]
        rewards = [rng.choice([1, 2, 3]) for _ in range(5)]
        orders = [p for p in every_order if is_order(p, rewards)]
        for k in range(1, 6):
            found = [is_found(p, correct, k) for p in orders]
            assert abs(reward_pass_at_k(correct, rewards, k) - np.mean(found)) < 1e-12
            # rewards that are correctness: is there a correct one at all
            assert reward_pass_at_k(correct, correct, k) == float(any(correct))
            # rewards by chance: pass@k
            by_chance = [reward_pass_at_k(correct, list(p), k) for p in every_order]
            assert abs(np.mean(by_chance) - pass_at_k(5, sum(correct), k)) < 1e-12

def test_auc_against_counting_pairs():
    rng = random.Random(1)

    def count(good, scores):
        wins = []
        for i, j in permutations(range(len(good)), 2):
            if good[i] and not good[j]:
                wins.append((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
        return np.mean(wins) if wins else None

    for _ in range(50):
        good = [rng.random() < 0.5 for _ in range(12)]
        scores = [rng.randint(0, 4) for _ in range(12)]
        assert auc(good, scores) == pytest.approx(count(good, scores))
    assert auc([True, True], [1, 2]) is None and auc([], []) is None

def test_of_no_response_no_share_is_unsound():
    """Not 0 %, which would enter means over seeds as the best of all."""
    (question,) = build_world({"test": 1})["test"]
    text = write_reasoning(question, random.Random(0))
    assert evaluate.share_unsound([question], []) is None
    assert evaluate.share_unsound([question], [(0, text), (0, "answer: 1")]) == 0.5

def test_interval_covers_as_promised():
    """Of 200 samples of a coin of 0.3, about 95 % of the intervals hold 0.3 (between 90 and 99 %: 3
    standard errors and small-sample bias)."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.random(200) < 0.3, draws=500)
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 200 <= 0.99

def test_interval_is_of_the_mean_of_group_means():
    """Each group is resampled for itself; every question weighs the same."""
    assert bootstrap_interval(np.ones(5), np.zeros(20)) == [0.2, 0.2]
    coin = np.arange(100) % 2
    low, high = bootstrap_interval(coin)
    both_low, both_high = bootstrap_interval(coin, coin)
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62                # 0.5 +- 1.96 * 0.05
    assert both_high - both_low == pytest.approx((high - low) / 2 ** 0.5, rel=0.1)

def test_paired_gain_uses_pairs():
    beds = dict.fromkeys(TESTBEDS, "cw" * 50)
    better = {"graded": {"test": "c" * 30 + "w" * 70, **beds}}
    worse = {"graded": {"test": "c" * 20 + "w" * 70 + "u" * 10, **beds}}
    gain, low, high = paired_gain(better, worse)["id"]
    assert isclose(gain, 0.1) and 0 < low < 0.1 < high < 0.2
    assert paired_gain(better, worse)["ood"] == [0, 0, 0]
    loss, *edges = paired_gain(worse, better)["id"]
    assert isclose(loss, -0.1) and edges == pytest.approx([-high, -low], abs=0.02)

def test_a_gain_out_of_domain_is_the_mean_over_testbeds():
    wrong = dict.fromkeys(("test", *TESTBEDS), "w" * 20)
    better = {"graded": {**wrong, "style": "c" * 20}}              # of five testbeds
    assert paired_gain(better, {"graded": wrong}) == {"id": [0, 0, 0], "ood": [0.2, 0.2, 0.2]}

def test_a_gain_in_sound_answers_is_known_where_both_say_which_are_sound():
    sound, unsound = {"graded": {"test": "sssw" * 9}}, {"graded": {"test": "sccw" * 9}}
    nobody_knows = {"graded": {"test": "cccw" * 9}}
    gain = paired_gain(sound, unsound)
    assert gain["id"] == [0, 0, 0] and gain["sound"][0] == 0.5 > gain["sound"][1] > 0.3
    assert paired_gain(sound, nobody_knows) == {"id": [0, 0, 0]}

# ---------------------------------------------------------------- a row of the result table

def test_a_row_holds_what_it_says(policy, world, monkeypatch):
    """evaluate_policy with known grades: correct on FQA of the test and of `style`, unparseable on
    `size`, wrong elsewhere."""
    def known(policy, questions, max_new_tokens, title, direct):
        assert max_new_tokens == 5
        split = questions[0].id.split("/")[0]
        grades = []
        for question in questions:
            is_correct = question.task == "FQA" and split in ("test", "style")
            grades.append("correct" if is_correct else "wrong")
        return ["hm"] * 60, ["unparseable"] * 60 if split == "size" else grades

    monkeypatch.setattr(evaluate, "answer_greedily", known)
    row = evaluate_policy("known", policy, world, 5)
    assert row["id"] == {"all": 0.2, "sound": 0.0, "FQA": 1.0,
                         "GPS": 0.0, "MWP": 0.0, "TQA": 0.0, "VQA": 0.0}
    assert row["ood"]["style"] == 0.2 and row["ood"]["size"] == 0
    assert isclose(row["ood"]["all"], 0.04)
    assert row["unparseable"] == 0 and row["unsound"] == 1 and row["readings"]["test"] is None
    assert set(row["graded"]) == {"test", *TESTBEDS}
    assert row["graded"]["size"] == "u" * 60 and row["graded"]["test"].count("c") == 12
    assert row["graded"]["wording"] == "w" * 60
    assert row["ci95"]["id"]["FQA"] == [1, 1] and row["ci95"]["ood"]["size"] == [0, 0]
    low, high = row["ci95"]["id"]["all"]
    assert 0.05 < low < 0.2 < high < 0.35
    head, line = format_table([row]).splitlines()
    assert head.split() == ["ID", "sound", *TASKS, *TESTBEDS, "OOD"]
    assert line.split()[1:4] == ["20.0", "0.0", "100.0"]
    assert line.split()[0] == "known" and line.split()[-1] == "4.0"

def test_unparseable_is_counted_apart_from_wrong(policy, world, monkeypatch):
    grades = ["unparseable"] * 6 + ["wrong"] * 54
    monkeypatch.setattr(evaluate, "answer_greedily", lambda *rest: (["hm"] * 60, grades))
    row = evaluate_policy("poor", policy, world, 5)
    assert row["unparseable"] == 0.1 and row["graded"]["test"] == "u" * 6 + "w" * 54

def test_greedy_grades_are_those_of_the_responses(policy, world, monkeypatch):
    questions = world["test"][:3]

    def texts(policy, prompts, how, title, prefixes=None):
        assert how.rollouts == 1 and how.temperature == 0 and how.max_new_tokens == 5
        asked = [policy.tokenizer.decode(prompt.ids) for prompt in prompts]
        assert asked == [question.text for question in questions]
        return [[f"answer: {questions[0].answer}"], ["answer: 0"], ["hm"]], None

    monkeypatch.setattr(evaluate, "sample_texts", texts)
    texts, grades = answer_greedily(policy, questions, 5, "title")
    assert grades == ["correct", "wrong", "unparseable"] and texts[1] == "answer: 0"

def test_a_row_says_what_is_unsound_and_what_is_seen(policy, world, monkeypatch):
    """Of the test, a third each: sound; correct with a false reading; wrong with a true one."""
    def texts(policy, prompts, how, title):
        written = []
        for i in range(len(prompts)):
            question = world["test"][i]
            sound_text = write_reasoning(question, random.Random(0))
            fact, number = next(iter(question.facts.items()))
            written.append([(sound_text, f"{fact} is 77\nanswer: {question.answer}",
                             f"{fact} is {number}\nanswer: 0")[i % 3]])
        return written, None

    monkeypatch.setattr(evaluate, "sample_texts", texts)
    row = evaluate_policy("any", policy, world, 5)
    assert row["unsound"] == 0.5 and row["id"]["all"] == pytest.approx(2 / 3)
    assert row["graded"]["test"] == "scw" * 20
    assert row["id"]["sound"] == pytest.approx(1 / 3) == sound_accuracy(row)
    assert correct_in("scwu").tolist() == [1, 1, 0, 0]
    low, high = row["ci95"]["id"]["sound"]
    assert 0.1 < low < 1 / 3 < high < 0.6
    assert list(columns_of(row))[:3] == ["ID", "sound", "FQA"]
    true = sum(len(re.findall(" is ", write_reasoning(question, random.Random(0))))
               for question in world["test"][::3])
    assert row["readings"]["test"] == (true + 20) / (true + 40)

def test_prompts_hold_picture_and_question_and_only_if_wanted_the_answer(policy, world):
    questions = world["test"][:4]
    plain = make_prompts(policy, questions)
    told = make_prompts(policy, questions, with_answer=True)
    for i, question in enumerate(questions):
        picture = evaluate.render(question, policy.config.image_size)
        assert (plain[i].image.numpy() == picture).all()
        assert torch.equal(told[i].image, plain[i].image)
        assert plain[i].ids == policy.tokenizer.prompt(question.text)
        assert told[i].ids == policy.tokenizer.prompt(question.text, question.answer)
    large = Policy(replace(policy.config, image_size=256), policy.tokenizer)
    for prompt, question in zip(make_prompts(large, questions), questions):
        assert callable(prompt.image)                              # drawn only when needed
        assert (pixels_of(prompt.image).numpy() == evaluate.render(question, 256)).all()

def test_texts_are_those_of_the_sampled_tokens(policy, prompts):
    how, prefix = Sampling(3, 1.0, 6, seed=0), policy.tokenizer.encode("red is 3\n")
    prefixes = [[[], prefix], [prefix]]
    for given in (None, prefixes):
        texts, responses = sample_texts(policy, prompts[:2], how, "title", given)
        assert responses == sample(policy, prompts[:2], how, given)
        assert [len(group) for group in texts] == ([6, 3] if given else [3, 3])
        for group, of_tokens in zip(texts, responses):
            decoded = [policy.tokenizer.decode(response.tokens) for response in of_tokens]
            assert group == decoded and isinstance(of_tokens[0], Response)
    assert all(text.startswith("red is 3\n") for text in texts[1])

def test_a_policy_of_weights_that_are_not_finite_is_named(policy, prompts):
    policy.norm.weight.data[3] = float("inf")
    with pytest.raises(FloatingPointError, match="the policy's logits"):
        sample_texts(policy, prompts, Sampling(1, 1.0, 4, seed=0), "round 3")

def test_no_progress_bar_without_stderr(policy, prompts, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)                       # 2>&-
    texts, _ = sample_texts(policy, prompts, Sampling(1, 1.0, 4, seed=0), "title")
    assert len(texts) == len(prompts)

def test_shares_and_gains_as_text():
    assert percent(0.1234) == "12.3 %" and percent(0.0, "-") == "0.0 %"
    assert percent(None) == "not known" and percent(None, "-") == "-"
    assert points([0.012, -0.003, 0.021]) == "+1.2 points [-0.3, +2.1]"

# ---------------------------------------------------------------- exploration

def test_the_best_temperature_wins_and_a_tie_keeps_the_current_one():
    lists = {0.3: [1, 0, 0], 0.7: [1, 1, 0], 1.0: [0, 1, 1], 1.3: [0, 0, 0]}
    values = {t: np.tile(np.array(v, float), 20) for t, v in lists.items()}
    assert best_temperature(values, 1.0) == (1.0, 1.0)
    assert best_temperature(values, 0.7) == (0.7, 0.7)
    assert best_temperature(values, 0.3) == (0.7, 0.7)
    assert best_temperature(values, 1.3) == (1.0, 1.0)
    values[1.3] = np.ones(60)
    assert best_temperature(values, 1.0) == (1.3, 1.3)
    # won - lost questions against their standard error, sqrt(won + lost)
    for won, lost, is_tie in ((2, 1, True), (8, 5, True), (9, 4, False), (3, 0, False),
                              (5, 5, True)):
        current = np.array([0.0] * won + [1.0] * lost + [1.0] * 50)
        other = np.array([1.0] * won + [0.0] * lost + [1.0] * 50)
        best, chosen = best_temperature({1.0: current, 1.2: other}, 1.0)
        assert best == (1.2 if won > lost else 1.0) and chosen == (1.0 if is_tie else 1.2)

def test_reward_pass_is_over_as_many_responses_as_a_training_question_gets():
    """n = 4 watched, L = 2 in training: the mean over the two pairs, counted by hand."""
    rng = random.Random(2)
    correct = np.array([[rng.random() < 0.4 for _ in range(4)] for _ in range(5)])
    rewards = np.array([[rng.random() for _ in range(4)] for _ in range(5)])
    metrics = pass_metrics(Config(rollouts_per_question=2), Look(None, None, correct, rewards))
    for q in range(5):
        best = [max(pair, key=lambda j: rewards[q, j]) for pair in ((0, 1), (2, 3))]
        assert metrics["reward_pass_at_1"][q] == np.mean([correct[q, j] for j in best])
        pairs = [correct[q, a] or correct[q, a + 1] for a in (0, 2)]
        assert metrics["reward_pass_at_2"][q] == np.mean(pairs)
        assert metrics["pass_at_k"][q] == any(correct[q]) and "reward_pass_at_4" not in metrics
    assert "reward_pass_at_1" not in pass_metrics(
        Config(rollouts_per_question=2), Look(None, None, correct, None))

# ---------------------------------------------------------------- commands

@pytest.fixture
def two_runs(tmp_path):
    """The reports of two runs, of which the second is better."""
    rng, folders = np.random.default_rng(0), []
    for seed, (name, chance) in enumerate((("a", 0.4), ("b", 0.7))):
        graded = {}
        for split in ("test", *TESTBEDS):
            graded[split] = "".join(rng.choice(["c", "w"], p=[chance, 1 - chance], size=40))
        row = {"name": "M-STaR", "graded": graded, "id": dict.fromkeys(("all", *TASKS), 0.5),
               "ood": dict.fromkeys((*TESTBEDS, "all"), 0.5)}
        base = {**row, "name": "base", "graded": {split: "w" * 40 for split in graded}}
        config = {"out": name, "seed": seed}
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        write_json(folders[-1] / "report.json",
                   {"rows": [base, row], "mine": "M-STaR", "config": config, "questions": 40})
    return folders

def refused(folders, capsys):
    """The one line with which a command on these folders is refused."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main(list(map(str, folders)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(folders[0]) in error
    return error

def test_runs_are_compared_on_the_same_questions(two_runs, capsys):
    first, second = two_runs
    rows, gains = compare(two_runs)
    assert [row["name"] for row in rows] == [f"{first}: M-STaR", f"{second}: M-STaR"]
    assert gains == {f"{second}: M-STaR": paired_gain(rows[1], rows[0])}
    assert gains[f"{second}: M-STaR"]["id"][0] > 0.1
    evaluate.main(list(map(str, two_runs)))
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert "in domain: " + points(gains[f"{second}: M-STaR"]["id"]) in last_line

def test_runs_with_other_questions_are_not_compared(two_runs, capsys):
    report = read_json(two_runs[1] / "report.json")
    write_json(two_runs[1] / "report.json", {**report, "questions": 41})
    with pytest.raises(ValueError, match="different questions"):
        compare(two_runs)
    assert "different questions" in refused(two_runs, capsys)

@pytest.mark.parametrize("content", ["[" * 100_000, "3", "{}", "[]", '{"rows": 1}', "nonsense",
                                     "null", "changed"])
def test_a_report_of_another_shape_is_one_clear_error(content, two_runs, capsys):
    file = two_runs[1] / "report.json"
    whole = file.read_text()
    file.write_text(whole.replace('"seed": 1', '"seed": 2') if content == "changed" else content)
    assert file.read_text() != whole and "report.json" in refused(two_runs, capsys)

def test_a_report_without_what_is_needed_is_one_clear_error(two_runs, capsys):
    for content in ({}, {"config": 3}, {"config": {}}, {"rows": 1}):
        write_json(two_runs[1] / "report.json", content)           # whole, but not a report
        refused(two_runs, capsys)
    (two_runs[1] / "report.json").unlink()
    assert "No such file" in refused(two_runs, capsys)

def test_a_saved_policy_is_scored_again(policy, tmp_path, capsys):
    splits = {"test": 10, **dict.fromkeys(TESTBEDS, 2)}
    write_json(tmp_path / "config.json", {"splits": splits, "world_seed": 3, "max_new_tokens": 6,
                                          "policy": "base.safetensors", "data": "",
                                          "method": "mstar"})
    save(tmp_path / "policy.safetensors", policy)
    evaluate.main([str(tmp_path)])
    shown = capsys.readouterr().out
    world = build_world(splits, 3)
    assert format_table([evaluate_policy(str(tmp_path), policy, world, 6)]) in shown
    assert shown.splitlines()[-1].startswith("in-domain accuracy 0.0 % [")
    (tmp_path / "policy.safetensors").write_bytes(b"damaged")
    assert "policy.safetensors" in refused([tmp_path], capsys)
    assert "No such file" in refused([tmp_path / "none"], capsys)

@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "stopped"),
    (OSError(28, "No space left on device"), 2, "No space left on device"),
    (FileNotFoundError(2, "No such file", "x.json"), 2, "x.json"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "--micro_batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--micro_batch"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 2, "--micro_batch"),
    (RuntimeError("CUDA error: out of memory"), 2, "--micro_batch"), (MemoryError(), 2, "--resume"),
    (FloatingPointError("the loss of update 3 is not a finite number"), 1, "update 3")])
def test_what_stops_a_program_from_outside_is_one_line(error, status, words, capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors("prog.py", "what to do"):
        raise error
    line = capsys.readouterr().err
    assert stop.value.code == status and line.count("\n") == 1
    assert line.startswith("prog.py: ") and words in line
    assert line.endswith("; what to do\n") or "out of memory" in line

def test_errors_of_the_program_itself_keep_their_traceback(capsys):
    with pytest.raises(KeyError), one_line_errors("prog.py", "what to do", ValueError):
        raise KeyError("a bug")
    with pytest.raises(RuntimeError), one_line_errors("prog.py", "what to do", ValueError):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(SystemExit) as stop, one_line_errors("prog.py", "what to do", ValueError):
        raise ValueError("a damaged file")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "prog.py: ValueError: a damaged file; what to do\n"
    with one_line_errors("prog.py", "what to do"):
        pass
    assert capsys.readouterr().err == ""
