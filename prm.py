"""
prm.py: the process reward model (PRM): how promising is each step of a response, and which correct
responses are worth training on.

Paper (arXiv 2412.17451v3): the reward R = H(1(a == a*) R_p), R_p = min over steps of f(step), with
    H = Top-K (section on the reward model); step labels from Monte-Carlo rollouts (Math-Shepherd,
    arXiv 2312.08935); weighted voting (section on prompts).
Read:     label_steps -> train_prm -> score -> top_k, weighted_vote -> audit   (top-down)
Departs:  only the head is trained, and it reads log-probabilities, not hidden states (see
          RewardModel). Rollouts per step and their temperature are not published: see mstar.Config.
Run:      python prm.py runs/NAME      (hold the PRM of a run against the oracle)

A step is one line of a response; it ends with its line break, the last one with the end token.
"""
import argparse
import math
import random
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import Tokenizer, build_world, oracle
from evaluate import (auc, find_answer, grade, grade_greedily, make_prompts, one_line_errors,
                      percent, sample_texts, tokens_of)
from model import (WORKERS, Example, Policy, Sampling, collate, load_network, read_json, write_json)

# ---------------------------------------------------------------- step labels

class StepLabels(NamedTuple):
    """A response and, for each of its steps, how many of the rollouts from there were correct."""
    question: int        # index in the list of questions that were labeled
    tokens: list
    correct: list        # 0 .. rollouts, one per step
    rollouts: int

    @property
    def targets(self):
        """Math-Shepherd's soft estimate: the share of rollouts that were correct, one per step."""
        return [correct / self.rollouts for correct in self.correct]

def label_steps(policy, questions, how, rollouts):
    """Monte-Carlo step labels: sample responses to each question as `how` (Sampling) says, correct
    or wrong, and label the different ones by `rollouts` (Sampling): a StepLabels for each."""
    prompts = make_prompts(policy, questions)                      # one per question
    _, responses = sample_texts(policy, prompts, how, "step labels: responses")
    different = [list(dict.fromkeys(map(tuple, group))) for group in tokens_of(responses)]
    return label_responses(policy, questions, prompts, different, rollouts)

def label_responses(policy, questions, prompts, responses, how):
    """Label the steps of given responses, a list of token tuples per question: complete every
    prefix that ends at a step, how.rollouts times, and count the correct completions. (The last
    step needs no rollout: its answer is there.) Each prefix is computed once, and rollouts of a
    question draw the same random numbers whatever their prefix: steps are compared by what they
    say, not by luck. Returns a list of StepLabels."""
    step_ends, L = policy.tokenizer.step_ends, how.rollouts        # where steps end; per prefix
    prefixes = []                                                  # [question][prefix], different
    for group in responses:
        of_question = [tokens[:end + 1] for tokens in group for end in step_ends(tokens)[:-1]]
        prefixes.append(list(dict.fromkeys(of_question)))          # each once, in order
    completions, _ = sample_texts(policy, prompts, how, "step labels: rollouts", prefixes)
    labels = []
    for i, question in enumerate(questions):
        is_correct = [grade(text, question.answer) == "correct" for text in completions[i]]
        counts = {}                                                # prefix -> correct completions
        for j, prefix in enumerate(prefixes[i]):
            counts[prefix] = sum(is_correct[j * L:(j + 1) * L])    # of its L completions
        for tokens in responses[i]:
            text = policy.tokenizer.decode(tokens)
            counts[tokens] = L * (grade(text, question.answer) == "correct")  # the whole response
            of_steps = [counts[tokens[:end + 1]] for end in step_ends(tokens)]  # one per step
            labels.append(StepLabels(i, list(tokens), of_steps, L))
    return labels

# ---------------------------------------------------------------- the model

class RewardModel(nn.Module):
    """f: pi_0 with one scalar head. The sigmoid of the head at a step's end is the step's score.

    The head reads what pi_0 itself thought of the response so far: the sum of its tokens' log-
    probabilities, the lowest one, that of the step's last word, and the number of the step. Only
    the head is trained. In trials on two seeds, heads on the hidden state, with or without training
    the whole network, knew which questions are hard, but not which of two responses to the same
    question is false (AUC 0.49 to 0.58); these four numbers do (0.70 to 0.77). A network of three
    layers sees what it expected only in its last one, too late to compare it with what came."""
    FEATURES = 4

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.policy = Policy(config, tokenizer).requires_grad_(False)  # pi_0, fixed
        self.head = nn.Linear(self.FEATURES, 1)                    # five numbers to learn

    @property
    def device(self):
        """Where the weights are."""
        return self.policy.device

    def features(self, prompts, responses, rows=128):
        """What the head reads: a Prompt and the tokens of a response, for each of n responses
        -> list (n) of (steps, FEATURES). `rows` go through at once."""
        of_image = defaultdict(list)                               # they go through side by side
        for i, prompt in enumerate(prompts):
            of_image[id(prompt.image)].append(i)
        groups = sorted(of_image.values(), key=lambda group: max(len(responses[i]) for i in group))
        order = [i for group in groups for i in group]             # short ones first: less padding
        examples = [Example(*prompts[i], list(responses[i])) for i in order]
        parts = [examples[start:start + rows] for start in range(0, len(examples), rows)]
        with ThreadPoolExecutor(WORKERS if self.device.type == "cpu" else 1) as pool:
            in_order = [steps for part in pool.map(self._features, parts) for steps in part]
        return [steps for _, steps in sorted(zip(order, in_order), key=lambda pair: pair[0])]

    @torch.no_grad()
    def _features(self, examples):
        *inputs, targets = [tensor.to(self.device) for tensor in collate(examples)]
        with self.policy.precision():
            logits = self.policy.logits(self.policy.hidden(*inputs))                   # (B, T, V)
        picked = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])     # (B, T, 1)
        log_probs = picked[..., 0].cpu()                                               # (B, T)
        so_far, lowest = log_probs.cumsum(1), log_probs.cummin(1).values               # (B, T) each
        features = []
        for row, example in enumerate(examples):
            ends = torch.tensor(self.tokenizer.step_ends(example.response))            # (steps,)
            last_word = (ends - 1).clamp(min=0)                    # it stands before the line break
            number = torch.arange(1.0, len(ends) + 1)
            features.append(torch.stack([so_far[row, ends], lowest[row, ends],
                                         log_probs[row, last_word], number], dim=1))
        return features

    def forward(self, features):
        """(n, FEATURES) -> (n,) logits."""
        return self.head(features.to(self.head.weight))[:, 0]

def train_prm(pi_0, questions, labels):
    """Train the PRM: binary cross-entropy of the head against soft labels, all at once, to the end
    (a convex problem of five numbers). The last tenth of the labeled questions, at least one, is
    held out. Returns (RewardModel, {loss; of held-out steps, of which one counts as good if more
    than half of its rollouts were correct, steps, good (their share), auc})."""
    prm = RewardModel(pi_0.config, pi_0.tokenizer).to(pi_0.device)
    prm.policy.load_state_dict(pi_0.state_dict())                  # a copy
    number = 1 + max(label.question for label in labels)
    prompts, first = make_prompts(pi_0, questions[:number]), number - max(1, number // 10)
    learned = [label for label in labels if label.question < first]  # by question, not response
    held_out = [label for label in labels if label.question >= first]
    features = torch.cat(prm.features([prompts[label.question] for label in learned],
                                      [label.tokens for label in learned])).to(prm.device)
    targets = torch.tensor([target for label in learned for target in label.targets])  # soft
    targets = targets.to(prm.device)                               # (steps,)
    if (targets > 0.5).all() or (targets <= 0.5).all():
        print("PRM       all step labels are alike: its scores will be of no use for ranking")
    mean, spread = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-3)  # scale
    nn.init.zeros_(prm.head.weight)
    nn.init.zeros_(prm.head.bias)
    optimizer = torch.optim.LBFGS(prm.head.parameters(), max_iter=200,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()                                      # LBFGS calls this many times
        logits = prm((features - mean) / spread)                   # (steps,)
        loss = F.binary_cross_entropy_with_logits(logits, targets)
        loss = loss + 1e-4 * prm.head.weight.square().sum()        # else there may be no minimum
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = closure().item()
    with torch.no_grad():                                          # fold the scaling into the head
        prm.head.bias -= (prm.head.weight[0] * mean / spread).sum()
        prm.head.weight /= spread                                  # it reads unscaled features
    scores = score(prm, [prompts[label.question] for label in held_out],
                   [[label.tokens] for label in held_out])
    scores = [s for (steps,) in scores for s in steps]             # all held-out steps
    good = [target > 0.5 for label in held_out for target in label.targets]
    print(f"PRM       {len(good):,} steps of held-out questions: AUC {percent(auc(good, scores))}; "
          f"training loss {loss:.3f}", flush=True)
    return prm, {"steps": len(good), "good": float(np.mean(good)), "auc": auc(good, scores),
                 "loss": loss}

def score(prm, prompts, responses):
    """f(s_i), scores of every step: prompts (Q), responses [Q][L] of token lists -> [Q][L] of lists
    of floats in (0, 1), one per step. Equal responses to a question are computed once."""
    different = {(q, tuple(tokens)) for q, group in enumerate(responses) for tokens in group}
    different = sorted(different)
    features = prm.features([prompts[q] for q, _ in different], [tokens for _, tokens in different])
    scores = {}
    if features:
        with torch.no_grad():
            all_steps = prm(torch.cat(features)).sigmoid().cpu()   # (steps of all,)
        for key, steps in zip(different, all_steps.split([len(steps) for steps in features])):
            scores[key] = steps.tolist()                           # of one response
    return [[scores[q, tuple(tokens)] for tokens in group] for q, group in enumerate(responses)]

def response_rewards(prm, prompts, responses):
    """R_p of responses: [Q][L] of token lists -> [Q][L] of floats."""
    return [list(map(reward_of, group)) for group in score(prm, prompts, responses)]

def reward_of(steps):
    """R_p(y) = min over steps of f(s_i): a response is as good as its weakest step (the paper's
    equation for R_p)."""
    return min(steps)

# ---------------------------------------------------------------- selection and voting

def by_question(responses):
    """[(question index, text)] -> {question index: its texts}, in order, whatever the input's."""
    groups = defaultdict(list)
    for question, text in sorted(responses):
        groups[question].append(text)                              # in order: they are sorted
    return groups

def top_k(responses, rewards, k):
    """The paper's H = Top-K: of [(question index, text)], the k of each question with the largest
    R_p, one of `rewards` for each. Neither the order of the input nor ties leave anything to
    chance: equal rewards are ordered by text. Returns a sorted list."""
    reward, kept = dict(zip(responses, rewards)), []
    for question, texts in by_question(responses).items():
        best = sorted(texts, key=lambda text: (-reward[question, text], text))[:k]  # then by text
        kept += [(question, text) for text in best]
    return sorted(kept)

def random_k(responses, k, seed):
    """The control for `top_k`: k of each question by chance."""
    rng, kept = random.Random(seed), []                            # one stream for all questions
    for question, texts in by_question(responses).items():
        kept += [(question, text) for text in rng.sample(texts, min(k, len(texts)))]
    return sorted(kept)

def weighted_vote(answers, weights):
    """The answer with the largest sum of weights (the paper's pseudo answer); the smaller one in a
    tie. None stands for "no answer found" and has no vote; None if nobody votes. With equal
    weights: majority voting."""
    votes = defaultdict(list)
    for answer, weight in zip(answers, weights):
        if answer is not None:                                     # an answer was found
            votes[answer].append(weight)
    # rounded: three votes of 0.1 tie with one of 0.3, in any order
    total = {answer: round(math.fsum(weights), 9) for answer, weights in votes.items()}
    return max(sorted(total), key=total.get, default=None)

# ---------------------------------------------------------------- the comparison with the oracle

def audit(pi_0, prm, labels, labeled, questions, max_new_tokens, n=16):
    """Hold the PRM against the oracle, what no one can do on real data, on n responses of pi_0 per
    question at temperature 1. labels: the StepLabels it was trained on, of the questions `labeled`.
    Returns plain numbers: labels, scores (`against_oracle`); selection, the share of unsound
    responses among the correct and different ones, by how they are chosen: all, the Top-1, 2, 4,
    two of each question by chance (fair beside the Top-2) or by pi_0's likelihood; verifier
    (`verify`); length (`compare_top_2`); by_question, numbers of each question, as text, for paired
    intervals."""
    prompts = make_prompts(pi_0, questions)
    how = Sampling(n, 1.0, max_new_tokens, seed=0)                 # seed 0: the same for all runs
    texts, responses = sample_texts(pi_0, prompts, how, "audit: responses")
    scores = score(prm, prompts, tokens_of(responses))
    is_sound, reward, likelihood, verdicts = {}, {}, {}, []        # of (question index, text)
    for i, question in enumerate(questions):
        for text, response, steps in zip(texts[i], responses[i], scores[i]):
            verdicts.append(oracle(question, text))                # of each line
            is_sound[i, text], reward[i, text] = all(verdicts[-1]), reward_of(steps)
            likelihood[i, text] = sum(response.log_probs)          # of the whole response
    correct = sorted((i, text) for i, text in reward
                     if grade(text, questions[i].answer) == "correct")
    rewards, likely = [reward[key] for key in correct], [likelihood[key] for key in correct]
    chosen = {"top_1": top_k(correct, rewards, 1), "top_2": top_k(correct, rewards, 2),
              "top_4": top_k(correct, rewards, 4), "likely_2": top_k(correct, likely, 2),
              "random_2": random_k(correct, 2, seed=0), "all": correct}
    selection = {}
    for name, keys in chosen.items():
        unsound = sum(not is_sound[key] for key in keys) / len(keys) if keys else None
        selection[name] = {"responses": len(keys), "unsound": unsound}
    length, of_question = compare_top_2(correct, chosen["top_2"], is_sound, len(questions))
    verifier, votes = verify(questions, texts, reward, likelihood, is_sound)
    greedy = grade_greedily(pi_0, questions, max_new_tokens, "audit: greedy")  # to compare with
    votes["greedy"] = [outcome == "correct" for outcome in greedy]
    for way, is_correct in votes.items():
        of_question[way] = " ".join(str(int(c)) for c in is_correct)  # "1 0 0 1 ..."
    label_verdicts = [oracle(labeled[label.question], pi_0.tokenizer.decode(label.tokens))
                      for label in labels]
    return {"labels": against_oracle([x.targets for x in labels], label_verdicts,
                                     [x.question for x in labels]),
            "scores": against_oracle([steps for group in scores for steps in group], verdicts,
                                     [i for i, group in enumerate(scores) for _ in group]),
            "verifier": {"greedy": float(np.mean(votes["greedy"])), **verifier}, "length": length,
            "responses": n * len(questions), "selection": selection, "by_question": of_question}

def against_oracle(values, verdicts, asked):
    """How well numbers of steps (a list per response) tell true steps from false ones: AUC against
    the oracle's verdict on the step ("step"), and on the response up to it ("so_far"). asked: the
    question of each response. "same_question": among steps at the same position of responses to the
    same question, where knowing which questions are hard does not help."""
    value, step, so_far, place = [], [], [], []
    for steps, verdict, question in zip(values, verdicts, asked):
        value += steps                                             # one number per step
        step += verdict[:len(steps)]                               # a cut text may end in a break
        so_far += [all(verdict[:position + 1]) for position in range(len(steps))]  # and all before
        place += [(question, position) for position in range(len(steps))]
    result = {"steps": len(value)}
    for name, good in (("step", step), ("so_far", so_far)):
        result[name] = {"auc": auc(good, value), "same_question": auc(good, value, place),
                        "true": float(np.mean(good)) if good else None}
    return result

def compare_top_2(correct, top_2, is_sound, num_questions):
    """Figure 2b: the Top-2 beside the other correct responses, of questions with more than two:
    (mean numbers of steps of both, {name: a number for each question, as text; "-" for none}):
    share of unsound responses and mean number of steps, of the Top-2 and of all."""
    steps, top_2, of_question = {"top_2": [], "others": []}, set(top_2), {}
    for name in ("unsound_top_2", "unsound_all", "steps_top_2", "steps_all"):
        of_question[name] = ["-"] * num_questions
    for question, texts in by_question(correct).items():
        if len(texts) > 2:                                         # else the Top-2 are all
            best = [text for text in texts if (question, text) in top_2]  # two of them
            for which, group in (("top_2", best), ("all", texts)):
                unsound = np.mean([not is_sound[question, text] for text in group])
                length = np.mean([text.count("\n") + 1 for text in group])
                of_question[f"unsound_{which}"][question] = f"{unsound:.4g}"
                of_question[f"steps_{which}"][question] = f"{length:.4g}"
            for text in texts:
                steps["top_2" if text in best else "others"].append(text.count("\n") + 1)
    length = {name: float(np.mean(group)) if group else None for name, group in steps.items()}
    return length, {name: " ".join(numbers) for name, numbers in of_question.items()}

def verify(questions, texts, reward, likelihood, is_sound):
    """Figure 2a: {N: {way: accuracy}} of picking or voting among the first N responses: best-of-N
    by R_p or by likelihood, voting weighted by R_p, majority voting, and a vote of the sound ones
    (the oracle). For the largest N also {way: is the answer correct, of each question}."""
    accuracy = {}
    for N in (1, 2, 4, 8, 16):
        if N > len(texts[0]):                                      # not so many were sampled
            break
        is_correct = defaultdict(list)
        for i, question in enumerate(questions):
            answers = [find_answer(text) for text in texts[i][:N]]  # None where there is none
            rewards = [reward[i, text] for text in texts[i][:N]]
            likely = [likelihood[i, text] for text in texts[i][:N]]
            # where nothing is sound, a plain vote
            soundness = [is_sound[i, text] + 1e-6 for text in texts[i][:N]]
            for way, answer in (("best_of_n", answers[int(np.argmax(rewards))]),
                                ("likeliest", answers[int(np.argmax(likely))]),
                                ("weighted_voting", weighted_vote(answers, rewards)),
                                ("majority_voting", weighted_vote(answers, [1] * N)),
                                ("oracle", weighted_vote(answers, soundness))):
                is_correct[way].append(answer == question.answer)  # None never is
        accuracy[str(N)] = {way: float(np.mean(values)) for way, values in is_correct.items()}
    return accuracy, is_correct

def main(argv=None):
    """Command line of this file: audit the PRM of a run; writes audit.json into its folder."""
    parser = argparse.ArgumentParser(description="Hold the PRM of a run against the oracle.")
    parser.add_argument("run", metavar="runs/NAME", help="the folder of a run")
    parser.error = lambda message: parser.exit(2, f"prm.py: {message}; see --help\n")
    folder, tokenizer = Path(parser.parse_args(argv).run), Tokenizer()
    bad_input, began = (ValueError, KeyError, TypeError), time.time()
    with one_line_errors("prm.py", f"{folder}: not the folder of a run with a PRM", *bad_input):
        config = read_json(folder / "config.json")
        pi_0 = load_network(folder / "pi_0.safetensors", tokenizer)
        prm = load_network(folder / "prm.safetensors", tokenizer, kind=RewardModel)
        labels = [StepLabels(**label) for label in read_json(folder / "labels.json")["labels"]]
        world = build_world(config["splits"], config["world_seed"])
    with one_line_errors("prm.py", f"{folder}/audit.json is as it was"):
        result = audit(pi_0, prm, labels, world["labeled"], world["test"], config["max_new_tokens"])
        write_json(folder / "audit.json", {**result, "seconds": time.time() - began})
    for name, row in result["selection"].items():
        print(f"{name:<10} {row['responses']:>6,} correct, {percent(row['unsound'])} unsound")
    for N, row in result["verifier"].items():
        if N != "greedy":
            print(f"N = {N:<6}", ", ".join(f"{way} {percent(row[way])}" for way in row))
    print("greedy    ", percent(result["verifier"]["greedy"]))
    for key, truths in (("labels", "step"), ("scores", "step"), ("scores", "so_far")):
        print(f"{key:<10} AUC {percent(result[key][truths]['auc'])} against the oracle's {truths}")

if __name__ == "__main__":
    main(sys.argv[1:])
