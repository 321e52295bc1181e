"""
prm.py: the process reward model: how promising is each step of a response, and which right responses are worth training on.

Paper (arXiv 2412.17451v3): the reward R = H(1(a == a*) R_p), R_p = min over steps of f(step), and Top-K (section on the reward
    model); step labels from Monte-Carlo rollouts (Math-Shepherd, arXiv 2312.08935); weighted voting (section on prompts).
Read:     label_steps -> label_responses -> train_prm -> score -> rerank, weighted_vote -> audit   (top-down: in the order a run uses them)
Departs:  only the head is trained, and it reads log-probabilities, not hidden states (see RewardModel). Rollouts per step and
          their temperature are not published: ours are in mstar.Config.
Run:      python prm.py runs/NAME      (audit the PRM of a run: labels and scores against the oracle, verifier against re-ranker)

A step is one line of a response; it ends with its line break, the last one with the end token.
"""
import argparse
import json
import random
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import Tokenizer, build_world, oracle
from evaluate import MISSHAPEN, auc, balanced_accuracy, find_answer, grade, grade_greedily, make_prompts, sample_texts
from model import WORKERS, Example, Policy, collate, load_policy, load_tensors, write_json


# ---------------------------------------------------------------- step labels

class StepLabels(NamedTuple):
    """A response to a question and, for each of its steps, how many of the rollouts from there were right."""
    question: int        # index in the list of questions that were labeled
    tokens: list
    ends: list           # index in `tokens` of the last token of each step
    right: list          # 0 .. rollouts, one per step
    rollouts: int


def step_ends(tokens, tokenizer):
    """Where steps end in a response's tokens: its line breaks and its last token (the end token, or where it was cut off)."""
    line_break = tokenizer.ids["\n"]
    return [i for i, token in enumerate(tokens) if token == line_break or i == len(tokens) - 1]


def label_steps(policy, questions, tokenizer, responses_per_question, rollouts, temperature, max_new_tokens, seed):
    """Monte-Carlo step labels: sample responses to each question at temperature 1, right or wrong, and label the different ones.
    Returns a list of StepLabels, one per different response."""
    prompts = make_prompts(questions, tokenizer, policy.config.image_size)
    _, responses = sample_texts(policy, prompts, tokenizer, responses_per_question, 1.0, max_new_tokens, seed, "step labels: responses")
    different = [list(dict.fromkeys(tuple(response.tokens) for response in group)) for group in responses]
    prefixes = sum(len({tokens[:end] for tokens in group for end in step_ends(tokens, tokenizer)[:-1]}) for group in different)
    print(f"PRM       {sum(map(len, different)):,} different responses to {len(questions):,} questions to label, {prefixes:,} prefixes, "
          f"{rollouts * prefixes:,} rollouts", flush=True)
    return label_responses(policy, questions, prompts, different, tokenizer, rollouts, temperature, max_new_tokens, seed + 1)


def label_responses(policy, questions, prompts, responses, tokenizer, rollouts, temperature, max_new_tokens, seed):
    """Label the steps of given responses, one list of token tuples per question: complete every prefix that ends at a step `rollouts`
    times at `temperature`; count the right completions. The last step needs no rollout: its answer is there. All prefixes of a
    question share its prefill, and each prefix is computed once. Rollouts of a question use the same random numbers whatever
    their prefix: two steps are compared by what they say, not by luck. Returns a list of StepLabels."""
    prefixes = [list(dict.fromkeys(tokens[:end + 1] for tokens in group for end in step_ends(tokens, tokenizer)[:-1])) for group in responses]
    completed, _ = sample_texts(policy, prompts, tokenizer, rollouts, temperature, max_new_tokens, seed, "step labels: rollouts", prefixes=prefixes)
    labels = []
    for i, question in enumerate(questions):
        right = [grade(text, question.answer) == "right" for text in completed[i]]
        of_prefix = {prefix: sum(right[j * rollouts:(j + 1) * rollouts]) for j, prefix in enumerate(prefixes[i])}
        for tokens in responses[i]:
            ends = step_ends(tokens, tokenizer)
            last = rollouts * (grade(tokenizer.decode(tokens), question.answer) == "right")
            labels.append(StepLabels(i, list(tokens), ends, [of_prefix[tokens[:end + 1]] for end in ends[:-1]] + [last], rollouts))
    return labels


def estimate(label, how):
    """Targets of a response's steps: "soft" the share of rollouts that were right, "hard" 1 if any was (Math-Shepherd). On
    validation they did alike: Reward-Pass@2 62.8 and 51.3 % with soft, 64.0 and 51.2 % with hard (trials on two seeds)."""
    return [right / label.rollouts if how == "soft" else float(right > 0) for right in label.right]


# ---------------------------------------------------------------- the model

class RewardModel(nn.Module):
    """f: pi_0 with one scalar head. The sigmoid of the head, read at the last token of a step, is the step's score.

    The head reads what pi_0 itself thought of the words so far: at a step's end, the sum of their log-probabilities, the lowest
    one, that of the step's last word, and the number of the step. Only the head is trained. In trials on two seeds, heads on the
    hidden state, with or without training the whole network on the labels, knew which questions are hard, but not which of
    two responses to the same question is false (AUC 0.49 to 0.58); these four numbers do (0.70 to 0.77). A network of three
    layers sees what it expected only in its last one, too late to hold it against what was then written."""
    FEATURES = 4

    def __init__(self, config):
        super().__init__()
        self.config, self.policy, self.head = config, Policy(config).requires_grad_(False), nn.Linear(self.FEATURES, 1)

    def features(self, prompts, responses, tokenizer, rows=128):
        """What the head reads: a Prompt and the tokens of a response, for each of n responses -> list (n) of (steps, FEATURES).
        An image is read once per batch of `rows` for all its neighbours in the list."""
        found, device = [None] * len(responses), self.policy.device
        groups = defaultdict(list)                                 # the responses to one image go through together
        for i, prompt in enumerate(prompts):
            groups[id(prompt.image)].append(i)
        order = [i for group in sorted(groups.values(), key=lambda group: max(len(responses[i]) for i in group)) for i in group]

        @torch.no_grad()
        def read(batch):
            *given, targets = (part.to(device) for part in collate([Example(*prompts[i], list(responses[i])) for i in batch]))
            with self.policy.precision():
                logits = self.policy.logits(self.policy.hidden(*given))
            words = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0].cpu()          # (B, T): log p of each token
            ends = [step_ends(responses[i], tokenizer) for i in batch]
            row, end = torch.tensor([(row, end) for row, places in enumerate(ends) for end in places]).T
            number = torch.tensor([float(n) for places in ends for n, _ in enumerate(places, 1)])
            before = (end - 1).clamp(min=0)                                                                  # the word before the line break
            steps = torch.stack([words.cumsum(1)[row, end], words.cummin(1).values[row, end], words[row, before], number], dim=1)
            for i, part in zip(batch, steps.split([len(places) for places in ends])):
                found[i] = part

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(read, (order[start:start + rows] for start in range(0, len(order), rows))))
        return found

    def forward(self, features):
        """(n, FEATURES) -> (n,) logits."""
        return self.head(features.to(self.head.weight))[:, 0]


def train_prm(policy, questions, labels, tokenizer, how):
    """Train the PRM: binary cross-entropy of the head against the labels, all at once, to the end (a convex problem of five
    numbers). The labels of the last tenth of the questions are held out. Returns (RewardModel, metrics): `loss` is that of the
    training, the others are of the held-out steps, of which one counts as good if more than half of its rollouts were right. At least two questions are needed."""
    prm = RewardModel(policy.config).to(policy.device)
    prm.policy.load_state_dict(policy.state_dict())
    prompts = make_prompts(questions, tokenizer, policy.config.image_size)
    first = len(questions) - max(1, len(questions) // 10)
    held_out, learned = ([label for label in labels if (label.question >= first) == out] for out in (True, False))
    given = torch.cat(prm.features([prompts[label.question] for label in learned], [label.tokens for label in learned], tokenizer)).to(policy.device)
    targets = torch.tensor([target for label in learned for target in estimate(label, how)], device=policy.device)
    if len({target > 0.5 for target in targets.tolist()}) < 2:
        print("PRM       all step labels are alike: nothing to tell apart, the scores will be of no use for ranking")
    mean, spread = given.mean(dim=0), given.std(dim=0, correction=0).clamp(min=1e-3)
    nn.init.zeros_(prm.head.weight)
    nn.init.zeros_(prm.head.bias)
    optimizer = torch.optim.LBFGS(prm.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(prm((given - mean) / spread), targets) + 1e-4 * prm.head.weight.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure) and closure().item()
    with torch.no_grad():                                          # fold the scaling into the head
        prm.head.bias -= (prm.head.weight[0] * mean / spread).sum()
        prm.head.weight /= spread
    scores = score(prm, [prompts[label.question] for label in held_out], [[label.tokens] for label in held_out], tokenizer)
    good = np.array([right > label.rollouts / 2 for label in held_out for right in label.right])
    scored = np.array([s for group in scores for s in group[0]])
    return prm, {"steps": len(good), "good": float(good.mean()), "auc": auc(good, scored),
                 "balanced_accuracy": balanced_accuracy(good, scored > 0.5), "loss": loss}


def score(prm, prompts, responses, tokenizer, rows=128):
    """Scores of every step: prompts (Q), responses [Q][L] of token lists -> [Q][L] of lists of floats in (0, 1), one per step.
    Equal responses to a question are computed once. R_p of a response is the `min` of its list (the paper's equation for R_p)."""
    distinct = sorted({(q, tuple(tokens)) for q, group in enumerate(responses) for tokens in group})
    features = prm.features([prompts[q] for q, _ in distinct], [tokens for _, tokens in distinct], tokenizer, rows)
    with torch.no_grad():
        given = prm(torch.cat(features)).sigmoid().cpu().split([len(steps) for steps in features]) if features else []
    scores = {item: steps.tolist() for item, steps in zip(distinct, given)}
    return [[scores[q, tuple(tokens)] for tokens in group] for q, group in enumerate(responses)]


# ---------------------------------------------------------------- selection

def rerank(kept, rewards, select, keep_top, threshold, seed):
    """The paper's H: which right responses are trained on. kept: [(question index, text)], right and different ones;
    rewards: R_p of each. `select`: "all", "top" (the keep_top of each question with the largest R_p), "threshold" (R_p above
    it), "random" (keep_top of each question by chance). Neither the order of `kept` nor ties leave anything to chance: equal
    rewards are ordered by text. Returns a sorted list."""
    groups = defaultdict(list)
    for (question, text), reward in sorted(zip(kept, rewards)):
        groups[question].append((-reward, text))
    rng, chosen = random.Random(seed), []
    for question, group in groups.items():
        picked = {"all": group, "top": sorted(group)[:keep_top], "threshold": [g for g in group if -g[0] > threshold],
                  "random": rng.sample(group, min(keep_top, len(group)))}[select]
        chosen += [(question, text) for _, text in picked]
    return sorted(chosen)


def weighted_vote(answers, weights):
    """The answer with the largest sum of weights (the paper's pseudo answer); None stands for "no answer found" and has no
    vote; None if nobody votes. With equal weights: majority voting. A tie goes to the smaller answer."""
    sums = defaultdict(float)
    for answer, weight in zip(answers, weights):
        if answer is not None:
            sums[answer] += weight
    return max(sorted(sums), key=lambda answer: sums[answer], default=None)


# ---------------------------------------------------------------- audit: what no one can do on real data

def audit(policy, prm, labels, questions, labeled, tokenizer, max_new_tokens, n=16):
    """Hold the PRM against the oracle, on n responses of `policy` (pi_0, which it was made for) per question at temperature 1.
    labels: the StepLabels it was trained on, of the questions `labeled`. Returns a dict of plain numbers:

    labels, scores: AUC and balanced accuracy (cut at 1/2) of step labels and of PRM scores against two truths of a step:
        "step", the oracle finds this step true, and "so_far", it finds this and all earlier steps true; also by position.
    selection: share of right and different responses with a false step: all of them, the Top-1, 2, 4, and 2 of each question by
        chance (the fair comparison for the Top-2) or by the policy's likelihood of the whole response.
    verifier: accuracy at N = 1, 2, 4, 8, 16 of best-of-N by R_p and by likelihood, weighted and majority voting, and best-of-N
        by the oracle ("all steps true", then a vote), beside greedy: the paper's Figure 2a.
    length: mean number of steps of the Top-2 and of the other right responses, where there are others: its Figure 2b.
    by_question: numbers of each question, for paired comparisons, as text: is the answer right of greedy and of each way at N = n; mean
        false steps (shares of responses) and numbers of steps of the Top-2 and of all right and different ones ("-": fewer than three)."""
    prompts = make_prompts(questions, tokenizer, policy.config.image_size)
    texts, responses = sample_texts(policy, prompts, tokenizer, n, 1.0, max_new_tokens, 0, "audit: responses")
    scores = score(prm, prompts, [[response.tokens for response in group] for group in responses], tokenizer)
    truths = [[oracle(question, text) for text in group] for question, group in zip(questions, texts)]
    result = {"responses": n * len(questions),
              "labels": against_truth([[right / label.rollouts for right in label.right] for label in labels],
                                      [oracle(labeled[label.question], tokenizer.decode(label.tokens)) for label in labels],
                                      [label.question for label in labels]),
              "scores": against_truth([steps for group in scores for steps in group], [truth for group in truths for truth in group],
                                      [i for i, group in enumerate(scores) for _ in group])}
    # re-ranking
    true = {(i, text): all(truth) for i, group in enumerate(texts) for text, truth in zip(group, truths[i])}
    reward = {(i, text): min(steps) for i, group in enumerate(texts) for text, steps in zip(group, scores[i])}
    kept = sorted((i, text) for i, text in reward if grade(text, questions[i].answer) == "right")
    rewards = [reward[item] for item in kept]
    likely = {(i, text): sum(response.log_probs) for i, group in enumerate(texts) for text, response in zip(group, responses[i])}
    chosen = {**{f"top_{k}": rerank(kept, rewards, "top", k, 0, 0) for k in (1, 2, 4)},
              "likely_2": rerank(kept, [likely[item] for item in kept], "top", 2, 0, 0),
              "random_2": rerank(kept, rewards, "random", 2, 0, 0), "all": kept}
    result["selection"] = {name: {"responses": len(items), "false_step": float(np.mean([not true[item] for item in items])) if items else None}
                           for name, items in chosen.items()}
    top = set(chosen["top_2"])
    of_question = [[text for j, text in kept if j == i] for i in range(len(questions))]
    crowded = [(i, group) for i, group in enumerate(of_question) if len(group) > 2]
    steps = {name: [text.count("\n") + 1 for i, group in crowded for text in group if ((i, text) in top) == inside]
             for name, inside in (("top_2", True), ("others", False))}
    result["length"] = {name: float(np.mean(lengths)) if lengths else None for name, lengths in steps.items()}

    def means(value, inside):
        """Of each question: the mean over its Top-2, or over all of its right responses."""
        groups = [[value(i, text) for text in group if len(group) > 2 and (not inside or (i, text) in top)] for i, group in enumerate(of_question)]
        return " ".join(f"{np.mean(group):.4g}" if group else "-" for group in groups)

    result["by_question"] = {f"{name}_{which}": means(value, which == "top_2") for which in ("top_2", "all") for name, value in (
        ("false", lambda i, text: not true[i, text]), ("steps", lambda i, text: text.count("\n") + 1))}
    # verification
    answers = [[find_answer(text) for text in group] for group in texts]
    rewards = [[min(steps) for steps in group] for group in scores]
    perfect = [[float(all(truth)) + 1e-6 for truth in group] for group in truths]
    greedy = [grade == "right" for grade in grade_greedily(policy, questions, tokenizer, max_new_tokens, "audit: greedy")]
    result["verifier"], given = {"greedy": float(np.mean(greedy))}, {}
    for N in (k for k in (1, 2, 4, 8, 16) if k <= n):
        given = {"best_of_n": [a[int(np.argmax(r[:N]))] for a, r in zip(answers, rewards)],
                 "likeliest": [a[int(np.argmax([likely[i, text] for text in group[:N]]))] for i, (a, group) in enumerate(zip(answers, texts))],
                 "weighted_voting": [weighted_vote(a[:N], r[:N]) for a, r in zip(answers, rewards)],
                 "majority_voting": [weighted_vote(a[:N], [1.0] * N) for a in answers],
                 "oracle": [weighted_vote(a[:N], p[:N]) for a, p in zip(answers, perfect)]}
        given = {way: [answer == question.answer for answer, question in zip(answers, questions)] for way, answers in given.items()}
        result["verifier"][N] = {way: float(np.mean(right)) for way, right in given.items()}
    result["by_question"] |= {way: " ".join(f"{v:d}" for v in right) for way, right in (given | {"greedy": greedy}).items()}
    return result


def against_truth(values, truths, asked):
    """How well numbers of steps (lists per response) tell true steps from false ones: AUC and balanced accuracy against the
    oracle's verdict on the step ("step") and on the response up to it ("so_far"), over all steps and by position. `asked`: the
    question of each response. "same_question" is the AUC over pairs of steps at the same position of responses to the same
    question: knowing which questions are hard, and which steps are late, does not help there."""
    rows = [(j, value, truth[j], all(truth[:j + 1]), q) for steps, truth, q in zip(values, truths, asked) for j, value in enumerate(steps)]
    result = {"steps": len(rows)}
    for name, column in (("step", 2), ("so_far", 3)):
        for position in ("all", *range(1, 9)):
            at = [row for row in rows if position in ("all", row[0] + 1)]
            good, value = [row[column] for row in at], np.array([row[1] for row in at])
            result.setdefault(name, {})[position] = {"auc": auc(good, value), "balanced_accuracy": balanced_accuracy(good, value > 0.5),
                                                     "true": float(np.mean(good)) if good else None}
        result[name]["all"]["same_question"] = auc([row[column] for row in rows], [row[1] for row in rows], [(row[4], row[0]) for row in rows])
    return result


def format_audit(result):
    """The audit as text tables."""
    lines = ["                      AUC against the oracle (balanced accuracy in %), steps in all and by position"]
    for key, words in (("labels", "Monte-Carlo labels"), ("scores", "PRM scores")):
        for truth in ("step", "so_far"):
            same = result[key][truth]["all"]["same_question"]
            cells = [f"{place}: " + ("-" if value["auc"] is None else f"{value['auc']:.2f} ({100 * value['balanced_accuracy']:.0f})")
                     for place, value in result[key][truth].items()]
            cells.append(f"same question and position: {'-' if same is None else format(same, '.2f')}")
            lines.append(f"{words}, {truth.replace('_', ' '):<7} " + "  ".join(cells))
    lines.append("\nright and different responses with a false step")
    lines += [f"  {name:<9} {100 * v['false_step']:5.1f} % of {v['responses']:,}" for name, v in result["selection"].items() if v["responses"]]
    ways = ("best_of_n", "likeliest", "weighted_voting", "majority_voting", "oracle")
    lines.append(f"\naccuracy by N (greedy {100 * result['verifier']['greedy']:.1f})" + "".join(f"{way:>17}" for way in ways))
    lines += [f"  N = {N:<21}" + "".join(f"{100 * row[way]:17.1f}" for way in ways) for N, row in result["verifier"].items() if N != "greedy"]
    length = result["length"]
    if length["others"]:
        lines.append(f"\nsteps per response: Top-2 {length['top_2']:.2f}, other right ones {length['others']:.2f}")
    return "\n".join(lines)


def main(argv=None):
    """Command line of this file: audit the PRM of a finished run; writes audit.json into its folder."""
    parser = argparse.ArgumentParser(description="Audit the process reward model of a run against the oracle.")
    parser.add_argument("run", metavar="runs/NAME", help="the folder of a run")
    parser.error = lambda message: parser.exit(2, f"prm.py: {message}; see python prm.py --help\n")
    folder = Path(parser.parse_args(argv).run)
    device, tokenizer = "cuda" if torch.cuda.is_available() else "cpu", Tokenizer()
    try:
        config = load_tensors(folder / "config.json")[1]
        policy, vocabulary = load_policy(folder / "warmup.safetensors", device)
        prm, _ = load_policy(folder / "prm.safetensors", device, RewardModel)
        labels = [StepLabels(**label) for label in json.loads((folder / "labels.json").read_text())]
        splits, world_seed, max_new_tokens = config["splits"], config["world_seed"], config["max_new_tokens"]
    except (OSError, ValueError, *MISSHAPEN) as error:
        parser.exit(2, f"prm.py: {folder}: not the folder of a run with a PRM ({type(error).__name__}: {error})\n")
    if vocabulary != tokenizer.symbols:
        parser.exit(2, f"prm.py: {folder}/warmup.json: its vocabulary is not this version's; train again with python mstar.py\n")
    world = build_world(splits, world_seed)
    result = audit(policy, prm, labels, world["test"], world["labeled"], tokenizer, max_new_tokens)
    write_json(folder / "audit.json", result)
    print(format_audit(result))
    auc_so_far = result["scores"]["so_far"]["all"]["auc"]
    print(f"PRM scores against 'all steps so far are true': AUC {'-' if auc_so_far is None else round(auc_so_far, 3)}")


if __name__ == "__main__":
    main(sys.argv[1:])
