"""
prm.py: the process reward model (PRM): how promising is each step of a response, and which correct
responses are worth training on.

Paper (arXiv 2412.17451v3): the reward R = H(1(a == a*) R_p), R_p = min over steps of f(step), with
    H = Top-K (section on the reward model); step labels from Monte-Carlo rollouts (Math-Shepherd,
    arXiv 2312.08935); weighted voting (section on prompts).
Read:     label_steps -> RewardModel, train_prm -> score -> top_k, weighted_vote -> audit
Departs:  pi_0 is fixed, and a network on top of it is trained (see RewardModel). The answer line is
          a step, too (in the paper the answer stands behind the steps). Labels are soft. Rollouts
          per step, their temperature and the loss are not published: see mstar.Config.
Run:      python prm.py runs/NAME      (hold the PRM of a run against the oracle)

A step is one line of a response; it ends with its line break, the last one (the answer) with the
end token.
"""
import argparse
import math
import random
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import oracle_of_steps, sound, world_of
from evaluate import (answer_greedily, as_text, auc, find_answer, gold_of, grade, make_prompts,
                      one_line_errors, percent, sample_texts, tokens_of)
from model import (DecoderBlock, Example, Optimizer, Policy, Sampling, adamw, available_devices,
                   batches, causal, collate, fit, load_network, precision, read_json, results_of,
                   run_command, seed_for, write_json)
from weights.public import tokenizer_for

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

def label_steps(cfg, pi_0, questions):
    """Monte-Carlo step labels: sample responses to each question at temperature 1, correct or
    wrong, and label them: {labels: a StepLabels, as a dict, for each distinct one}."""
    how = Sampling(cfg.prm_responses, 1.0, cfg.max_new_tokens, seed_for(cfg.seed, "labels"))
    rollouts = Sampling(cfg.prm_rollouts, cfg.prm_temperature, cfg.max_new_tokens, how.seed + 1)
    prompts = make_prompts(pi_0, questions)                        # one per question
    _, responses = sample_texts(pi_0, prompts, how, "step labels: responses")
    labels = label_responses(pi_0, questions, prompts, tokens_of(responses), rollouts)
    return {"labels": [label._asdict() for label in labels]}

def label_responses(policy, questions, prompts, responses, how):
    """Label the steps of responses, [question][response] of token lists: complete every prefix
    that ends at a step, how.rollouts times, and count the correct completions. (The last step needs
    no rollout: its answer is there.) Each prefix is computed once, and rollouts of a question draw
    the same random numbers whatever their prefix (common random numbers), so that steps differ by
    what they say. Returns a list of StepLabels, one for each distinct response."""
    step_ends = policy.tokenizer.step_ends
    L = how.rollouts
    responses = [list(dict.fromkeys(map(tuple, group))) for group in responses]    # each once
    prefixes = []                                                  # [question][prefix], distinct
    for group in responses:
        of_question = [tokens[:end + 1] for tokens in group for end in step_ends(tokens)[:-1]]
        prefixes.append(list(dict.fromkeys(of_question)))          # each once, in order
    completions, _ = sample_texts(policy, prompts, how, "step labels: rollouts", prefixes)
    labels = []
    for i, question in enumerate(questions):
        is_correct = [grade(text, question) == "correct" for text in completions[i]]
        counts = {}                                                # prefix -> correct completions
        for j, prefix in enumerate(prefixes[i]):
            counts[prefix] = sum(is_correct[j * L:(j + 1) * L])    # of its L completions
        for tokens in responses[i]:
            text = policy.tokenizer.text_of(tokens)
            counts[tokens] = L * (grade(text, question) == "correct")  # the whole response
            of_steps = [counts[tokens[:end + 1]] for end in step_ends(tokens)]  # one per step
            labels.append(StepLabels(i, list(tokens), of_steps, L))
    return labels

# ---------------------------------------------------------------- the model

class RewardModel(nn.Module):
    """f: a network on top of pi_0, with a scalar head. The sigmoid of the head at a step's end is
    the step's score.

    The paper's starts from the policy itself. A policy of three layers predicts a token only
    in its last one, so that no layer is left to compare the prediction with the token written (in
    trials it could not tell two responses to one question apart). So pi_0 is fixed here, and the
    network reads for each token what pi_0 expected before it (its last hidden state), the token,
    and its log-probability. The log-probability of all that is written so far, times a learned
    weight, is added to the head: pi_0 itself finds false steps less likely, and that much need not
    be learned.
    It also makes the later steps of longer responses score lower (claim C6). The reasons are those
    of our small policy; public weights get the same network."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.policy = Policy(config, tokenizer).requires_grad_(False)  # pi_0, fixed
        self.enter = nn.Linear(2 * config.width + 1, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(2))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, 1)
        self.share = nn.Parameter(torch.full((1,), 0.1))           # of the log-probability so far
        nn.init.zeros_(self.head.weight)                           # it begins as likelihood alone

    @property
    def device(self):
        """Where the weights are."""
        return self.policy.device

    def forward(self, images, prompts, lengths, owner, ids, targets):
        """A batch as `collate` makes it -> (B, T) logits: of each token of the responses,
        `targets`, as if a step ended with it."""
        with torch.no_grad():
            tokens = targets.clamp(min=0)                          # (B, T), padding is some token
            expected = self.policy.hidden(images, prompts, lengths, owner, ids)        # (B, T, C)
            log_probs = self.policy.logits(expected).log_softmax(dim=-1)               # (B, T, V)
            log_probs = log_probs.gather(2, tokens[..., None])                         # (B, T, 1)
            so_far = log_probs[..., 0].cumsum(dim=1)                                   # (B, T)
            read = torch.cat([expected, self.policy.embed(tokens), log_probs], dim=-1)
        x, T = self.enter(read).float(), ids.shape[1]              # (B, T, C), summed up in fp32
        cos, sin = self.policy.rope(torch.arange(T, device=ids.device)[None])
        for block in self.blocks:
            x, _, _ = block(x, cos, sin, causal(T, ids.device))
        return self.head(self.norm(x))[..., 0].float() + self.share * so_far

    def loss(self, images, prompts, lengths, owner, ids, targets, labels):
        """Binary cross-entropy against soft labels (B, T), -1 where no step ends, and a term for
        pairs of steps. Their sum is divided by the number of tokens, by which `backward` weighs the
        parts of a batch.

        Most of a label is how hard its question is, but re-ranking compares responses to one
        question. So to the sum is added, with logits x and labels y of the n steps of a question
        that are in one part of a batch (our choice; the 2 was chosen on validation):
            2/n  sum_ij  max(0, y_i - y_j) softplus(x_j - x_i)"""
        is_end = labels >= 0
        logits = self(images, prompts, lengths, owner, ids, targets)
        logits, soft = logits[is_end], labels[is_end]                                  # (steps,)
        total = F.binary_cross_entropy_with_logits(logits, soft, reduction="sum")
        question = owner[:, None].expand_as(labels)[is_end]                            # (steps,)
        same = question[:, None] == question                       # (steps, steps)
        better = (soft[:, None] - soft).clamp(min=0) * same        # row over column
        pairs = F.softplus(logits - logits[:, None]) * better
        total = total + 2 * (pairs / same.sum(dim=1, keepdim=True)).sum()
        return total / (targets >= 0).sum()

def train_prm(cfg, pi_0, questions, labels):
    """Train the PRM on the step labels of all but the last tenth of the questions, which are held
    out. Returns (RewardModel, {loss; of the held-out steps: steps (how many), good (the share with
    more than half of their rollouts correct), auc})."""
    torch.manual_seed(seed_for(cfg.seed, "PRM"))
    prm = RewardModel(pi_0.config, pi_0.tokenizer).to(pi_0.device)
    prm.policy.load_state_dict(pi_0.state_dict())                  # a copy
    number = 1 + max(label.question for label in labels)
    first_held_out = number - max(1, number // 10)
    prompts = make_prompts(pi_0, questions[:number])
    examples = []
    for label in labels:
        if label.question < first_held_out:                        # by question, not response
            at_end = dict(zip(prm.tokenizer.step_ends(label.tokens), label.targets))
            soft = [at_end.get(i, -1.0) for i in range(len(label.tokens))]
            examples.append(Example(*prompts[label.question], label.tokens, soft))
    updates = math.ceil(cfg.prm_epochs * len(examples) / cfg.batch_size)
    trained = [p for p in prm.parameters() if p.requires_grad]
    optimizer = Optimizer([adamw(trained, cfg.prm_lr)], cfg.lr_warmup_updates, updates)
    # the responses to a question side by side: the loss compares their steps
    rng = random.Random(seed_for(cfg.seed, "PRM"))
    stream = batches(examples, cfg.batch_size, rng, together=cfg.prm_responses)
    loss = fit(prm, optimizer, stream, updates, cfg.micro_batch, "PRM")
    held_out = [label for label in labels if label.question >= first_held_out]
    scores = score(prm, [prompts[label.question] for label in held_out],
                   [[label.tokens] for label in held_out])
    scores = [s for (steps,) in scores for s in steps]             # all held-out steps
    good = [target > 0.5 for label in held_out for target in label.targets]
    quality = auc(good, scores)                                    # None: all good, or all bad
    print(f"PRM       {len(good):,} steps of held-out questions: AUC {percent(quality)}; training "
          f"loss {loss:.3f}", flush=True)
    return prm, {"steps": len(good), "good": float(np.mean(good)), "auc": quality, "loss": loss}

def score(prm, prompts, responses, rows=128):
    """f(s_i), the scores of every step: prompts (Q), responses [Q][L] of token lists -> [Q][L] of
    lists of floats in [0, 1]. Equal responses are computed once, `rows` of them at a time."""
    distinct = {(q, tuple(tokens)) for q, group in enumerate(responses) for tokens in group}
    distinct = sorted(distinct, key=lambda pair: (len(pair[1]), *pair))  # less padding
    longest = len(distinct[-1][1]) if distinct else 1
    rows = max(1, min(rows, 2**28 // (longest * prm.config.vocabulary)))   # logits: at most 1 GB
    parts = [distinct[start:start + rows] for start in range(0, len(distinct), rows)]

    @torch.no_grad()
    def score_part(part):
        batch = collate([Example(*prompts[q], tokens) for q, tokens in part])
        with precision(prm.device):
            logits = prm(*(tensor.to(prm.device) for tensor in batch))                 # (B, T)
        return logits.cpu().double().sigmoid()

    scores = {}
    for part, of_part in zip(parts, results_of(score_part, parts, prm.device)):
        for (q, tokens), of_tokens in zip(part, of_part):          # (T,)
            scores[q, tokens] = of_tokens[prm.tokenizer.step_ends(tokens)].tolist()
    return [[scores[q, tuple(tokens)] for tokens in group] for q, group in enumerate(responses)]

def reward_of(steps):
    """R_p = min over steps of f(s_i): a response is as good as its weakest step. Takes its scores.
    Rounded to four digits (our choice): what is left is rounding noise of fp32 batches. Responses
    that begin alike up to their weakest step should tie. Of 81 such pairs 80 do, unrounded 35."""
    return float(f"{min(steps):.4g}")

def response_rewards(prm, prompts, responses):
    """R_p of each response: [Q][L] of token lists -> [Q][L] of floats in [0, 1]."""
    return [list(map(reward_of, group)) for group in score(prm, prompts, responses)]

# ---------------------------------------------------------------- selection and voting

def top_k(responses, rewards, k):
    """The paper's H = Top-K: of [(question index, text)], the k of each question with the largest
    R_p, one of `rewards` for each. The order of the input changes nothing; equal rewards are
    ordered by text (our choice). Returns a sorted list."""
    kept, places = [], Counter()                                   # how many a question has so far
    for _, (question, text) in sorted(zip([-reward for reward in rewards], responses)):
        places[question] += 1
        if places[question] <= k:
            kept.append((question, text))
    return sorted(kept)

def random_k(responses, k, seed):
    """The control for `top_k`: k of each question by chance."""
    rng, kept = random.Random(seed), []                            # one stream for all questions
    groups = defaultdict(list)
    for response in sorted(responses):
        groups[response[0]].append(response)
    for group in groups.values():
        kept += rng.sample(group, min(k, len(group)))
    return sorted(kept)

def weighted_vote(answers, weights):
    """The answer with the largest sum of weights (the paper's pseudo answer); the smaller one in a
    tie. None stands for "no answer found" and has no vote; None if nobody votes. With equal
    weights: majority voting."""
    votes = defaultdict(list)
    for answer, weight in zip(answers, weights):
        if answer is not None:                                     # an answer was found
            votes[answer].append(weight)
    total = {answer: math.fsum(weights) for answer, weights in votes.items()}
    # rounding must not break a tie of 3 x 0.1 with 0.3; relative, since weights can be 1e-20
    least = max(total.values(), default=0) * (1 - 1e-9)
    return min((answer for answer in total if total[answer] >= least), default=None)

def pseudo_answered(prm, questions, num_labeled, prompts, texts):
    """The questions, those after the first `num_labeled` with the answer that their responses vote
    for (the paper's pseudo answers). prompts (Q), texts [Q][L]. Of the hidden answer only the kind
    is used (number, letter, yes or no, text), to read the responses."""
    answered, texts = questions[:num_labeled], texts[num_labeled:]
    tokens = [list(map(prm.tokenizer.response, group)) for group in texts]
    rewards = response_rewards(prm, prompts[num_labeled:], tokens)                     # R_p
    for question, group, weights in zip(questions[num_labeled:], texts, rewards):
        answers = [find_answer(text, question) for text in group]
        vote = weighted_vote(answers, weights)                     # the pseudo answer
        answered.append(replace(question, answer="" if vote is None else vote))  # "" equals none
    return answered

# ---------------------------------------------------------------- the comparison with the oracle

def audit(pi_0, prm, labels, labeled, questions, max_new_tokens, n=16):
    """Hold the PRM against the oracle, which no one can do on real data, on n responses of pi_0 per
    question at temperature 1. labels: the StepLabels it was trained on, of the questions `labeled`.
    Returns {mean: {name: number}, by_question: {name: a number for each question, as text}}:
        greedy, best_of_N, likeliest_of_N, weighted_vote_of_N, majority_of_N (Figure 2a, there on
            validation): is the answer correct, by R_p, by likelihood or voted, of the first N
        unsound_W, steps_W (Figure 2b): share of unsound responses and mean number of steps, of the
            correct and distinct ones: W = all of them, or the top_2 or likely_2 of each question
        auc_reward, auc_likelihood: does R_p, does likelihood tell sound from unsound responses
    and auc_of_labels, auc_of_scores: do labels and scores tell the oracle's true steps. Where there
    is no oracle, of questions from files, what needs one is None."""
    prompts = make_prompts(pi_0, questions)
    how = Sampling(n, 1.0, max_new_tokens, seed=0)                 # seed 0: the same for all runs
    texts, responses = sample_texts(pi_0, prompts, how, "audit: responses")
    scores = score(prm, prompts, tokens_of(responses))
    numbers = defaultdict(list)                                    # name -> one per question
    true_steps, step_scores = [], []                               # of all responses
    for question, group, sampled, of_group in zip(questions, texts, responses, scores):
        rewards = list(map(reward_of, of_group))                   # R_p
        likely = [sum(response.log_probs) for response in sampled]  # of whole responses
        found = verify(question, group, rewards, likely)
        for name, number in (found | compare_top_2(question, group, rewards, likely)).items():
            numbers[name].append(number)
        if not question.facts:                                     # no oracle
            continue
        for response, text, steps in zip(sampled, group, of_group):
            step_scores += steps
            written = pi_0.tokenizer.steps(response.tokens)
            true_steps += oracle_of_steps(question, text, written)
    _, greedy = answer_greedily(pi_0, questions, max_new_tokens, "audit: greedy")
    numbers["greedy"] = [outcome == "correct" for outcome in greedy]
    mean = {}
    for name, values in numbers.items():                           # None: nothing to take it of
        known = [value for value in values if value is not None]
        mean[name] = float(np.mean(known)) if known else None
    true_labeled, targets = [], []
    for label in labels if labeled[0].facts else ():
        text, written = pi_0.tokenizer.decode(label.tokens), pi_0.tokenizer.steps(label.tokens)
        targets += label.targets
        true_labeled += oracle_of_steps(labeled[label.question], text, written)
    return {"mean": mean, "by_question": {name: as_text(v) for name, v in numbers.items()},
            "auc_of_labels": auc(true_labeled, targets),
            "auc_of_scores": auc(true_steps, step_scores)}

def verify(question, texts, rewards, likely):
    """Figure 2a for one question: {name: is the answer correct}, see `audit`."""
    answers = [find_answer(text, question) for text in texts]
    is_correct = {}
    for N in (1, 2, 4, 8, 16):
        if N > len(texts):                                         # not so many were sampled
            break
        for way, answer in (("best", answers[int(np.argmax(rewards[:N]))]),
                            ("likeliest", answers[int(np.argmax(likely[:N]))]),
                            ("weighted_vote", weighted_vote(answers[:N], rewards[:N])),
                            ("majority", weighted_vote(answers[:N], [1] * N))):
            is_correct[f"{way}_of_{N}"] = answer == gold_of(question)  # None never is
    return is_correct

def compare_top_2(question, texts, rewards, likely):
    """Figure 2b for one question: {name: number, or None}, see `audit`. (The paper compares the
    Top-2 with the other correct responses; here it is with all: a smaller difference.)"""
    first = {}                                                     # text -> where it comes first
    for i, text in enumerate(texts):
        if grade(text, question) == "correct":
            first.setdefault(text, i)
    is_sound, numbers = {}, {}
    if question.facts:                                             # else nobody knows
        is_sound = {text: sound(question, text) for text in first}
    for name, values in (("reward", rewards), ("likelihood", likely)):
        numbers[f"auc_{name}"] = auc(list(is_sound.values()), [values[i] for i in first.values()])
    for way, values in (("all", None), ("top_2", rewards), ("likely_2", likely)):
        keys = [(0, text) for text in first]                       # 0: all of one question
        if values:
            keys = top_k(keys, [values[i] for i in first.values()], 2)
        unsound = [not is_sound[text] for _, text in keys if is_sound]
        steps = [text.count("\n") + 1 for _, text in keys]
        numbers |= {f"unsound_{way}": float(np.mean(unsound)) if unsound else None,
                    f"steps_{way}": float(np.mean(steps)) if keys else None}
    return numbers

def main(argv=None):
    """Command line of this file: audit the PRM of a run; writes audit.json into its folder."""
    parser = argparse.ArgumentParser(description="Hold the PRM of a run against the oracle.")
    parser.add_argument("run", metavar="runs/NAME", help="the folder of a run")
    parser.error = lambda message: parser.exit(2, f"prm.py: {message}; see --help\n")
    folder, began = Path(parser.parse_args(argv).run), time.time()
    bad_input = (ValueError, KeyError, TypeError)
    with one_line_errors("prm.py", f"{folder}: not the folder of a run with a PRM", *bad_input):
        config = read_json(folder / "config.json")
        tokenizer, device = tokenizer_for(config["policy"]), available_devices()[0]
        pi_0 = load_network(folder / "pi_0.safetensors", tokenizer, device)
        prm = load_network(folder / "prm.safetensors", tokenizer, device, RewardModel)
        labels = [StepLabels(**label) for label in read_json(folder / "labels.json")["labels"]]
        world = world_of(config)
    labeled = world["labeled"][config["warmup_questions"]:]        # those after the warm-up's
    with one_line_errors("prm.py", f"{folder}/audit.json is as it was"):
        result = audit(pi_0, prm, labels, labeled, world["test"], config["max_new_tokens"])
        write_json(folder / "audit.json", {**result, "seconds": time.time() - began})
    for name, number in result["mean"].items():
        print(f"{name:<20} {'not known' if number is None else round(number, 4)}")
    print(f"AUC against the oracle's true steps: labels {percent(result['auc_of_labels'])}, scores "
          f"{percent(result['auc_of_scores'])}")

if __name__ == "__main__":
    run_command(main)
