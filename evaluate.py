"""
evaluate.py: is an answer correct, how good is a policy, and how sure are we of it.

Paper (arXiv 2412.17451v3): the binary reward 1(a == a*) (section on the reward model), greedy
    accuracy, Pass@K and Reward-Pass@K (section on dynamics), the columns of its tables (in-domain
    test; MathVista's task types; out-of-domain benchmarks).
Read:     evaluate_policy -> answer_greedily -> grade -> explore, pass_metrics -> statistics ->
          compare   (top-down)
Departs:  the in-domain test carries the task columns (the paper gives them for MathVista); the
          out-of-domain columns are our five testbeds; of questions from files they are MathVista's
          task types, scored by our grade and by MathVista's own rules. Intervals are ours.
Run:      python evaluate.py runs/NAME               (score a saved policy again; or, with --data
                                                      FILE --images DIR, on other questions)
          python evaluate.py runs/A runs/B           (compare finished runs with the first)
"""
import argparse
import math
import re
import sys
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import (MARKUP, READING, TASKS, TESTBEDS, normal_answer, oracle, picture_of, render,
                  sound, world_of)
from model import (Prompt, Sampling, available_devices, load_network, progress_bar, read_json,
                   run_command, sample)
from weights.public import tokenizer_for

# ---------------------------------------------------------------- a row of the result table

def testbeds_of(world):
    """Names of a world's testbeds: ours, or the tasks of MathVista."""
    return [split for split in world if split in TESTBEDS or split in TASKS]

def evaluate_policy(name, policy, world, max_new_tokens, direct=False):
    """A row of the result table, of greedy responses (`direct`: asked for the answer alone):
        name
        id           {all, sound, FQA, ...}: accuracy on the test; the share that is correct by a
                     `sound` text, which the reward by answers cannot see; accuracy by task
        ood          {style, ..., all}: accuracy on each testbed, and on all of them
        ci95         {id, ood}: the same as bootstrap intervals over questions
        unparseable  share of the responses to the test
        unsound      share of the correct responses to the test, by the oracle
        readings     {split: share of the written readings that are true}: how well it sees
        graded       {split: a letter per question, see `letters_of`}
        official     {ood, ci95} by MathVista's rules
    Shares are in [0, 1]; None is not known."""
    beds, unsound = testbeds_of(world), None
    graded, readings, official = {}, {}, {}                        # of each split
    for split in ("test", *beds):
        questions = world[split]
        texts, grades = answer_greedily(policy, questions, max_new_tokens, f"{name}: {split}",
                                        direct)
        graded[split] = letters_of(questions, texts, grades)
        readings[split] = true_readings(questions, texts)
        if split != "test" and questions[0].record:
            scores = [officially_correct(text, q.record) for q, text in zip(questions, texts)]
            official[split] = np.array(scores, float)              # (questions,)
    on_test = {"all": correct_in(graded["test"])}                  # column -> (questions,) 0 or 1
    if world["test"][0].facts:                                     # there is an oracle
        on_test["sound"] = correct_in(graded["test"], "s")
        if on_test["all"].any():
            unsound = float(1 - on_test["sound"].sum() / on_test["all"].sum())
    for task in TASKS:
        of_task = [question.task == task for question in world["test"]]
        if any(of_task) and task not in beds:                      # else the testbed's column
            on_test[task] = on_test["all"][of_task]
    on_bed = {bed: correct_in(graded[bed]) for bed in beds}        # each (questions,)
    (id, id_ci95), (ood, ood_ci95) = accuracies(on_test), accuracies(on_bed, with_all=True)
    scores, scores_ci95 = accuracies(official, with_all=True)
    return {"name": name, "id": id, "ood": ood, "ci95": {"id": id_ci95, "ood": ood_ci95},
            "unparseable": graded["test"].count("u") / len(graded["test"]), "unsound": unsound,
            "readings": readings, "graded": graded,
            "official": {"ood": scores, "ci95": scores_ci95} if official else None}

def true_readings(questions, texts):
    """The share of true ones among the lines that read something off the picture; None if there is
    no such line, or for questions from files, whose pictures nobody has described."""
    verdicts = []
    if not questions[0].facts:
        return None
    for question, text in zip(questions, texts):
        for line, is_true in zip(text.split("\n"), oracle(question, text)):
            if READING.fullmatch(line):
                verdicts.append(is_true)
    return sum(verdicts) / len(verdicts) if verdicts else None

def share_unsound(questions, responses):
    """Share of [(question index, text)] not `sound`. None if there are none, or no oracle."""
    if not responses or not questions[0].facts:
        return None
    return sum(not sound(questions[i], text) for i, text in responses) / len(responses)

def letters_of(questions, texts, grades):
    """A letter per question: s correct, by a `sound` text; c correct, but unsound or without an
    oracle; w wrong; u unparseable."""
    letters = ""
    for question, text, outcome in zip(questions, texts, grades):
        is_sound = outcome == "correct" and question.facts and sound(question, text)
        letters += "s" if is_sound else outcome[0]
    return letters

def correct_in(letters, these="sc"):
    """(questions,) 1.0 where the answer is correct, from the letters of a row's `graded`."""
    return np.array([letter in these for letter in letters], float)

def accuracies(columns, with_all=False):
    """{column: (questions,) 0 or 1} -> ({column: accuracy}, {column: interval}); `with_all` has a
    column `all` besides, over the questions of all columns."""
    groups = {column: [values] for column, values in columns.items()}
    if with_all and columns:
        groups["all"] = list(columns.values())
    return ({column: float(np.concatenate(values).mean()) for column, values in groups.items()},
            {column: bootstrap_interval(*values) for column, values in groups.items()})

def make_prompts(policy, questions, with_answer=False, direct=False):
    """Prompts of questions: the picture (a large one, or one from a file: a function that gives
    it) and the question, and with `with_answer` the gold answer (the paper's warm-up)."""
    size = policy.config.image_size
    prompts = []
    for question in questions:
        if question.image:
            image = partial(picture_of, question.image, size)
        elif size > 128:                       # drawn when needed: 20,000 of 512 would be 16 GB
            image = partial(render, question, size)
        else:
            image = torch.from_numpy(render(question, size))
        answer = question.answer if with_answer else None          # gold, in the prompt
        prompts.append(Prompt(image, policy.tokenizer.prompt(question.text, answer, direct)))
    return prompts

def sample_texts(policy, prompts, how, title, prefixes=None):
    """`model.sample` behind a progress bar: (texts, responses), both [question][rollout]."""
    number = sum(map(len, prefixes)) if prefixes else len(prompts)  # beginnings, each continued
    with progress_bar(how.rollouts * number, title, " responses") as bar:
        responses = sample(policy, prompts, how, prefixes, progress=bar.update)
    texts = [list(map(policy.tokenizer.text_of, group)) for group in tokens_of(responses)]
    return texts, responses

def tokens_of(responses):
    """[question][rollout] of Response -> the same of token lists."""
    return [[response.tokens for response in group] for group in responses]

def answer_greedily(policy, questions, max_new_tokens, title, direct=False):
    """(the greedy response to each question, its grade)."""
    how = Sampling(1, 0.0, max_new_tokens, seed=0)                 # temperature 0
    prompts = make_prompts(policy, questions, direct=direct)
    texts, _ = sample_texts(policy, prompts, how, title)
    texts = [text for (text,) in texts]
    return texts, [grade(text, question) for text, question in zip(texts, questions)]

# ---------------------------------------------------------------- is an answer correct

BEFORE_ANSWER = re.compile(r"(?:answer(?:\s+is\b)?|答案)\s*[:：]|answer\s+is\b", re.IGNORECASE)
INTEGER = r"[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30}"              # longer ones are no answers
# 1,000 or -3.5 or .5 or 1/2; a $ or a unit is ignored. `*+` never backtracks, so that no text, of
# however many spaces, takes long
NUMBER = re.compile(rf"\s*+\$?([+-]?(?:(?:{INTEGER})(?:\.[0-9]{{0,30}}|/0*+[1-9][0-9]{{0,29}})?"
                    r"|\.[0-9]{1,30}))[ \t]*+(?:%|°|degrees|years|[cmk]?m|k?g|ft)?\$?\.?\s*+")

def grade(text, question):
    """Binary reward 1(a == a*), with a third outcome: "correct", "wrong" or "unparseable", which is
    counted apart everywhere. Numbers are compared by value: 7, 7.0, 07 and 7 cm agree."""
    answer = find_answer(text, question)
    if answer is None:                                             # is counted apart
        return "unparseable"
    return "correct" if answer == gold_of(question) else "wrong"   # 1(a == a*)

def gold_of(question):
    """a*, as `find_answer` gives an answer: a number as a Fraction, a choice's letter, or text."""
    if isinstance(question.answer, str):
        match = NUMBER.fullmatch(question.answer)
        return Fraction(match[1].replace(",", "")) if match else question.answer
    return Fraction(question.answer)

def find_answer(text, question):
    """The answer after the last "answer:" or "answer is", of the kind that the gold one is: a
    number, with which the text must end; the letter of one of the choices, or that choice's text;
    else the rest of the line. None if there is no such answer."""
    before, *answers = BEFORE_ANSWER.split(MARKUP.sub(r"\1", text))
    if not answers:                                                # it says "answer" nowhere
        return None
    gold = gold_of(question)
    if isinstance(gold, Fraction):                                 # a number is asked for
        match = NUMBER.fullmatch(answers[-1])
        return Fraction(match[1].replace(",", "")) if match else None
    answer = normal_answer(answers[-1].strip().partition("\n")[0], question.choices)
    if question.choices:                                           # what is no letter is no choice
        return answer if len(answer) == 1 and answer.isupper() else None
    if gold in ("yes", "no"):                                      # "No, it is not"
        answer = re.split(r"\W", answer)[0]
    return answer or None

def officially_correct(text, record):
    """Is a response to a record of MathVista correct by its own rules (extract_answer.py and
    calculate_score.py of its repository), but for its questions to GPT: in their place stands what
    follows "answer:", or a response of one line itself. An empty response is then the shortest
    choice: empty everywhere scores 16.8 % on the real testmini.json (cpu-public.json)."""
    return official_prediction(official_extraction(text, record), record) == record["answer"]

def official_extraction(text, record):
    """MathVista's extraction of the answer from a response: a str, "" if there is none."""
    if record["question_type"] == "multi_choice" and text in record["choices"]:
        return text
    if quick := re.search(r'The answer is "(.*)"\.', text):        # its own quick rule
        return quick[1]
    before, *answers = BEFORE_ANSWER.split(MARKUP.sub(r"\1", text))  # as GPT would read it
    if not answers and "\n" in text.strip():                       # which of the lines?
        return ""
    return [before, *answers][-1].strip().partition("\n")[0].rstrip(".")

def official_prediction(extraction, record):
    """MathVista's normal form of an extracted answer, to be compared with the gold one; or None."""
    choices = record["choices"]
    if record["question_type"] == "multi_choice":
        extraction = extraction.strip()
        if letter := re.search(r"\(([a-zA-Z])\)", extraction):     # anywhere
            extraction = letter[1].upper()
        for i, choice in enumerate(choices):
            if extraction == chr(ord("A") + i):
                return choice
        return min(choices, key=lambda choice: edit_distance(extraction, choice))      # the first
    try:
        if record["answer_type"] == "integer":
            return str(int(float(extraction)))
        if record["answer_type"] == "float":
            return str(round(float(extraction), int(record["precision"])))
    except (ValueError, OverflowError):                            # no number, or not a finite one
        return None
    return extraction                                              # a list

def edit_distance(a, b):
    """Levenshtein distance: how many characters to insert, delete or replace."""
    row = list(range(len(b) + 1))                                  # distances of "" to parts of b
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(row[j] + 1, above[j + 1] + 1, above[j] + (x != y)))
    return row[-1]

def unique_correct(questions, texts):
    """The binary reward 1(a == a*) as a filter: ([(question index, text)] of correct responses,
    each text once per question, which is our choice; a Counter of the outcomes of all)."""
    unique, outcomes = [], Counter()
    for i, (question, group) in enumerate(zip(questions, texts)):
        grades = [grade(text, question) for text in group]
        outcomes.update(grades)                                    # correct, wrong, unparseable
        correct = [text for text, outcome in zip(group, grades) if outcome == "correct"]
        unique += [(i, text) for text in dict.fromkeys(correct)]   # the order of the responses
    return unique, outcomes

def describe_round(questions, answered, num_labeled, outcomes, correct, kept):
    """What an iteration was trained on, in the words of metrics.jsonl. answered: the questions with
    the answers graded against, pseudo answers among them."""
    unlabeled = list(zip(answered, questions))[num_labeled:]       # (voted, true)
    true_answers = sum(gold_of(voted) == gold_of(question) for voted, question in unlabeled)
    return {"num_questions": len(questions), "num_responses": outcomes.total(),
            "num_correct": outcomes["correct"], "num_unique_correct": len(correct),
            "num_kept": len(kept), "unsound_correct": share_unsound(questions, correct),
            "unsound_kept": share_unsound(questions, kept), "num_unlabeled": len(unlabeled),
            "pseudo_answers_true": true_answers / len(unlabeled) if unlabeled else None}

# ---------------------------------------------------------------- exploration

class Look(NamedTuple):
    """n responses to each of Q questions, at one temperature."""
    texts: list                # [question][n]
    responses: list            # [question][n] of Response
    is_correct: np.ndarray     # (Q, n)
    rewards: np.ndarray        # (Q, n) R_p, or None

def explore(policy, questions, temperatures, how, reward=None):
    """Sample how.rollouts (n) responses to each question at each of the temperatures, at 0 a greedy
    one, with the same random numbers at every temperature: {temperature: Look}.
    reward(prompts, [question][n] of tokens) gives [question][n] of R_p."""
    temperature_of, streams = [], []               # one of each per response to a question
    slices = {}                                    # temperature -> its part of these responses
    for temperature in temperatures:
        numbers = range(1, how.rollouts + 1) if temperature else [0]
        slices[temperature] = slice(len(streams), len(streams) + len(numbers))
        temperature_of += [temperature] * len(numbers)
        streams += numbers                                         # of random numbers
    how = how._replace(rollouts=len(streams), temperature=temperature_of, streams=streams)
    prompts = make_prompts(policy, questions)
    texts, responses = sample_texts(policy, prompts, how, "validation")
    rewards = None
    if reward:                                     # at once: temperatures share many responses
        rewards = np.array(reward(prompts, tokens_of(responses)))  # (Q, all)
    is_correct = []
    for question, group in zip(questions, texts):
        is_correct.append([grade(text, question) == "correct" for text in group])
    is_correct, looks = np.array(is_correct), {}                   # (Q, all)
    for temperature, part in slices.items():
        looks[temperature] = Look([group[part] for group in texts],
                                  [group[part] for group in responses], is_correct[:, part],
                                  None if rewards is None else rewards[:, part])
    return looks

def pass_metrics(cfg, look):
    """{metric: (Q,)} of a Look. pass_at_k: is any of all n responses correct (here k = n).
    reward_pass_at_k, for k = 1, 2, 4 and keep_top: the n are cut into groups of L, the number that
    a training question gets (a rest is left out), and the value is the mean over the groups (our
    choice: ranked among more than L, hotter sampling would look better than it is to train on)."""
    is_correct, n = look.is_correct, look.is_correct.shape[1]
    metrics = {"pass_at_1": is_correct.mean(axis=1),
               "pass_at_k": is_correct.any(axis=1).astype(float)}
    if look.rewards is None:                                       # no PRM
        return metrics
    L = min(cfg.rollouts_per_question, n)
    for k in sorted({min(k, L) for k in (1, 2, 4, cfg.keep_top)}):
        values = []                                                # [group][question]
        for j in range(0, n - L + 1, L):
            pairs = zip(is_correct[:, j:j + L], look.rewards[:, j:j + L])
            values.append([reward_pass_at_k(correct, reward, k) for correct, reward in pairs])
        metrics[f"reward_pass_at_{k}"] = np.mean(values, axis=0)
    return metrics

def best_temperature(values, current):
    """(the temperature of the largest mean, the one to take) of values {temperature: (Q,)}. It must
    beat the current one by more than the standard error of the difference, paired by question (our
    choice: the paper takes the best)."""
    mean = {t: round(float(v.mean()), 9) for t, v in values.items()}  # float noise breaks no tie
    largest = [t for t in mean if mean[t] == max(mean.values())]   # often several
    best = min(largest, key=lambda t: (abs(t - current), t))       # the nearest
    gain = values[best] - values[current]                          # (Q,)
    standard_error = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    is_clear = mean[best] - mean[current] > standard_error
    return best, best if is_clear else current

def means(by_question):
    """{metric: values of each question} -> {metric: mean}."""
    return {name: float(np.mean(values)) for name, values in by_question.items()}

# ---------------------------------------------------------------- statistics

def pass_at_k(n, c, k):
    """Chance that k responses drawn from n without replacement hold at least one of the c correct
    ones: the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374). c and k are at most n."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)               # 1 - C(n-c, k) / C(n, k)

def reward_pass_at_k(correct, rewards, k):
    """The paper's Reward-Pass@K of one question: is a correct response among the k that the reward
    ranks highest, out of all n responses, correct or wrong. Where equal rewards straddle rank k,
    each order of them is equally likely (our choice; `top_k` goes by text), and the value is the
    chance of a correct one.
    correct: n bools, rewards: n numbers, 1 <= k <= n -> a float in [0, 1]."""
    edge = sorted(rewards, reverse=True)[k - 1]                    # the reward at rank k
    above = [c for c, reward in zip(correct, rewards) if reward > edge]  # surely among the k
    tied = [c for c, reward in zip(correct, rewards) if reward == edge]  # some of them are
    return 1.0 if any(above) else pass_at_k(len(tied), sum(tied), k - len(above))

def auc(good, scores):
    """Area under the ROC curve: the chance that a good one scores above a bad one, ties counting
    half (Mann-Whitney). good: bools, scores: as many numbers. None if all are good, or none is."""
    good = np.asarray(good, bool)
    n, m = int(good.sum()), int((~good).sum())
    if not n * m:
        return None
    _, rank, times = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (times.cumsum() - (times - 1) / 2)[rank]           # 1 .. n + m; equals share it
    return float((mean_rank[good].sum() - n * (n + 1) / 2) / (n * m))

def bootstrap_interval(*groups, draws=2000):
    """95 % interval [low, high] of the mean of all groups, by bootstrap: the questions of each
    group (questions,) are drawn with replacement. Of one policy's 0s and 1s: its accuracy. Of the
    differences of two policies on the same questions: a paired comparison. It is about these
    policies only; the luck of a run is in results/tables.py, which sees several."""
    rng = np.random.default_rng(0)
    drawn = [rng.choice(values, (draws, len(values))).mean(axis=1) for values in groups]
    drawn = np.average(drawn, axis=0, weights=list(map(len, groups)))                  # (draws,)
    return np.percentile(drawn, [2.5, 97.5]).tolist()

GAINS = {"ood": "out of domain", "sound": "correct and sound", "id": "in domain"}      # as shown

def paired_gain(row, other):
    """How much a row of the result table beats another on the same questions: {id: [gain, low,
    high], ood: [gain, low, high]}, in shares of 1; and `sound`, of answers to the test that are
    correct and sound, if both have any."""
    gains, tests = {}, {"id": ["test"], "ood": testbeds_of(row["graded"])}
    if all("s" in one["graded"]["test"] for one in (row, other)):
        tests["sound"] = ["test"]
    for key, splits in tests.items():
        letters = "s" if key == "sound" else "sc"
        groups = [correct_in(row["graded"][split], letters)
                  - correct_in(other["graded"][split], letters) for split in splits]
        if groups:
            mean = float(np.concatenate(groups).mean())
            gains[key] = [mean, *bootstrap_interval(*groups)]
    return gains

# ---------------------------------------------------------------- results as text

def columns_of(row):
    """{column: value} of a row of the result table, or of its intervals (row["ci95"])."""
    values = {"ID": row["id"]["all"], **row["id"], **row["ood"], "OOD": row["ood"].get("all")}
    return {column: value for column, value in values.items()
            if column != "all" and value is not None}

def with_official(rows):
    """Rows of the result table, each followed by one with MathVista's own score of its testbeds, if
    there is one (ID stays by our grade)."""
    shown = []
    for row in rows:
        shown.append(row)
        if official := row.get("official"):
            ci95 = {"id": row["ci95"]["id"], "ood": official["ci95"]}
            shown.append({**row, "name": f"{row['name']}, by MathVista's rules",
                          "ood": official["ood"], "ci95": ci95})
    return shown

def percent(part, none="not known"):
    """"12.3 %"; or `none`, if there is no such share."""
    return none if part is None else f"{100 * part:.1f} %"

def as_text(values):
    """A number per question as one text, "-" for None: in a list, JSON would give each a line."""
    return " ".join("-" if value is None else f"{value:g}" for value in values)

def points(gain):
    """"+1.2 points [+0.3, +2.1]" of (gain, low, high)."""
    gain, low, high = (100 * number for number in gain)
    return f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}]"

def format_table(rows):
    """The result table as text: the paper's columns, accuracies in percent."""
    rows = with_official(rows)
    width = max(len(row["name"]) for row in rows)                  # of the first column
    lines = [" " * width + "".join(f"{column:>9}" for column in columns_of(rows[0]))]
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
    except (MemoryError, RuntimeError) as error:                   # of a CPU, or of a GPU
        text = str(error).lower()              # "... tried to allocate", "CUBLAS_..._ALLOC_FAILED"
        if isinstance(error, RuntimeError) and not re.search("alloc|out of memory", text):
            raise
        line, status = "out of memory", 2
        advice = ("if in training, go on by mstar.py --resume with a smaller --micro_batch; if in "
                  "sampling, begin again with a smaller --max_new_tokens")
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
    reports = [read_json(Path(folder) / "report.json") for folder in folders]
    if len({report["questions"] for report in reports}) > 1:       # checksums
        raise ValueError("the runs were tested on different questions: they cannot be paired")
    rows = []
    for folder, report in zip(folders, reports):
        row = next(row for row in report["rows"] if row["name"] == report["mine"])
        rows.append({**row, "name": f"{folder}: {row['name']}"})
    return rows, {row["name"]: paired_gain(row, rows[0]) for row in rows[1:]}

def main(argv=None):
    """Command line of this file: score the policy of a run again, or compare finished runs."""
    parser = argparse.ArgumentParser(description="Score a saved policy again, or compare runs.",
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("runs", metavar="runs/NAME", nargs="+", help="one run, or several")
    for flag, help in (("data", "score one run on this file (if ids name splits, on test)"),
                       ("images", "with pictures in this folder; broken ones are left out"),
                       ("testbed", "and on this testbed, MathVista's testmini.json")):
        parser.add_argument(f"--{flag}", metavar="PATH", help=help)
    parser.error = lambda message: parser.exit(2, f"evaluate.py: {message}; see --help\n")
    flags = vars(parser.parse_args(argv))
    folders = flags.pop("runs")
    if flags and len(folders) > 1:
        parser.error("runs are compared on the questions that they were tested on")
    if flags and not {"data", "images"} <= flags.keys():
        parser.error("--data and --images go together, and --testbed with them")
    advice = f"give folders of finished runs (not {' '.join(folders)}), of the same tests"
    with one_line_errors("evaluate.py", advice, ValueError, KeyError, TypeError):
        if len(folders) > 1:
            return print_comparison(*compare(folders))
        config = read_json(Path(folders[0]) / "config.json")
        if flags:
            config |= {"testbed": "", "skip_missing": 1, **flags, "splits": {"test": math.inf}}
        policy = load_network(Path(folders[0]) / "policy.safetensors",
                              tokenizer_for(config["policy"]), available_devices()[0])
    with one_line_errors("evaluate.py", "nothing is lost", ValueError):
        row = evaluate_policy(folders[0], policy, world_of(config), config["max_new_tokens"],
                              direct=config["method"] == "sft")
    print(format_table([row]))
    accuracy, ci95 = row["id"]["all"], row["ci95"]["id"]["all"]
    name = f"accuracy on {flags['data']}" if flags else "in-domain accuracy"
    print(f"{name} {percent(accuracy)} [{percent(ci95[0])}, {percent(ci95[1])}]")

def print_comparison(rows, gains):
    """What `compare` returns, on screen: in domain last."""
    print(format_table(rows))
    for name, gain in gains.items():
        for key, where in GAINS.items():
            if key in gain:
                print(f"{name} over {rows[0]['name']}, {where}: {points(gain[key])}")

if __name__ == "__main__":
    run_command(main)
