"""The paper's tables and the verdicts on its claims, on made-up results whose truth is known."""
import copy
from collections import Counter
from functools import partial

import numpy as np
import pytest

import mstar
from data import TASKS, TESTBEDS
from results import tables
from results.tables import (CLAIMS, FIGURES, TABLES, claims_of, curves_of_dynamics, curves_of_main,
                            dynamics_claims, format_table, make_table, run_intervals, verdict)

# ---------------------------------------------------------------- intervals and verdicts

def made_up_grades(rng, arms, runs, questions, gain=0.0, luck=0.0):
    """(arms, runs, questions) bools: arms answer hard and easy questions by chance, every run has
    luck of its own, and the first arm has a gain."""
    ease = rng.beta(1, 1, questions)
    own = rng.normal(0, luck, (arms, runs, 1)) if luck else 0
    is_first = (np.arange(arms) == 0)[:, None, None]
    chance = 0.1 + 0.7 * ease + own + gain * is_first
    return rng.random((arms, runs, questions)) < np.clip(chance, 0, 1)

@pytest.mark.parametrize("runs, found", [(2, 1), (3, 17), (8, 20)])
def test_verdicts_on_made_up_tables_whose_truth_is_known(runs, found, monkeypatch):
    """A gain of ten points is found (by two runs, which can see little, seldom), its reverse, too,
    and where there is none at least 95 of 100 tables stay unresolved. Resampling two runs instead
    would call half of them."""
    monkeypatch.setattr(tables, "run_intervals", partial(run_intervals, draws=1000))
    rng, said = np.random.default_rng(runs), {}
    for gain, number in ((0.1, 20), (-0.1, 20), (0.0, 100)):
        said[gain] = Counter()
        for _ in range(number):
            correct = made_up_grades(rng, 2, runs, 750, gain, luck=0.012).astype(float)
            said[gain][verdict([[correct[0] - correct[1]]])[0]] += 1
    assert said[0.0]["unresolved"] >= 95
    assert said[0.1]["holds"] >= found and said[-0.1]["fails"] >= found
    assert not said[0.1]["fails"] and not said[-0.1]["holds"]

def test_a_verdict_of_one_run_and_of_several_effects():
    up = (np.random.default_rng(0).random((1, 400)) < 0.2).astype(float)
    odd = np.arange(400) % 2
    none = np.where(odd, 1.0, -1.0)[None]
    said, numbers = verdict([[up], [up]])
    effect, low, high = numbers[0]
    assert said == "holds" and effect == pytest.approx(up.mean()) and low < effect < high
    assert verdict([[up], [none]])[0] == "unresolved"              # all must be above
    assert verdict([[up], [-up]])[0] == "fails"
    assert verdict([[up, -up]])[0] == "unresolved"                 # one effect, of two groups

def test_a_margin_says_by_how_much_less_it_may_be():
    odd = np.arange(400) % 2
    none = np.where(odd, 1.0, -1.0)[None]
    assert verdict([[0 * none]], margin=0.01)[0] == "holds"
    assert verdict([[0 * none]])[0] == "unresolved"
    assert verdict([[none]], margin=0.01)[0] == "unresolved"
    # [-0.012, -0.006]: "not by more than a point" is neither shown nor refuted
    slightly = np.where(odd, 0.021, -0.039)[None]
    assert verdict([[slightly]], margin=0.01)[0] == "unresolved"
    assert verdict([[slightly]])[0] == "fails"
    assert verdict([[slightly - 0.01]], margin=0.01)[0] == "fails"

def test_the_worst_of_many_effects_fails_only_at_a_corrected_level():
    barely = np.array([[1.0] * 6 + [-1.0] * 18 + [0.0] * 400])     # below 0 at 95 %
    assert verdict([[barely]])[0] == "fails" and verdict([[barely]] * 20)[0] == "unresolved"

@pytest.mark.parametrize("runs", [5, 8])
def test_an_interval_over_runs_is_not_much_wider_than_it_has_to_be(runs):
    """Half of its width against 1.96 standard deviations of the effect, over made-up tables.
    Questions that each run answers by chance are in the resampled questions and in the spread of
    the runs: counted twice, they would make it 1.6 times as wide, and not 1.5."""
    rng, effects, halves = np.random.default_rng(runs), [], []
    for _ in range(300):
        correct = (rng.random((2, runs, 300)) < rng.beta(1, 1, 300)).astype(float)
        gains = correct[0] - correct[1]
        low, high = run_intervals([gains], draws=200)
        effects.append(gains.mean())
        halves.append((high - low) / 2)
    assert 0.95 < np.mean(halves) / (1.96 * np.std(effects)) < 1.55

def test_intervals_of_several_levels_and_of_runs_that_agree_or_not():
    once = np.array([[1.0] * 30 + [0.0] * 50 + [-1.0] * 20])       # a gain of ten points
    low, high = run_intervals([once])
    assert 0 > low > -0.05 and 0.2 < high < 0.25                   # 0.1 +- 1.96 * 0.07
    *inner, outer_low, outer_high = run_intervals([once], levels=(0.95, 0.99))
    assert inner == [low, high] and outer_low < low and outer_high > high
    # a second run that is the same adds nothing
    assert run_intervals([np.repeat(once, 2, axis=0)]) == pytest.approx([low, high], abs=0.02)
    # one that says the opposite widens the interval: two runs say little
    low, high = run_intervals([np.concatenate([once, -once])])
    assert low <= -0.7 and high >= 0.7

# ---------------------------------------------------------------- the claims

def made_up_row(name, letters, accuracy=0.5):
    """A row of the result table; `letters` are its grades in every split."""
    shares = dict.fromkeys(("all", *TASKS, *TESTBEDS), accuracy)
    return {"name": name, "id": shares, "ood": shares,
            "graded": dict.fromkeys(("test", *TESTBEDS), letters)}

AUDIT = {"greedy": "0 1", "best_of_16": "0 0", "likeliest_of_16": "0 0",
         "weighted_vote_of_16": "0 0", "majority_of_16": "1 1", "unsound_all": "0.5 -",
         "unsound_top_2": "0.25 -", "steps_all": "4 -", "steps_top_2": "3 -"}

def effects_if(name, best, size="medium"):
    """{(words, effect): mean} of the claims of a table in which the arm `best` of one size is
    correct everywhere, and all others are wrong."""
    arms = []
    for one_size in ("small", "medium", "large"):
        for arm in TABLES[name]:
            letters = ("c" if (arm, one_size) == (best, size) else "w") * 5
            arms.append({"arm": arm, "size": one_size, "words": TABLES[name][arm]["words"],
                         "responses": 1, "row": made_up_row(arm, letters)})
    effects = {}
    report = {"tasks": " ".join(TASKS), "audit": AUDIT}
    for _, words, parts, _ in claims_of(name, arms, [report]):
        for effect, groups in parts.items():
            effects[words, effect] = float(np.mean([group.mean() for group in groups]))
    return effects

@pytest.mark.parametrize("name", ["main", "table1", "table2", "table3", "table4"])
def test_claims_say_which_arm_is_better(name):
    """For each pair of a claim: the first arm correct and all others wrong, then the second."""
    words = {arm: about["words"] for arm, about in TABLES[name].items()}
    for claim in CLAIMS[name]:
        for better, worse in claim["pairs"]:
            key = claim["words"], f"{words[better]} over {words[worse]}"
            assert effects_if(name, better)[key] == 1 and effects_if(name, worse)[key] == -1

@pytest.mark.parametrize("name, size", [("main", "medium"), ("table4", "medium"),
                                        ("table5", "large")])
def test_c10_is_about_every_task_type_and_testbed(name, size):
    for best, effect in (("mstar", 1.0), ("pi_0", -1.0)):
        found = effects_if(name, best, size)
        everywhere = {part: value for (words, part), value in found.items() if "every" in words}
        assert everywhere == dict.fromkeys((*TASKS, *TESTBEDS), effect)

@pytest.mark.parametrize("name", ["main", "table2", "table4", "table5"])
def test_nothing_is_claimed_about_what_is_not_known(name):
    """Questions from files, without a testbed: no task of ours, no testbed, no oracle."""
    arms = []
    for size in ("small", "medium", "large"):
        for arm in TABLES[name]:
            row = {"name": arm, "id": {"all": 0.5}, "ood": {}, "graded": {"test": "cw"}}
            arms.append({"arm": arm, "size": size, "words": arm, "responses": 1, "row": row})
    audit = {**AUDIT, "unsound_all": "- -", "unsound_top_2": "- -"}
    claims = claims_of(name, arms, [{"tasks": "TabMWP UniGeo", "audit": audit}])
    for number, words, effects, margin in claims:
        assert number != "C10" and "unsound" not in words
        verdict(list(effects.values()), margin)
    assert claims or name == "table5"

def test_c10_is_about_the_gain_of_the_smallest():
    gains = []
    for size in ("large", "small", "medium"):
        found = effects_if("table5", "mstar", size)
        gains.append([found["the smallest policy gains least out of domain",
                            f"gain of {larger} over gain of small"]
                      for larger in ("medium", "large")])
    assert gains == [[0, 1], [-1, -1], [1, 0]]

def test_figure_2_claims_measure_what_they_say():
    """The question without two correct responses to leave out counts 0."""
    claims = tables.figure_2_claims([AUDIT, AUDIT])
    votes, unsound, steps = [parts for _, _, parts, _ in claims]
    assert [number for number, *_ in claims] == ["C5", "C5", "C6"]
    assert [margin for *_, margin in claims] == [0.01, 0.0, 0.0]
    for effect in votes.values():
        assert effect[0].tolist() == [[1, 1], [1, 1]]
    assert unsound["all over Top-2"][0].tolist() == [[0.25, 0]] * 2
    assert steps["all over Top-2"][0].tolist() == [[1, 0]] * 2
    in_table = effects_if("main", "prm")
    for _, words, parts, _ in claims:
        assert all((words, effect) in in_table for effect in parts)

def look(greedy, num_correct, reward, low, high):
    """What claims on dynamics take from a line of metrics.jsonl."""
    return {"by_question": {"greedy": greedy, "num_correct": num_correct,
                            "reward_pass_at_2": reward},
            "watched": {"any_correct": {"0.5": low, "1.0": "0 0 0 0", "1.5": high}}}

UNWATCHED = {"by_question": {"num_correct": "1 1 1 1", "reward_pass_at_2": "1 1 1 1"}}
LINES = [look("0 0 1 0", "1 4 2 3", "0 0 0.5 0", "1 1 1 1", "1 1 1 1"), UNWATCHED,
         look("0 1 1 0", "0 4 2 3", "1 0 0.5 1", "1 0 1 1", "1 1 1 1"), UNWATCHED,
         look("1 1 1 0", "0 9 2 3", "1 0.5 0.5 1", "0 0 1 1", "1 0 1 1")]

def effects_of(claims):
    """The mean of each effect of claims on dynamics, in order."""
    return [parts["effect"][0].mean() for _, _, parts, _ in claims]

def test_claims_on_dynamics_measure_what_they_say():
    """Two runs whose greedy answers rise by half, whose pass@k falls by a quarter, more at T = 0.5,
    and whose Reward-Pass@2 rises mainly at first, by 0.5 and then by 0.125."""
    claims = dynamics_claims([LINES, copy.deepcopy(LINES)])
    assert effects_of(claims) == [0.5, 0.25, 0.75, 0.5 - 0.125, 0.25]
    assert all(parts["effect"][0].shape == (2, 4) for _, _, parts, _ in claims)
    first, _, second, _, last = LINES
    # of an even number of looks the middle lies between two: 0.125 0.625 0.625 0.75
    even = dynamics_claims([[first, second, second, last]])
    assert effects_of(even)[3] == 0.5 - 0.125
    assert effects_of(dynamics_claims([[first, last]]))[3] == 0    # nothing between them

def test_claims_on_dynamics_are_about_the_arm_of_one_temperature():
    arms = []
    for arm, lines in (("prm_watched", LINES), ("mstar_watched", LINES[::-1])):
        arms.append({"arm": arm, "size": "medium", "words": arm, "responses": 1,
                     "row": made_up_row(arm, "cw"), "iterations": lines})
    arms.append({**arms[0], "arm": "mstar_pass_at_k"})
    claims = claims_of("dynamics", arms, [{}])
    assert effects_of(claims[2:-1]) == effects_of(dynamics_claims([LINES]))

def test_figure_5_compares_means_over_the_iterations_of_training():
    """pass@k of the questions in rounds 1 and 2: 0 1 and 1 1 where T adapts, else 0 0 and 1 0."""
    def run(*num_correct):
        return [{"by_question": {"num_correct": text, "reward_pass_at_2": "0.5 0"}}
                for text in ("9 9", *num_correct)]                 # iteration 0 is pi_0 in both

    adaptive, fixed = run("0 3", "2 1"), run("0 0", "1 0")
    _, _, effects, *_ = tables.figure_5_claim([fixed, fixed], [adaptive, fixed])
    assert effects["Pass@K"][0].tolist() == [[0, 1], [0, 0]]
    assert not np.any(effects["Reward-Pass@2"][0])

def test_paper_json_names_what_there_is():
    assert set(CLAIMS) <= set(TABLES)
    for name, rows in TABLES.items():
        assert set(rows) <= {"base", "pi_0", *mstar.METHODS}
        widths = {len(about["paper"]) for about in rows.values()}
        assert widths == {{"table4": 7, "table5": 3}.get(name, 2)}
        for claim in CLAIMS.get(name, []):
            assert {arm for pair in claim["pairs"] for arm in pair} <= set(rows)

# ---------------------------------------------------------------- as text, and the figures

def made_up_report(seed, size="medium", shift=0.0):
    """What mstar.run_stages would return for all methods: of each a look at pi_0 and two rounds of
    10 responses and 5 updates, and numbers that say where they come from."""
    rows, lines = [made_up_row("base", "wwwww"), made_up_row(mstar.ROW_NAMES["pi_0"], "cwwww")], []
    for method in mstar.METHODS:
        rows.append(made_up_row(mstar.ROW_NAMES.get(method, method), "ccwww", 0.4 + seed / 10))
        if method == "sft":
            continue
        for iteration in range(3):
            line = {"arm": method, "iteration": iteration, "temperature": 1.0, "k": 4,
                    "greedy_accuracy": 0.1 * iteration + shift, "pass_at_k": 0.5 + shift,
                    "reward_pass_at_2": 0.4 + shift, "sweep": {},
                    **look("0 1 0 1", "1 2 3 0", "0 1 0 1", "1 1 0 0", "1 1 1 0")}
            surface = {t: {"pass_at_k": float(t) / 2 + shift} for t in ("0.5", "1.0", "1.5")}
            line["watched"]["surface"] = surface
            if iteration == 1 or not method.endswith("_watched"):
                del line["watched"]
            if iteration:
                line |= {"num_responses": 10, "updates": 5}
            lines.append(line)
    return {"seed": seed, "size": size, "rows": rows, "iterations": lines, "config": {},
            "updates": {"pi_0": 7, "sft": 17, **dict.fromkeys(set(mstar.METHODS) - {"sft"}, 10)},
            "seconds": 120.0,
            "device": "cpu", "versions": {}, "tasks": " ".join(TASKS), "audit": AUDIT}

def cells_of(text, words):
    """The cells of the row of a Markdown table that begins with `words`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {words} |"))
    return line.strip("| ").split(" | ")[1:]

def test_a_table_holds_what_the_runs_did_beside_the_paper():
    result = make_table("table1", [made_up_report(0), made_up_report(1)], "the command")
    did = {arm["arm"]: (arm["responses"], arm["updates"]) for arm in result["arms"]}
    assert did["pi_0"] == (0, 7) and did["sft"] == (0, 17) and did["continuous_6.25"] == (20, 17)
    assert result["seeds"] == [0, 1] and result["minutes"] == 4
    for arm in result["arms"]:                                     # no figure needs the questions
        assert not any("by_question" in line for line in arm["iterations"])
    text = format_table(result)
    assert cells_of(text, "Continuous, 25 %") == ["45.0", "45.0", "43.1", "57.2", "20", "17"]
    assert cells_of(text, "SFT") == ["45.0", "45.0", "44.3", "54.8", "0", "17"]
    assert "`the command`: 2 seeds, 4 minutes on cpu" in text and "questions and seeds" in text

def test_a_table_says_how_much_is_correct_and_sound():
    report = made_up_report(0)
    for i, row in enumerate(report["rows"]):
        row["unsound"] = i / 100
    result = make_table("table1", [report], "")
    head, _, *lines = format_table(result).splitlines()
    assert head.split(" | ")[3] == "ID, sound"
    id, _, sound, *_ = cells_of("\n".join(lines), "pi_0 (warm-up)")
    assert sound == f"{float(id) * 0.99:.1f}" != id

def test_tables_with_other_columns():
    text = format_table(make_table("table4", [made_up_report(0)], ""))
    cells = cells_of(text, "M-STaR, T by Pass@K")
    assert cells[:7] == ["40.0"] * 7 and cells[7:14] == ["42.8", "58.0", *"-----"]
    reports = [made_up_report(0, size) for size in ("small", "medium", "large")]
    result = make_table("table5", reports, "")
    assert cells_of(format_table(result), "large: M-STaR") == ["40.0"] * 6 + ["61.6", "20", "17"]
    assert [arm["size"] for arm in result["arms"]][::3] == ["small", "medium", "large"]

def test_claims_as_text_say_verdict_effects_and_how_sure():
    result = make_table("main", [made_up_report(0)], "")
    claims = {claim["claim"]: claim for claim in result["claims"]}
    assert claims["C6"]["effects"]["all over Top-2"][0] == 0.5
    text = format_table(result)
    votes = next(line for line in text.splitlines() if line.startswith("| C5: best-of-16"))
    assert "| holds, on one seed |" in votes
    assert "majority voting over best-of-16 +100.0 [+100.0, +100.0]" in votes
    steps = next(line for line in text.splitlines() if line.startswith("| C6: "))
    assert "| unresolved | all over Top-2 +0.500 [+0.000, +1.000] steps (questions: 2)" in steps
    top = next(line for line in text.splitlines() if line.startswith("| C4: Top-2 beats all"))
    assert top.endswith("+ PRM re-rank over continuous +0.0 [+0.0, +0.0] (questions: 5) |")
    for claim in result["claims"]:
        assert claim["words"] in text and claim["seeds"] == 1

def test_dynamics_as_text_and_as_curves():
    """Means over seeds, of the looks at every temperature only."""
    reports = [made_up_report(0), made_up_report(1, shift=0.25)]
    result = make_table("dynamics", reports, "")
    text = format_table(result)
    lines = [line for line in text.splitlines() if line.startswith("| iteration ")]
    assert lines[0] == "| iteration 0 | 12.5 | 37.5 | 62.5 | 87.5 | 52.5 | 1.0, 1.0 |"
    assert len(lines) == 2 * 2 and lines[1].startswith("| iteration 2 | 32.5 |")   # of two arms
    assert all(title.replace("@k", "@4") in text for title in FIGURES)
    charts = list(curves_of_dynamics(result["arms"]).values())
    assert [len(series) for series in charts] == [4, 3, 2, 2]
    expected = [("pass@k, T = 0.5", [37.5, 37.5]), ("pass@k, T = 1.5", [75, 55]),  # minus greedy
                ("T = 1", [52.5, 52.5]), ("adaptive T", [62.5, 62.5])]
    for series, (name, values) in zip(charts, expected):
        assert series[name] == list(zip((0, 2), values))           # no look after round 1
    assert list(charts[0])[-1] == "greedy"

def test_curves_of_the_main_job_are_means_of_what_is_known():
    lines = [{"iteration": 0, "greedy_accuracy": 0.5, "unsound": 0.1}, {"iteration": 1},
             {"iteration": 2, "greedy_accuracy": 0.75}]            # nothing was correct
    other = [{**line, "unsound": 0.3} if line["iteration"] != 1 else line for line in lines]
    arms = [{"words": "a", "iterations": lines}, {"words": "b", "iterations": []},
            {"words": "a", "iterations": other}]
    assert curves_of_main(arms) == {
        "Greedy accuracy, %": {"a": [(0, 50), (2, 75)]},
        "Unsound, of the correct samples, %": {"a": [(0, pytest.approx(20)), (2, 30)]}}
    assert list(curves_of_main([{"words": "a", "iterations": [lines[2]]}])) == [
        "Greedy accuracy, %"]                                      # no oracle

def test_a_size_is_the_base_of_that_name():
    cfg, _ = mstar.parse(["--preset", "test"])
    recipes = [tables.of_size(cfg, suffix).recipe for suffix in tables.SIZES.values()]
    assert recipes == ["test-small", "test", "test-large"]
    kept = mstar.Config()
    files = [tables.of_size(kept, suffix).policy for suffix in tables.SIZES.values()]
    assert files == [f"weights/base{size}.safetensors" for size in ("-small", "", "-large")]
