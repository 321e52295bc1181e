"""README.md and those of results/ show what the runs in results/ measured, and nothing else; what
they point to is there."""
import re
from functools import cache
from itertools import chain, pairwise
from operator import ne
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

import evaluate
from data import FULL_SIZES, TESTBEDS, Tokenizer, build_world
from evaluate import answer_greedily, correct_in, letters_of
from model import load_network, read_json, seed_for
from results.report import write_picture
from results.tables import (curves_of_dynamics, curves_of_main, format_table, run_intervals,
                            sound_accuracy, verdict)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
RUNS = sorted(RESULTS.glob("*-*.json"))
TABLES = [path for path in RUNS if re.fullmatch(r"cpu-(table\d|main)|few-dynamics", path.stem)]
MAIN = read_json(RESULTS / "cpu-main.json")
READMES = (ROOT / "README.md", RESULTS / "README.md")
MINE, OTHERS = "M-STaR", ("pi_0 (warm-up)", "SFT (direct answers)", "continuous", "+ PRM re-rank")

def points(gain):
    gain, low, high = (100 * number for number in gain)
    return f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]"

def from_to(gains):
    """The smallest and the largest gain of a run, of (runs, questions)."""
    by_run = 100 * gains.mean(axis=1)
    return f"from {by_run.min():+.1f} to {by_run.max():+.1f}"

def first_table(text):
    """The rows of the first Markdown table, without its head: {first cell: the other cells}."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[1:] for row in rows}

# ---------------------------------------------------------------- numbers

@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_result_is_whole(path):
    assert read_json(path)                                         # its checksum, too

def rows_of(name):
    """Rows of the main job's result table, one per seed."""
    return [arm["row"] for arm in MAIN["arms"] if arm["row"]["name"] == name]

def graded(name, split):
    """(runs, questions) 1.0 where a row of the main job is correct."""
    return np.array([correct_in(row["graded"][split]) for row in rows_of(name)])

def test_the_result_table_is_what_the_committed_runs_measured():
    assert MAIN["seeds"] == list(range(len(MAIN["seeds"])))
    expected = {}
    for name in ("base", *OTHERS, MINE):
        rows, gains = rows_of(name), []
        assert len(rows) == len(MAIN["seeds"])
        for splits in (["test"], TESTBEDS):
            groups = [graded(MINE, split) - graded(name, split) for split in splits]
            gains.append(points((np.mean(groups), *run_intervals(groups))))
        levels = [f"{100 * mean(values):.1f}" for values in (
            [row["id"]["all"] for row in rows], list(map(sound_accuracy, rows)),
            [row["ood"]["all"] for row in rows])]
        expected[name] = levels + (["", ""] if name == MINE else gains)
    text = READMES[0].read_text()
    assert first_table(text[text.index("## What came out"):]) == expected
    gain = graded("+ PRM re-rank", "test") - graded("continuous", "test")
    assert f"by {points((gain.mean(), *run_intervals([gain])))} points, and on two" in text

def test_this_world_and_this_base_are_those_of_the_committed_runs():
    """A change of pictures, questions or network that leaves all other tests alone shows here."""
    world, base = build_world(FULL_SIZES), next(iter(rows_of("base")))
    tests = [world[split] for split in ("test", *TESTBEDS)]
    assert seed_for(0, tests) == read_json(RESULTS / "cpu-mstar-seed0.json")["questions"]
    policy = load_network(ROOT / "weights/base.safetensors", Tokenizer())
    for split in ("test", "style", "layout"):
        some = world[split][:20]
        letters = letters_of(some, *answer_greedily(policy, some, 64, split)).replace("s", "c")
        assert sum(map(ne, letters, base["graded"][split].replace("s", "c"))) <= 1     # rounding

def test_the_last_lines_of_the_main_job_are_those_of_the_committed_run():
    gains = read_json(RESULTS / "cpu-mstar-seed0.json")["gain_over"]
    text = READMES[0].read_text()
    for name in ("continuous", "+ PRM re-rank", "pi_0 (warm-up)"):
        gain = evaluate.points(gains[name]["id"])
        assert f"M-STaR over {name}, in domain: {gain}\n" in text

def test_accuracies_by_template_are_those_of_the_committed_runs():
    world = build_world({"test": 750})                             # the same, whatever comes after
    templates = np.array([question.template for question in world["test"]])
    of_pi_0 = read_json(RESULTS / "cpu-templates.json")["rows"]
    text = READMES[1].read_text()
    shown = first_table(text[text.index("| template "):])
    assert {name.split("`")[1] for name in shown} == set(templates) == set(of_pi_0)
    for name, cells in shown.items():
        template = name.split("`")[1]
        values = [of_pi_0[template][column] for column in ("any", "sound", "top")]
        for method in ("pi_0 (warm-up)", "continuous", "+ PRM re-rank", MINE):
            values.append(100 * graded(method, "test")[:, templates == template].mean())
        assert cells == [f"{value:.0f}" for value in values]
    spread = [[], []]                          # of runs on a template: as it is, by chance alone
    for method in ("continuous", "+ PRM re-rank", MINE):
        correct, sums = graded(method, "test"), np.zeros(2)
        for template in set(templates):
            of_template = correct[:, templates == template]        # (runs, questions)
            of_questions = of_template.var(axis=0, ddof=1).mean() / of_template.shape[1]
            sums += of_template.mean(axis=1).var(ddof=1), of_questions
        for shown, total in zip(spread, sums):
            shown.append(f"{100 * (total / len(set(templates))) ** 0.5:.1f}")
    (a, b, c), (x, y, z) = spread
    assert f"{a} points with `continuous`, {b} with + PRM re-rank, {c} with M-STaR" in text
    assert f"it would be {x}, {y} and {z}." in text

def mean_over_seeds(values):
    """(mean, ends of its 95 % interval by Student's t) of a number per seed."""
    half = {3: 4.303, 5: 2.776, 8: 2.365}[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5
    return mean(values), mean(values) - half, mean(values) + half

def over_seeds(gains):
    """The same, in points."""
    return points(mean_over_seeds(gains))

def gain_in_sound(pairs, splits):
    """Of answers that are correct and sound, over questions and runs: pairs of rows."""
    groups = []
    for split in splits:
        letters = [(a["graded"][split], b["graded"][split]) for a, b in pairs]
        groups.append(np.array([correct_in(a, "s") - correct_in(b, "s") for a, b in letters]))
    return points((np.mean(groups), *run_intervals(groups)))

def test_what_is_correct_and_sound_is_what_was_measured():
    controls = read_json(RESULTS / "cpu-controls.json")
    runs = {"main: the oracle's filter, then Top-2": controls["arms"]["oracle_filter"],
            "Table 2: two likeliest": runs_of_eight_seeds()["likelihood"]}
    for name, table in (("main", "main"), ("Table 1", "table1"), ("Table 2", "table2")):
        for arm in read_json(RESULTS / f"cpu-{table}.json")["arms"]:
            runs.setdefault(f"{name}: {arm['words']}", []).append(arm)
    text, shown = READMES[1].read_text(), {}
    for pair, cells in first_table(text[text.index("### Correct and sound"):]).items():
        better, _, worse = pair.partition(" over ")
        rows = [(a["row"], b["row"]) for a, b in
                zip(runs[better], runs[f"{pair.partition(': ')[0]}: {worse}"])]
        sound = [sound_accuracy(a) - sound_accuracy(b) for a, b in rows]
        interval = over_seeds(sound)
        if all("s" in row["graded"]["test"] for row in chain(*rows)):  # known by question
            interval = gain_in_sound(rows, ["test"])
        accuracy = np.mean([correct_in(a["graded"]["test"]) - correct_in(b["graded"]["test"])
                            for a, b in rows])
        assert cells == [f"{100 * accuracy:+.1f}", interval,
                         ", ".join(f"{100 * gain:+.1f}" for gain in sound)]
        shown[pair] = cells[1]
    for pair, words in (("main: continuous over pi_0 (warm-up)", "over pi_0 ({} points)"),
                        ("main: + PRM re-rank over pi_0 (warm-up)", "+ PRM re-rank gains {}.")):
        assert words.format(shown[pair]) in READMES[0].read_text()
    for better, worse in (("continuous", "pi_0 (warm-up)"), ("+ PRM re-rank", "pi_0 (warm-up)"),
                          ("+ PRM re-rank", "continuous"), (MINE, "+ PRM re-rank")):
        pairs = list(zip(rows_of(better), rows_of(worse)))
        assert gain_in_sound(pairs, TESTBEDS) in text              # out of domain

def test_what_is_unsound_is_what_was_measured():
    arms = read_json(RESULTS / "cpu-templates.json")["why_unsound"]["arms"].values()
    text = READMES[1].read_text()
    shown = first_table(text[text.index("Why correct responses are unsound"):])
    names = ("unsound", "wrong colour", "differences the wrong way round",
             "number not written before", "none of these")
    for name, cells in zip(names, shown.values()):
        whole = "correct" if name == "unsound" else "unsound"
        assert cells == [f"{100 * mean(run['all'][name] / run['all'][whole] for run in runs):.0f}"
                         for runs in arms]
    for cells, spared in zip(list(shown.values())[len(names):], (0, 1), strict=True):
        greedy = [[run["greedy"] for run in runs] for runs in arms]
        false = [[(run["false"] - spared * run["false, another colour has it"]) / run["readings"]
                  for run in runs] for runs in greedy]
        assert cells == [f"{100 - 100 * mean(shares):.1f}" for shares in false]

def test_what_labels_and_the_prm_make_of_readings_and_steps_was_measured():
    templates, controls = (read_json(RESULTS / f"cpu-{name}.json")
                           for name in ("templates", "controls"))
    text = READMES[1].read_text()
    readings = text[text.index("### What step labels make of a wrong colour"):]
    for name, cells in first_table(readings).items():
        kind = name.split(",")[0]
        seeds = [seed[kind] for seed in templates["labels_of_readings"]["seeds"]]
        points_of = [over_seeds([seed[of] for seed in seeds]) for of in ("label", "score")]
        logits = [[seed[of] for seed in seeds] for of in ("network", "likelihood")]
        parts = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*mean_over_seeds(part)) for part in logits]
        assert cells == points_of + parts
    seeds = controls["parts_of_the_prm"]["seeds"]
    shown = list(first_table(text[text.index("| % | PRM | network alone"):]).values())
    kinds = ("label", "label, same place", "true", "true, same place", "between questions")
    for kind, cells in zip(kinds, shown, strict=True):
        of_parts = [[seed[part].get(kind) for seed in seeds]
                    for part in ("score", "network", "likelihood", "label")]
        assert cells == ["" if None in part else f"{100 * mean(part):.1f}" for part in of_parts]
    for one, other, kind in (("network", "label", "true, same place"),
                             ("score", "likelihood", "label, same place"),
                             ("score", "likelihood", "true, same place")):
        gains = over_seeds([seed[one][kind] - seed[other][kind] for seed in seeds])
        assert f"({gains}" in text

def test_accuracies_by_seed_are_those_of_the_committed_runs():
    text = READMES[1].read_text()
    shown = first_table(text[text.index("| ID, % |"):])
    for name, cells in shown.items():
        assert cells == [f"{100 * values.mean():.1f}" for values in graded(name, "test")]

def test_what_is_trained_on_is_what_the_runs_of_table_2_say():
    arms, shown = {}, []
    for arm in read_json(RESULTS / "cpu-table2.json")["arms"]:
        arms.setdefault(arm["words"], []).append(arm["iterations"])
    for words, runs in arms.items():
        def over(name):                                            # all iterations but pi_0's
            return mean(mean(line[name] for line in lines[1:]) for lines in runs)

        def last(name):
            return mean(lines[-1][name] for lines in runs)

        shown.append(f"| {words} | {over('num_unique_correct'):,.0f} | {over('num_kept'):,.0f} | "
                     f"{100 * over('unsound_kept'):.1f} | {last('entropy'):.2f} | "
                     f"{100 * last('pass_at_1'):.1f} | {100 * last('pass_at_k'):.1f} |")
    assert len(shown) == 6 and not set(shown) - set(READMES[1].read_text().splitlines())

@cache
def runs_of_eight_seeds():
    """arm -> its runs: those of table 2, and those in which likelihood chooses."""
    controls = read_json(RESULTS / "cpu-controls.json")
    runs = {"likelihood": controls["arms"]["likelihood"] + controls["likelihood, seeds 3 to 7"]}
    for arm in read_json(RESULTS / "cpu-table2.json")["arms"]:
        runs.setdefault(arm["arm"], []).append(arm)
    return runs

def gain_of_choice(better, worse, splits=("test",)):
    """One array (runs, questions) for each split."""
    runs = runs_of_eight_seeds()
    correct = [np.array([[correct_in(run["row"]["graded"][split]) for run in runs[arm]]
                         for split in splits]) for arm in (better, worse)]
    return list(correct[0] - correct[1])

def test_what_chooses_is_what_was_measured():
    runs_of, whole_text = runs_of_eight_seeds(), READMES[1].read_text()
    text = whole_text[whole_text.index("### Chosen by R_p, by likelihood, by chance"):]
    rows = [run["row"] for run in runs_of["likelihood"]]
    levels = [f"{100 * mean(values):.1f}" for values in (
        [row["id"]["all"] for row in rows], [row["ood"]["all"] for row in rows],
        [row["unsound"] for row in rows])]
    assert len(rows) == 8 and ("ends at {} % on the test and {} % out of domain, and {} % of its "
                               "correct answers are unsound").format(*levels) in text
    arm_of = {"Top-2": "prm", "the two likeliest": "likelihood", "Random-2": "random_2",
              "Top-1": "top_1", "Top-4": "top_4", "all correct": "continuous"}
    shown = first_table(text)
    for pair, cells in shown.items():
        better, worse = (arm_of[name] for name in pair.split(" over "))
        (gain,) = gain_of_choice(better, worse)
        beds = gain_of_choice(better, worse, TESTBEDS)
        assert cells == [points((gain.mean(), *run_intervals([gain]))),
                         ", ".join(f"{100 * one:+.1f}" for one in gain.mean(axis=1)),
                         points((np.mean(beds), *run_intervals(beds)))]
    with_likelihood = read_json(RESULTS / "cpu-controls.json")["arms"]["with_likelihood"]
    gain = np.array([correct_in(a["row"]["graded"]["test"]) - correct_in(b["row"]["graded"]["test"])
                     for a, b in zip(runs_of["prm"], with_likelihood)])        # three seeds
    assert points((gain.mean(), *run_intervals([gain]))) in text
    (gain,) = gain_of_choice("continuous", "threshold")
    assert points((gain.mean(), *run_intervals([gain]))).replace("+", "") in whole_text
    (gain,) = gain_of_choice("prm", "random_2")                    # as seeds came in, and the new
    for some in (gain[:5], gain[:7], gain[3:]):
        assert points((some.mean(), *run_intervals([some]))) in whole_text
    # and the sentence on what the gain of Top-2 is made of
    steps = ("random_2", "continuous"), ("prm", "continuous"), ("prm", "random_2")
    parts = (f"{100 * gain_of_choice(*pair)[0].mean():.1f}" for pair in steps)
    assert ("Keeping only two gives {} of the {} points** of Top-2 over all correct, the PRM's "
            "choice {}.").format(*parts) in text

def gain_of_temperature(splits=("test",)):
    """M-STaR over T = 1, (runs, questions) for each split: the main job's runs, eight others."""
    again = read_json(RESULTS / "cpu-controls.json")["mstar, again"]
    gains = []
    for split in splits:
        gain = [correct_in(run["row"]["graded"][split]) - correct_in(at_1["row"]["graded"][split])
                for run, at_1 in zip(again, runs_of_eight_seeds()["prm"], strict=True)]
        gains.append(np.concatenate([graded(MINE, split) - graded("+ PRM re-rank", split), gain]))
    return gains

def test_eight_more_runs_of_mstar_are_what_was_measured():
    text = READMES[1].read_text()
    (gain,), beds = gain_of_temperature(), gain_of_temperature(TESTBEDS)
    assert len(gain) == 16
    for groups in ([gain], beds, [gain[8:]], [gain[11:]]):
        assert points((np.mean(groups), *run_intervals(groups))) in text
    assert f"by seed {from_to(gain[8:])}" in text
    shown = f"by {points((gain.mean(), *run_intervals([gain])))} points"
    assert shown in READMES[0].read_text()

def test_what_the_oracle_filter_does_is_what_was_measured():
    rows = [run["row"] for run in read_json(RESULTS / "cpu-controls.json")["arms"]["oracle_filter"]]
    gain = np.array([correct_in(row["graded"]["test"]) for row in rows])
    gain -= graded("+ PRM re-rank", "test")[:len(rows)]
    tasks = np.array([question.task for question in build_world({"test": 750})["test"]])
    for one in (gain, gain[:, tasks == "VQA"]):
        assert points((one.mean(), *run_intervals([one]))) in READMES[1].read_text()

def test_what_the_temperature_does_is_what_was_measured():
    controls = read_json(RESULTS / "cpu-controls.json")["arms"]
    main = [arm for arm in MAIN["arms"] if arm["arm"] == "prm"][:3]
    at_1 = [{"row": arm["row"], "greedy_accuracy": [], "entropy": []} for arm in main]
    for run, arm in zip(at_1, main):
        for line in arm["iterations"]:
            if "entropy" in line:
                run["greedy_accuracy"].append(line["greedy_accuracy"])
                run["entropy"].append(line["entropy"])
    text = READMES[1].read_text()
    shown = first_table(text[text.index("### Does the temperature matter?"):])
    runs_at = {"0.7": controls["T_0.7"], "1.0": at_1, "1.3": controls["T_1.3"]}
    assert shown.keys() == runs_at.keys()
    for temperature, runs in runs_at.items():
        rows = [run["row"] for run in runs]
        looks = [[f"{scale * mean(run[name][i] for run in runs):.{digits}f}" for i in (0, 4, 8)]
                 for name, scale, digits in (("greedy_accuracy", 100, 1), ("entropy", 1, 2))]
        assert shown[temperature] == [f"{100 * mean(row['id']['all'] for row in rows):.1f}",
                                      f"{100 * mean(row['ood']['all'] for row in rows):.1f}",
                                      f"{100 * mean(row['unsound'] for row in rows):.1f}",
                                      ", ".join(f"{100 * row['id']['all']:.1f}" for row in rows),
                                      *map(", ".join, looks)]

def moves(runs):
    """(sweeps that moved the temperature, all sweeps, by how many points of Reward-Pass@2 the new
    one was better when chosen, and at the next sweep: a list each) of M-STaR's runs."""
    moved, number, then, later = 0, 0, [], []
    for run in runs:
        sweeps = [line["sweep"] for line in run["mstar"]["iterations"] if "sweep" in line]
        number += len(sweeps)
        moved += sum(sweep["chosen"] != sweep["before"] for sweep in sweeps)
        for sweep, after in pairwise(sweeps):
            if sweep["chosen"] != sweep["before"]:
                for seen, gains in ((sweep, then), (after, later)):
                    new, old = (seen["surface"][str(sweep[name])]["reward_pass_at_2"]
                                for name in ("chosen", "before"))
                    gains.append(100 * (new - old))
    return moved, number, then, later

def test_what_16_responses_do_is_what_was_measured():
    controls, text = read_json(RESULTS / "cpu-controls.json"), READMES[1].read_text()
    runs, best = controls["L_16"], controls["L_16_best"]           # by our rule, by the paper's
    text = text[text.index("### With 16 responses to a question"):]
    rows = {}
    for arm, name in (("prm", "+ PRM re-rank"), ("mstar", MINE)):
        rows[f"{name}, L = 8"] = rows_of(name)
        rows[f"{name}, L = 16"] = [run[arm]["row"] for run in runs]
        levels = [100 * mean(row["id"]["all"] for row in rows[f"{name}, L = {L}"]) for L in (8, 16)]
        assert f"{name} ends at {levels[1]:.1f} % (L = 8: {levels[0]:.1f})" in text
    rows[f"{MINE}, best T, L = 16"] = [run["mstar"]["row"] for run in best]
    for pair, cells in first_table(text).items():
        pairs = list(zip(*(rows[name] for name in pair.split(" over ")), strict=True))
        on_test, *beds = [np.array([correct_in(a["graded"][split]) - correct_in(b["graded"][split])
                                    for a, b in pairs]) for split in ("test", *TESTBEDS)]
        assert cells == [points((on_test.mean(), *run_intervals([on_test]))),
                         ", ".join(f"{100 * gain:+.1f}" for gain in on_test.mean(axis=1)),
                         points((np.mean(beds), *run_intervals(beds))),
                         gain_in_sound(pairs, ["test"])]
    shown = first_table(text)["M-STaR, L = 16 over + PRM re-rank, L = 16"][0]
    assert f"by [{shown}](" in READMES[0].read_text()
    by_best = first_table(text)["M-STaR, best T, L = 16 over + PRM re-rank, L = 16"][0]
    assert all(f" by {by_best}" in readme.read_text() for readme in READMES)
    level = 100 * mean(row["id"]["all"] for row in rows[f"{MINE}, best T, L = 16"])
    assert f"it ends at {level:.1f} %" in text
    counts = []                                # of + PRM re-rank, means over all rounds and seeds
    at_8 = [arm for arm in MAIN["arms"] if arm["arm"] == "prm"]
    for of_arm in ([run["prm"] for run in runs], at_8):
        lines = [line for run in of_arm for line in run["iterations"][1:]]
        counts += [f"{mean(line['num_unique_correct'] for line in lines):,.0f}",
                   f"{100 * mean(line['unsound_kept'] for line in lines):.1f}"]
    assert ("has {} different correct responses, not {} (+ PRM re-rank), and of those that are "
            "kept {} % are unsound, not {}.").format(*counts[::2], *counts[1::2]) in text
    for of_rule, words in ((runs, "{} of {} sweeps moved the temperature"),
                           (best, "{} of {} sweeps moved it")):
        moved, number, then, later = moves(of_rule)
        assert words.format(moved, number) in text
        error = np.std(later, ddof=1) / len(later) ** 0.5
        assert (f"by {mean(then):.1f} points on the mean when it was chosen, and at the next sweep "
                f"by {mean(later):.1f} (standard error {error:.1f})") in text

def test_gains_over_continuous_in_its_best_rounds_are_those_that_were_measured():
    rows = [arm["row"] for arm in read_json(RESULTS / "cpu-table1.json")["arms"]
            if arm["arm"] == "continuous_12.5" and arm["seed"] < 3]
    rows += read_json(RESULTS / "cpu-controls.json")["continuous_12.5, seeds 3 and 4"]
    for name in ("+ PRM re-rank", MINE):
        for splits in (["test"], TESTBEDS):
            groups = []
            for split in splits:
                other = np.array([correct_in(row["graded"][split]) for row in rows])
                groups.append(graded(name, split)[:len(rows)] - other)
            shown = points((np.mean(groups), *run_intervals(groups)))
            assert shown in READMES[1].read_text()

def test_how_rounds_go_on_is_what_was_measured():
    graded_of, text = {}, READMES[1].read_text()                   # arm -> (seeds, questions)
    for arm in read_json(RESULTS / "cpu-table1.json")["arms"]:
        graded_of.setdefault(arm["arm"], []).append(correct_in(arm["row"]["graded"]["test"]))
    gain = np.subtract(graded_of["iterative_rft"], graded_of["rest_em"])
    assert f"on each seed, by {from_to(gain)[5:]} points" in text
    for interval in ("50", "25", "12.5", "6.25"):
        gain = np.subtract(graded_of[f"continuous_{interval}"], graded_of["continuous_100"])
        assert points((gain.mean(), *run_intervals([gain]))) in text
    longer = read_json(RESULTS / "cpu-trials.json")["rest_em_of_1600_updates"]["rows"]
    longer = [correct_in(row["graded"]["test"]) for row in longer]  # of seeds 3 to 6
    usual = {arm: graded[3:7] for arm, graded in graded_of.items()}    # of the same seeds
    for worse in (longer, usual["rest_em"]):
        gain = np.subtract(usual["iterative_rft"], worse)
        assert points((gain.mean(), *run_intervals([gain]))) in text

def test_what_is_said_of_unlabeled_questions_is_what_was_measured():
    text, graded_of, voted = READMES[1].read_text(), {}, {}        # arm -> one for each seed
    section = text[text.index("## Table 3"):text.index("## Table 4")]
    for arm in read_json(RESULTS / "cpu-table3.json")["arms"]:
        graded_of.setdefault(arm["arm"], []).append(arm["row"]["graded"])
        true = [line["pseudo_answers_true"] for line in arm["iterations"]
                if line.get("num_unlabeled")]
        voted.setdefault(arm["arm"], []).append(true)

    def gain(better, worse, splits):
        pairs = list(zip(graded_of[better], graded_of[worse]))
        return [np.array([correct_in(a[split]) - correct_in(b[split]) for a, b in pairs])
                for split in splits]

    for better, worse, splits in (
            ("true_answers", "continuous", ["test"]), ("true_answers", "continuous", TESTBEDS),
            ("true_answers_prm", "prm", ["test"]), ("true_answers_prm", "prm", TESTBEDS),
            ("true_answers_prm", "vote_0", ["test"])):
        groups = gain(better, worse, splits)
        assert points((np.mean(groups), *run_intervals(groups))) in section
    assert f"by seed {from_to(gain('true_answers', 'continuous', ['test'])[0])})" in section
    first, last = (mean(100 * true[i] for true in voted["vote_0"]) for i in (0, -1))
    assert f"{first:.0f} % are true in the first round and {last:.0f} % in the last" in section

def test_what_is_said_of_the_main_table_is_what_was_measured():
    graded_of, text = {}, READMES[1].read_text()                   # arm -> (seeds, questions)
    for arm in read_json(RESULTS / "cpu-table4.json")["arms"]:
        graded_of.setdefault(arm["arm"], []).append(correct_in(arm["row"]["graded"]["test"]))
    section = text[text.index("## Table 4"):text.index("### Does the temperature")]
    restarting = np.subtract(graded_of["iterative_rft"], graded_of["rest_em"])
    by_pass_at_k = np.subtract(graded_of["mstar_pass_at_k"], graded_of["prm"])
    for gain in (restarting, by_pass_at_k):
        assert points((gain.mean(), *run_intervals([gain]))) in section
    assert f"on each seed ({from_to(restarting)[5:]})" in section
    gain = np.subtract(graded_of["mstar"], graded_of["mstar_pass_at_k"])
    assert f"by {from_to(gain)[5:]} points, by seed" in section

def test_what_seeds_can_find_is_what_was_measured():
    power = read_json(RESULTS / "cpu-power.json")
    text = READMES[1].read_text()
    shown = first_table(text[text.index("| luck of a run, points |"):])
    for points_of_luck, cells in shown.items():
        expected = []
        for runs in (3, 5, 8):
            for gain, called in ((0.025, ("holds",)), (0, ("holds", "fails"))):
                (some,) = [one for one in power["tables"] if one["runs"] == runs and
                           one["luck_of_a_run"] == int(points_of_luck) / 100 and
                           one["gain"] == gain]
                number = sum(some[name] for name in called)
                expected.append(f"{100 * number / some['tables']:.0f}")
        assert cells == expected
    looks = [f"{100 * power['looks'][seeds]:.0f}" for seeds in ("3 and 8", "3, 5, 7 and 8", "8")]
    assert "in {} % of the cases, after 3, 5, 7 and 8 in {} %, in place of {} %".format(
        *looks) in text

def test_what_the_base_sees_is_what_was_measured():
    (row,) = read_json(RESULTS / "cpu-base.json")["rows"]
    seen = {split: [f"{100 * share:.1f}"] for split, share in row["readings"].items()}
    text = READMES[1].read_text()
    assert first_table(text[text.index("## The base"):]) == seen

def runs_of_bases():
    """base -> its runs, {name: row}: of base 0 the main job's, of "0, Table 2" that table's."""
    runs = {"0": [{} for _ in MAIN["seeds"]], "0, Table 2": [{} for _ in MAIN["seeds"]]}
    for arm in MAIN["arms"]:
        runs["0"][arm["seed"]][arm["row"]["name"]] = arm["row"]
    for arm in ("continuous", "random_2", "prm", "likelihood"):
        for seed, run in enumerate(runs_of_eight_seeds()[arm]):
            name = {"prm": "+ PRM re-rank"}.get(arm, arm)
            runs["0, Table 2"][seed][name] = run["row"]
    for base, about in read_json(RESULTS / "cpu-bases.json")["bases"].items():
        runs[base] = [{row["name"]: row for row in run["rows"]} for run in about["runs"].values()]
    return runs

def test_what_other_bases_do_is_what_was_measured():
    runs, text = runs_of_bases(), READMES[1].read_text()
    of_table_2 = runs.pop("0, Table 2")
    text = text[text.index("### Other bases"):]
    shown = first_table(text)
    assert shown.keys() == runs.keys()
    for base, cells in shown.items():
        expected = []
        for name in ("base", "pi_0 (warm-up)", "continuous", "+ PRM re-rank", MINE):
            expected += [f"{100 * mean(run[name][where]['all'] for run in runs[base]):.1f}"
                         for where in ("id", "ood")]
        assert cells == expected
    called = {"Random-2": "random_2", "two likeliest": "likelihood"}
    shown = first_table(text[text.index("| points, with"):])
    for pair, cells in shown.items():
        better, worse = (called.get(name, name) for name in pair.split(" over "))
        groups, sound = [[] for _ in ("test", *TESTBEDS)], []      # [split][base], [base]
        for base, some in runs.items():
            if base == "0" and {better, worse} & set(called.values()):
                some = of_table_2
            some = [(run[better], run[worse]) for run in some if {better, worse} <= run.keys()]
            for group, split in zip(groups, ("test", *TESTBEDS)):
                gains = [correct_in(a["graded"][split]) - correct_in(b["graded"][split])
                         for a, b in some]
                group.append(np.mean(gains, axis=0))               # (questions,)
            sound.append(mean(sound_accuracy(a) - sound_accuracy(b) for a, b in some))
        test, *beds = map(np.array, groups)                        # (bases, questions)
        assert cells == [
            points((test.mean(), *run_intervals([test]))),
            ", ".join(f"{100 * gain:+.1f}" for gain in test.mean(axis=1)),
            points((np.mean(beds), *run_intervals(beds))), over_seeds(sound),
            ", ".join(f"{100 * gain:+.1f}" for gain in sound)]
    levels = {base: mean(run[MINE]["id"]["all"] for run in some) for base, some in runs.items()}
    within = [np.var([run[MINE]["id"]["all"] for run in some], ddof=1)
              for base, some in runs.items() if base != "0"]
    over_bases = np.std(list(levels.values()), ddof=1)
    assert (f"over runs of a base is {100 * mean(within) ** 0.5:.1f} points, over bases "
            f"{100 * over_bases:.1f}.") in text
    lost = [100 * (levels["0"] - level) for base, level in levels.items() if base != "0"]
    assert f"ends {min(lost):.0f} to {max(lost):.0f} points lower" in text
    assert f"(M-STaR {min(lost):.0f} to {max(lost):.0f} points)" in READMES[0].read_text()

def test_what_few_questions_do_is_what_was_measured():
    result = read_json(RESULTS / "few-dynamics.json")
    text = READMES[1].read_text()
    accuracies = {}                                                # arm -> in domain, of each seed
    for arm in result["arms"]:
        accuracies.setdefault(arm["arm"], []).append(arm["row"]["id"]["all"])
    for other in ("prm_watched", "mstar_pass_at_k"):
        gains = np.subtract(accuracies["mstar_watched"], accuracies[other])
        assert f"{from_to(gains[:, None])[5:]}" in text
    rises = []                                                     # of T, from first to last rounds
    for arm in result["arms"]:
        if arm["arm"] == "mstar_watched":
            swept = [line["temperature"] for line in arm["iterations"][1:]]    # 0: before any sweep
            rises.append(mean(swept[-4:]) - mean(swept[:4]))
    assert len(rises) == 8
    half = 2.365 * np.std(rises, ddof=1) / len(rises) ** 0.5       # Student's t, 7 degrees
    rise = mean(rises)
    assert f"{rise:+.2f} [{rise - half:+.2f}, {rise + half:+.2f}]" in text

@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_and_verdicts_are_those_of_the_committed_results(path):
    lines = format_table(read_json(path)).splitlines()
    text = READMES[1].read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) > 6
    assert not [line for line in lines if line not in text]

def test_pictures_are_those_of_the_committed_results(tmp_path):
    for name, curves_of in (("cpu-main", curves_of_main), ("few-dynamics", curves_of_dynamics)):
        curves = curves_of(read_json(RESULTS / f"{name}.json")["arms"])
        write_picture(tmp_path / "new.svg", curves)
        assert (tmp_path / "new.svg").read_bytes() == (RESULTS / f"{name}.svg").read_bytes()
        if name == "cpu-main":                                     # its words in README.md
            accuracy, unsound = curves.values()
            arms = ("continuous", "+ PRM re-rank", MINE)
            ends = [f"{series[arm][-1][1]:.0f}" for series in (accuracy, unsound) for arm in arms]
            first = [f"{series[MINE][0][1]:.0f}" for series in (accuracy, unsound)]
            words = ("from {} to {} % with continuous, to {} with + PRM re-rank and {} with "
                     "M-STaR; of the correct samples, {} % are unsound at first, and {}, {} and "
                     "{} % at the end").format(first[0], *ends[:3], first[1], *ends[3:])
            assert words in READMES[0].read_text()

def test_verdicts_on_the_paper_s_claims_are_those_of_the_committed_results():
    verdicts = {}                                                  # (file, words) -> verdict
    for path in TABLES:
        for claim in read_json(path)["claims"]:
            verdicts[path.stem, claim["words"].partition(":")[0]] = claim["verdict"]
    verdicts["sixteen runs", "T by Reward-Pass@2 beats T = 1"] = verdict([gain_of_temperature()])[0]
    # what each row of the table rests on, in its order
    rests_on = [["table1", "going on"], ["table1", "keeping"], ["table1", "an interval"],
                ["table1", "6.25 %"],
                ["main", "Top-2 beats all"], ["table2", "Top-2 beats all"],
                ["table2", "Top-2 beats Top-1"],
                ["main", "best-of-16"], ["main", "and yet"], ["main", "the Top-2 have"],
                ["table3", "unlabeled"], ["table3", "with true"],
                ["few", "pass@k falls"], ["few", "pass@k changes"], ["few", "greedy", "the gap"],
                ["few", "Reward-Pass@2 saturates"], ["sixteen", "T by Reward-Pass@2 beats T ="],
                ["table4", "T by Reward-Pass@2 beats T by"], ["main", "M-STaR beats pi_0"],
                ["table5", "M-STaR beats pi_0"], ["table5", "the smallest"]]
    text = READMES[1].read_text()
    lines = text[text.index("## The claims of the paper"):].split("\n\n")[2].splitlines()[2:]
    for line, (file, *beginnings) in zip(lines, rests_on, strict=True):
        for words in beginnings:
            (said,) = [said for (stem, claim), said in verdicts.items()
                       if file in stem and claim.startswith(words)]
            there = " there" if (file, said) == ("few", "holds") else ""   # a setting chosen for it
            assert line.endswith(f"| {said}{there} |"), line

def test_the_prm_against_the_oracle_is_what_was_measured():
    text = READMES[1].read_text()
    shown = first_table(text[text.index("## The PRM against the oracle"):])
    names = ("greedy", "majority_of_16", "weighted_vote_of_16", "best_of_16", "likeliest_of_16",
             "unsound_all", "unsound_top_2", "unsound_likely_2", "auc_reward", "auc_likelihood")
    for seed, cells in enumerate(shown.values()):
        measured = read_json(RESULTS / f"cpu-audit-seed{seed}.json")["mean"]
        assert cells == [f"{100 * measured[name]:.1f}" for name in names]
    assert len(shown) == len(MAIN["seeds"])

def test_every_table_of_the_paper_has_a_result():
    names = {path.stem for path in TABLES}
    assert names == {"few-dynamics", "cpu-main", *(f"cpu-table{number}" for number in range(1, 6))}

# ---------------------------------------------------------------- what the texts point to

def test_the_readme_is_short_and_names_every_module():
    text = READMES[0].read_text()
    assert len(text.splitlines()) <= 130
    assert not [path.name for path in ROOT.glob("*.py") if path.name not in text]

@pytest.mark.parametrize("readme", READMES, ids=("top", "results"))
def test_links_pictures_and_files_are_there(readme):
    text = readme.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    headings = [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-")
                for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    for link in links:
        file, _, heading = link.partition("#")
        assert (readme.parent / file).exists(), link
        assert file or heading in headings, link
    named = re.findall(r"results/[\w.*?-]+\.json", text)
    named = [name for name in named if "PRESET" not in name]       # of a run to come
    # a pattern names at least one file
    assert named and not [name for name in named if not list(ROOT.glob(name))]
