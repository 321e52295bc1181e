"""
evaluate.py: is an answer right, how good is a policy, and how sure are we of it.

Paper (arXiv 2412.17451v3): the binary reward 1(a == a*) (section on the reward model), greedy accuracy and Pass@K (section
    on dynamics), the columns of its tables (in-domain test; MathVista's task types; out-of-domain benchmarks).
Read:     evaluate_policy -> grade_greedily -> grade, the statistics (verdict), make_experiment, write_html   (top-down)
Departs:  the in-domain test carries the task columns (the paper gives them for MathVista); the out-of-domain columns are
          our five testbeds. Answers are numbers. Intervals and verdicts are ours: the paper gives none. TABLES holds its numbers.
Run:      python evaluate.py runs/NAME               (score a saved policy again)
          python evaluate.py runs/NAME --report      (make report.html again)
          python evaluate.py runs/A runs/B           (compare)
"""
import argparse
import base64
import hashlib
import io
import json
import math
import re
import sys
import time
from collections import Counter
from fractions import Fraction
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import TASKS, TESTBEDS, Tokenizer, build_world, render
from model import Prompt, load_policy, load_tensors, sample, write_json, write_whole

MISSHAPEN = (KeyError, TypeError, AttributeError, StopIteration, RecursionError)       # what JSON of another shape than ours leads to
COLUMNS = ("ID", *TASKS, *TESTBEDS, "OOD")
WATCHED = ("0.5", "1.0", "1.5")                                    # temperatures at which the dynamics are shown


# ---------------------------------------------------------------- a policy's row in the result table

def evaluate_policy(name, policy, world, tokenizer, max_new_tokens):
    """Greedy accuracy of a policy on the in-domain test, by task, and on every testbed: one row of the result table.

    Returns {name, id: {all, FQA, ...}, ood: {style, ..., all}, unparseable, shuffled_images, ci95, graded}; accuracies in
    [0, 1]. ood.all is the mean of the testbeds. `shuffled_images` is the in-domain accuracy when every question gets the
    picture of another one: what can be had without looking. `ci95` mirrors id and ood with bootstrap intervals over
    questions. `graded` holds one letter per question (r right, w wrong, u unparseable) for paired comparisons later."""
    graded = {split: grade_greedily(policy, world[split], tokenizer, max_new_tokens, f"{name}: {split}") for split in ("test", *TESTBEDS)}
    tasks = [question.task for question in world["test"]]
    parts = {"all": graded["test"], **{task: [g for g, t in zip(graded["test"], tasks) if t == task] for task in TASKS}}
    beds = {bed: graded[bed] for bed in TESTBEDS}
    right = {key: np.array([g == "right" for g in group], float) for key, group in {**parts, **beds, "ID": parts["all"]}.items()}
    row = {"name": name,
           "id": {key: float(right[key].mean()) for key in parts},
           "ood": {bed: float(right[bed].mean()) for bed in TESTBEDS},
           "unparseable": Counter(graded["test"])["unparseable"] / len(tasks)}
    row["ood"]["all"] = float(np.mean(list(row["ood"].values())))
    row["ci95"] = {"id": {key: bootstrap_interval([right[key]]) for key in parts},
                   "ood": {bed: bootstrap_interval([right[bed]]) for bed in TESTBEDS} | {"all": bootstrap_interval([right[bed] for bed in TESTBEDS])}}
    circle = np.random.default_rng(0).permutation(len(tasks))    # in a random circle, everyone takes the picture of the one before
    order = np.empty(len(tasks), int)
    order[circle] = np.roll(circle, 1)
    shuffled = grade_greedily(policy, world["test"], tokenizer, max_new_tokens, f"{name}: shuffled images",
                              images=[world["test"][i] for i in order])
    row["shuffled_images"] = Counter(shuffled)["right"] / len(tasks)
    row["graded"] = {split: "".join(g[0] for g in group) for split, group in graded.items()}
    return row


def make_prompts(questions, tokenizer, image_size, with_answer=False, images=None):
    """Prompts for questions: the picture and the question, and with `with_answer` the gold answer (the paper's warm-up).
    `images`: take the pictures of these questions instead (the shuffled control)."""
    return [Prompt(torch.from_numpy(render(pictured, image_size)), tokenizer.prompt(question.text, question.answer if with_answer else None))
            for question, pictured in zip(questions, images or questions)]


def sample_texts(policy, prompts, tokenizer, rollouts_per_question, temperature, max_new_tokens, seed, title, prefixes=None, streams=None):
    """`model.sample` behind a progress bar. Returns (texts, responses), both [question][rollout]."""
    began, written = time.time(), 0
    total = rollouts_per_question * (sum(map(len, prefixes)) if prefixes else len(prompts))
    with tqdm(total=total, desc=title, unit=" responses", leave=False, mininterval=1) as bar:
        def progress(ended, tokens):
            nonlocal written
            written += tokens
            bar.set_postfix_str(f"{written / (time.time() - began):,.0f} tokens/s", refresh=False)
            bar.update(ended)
        responses = sample(policy, prompts, rollouts_per_question, temperature, max_new_tokens, seed, tokenizer.EOS,
                           prefixes, streams, progress=progress)
    return [[tokenizer.decode(response.tokens) for response in group] for group in responses], responses


def grade_greedily(policy, questions, tokenizer, max_new_tokens, title, images=None):
    """Grades ("right", "wrong", "unparseable") of the greedy responses to questions."""
    prompts = make_prompts(questions, tokenizer, policy.config.image_size, images=images)
    texts, _ = sample_texts(policy, prompts, tokenizer, 1, 0.0, max_new_tokens, 0, title)
    return [grade(text, question.answer) for (text,), question in zip(texts, questions)]


NUMBER_AT_END = re.compile(r"answer:[ \t]*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[ \t]*\.?\s*\Z")


def grade(text, gold):
    """Binary reward 1(a == a*), with a third outcome: "right", "wrong" or "unparseable".

    Answers are compared by value: 7, 7.0 and 07 agree. Without an answer (`find_answer`) the response is "unparseable",
    which is counted apart everywhere."""
    answer = find_answer(text)
    if answer is None:
        return "unparseable"
    return "right" if answer == Fraction(gold) else "wrong"


def find_answer(text):
    """The number after the last "answer:", after which nothing may follow, as a Fraction; None if there is no such number."""
    match = NUMBER_AT_END.search(text)
    return Fraction(match[1]) if match else None


# ---------------------------------------------------------------- statistics

def pass_at_k(n, c, k):
    """Chance that k responses drawn from n without replacement hold at least one of the c right ones: the unbiased
    estimator of Chen et al. 2021 (arXiv 2107.03374), Pass@K = 1 - C(n-c, k) / C(n, k)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def reward_pass_at_k(right, scores, k):
    """The paper's Reward-Pass@K of one question: is a right response among the k that the reward ranks highest, out of all n
    responses, right or wrong. Where equal scores straddle rank k, each order of them is equally likely, and the value is the
    chance of a right one: no luck of the draw. right: n bools, scores: n numbers -> a float in [0, 1]."""
    if not 1 <= k <= len(scores):
        raise ValueError(f"reward_pass_at_k needs 1 <= k <= n, got n={len(scores)}, k={k}")
    edge = sorted(scores, reverse=True)[k - 1]
    above = [r for r, s in zip(right, scores) if s > edge]
    tied = [r for r, s in zip(right, scores) if s == edge]
    return 1.0 if any(above) else pass_at_k(len(tied), sum(tied), k - len(above))


def auc(good, scores, groups=None):
    """Area under the ROC curve: the chance that a good one scores above a bad one, ties counting half (Mann-Whitney).
    good: n bools, scores: n numbers; groups: n labels, then only pairs within a group are compared. None without a pair."""
    good, scores = np.asarray(good, bool), np.asarray(scores, float)
    _, group = np.unique([""] * len(good) if groups is None else groups, return_inverse=True, axis=0)
    won = pairs = 0.0
    for g in range(group.max(initial=-1) + 1):
        mine, values = good[group == g], scores[group == g]
        _, rank, times = np.unique(values, return_inverse=True, return_counts=True)
        mean_rank = (times.cumsum() - (times - 1) / 2)[rank]       # 1 .. n, equal scores share the mean of theirs
        n, m = int(mine.sum()), int((~mine).sum())
        won, pairs = won + mean_rank[mine].sum() - n * (n + 1) / 2, pairs + n * m
    return float(won / pairs) if pairs else None


def balanced_accuracy(good, said_good):
    """Mean of the shares of the good and of the bad that are called so; None if all are good or none is."""
    good, said_good = np.asarray(good, bool), np.asarray(said_good, bool)
    return float((said_good[good].mean() + (~said_good[~good]).mean()) / 2) if good.any() and not good.all() else None


def bootstrap_interval(groups, draws=2000, luck=None, levels=(0.95,)):
    """Interval of the mean of group means. A group is an array (questions,), or (runs, questions) with the same questions in each run;
    every group has the same runs. One group: an accuracy. Differences of two policies' per-question results: a paired comparison.

    Questions are resampled (percentile bootstrap). Runs, by seed, are too few for that: of two, resampling gives one alone half of the
    time, and the interval would miss the truth as often. So each draw adds the luck of the runs instead: a Student t number times a
    standard error. luck: (standard error, degrees of freedom), by default from the spread of the runs' own means; without a
    second run it is unknown and left out: such an interval is about these policies only.
    Returns [low, high], of several levels one after the other."""
    rng, groups = np.random.default_rng(0), [np.atleast_2d(np.asarray(values, float)) for values in groups]
    n = len(groups[0])
    if n > 1:
        error, freedom = luck or (float(np.mean([values.mean(axis=1) for values in groups], axis=0).std(ddof=1)) / math.sqrt(n), n - 1)
        # Runs answer single questions differently; that is in the resampled questions, and once more in the spread of the runs' means, so
        # it is taken off there. But not more than half: of few runs this is known badly. (On made-up tables of 2 or 3 runs and no gain,
        # 1 to 5 % of the intervals leave out 0; with nothing taken off 0 to 3 %, and they are half as wide again as they have to be.)
        twice = sum(float((_left(values) ** 2).sum()) / ((n - 1) * (values.shape[1] - 1) * values.size) for values in groups if values.shape[1] > 1)
        twice /= len(groups) ** 2
        luck = math.sqrt(max(error ** 2 - twice, error ** 2 / 2)), freedom
    means = np.mean([values.mean(axis=0)[rng.integers(values.shape[1], size=(draws, values.shape[1]))].mean(axis=1) for values in groups], axis=0)
    means = means + luck[0] * rng.standard_t(luck[1], draws) if luck else means
    return [float(edge) for level in levels for edge in np.percentile(means, [50 - 50 * level, 50 + 50 * level])]


def _left(table):
    """A table without what its rows and its columns have each: the residual of a two-way analysis of variance."""
    return table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()


def luck_of_runs(accuracies):
    """(standard error, degrees of freedom) that a difference of two arms has because every run is one of many possible, from
    accuracies (arms, runs): what is left when arm and seed are taken out, pooled over all arms of a table, since one pair of arms
    with two or three seeds says little about it. None for a single run."""
    arms, runs = np.shape(accuracies)
    if runs < 2 or arms < 2:
        return None
    freedom = (arms - 1) * (runs - 1)
    return math.sqrt(2 * float((_left(np.asarray(accuracies, float)) ** 2).sum()) / freedom / runs), freedom


def verdict(effects, margin=0.0, luck=None, draws=4000):
    """Does a claim hold, all of whose effects should be above -margin? Each effect: a list of groups, as in `bootstrap_interval`.

    "holds" if every 95 % interval lies above -margin (all must, so nothing is gained by having many); "fails" if one lies below
    -margin even at a level corrected for their number (Bonferroni); else "unresolved". Different claims are not corrected for each other.
    Returns (verdict, [(effect, low, high)])."""
    means = [float(np.mean([np.mean(values) for values in groups])) for groups in effects]
    intervals = [bootstrap_interval(groups, draws, luck=luck, levels=(0.95, 1 - 0.05 / len(effects))) for groups in effects]
    said = "holds" if all(low > -margin for low, *_ in intervals) else "fails" if any(high < -margin for *_, high in intervals) else "unresolved"
    return said, [(effect, low, high) for effect, (low, high, *_) in zip(means, intervals)]


def paired_gain(*pairs):
    """How much the first row of each pair beats the second on the same questions, the mean over pairs (one per run): {id: [gain, low,
    high], ood: [gain, low, high]}, with 95 % intervals over questions, and over runs if there are several."""
    groups = {"id": [differences(pairs, "test")], "ood": [differences(pairs, bed) for bed in TESTBEDS]}
    return {key: [float(np.mean([group.mean() for group in parts])), *bootstrap_interval(parts)] for key, parts in groups.items()}


def differences(pairs, split):
    """(runs, questions) of -1, 0 and 1: is the first row of each pair right and the second wrong, or the other way round."""
    return np.array([[(a == "r") - (b == "r") for a, b in zip(row["graded"][split], other["graded"][split])] for row, other in pairs], float)


def most_frequent_answer(train, test):
    """Accuracy on `test` of always saying the template's most frequent answer in `train`: the price of not looking."""
    counts = {}
    for question in train:
        counts.setdefault(question.template, Counter())[question.answer] += 1
    return sum(counts[q.template].most_common(1)[0][0] == q.answer for q in test if q.template in counts) / len(test)


def format_table(rows):
    """The result table as text: the paper's columns, accuracies in percent."""
    width = max(len(row["name"]) for row in rows)
    lines = [" " * width + "".join(f"{column:>9}" for column in COLUMNS)]
    for row in rows:
        lines.append(f"{row['name']:<{width}}" + "".join(f"{100 * value:>9.1f}" for value in figures(row).values()))
    return "\n".join(lines)


def figures(row):
    """{column: value} of a row of the result table, or of its intervals (row["ci95"])."""
    return dict(zip(COLUMNS, (row["id"]["all"], *(row["id"][task] for task in TASKS), *(row["ood"][bed] for bed in TESTBEDS), row["ood"]["all"])))


def print_report(report):
    """The result of a run on screen: the table, the controls, and last the most important number."""
    print(f"\n{format_table(report['rows'])}\n")
    for row in report["rows"]:
        print(f"{row['name']}: unparseable {share(row['unparseable'], 1)}, with shuffled images {share(row['shuffled_images'], 1)}")
    print(f"always the template's most frequent answer: {share(report['controls']['most_frequent_answer'], 1)}")
    stages = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in report["stages"].items())
    print(f"{report['seconds'] / 60:.1f} minutes on {report['device']}: {stages}")
    trained = [line for line in report["iterations"] if line.get("updates")]
    if trained:
        sampling, training = (max(1e-9, sum(line[name] for line in trained)) for name in ("sampling_seconds", "training_seconds"))
        tokens, updates = (sum(line[name] for line in trained) for name in ("tokens", "updates"))
        print(f"self-evolving: {tokens / sampling:,.0f} tokens/s sampled, {updates / training:.1f} updates/s, "
              f"{share(sampling, report['seconds'])} of the run sampling and {share(training, report['seconds'])} training")
    others = sorted(report["gain_over"], key=lambda name: name == "+ warm-up")         # warm-up last
    for key, words in (("ood", "out of domain"), ("id", "in domain")):
        for name in others:
            gain, low, high = report["gain_over"][name][key]
            print(f"{report['method']} - {name}, {words}: {100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")


def share(part, whole):
    """"12.3 %", or a dash where there is nothing to take a share of."""
    return f"{100 * part / whole:.1f} %" if whole and part is not None else "-"


# ---------------------------------------------------------------- the paper's tables and claims

# Of each experiment the rows: arm -> (words, the paper's ID and OOD accuracy with MiniCPM-V-2.5, in Table 4 also by task). Table 5: the
# out-of-domain accuracy by size, the mean of the paper's testbeds.
TABLES = {
    "table1": {
        "+ warm-up": ("+ warm-up", 38.8, 52.6),
        "sft": ("SFT", 44.3, 54.8),
        "iterative_rft": ("Iterative RFT, 100 %", 42.3, 55.7),
        "rest_em": ("ReST-EM, 100 %", 42.3, 55.1),
        "continuous_100": ("Continuous, 100 %", 42.2, 56.7),
        "continuous_50": ("Continuous, 50 %", 43.1, 56.2),
        "continuous": ("Continuous, 25 %", 43.1, 57.2),
        "continuous_12.5": ("Continuous, 12.5 %", 42.3, 56.1),
        "continuous_6.25": ("Continuous, 6.25 %", 41.0, 56.8)},
    "table2": {
        "continuous": ("all correct, no PRM", 43.1, 57.2),
        "random_2": ("Random-2, no PRM", 41.0, 55.5),
        "threshold": ("score > alpha", 43.8, 57.5),
        "top_1": ("Top-1", 43.0, 59.0),
        "prm": ("Top-2", 45.3, 59.2),
        "top_4": ("Top-4", 44.0, 58.4)},
    "table3": {
        "continuous": ("labeled only, no PRM", 43.1, 57.2),
        "prm": ("labeled only, PRM", 45.3, 59.2),
        "oracle": ("oracle, no PRM, from 0 %", 42.5, 58.2),
        "oracle_prm": ("oracle, PRM, from 0 %", 42.9, 59.1),
        "vote_0": ("voted, PRM, from 0 %", 43.3, 58.2),
        "vote_25": ("voted, PRM, from 25 %", 42.4, 57.6),
        "vote_50": ("voted, PRM, from 50 %", 42.9, 58.2),
        "vote_75": ("voted, PRM, from 75 %", 45.0, 58.8)},
    "table4": {
        "base": ("base", 13.6, 52.4, 59.2, 44.7, 50.5, 53.8, 48.0),
        "+ warm-up": ("+ warm-up", 38.8, 52.6, 58.4, 47.1, 57.0, 53.8, 45.8),
        "sft": ("SFT", 44.3, 54.8, 58.7, 50.5, 56.5, 55.7, 50.8),
        "rest_em": ("ReST-EM", 42.3, 55.1, 59.1, 49.5, 65.6, 55.1, 48.0),
        "iterative_rft": ("Iterative RFT", 42.3, 55.7, 59.1, 49.5, 64.5, 55.1, 47.5),
        "continuous": ("Continuous", 43.1, 57.2, 57.6, 56.3, 65.1, 57.0, 49.7),
        "prm": ("+ PRM re-rank", 45.3, 59.2, 59.1, 61.1, 68.3, 55.1, 51.4),
        "mstar_pass_at_k": ("M-STaR, T by Pass@K", 42.8, 58.0, "-", "-", "-", "-", "-"),
        "mstar": ("M-STaR, T by Reward-Pass@2", 45.9, 59.5, 59.5, 59.1, 65.6, 58.9, 54.2)},
    "table5": {
        "base": ("base", {"small": 26.2, "medium": 46.5, "large": 55.0}),
        "+ warm-up": ("+ warm-up", {"small": 52.8, "medium": 55.3, "large": 57.7}),
        "mstar": ("M-STaR", {"small": 53.3, "medium": 59.2, "large": 61.6})},
    "dynamics": {
        "prm_watched": ("+ PRM re-rank, T = 1", 45.3, 59.2),
        "mstar_watched": ("M-STaR", 45.9, 59.5)},
}
# Of each experiment the claims: (number as in RESULTS.md, words, pairs of arms of which the first should be better, by how much less it
# may be). `claims_of` adds those that are not about two arms.
CLAIMS = {
    "table1": [
        ("C1", "going on from the last weights beats restarting from pi_0", [("iterative_rft", "rest_em"), ("continuous_100", "rest_em")], 0.0),
        ("C2", "keeping optimizer and schedule beats resetting them", [("continuous_100", "iterative_rft")], 0.0),
        ("C3", "an interval of 25 % beats 100 %", [("continuous", "continuous_100")], 0.0),
        ("C3", "6.25 % is too small", [("continuous", "continuous_6.25")], 0.0)],
    "table2": [
        ("C4", "Top-2 beats all correct and Random-2", [("prm", "continuous"), ("prm", "random_2")], 0.0),
        ("C4", "Top-2 beats Top-1, Top-4 and a threshold", [("prm", "top_1"), ("prm", "top_4"), ("prm", "threshold")], 0.0)],
    "table3": [
        ("C7", "unlabeled questions with voted answers do not help (by more than a point)", [("prm", f"vote_{n}") for n in (0, 25, 50, 75)], 0.01),
        ("C7", "with true answers they are worth more than with voted ones", [("oracle_prm", "vote_0")], 0.0)],
    "table4": [
        ("C1 to C3", "continuous self-evolving at 25 % beats Iterative RFT and ReST-EM", [("continuous", "iterative_rft"), ("continuous", "rest_em")], 0.0),
        ("C4", "Top-2 beats all correct", [("prm", "continuous")], 0.0),
        ("C9", "T by Reward-Pass@2 beats T = 1", [("mstar", "prm")], 0.0),
        ("C9", "T by Reward-Pass@2 beats T by Pass@K", [("mstar", "mstar_pass_at_k")], 0.0),
        ("C4, C9", "M-STaR beats continuous self-evolving", [("mstar", "continuous")], 0.0)],
}


def make_experiment(name, reports, command):
    """Everything that a table of the paper, and the verdicts on its claims, are made from. reports: mstar's, one per size and seed, each
    with the arms of the table. Returns a dictionary of plain numbers and texts."""
    arms = []
    for report in reports:
        for arm, (words, *paper) in TABLES[name].items():
            paper = [paper[0][report["size"]]] if name == "table5" else paper
            arms.append({**arm_in(report, arm), "arm": arm, "words": words, "paper": paper, "size": report["size"], "seed": report["seed"]})
    claims = []
    for number, words, effects, margin, luck in claims_of(name, arms, reports):
        said, found = verdict(list(effects.values()), margin, luck)
        questions = [sum(group.shape[1] for group in groups) for groups in effects.values()]
        claims.append({"claim": number, "words": words, "verdict": said, "seeds": len(next(iter(effects.values()))[0]),
                       "questions": sorted({min(questions), max(questions)}), "margin": margin, "luck": luck,
                       "effects": {effect: list(numbers) for effect, numbers in zip(effects, found)}})
    if name != "dynamics":                                         # no figure needs the single questions
        for arm in arms:
            arm["iterations"] = [{key: value for key, value in line.items() if key not in ("by_question", "sweep")} for line in arm["iterations"]]
    about = {key: reports[0][key] for key in ("preset", "device", "versions", "config")}
    return {"experiment": name, "command": command, **about, "seeds": sorted({report["seed"] for report in reports}),
            "minutes": sum(report["seconds"] for report in reports) / 60, "claims": claims, "arms": arms}


def arm_in(report, arm):
    """What a report says of an arm: its row, its iterations, and the responses sampled and updates made in training."""
    row = next(row for row in report["rows"] if row["name"] in (arm, report["names"].get(arm)))
    iterations, config = [line for line in report["iterations"] if line["arm"] == arm], report["config"]
    updates = {"base": 0, "+ warm-up": config["warmup_updates"], "sft": config["warmup_updates"] + config["evolve_updates"]}
    evolved = config["warmup_updates"] + sum(line.get("updates", 0) for line in iterations)
    return {"row": row, "iterations": iterations, "responses": sum(line.get("responses", 0) for line in iterations), "updates": updates.get(arm, evolved)}


def claims_of(name, arms, reports):
    """The claims of an experiment: [(number, words, {effect: groups}, margin, luck)], what `verdict` needs. Each effect should be positive."""
    rows = {}                                                      # (size, arm) -> the rows of its seeds
    for arm in arms:
        rows.setdefault((arm["size"], arm["arm"]), []).append(arm["row"])
    evolved = {(arm["size"], arm["arm"]): 0 for arm in arms if arm["responses"]}         # each once, in order
    luck = luck_of_runs([[row["id"]["all"] for row in rows[key]] for key in evolved])

    def both(better, worse, size="medium"):
        return list(zip(rows[size, better], rows[size, worse]))

    claims, called = [], {arm: words for arm, (words, *_) in TABLES[name].items()}
    for number, words, pairs, margin in CLAIMS.get(name, []):
        effects = {f"{called[better]} over {called[worse]}": [differences(both(better, worse), "test")] for better, worse in pairs}
        claims.append((number, words, effects, margin, luck))
    if name in ("table4", "table5"):
        size, tasks = "large" if name == "table5" else "medium", np.array(reports[0]["tasks"].split())
        pairs = both("mstar", "+ warm-up", size)
        parts = {task: [differences(pairs, "test")[:, tasks == task]] for task in TASKS} | {bed: [differences(pairs, bed)] for bed in TESTBEDS}
        claims.append(("C10", f"M-STaR beats pi_0 in every task type and testbed ({size} policy)", parts, 0.0, None))
    if name == "table5":
        small, *others = ([differences(both("mstar", "+ warm-up", size), bed) for bed in TESTBEDS] for size in ("small", "medium", "large"))
        effects = {f"gain of {size} over gain of small": [a - b for a, b in zip(gains, small)] for size, gains in zip(("medium", "large"), others)}
        claims.append(("C10", "the smallest policy gains least out of domain", effects, 0.0, None))
    if name == "table2":                                           # and Figure 2, from the audits of the PRMs
        of = {what: np.array([numbers_in(report["verifier"][what]) for report in reports]) for what in reports[0]["verifier"]}
        votes = {f"majority voting over {words}": [of["majority_voting"] - of[way]]
                 for way, words in (("best_of_n", "best-of-16"), ("weighted_voting", "weighted voting"))}
        false, steps = ([np.nan_to_num(of[f"{what}_all"] - of[f"{what}_top_2"])] for what in ("false", "steps"))       # 0 where nothing is left out
        claims += [
            ("C5", "best-of-16 and weighted voting by the PRM do not beat majority voting (by more than a point)", votes, 0.01, None),
            ("C5", "and yet it re-ranks well: fewer of the Top-2 than of all right responses hold a false step (share, per question)", {"all over Top-2": false}, 0.0, None),
            ("C6", "the Top-2 have fewer steps than all right responses (steps, per question)", {"all over Top-2": steps}, 0.0, None)]
    if name == "dynamics":
        claims += dynamics_claims([arm["iterations"] for arm in arms if arm["arm"] == "prm_watched"])
    return claims


def numbers_in(text):
    """The numbers of each question as an array; "-" is nan."""
    return np.array([float(v) if v != "-" else math.nan for v in text.split()])


def dynamics_claims(runs):
    """C8, of runs (lists of iterations) of one arm that was watched at every temperature: effects between its first, middle and last look."""
    def look(line):
        """Of each question, what one line of metrics says."""
        greedy, right, reward = (numbers_in(line["by_question"][name]) for name in ("greedy", "right", "reward_pass_at_2"))
        return {"greedy": greedy, "pass@k": 1.0 * (right > 0), "reward": reward, **{t: numbers_in(line["sweep"]["any_right"][t]) for t in ("0.5", "1.5")}}

    looks = [[look(line) for line in lines if "sweep" in line] for lines in runs]

    def at(place):
        """The looks of all runs at one place: {name: (runs, questions)}."""
        return {name: np.array([run[place][name] for run in looks]) for name in looks[0][0]}

    n, first, last = len(looks[0]), at(0), at(-1)
    middle = (at((n - 1) // 2)["reward"] + at(n // 2)["reward"]) / 2           # of an even number of looks, between two
    rise = {name: last[name] - first[name] for name in first}
    effects = {"greedy accuracy rises": rise["greedy"],
               "pass@k falls": -rise["pass@k"],
               "the gap between them shrinks": rise["greedy"] - rise["pass@k"],
               "Reward-Pass@2 saturates: its first half gains more than its second": 2 * middle - first["reward"] - last["reward"],
               "pass@k changes for the better at T = 1.5, compared with 0.5 (the paper: it falls more slowly)": rise["1.5"] - rise["0.5"]}
    return [("C8", words, {"effect": [effect]}, 0.0, None) for words, effect in effects.items()]


def format_experiment(result):
    """An experiment as text, in Markdown: its table beside the paper's numbers, curves if it is about those, and its verdicts last."""
    name, groups, seeds = result["experiment"], {}, len(result["seeds"])
    for arm in result["arms"]:
        groups.setdefault((arm["size"], arm["arm"]), []).append(arm)
    columns = {"table4": ("ID", *TASKS, "OOD"), "table5": (*TESTBEDS, "OOD")}.get(name, ("ID", "OOD"))
    theirs = ["average"] if name == "table5" else ["ID", "OOD", *TASKS][:len(result["arms"][0]["paper"])]

    def table(head, rows):
        return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]

    rows = []
    for (size, _), arms in groups.items():
        first, ours = arms[0], [f"{100 * np.mean([figures(arm['row'])[column] for arm in arms]):.1f}" for column in columns]
        rows.append([f"{size}: " * (name == "table5") + first["words"], *ours, *first["paper"], f"{first['responses']:,}", f"{first['updates']:,}"])
    lines = table([f"{name}, %", *columns, *(f"paper: {column}" for column in theirs), "responses", "updates"], rows)
    for arms in groups.values() if name == "dynamics" else ():
        rows = []
        for same in zip(*([line for line in arm["iterations"] if "sweep" in line] for arm in arms)):
            values = np.mean([[line["greedy_accuracy"], *(line["sweep"]["surface"][t]["pass_at_k"] for t in WATCHED), line["reward_pass_at_2"]]
                              for line in same], axis=0)
            temperatures = ", ".join(str(line["temperature"]) for line in same)
            rows.append([f"iteration {same[0]['iteration']}", *(f"{100 * value:.1f}" for value in values), temperatures])
        k = arms[0]["iterations"][0]["k"]
        lines += table([f"{arms[0]['words']}, validation, %", "greedy", *(f"pass@{k}, T = {t}" for t in WATCHED), "Reward-Pass@2", "T"], rows)
    lines += [f"`{result['command']}`: {seeds} seed{'s' * (seeds > 1)}, {result['minutes']:.0f} minutes on {result['device']}. "
              "The paper's levels are not comparable with ours, its directions are.", ""]
    rows = []
    for claim in result["claims"]:
        number = "{:+.3f} [{:+.3f}, {:+.3f}] steps" if claim["claim"] == "C6" else "{:+.1f} [{:+.1f}, {:+.1f}]"
        unit = 1 if claim["claim"] == "C6" else 100
        effects = "; ".join(f"{words} {number.format(*(unit * n for n in numbers))}" for words, numbers in claim["effects"].items())
        said = claim["verdict"] + ", on one seed" * (claim["seeds"] == 1 and claim["verdict"] != "unresolved")
        rows.append([f"{claim['claim']}: {claim['words']}", said, f"{effects} (questions: {' to '.join(map(str, claim['questions']))})"])
    lines += table(["claim", "verdict", f"effects in points, with 95 % intervals over questions{' and seeds' * (seeds > 1)}"], rows)
    return "\n".join(lines[:-1])


# ---------------------------------------------------------------- report.html: what happened, to look at

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1b1b1b; --soft: #5d5d5d; --line: #d5d5d5; --box: #f6f6f4; --good: #2a78c2; --bad: #e07b00;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #a7588a }
@media (prefers-color-scheme: dark) { :root { --bg: #16181b; --ink: #e8e8e6; --soft: #a5a7aa; --line: #3b3f44; --box: #1f2226; --good: #5aa7ec; --bad: #f29a38;
  --c0: #56b4e9; --c1: #f0904a; --c2: #35c79b; --c3: #d995bd } }
body { background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 75rem }
h1 { font-size: 1.5rem } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) } small, figcaption, .soft { color: var(--soft); font-size: .85rem }
code { background: var(--box); padding: .1rem .3rem; overflow-wrap: anywhere } .scroll { overflow-x: auto; margin: 1rem 0 } pre { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, td.words { text-align: left } td.chosen { outline: 3px solid var(--ink); outline-offset: -3px; font-weight: bold }
td small { display: block } td:not(:first-child, .words) { white-space: nowrap } td.heat { background: color-mix(in srgb, var(--good) calc(var(--s) * 60%), transparent) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.5rem } figure { margin: 0 }
svg text { fill: var(--ink); font-size: 12px } svg .grid { stroke: var(--line) } .key { margin-right: 1rem; white-space: nowrap }
article { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; display: grid; grid-template-columns: 10rem minmax(0, 1fr); gap: 1rem }
@media (max-width: 40rem) { article { grid-template-columns: 1fr } } article img { width: 8rem; image-rendering: pixelated; border: 1px solid var(--line); background: #fff }
.responses { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: .75rem; padding: 0; list-style: none; margin: .5rem 0 }
.response { background: var(--box); border-radius: .4rem; padding: .5rem } .selected { outline: 3px solid var(--good) } .response ol { margin: .3rem 0 0; padding: 0; list-style: none }
.response ol li { --mix: color-mix(in srgb, var(--good) calc(var(--s) * 100%), var(--bad)); border-left: .4rem solid var(--mix); padding: 0 .4rem; margin: 2px 0;
  background: color-mix(in srgb, var(--mix) 18%, transparent); overflow-wrap: anywhere } .response small { display: block } [hidden] { display: none !important }
.filter { position: sticky; top: 0; background: var(--bg); padding: .5rem 0; display: flex; flex-wrap: wrap; gap: 1rem } select { font: inherit } summary { cursor: pointer }
"""
SCRIPT = """
const choice = name => document.getElementById(name).value;
function filter() {
  for (const article of document.querySelectorAll('article')) {
    let any = false;
    for (const round of article.querySelectorAll('details')) {
      let some = false;
      for (const response of round.querySelectorAll('.response')) {
        response.hidden = !['any', ...response.dataset.outcome.split(' ')].includes(choice('outcome'));
        some ||= !response.hidden;
      }
      round.hidden = !some || !['any', round.dataset.iteration].includes(choice('iteration'));
      if (!round.hidden && choice('iteration') !== 'any') round.open = true;
      any ||= !round.hidden;
    }
    article.hidden = !any || !['any', article.dataset.kind].includes(choice('kind'));
  }
}
document.querySelector('.filter').hidden = false;
for (const select of document.querySelectorAll('select')) select.addEventListener('change', filter);
filter();
"""
CURVES = (     # field of metrics.jsonl or a function of a line, title, unit, how to read it
    ("greedy_accuracy", "Greedy accuracy", "%", "Exploitation: should rise and then flatten (the paper's Figure 3)."),
    ("pass_at_k", "Pass@k", "%", "Exploration: one of k responses is right. It falls where training narrows the policy (Figure 3, 4a)."),
    (lambda m: m["pass_at_k"] - m["greedy_accuracy"], "Pass@k minus greedy", "points", "What is left to gain by selection; the paper sees it shrink (Figure 4b)."),
    ("reward_pass_at_2", "Reward-Pass@2", "%", "What the PRM can exploit of what is explored; saturates early in the paper (Figure 4c, 5)."),
    ("temperature", "Temperature of the responses", "T", "Where the sweeps put it; constant in the other methods (section on adaptive exploration)."),
    ("kept", "Responses trained on", "responses", "After grading, without repeats, and after the PRM's choice."),
    ("distinct", "Different responses", "%", "Different texts among a question's responses: near zero there is nothing left to choose from."),
    ("entropy", "Entropy", "nats per token", "Of the distribution that is sampled from: a fall says that the policy repeats itself."),
    ("loss", "Loss", "nats per token", "Of the last 100 updates, on the policy's own responses: low from the start, they are likely by making."))


def write_html(folder):
    """Write folder/report.html from the files of a run, finished or not: one page that needs no network and no other file. A section
    whose file is missing says so. Text of policies and questions is escaped, and no script but ours may run on the page."""
    folder = Path(folder)

    def read(name):
        return json.loads((folder / name).read_text()) if (folder / name).exists() else None

    config, report, audit = load_tensors(folder / "config.json")[1], read("report.json"), read("audit.json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] if (folder / "metrics.jsonl").exists() else []
    rounds = sorted((json.loads(path.read_text()) for path in (folder / "samples").glob("*.json")), key=lambda part: part["iteration"])
    mine = [line for line in lines if line["arm"] == config["method"]]
    parts = [html_headline(report, config, lines), "<h2>Result</h2>", html_rows(report) if report else missing("report.json", "the run has not ended"),
             "<h2>Health</h2>", html_health(mine, report) if mine else missing("metrics.jsonl", "no iteration has ended"),
             "<h2>Over iterations</h2>", html_curves(lines) if lines else missing("metrics.jsonl", "no iteration has ended"),
             "<h2>Temperatures</h2>", html_surface(mine), "<h2>Process reward model against the oracle</h2>",
             html_audit(audit) if audit else missing("audit.json", f"python prm.py {folder} makes it"),
             "<h2>Samples</h2>", html_samples(rounds, config) if rounds else missing("samples/", "no iteration has ended")]
    write_page(folder / "report.html", folder.name, "".join(parts) + f"<script>{SCRIPT}</script>" * bool(rounds))
    return folder / "report.html"


def write_page(path, title, body):
    """Write an HTML page, whole or not at all, that loads nothing and runs no script but ours."""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
    write_whole(path, f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>M-STaR: {escape(title)}</title><style>{STYLE}</style><body>{body}</body></html>""".encode())


def write_experiment_html(path, result):
    """What `format_experiment` says as a page, and of the dynamics the paper's Figures 3 to 5 as charts, means over seeds."""
    def cell(text):
        return f"<td class='words'>{escape(text)}" if len(text) > 30 else escape(text)

    parts = [f"<h1>{escape(result['experiment'])}</h1>"]
    for block in format_experiment(result).split("\n\n"):
        lines = [line.strip("| ").split(" | ") for line in block.splitlines()]
        parts.append(html_table(map(escape, lines[0]), [map(cell, line) for line in lines[2:]]) if block.startswith("|")
                     else "<p>" + re.sub("`(.*?)`", r"<code>\1</code>", escape(block)) + "</p>")
    if result["experiment"] == "dynamics":
        parts.insert(1, html_dynamics(result["arms"]))
    write_page(path, result["experiment"], "".join(parts))


def html_dynamics(arms):
    """The paper's Figures 3 to 5: curves on validation questions of the arm at T = 1, and of both arms."""
    def curve(arm, get):
        """[(iteration, percent)] of the looks at every temperature, means over the arm's seeds."""
        runs = [[line for line in one["iterations"] if "sweep" in line] for one in arms if one["arm"] == arm]
        return [(same[0]["iteration"], 100 * float(np.mean([get(line) for line in same]))) for same in zip(*runs)]

    def pass_at_k(arm, t):
        return curve(arm, lambda line: line["sweep"]["surface"][t]["pass_at_k"])

    greedy, k = curve("prm_watched", lambda line: line["greedy_accuracy"]), arms[0]["iterations"][0]["k"]
    exploration = {f"pass@{k}, T = {t}": pass_at_k("prm_watched", t) for t in WATCHED}
    gaps = {name: [(x, y - g) for (x, y), (_, g) in zip(line, greedy)] for name, line in exploration.items()}
    balance = {words: curve(arm, lambda line: line["reward_pass_at_2"]) for arm, words in (("prm_watched", "T = 1"), ("mstar_watched", "adaptive T"))}
    explored = {words: curve(arm, lambda line: line["pass_at_k"]) for arm, words in (("prm_watched", "T = 1"), ("mstar_watched", "adaptive T"))}
    figures = (line_chart("Figures 3 and 4a: greedy and Pass@K", "%", {**exploration, "greedy": greedy}, "The paper: greedy accuracy rises, Pass@K falls at every temperature."),
               line_chart("Figure 4b: Pass@K minus greedy", "points", gaps, "The paper: the gap shrinks."),
               line_chart("Figures 4c and 5: Reward-Pass@2", "%", balance, "The paper: it saturates early at T = 1, and stays higher with the adaptive temperature."),
               line_chart("Figure 5: Pass@K at the run's T", "%", explored, "The paper: it stays higher with the adaptive temperature."))
    return f"<div class='charts'>{''.join(figures)}</div>"


def missing(name, why):
    """A section that cannot be made."""
    return f"<p class='soft'>Not there: {escape(name)} ({escape(why)}).</p>"


def html_table(head, rows):
    """An HTML table of cells that are HTML already."""
    return ("<div class='scroll'><table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"
            + "".join("<tr>" + "".join(cell if str(cell).startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows) + "</table></div>")


def html_headline(report, config, lines):
    """What came out, at what cost, by which command; or how far an unfinished run has come."""
    if not report:
        return f"<h1>An unfinished run of {escape(config['method'])}: {len(lines)} iterations so far</h1><p><code>{escape(config['command'])}</code></p>"
    gain, row = report["gain_over"]["+ warm-up"]["id"], next(row for row in report["rows"] if row["name"] not in report["gain_over"])
    return (f"<h1>{escape(row['name'])}: {share(row['id']['all'], 1)} in domain, {points(gain)} over warm-up</h1>"
            f"<p>{report['seconds'] / 60:.1f} minutes on {escape(report['device'])}, preset {escape(report['preset'])}, seed {report['seed']}. In brackets: 95 % intervals over questions. "
            f"<code>{escape(report['command'])}</code></p>")


def points(gain):
    """"+1.2 points [+0.3, +2.1]" of (gain, low, high)."""
    return f"{100 * gain[0]:+.1f} points [{100 * gain[1]:+.1f}, {100 * gain[2]:+.1f}]"


def html_rows(report):
    """The result table in the paper's columns, with intervals, and the gains of the run's method."""
    def cells(row):
        for value, (low, high) in zip(figures(row).values(), figures(row["ci95"]).values()):
            yield f"{100 * value:.1f} <small>[{100 * low:.0f}, {100 * high:.0f}]</small>"
    gains = "".join(f"<li>over {escape(name)}: {points(gain['id'])} in domain, {points(gain['ood'])} out of domain</li>" for name, gain in report["gain_over"].items())
    return html_table(["%", *COLUMNS], [[escape(row["name"]), *cells(row)] for row in report["rows"]]) + f"<p>Gains of {escape(report['method'])}, paired by question:</p><ul>{gains}</ul>"


def html_health(lines, report):
    """A verdict per sign of trouble, from the last iteration of the run's method (and the first, for drift)."""
    first, last = lines[0], lines[-1]
    repeated = 1 - last["right"] / last["correct"] if last.get("correct") else None
    auc_fall = first["reward_auc"] - last["reward_auc"] if last.get("reward_auc") is not None and first.get("reward_auc") is not None else None
    row = next((row for row in report["rows"] if row["name"] not in report["gain_over"]), None) if report else None
    blind = row and row["shuffled_images"] - report["controls"]["most_frequent_answer"]
    of_queries = {name: last[name] / last["queries"] if last.get("queries") else None for name in ("all_right", "none_right")}
    checks = (("questions with all responses right", of_queries["all_right"], 0.7, 1, "too easy: little is learned from them; a higher --temperature, or --temperature adaptive"),
              ("questions with no right response", of_queries["none_right"], 0.6, 1, "too hard: a stronger base (--base_updates), or more --rollouts_per_question"),
              ("right responses that repeat another", repeated, 0.7, 1, "the policy repeats itself: a higher --temperature, a smaller --evolve_lr"),
              ("different responses", last["distinct"], 0.2, -1, "nothing left to choose from: a higher --temperature, a smaller --evolve_lr"),
              ("entropy, nats per token", last["entropy"], 0.02, -1, "the policy is nearly deterministic: a higher --temperature, a smaller --evolve_lr"),
              ("truncated responses", last["truncated"], 0.02, 1, "cut off before their answer: more --max_new_tokens"),
              ("unparseable responses", last["unparseable"], 0.05, 1, "no answer found: more --warmup_updates, a lower --temperature"),
              ("fall of the PRM's AUC on right answers since pi_0", auc_fall, 0.1, 1, "the PRM no longer knows this policy: more --prm_questions, fewer --evolve_updates"),
              ("accuracy with shuffled images, above always guessing", blind, 0.05, 1, "answers without looking: more --base_caption_updates"))
    return html_table(["sign", "value", "fine if", "verdict"], [
        [name, "-" if value is None else f"{value:.3f}", f"{'below' if side > 0 else 'above'} {limit}",
         f"<td class='words'>{'not known' if value is None else 'fine' if side * value <= side * limit else escape(meaning)}"] for name, value, limit, side, meaning in checks])


def html_curves(lines):
    """Line charts of the metrics, one line per arm."""
    figures = []
    for field, title, unit, note in CURVES:
        get = field if callable(field) else lambda m: m.get(field)
        scale = 100 if unit in ("%", "points") else 1
        series = {}
        for line in lines:
            if get(line) is not None:
                series.setdefault(line["arm"], []).append((line["iteration"], scale * get(line)))
        figures.append(line_chart(title, unit, series, note) if series else missing(title, "not measured in this run"))
    return f"<div class='charts'>{''.join(figures)}</div>"


def line_chart(title, unit, series, note):
    """An inline SVG with axes, ticks and a legend: series {name: [(iteration, value)]}. Lines differ by colour, dashes and marks."""
    xs, ys = ([point[i] for line in series.values() for point in line] for i in (0, 1))
    low = min(ys)
    high = max(*ys, low + max(0.02 * abs(low), 0.01))              # a flat line is drawn as one
    size = 10.0 ** math.floor(math.log10(high - low))
    tick = next(size * m for m in (0.2, 0.5, 1, 2, 5) if (high - low) / (size * m) <= 5)
    low, high = math.floor(low / tick) * tick, math.ceil(high / tick) * tick

    def place(x, y):
        return 52 + 300 * (x - min(xs)) / max(1, max(xs) - min(xs)), 175 - 160 * (y - low) / (high - low)

    marks = ("<circle cx='{x:.1f}' cy='{y:.1f}' r='3.5'/>", "<rect x='{l:.1f}' y='{t:.1f}' width='7' height='7'/>", "<path d='M{x:.1f} {t:.1f}l4 7h-8z'/>", "<path d='M{x:.1f} {t:.1f}l4 4-4 4-4-4z'/>")
    drawn, keys = [], []
    for i in range(round((high - low) / tick) + 1):
        _, y = place(0, low + i * tick)
        drawn.append(f"<line class='grid' x1='52' x2='352' y1='{y:.1f}' y2='{y:.1f}'/><text x='46' y='{y + 4:.1f}' text-anchor='end'>{low + i * tick:.4g}</text>")
    for x in sorted(set(xs)):
        drawn.append(f"<text x='{place(x, low)[0]:.1f}' y='192' text-anchor='middle'>{x}</text>")
    for i, (name, line) in enumerate(series.items()):
        look = f"stroke='var(--c{i % 4})' fill='none' stroke-width='2' stroke-dasharray='{('', '6 3', '2 3', '8 3 2 3')[i % 4]}'"
        at = [place(x, y) for x, y in line]
        shapes = "".join(marks[i % 4].format(x=x, y=y, l=x - 3.5, t=y - 3.5) for x, y in at)
        drawn.append(f"<polyline {look} points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in at)}'/><g fill='var(--c{i % 4})'>{shapes}</g>")
        keys.append(f"<span class='key'><svg width='34' height='10'><line {look} x1='0' x2='34' y1='5' y2='5'/><g fill='var(--c{i % 4})'>{marks[i % 4].format(x=17, y=5, l=13.5, t=1.5)}</g></svg> {escape(name)}</span>")
    values = "; ".join(f"{name}: " + ", ".join(f"{y:.4g}" for _, y in line) for name, line in series.items())
    return (f"<figure><b>{escape(title)}</b>, {escape(unit)}<svg viewBox='0 0 360 212' role='img' aria-label='{escape(title)} by iteration. {escape(values)}'>{''.join(drawn)}"
            f"<text x='202' y='209' text-anchor='middle'>iteration</text></svg><div>{''.join(keys)}</div><figcaption>{escape(note)}</figcaption></figure>")


def html_surface(lines):
    """Sweeps as a table: a row per temperature, a column per sweep; the choice is outlined."""
    sweeps = [line for line in lines if "sweep" in line]
    if not sweeps:
        return missing("sweeps", "only --temperature adaptive and --watch_every make them")
    aim = sweeps[0]["sweep"]["aim"]
    table = [{float(t): values[aim] for t, values in line["sweep"]["surface"].items()} for line in sweeps]
    low, high = min(min(column.values()) for column in table), max(max(column.values()) for column in table)

    def cell(line, column, t):
        if t not in column:
            return ""
        mark = f" class='heat{' chosen' if t == line['sweep']['chosen'] else ''}' style='--s: {(column[t] - low) / max(high - low, 1e-9):.2f}'"
        return f"<td{mark}>{100 * column[t]:.1f}{' ←' if t == line['temperature'] else ''}</td>"
    rows = [[f"T&nbsp;=&nbsp;{t}", *(cell(line, column, t) for line, column in zip(sweeps, table))] for t in sorted({t for column in table for t in column})]
    return (html_table([f"{escape(aim)}, %", *(f"iteration {line['iteration']}" for line in sweeps)], rows)
            + "<p class='soft'>Dark: high. Outlined: chosen for the next iterations. ←: the temperature until then; it stays in a tie (a difference not above its own standard error).</p>")


def html_audit(audit):
    """Tables of prm.audit's numbers."""
    def number(value, format="{:.2f}"):
        return "-" if value is None else format.format(value)
    truths = [[f"{words}, {what}", number(part["all"]["auc"]), number(part["all"]["same_question"]), number(part["all"]["balanced_accuracy"])]
              for key, words in (("labels", "Monte-Carlo labels"), ("scores", "PRM scores")) for what, part in (("step true", audit[key]["step"]), ("all steps so far true", audit[key]["so_far"]))]
    chosen = [[escape(name.replace("_", " ")), f"{part['responses']:,}", share(part["false_step"], 1)] for name, part in audit["selection"].items()]
    ways = ("best_of_n", "likeliest", "weighted_voting", "majority_voting", "oracle")
    votes = [[f"N&nbsp;=&nbsp;{n}", *(share(row[way], 1) for way in ways)] for n, row in audit["verifier"].items() if n != "greedy"]
    return (html_table(["", "AUC", "AUC, same question and place", "balanced accuracy"], truths) + "<p>Right and different responses of pi_0 that hold a false step, by how they are chosen:</p>"
            + html_table(["chosen", "responses", "with a false step"], chosen) + f"<p>As a verifier (the paper's Figure 2a); greedy: {share(audit['verifier']['greedy'], 1)}</p>"
            + html_table(["", *(way.replace("_", " ") for way in ways)], votes)
            + f"<p>Steps per response (Figure 2b): Top-2 {number(audit['length']['top_2'])}, other right ones {number(audit['length']['others'])}.</p>")


def html_samples(rounds, config):
    """The sample browser: per question its picture and, per iteration, every response with every step."""
    world = {question.id: question for questions in build_world(config["splits"], config["world_seed"]).values() for question in questions}

    def step(text, score, label, true):
        known = [f"{words} {value:.2f}" for words, value in (("PRM", score), ("rollouts", label)) if value is not None]
        return f"<li style='--s: {0.5 if score is None else score:.2f}'>{escape(text)}<small>{' · '.join([*known, '✓ true' if true else '✗ false'])}</small></li>"

    def response(r, times):
        outcome = [r["grade"]] + ["selected"] * r["selected"] + ["lucky"] * (r["grade"] == "right" and not all(r["oracle"])) + ["truncated"] * r["truncated"]
        n = len(r["oracle"])
        steps = zip(r["text"].split("\n"), r["scores"] or [None] * n, r["labels"] or [None] * n, r["oracle"])
        words = ", ".join(outcome).replace("lucky", "by a false step")
        return (f"<li class='response {'selected' if r['selected'] else ''}' data-outcome='{' '.join(outcome)}'><b>{words}</b>{f' ×{times}' if times > 1 else ''}"
                f"<ol>{''.join(step(*s) for s in steps)}</ol></li>")

    articles = []
    for q, shown in enumerate(rounds[0]["questions"]):
        question, folds = world[shown["id"]], []
        for part in rounds:
            group = part["questions"][q]["responses"]
            times = Counter(r["text"] for r in group)
            different = sorted({r["text"]: r for r in reversed(group)}.values(), key=lambda r: (not r["selected"], r["grade"] != "right"))
            right = sum(r["grade"] == "right" for r in group)
            folds.append(f"<details data-iteration='{part['iteration']}'{' open' if part is rounds[-1] else ''}><summary>iteration {part['iteration']}, T = {part['temperature']}: "
                         f"{right} of {len(group)} right</summary><ul class='responses'>{''.join(response(r, times[r['text']]) for r in different)}</ul></details>")
        picture = io.BytesIO()
        Image.fromarray(render(question)).save(picture, "PNG", optimize=True)
        kind = question.task if shown["id"].startswith("validation") else shown["id"].split("/")[0]
        articles.append(f"<article data-kind='{kind}'><div><img alt='' src='data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}'><p class='soft'>{kind}, {escape(shown['id'])}</p></div>"
                        f"<div><p><b>{escape(question.text)}</b><br>gold answer: {question.answer}</p>{''.join(folds)}</div></article>")

    def select(name, label, options):
        return f"<label>{label} <select id='{name}'>" + "".join(f"<option value='{value}'>{words}</option>" for value, words in options) + "</select></label>"

    outcomes = (("any", "any"), ("right", "right"), ("selected", "selected for training"), ("lucky", "right by a false step"), ("wrong", "wrong"), ("unparseable", "unparseable"))
    bar = (select("kind", "questions", [(kind, kind) for kind in ("any", *TASKS, *TESTBEDS)]) + select("outcome", "responses", outcomes)
           + select("iteration", "iteration", [("any", "any"), *((part["iteration"],) * 2 for part in rounds)]))
    return ("<p class='soft'>Questions of the validation split by task type, and of each testbed; nothing of this is trained on. A step's colour is the PRM's score, from orange (0) to blue (1); "
            "rollouts: the share of pi_0's completions from there that end right; ✓ ✗: the oracle's verdict. Framed: selected for training.</p>"
            f"<div class='filter' hidden>{bar}</div>{''.join(articles)}")


def compare(folders):
    """The last rows of several finished runs on the same questions, and paired gains: of each run over the first, and, if all have the
    same rows (seeds of one command), of each row over those above it, over questions and runs. Returns a dict of plain numbers."""
    reports = [json.loads((Path(folder) / "report.json").read_text()) for folder in folders]
    for name in ("world_seed", "validation", "test", "testbed"):   # the validation split is made before the testbeds, which share no picture with it
        if len({report["config"][name] for report in reports}) > 1:
            raise ValueError(f"the runs have different --{name}: their questions cannot be paired")
    by_name = [{row["name"]: row for row in report["rows"]} for report in reports]
    last = [next(name for name in rows if name not in report["gain_over"]) for rows, report in zip(by_name, reports)]
    mine = [rows[name] | {"name": f"{Path(folder).name}: {name}"} for rows, name, folder in zip(by_name, last, folders)]
    result = {"rows": mine, "gain_over_first": {row["name"]: paired_gain((row, mine[0])) for row in mine[1:]}}
    if all(rows.keys() == by_name[0].keys() for rows in by_name) and len(set(last)) == 1:
        result["gain_in_all_runs"] = {f"{name} - {other}": paired_gain(*((rows[name], rows[other]) for rows in by_name))
                                      for i, name in enumerate(by_name[0]) for other in list(by_name[0])[:i]}
    return result


def main(argv=None):
    """Command line of this file: score the policy of a finished run again, make its report again, or compare runs."""
    parser = argparse.ArgumentParser(description="Score a saved policy on the test and the testbeds; with several runs, compare their results.")
    parser.add_argument("runs", metavar="runs/NAME", nargs="+", help="the folder of a run, or of several finished ones to compare")
    parser.add_argument("--report", action="store_true", help="only make report.html again from the files of the run, finished or not")
    parser.error = lambda message: parser.exit(2, f"evaluate.py: {message}; see python evaluate.py --help\n")
    args = parser.parse_args(argv)
    folder, tokenizer = Path(args.runs[0]), Tokenizer()
    try:
        if args.report:
            for run in args.runs:
                print(f"wrote {write_html(run)}")
            return
        if len(args.runs) > 1:
            result = compare(args.runs)
            write_json(folder / "comparison.json", result)
            print(format_table(result["rows"]))
            gains = {f"{name} - {result['rows'][0]['name']}": gain for name, gain in result["gain_over_first"].items()}
            for name, gain in (gains | {f"{len(args.runs)} runs: {name}": gain for name, gain in result.get("gain_in_all_runs", {}).items()}).items():
                print(f"{name}: {points(gain['ood'])} out of domain, {points(gain['id'])} in domain")
            return
        config = load_tensors(folder / "config.json")[1]
        splits, world_seed, max_new_tokens = config["splits"], config["world_seed"], config["max_new_tokens"]
        policy, vocabulary = load_policy(folder / "policy.safetensors", "cuda" if torch.cuda.is_available() else "cpu")
    except (OSError, ValueError, *MISSHAPEN) as error:
        parser.exit(2, f"evaluate.py: {' '.join(args.runs)}: not what a run leaves ({type(error).__name__}: {error})\n")
    if vocabulary != tokenizer.symbols:
        parser.exit(2, f"evaluate.py: {folder}/policy.json: its vocabulary is not this version's; train again with python mstar.py\n")
    world = build_world(splits, world_seed)
    row = evaluate_policy(folder.name, policy, world, tokenizer, max_new_tokens)
    print(format_table([row]))
    low, high = row["ci95"]["id"]["all"]
    print(f"in-domain accuracy {100 * row['id']['all']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")


if __name__ == "__main__":
    main(sys.argv[1:])
