"""
results/tables.py: the main job on several seeds, the paper's tables and figures, and verdicts.

A table's arms start from one base, pi_0 and PRM per seed, with equal responses and updates. A
claim names effects that should be positive, paired by question, with 95 % intervals. It `holds` if
all lie above -margin, `fails` if one lies below it at a level corrected for their number, and is
else `unresolved`: often too few seeds, not that nothing is there.
Read:     TABLES, CLAIMS -> run_table -> claims_of -> verdict -> format_table
Run:      python -m results.tables main|table1|...|table5|dynamics [--seeds 3] [flags]
"""
import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np

import mstar
from data import TASKS, TESTBEDS
from evaluate import columns_of, correct_in, one_line_errors
from model import read_json, run_command, write_json
from results.report import write_picture

# The rows of each table: arm -> its words and the paper's numbers (ID, OOD, in Table 4 also by
# task; in Table 5 the mean over benchmarks, by size). Its claims: pairs of arms of which the first
# should be better, by no less than -margin; `claims_of` adds those that are not about two arms.
PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
TABLES, CLAIMS = PAPER["tables"], PAPER["claims"]
SIZES = {"small": "-small", "medium": "", "large": "-large"}       # of Table 5: names of bases

# ---------------------------------------------------------------- running a table

def main(argv=None):
    """Run a table's arms for each seed (and size); write and print the table and its verdicts."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog="And all flags of mstar.py.")
    fail = partial(mstar.fail, program="results.tables")
    parser.error = fail
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    typed, flags = parser.parse_known_args(argv)
    name, seeds = typed.table, typed.seeds
    if seeds < 1:
        fail(f"--seeds {seeds}: must be at least 1")
    for flag in ("resume", "arms", "method", "seed", *mstar.SWITCHES):
        if any(one.split("=")[0] == f"--{flag}" for one in flags):
            fail(f"{name} sets --{flag} itself, leave it out")
    arms = ",".join(arm for arm in TABLES[name] if arm not in ("base", "pi_0"))
    cfg, _ = mstar.parse([*flags, "--arms", arms])
    if name == "dynamics" and min(cfg.rollouts_per_question, cfg.monitor_rollouts) < 2:
        fail("dynamics: Reward-Pass@2 needs 2 --rollouts_per_question and --monitor_rollouts")
    for suffix in SIZES.values() if name == "table5" else ():
        mstar.check(of_size(cfg, suffix))
    file = Path(f"results/{cfg.preset}-{name}.json")
    with one_line_errors("results.tables", "move it away", ValueError):
        before = read_json(file) if file.exists() else None
    with one_line_errors("results.tables", "what was saved is whole, the same command goes on"):
        command = " ".join(["python -m results.tables", *argv])
        return run_table(name, cfg, seeds, command, file, before)

def run_table(name, cfg, seeds, command, file, before):
    """Each seed has a folder, in which pi_0, PRM and finished arms stay. Writes the table to
    `file`, or beside these folders with --out, or where `file` holds (`before`) more seeds or other
    settings. Returns it."""
    folder, reports = Path(cfg.out or f"runs/{cfg.preset}-tables"), []
    for size, suffix in SIZES.items() if name == "table5" else [("medium", "")]:
        for seed in range(seeds):
            out = folder / f"seed{seed}{suffix}"
            out.mkdir(parents=True, exist_ok=True)
            sized = replace(of_size(cfg, suffix), seed=seed, out=str(out))
            reports.append({**mstar.run_stages(sized, out, command, "tables"), "size": size})
    result = make_table(name, reports, command)
    before = before or result
    if cfg.out or len(before["seeds"]) > seeds or settings(before) != settings(result):
        file = folder / file.name
    file.parent.mkdir(exist_ok=True)
    write_json(file, result)
    if name == "main":
        write_picture(file.with_suffix(".svg"), curves_of_main(result["arms"]))
    if name == "dynamics":
        write_picture(file.with_suffix(".svg"), curves_of_dynamics(result["arms"]))
    print(f"{format_table(result)}\n\nwrote {file}")
    return result

def settings(result):
    """The configuration of a table, but for what differs from seed to seed and arm to arm."""
    free = ("seed", "out", "arms", "method", *mstar.SWITCHES)
    return {name: value for name, value in result["config"].items() if name not in free}

def of_size(cfg, suffix):
    """The Config with a base of another size, weights/base-small.safetensors or from scratch."""
    if cfg.policy == "scratch":
        return replace(cfg, recipe=cfg.recipe + suffix)
    path = Path(cfg.policy)                                        # a file, or a folder
    return replace(cfg, policy=str(path.with_name(path.stem + suffix + path.suffix)))

def make_table(name, reports, command):
    """Everything that a table of the paper and the verdicts on its claims are made from. reports:
    mstar's, one per size and seed. Returns a dict of plain numbers and texts."""
    arms = []
    for report in reports:
        for arm, about in TABLES[name].items():
            paper = [about["paper"][report["size"]]] if name == "table5" else about["paper"]
            row_name = mstar.ROW_NAMES.get(arm, arm)
            row = next(row for row in report["rows"] if row["name"] == row_name)
            lines = [line for line in report["iterations"] if line["arm"] == arm]
            warmup = 0 if arm in ("base", "pi_0", "sft") else report["updates"]["pi_0"]
            arms.append({"arm": arm, "words": about["words"], "size": report["size"],
                         "seed": report["seed"], "row": row, "paper": paper,
                         "iterations": lines, "updates": warmup + report["updates"].get(arm, 0),
                         "responses": sum(line.get("num_responses", 0) for line in lines)})
    claims = []
    for number, words, effects, margin in claims_of(name, arms, reports):
        said, numbers = verdict(list(effects.values()), margin)
        sizes = [np.hstack(groups).shape[1] for groups in effects.values()]
        claims.append({"claim": number, "words": words, "verdict": said, "margin": margin,
                       "seeds": len({report["seed"] for report in reports}),
                       "questions": sorted({min(sizes), max(sizes)}),
                       "effects": dict(zip(effects, numbers))})
    for line in chain.from_iterable(arm["iterations"] for arm in arms):
        if name != "dynamics":                                     # no figure needs the questions
            line.pop("by_question", None)
        if name not in ("dynamics", "main"):
            line.pop("sweep", None)
    about = {key: reports[0][key] for key in ("device", "versions", "config")}
    return {"table": name, "command": command, **about, "claims": claims, "arms": arms,
            "seeds": sorted({report["seed"] for report in reports}),
            "minutes": sum(report["seconds"] for report in reports) / 60}

# ---------------------------------------------------------------- claims

def claims_of(name, arms, reports):
    """The claims of a table: [(number, words, {effect: groups}, margin)], for `verdict`."""
    rows, called = defaultdict(list), {arm["arm"]: arm["words"] for arm in arms}
    for arm in arms:
        rows[arm["size"], arm["arm"]].append(arm["row"])

    def gain(better, worse, split="test", size="medium"):          # (runs, questions)
        return np.array([correct_in(a["graded"][split]) - correct_in(b["graded"][split])
                         for a, b in zip(rows[size, better], rows[size, worse])])

    claims = []
    for claim in CLAIMS.get(name, []):
        effects = {f"{called[a]} over {called[b]}": [gain(a, b)] for a, b in claim["pairs"]}
        claims.append((claim["claim"], claim["words"], effects, claim["margin"]))
    if name in ("main", "table4", "table5"):
        size = "large" if name == "table5" else "medium"
        tasks = np.array(reports[0]["tasks"].split())              # of each test question
        row = arms[0]["row"]
        effects = {task: [gain("mstar", "pi_0", size=size)[:, tasks == task]]
                   for task in TASKS if task in row["id"]}
        beds = [split for split in row["graded"] if split != "test"]
        effects |= {bed: [gain("mstar", "pi_0", bed, size)] for bed in beds}
        words = f"M-STaR beats pi_0 in every task type and testbed ({size} policy)"
        claims.append(("C10", words, effects, 0.0))
    if name == "table5":
        effects = {}
        for size in ("medium", "large") if beds else ():
            more = [gain("mstar", "pi_0", bed, size) - gain("mstar", "pi_0", bed, "small")
                    for bed in beds]
            effects[f"gain of {size} over gain of small"] = more
        claims.append(("C10", "the smallest policy gains least out of domain", effects, 0.0))
    if name == "main":                                             # and Figure 2, from the audits
        claims += figure_2_claims([report["audit"] for report in reports])
    if name == "dynamics":
        fixed = [arm["iterations"] for arm in arms if arm["arm"] == "prm_watched"]
        adaptive = [arm["iterations"] for arm in arms if arm["arm"] == "mstar_watched"]
        claims += [*dynamics_claims(fixed), figure_5_claim(fixed, adaptive)]
    return [claim for claim in claims if claim[2]]                 # something is known about them

def numbers_in(text):
    """The numbers of each question as an array; "-" is nan."""
    return np.array([float(v) if v != "-" else math.nan for v in text.split()])

def figure_2_claims(audits):
    """C5 and C6, from each run's numbers by question."""
    of = {}                                                        # name -> (runs, questions)
    for name in audits[0]:
        of[name] = np.array([numbers_in(audit[name]) for audit in audits])
    majority = of["majority_of_16"]
    votes = {"majority voting over best-of-16": [majority - of["best_of_16"]],
             "majority voting over weighted voting": [majority - of["weighted_vote_of_16"]]}
    # nan, where no response is correct or nobody knows, counts as 0
    unsound = of["unsound_all"] - of["unsound_top_2"]
    known = {} if np.isnan(unsound).all() else {"all over Top-2": [np.nan_to_num(unsound)]}
    steps = [np.nan_to_num(of["steps_all"] - of["steps_top_2"])]
    return [("C5", "best-of-16 and weighted voting by the PRM do not beat majority voting (by more "
             "than a point)", votes, 0.01),
            ("C5", "and yet it re-ranks well: fewer of the Top-2 than of all correct responses are "
             "unsound (share, per question)", known, 0.0),
            ("C6", "the Top-2 have fewer steps than all correct responses (steps, per question)",
             {"all over Top-2": steps}, 0.0)]

def dynamics_claims(runs):
    """C8, of runs (lists of iterations) of one arm that was watched at every temperature."""
    def values(line):
        numbers = {name: numbers_in(text) for name, text in line["by_question"].items()}
        return {"greedy": numbers["greedy"], "pass@k": 1.0 * (numbers["num_correct"] > 0),
                "reward": numbers["reward_pass_at_2"],
                **{t: numbers_in(line["watched"]["any_correct"][t]) for t in ("0.5", "1.5")}}

    rounds = [list(map(values, same)) for same in watched(runs)]   # [round][run]

    def at(place):                                                 # {name: (runs, questions)}
        return {name: np.array(list(map(itemgetter(name), rounds[place]))) for name in rounds[0][0]}

    n, first, last = len(rounds), at(0), at(-1)
    middle = (at((n - 1) // 2)["reward"] + at(n // 2)["reward"]) / 2   # of an even number, between
    rise = {name: last[name] - first[name] for name in first}
    effects = {"greedy accuracy rises": rise["greedy"],
               "pass@k falls": -rise["pass@k"],
               "the gap between them shrinks": rise["greedy"] - rise["pass@k"],
               "Reward-Pass@2 saturates: its first half gains more than its second":
                   2 * middle - first["reward"] - last["reward"],
               "pass@k changes for the better at T = 1.5, compared with 0.5 (the paper: it falls "
               "more slowly)": rise["1.5"] - rise["0.5"]}
    return [("C8", words, {"effect": [effect]}, 0.0) for words, effect in effects.items()]

def figure_5_claim(fixed, adaptive):
    """C9 on validation questions, on which T is chosen, of two arms' runs (lists of iterations)."""
    def curves(lines):                                             # (2, questions)
        numbers = [line["by_question"] for line in lines[1:] if "by_question" in line]
        any_correct = [numbers_in(one["num_correct"]) > 0 for one in numbers]
        reward = [numbers_in(one["reward_pass_at_2"]) for one in numbers]
        return np.mean(any_correct, axis=0), np.mean(reward, axis=0)

    higher = [np.subtract(curves(a), curves(b)) for a, b in zip(adaptive, fixed)]
    passes, rewards = np.swapaxes(higher, 0, 1)                    # (runs, questions) each
    words = ("Pass@K and Reward-Pass@2 stay higher with an adaptive T than with T = 1 (Figure 5, "
             "means over iterations)")
    return "C9", words, {"Pass@K": [passes], "Reward-Pass@2": [rewards]}, 0.0

# ---------------------------------------------------------------- intervals over questions and runs

def run_intervals(groups, levels=(0.95,), draws=4000):
    """[low, high] of the mean of group means, one after the other for several levels. A group is an
    array (runs, questions), the same questions in each run.

    Questions are resampled. Runs, by seed, are too few for that: of two, resampling gives one alone
    half of the time. So to each draw the luck of the runs is added, 100 times (the tails of few
    runs need so many): a Student t number times the standard error of the runs' own means. With one
    run it is unknown and left out."""
    rng, runs, means = np.random.default_rng(0), len(groups[0]), []
    if runs > 1:
        run_means = np.mean([values.mean(axis=1) for values in groups], axis=0)
        error = float(run_means.std(ddof=1)) / math.sqrt(runs)
        # Runs answer single questions differently. That is in the resampled questions, and once
        # more in the spread of the runs' means, so it is taken off there, but not more than a
        # quarter: of few runs this is known badly. (On made-up tables without a gain, 1 to 5 % of
        # the intervals leave out 0, the more the more runs differ: cpu-power.json.)
        twice = 0.0
        for values in groups:
            if (n := values.shape[1]) > 1:
                of_runs = values.mean(axis=1, keepdims=True) - values.mean()       # their effects
                rest = values - of_runs - values.mean(axis=0)      # without those of questions, too
                twice += float((rest ** 2).sum()) / ((runs - 1) * (n - 1) * values.size)
        error = math.sqrt(max(error ** 2 - twice / len(groups) ** 2, error ** 2 * 0.75))
    for values in groups:
        picked = rng.integers(values.shape[1], size=(draws, values.shape[1]))
        means.append(values.mean(axis=0)[picked].mean(axis=1))     # (draws,)
    means = np.mean(means, axis=0)
    if runs > 1:
        means = np.repeat(means, 100) + error * rng.standard_t(runs - 1, 100 * draws)
    sides = [side for level in levels for side in (50 - 50 * level, 50 + 50 * level)]
    return np.percentile(means, sides).tolist()

def verdict(effects, margin=0.0):
    """Does a claim hold, all of whose effects (lists of groups) should be above -margin? Returns
    (holds, fails or unresolved, [[effect, low, high]])."""
    numbers, corrected = [], []
    for groups in effects:
        low, high, _, upper = run_intervals(groups, (0.95, 1 - 0.05 / len(effects)))
        numbers.append([float(np.mean([values.mean() for values in groups])), low, high])
        corrected.append(upper)                                    # Bonferroni
    if all(low > -margin for _, low, _ in numbers):
        return "holds", numbers
    return "fails" if any(upper < -margin for upper in corrected) else "unresolved", numbers

# ---------------------------------------------------------------- as text, and the figures

def markdown(head, rows):
    """A Markdown table as lines, and an empty one."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]

def format_table(result):
    """A table as Markdown, beside the paper's numbers; curves of the dynamics; verdicts last."""
    name, groups, seeds = result["table"], defaultdict(list), len(result["seeds"])
    for arm in result["arms"]:
        groups[arm["size"], arm["arm"]].append(arm)
    shown = {"main": ("ID", *TASKS, *TESTBEDS, "OOD"), "table4": ("ID", *TASKS, "OOD"),
             "table5": (*TESTBEDS, "OOD")}.get(name, ("ID", "OOD"))
    columns = [column for column in columns_of(result["arms"][0]["row"]) if column in shown]
    has_oracle = all(arm["row"].get("unsound") is not None for arm in result["arms"])
    theirs = ["average"] if name == "table5" else ["ID", "OOD", *TASKS]
    theirs = [f"paper: {column}" for column in theirs[:len(result["arms"][0]["paper"])]]
    rows = []
    for (size, _), arms in groups.items():
        ours = [mean_percent(arms, lambda arm: columns_of(arm["row"])[one]) for one in columns]
        if has_oracle:
            ours.append(mean_percent(arms, lambda arm: sound_accuracy(arm["row"])))
        rows.append([f"{size}: " * (name == "table5") + arms[0]["words"],
                     *map("{:.1f}".format, ours), *arms[0]["paper"],
                     f"{arms[0]['responses']:,}", f"{arms[0]['updates']:,}"])
    ours = [*columns, *["ID, sound"] * has_oracle]
    lines = markdown([f"{name}, %", *ours, *theirs, "responses", "updates"], rows)
    for arms in groups.values() if name == "dynamics" else ():
        k, rows = arms[0]["iterations"][0]["k"], []
        for same in watched(arm["iterations"] for arm in arms):    # one look, of each seed
            curves = [f"{mean_percent(same, get):.1f}" for get in FIGURES.values()]
            temperatures = ", ".join(str(line["temperature"]) for line in same)
            rows.append([f"iteration {same[0]['iteration']}", *curves, temperatures])
        if not rows:                                               # it was not watched
            continue
        head = [title.replace("@k", f"@{k}") for title in FIGURES]
        lines += markdown([f"{arms[0]['words']}, validation, %", *head, "T"], rows)
    lines += [f"`{result['command']}`: {seeds} seed{'s' * (seeds > 1)}, {result['minutes']:.0f} "
              f"minutes on {result['device']}.", ""]
    rows = []
    for claim in result["claims"]:
        form, unit = ("{:+.3f} [{:+.3f}, {:+.3f}] steps", 1) if claim["claim"] == "C6" else \
            ("{:+.1f} [{:+.1f}, {:+.1f}]", 100)
        effects = "; ".join(f"{words} {form.format(*(unit * np.array(numbers)))}"
                            for words, numbers in claim["effects"].items())
        one_seed = claim["seeds"] == 1 and claim["verdict"] != "unresolved"
        rows.append([f"{claim['claim']}: {claim['words']}",
                     claim["verdict"] + ", on one seed" * one_seed,
                     f"{effects} (questions: {' to '.join(map(str, claim['questions']))})"])
    head = f"effects in points, with 95 % intervals over questions{' and seeds' * (seeds > 1)}"
    lines += markdown(["claim", "verdict", head], rows)
    return "\n".join(lines[:-1])

FIGURES = {"greedy": lambda line: line["greedy_accuracy"],         # curves, of metrics.jsonl
           **{f"pass@k, T = {t}": lambda line, t=t: line["watched"]["surface"][t]["pass_at_k"]
              for t in ("0.5", "1.0", "1.5")},
           "Reward-Pass@2": lambda line: line["reward_pass_at_2"]}

def sound_accuracy(row):
    """The share of the test questions that are answered correctly, by a sound text: `sound` of a
    row's `id`, worked out here since older rows do not have it."""
    return row["id"]["all"] * (1 - row["unsound"])

def watched(runs):
    """The iterations after which all temperatures were measured: each one of all runs together."""
    return list(zip(*(filter(lambda line: "watched" in line, lines) for lines in runs)))

def mean_percent(things, get):
    """The mean of get(thing), in percent."""
    return 100 * float(np.mean(list(map(get, things))))

def curves_of_main(arms):
    """Greedy accuracy, and what is unsound (known to an oracle only), of validation questions,
    means over seeds: {title: {name: [(iteration, percent)]}}."""
    charts = defaultdict(partial(defaultdict, list))
    for key, title in (("greedy_accuracy", "Greedy accuracy, %"),
                       ("unsound", "Unsound, of the correct samples, %")):
        values = defaultdict(list)                                 # of each seed
        for arm in arms:
            for line in arm["iterations"]:
                if key in line:
                    values[arm["words"], line["iteration"]].append(100 * line[key])
        for name, iteration in sorted(values, key=itemgetter(1)):  # arms as they came
            charts[title][name].append((iteration, np.mean(values[name, iteration])))
    return charts

def curves_of_dynamics(arms):
    """The paper's Figures 3 to 5, of validation questions, means over seeds: {title: {name:
    [(iteration, value)]}}."""
    def curve(arm, get):
        runs = [one["iterations"] for one in arms if one["arm"] == arm]
        return [(same[0]["iteration"], mean_percent(same, get)) for same in watched(runs)]

    def both(get):
        return {"T = 1": curve("prm_watched", get), "adaptive T": curve("mstar_watched", get)}

    one = {title: curve("prm_watched", get) for title, get in FIGURES.items()}
    del one["Reward-Pass@2"]
    greedy, gaps = one.pop("greedy"), {}
    for title, line in one.items():
        gaps[title] = [(x, y - g) for (x, y), (_, g) in zip(line, greedy)]
    one["greedy"] = greedy                     # last: a temperature has one colour in both charts
    return {"Figures 3 and 4a: greedy and Pass@K, %": one,
            "Figure 4b: Pass@K minus greedy, points": gaps,
            "Figures 4c and 5: Reward-Pass@2, %": both(FIGURES["Reward-Pass@2"]),
            "Figure 5: Pass@K at the run's T, %": both(itemgetter("pass_at_k"))}

if __name__ == "__main__":
    run_command(main)
