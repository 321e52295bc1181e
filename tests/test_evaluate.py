"""Grades and statistics, against counting by hand."""
import random
from itertools import combinations, permutations
from math import isclose

import numpy as np
import pytest

from data import write_reasoning
from evaluate import auc, balanced_accuracy, bootstrap_interval, evaluate_policy, format_table, grade, grade_greedily, most_frequent_answer, paired_gain, pass_at_k, reward_pass_at_k


def test_grader_takes_every_true_answer_and_no_other(world):
    for question in world["test"] + world["size"]:
        text = write_reasoning(question, random.Random(0))
        assert grade(text, question.answer) == "right"
        for other in range(1, 100):
            assert (grade(f"answer: {other}", question.answer) == "right") == (other == question.answer)


@pytest.mark.parametrize("text, outcome", [
    ("answer: 7", "right"), ("answer: 7.0", "right"), ("answer: 07", "right"), ("red is 7\nanswer: 7.\n", "right"), ("answer: 8\nanswer: 7", "right"),
    ("answer: 7.5", "wrong"), ("answer: -7", "wrong"), ("answer: 77", "wrong"), ("answer: 7\nanswer: 8", "wrong"),
    ("", "unparseable"), ("7", "unparseable"), ("answer:", "unparseable"), ("answer: seven", "unparseable"), ("answer: 7 8", "unparseable"),
    ("answer: 7\n7 + 1 = 8", "unparseable"), ("answer: 7 + 0", "unparseable"), ("answer: ٧", "unparseable")])
def test_grade_by_value(text, outcome):
    assert grade(text, 7) == outcome


def test_pass_at_k_equals_counting_every_subset():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([i < c for i in range(n)], k))
                assert isclose(pass_at_k(n, c, k), sum(map(any, draws)) / len(draws), abs_tol=1e-12)
    with pytest.raises(ValueError, match="n=3, c=4"):
        pass_at_k(3, 4, 1)


def test_bootstrap_interval_covers_as_promised():
    """Of 200 samples of a coin of 0.3, about 95 % of the intervals hold 0.3 (between 90 and 99 %: 3 standard errors and small-sample bias)."""
    rng = np.random.default_rng(0)
    inside = sum(low <= 0.3 <= high for low, high in (bootstrap_interval([rng.random(200) < 0.3], draws=500) for _ in range(200)))
    assert 0.90 <= inside / 200 <= 0.99


def test_paired_gain_uses_pairs():
    beds = dict.fromkeys(("style", "size", "layout", "compose", "wording"), "rw" * 50)
    a, b = {"graded": {"test": "r" * 30 + "w" * 70} | beds}, {"graded": {"test": "r" * 20 + "w" * 70 + "u" * 10} | beds}
    gain, low, high = paired_gain(a, b)["id"]
    assert isclose(gain, 0.1) and 0 < low < 0.1 < high < 0.2
    assert paired_gain(a, b)["ood"] == [0, 0, 0]


def test_most_frequent_answer_is_counted_by_template(world):
    train, test = world["labeled"], world["test"]
    by_hand = 0
    for question in test:
        answers = [other.answer for other in train if other.template == question.template]
        by_hand += bool(answers) and max(dict.fromkeys(answers), key=answers.count) == question.answer
    assert most_frequent_answer(train, test) == by_hand / len(test)


def test_a_row_holds_what_it_says(policy, world, tokenizer, monkeypatch):
    """evaluate_policy with known grades: right on FQA of the test and of `style`, unparseable on `size`, wrong elsewhere."""
    def grades(policy, questions, tokenizer, max_new_tokens, title, images=None):
        if images:
            return ["right"] * 15 + ["wrong"] * 45
        if questions[0].id.startswith("size"):
            return ["unparseable"] * 60
        return ["right" if q.task == "FQA" and q.id.startswith(("test", "style")) else "wrong" for q in questions]

    monkeypatch.setattr("evaluate.grade_greedily", grades)
    row = evaluate_policy("known", policy, world, tokenizer, 5)
    assert row["id"] == {"all": 0.2, "FQA": 1.0, "GPS": 0.0, "MWP": 0.0, "TQA": 0.0, "VQA": 0.0}
    assert row["ood"]["style"] == 0.2 and row["ood"]["size"] == 0 and isclose(row["ood"]["all"], 0.04)
    assert row["unparseable"] == 0 and row["shuffled_images"] == 0.25
    assert row["graded"]["size"] == "u" * 60 and row["graded"]["test"].count("r") == 12
    assert row["ci95"]["id"]["FQA"] == [1, 1] and row["ci95"]["ood"]["size"] == [0, 0]
    assert "100.0" in format_table([row])


def test_greedy_grades_are_those_of_the_responses(policy, world, tokenizer, monkeypatch):
    questions = world["test"][:3]

    def texts(policy, prompts, tokenizer, rollouts_per_question, temperature, *rest):
        assert rollouts_per_question == 1 and temperature == 0
        assert [tokenizer.decode(prompt.ids) for prompt in prompts] == [question.text for question in questions]
        return [[f"answer: {questions[0].answer}"], ["answer: 0"], ["hm"]], None

    monkeypatch.setattr("evaluate.sample_texts", texts)
    assert grade_greedily(policy, questions, tokenizer, 5, "") == ["right", "wrong", "unparseable"]


def test_shuffled_images_come_from_other_questions(policy, world, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr("evaluate.render", lambda question, size: seen.append(question.id) or np.zeros((64, 64, 3), np.uint8))
    monkeypatch.setattr("evaluate.sample_texts", lambda policy, prompts, *rest: ([["answer: 1"]] * len(prompts), None))
    evaluate_policy("any", policy, world, tokenizer, 5)
    shuffled, own = seen[-60:], [question.id for question in world["test"]]
    assert sorted(shuffled) == sorted(own) and all(a != b for a, b in zip(shuffled, own))


def test_reward_pass_at_k_against_every_order():
    """Equal scores: the value is the share of all orders in which a right response is among the first k."""
    rng = random.Random(0)
    for k in (0, 3):
        with pytest.raises(ValueError, match="reward_pass_at_k"):
            reward_pass_at_k([True, False], [0.1, 0.2], k)
    for _ in range(40):
        right, scores = [rng.random() < 0.4 for _ in range(5)], [rng.choice([1, 2, 3]) for _ in range(5)]
        for k in range(1, 6):
            orders = [p for p in permutations(range(5)) if all(scores[a] >= scores[b] for a, b in zip(p, p[1:]))]
            share = np.mean([any(right[i] for i in p[:k]) for p in orders])
            assert abs(reward_pass_at_k(right, scores, k) - share) < 1e-12
            assert reward_pass_at_k(right, right, k) == float(any(right))                            # scores that are correctness: pass@n
            every = np.mean([reward_pass_at_k(right, list(p), k) for p in permutations(range(5))])   # scores by chance: pass@k
            assert abs(every - pass_at_k(5, sum(right), k)) < 1e-12


def test_auc_and_balanced_accuracy_against_counting_pairs():
    rng = random.Random(1)
    for _ in range(50):
        good, scores = [rng.random() < 0.5 for _ in range(12)], [rng.randint(0, 4) for _ in range(12)]
        groups = [(rng.randint(0, 1), rng.randint(0, 2)) for _ in range(12)]
        for given, label in ((None, [0] * 12), (groups, groups)):
            pairs = [(a > b) + 0.5 * (a == b) for g, a, m in zip(good, scores, label) for h, b, n in zip(good, scores, label) if g and not h and m == n]
            assert auc(good, scores, given) == (pytest.approx(np.mean(pairs)) if pairs else None)
    assert balanced_accuracy([1, 1, 1, 0], [1, 1, 0, 0]) == pytest.approx((2 / 3 + 1) / 2) and balanced_accuracy([1, 1], [1, 0]) is None
