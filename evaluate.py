"""
evaluate.py: is an answer right, how good is a policy, and how sure are we of it.

Paper (arXiv 2412.17451v3): the binary reward 1(a == a*) (section on the reward model), greedy accuracy and Pass@K (section
    on dynamics), the columns of its tables (in-domain test; MathVista's task types; out-of-domain benchmarks).
Read:     evaluate_policy -> grade_greedily -> grade, then the statistics   (top-down)
Departs:  the in-domain test carries the task columns (the paper gives them for MathVista); the out-of-domain columns are
          our five testbeds. Answers are numbers. Intervals are ours: the paper gives none.
Run:      python evaluate.py runs/NAME      (score a saved policy again)
"""
import argparse
import math
import re
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import TASKS, TESTBEDS, Tokenizer, build_world, render
from model import Prompt, load_policy, load_tensors, sample

COLUMNS = ("ID", *TASKS, *TESTBEDS, "OOD")


# ---------------------------------------------------------------- a policy's row in the result table

def evaluate_policy(name, policy, world, tokenizer, max_new_tokens, seed=0):
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
    circle = np.random.default_rng(seed).permutation(len(tasks))    # in a random circle, everyone takes the picture of the one before
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
        responses = sample(policy, prompts, rollouts_per_question, temperature, max_new_tokens, seed, tokenizer.EOS, prefixes, streams, progress=progress)
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


def bootstrap_interval(groups, draws=2000, seed=0):
    """95 % percentile interval of the mean of group means, resampling the questions of each group (list of 1-d arrays).
    One group: an accuracy. Differences of two policies' per-question results: a paired comparison."""
    rng = np.random.default_rng(seed)
    means = np.mean([values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1) for values in map(np.asarray, groups)], axis=0)
    return [float(edge) for edge in np.percentile(means, [2.5, 97.5])]


def paired_gain(row, other):
    """How much `row` beats `other` on the same questions: {id: [gain, low, high], ood: [gain, low, high]}, 95 % intervals."""
    def difference(split):
        return np.array([(a == "r") - (b == "r") for a, b in zip(row["graded"][split], other["graded"][split])], float)
    beds = [difference(bed) for bed in TESTBEDS]
    return {"id": [float(difference("test").mean()), *bootstrap_interval([difference("test")])],
            "ood": [float(np.mean([bed.mean() for bed in beds])), *bootstrap_interval(beds)]}


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
        values = [row["id"]["all"], *(row["id"][task] for task in TASKS), *(row["ood"][bed] for bed in TESTBEDS), row["ood"]["all"]]
        lines.append(f"{row['name']:<{width}}" + "".join(f"{100 * value:>9.1f}" for value in values))
    return "\n".join(lines)


def print_report(report):
    """The result of a run on screen: the table, the controls, and last the most important number."""
    print(f"\n{format_table(report['rows'])}\n")
    for row in report["rows"]:
        print(f"{row['name']}: unparseable {share(row['unparseable'], 1)}, with shuffled images {share(row['shuffled_images'], 1)}")
    print(f"always the template's most frequent answer: {share(report['controls']['most_frequent_answer'], 1)}")
    print(f"{report['seconds'] / 60:.1f} minutes on {report['device']}")
    others = sorted(report["gain_over"], key=lambda name: name == "+ warm-up")         # warm-up last
    for key, words in (("ood", "out of domain"), ("id", "in domain")):
        for name in others:
            gain, low, high = report["gain_over"][name][key]
            print(f"{report['method']} - {name}, {words}: {100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")


def share(part, whole):
    """"12.3 %", or a dash where there is nothing to take a share of."""
    return f"{100 * part / whole:.1f} %" if whole and part is not None else "-"


def main(argv=None):
    """Command line of this file: score the policy of a finished run again."""
    parser = argparse.ArgumentParser(description="Score a saved policy on the test and the testbeds.")
    parser.add_argument("run", metavar="runs/NAME", help="the folder of a run")
    parser.error = lambda message: parser.exit(2, f"evaluate.py: {message}; see python evaluate.py --help\n")
    args = parser.parse_args(argv)
    folder = Path(args.run)
    try:
        config = load_tensors(folder / "config.json")[1]
        policy, vocabulary = load_policy(folder / "policy.safetensors", "cuda" if torch.cuda.is_available() else "cpu")
    except (OSError, ValueError) as error:
        parser.exit(2, f"evaluate.py: {folder}: not the folder of a finished run ({error})\n")
    tokenizer = Tokenizer()
    if vocabulary != tokenizer.symbols:
        parser.exit(2, f"evaluate.py: {folder}/policy.json: its vocabulary is not this version's; train again with python mstar.py\n")
    world = build_world(config["splits"], config["world_seed"])
    row = evaluate_policy(folder.name, policy, world, tokenizer, config["max_new_tokens"])
    print(format_table([row]))
    low, high = row["ci95"]["id"]["all"]
    print(f"in-domain accuracy {100 * row['id']['all']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")


if __name__ == "__main__":
    main(sys.argv[1:])
