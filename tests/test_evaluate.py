"""Grades and statistics, against counting by hand; the report, against hostile text."""
import base64
import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, permutations
from math import isclose

import numpy as np
import pytest

import evaluate
from data import TASKS, TESTBEDS, write_reasoning
from evaluate import auc, balanced_accuracy, bootstrap_interval, evaluate_policy, format_table, grade, grade_greedily, luck_of_runs, most_frequent_answer, paired_gain, pass_at_k, reward_pass_at_k, verdict
from model import save_tensors


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
    gain, low, high = paired_gain((a, b))["id"]
    assert isclose(gain, 0.1) and 0 < low < 0.1 < high < 0.2
    assert paired_gain((a, b))["ood"] == [0, 0, 0]
    same, low2, high2 = paired_gain((a, b), (a, b))["id"]           # a second run that is the same adds nothing
    assert same == gain and abs(low2 - low) < 0.02 and abs(high2 - high) < 0.02
    none, low3, high3 = paired_gain((a, b), (b, a))["id"]           # one that says the opposite widens the interval: two runs say little
    assert isclose(none, 0, abs_tol=1e-12) and low3 <= -0.8 and high3 >= 0.8


@pytest.mark.parametrize("runs, arms", [(2, 6), (3, 2), (3, 7)])
def test_verdicts_on_made_up_tables_whose_truth_is_known(runs, arms):
    """Arms are right on hard and easy questions by chance, and every run has luck of its own. A gain of ten points is found, its reverse
    too, and where there is none at least 95 of 100 tables stay unresolved. Resampling two runs instead would call half of them."""
    rng, said = np.random.default_rng(runs * arms), {}
    for gain, tables in ((0.1, 20), (-0.1, 20), (0.0, 100)):
        said[gain] = Counter()
        for _ in range(tables):
            ease, luck = rng.beta(1, 1, 750), rng.normal(0, 0.012, (arms, runs, 1))
            right = rng.random((arms, runs, 750)) < np.clip(0.1 + 0.7 * ease + luck + gain * (np.arange(arms) == 0)[:, None, None], 0, 1)
            said[gain][verdict([[right[0].astype(float) - right[1]]], luck=luck_of_runs(right.mean(axis=2)), draws=1000)[0]] += 1
    assert said[0.0]["unresolved"] >= 95
    if (runs, arms) != (3, 2):                                     # two arms and three runs: two degrees of freedom see little
        assert said[0.1]["holds"] >= 19 and said[-0.1]["fails"] >= 19
    assert not said[0.1]["fails"] and not said[-0.1]["holds"]


def test_a_verdict_of_one_run_and_of_several_effects():
    rng = np.random.default_rng(0)
    up, none = rng.random((1, 400)) < 0.2, np.where(np.arange(400) % 2, 1.0, -1.0)[None]
    said, found = verdict([[up.astype(float)], [up.astype(float)]])
    assert said == "holds" and found[0][0] == pytest.approx(up.mean()) and found[0][1] < up.mean() < found[0][2]
    assert verdict([[up.astype(float)], [none]])[0] == "unresolved" and verdict([[up.astype(float)], [-up.astype(float)]])[0] == "fails"
    assert verdict([[none * 0]], margin=0.01)[0] == "holds" and verdict([[none]], margin=0.01)[0] == "unresolved"
    slightly = np.where(np.arange(400) % 2, 0.021, -0.039)[None]    # [-0.012, -0.006]: "not by more than a point" is neither shown nor refuted
    assert verdict([[slightly]], margin=0.01)[0] == "unresolved" and verdict([[slightly]])[0] == verdict([[slightly - 0.01]], margin=0.01)[0] == "fails"
    barely = np.array([[1.0] * 6 + [-1.0] * 18 + [0.0] * 400])     # below 0 at 95 %, but not as the worst of twenty
    assert verdict([[-up.astype(float)] * 0 + [barely]])[0] == "fails" and verdict([[barely]] * 20)[0] == "unresolved"


@pytest.mark.parametrize("runs, arms, most", [(2, 8, 1.55), (3, 6, 1.4)])
def test_an_interval_over_runs_is_not_much_wider_than_it_has_to_be(runs, arms, most):
    """Half of its width against 1.96 standard deviations of the effect, over made-up tables. Questions that each run answers by chance are in
    the resampled questions and in the spread of the runs: counted twice, they would make it 1.5 to 1.7 times as wide."""
    rng, effects, halves = np.random.default_rng(runs), [], []
    for _ in range(300):
        right = (rng.random((arms, runs, 300)) < rng.beta(1, 1, 300)).astype(float)
        low, high = bootstrap_interval([right[0] - right[1]], draws=200, luck=luck_of_runs(right.mean(axis=2)))
        effects, halves = [*effects, (right[0] - right[1]).mean()], [*halves, (high - low) / 2]
    assert 0.95 < np.mean(halves) / (1.96 * np.std(effects)) < most


def test_luck_of_runs_is_what_arm_and_seed_leave():
    """A table without luck has none, whatever its arms and seeds do; with luck of a known size the estimate is that of a difference."""
    assert luck_of_runs(np.add.outer([0.1, 0.5, 0.4], [0.0, 0.2])) == (pytest.approx(0, abs=1e-12), 2) and luck_of_runs([[0.1], [0.2]]) is None
    error, freedom = luck_of_runs(np.random.default_rng(0).normal(0, 0.02, (200, 3)))
    assert freedom == 398 and error == pytest.approx(0.02 * (2 / 3) ** 0.5, rel=0.1)


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


# ---------------------------------------------------------------- report.html

EVIL = "</script><img src=x onerror=alert(1)>'\"&"


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.words, self.inside = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        else:
            self.words += data


@pytest.fixture
def run_folder(tmp_path, world, monkeypatch):
    """The files of a run in which everything that somebody else may have written is hostile."""
    question = replace(world["validation"][0], id="validation/0", text=f"how much is {EVIL}?")
    monkeypatch.setattr(evaluate, "build_world", lambda *a: {"validation": [question]})
    save_tensors(tmp_path / "config.json", {}, {"method": "mstar", "splits": {}, "world_seed": 0, "command": f"python mstar.py {EVIL}"})
    metrics = {"arm": "mstar", "iteration": 0, "temperature": 1.0, "greedy_accuracy": 0.5, "pass_at_k": 0.75, "reward_pass_at_2": 0.6, "distinct": 0.9, "entropy": 0.2,
               "truncated": 0.0, "unparseable": 0.3, "reward_auc": 0.9, "sweep": {"aim": "reward_pass_at_2", "chosen": 0.7, "surface": {"0.7": {"reward_pass_at_2": 0.65}, "1.0": {"reward_pass_at_2": 0.6}}}}
    later = {key: value for key, value in metrics.items() if key != "sweep"} | {"iteration": 1, "reward_auc": 0.6, "kept": 3, "loss": 0.1, "queries": 10, "correct": 8, "right": 5, "all_right": 1, "none_right": 2}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (metrics, later)))
    (tmp_path / "samples").mkdir()
    for iteration in range(2):
        responses = [{"text": f"{EVIL} is 3\nanswer: 7", "grade": "right", "selected": True, "truncated": False, "scores": [0.25, 0.5], "labels": [0.125, 1.0], "oracle": [False, True]},
                     {"text": "hm", "grade": "unparseable", "selected": False, "truncated": True, "scores": [0.1], "labels": [0.0], "oracle": [False]}]
        (tmp_path / "samples" / f"{iteration}.json").write_text(json.dumps({"iteration": iteration, "temperature": 1.0, "questions": [{"id": "validation/0", "responses": responses}]}))
    return tmp_path


def test_the_report_shows_hostile_text_and_runs_none_of_it(run_folder):
    page = Page(evaluate.write_html(run_folder).read_text())
    assert page.scripts == [evaluate.SCRIPT] and [tag for tag, _ in page.tags].count("script") == 1
    assert page.words.count(EVIL) >= 4                             # command, question, and a step in both iterations, as text
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes) and attributes.get("src", "data:").startswith("data:") and "href" not in attributes
    digest = base64.b64encode(hashlib.sha256(evaluate.SCRIPT.encode()).digest()).decode()
    assert any(f"default-src 'none'" in attributes.get("content", "") and digest in attributes["content"] for _, attributes in page.tags)


def test_the_report_says_what_it_shows(run_folder):
    page = Page(evaluate.write_html(run_folder).read_text())
    for words in ("right, selected, by a false step", "PRM 0.25 · rollouts 0.12 · ✗ false", "PRM 0.50 · rollouts 1.00 · ✓ true", "unparseable, truncated", "1 of 2 right",
                  "Not there: report.json", "Not there: audit.json", "no answer found: more --warmup_updates", "the PRM no longer knows this policy", "An unfinished run of mstar: 2 iterations"):
        assert words in page.words, words
    chosen = [attributes["style"] for tag, attributes in page.tags if tag == "td" and "chosen" in attributes.get("class", "")]
    assert chosen == ["--s: 1.00"] and "--s: 1.00'>65.0</td>" in (run_folder / "report.html").read_text()
    drawn = next(attributes["points"] for tag, attributes in page.tags if tag == "polyline")
    assert len(drawn.split()) == 2


def test_a_report_can_be_made_of_whatever_is_there(run_folder, capsys):
    for name in ("metrics.jsonl", "samples/0.json", "samples/1.json"):
        (run_folder / name).unlink()
        evaluate.main([str(run_folder), "--report"])
        assert f"Not there: {name.split('/')[0]}" in Page((run_folder / "report.html").read_text()).words or name == "samples/0.json"
    (run_folder / "config.json").unlink()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(run_folder), "--report"])
    assert stop.value.code == 2 and str(run_folder) in capsys.readouterr().err


def test_runs_are_compared_on_the_same_questions(tmp_path, capsys):
    rng, folders = np.random.default_rng(0), []
    for name, chance in (("a", 0.4), ("b", 0.7)):
        graded = {split: "".join(rng.choice(["r", "w"], p=[chance, 1 - chance], size=40)) for split in ("test", *TESTBEDS)}
        row = {"name": "M-STaR", "graded": graded, "id": dict.fromkeys(("all", *TASKS), 0.5), "ood": dict.fromkeys((*TESTBEDS, "all"), 0.5)}
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        base = {"name": "base", "graded": {split: "w" * 40 for split in graded}}
        report = {"rows": [base, row], "gain_over": {"base": {}}, "config": {"world_seed": 0, "validation": 10, "test": 40, "testbed": 40}}
        (folders[-1] / "report.json").write_text(json.dumps(report))
    evaluate.main(list(map(str, folders)))
    result = json.loads((folders[0] / "comparison.json").read_text())
    a, b = result["rows"]
    assert result["gain_over_first"] == {"b: M-STaR": paired_gain((b, a))} and result["gain_over_first"]["b: M-STaR"]["id"][0] > 0.1
    assert result["gain_in_all_runs"]["M-STaR - base"] == paired_gain((a, base), (b, base))
    assert "in domain" in capsys.readouterr().out.splitlines()[-1]
    report["config"]["world_seed"] = 1
    (folders[1] / "report.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit) as stop:
        evaluate.main(list(map(str, folders)))
    assert stop.value.code == 2 and "--world_seed" in capsys.readouterr().err


def test_a_chart_has_ticks_around_its_values():
    for values in ([0.5, 0.5, 0.5], [0, 100], [-3, 4, 12], [1e-4, 3e-4], [1234, 5678]):
        page = Page(evaluate.line_chart("title", "unit", {"a": list(enumerate(values))}, "note"))
        points = next(attributes["points"] for tag, attributes in page.tags if tag == "polyline")
        heights = [float(point.split(",")[1]) for point in points.split()]
        assert all(15 <= y <= 175 for y in heights) and all((a < b) == (y > z) for a, b, y, z in zip(values, values[1:], heights, heights[1:]) if a != b)
        assert 2 <= sum(tag == "line" and attributes.get("class") == "grid" for tag, attributes in page.tags) <= 8


@pytest.mark.parametrize("content", ["[" * 100_000, "3", "{}", "[]", '{"rows": 1}', "nonsense", "null"])
def test_a_report_of_another_shape_is_one_clear_error(content, run_folder, capsys):
    (run_folder / "report.json").write_text(content)
    for flags in ([str(run_folder), "--report"], [str(run_folder), str(run_folder)]):
        if content in ("{}", "[]", "null") and "--report" in flags:
            continue                                               # an empty report counts as none
        with pytest.raises(SystemExit) as stop:
            evaluate.main(flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and str(run_folder) in error
