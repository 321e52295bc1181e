"""Grades and statistics, against counting by hand."""
import random
from fractions import Fraction
from itertools import combinations, permutations
from math import isclose

import numpy as np
import pytest
import torch

import evaluate
from data import TASKS, TESTBEDS, write_reasoning
from evaluate import (COLUMNS, auc, compare, evaluate_policy, find_answer, format_table, grade,
                      grade_greedily, interval, make_prompts, one_line_errors, paired_gain,
                      pass_at_k, percent, points, reward_pass_at_k, sample_texts)
from model import Response, Sampling, read_json, sample, save, write_json

# ---------------------------------------------------------------- grades

def test_grader_takes_every_true_answer_and_no_other(world):
    for question in world["test"] + world["size"]:
        text = write_reasoning(question, random.Random(0))
        assert grade(text, question.answer) == "correct"
        for other in range(1, 100):
            is_correct = grade(f"answer: {other}", question.answer) == "correct"
            assert is_correct == (other == question.answer)

@pytest.mark.parametrize("text, outcome", [
    ("answer: 7", "correct"), ("answer: 7.0", "correct"), ("answer: 07", "correct"),
    ("red is 7\nanswer: 7.\n", "correct"), ("answer: 8\nanswer: 7", "correct"),
    ("answer: 7.5", "wrong"), ("answer: -7", "wrong"), ("answer: 77", "wrong"),
    ("answer: 7\nanswer: 8", "wrong"),
    ("", "unparseable"), ("7", "unparseable"), ("answer:", "unparseable"),
    ("answer: seven", "unparseable"), ("answer: 7 8", "unparseable"),
    ("answer: 7\n7 + 1 = 8", "unparseable"), ("answer: 7 + 0", "unparseable"),
    ("answer: ٧", "unparseable")])
def test_grade_by_value(text, outcome):
    assert grade(text, 7) == outcome

def test_an_answer_is_a_number_or_none():
    assert find_answer("answer: 7.5") == Fraction(15, 2) and find_answer("answer: .5.") == 0.5
    assert find_answer("no answer") is None

# ---------------------------------------------------------------- statistics

def test_pass_at_k_equals_counting_every_subset():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([i < c for i in range(n)], k))
                share = sum(map(any, draws)) / len(draws)
                assert isclose(pass_at_k(n, c, k), share, abs_tol=1e-12)
    with pytest.raises(ValueError, match="n=3, c=4"):
        pass_at_k(3, 4, 1)

def test_reward_pass_at_k_against_every_order():
    """Equal rewards: the value is the share of all orders in which a correct response is among the
    first k."""
    for k in (0, 3):
        with pytest.raises(ValueError, match="reward_pass_at_k"):
            reward_pass_at_k([True, False], [0.1, 0.2], k)

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

    def count(good, scores, groups):
        wins = []
        for i, j in permutations(range(len(good)), 2):
            if good[i] and not good[j] and groups[i] == groups[j]:
                wins.append((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
        return np.mean(wins) if wins else None

    for _ in range(50):
        good = [rng.random() < 0.5 for _ in range(12)]
        scores = [rng.randint(0, 4) for _ in range(12)]
        groups = [(rng.randint(0, 1), rng.randint(0, 2)) for _ in range(12)]
        assert auc(good, scores) == pytest.approx(count(good, scores, [0] * 12))
        assert auc(good, scores, groups) == pytest.approx(count(good, scores, groups))
    assert auc([True, True], [1, 2]) is None and auc([], []) is None
    assert auc([True, False], [1, 2], ["a", "b"]) is None          # no pair within a group

def test_interval_covers_as_promised():
    """Of 200 samples of a coin of 0.3, about 95 % of the intervals hold 0.3 (between 90 and 99 %: 3
    standard errors and small-sample bias)."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = interval(rng.random(200) < 0.3, draws=500)
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 200 <= 0.99

def test_interval_is_of_the_mean_of_group_means():
    """A group of any size weighs the same; each is resampled for itself."""
    assert interval(np.ones(5), np.zeros(500)) == [0.5, 0.5]
    coin = np.arange(100) % 2
    low, high = interval(coin)
    both_low, both_high = interval(coin, coin)
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

# ---------------------------------------------------------------- a row of the result table

def test_a_row_holds_what_it_says(policy, world, monkeypatch):
    """evaluate_policy with known grades: correct on FQA of the test and of `style`, unparseable on
    `size`, wrong elsewhere."""
    def known(policy, questions, max_new_tokens, title, pictured=None):
        assert max_new_tokens == 5
        if pictured:
            return ["correct"] * 15 + ["wrong"] * 45
        split = questions[0].id.split("/")[0]
        grades = []
        for question in questions:
            is_correct = question.task == "FQA" and split in ("test", "style")
            grades.append("correct" if is_correct else "wrong")
        return ["unparseable"] * 60 if split == "size" else grades

    monkeypatch.setattr(evaluate, "grade_greedily", known)
    row = evaluate_policy("known", policy, world, 5)
    assert row["id"] == {"all": 0.2, "FQA": 1.0, "GPS": 0.0, "MWP": 0.0, "TQA": 0.0, "VQA": 0.0}
    assert row["ood"]["style"] == 0.2 and row["ood"]["size"] == 0
    assert isclose(row["ood"]["all"], 0.04)
    assert row["unparseable"] == 0 and row["shuffled_images"] == 0.25
    assert set(row["graded"]) == {"test", *TESTBEDS}
    assert row["graded"]["size"] == "u" * 60 and row["graded"]["test"].count("c") == 12
    assert row["graded"]["wording"] == "w" * 60
    assert row["ci95"]["id"]["FQA"] == [1, 1] and row["ci95"]["ood"]["size"] == [0, 0]
    low, high = row["ci95"]["id"]["all"]
    assert 0.05 < low < 0.2 < high < 0.35
    head, line = format_table([row]).splitlines()
    assert head.split() == list(COLUMNS) and line.split()[1:3] == ["20.0", "100.0"]
    assert line.split()[0] == "known" and line.split()[-1] == "4.0"

def test_unparseable_is_counted_apart_from_wrong(policy, world, monkeypatch):
    grades = ["unparseable"] * 6 + ["wrong"] * 54
    monkeypatch.setattr(evaluate, "grade_greedily", lambda *rest, **more: grades)
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
    grades = grade_greedily(policy, questions, 5, "title")
    assert grades == ["correct", "wrong", "unparseable"]

def test_shuffled_images_come_from_other_questions(policy, world, monkeypatch):
    seen = []

    def look(question, size):
        seen.append(question.id)
        return np.zeros((size, size, 3), np.uint8)

    def texts(policy, prompts, *rest):
        return [["answer: 1"]] * len(prompts), None

    monkeypatch.setattr(evaluate, "render", look)
    monkeypatch.setattr(evaluate, "sample_texts", texts)
    evaluate_policy("any", policy, world, 5)
    shuffled, own = seen[-60:], [question.id for question in world["test"]]
    assert sorted(shuffled) == sorted(own)
    assert all(theirs != mine for theirs, mine in zip(shuffled, own))

def test_prompts_hold_picture_and_question_and_only_if_wanted_the_answer(policy, world):
    questions, others = world["test"][:4], world["test"][4:8]
    plain = make_prompts(policy, questions)
    told = make_prompts(policy, questions, with_answer=True)
    swapped = make_prompts(policy, questions, pictured=others)
    for i, question in enumerate(questions):
        picture = evaluate.render(question, policy.config.image_size)
        assert (plain[i].image.numpy() == picture).all()
        assert torch.equal(told[i].image, plain[i].image)
        assert plain[i].ids == swapped[i].ids == policy.tokenizer.prompt(question.text)
        assert told[i].ids == policy.tokenizer.prompt(question.text, question.answer)
        other = evaluate.render(others[i], policy.config.image_size)
        assert (swapped[i].image.numpy() == other).all() and (picture != other).any()

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

def test_shares_and_gains_as_text():
    assert percent(0.1234) == "12.3 %" and percent(1, 8) == "12.5 %"
    assert percent(None) == "-" and percent(0, 0) == "-" and percent(0, 5) == "0.0 %"
    assert points([0.012, -0.003, 0.021]) == "+1.2 points [-0.3, +2.1]"

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
        config = {"out": name, "seed": seed, "world_seed": 0, "validation": 10, "test": 40,
                  "testbed": 40}
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        write_json(folders[-1] / "report.json",
                   {"rows": [base, row], "mine": "M-STaR", "config": config})
    return folders

def change_report(folder, name, value):
    """Give a report another value of its configuration."""
    report = read_json(folder / "report.json")
    report["config"][name] = value
    write_json(folder / "report.json", report)

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
    assert read_json(first / "comparison.json") == {"rows": rows, "gain_over_first": gains}
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert points(gains[f"{second}: M-STaR"]["id"]) + " in domain" in last_line
    assert not (second / "comparison.json").exists()

@pytest.mark.parametrize("name", ["world_seed", "validation", "test", "testbed"])
def test_runs_with_other_questions_are_not_compared(name, two_runs, capsys):
    change_report(two_runs[1], name, 41)
    with pytest.raises(ValueError, match=f"different --{name}:"):
        compare(two_runs)
    assert f"--{name}" in refused(two_runs, capsys)
    assert not (two_runs[0] / "comparison.json").exists()

def test_a_run_is_not_compared_with_itself(two_runs, capsys):
    first, second = two_runs
    assert f"{first} is the run {first} once more" in refused([first, second, first], capsys)
    (second / "report.json").write_bytes((first / "report.json").read_bytes())     # a copy
    assert f"{second} is the run {first} once more" in refused(two_runs, capsys)

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
    write_json(tmp_path / "config.json", {"splits": splits, "world_seed": 3, "max_new_tokens": 6})
    save(tmp_path / "policy.safetensors", policy)
    evaluate.main([str(tmp_path)])
    shown = capsys.readouterr().out
    world = evaluate.build_world(splits, 3)
    assert format_table([evaluate_policy(str(tmp_path), policy, world, 6)]) in shown
    assert shown.splitlines()[-1].startswith("in-domain accuracy 0.0 % [")
    (tmp_path / "policy.safetensors").write_bytes(b"damaged")
    assert "policy.safetensors" in refused([tmp_path], capsys)
    assert "No such file" in refused([tmp_path / "none"], capsys)

@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "stopped"),
    (OSError(28, "No space left on device"), 2, "No space left on device"),
    (FileNotFoundError(2, "No such file", "x.json"), 2, "x.json"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--micro_batch"),
    (FloatingPointError("the loss of update 3 is not a finite number"), 1, "update 3")])
def test_what_stops_a_program_from_outside_is_one_line(error, status, words, capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors("prog.py", "what to do"):
        raise error
    line = capsys.readouterr().err
    assert stop.value.code == status and line.count("\n") == 1
    assert line.startswith("prog.py: ") and line.endswith("; what to do\n") and words in line

def test_errors_of_the_program_itself_keep_their_traceback(capsys):
    with pytest.raises(KeyError), one_line_errors("prog.py", "what to do", ValueError):
        raise KeyError("a bug")
    with pytest.raises(SystemExit) as stop, one_line_errors("prog.py", "what to do", ValueError):
        raise ValueError("a damaged file")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "prog.py: ValueError: a damaged file; what to do\n"
    with one_line_errors("prog.py", "what to do"):
        pass
    assert capsys.readouterr().err == ""
