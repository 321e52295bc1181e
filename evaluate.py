"""
evaluate.py: is an answer correct, how good is a policy, and how sure are we of it.

Paper (arXiv 2412.17451v3): the binary reward 1(a == a*) (section on the reward model), greedy
    accuracy, Pass@K and Reward-Pass@K (section on dynamics), the columns of its tables (in-domain
    test; MathVista's task types; out-of-domain benchmarks).
Read:     evaluate_policy -> grade_greedily -> grade -> the statistics -> compare   (top-down)
Departs:  the in-domain test carries the task columns (the paper gives them for MathVista); the
          out-of-domain columns are our five testbeds. Answers are numbers. Intervals are ours.
Run:      python evaluate.py runs/NAME               (score a saved policy again)
          python evaluate.py runs/A runs/B           (compare finished runs with the first)
"""
import argparse
import math
import re
import sys
from collections import defaultdict
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from data import TASKS, TESTBEDS, Tokenizer, build_world, render
from model import Prompt, Sampling, load_network, progress_bar, read_json, sample, write_json

COLUMNS = ("ID", *TASKS, *TESTBEDS, "OOD")

# ---------------------------------------------------------------- a row of the result table

def evaluate_policy(name, policy, world, max_new_tokens):
    """Greedy accuracy of a policy on the in-domain test, by task, and on every testbed: one row of
    the result table: {name, id: {all, FQA, ...}, ood: {style, ..., all} (the mean of the testbeds),
    unparseable, shuffled_images, ci95, graded}; accuracies in [0, 1].

    shuffled_images: accuracy when every question gets the picture of another one, which is what can
    be had without looking. ci95: id and ood as bootstrap intervals over questions. graded: a letter
    per question (c correct, w wrong, u unparseable), for paired comparisons."""
    test, graded = world["test"], {}                               # split -> letters
    for split in ("test", *TESTBEDS):
        grades = grade_greedily(policy, world[split], max_new_tokens, f"{name}: {split}")
        graded[split] = "".join(outcome[0] for outcome in grades)
    on_test = {"all": correct_in(graded["test"])}                  # column -> (questions,) 0 or 1
    for task in TASKS:
        on_test[task] = on_test["all"][[question.task == task for question in test]]  # a column
    on_bed = {bed: correct_in(graded[bed]) for bed in TESTBEDS}    # each (questions,)
    ood, ood_ci95 = accuracies(on_bed)
    ood["all"], ood_ci95["all"] = float(np.mean(list(ood.values()))), interval(*on_bed.values())
    id, id_ci95 = accuracies(on_test)
    # in a random circle of questions, everyone takes the picture of the one before
    circle = np.random.default_rng(0).permutation(len(test))
    before = np.empty(len(test), int)                              # whose picture everyone takes
    before[circle] = np.roll(circle, 1)
    shuffled = grade_greedily(policy, test, max_new_tokens, f"{name}: shuffled images",
                              pictured=[test[i] for i in before])
    return {"name": name, "id": id, "ood": ood, "ci95": {"id": id_ci95, "ood": ood_ci95},
            "unparseable": graded["test"].count("u") / len(test),
            "shuffled_images": shuffled.count("correct") / len(test), "graded": graded}

def correct_in(letters):
    """(questions,) 1.0 where the answer is correct, from the letters of a row's `graded`."""
    return np.array([letter == "c" for letter in letters], float)

def accuracies(columns):
    """{column: (questions,) 0 or 1} -> ({column: accuracy}, {column: interval})."""
    return ({column: float(values.mean()) for column, values in columns.items()},
            {column: interval(values) for column, values in columns.items()})

def make_prompts(policy, questions, with_answer=False, pictured=None):
    """Prompts of questions: the picture and the question, and with `with_answer` the gold answer
    (the paper's warm-up). `pictured`: take the pictures of these questions instead."""
    prompts = []
    for question, with_picture in zip(questions, pictured or questions):
        image = torch.from_numpy(render(with_picture, policy.config.image_size))
        answer = question.answer if with_answer else None          # gold, in the prompt
        prompts.append(Prompt(image, policy.tokenizer.prompt(question.text, answer)))
    return prompts

def sample_texts(policy, prompts, how, title, prefixes=None):
    """`model.sample` behind a progress bar. Returns (texts, responses), both
    [question][rollout]."""
    number = sum(map(len, prefixes)) if prefixes else len(prompts)  # to continue
    with progress_bar(how.rollouts * number, title, " responses") as bar:
        responses = sample(policy, prompts, how, prefixes, progress=bar.update)
    return [list(map(policy.tokenizer.decode, group)) for group in tokens_of(responses)], responses

def tokens_of(responses):
    """[question][rollout] of Response -> the same of token lists."""
    return [[response.tokens for response in group] for group in responses]

def grade_greedily(policy, questions, max_new_tokens, title, pictured=None):
    """Grades of the greedy responses to questions."""
    prompts = make_prompts(policy, questions, pictured=pictured)
    texts, _ = sample_texts(policy, prompts, Sampling(1, 0.0, max_new_tokens, seed=0), title)  # T 0
    return [grade(text, question.answer) for (text,), question in zip(texts, questions)]

NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
ANSWER_AT_END = re.compile(rf"answer:[ \t]*({NUMBER})[ \t]*\.?\s*\Z")

def grade(text, gold):
    """Binary reward 1(a == a*), with a third outcome: "correct", "wrong" or "unparseable", which is
    counted apart everywhere. Answers are compared by value: 7, 7.0 and 07 agree."""
    answer = find_answer(text)
    if answer is None:                                             # is counted apart
        return "unparseable"
    return "correct" if answer == Fraction(gold) else "wrong"      # 1(a == a*)

def find_answer(text):
    """The number after the last "answer:", after which nothing may follow, as a Fraction; None if
    there is no such number."""
    match = ANSWER_AT_END.search(text)                             # at the end, so it is the last
    return Fraction(match[1]) if match else None

# ---------------------------------------------------------------- statistics

def pass_at_k(n, c, k):
    """Chance that k responses drawn from n without replacement hold at least one of the c correct
    ones: the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)               # 1 - C(n-c, k) / C(n, k)

def reward_pass_at_k(correct, rewards, k):
    """The paper's Reward-Pass@K of one question: is a correct response among the k that the reward
    ranks highest, out of all n responses, correct or wrong. Where equal rewards straddle rank k,
    each order of them is equally likely, and the value is the chance of a correct one.
    correct: n bools, rewards: n numbers -> a float in [0, 1]."""
    if not 1 <= k <= len(rewards):
        raise ValueError(f"reward_pass_at_k needs 1 <= k <= n, got n={len(rewards)}, k={k}")
    edge = sorted(rewards, reverse=True)[k - 1]                    # the reward at rank k
    above = [c for c, reward in zip(correct, rewards) if reward > edge]  # surely among the k
    tied = [c for c, reward in zip(correct, rewards) if reward == edge]  # some of them are
    return 1.0 if any(above) else pass_at_k(len(tied), sum(tied), k - len(above))

def auc(good, scores, groups=None):
    """Area under the ROC curve: the chance that a good one scores above a bad one, ties counting
    half (Mann-Whitney). good: n bools, scores: n numbers. groups: n labels; then only pairs within
    a group are compared. None without a pair."""
    members = defaultdict(list)
    for i, label in enumerate(groups or [""] * len(good)):
        members[label].append(i)                                   # who is compared with whom
    good, scores = np.asarray(good, bool), np.asarray(scores, float)
    won = pairs = 0.0
    for indices in members.values():
        is_good = good[indices]
        _, rank, times = np.unique(scores[indices], return_inverse=True, return_counts=True)
        mean_rank = (times.cumsum() - (times - 1) / 2)[rank]       # 1 .. n; equal scores share it
        n, m = int(is_good.sum()), int((~is_good).sum())
        won += mean_rank[is_good].sum() - n * (n + 1) / 2
        pairs += n * m                                             # good ones times bad ones
    return float(won / pairs) if pairs else None

def interval(*groups, draws=2000):
    """95 % interval [low, high] of the mean of group means, by bootstrap: the questions of each
    group (questions,) are resampled. Of one policy's 0s and 1s: its accuracy. Of the differences of
    two policies on the same questions: a paired comparison. It is about these policies only; the
    luck of a run is in results/tables.py, which sees several."""
    rng, means = np.random.default_rng(0), []
    for values in groups:
        picked = rng.integers(len(values), size=(draws, len(values)))  # with replacement
        means.append(np.asarray(values, float)[picked].mean(axis=1))  # (draws,)
    return np.percentile(np.mean(means, axis=0), [2.5, 97.5]).tolist()  # of the group means

def paired_gain(row, other):
    """How much a row of the result table beats another on the same questions: {id: [gain, low,
    high], ood: [gain, low, high]}, in shares of 1."""
    gains = {}
    for key, splits in (("id", ["test"]), ("ood", TESTBEDS)):
        groups = [correct_in(row["graded"][split]) - correct_in(other["graded"][split])
                  for split in splits]
        gains[key] = [float(np.mean([values.mean() for values in groups])), *interval(*groups)]
    return gains

# ---------------------------------------------------------------- results as text

def columns_of(row):
    """{column: value} of a row of the result table, or of its intervals (row["ci95"])."""
    values = {"ID": row["id"]["all"], "OOD": row["ood"]["all"]} | row["id"] | row["ood"]
    return {column: values[column] for column in COLUMNS}

def percent(part, whole=1):
    """"12.3 %", or a dash where there is nothing to take a share of."""
    return f"{100 * part / whole:.1f} %" if whole and part is not None else "-"

def points(gain):
    """"+1.2 points [+0.3, +2.1]" of (gain, low, high)."""
    gain, low, high = (100 * number for number in gain)
    return f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}]"

def format_table(rows):
    """The result table as text: the paper's columns, accuracies in percent."""
    width = max(len(row["name"]) for row in rows)                  # of the first column
    lines = [" " * width + "".join(f"{column:>9}" for column in COLUMNS)]
    for row in rows:
        cells = "".join(f"{100 * value:>9.1f}" for value in columns_of(row).values())
        lines.append(f"{row['name']:<{width}}{cells}")
    return "\n".join(lines)

@contextmanager
def one_line_errors(program, advice, *bad_input):
    """One line on stderr instead of a traceback for what stops a program from outside: Ctrl-C
    (status 130), a full disk or a missing file, memory (status 2), a loss that is not finite
    (status 1); and for errors of the kinds `bad_input`, where what a file holds may raise them."""
    try:
        yield
        return
    except KeyboardInterrupt:                                      # Ctrl-C
        line, status = "stopped", 130
    except torch.OutOfMemoryError:                                 # a smaller part needs less
        line, status = "out of memory: begin again with a smaller --micro_batch", 2
    except FloatingPointError as error:                            # names the update
        line, status = str(error), 1
    except (OSError, *bad_input) as error:                         # a disk, or a file
        line, status = f"{type(error).__name__}: {error}", 2
    print(f"{program}: {line}; {advice}", file=sys.stderr)
    sys.exit(status)

# ---------------------------------------------------------------- command line

def compare(folders):
    """The main rows of finished runs on the same questions, the first of them first, and the paired
    gains of the others over it: (rows, {name: gain}). ValueError if they cannot be compared."""
    rows, runs = [], []
    for folder in folders:
        report = read_json(Path(folder) / "report.json")
        config = {**report["config"], "out": ""}                   # wherever the run lies
        for name in ("world_seed", "validation", "test", "testbed"):   # the tests depend on them
            if runs and config[name] != runs[0][0][name]:
                raise ValueError(f"the runs have different --{name}: they cannot be paired")
        row = next(row for row in report["rows"] if row["name"] == report["mine"])
        run = config, row["graded"]                                # equal flags may be other code
        if run in runs:
            raise ValueError(f"{folder} is the run {folders[runs.index(run)]} once more")
        runs.append(run)
        rows.append({**row, "name": f"{folder}: {row['name']}"})
    return rows, {row["name"]: paired_gain(row, rows[0]) for row in rows[1:]}

def main(argv=None):
    """Command line of this file: score the policy of a run again, or compare finished runs."""
    parser = argparse.ArgumentParser(description="Score a saved policy again, or compare runs.")
    parser.add_argument("runs", metavar="runs/NAME", nargs="+", help="one run, or several")
    parser.error = lambda message: parser.exit(2, f"evaluate.py: {message}; see --help\n")
    folders = parser.parse_args(argv).runs
    bad_input = ValueError, KeyError, TypeError
    with one_line_errors("evaluate.py", f"{' '.join(folders)}: not what runs leave", *bad_input):
        if len(folders) > 1:
            rows, gains = compare(folders)
            comparison = {"rows": rows, "gain_over_first": gains}
            write_json(Path(folders[0]) / "comparison.json", comparison)
        else:
            config = read_json(Path(folders[0]) / "config.json")
            policy = load_network(Path(folders[0]) / "policy.safetensors", Tokenizer())
    if len(folders) == 1:
        with one_line_errors("evaluate.py", "nothing is lost"):
            world = build_world(config["splits"], config["world_seed"])
            rows = [evaluate_policy(folders[0], policy, world, config["max_new_tokens"])]
    print(format_table(rows))
    if len(folders) == 1:
        accuracy, ci95 = rows[0]["id"]["all"], rows[0]["ci95"]["id"]["all"]
        print(f"in-domain accuracy {percent(accuracy)} [{percent(ci95[0])}, {percent(ci95[1])}]")
        return
    for name, gain in gains.items():
        print(f"{name} over {rows[0]['name']}: {points(gain['ood'])} out of domain, "
              f"{points(gain['id'])} in domain")

if __name__ == "__main__":
    main(sys.argv[1:])
