"""
mstar.py: self-evolving training, from a base model to a policy that reasons. The story starts here.

Paper (arXiv 2412.17451v3, "Diving into Self-Evolving Training for Multimodal Reasoning"): warm-up,
    then rounds of generate (sample L responses per question) and improve (keep those the reward
    accepts, SFT on them), with weights, optimizer and schedule carried from round to round:
    "Continuous Self-Evolving". M-STaR adds a process reward model (prm.py) to the filter and
    chooses the sampling temperature by Reward-Pass@K (choose_temperature).
Read:     Config, METHODS -> self_evolve (the paper's algorithm) -> what it calls -> the stages
          before it (warm-up, direct SFT) -> a run and its folder -> command line
Departs:  the base is our own, of 0.8 M parameters (weights/base.py), the paper's a pretrained LMM;
          learning rates are larger (there 1e-6, for 8B), rounds smaller (6.25 % of the questions,
          there 25 %, chosen on validation); training is counted in updates. Smaller departures
          are named where they are made: questions_for_iteration; best_temperature, pass_metrics,
          unique_correct (evaluate.py); RewardModel, reward_of, top_k (prm.py).
Run:      python mstar.py [--preset NAME] [--method mstar] [--seed N] [--out runs/NAME] ...
          python mstar.py --resume runs/NAME
"""
import argparse
import copy
import json
import math
import random
import re
import shutil
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch

from data import FULL_SIZES, TESTBEDS, world_of
from evaluate import (as_text, auc, best_temperature, bootstrap_interval, describe_round,
                      evaluate_policy, explore, make_prompts, means, one_line_errors, pass_metrics,
                      percent, sample_texts, share_unsound, unique_correct)
from model import (RANK, WORKERS, Example, Optimizer, Policy, Sampling, adamw, available_devices,
                   barrier, batches, broadcast, fit, has_bf16, load, load_network, read_json,
                   run_command, save, seed_for, write_json, write_whole)
from prm import (RewardModel, StepLabels, audit, label_steps, pseudo_answered, random_k,
                 response_rewards, top_k, train_prm)
from results.report import make_report, print_line, print_report, write_page, write_samples
from weights.base import RECIPES, train_base
from weights.public import is_public, load_policy, tokenizer_for

GRID = tuple(round(0.3 + 0.1 * i, 1) for i in range(14))           # a sweep's T: 0.3 .. 1.6

def setting(default, help, least=1, most=2**31, choices=None):
    """A field of Config, with what --help says of it and which values make sense."""
    return field(default=default, metadata=dict(help=help, least=least, most=most, choices=choices))

@dataclass
class Config:
    """Every value that a run depends on. Each field is a flag; typed ones replace the preset's."""
    out: str = setting("", "folder of the run; empty: runs/PRESET-METHOD-seedN, a number if taken")
    preset: str = setting("cpu", "sizes; gpu where CUDA is found")
    method: str = setting("mstar", "the main method, one of --arms; without them it runs alone")
    arms: str = setting("", "methods to compare, comma-separated, from one pi_0 and one PRM; "
                        "empty: --method alone, or if that is not typed, the main job's four")
    seed: int = setting(0, "of weights, order of the data, sampling", 0)
    device: str = setting("", "empty: cuda, then mps, then cpu")
    # the world: our own, or questions from files
    world_seed: int = setting(0, "of pictures and questions, the same for all --seed", 0)
    labeled: int = setting(8000, "training questions with answers (and as many unlabeled ones)", 3)
    validation: int = setting(250, "validation questions")
    test: int = setting(750, "in-domain test questions", 5)
    testbed_questions: int = setting(250, "questions of each of our out-of-domain testbeds")
    data: str = setting("", "file of questions in MathV360K's form, in place of our world")
    images: str = setting("", "the folder of their pictures, and of those of --testbed")
    testbed: str = setting("", "MathVista's testmini.json, in place of our testbeds")
    skip_missing: int = setting(0, "1: leave out missing or broken records and pictures", 0, 1)
    # the base policy
    policy: str = setting("weights/base.safetensors", "what --method base wrote; a folder with "
                          "public weights; or scratch: made first")
    recipe: str = setting("cpu", "how a base is made from scratch", choices=tuple(RECIPES))
    # warm-up
    warmup_questions: int = setting(2000, "labeled questions that the base explains, given answers")
    warmup_rollouts: int = setting(4, "explanations of each", most=1000)
    warmup_updates: int = setting(200, "updates on those that are correct")
    warmup_lr: float = setting(5e-4, "learning rate, also of direct SFT", 1e-9)
    # process reward model
    prm_questions: int = setting(4000, "labeled questions after the warm-up's, for step labels "
                                 "(paper: about 50,000 of 180,000)", 2)
    prm_responses: int = setting(4, "responses per question", most=1000)
    prm_rollouts: int = setting(8, "completions per step", most=1000)
    prm_temperature: float = setting(0.6, "temperature of the completions", 0.01, 100)
    prm_epochs: float = setting(3.0, "passes over the labeled responses", 1e-9)
    prm_lr: float = setting(1e-3, "learning rate of the PRM, decayed", 1e-9)
    # self-evolving
    evolve_questions: int = setting(0, "ask only the last so many of each split; 0: all", 0)
    # its switches
    start_from: str = setting("last", "weights that a round starts from", choices=("last", "pi_0"))
    optimizer: str = setting("inherit", "optimizer state and schedule at each iteration",
                             choices=("inherit", "reset"))
    interval: float = setting(0.0625, "share of the questions per round (paper: 0.25)", 1e-9, 1)
    select: str = setting("all", "which correct responses are trained on",
                          choices=("all", "top", "threshold", "random"))
    keep_top: int = setting(2, "responses per question that top and random keep")
    threshold: float = setting(0.2, "threshold keeps what has a larger R_p (paper: unknown)", 0, 1)
    unlabeled: str = setting("none", "take half of the questions from the unlabeled split",
                             choices=("none", "vote", "true_answers"))
    mix_in: float = setting(0.0, "share of the iterations before unlabeled questions join", 0, 0.99)
    temperature: str = setting("1.0", "of sampled responses: a number, or adaptive (1.0 at first)")
    adapt_by: str = setting("reward_pass_at_k", "what a sweep maximises (k: keep_top, or all L)",
                            choices=("reward_pass_at_k", "pass_at_k"))
    sweep_every: int = setting(2, "iterations from one sweep of T to the next (paper: 2, but with "
                               "larger rounds)")
    watches: int = setting(0, "looks at every T of a sweep, evenly spaced, and one at pi_0", 0)
    epochs: float = setting(2.0, "times each question is asked (rounded to whole rounds)", 1e-9)
    rollouts_per_question: int = setting(8, "L; the paper: 16", most=1000)
    evolve_updates: int = setting(1600, "of all iterations, equal for every method (paper: 10,000)")
    evolve_lr: float = setting(3e-4, "learning rate, constant as in the paper (there 1e-6)", 1e-9)
    # everywhere
    batch_size: int = setting(32, "examples per update (paper: 128)")
    micro_batch: int = setting(16, "examples of a batch at once; fewer need less memory, and let "
                               "more cores share a batch (the PRM compares responses in one part)")
    lr_warmup_updates: int = setting(20, "linear start of every schedule")
    validations: int = setting(8, "validations, evenly spaced, and one of pi_0")
    monitor_rollouts: int = setting(16, "n of pass@k on validation", most=1000)
    max_new_tokens: int = setting(64, "longest response; true texts have up to 48", most=1000)

    @property
    def splits(self):
        """Sizes of the splits, for data.world_of."""
        base = RECIPES[self.recipe].questions if self.policy == "scratch" else 0
        return {"base": base, "labeled": self.labeled,
                "unlabeled": self.labeled, "validation": self.validation, "test": self.test,
                **dict.fromkeys(TESTBEDS, self.testbed_questions)}

    @property
    def questions_per_iteration(self):
        """Questions asked per iteration, labeled or not."""
        return max(1, round(self.interval * (self.evolve_questions or self.labeled)))

    @property
    def iterations(self):
        """Rounds of self-evolving."""
        asked = self.epochs * (self.evolve_questions or self.labeled)
        return max(1, round(asked / self.questions_per_iteration))

    def due(self, iteration, times):
        """Is one of `times` looks at the policy, spread evenly over the iterations, due after this
        one? There is always one after the last, and, if times > 0, one more at iteration 0."""
        done = iteration * times // self.iterations
        before = (iteration - 1) * times // self.iterations        # below 0 at iteration 0
        return done > before

    @property
    def needs_prm(self):
        """Does an arm with these switches ask the PRM for anything?"""
        adapts = self.temperature == "adaptive" and self.adapt_by == "reward_pass_at_k"
        asks = self.select in ("top", "threshold") or self.unlabeled == "vote" or adapts
        return asks and self.method != "sft"                       # which has no rounds

# The rows of the paper's tables, as differences of switches from the defaults above.
METHODS = {
    "base": {},                                                    # makes no more than the base
    "sft": {},                                                     # direct answers; its own stage
    # Table 1: how one goes on from round to round, and how large a round is
    "iterative_rft": {"interval": 1.0, "optimizer": "reset"},
    # (the policy of rest_em keeps the updates of its last round alone)
    "rest_em": {"interval": 1.0, "optimizer": "reset", "start_from": "pi_0"},
    "continuous_100": {"interval": 1.0},
    "continuous_50": {"interval": 0.5},
    "continuous_25": {"interval": 0.25},                           # the paper's choice
    "continuous_12.5": {"interval": 0.125},
    "continuous_6.25": {"interval": 0.0625},
    "continuous": {},                                              # the preset's: 6.25 % in cpu
    # Table 2: which correct responses are trained on
    "random_2": {"select": "random"},
    "threshold": {"select": "threshold"},
    "top_1": {"select": "top", "keep_top": 1},
    "prm": {"select": "top"},                                      # Top-2: + PRM re-rank
    "top_4": {"select": "top", "keep_top": 4},
    # Table 3: unlabeled questions, with true or voted answers, after a share of the iterations
    "true_answers": {"unlabeled": "true_answers"},
    "true_answers_prm": {"unlabeled": "true_answers", "select": "top"},
    "vote_0": {"unlabeled": "vote", "select": "top"},
    "vote_25": {"unlabeled": "vote", "select": "top", "mix_in": 0.25},
    "vote_50": {"unlabeled": "vote", "select": "top", "mix_in": 0.5},
    "vote_75": {"unlabeled": "vote", "select": "top", "mix_in": 0.75},
    # Table 4: what the temperature is chosen by
    "mstar": {"select": "top", "temperature": "adaptive"},
    "mstar_pass_at_k": {"select": "top", "temperature": "adaptive", "adapt_by": "pass_at_k"},
    # Figures 3 to 5: the same training, seen at every temperature
    "prm_watched": {"select": "top", "watches": 4},
    "mstar_watched": {"select": "top", "temperature": "adaptive", "watches": 4},
}
SWITCHES = sorted(set(chain.from_iterable(METHODS.values())))      # names of fields
COMPARED = "sft,continuous,prm,mstar"                              # what `python mstar.py` runs
ROW_NAMES = {"pi_0": "pi_0 (warm-up)", "sft": "SFT (direct answers)", "prm": "+ PRM re-rank",
             "mstar": "M-STaR"}                                    # others have their own
PRESETS = {
    "cpu": {},                                                     # the defaults: 2 cores
    # an eighth of the questions, each asked in all of 16 rounds: training saturates (Figures 3, 4)
    "few": dict(evolve_questions=1000, epochs=16.0, interval=1.0, evolve_updates=3200),
    "test": dict(policy="scratch", recipe="test", labeled=48, validation=10, test=20,
                 testbed_questions=5, warmup_questions=10, warmup_rollouts=2, warmup_updates=3,
                 prm_questions=20, prm_rollouts=2, prm_epochs=1.0, interval=0.25, epochs=1.0,
                 rollouts_per_question=2, evolve_updates=4, batch_size=8, micro_batch=4,
                 lr_warmup_updates=2, monitor_rollouts=4, max_new_tokens=24),
    # sized on paper for one GPU of 16-24 GB and an hour; not measured yet
    "gpu": dict(policy="scratch", recipe="gpu", labeled=20000, warmup_questions=5000,
                warmup_lr=3e-4, rollouts_per_question=16, evolve_updates=6000, evolve_lr=5e-5,
                batch_size=128, micro_batch=128),
    # for --policy and --data: SmolVLM-256M on a GPU of 24 GB (500M: --micro_batch 4), or of 80 GB;
    # sized on paper, see results/README.md. Weights stay in fp32: in bf16, whose numbers have 8
    # significant bits, an update of a ten-thousandth would be rounded away
    "smolvlm": dict(labeled=20000, warmup_questions=4000, warmup_updates=500, warmup_lr=1e-5,
                    prm_lr=2e-4, interval=0.25, evolve_updates=2500, evolve_lr=5e-6, batch_size=64,
                    micro_batch=8, max_new_tokens=256),
    "smolvlm-80gb": dict(labeled=60000, warmup_questions=12000, warmup_updates=1000, warmup_lr=1e-5,
                         prm_questions=12000, prm_lr=2e-4, interval=0.25, rollouts_per_question=16,
                         evolve_updates=7500, evolve_lr=5e-6, batch_size=128, micro_batch=32,
                         max_new_tokens=256),
}

# ---------------------------------------------------------------- the paper's algorithm

def self_evolve(cfg, pi_0, prm, world, run):
    """The paper's loop: returns the policy after the last iteration. `run` keeps what a stopped run
    goes on from."""
    policy, optimizer, temperature, first = start_or_resume(cfg, pi_0, prm, world, run)
    for iteration in range(first, cfg.iterations + 1):
        # Balance: before round 1, and every few rounds, the temperature of the best Reward-Pass@K
        sweep = None
        if cfg.temperature == "adaptive" and (iteration - 1) % cfg.sweep_every == 0:
            temperature, sweep = choose_temperature(cfg, policy, prm, world, temperature)

        # 1. Generate: L responses to each question of this round, from the current policy
        questions, num_labeled = questions_for_iteration(cfg, world, iteration)
        prompts = make_prompts(policy, questions)
        how = Sampling(cfg.rollouts_per_question, temperature, cfg.max_new_tokens,
                       seed_for(cfg.seed, "generate", iteration))
        texts, _ = sample_texts(policy, prompts, how, f"{cfg.method} {iteration}: responses")
        answered = questions
        if cfg.unlabeled == "vote":                                # Table 3
            answered = pseudo_answered(prm, questions, num_labeled, prompts, texts)

        # 2. Reward: R = H(1(a == a*) R_p): correct, each text once, the best by R_p
        correct, outcomes = unique_correct(answered, texts)
        kept = select(cfg, prm, prompts, correct, iteration)

        # 3. Improve: SFT on them. "Continuous": weights, optimizer and schedule live on
        if cfg.start_from == "pi_0":                               # ReST-EM
            policy.load_state_dict(pi_0.state_dict())
        if cfg.optimizer == "reset":                               # ReST-EM, Iterative RFT
            optimizer = new_optimizer(cfg, policy, cfg.evolve_lr)
        trained = improve(cfg, policy, optimizer, prompts, kept, iteration)

        # 4. Validate: greedy (exploitation), pass@k (exploration), Reward-Pass@k (both)
        metrics = {}
        if cfg.due(iteration, cfg.validations) or cfg.due(iteration, cfg.watches):
            metrics = validate(cfg, policy, prm, world, temperature, iteration)
        counts = describe_round(questions, answered, num_labeled, outcomes, correct, kept)
        run.log(cfg.method, iteration, temperature, {**metrics, **counts, **trained}, sweep)
        write_samples(cfg, run, select, policy, pi_0, prm, world, temperature, iteration)
        run.save(cfg.method, iteration, policy, optimizer, temperature=temperature,
                 switches=switches_of(cfg))
    return policy

def start_or_resume(cfg, pi_0, prm, world, run):
    """(policy, optimizer, temperature, first iteration): of the last round that was saved, or a
    copy of pi_0, which is logged as iteration 0."""
    policy = copy.deepcopy(pi_0)
    optimizer = new_optimizer(cfg, policy, cfg.evolve_lr)
    if saved := run.load(cfg.method, policy, optimizer):           # {} is false
        check_switches(saved, cfg)
        return policy, optimizer, saved["temperature"], saved["number"] + 1
    temperature = 1.0 if cfg.temperature == "adaptive" else float(cfg.temperature)
    run.log(cfg.method, 0, temperature, validate(cfg, policy, prm, world, temperature, 0))
    write_samples(cfg, run, select, policy, pi_0, prm, world, temperature, 0)
    return policy, optimizer, temperature, 1

def new_optimizer(cfg, policy, lr, decay_over=0):
    """AdamW on all weights. After a linear start its rate is constant, as in the paper, or decays
    over `decay_over` updates."""
    return Optimizer([adamw(policy.parameters(), lr)], cfg.lr_warmup_updates, decay_over)

# ---------------------------------------------------------------- 1. generate

def questions_for_iteration(cfg, world, iteration):
    """(questions of an iteration, how many of them are labeled; those come first): its part of an
    endless sequence, in which every question comes once before any comes again. Once unlabeled ones
    have joined they are half (our choice: the paper's share is unknown), so that all methods ask
    the same number."""
    def part(split, first, number):
        # each split has an order of its own ("labeled" is not named: that would change all
        # published results)
        purpose = ("questions",) if split == "labeled" else ("questions", split)
        rng = random.Random(seed_for(cfg.seed, *purpose))
        asked = world.get(split, [])[-cfg.evolve_questions:]       # 0: all
        orders = (rng.sample(asked, len(asked)) for _ in count())
        return list(islice(chain.from_iterable(orders), first, first + number))

    n = cfg.questions_per_iteration
    mixed = 0                                  # iterations with unlabeled ones, this one included
    if cfg.unlabeled != "none":
        before = min(round(cfg.mix_in * cfg.iterations), cfg.iterations - 1)
        mixed = max(0, iteration - before)
    # n = 4, mixed from the second on: labeled 0-3; 4-5, unlabeled 0-1; 6-7, unlabeled 2-3; ...
    num_unlabeled = n // 2 if mixed else 0
    unlabeled_before = n // 2 * max(0, mixed - 1)
    labeled = part("labeled", (iteration - 1) * n - unlabeled_before, n - num_unlabeled)
    return labeled + part("unlabeled", unlabeled_before, num_unlabeled), len(labeled)

# ---------------------------------------------------------------- 2. reward

def select(cfg, prm, prompts, correct, iteration):
    """The paper's H: which of the correct responses, [(question index, text)], are trained on."""
    if cfg.select == "all":                                        # no PRM
        return correct
    if cfg.select == "random":                                     # the control
        return random_k(correct, cfg.keep_top, seed_for(cfg.seed, "random", iteration))
    tokens = [[prm.tokenizer.response(text)] for _, text in correct]  # one response to a prompt
    rewards = response_rewards(prm, [prompts[i] for i, _ in correct], tokens)
    rewards = [reward for (reward,) in rewards]                    # R_p of each
    if cfg.select == "top":
        return top_k(correct, rewards, cfg.keep_top)               # the paper: Top-2
    return sorted(pair for pair, reward in zip(correct, rewards) if reward > cfg.threshold)

# ---------------------------------------------------------------- 3. improve

def improve(cfg, policy, optimizer, prompts, kept, iteration):
    """SFT on the kept responses, for this iteration's part of all updates: {updates, loss}."""
    # rounded so that all iterations together make cfg.evolve_updates
    before = round(cfg.evolve_updates * (iteration - 1) / cfg.iterations)
    after = round(cfg.evolve_updates * iteration / cfg.iterations)
    title = f"{cfg.method} {iteration}: SFT"
    return sft(cfg, policy, optimizer, prompts, kept, after - before, title, iteration)

def sft(cfg, policy, optimizer, prompts, kept, updates, title, iteration=0, train=fit):
    """SFT on [(question index, text)], each behind its question's prompt: {updates, loss}. `train`:
    `fit`, or `run.fit`, which saves in between."""
    if not kept:
        print(f"{title}: nothing to train on, going on without an update")
        return {"updates": 0, "loss": None}
    examples = [Example(*prompts[i], policy.tokenizer.response(text)) for i, text in kept]
    rng = random.Random(seed_for(cfg.seed, "SFT", iteration))
    # two responses to one question are neighbours, so that their image is read once
    stream = batches(examples, cfg.batch_size, rng, together=2)
    loss = train(policy, optimizer, stream, updates, cfg.micro_batch, title)
    return {"updates": updates, "loss": loss}

# ---------------------------------------------------------------- 4. validate, and balance

def look_at(cfg, policy, prm, questions, temperatures, rollouts):
    """`explore` with the settings of a run: the same random numbers at every iteration. (It fills
    in the temperature.)"""
    how = Sampling(rollouts, None, cfg.max_new_tokens, seed_for(cfg.seed, "monitor"))
    reward = partial(response_rewards, prm) if prm else None
    return explore(policy, questions, temperatures, how, reward)

def validate(cfg, policy, prm, world, temperature, iteration):
    """Metrics on the validation questions, of a greedy response each and monitor_rollouts sampled
    ones at `temperature`; where cfg.watches says so, also at all temperatures of the grid."""
    questions = world["validation"]
    n = cfg.monitor_rollouts
    looks = look_at(cfg, policy, prm, questions, [0.0, temperature], n)
    greedy = looks[0.0].is_correct[:, 0]                           # (Q,)
    look = looks[temperature]                                      # n responses to each question
    correct, outcomes = unique_correct(questions, look.texts)      # [(question index, text)]
    sampled = list(chain.from_iterable(look.responses))            # all responses in a row
    passes = pass_metrics(cfg, look)
    metrics = {
        "greedy_accuracy": float(greedy.mean()), "k": n, **means(passes),
        "by_question": {"greedy": as_text(greedy),
                        "num_correct": as_text(look.is_correct.sum(axis=1)),
                        "reward_pass_at_2": as_text(passes.get("reward_pass_at_2", ()))},
        "unsound": share_unsound(questions, correct),              # of unique correct responses
        # the mean of -log p over sampled tokens estimates the entropy per token, in nats, at T
        "entropy": -float(np.mean(list(chain.from_iterable(r.log_probs for r in sampled)))),
        "unparseable": outcomes["unparseable"] / len(sampled),
        "truncated": sum(not response.complete for response in sampled) / len(sampled)}
    if prm:                                # does the PRM, fixed since pi_0, still know this policy?
        metrics["reward_auc"] = auc(look.is_correct.ravel(), look.rewards.ravel())
    if cfg.due(iteration, cfg.watches):
        looks = look_at(cfg, policy, prm, questions, sorted({temperature, *GRID}), n)
        at_each = {str(t): pass_metrics(cfg, look) for t, look in looks.items()}
        metrics["watched"] = {
            "surface": {t: means(passes) for t, passes in at_each.items()},
            "any_correct": {t: as_text(passes["pass_at_k"]) for t, passes in at_each.items()}}
    return metrics

def choose_temperature(cfg, policy, prm, world, current):
    """The paper's automatic balancing: (the temperature to go on with, by `best_temperature` of
    Reward-Pass@k, or pass@k, over the grid on the validation questions; what the sweep found)."""
    L = cfg.rollouts_per_question              # responses, as many as a training question gets
    k = min(cfg.keep_top, L)                                       # the paper: 2
    aim = "pass_at_k" if cfg.adapt_by == "pass_at_k" else f"reward_pass_at_{k}"
    looks = look_at(cfg, policy, prm, world["validation"], GRID, L)    # current is in it
    passes = {t: pass_metrics(cfg, look) for t, look in looks.items()}  # T -> {metric: (Q,)}
    best, chosen = best_temperature({t: passes[t][aim] for t in GRID}, current)
    # (Q,) of the best of 14, on the questions that it was chosen on: it promises too much
    gain = passes[best][aim] - passes[current][aim]
    return chosen, {"aim": aim, "before": current, "best": best, "chosen": chosen,
                    "gain": [float(gain.mean()), *bootstrap_interval(gain)],
                    "surface": {str(t): means(passes[t]) for t in GRID}}

# ---------------------------------------------------------------- the stages before it

def stage_warmup(cfg, base, world):
    """The paper's warm-up: (pi_0, {kept: how many, unsound, updates, loss}). The base model writes
    reasoning with the answer in its prompt; what reaches another answer is dropped; on the rest it
    is trained, without the answer in the prompt."""
    questions = world["labeled"][:cfg.warmup_questions]
    how = Sampling(cfg.warmup_rollouts, 1.0, cfg.max_new_tokens, seed_for(cfg.seed, "warmup"))
    with_answers = make_prompts(base, questions, with_answer=True)  # the paper's triplet
    texts, _ = sample_texts(base, with_answers, how, "warm-up: base explains answers")
    kept, outcomes = unique_correct(questions, texts)
    unsound = share_unsound(questions, kept)
    share_correct = percent(outcomes["correct"] / outcomes.total())
    print(f"warm-up   {share_correct} of {outcomes.total():,} responses correct, {len(kept):,} "
          f"distinct ones kept, unsound {percent(unsound)}", flush=True)
    pi_0 = copy.deepcopy(base)                                     # the base is still needed
    # decayed, so that what self-evolving gains does not come from a smaller rate alone
    optimizer = new_optimizer(cfg, pi_0, cfg.warmup_lr, decay_over=cfg.warmup_updates)
    prompts = make_prompts(pi_0, questions)                        # without the answer
    trained = sft(cfg, pi_0, optimizer, prompts, kept, cfg.warmup_updates, "warm-up: SFT")
    return pi_0, {"kept": len(kept), "unsound": unsound, "world_seed": cfg.world_seed, **trained}

def direct_sft(cfg, base, world, run):
    """The paper's "SFT" row: the base trained on the labeled answers, without reasoning, for as
    many updates as warm-up and self-evolving are to make together. (policy, updates)."""
    policy, updates = copy.deepcopy(base), cfg.warmup_updates + cfg.evolve_updates
    optimizer = new_optimizer(cfg, policy, cfg.warmup_lr, decay_over=updates)
    questions = world["labeled"][-cfg.evolve_questions:]
    answers = [(i, f"answer: {question.answer}") for i, question in enumerate(questions)]
    prompts = make_prompts(policy, questions, direct=True)         # the answer alone
    trained = sft(cfg, policy, optimizer, prompts, answers, updates, "sft", train=run.fit)
    return policy, trained["updates"]

# ---------------------------------------------------------------- a run and its folder

class Run:
    """The folder of a run. Every stage leaves a file, every round a state: what is there and whole
    is not made again. So a stop costs at most the stage or round in progress, and a resumed run
    ends as if it had not been stopped (but for `seconds`, and on a GPU for rounding): each piece
    has its own seeds."""

    def __init__(self, out, main_method, tokenizer, device):
        self.out, self.main_method = out, main_method
        self.tokenizer, self.device = tokenizer, device
        self.done, self.lines = [], []         # of metrics.jsonl: of finished arms, of this one
        self.last_log = time.time()
        self.about = {}                                            # of each finished piece
        (out / "checkpoint").mkdir(parents=True, exist_ok=True)

    def result(self, name, make, *inputs):
        """The dict in NAME.json. If the file is not there, make(*inputs) makes the dict first."""
        path, began = self.out / f"{name}.json", time.time()
        if self._read(read_json, path) is None:                    # not there, or damaged
            write_json(path, {**make(*inputs), "seconds": time.time() - began})
        self.about[path.stem] = read_json(path)
        return self.about[path.stem]

    def network(self, name, kind, make, *inputs):
        """The network in NAME.safetensors. If the file is not there, make(*inputs) makes (network,
        about) first."""
        path, began = self.out / f"{name}.safetensors", time.time()
        network = self._read(load_network, path, self.tokenizer, self.device, kind)
        if network is None:                                        # not there, or damaged
            network, about = make(*inputs)
            save(path, network, **about, seconds=time.time() - began)
        self.about[path.stem] = read_json(path.with_suffix(".json"))
        return network

    def save(self, name, number, policy, optimizer, **about):
        """Save what a training goes on from after round (or update) `number`, then delete the save
        before it."""
        path = self.out / "checkpoint" / f"{name}-{number}.safetensors"
        save(path, policy, optimizer, number=number, lines=self.lines, **about)
        for old in self._saved(name):
            if old != path and not RANK:                           # only now: the new one is whole
                old.unlink()
                old.with_suffix(".json").unlink(missing_ok=True)

    def load(self, name, policy, optimizer):
        """Put back what `save` wrote last, and return its `about`; {} if there is nothing."""
        for path in self._saved(name):
            if about := self._read(load, path, policy, optimizer):
                self.lines += about["lines"]                       # so that metrics.jsonl is whole
                return about
        return {}

    def _saved(self, name):                                        # the last one first
        paths = [path for path in (self.out / "checkpoint").glob("*.safetensors")
                 if path.stem.rpartition("-")[0] == name]
        return sorted(paths, key=lambda path: int(path.stem.rpartition("-")[2]), reverse=True)

    def _read(self, read, path, *more):                            # None if missing or damaged
        try:
            return read(path, *more)
        except FileNotFoundError:
            return None
        except ValueError as error:
            print(f"{error}; not used, made again", flush=True)
        finally:
            barrier()                                              # all have read before one writes

    def fit(self, policy, optimizer, stream, updates, micro_batch, title, part=500):
        """`fit` for trainings of several minutes: saved after every `part` updates, or after more
        of them, so that saving takes no more than 2 % of the time."""
        loss = self.load(title, policy, optimizer).get("loss")
        saved, cost = time.time(), 0.0                             # when, and how long it took
        for _ in range(optimizer.updates):                         # skip what it has seen
            next(stream)
        while optimizer.updates < updates:
            number = min(part, updates - optimizer.updates)        # until the next save
            loss = fit(policy, optimizer, stream, number, micro_batch, title)
            if broadcast(time.time() - saved >= 49 * cost):        # 49 : 1 is 2 %
                began = time.time()
                self.save(title, optimizer.updates, policy, optimizer, loss=loss)
                saved = time.time()
                cost = saved - began
        return loss

    def log(self, arm, iteration, temperature, metrics, sweep=None):
        """Add a line to metrics.jsonl, and say the main things on screen."""
        line = {"arm": arm, "iteration": iteration, "temperature": temperature, **metrics,
                "sweep": sweep, "seconds": round(time.time() - self.last_log, 1)}
        self.lines.append({name: value for name, value in line.items() if value is not None})
        self.last_log = time.time()            # from here on, time counts for the next line
        lines = [json.dumps(line, allow_nan=False) + "\n" for line in self.done + self.lines]
        write_whole(self.out / "metrics.jsonl", "".join(lines).encode())
        print_line(self.lines[-1])

def run_stages(cfg, out, command, program="mstar"):
    """All stages of a run, then its arms from the same pi_0 and PRM with equal responses and
    updates; returns the report. program: mstar, or tables, whose folder holds arms of many tables,
    and so no policy or samples of one."""
    tokenizer, arms = tokenizer_for(cfg.policy), arms_of(cfg)
    world = make_world(cfg, out, tokenizer)
    check_identity(cfg, out, command, program, world, tokenizer)
    main_method = cfg.method if program == "mstar" else ""
    run = Run(out, main_method, tokenizer, cfg.device or available_devices()[0])
    print(f"run       {out}: {cfg.arms} from {cfg.policy}, preset {cfg.preset}, seed {cfg.seed}, "
          f"on {run.device} ({WORKERS} workers, {'bf16' if has_bf16(run.device) else 'fp32'})",
          flush=True)
    if cfg.data:                               # as the policy reads it, but for special tokens
        question = next(chain.from_iterable(world.values()))
        asked = tokenizer.decode(tokenizer.prompt(question.text))
        print(f"question  {question.id}, behind its picture: {asked}", flush=True)
    if cfg.policy == "scratch":
        base = run.network("checkpoint/base", Policy, train_base, world["base"], cfg, run)
    else:
        base = load_policy(cfg.policy, tokenizer, run.device)
    prm = None                                                     # until an arm needs it
    longest = cfg.max_new_tokens
    rows = [run.result("checkpoint/test of base", evaluate_policy, "base", base, world, longest)]
    if cfg.method == "base":
        made = run.about.get("base", {"world_seed": cfg.world_seed})
        save(run.out / "policy.safetensors", base, made_by=command, **made)
    evolved = [arm for arm in arms if arm.method != "base"]
    if evolved:
        if not broadcast((out / "pi_0.safetensors").exists()):     # at the start, not on resuming
            print(expected(cfg, evolved, base, world), flush=True)
        pi_0 = run.network("pi_0", Policy, stage_warmup, cfg, base, world)
        rows.append(run.result("checkpoint/test of pi_0", evaluate_policy, ROW_NAMES["pi_0"], pi_0,
                               world, longest))
    if any(arm.needs_prm for arm in evolved):
        # labeled questions that pi_0 was not warmed up on
        asked = world["labeled"][cfg.warmup_questions:][:cfg.prm_questions]
        labels = run.result("labels", label_steps, cfg, pi_0, asked)["labels"]
        labels = [StepLabels(**label) for label in labels]
        prm = run.network("prm", RewardModel, train_prm, cfg, pi_0, asked, labels)
        run.result("audit", audit, pi_0, prm, labels, asked, world["test"], longest)
    for arm in evolved:
        run.lines, run.last_log = [], time.time()
        name = f"checkpoint/arm {arm.method}"
        result = run.result(name, run_arm, arm, base, pi_0, prm, world, run)
        check_switches(result, arm)
        rows.append(result["row"])                                 # of the result table
        run.done += result["lines"]
    return make_report(cfg, run, command, world, rows, ROW_NAMES.get(cfg.method, cfg.method))

def make_world(cfg, out, tokenizer):
    """The world of a run, the same for all seeds. Where it cannot be made, one line, and the folder
    `out` goes, unless the run was begun before."""
    try:
        with one_line_errors("mstar.py", "nothing is lost", ValueError):   # too few pictures
            world = world_of({**asdict(cfg), "splits": cfg.splits})
            if cfg.data:
                for question in chain.from_iterable(world.values()):
                    tokenizer.prompt(question.text, question.answer)   # are all the words known?
            return world
    except SystemExit:
        if not RANK and not any(out.iterdir()):
            out.rmdir()
        raise

def expected(cfg, arms, base, world):
    """A line of text: the size of the policy, the responses and updates of all arms and, on a CPU,
    about how many minutes all takes, by a few seconds of sampling and training the base. Left out:
    tests, training and audit of the PRM, which take little; --watches, which can double it."""
    asked = sum(a.iterations * a.questions_per_iteration for a in arms if a.method != "sft")
    updates = sum(arm.evolve_updates for arm in arms)
    text = (f"expected  {sum(p.numel() for p in base.parameters()):,} parameters, "
            f"{asked * cfg.rollouts_per_question:,} responses, {updates:,} updates")
    if base.device.type != "cpu" or updates < 500:                 # not known, or seconds
        return f"{text} (minutes are estimated on a CPU only, from 500 updates on)"
    questions = world["labeled"][:128]
    policy = copy.deepcopy(base)                                   # the base stays as it is
    began = time.time()
    look = look_at(cfg, base, None, questions, [1.0], cfg.rollouts_per_question)[1.0]
    sampled = time.time()
    kept = [(i, texts[0]) for i, texts in enumerate(look.texts)]
    optimizer = new_optimizer(cfg, policy, cfg.evolve_lr)
    sft(cfg, policy, optimizer, make_prompts(policy, questions), kept, 8, "expected")
    trained = time.time()
    asked += len(arms) * cfg.validations * cfg.validation
    # step labels of a question, and a sweep of it, take about five times as long as asking it
    swept = cfg.prm_questions if any(arm.needs_prm for arm in arms) else 0
    swept += sum(math.ceil(arm.iterations / arm.sweep_every) * cfg.validation for arm in arms
                 if arm.temperature == "adaptive")
    updates += 2 * cfg.warmup_updates                              # pi_0's, and those of direct SFT
    seconds = ((asked + 5 * swept) * (sampled - began) / len(questions)
               + updates * (trained - sampled) / 8)
    return f"{text}, about {seconds / 60:.0f} minutes"

def run_arm(cfg, base, pi_0, prm, world, run):
    """One method from pi_0 on (direct SFT: from the base): {row, lines of metrics.jsonl, updates
    made, its switches}. The main method's policy is saved."""
    if cfg.method == "sft":                                        # no loop, no lines
        policy, updates = direct_sft(cfg, base, world, run)
    else:
        policy = self_evolve(cfg, pi_0, prm, world, run)
        updates = sum(line.get("updates", 0) for line in run.lines)
    if cfg.method == run.main_method:                              # others are only measured
        save(run.out / "policy.safetensors", policy, world_seed=cfg.world_seed)   # for `check`
    row = evaluate_policy(ROW_NAMES.get(cfg.method, cfg.method), policy, world, cfg.max_new_tokens,
                          direct=cfg.method == "sft")
    return {"row": row, "lines": run.lines, "updates": updates, "switches": switches_of(cfg)}

def switches_of(cfg):
    """{switch: value} of an arm."""
    return {name: getattr(cfg, name) for name in SWITCHES}

def check_switches(saved, cfg):
    """Exit 2 if what is saved of an arm is from before its row in METHODS was changed."""
    if saved.get("switches") != switches_of(cfg):
        fail(f"{cfg.method}: what is saved of it was made with other switches; take a new --out")

def arms_of(cfg):
    """The Configs of the arms to run: cfg without the switches of its own method, with theirs. (A
    typed switch is for all arms: `parse` refuses one that an arm sets.)"""
    preset = PRESETS[cfg.preset]
    plain = {name: preset.get(name, getattr(Config, name)) for name in METHODS[cfg.method]}
    return [replace(cfg, method=method, **(plain | METHODS[method]))
            for method in cfg.arms.split(",")]

def check_identity(cfg, out, command, program, world, tokenizer):
    """Write config.json of a new run; exit 2 if the folder was begun with another configuration,
    vocabulary or world: what is saved there would mean something else."""
    policy = Path(cfg.policy)                                      # a file, a folder, or scratch
    files = [policy] if policy.is_file() else sorted(policy.glob("*.safetensors"))
    base = RECIPES[cfg.recipe], [zlib.crc32(path.read_bytes()) for path in files]
    meaning = zlib.crc32(repr((tokenizer.symbols, base, world)).encode())
    identity = {**asdict(cfg), "program": program, "splits": cfg.splits, "world": meaning}
    path = out / "config.json"                                     # the first file of a run
    if not broadcast(path.exists()):
        write_json(path, {**identity, "command": command})
    with one_line_errors("mstar.py", "take a new --out", ValueError):
        before = read_json(path)                                   # as JSON gives it back
    # micro_batch may change (memory), and in a table's folder what differs from arm to arm
    free = ("arms", "method", "out", *SWITCHES) if program != "mstar" else ()
    for name, value in identity.items():
        if name not in ("micro_batch", *free) and before.get(name) != value:
            fail(f"{out}: begun with another {name} ({before.get(name)}, now {value}); take a new "
                 "--out")

# ---------------------------------------------------------------- command line

def fail(message, program="mstar.py"):
    """Exit 2 with one line."""
    line = " ".join(str(message).split())                          # of one line, whatever was typed
    print(f"{program}: {line}; see --help", file=sys.stderr)
    sys.exit(2)

def parse(argv):
    """Flags to (Config, folder to resume or None). Exits 2 on wrong use."""
    parser = argparse.ArgumentParser(description="M-STaR on a small world of visual math.",
                                     usage="%(prog)s [--FLAG VALUE ...] | --resume runs/NAME",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = fail
    parser.add_argument("--resume", metavar="runs/NAME", help="go on with a stopped run; "
                        "--micro_batch may be another, if memory ran out")
    for f in fields(Config):
        choices = {"method": METHODS, "preset": PRESETS}.get(f.name, f.metadata["choices"])
        listed = f" ({', '.join(choices)})" if choices else ""
        help = f"{f.metadata['help']}{listed} [{f.default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=type(f.default), help=help, metavar="",
                            choices=None if f.name == "method" else choices)
    typed = vars(parser.parse_args(argv))                          # only what was typed
    if "resume" in typed:
        folder = Path(typed.pop("resume"))
        return begun_with(folder, typed), folder
    preset = typed.get("preset", "gpu" if torch.cuda.is_available() else "cpu")
    names = (typed.get("arms") or typed.get("method") or COMPARED).split(",")
    method = typed.get("method") or names[-1]
    names = list(dict.fromkeys([*names, method]))                  # each once
    if unknown := [arm for arm in names if arm not in METHODS]:
        fail(f"{unknown[0]!r} is not a method; known: {', '.join(METHODS)}")
    for arm in names:
        for name, value in METHODS[arm].items():
            # its row, or those of other arms, would bear a false name
            if name in typed and (typed[name] != value or len(names) > 1):
                fail(f"--{name} {typed[name]}: {arm} is made of --{name} {value}; leave the flag "
                     "out, or name other --arms")
    cfg = Config(**{**PRESETS[preset], **METHODS[method], **typed, "preset": preset,
                    "arms": ",".join(names), "method": method})
    if "recipe" in typed and cfg.policy != "scratch":
        fail(f"--recipe {cfg.recipe}: makes a base; add --policy scratch")
    check(cfg)
    return cfg, None

def check(cfg):
    """Exit 2 with one line about the first value that makes no sense."""
    for f in fields(Config):
        value, least, most = getattr(cfg, f.name), f.metadata["least"], f.metadata["most"]
        if f.name == "temperature" and value != "adaptive":
            least, most = 0.01, 100                                # logits / T must stay finite
            value = float(value) if re.fullmatch(r"\d+\.?\d*|\.\d+", value) else math.nan
        if type(value) is not str and not least <= value <= most:  # NaN is not, either
            fail(f"--{f.name} {getattr(cfg, f.name)}: must be from {least} to {most}")
    if cfg.device not in ("", *available_devices()):               # say what there is
        fail(f"--device {cfg.device}: this machine has {', '.join(available_devices())}")
    if cfg.recipe not in RECIPES:                                  # of another size: Table 5
        fail(f"--recipe {cfg.recipe}: not one of {', '.join(RECIPES)}")
    needs_prm = any(arm.needs_prm for arm in arms_of(cfg))
    asked = cfg.warmup_questions + (cfg.prm_questions if needs_prm else 0)
    needed = max(asked, cfg.evolve_questions)
    if needed > cfg.labeled:
        fail(f"--labeled {cfg.labeled}: must be at least {needed}, to hold --warmup_questions and "
             "as many different --prm_questions as asked for, or --evolve_questions")
    if cfg.data and cfg.policy == "scratch":
        fail("--data: a base from scratch learns our world; choose a --policy")
    # (a run of `test` learns nothing, at whatever rate)
    if cfg.preset != "test" and is_public(cfg.policy) != cfg.preset.startswith("smolvlm"):
        fail(f"--preset {cfg.preset}, --policy {cfg.policy}: smolvlm and smolvlm-80gb are for a "
             "folder with public weights, the others for ours, with much larger learning rates")
    if bool(cfg.data) != bool(cfg.images) or cfg.testbed and not cfg.data:
        fail("--data and --images go together, and --testbed with them")
    if cfg.policy != "scratch":
        with one_line_errors("mstar.py", "--policy names a folder with public weights, or a file "
                             "that --method base --policy scratch made", ValueError):
            load_policy(cfg.policy, tokenizer_for(cfg.policy))
    if Path(cfg.policy).is_file() and not cfg.data:
        # A base of ours was trained on pictures of its world, but for those of its tests. Tests
        # smaller than full size are the beginnings of the full ones, so they are unseen, too
        about = read_json(Path(cfg.policy).with_suffix(".json"))
        larger = any(cfg.splits[split] > full for split, full in FULL_SIZES.items())
        if larger or about.get("world_seed") != cfg.world_seed:
            fail(f"--policy {cfg.policy}: has seen pictures of these tests; keep to the world_seed "
                 f"in its .json and to {FULL_SIZES}, or make another by --policy scratch")
    evolved = [arm for arm in arms_of(cfg) if arm.method not in ("base", "sft")]
    if len({arm.iterations * arm.questions_per_iteration for arm in evolved}) > 1:
        fail(f"--epochs {cfg.epochs:g} of --labeled {cfg.labeled}, or --evolve_questions: arms of "
             "different --interval would not ask equally many questions; take whole epochs, and a "
             "number of questions of which each interval is a whole part")

def begun_with(folder, typed):
    """The Config of the run in a folder. Exits 2 if there is none that goes on by this command."""
    if other := sorted(typed.keys() - {"micro_batch"}):
        fail(f"--resume {folder}: a run goes on as it was begun, without --{other[0]}")
    try:
        saved = read_json(folder / "config.json")
        cfg = Config(**{f.name: saved[f.name] for f in fields(Config)} | typed)
    except (OSError, ValueError, KeyError) as error:
        fail(f"--resume {folder}: no run of this version was begun there ({error})")
    if saved["program"] != "mstar":
        fail(f"--resume {folder}: it goes on by its own command: {saved['command']}")
    check(cfg)                                                     # on this machine, too
    if typed:                                  # another micro_batch is for later resumes, too
        write_json(folder / "config.json", {**saved, **typed})
    return cfg

def new_folder(cfg):
    """Make and return the folder of a new run. One that holds anything is never written to."""
    name = f"runs/{cfg.preset}-{cfg.method}-seed{cfg.seed}"
    for number in count(1):
        out = Path(cfg.out or (name if number == 1 else f"{name}-{number}"))
        try:
            out.mkdir(parents=True)                                # fails if another run was faster
            return out
        except FileExistsError:
            if cfg.out and (not out.is_dir() or any(out.iterdir())):
                fail(f"--out {out}: is there, and nothing is overwritten: choose a new name, or go "
                     "on with a stopped run by --resume")
            if cfg.out:
                return out                                         # an empty folder
        except OSError as error:
            fail(f"--out {out}: {error.strerror}")

def main(argv=None):
    """The main job: all stages in order, then the table and the page. Returns the report."""
    argv = sys.argv[1:] if argv is None else argv
    cfg, folder = parse(argv)
    if not folder and RANK == 0:
        folder = new_folder(cfg)
    out = broadcast(folder)
    command = " ".join(["python mstar.py", *argv])
    with one_line_errors("mstar.py", f"go on with: python mstar.py --resume {out}"):
        if not broadcast((out / "report.json").exists()):
            write_json(out / "report.json", run_stages(cfg, out, command))
    with one_line_errors("mstar.py", "without this file, --resume runs the arms again", ValueError):
        report = read_json(out / "report.json")                    # as a resumed run reads it
        shutil.rmtree(out / "checkpoint", ignore_errors=True)      # nothing is left to resume
    print_report(report)
    with one_line_errors("mstar.py", "the result is whole, its page is not", ValueError, KeyError):
        print(f"wrote {write_page(out)}")
    return report

if __name__ == "__main__":
    run_command(main)
