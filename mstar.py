"""
mstar.py: self-evolving training, from a base model to a policy that reasons. The story starts here.

Paper (arXiv 2412.17451v3, "Diving into Self-Evolving Training for Multimodal Reasoning"): warm-up, then rounds of
    generate (sample L responses per question), improve (keep those the reward accepts, SFT on them), with the weights, the
    optimizer state and the schedule carried from round to round: "Continuous Self-Evolving". M-STaR adds a process reward
    model (prm.py) to the filter and chooses the sampling temperature by what that model finds (choose_temperature).
Read:     self_evolve (the paper's algorithm) first, then top-down: Config -> run -> stage_base -> stage_warmup -> stage_prm ->
          self_evolve -> monitor -> choose_temperature, in the order they run
Departs:  the base model is trained here, from scratch, on a stated diet (stage_base); the paper starts from a pretrained LMM.
          The learning rate is larger (the paper: 1e-6 for 8B parameters) and rounds are counted in updates, not epochs.
          A sweep keeps the temperature unless another is better by more than the standard error (choose_temperature; the paper takes
          the best); the first sweep is on pi_0, before any training. Reward-Pass@K ranks L responses at a time (monitor).
          Unlabeled questions replace half of the labeled ones instead of coming on top (questions_of).
          Pixels, words and questions come from data.py's world.
Run:      python mstar.py [--preset cpu|gpu|test] [--seed N] [--out runs/NAME] [any field of Config]
          python mstar.py --resume runs/NAME
          python mstar.py --experiment table1|table2|table3|table4|table5|dynamics [--seeds 3]
"""
import argparse
import copy
import fcntl
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch

from data import TASKS, TESTBEDS, Tokenizer, build_world, oracle, write_caption, write_reasoning
from evaluate import (TABLES, auc, bootstrap_interval, evaluate_policy, find_answer, format_experiment, grade, make_experiment, make_prompts,
                      most_frequent_answer, paired_gain, print_report, reward_pass_at_k, sample_texts, share, write_experiment_html, write_html)
from model import (WORKERS, Example, ModelConfig, Policy, batches, fit, load_policy, load_tensors, load_training, new_optimizers, sample,
                   save_policy, save_tensors, save_training, write_json, write_whole)
from prm import StepLabels, audit, label_responses, label_steps, rerank, score, train_prm, weighted_vote

CONTINUOUS = dict(start_from="last", optimizer="inherit", interval=0.25, select="all", temperature="1.0")
PRM = dict(CONTINUOUS, select="top")
MSTAR = dict(PRM, temperature="adaptive")
METHODS = {     # the rows of the paper's tables, as bundles of switches; "sft" is a stage of its own
    "sft": dict(CONTINUOUS),
    "iterative_rft": dict(CONTINUOUS, optimizer="reset", interval=1.0),
    "rest_em": dict(CONTINUOUS, optimizer="reset", interval=1.0, start_from="warmup"),
    "continuous": CONTINUOUS, "prm": PRM, "mstar": MSTAR,
    # Table 1: shares of the questions per iteration
    **{f"continuous_{words}": dict(CONTINUOUS, interval=share) for words, share in (("100", 1.0), ("50", 0.5), ("12.5", 0.125), ("6.25", 0.0625))},
    # Table 2: which right responses are trained on
    "random_2": dict(CONTINUOUS, select="random", keep_top=2), "threshold": dict(CONTINUOUS, select="threshold"),
    "top_1": dict(PRM, keep_top=1), "top_4": dict(PRM, keep_top=4),
    # Table 3: unlabeled questions, with the true answers or with those that a vote finds, after a share of the training
    "oracle": dict(CONTINUOUS, unlabeled="oracle"), "oracle_prm": dict(PRM, unlabeled="oracle"),
    **{f"vote_{percent}": dict(PRM, unlabeled="vote", mix_in=percent / 100) for percent in (0, 25, 50, 75)},
    # Table 4: what the temperature is chosen by
    "mstar_pass_at_k": dict(MSTAR, adapt_by="pass_at_k"),
    # Figures 3 to 5: the same training, seen at every temperature
    "prm_watched": dict(PRM, watch_every=2), "mstar_watched": dict(MSTAR, watch_every=2),
}
ROWS = {"sft": "SFT (direct answers)", "prm": "+ PRM re-rank", "mstar": "M-STaR"}      # names in the result table, where they differ
SIZES = {"table5": {"small": 0.5, "": 1.0, "large": 1.5}}          # an experiment with policies of several widths, as factors
COMPARED = "sft,continuous,prm,mstar"                               # what `python mstar.py` runs
SHOWN = 2                                                          # questions of each task type and testbed that the report shows
GRID = [round(0.3 + 0.1 * i, 1) for i in range(14)]                # the temperatures of a sweep, 0.3 .. 1.6


@dataclass
class Config:
    """Every value that a run depends on. Each field is a flag; a preset fills it, a method sets the switches, a flag wins."""
    out: str = ""                        # folder of the run; empty: runs/PRESET-METHOD-seedN, with a number if taken
    method: str = "mstar"                # one of METHODS; --method X runs X alone, without it everything in COMPARED runs
    arms: str = ""                       # or: the methods to run from one pi_0 and one PRM, comma-separated; the policy of --method, else of the last, is saved
    experiment: str = ""                 # or: the arms of one of the paper's tables, and verdicts on its claims: table1 .. table5 or dynamics
    seeds: int = 1                       # of an experiment: seeds 0 .. N-1
    seed: int = 0                        # weights, order of the data, sampling
    device: str = ""                     # empty: cuda, then mps, then cpu
    # the world
    world_seed: int = 0                  # which pictures and questions; the tests are the same for all --seed
    labeled: int = 8000                  # training questions with answers (and as many unlabeled ones)
    validation: int = 250
    test: int = 750
    testbed: int = 250                   # questions of each out-of-domain testbed
    # the policy
    image_size: int = 128
    patch_size: int = 16
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 2
    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    # base: what the pretrained LMM of the paper has and ours must learn first
    base_images: int = 10000             # captioned pictures; no question of another split shares a picture with them
    base_arithmetic: int = 5000          # texts of five arithmetic facts
    base_worked: int = 200               # worked examples that are asked like a test question
    base_worked_with_answer: int = 6000  # worked examples with the answer in the prompt
    base_texts: int = 5                  # reasoning texts per worked example, by different routes
    base_caption_updates: int = 1100     # first captions and arithmetic alone, then
    base_updates: int = 800              # all of it
    base_lr: float = 3e-3                # of AdamW (embeddings, norms, biases)
    base_muon_lr: float = 2e-3           # of Muon (the matrices)
    # warm-up
    warmup_questions: int = 2000         # labeled questions that the base model explains, the answer given
    warmup_rollouts: int = 4
    warmup_updates: int = 200
    warmup_lr: float = 5e-4
    # process reward model
    prm_questions: int = 1000            # labeled questions of which responses are labeled step by step
    prm_responses: int = 4               # responses per question
    prm_rollouts: int = 8                # completions per step
    prm_temperature: float = 0.6         # of the completions
    prm_labels: str = "soft"             # a step's label: soft, the share of right completions, or hard, 1 if any is right
    # self-evolving: the switches
    start_from: str = "last"             # weights an iteration's training starts from: last or warmup
    optimizer: str = "inherit"           # inherit or reset optimizer state and schedule at each iteration
    interval: float = 0.25               # share of the labeled questions per iteration
    select: str = "all"                  # which right responses are trained on: all, top, threshold or random
    keep_top: int = 2                    # responses per question that top and random keep
    threshold: float = 0.25              # smallest reward R_p that threshold keeps: about 0.7 of pi_0's right and different responses (the paper's is unknown)
    unlabeled: str = "none"              # half of the questions from the unlabeled split: none, oracle (with the true answers) or vote (PRM-weighted)
    mix_in: float = 0.0                  # share of the iterations before unlabeled questions join
    temperature: str = "1.0"             # of the sampled responses: a number, or adaptive: 1.0 at first, then as the sweeps say
    adapt_by: str = "reward_pass_at_k"   # what a sweep maximises: reward_pass_at_k (k = keep_top) or pass_at_k
    sweep_every: int = 2                 # iterations from sweep to sweep
    watch_every: int = 0                 # if above 0: also measure all temperatures that often, without choosing by it
    passes: float = 2.0                  # how often each labeled question is asked in all
    rollouts_per_question: int = 8       # L; the paper: 16
    evolve_updates: int = 2400           # updates of all iterations together, equal for every method
    evolve_lr: float = 1e-4              # constant, as in the paper
    # everywhere
    batch_size: int = 32
    lr_warmup_updates: int = 20          # linear start of every learning-rate schedule
    monitor_rollouts: int = 16           # n of pass@k on validation
    max_new_tokens: int = 72             # the longest true reasoning text has 64 tokens
    minutes: float = 0.0                 # if above 0: scale SCALED, so that the run is expected to take as long

    @property
    def splits(self):
        """Sizes of the splits, for data.build_world."""
        base = max(self.base_images, self.base_worked + self.base_worked_with_answer)
        return {"base": base, "labeled": self.labeled, "unlabeled": self.labeled, "validation": self.validation,
                "test": self.test, **dict.fromkeys(TESTBEDS, self.testbed)}

    @property
    def queries(self):
        """Questions asked per iteration."""
        return max(1, round(self.interval * self.labeled))

    @property
    def iterations(self):
        """Rounds of self-evolving."""
        return max(1, round(self.passes * self.labeled / self.queries))


PRESETS = {
    "cpu": {},                                                     # the defaults above: a laptop, 2 cores
    "test": dict(labeled=48, validation=10, test=20, testbed=5, width=32, layers=1, heads=2, kv_heads=1, vision_width=16, vision_layers=1,
                 base_images=60, base_arithmetic=20, base_worked=20, base_worked_with_answer=20, base_caption_updates=4, base_updates=4,
                 warmup_questions=10, warmup_rollouts=2, warmup_updates=3, prm_questions=20, prm_rollouts=2, passes=1.0,
                 rollouts_per_question=2, evolve_updates=4, batch_size=8, lr_warmup_updates=2, monitor_rollouts=4, max_new_tokens=24),
    # sized on paper for one GPU of 16-24 GB and an hour; not measured yet
    "gpu": dict(labeled=20000, patch_size=8, vision_width=256, vision_layers=4, vision_heads=4, width=384, layers=6, heads=6, kv_heads=6,
                base_images=40000, base_arithmetic=20000, base_caption_updates=2000, base_updates=1500, base_lr=1e-3, base_muon_lr=2e-3,
                warmup_questions=5000, warmup_lr=3e-4, rollouts_per_question=16, evolve_updates=6000, evolve_lr=5e-5, batch_size=128),
}


# ---------------------------------------------------------------- the run

def main(argv=None):
    """The main job: all stages in order, then the table. Returns the report. A run that was stopped anywhere, started again with
    --resume, takes what is finished from its folder and ends as if it had not been stopped."""
    argv = sys.argv[1:] if argv is None else argv
    (cfg, preset, out), command = parse(argv), " ".join(["python mstar.py", *argv])
    if cfg.experiment:
        return experiment(cfg, preset, command)
    out = out or new_folder(cfg, preset)
    with stopped_cleanly(" ".join(argv), out), alone_in(out):
        if not (out / "report.json").exists():
            write_json(out / "report.json", run(cfg, preset, out, command))
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
        write_html(out)
        report = json.loads((out / "report.json").read_text())
        print_report(report)
    return report


def experiment(cfg, preset, command):
    """One of the paper's tables: its arms for each seed (and size), one after another, then the table and the verdicts on its claims.
    Each seed has a folder of its own, in which base, pi_0, PRM and finished arms stay, for this and for other tables.
    Writes results/PRESET-EXPERIMENT.json, and .html to look at, and returns what the first holds; with --out, or if results/ has it of
    more seeds already, into the folder of the runs."""
    folder, reports, file = Path(cfg.out or f"runs/{preset}-experiments"), [], Path(f"results/{preset}-{cfg.experiment}.json")
    for size, factor in SIZES.get(cfg.experiment, {"": 1.0}).items():
        for seed in range(cfg.seeds):
            out = folder / "-".join([f"seed{seed}", *size.split()])
            sized = replace(of_size(cfg, factor), seed=seed, out=str(out))
            with stopped_cleanly(command.removeprefix("python mstar.py ")):
                out.mkdir(parents=True, exist_ok=True)
                with alone_in(out):
                    reports.append({"size": size or "medium", **run(same_as_before(sized, out), preset, out, command)})
    result = make_experiment(cfg.experiment, reports, command)
    with stopped_cleanly(command.removeprefix("python mstar.py ")):
        if cfg.out or file.exists() and len(json.loads(file.read_text())["seeds"]) > cfg.seeds:
            file = folder / file.name
        file.parent.mkdir(exist_ok=True)
        write_json(file, result)
        write_experiment_html(file.with_suffix(".html"), result)
    print(f"{format_experiment(result)}\n\nwrote {file} and {file.with_suffix('.html')}")
    return result


def of_size(cfg, factor):
    """The Config with a policy of `factor` times the width, its heads of the same size."""
    kv_heads = round(factor * cfg.heads) if cfg.kv_heads == cfg.heads else cfg.kv_heads
    return replace(cfg, kv_heads=kv_heads, **{name: round(factor * getattr(cfg, name)) for name in ("width", "vision_width", "heads")})


def run(cfg, preset, out, command):
    """All stages of one run, with the arms that cfg names; returns its report. What `done` keeps is not computed again."""
    began, device = time.time(), cfg.device or available()[0]
    torch.manual_seed(cfg.seed)
    try:
        world, tokenizer = build_world(cfg.splits, cfg.world_seed), Tokenizer()
    except ValueError as error:
        print(f"mstar.py: {error}", file=sys.stderr)
        sys.exit(2)
    done = Checkpoint(out / "checkpoint", tokenizer, device)
    policy = new_policy(cfg, tokenizer).to(device)
    begun = (out / "config.json").exists()
    cfg = announce(cfg, preset, out, device, policy, world, tokenizer, done, to_be_scaled=cfg.minutes > 0 and not begun)
    if not begun:
        save_tensors(out / "config.json", {}, {"preset": preset, **asdict(cfg), "splits": cfg.splits, "command": command})
    done.seconds["start"] = done.seconds.get("start", 0.0) + time.time() - began

    with done.stage("base"):
        base = done.network("base", lambda: stage_base(cfg, policy, world, tokenizer, done))
    with done.stage("warm-up"):
        warm = done.network("pi_0", lambda: stage_warmup(cfg, base, world, tokenizer, done))
        save_policy(warm, out / "warmup.safetensors", tokenizer.symbols)
    arms, prm, prm_metrics, audited, iterations, rows = arms_of(cfg), None, None, None, [], []
    if any(needs_prm(switches) for arm, switches in arms.items() if arm != "sft"):
        with done.stage("PRM"):
            prm, prm_metrics, labels = stage_prm(cfg, warm, world, tokenizer, out, done)
        with done.stage("audit"):
            audited = done.once("audit", lambda: audit(warm, prm, labels, world["test"], world["labeled"], tokenizer, cfg.max_new_tokens))
            write_json(out / "audit.json", audited)

    def test(name, policy, stage="tests"):
        with done.stage(stage):
            return evaluate_policy(name, policy, world, tokenizer, cfg.max_new_tokens)

    def run_arm(arm, switches):
        """From the same pi_0 and PRM, with equal responses and updates."""
        with done.stage(arm):
            if arm == "sft":
                policy, metrics = stage_direct_sft(cfg, base, world, tokenizer, done), []
            else:
                policy, metrics = self_evolve(switches, arm, warm, prm, world, tokenizer, done, iterations)
        row = test(ROWS.get(arm, arm), policy, f"{arm}: tests")
        if arm == cfg.method:
            save_policy(policy, out / "policy.safetensors", tokenizer.symbols)
        return {"row": row, "iterations": metrics}

    rows += [done.once("row base", lambda: test("base", base)), done.once("row + warm-up", lambda: test("+ warm-up", warm))]
    for arm, switches in arms.items():
        result = done.once(f"arm {arm}", lambda: run_arm(arm, switches))
        shutil.rmtree(done.folder / arm, ignore_errors=True)       # its last weights
        rows, iterations = [*rows, result["row"]], iterations + result["iterations"]
    seconds = Counter()
    for name, s in done.seconds.items():                           # not those of other tables' arms
        arm, _, what = name.partition(": ")
        if arm in arms or arm not in METHODS and (prm or arm not in ("PRM", "audit")):
            seconds[what or name] += s
    command = load_tensors(out / "config.json")[1]["command"]
    return make_report(command, cfg, preset, device, world, rows, iterations, prm_metrics, audited, seconds)


# ---------------------------------------------------------------- stage 1: base

def stage_base(cfg, policy, world, tokenizer, done):
    """Train the stand-in for a pretrained LMM, in place: it sees and speaks, but reasons badly when asked alone.

    Diet, all from the base split's pictures: captions of everything in a picture and of things that the prompt asks for by
    name (in trials without the latter, pi_0's readings were mostly true, but of the wrong thing); arithmetic facts;
    `base_worked_with_answer` worked examples with the answer in the prompt (that is how it can explain answers at warm-up)
    and `base_worked` asked like a test question. Captions first: in one trial of 1,200 updates, a diet mixed from the start
    read prices at 55 % where captions first read them at 100 %. Long captions and little arithmetic: 500 updates
    with two to six facts asked for and 3,000 arithmetic texts read as well as 700 with one to three and 10,000 (one trial)."""
    rng = random.Random(seed_of(cfg, "base"))
    questions, worked = world["base"], cfg.base_worked + cfg.base_worked_with_answer
    prompts = make_prompts(questions, tokenizer, cfg.image_size)
    captions = []
    for prompt, question in zip(prompts[:cfg.base_images], questions):
        for asked in (False, True) * (2 if question.task == "TQA" else 1):      # tables have the most to read
            text, response = write_caption(question, rng, asked)
            captions.append(Example(prompt.image, tokenizer.prompt(text), tokenizer.response(response)))
    blank = torch.full_like(prompts[0].image, 255)
    facts = [Example(blank, tokenizer.prompt("calculate"), tokenizer.response(arithmetic(rng))) for _ in range(cfg.base_arithmetic)]
    examples = []
    for i, (prompt, question) in enumerate(zip(prompts[:worked], questions)):
        ids = tokenizer.prompt(question.text, question.answer if i >= cfg.base_worked else None)
        texts = dict.fromkeys(write_reasoning(question, rng) for _ in range(cfg.base_texts))
        examples += [Example(prompt.image, ids, tokenizer.response(text)) for text in texts]
    total = cfg.base_caption_updates + cfg.base_updates
    optimizers, schedules = new_optimizers(policy, cfg.base_lr, cfg.lr_warmup_updates, cfg.base_muon_lr, decay_over=total)
    others = captions + facts                                      # a third of the second part's diet
    diet = rng.sample(others, min(len(others), len(examples) // 2)) + examples or others
    # together=1: with up to four rows of a picture side by side, pi_0 had 26 % greedy accuracy instead of 38 (one trial of 1,200
    # caption updates against one of 1,300)
    first, then = (batches(part, cfg.batch_size, random.Random(seed_of(cfg, name)), together=1)
                   for part, name in ((others, "captions"), (diet, "worked examples")))
    loss = fit(policy, optimizers, schedules, chain(islice(first, cfg.base_caption_updates), then), total, "base", done.training)
    print(f"base      {len(captions):,} captions, {len(facts):,} arithmetic texts, {len(examples):,} worked examples; loss {loss:.3f}", flush=True)
    return policy


def arithmetic(rng):
    """Five facts with numbers such as reasoning in the world needs: digits, their sums and products, and round sums of money."""
    def number():
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return rng.choice((a, a + b, a * b, a * b, 10 * a))

    lines = []
    while len(lines) < 5:
        sign = rng.choice("+-*")
        left, right = (rng.randint(1, 18), rng.randint(2, 9)) if sign == "*" else (number(), number())
        result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        if 1 <= result <= 99:
            lines.append(f"{left} {sign} {right} = {result}")
    return "\n".join(lines)


# ---------------------------------------------------------------- stage 2: warm-up

def stage_warmup(cfg, base, world, tokenizer, done):
    """The paper's warm-up: the base model writes reasoning with the answer in its prompt; responses whose own answer is
    wrong are dropped; the base model is trained on the rest, without the answer in the prompt. Returns pi_0, a new policy."""
    questions = world["labeled"][:cfg.warmup_questions]
    texts, responses = sample_texts(base, make_prompts(questions, tokenizer, cfg.image_size, with_answer=True), tokenizer, cfg.warmup_rollouts, 1.0,
                                    cfg.max_new_tokens, seed_of(cfg, "warmup"), "warm-up: base explains answers")
    kept, counts = keep_right(questions, texts)
    print(f"warm-up   {counts['responses']:,} responses with the answer in the prompt, {share(counts['right'], counts['responses'])} right, "
          f"{len(kept):,} different ones kept, of them {share(false_steps(questions, kept), len(kept))} with a false step (oracle)", flush=True)
    policy = copy.deepcopy(base)
    # decayed, so that pi_0 is a settled policy: what self-evolving gains on it is not just a smaller learning rate
    optimizers, schedules = new_optimizers(policy, cfg.warmup_lr, cfg.lr_warmup_updates, decay_over=cfg.warmup_updates)
    examples = as_examples(make_prompts(questions, tokenizer, cfg.image_size), kept, tokenizer)
    train(policy, optimizers, schedules, examples, cfg.warmup_updates, cfg, "warm-up: SFT", done)
    return policy


def stage_direct_sft(cfg, base, world, tokenizer, done):
    """The paper's "SFT" row: the base model trained on the answers of the labeled questions, without reasoning; as many
    updates as warm-up and self-evolving make together. Returns a new policy."""
    examples = [Example(prompt.image, prompt.ids, tokenizer.response(f"answer: {question.answer}"))
                for prompt, question in zip(make_prompts(world["labeled"], tokenizer, cfg.image_size), world["labeled"])]
    policy, updates = copy.deepcopy(base), cfg.warmup_updates + cfg.evolve_updates
    optimizers, schedules = new_optimizers(policy, cfg.warmup_lr, cfg.lr_warmup_updates, decay_over=updates)
    loss = train(policy, optimizers, schedules, examples, updates, cfg, "SFT on direct answers", done)
    print(f"SFT       {len(examples):,} direct answers; loss {loss:.3f}", flush=True)
    return policy


# ---------------------------------------------------------------- stage 3: process reward model

def needs_prm(cfg):
    """Does an arm with these switches ask the PRM for anything?"""
    return cfg.select in ("top", "threshold") or cfg.unlabeled == "vote" or (cfg.temperature == "adaptive" and cfg.adapt_by == "reward_pass_at_k")


def stage_prm(cfg, warm, world, tokenizer, out, done):
    """Label steps of pi_0's responses by Monte-Carlo rollouts and train the PRM on them. It is fixed from then on.
    Writes prm.safetensors and labels.json (for the audit). Returns (RewardModel, metrics on held-out questions, labels)."""
    questions = world["labeled"][:cfg.prm_questions]
    labels = done.once("labels", lambda: [label._asdict() for label in label_steps(
        warm, questions, tokenizer, cfg.prm_responses, cfg.prm_rollouts, cfg.prm_temperature, cfg.max_new_tokens, seed_of(cfg, "labels"))])
    labels = [StepLabels(**label) for label in labels]
    prm, metrics = train_prm(warm, questions, labels, tokenizer, cfg.prm_labels)
    save_policy(prm, out / "prm.safetensors", tokenizer.symbols)
    write_json(out / "labels.json", [label._asdict() for label in labels])
    print(f"PRM       on {metrics['steps']:,} steps of held-out questions: AUC {share(metrics['auc'], 1)}, balanced accuracy "
          f"{share(metrics['balanced_accuracy'], 1)}, {share(metrics['good'], 1)} good steps; training loss {metrics['loss']:.3f}", flush=True)
    return prm, metrics, labels


# ---------------------------------------------------------------- stage 4: self-evolve

def self_evolve(cfg, arm, warm, prm, world, tokenizer, done, earlier=()):
    """The loop of the paper: generate, reward, improve, watch, balance; weights, optimizer and schedule live on between
    iterations (or not: `start_from`, `optimizer`). `earlier`: metrics of arms before this one, which metrics.jsonl holds, too.
    Returns (policy, metrics of each iteration)."""
    policy = copy.deepcopy(warm)
    optimizers, schedules = new_optimizers(policy, cfg.evolve_lr, cfg.lr_warmup_updates)
    start = 1.0 if cfg.temperature == "adaptive" else float(cfg.temperature)
    temperature, metrics = done.load(arm, policy, optimizers, schedules) or (start, [])
    for iteration in range(len(metrics), cfg.iterations + 1):      # iteration 0 only looks at pi_0; after a stop, the first that is not in metrics
        began, trained = time.time(), {}
        if iteration > 0:
            # 1. Generate: L responses to the next questions from the current policy (done.once: or those that were kept before a stop)
            questions, n_labeled = questions_of(cfg, iteration, world)
            prompts = make_prompts(questions, tokenizer, cfg.image_size)
            texts, tokens, sampling = done.once(f"{arm} {iteration} responses", lambda: generate(
                policy, prompts, tokenizer, cfg, temperature, seed_of(cfg, "generate", iteration), f"{arm} {iteration}: responses"))
            # 2. Reward: H(1(a == a*) R_p): of the right and different responses, those that the PRM ranks highest
            answered = questions[:n_labeled] + pseudo_labeled(cfg, prm, questions[n_labeled:], prompts[n_labeled:], texts[n_labeled:], tokenizer)
            right, counts = keep_right(answered, texts)            # right and kept: [(question index, text)]
            kept = select(cfg, prm, prompts, right, tokenizer, iteration)
            # 3. Improve: SFT on them, from the last checkpoint with a living optimizer ("continuous") or as the switches say
            if cfg.start_from == "warmup":
                policy.load_state_dict(warm.state_dict())
            if cfg.optimizer == "reset":
                optimizers, schedules = new_optimizers(policy, cfg.evolve_lr, cfg.lr_warmup_updates)
            so_far, after = (round(cfg.evolve_updates * i / cfg.iterations) for i in (iteration - 1, iteration))
            began_training, updates, examples = time.time(), after - so_far, as_examples(prompts, kept, tokenizer)
            loss = train(policy, optimizers, schedules, examples, updates, cfg, f"{arm} {iteration}: SFT", done, seed=iteration)
            trained = {**training_metrics(questions, answered, n_labeled, counts, right, kept), "updates": updates if kept else 0, "loss": loss,
                       "tokens": tokens, "sampling_seconds": round(sampling, 1), "training_seconds": round(time.time() - began_training, 1)}
        # 4. Watch exploitation (greedy) and exploration (pass@k) on validation questions; every other time, balance them: the
        #    temperature of the next responses becomes the one at which the PRM finds most to exploit
        sweep, only_watch = sweeps_at(cfg, iteration), only_watches_at(cfg, iteration)
        watched = monitor(cfg, policy, prm, world, tokenizer, iteration, temperature, sweep or only_watch)
        if only_watch:
            watched["sweep"]["chosen"] = temperature
        metrics.append({"arm": arm, "iteration": iteration, **watched, **trained, "seconds": round(time.time() - began, 1)})
        if arm == cfg.method:
            write_samples(done.folder.parent / "samples", cfg, iteration, policy, warm, prm, world, tokenizer, temperature)
        temperature = watched["sweep"]["chosen"] if sweep else temperature
        log(done.folder.parent, [*earlier, *metrics])
        done.save(arm, policy, optimizers, schedules, temperature, metrics)
    return policy, metrics


def sweeps_at(cfg, iteration):
    """Is the temperature chosen after this iteration? Not after the last: nothing would be sampled at it."""
    return cfg.temperature == "adaptive" and iteration % cfg.sweep_every == 0 and iteration < cfg.iterations


def only_watches_at(cfg, iteration):
    """Is every temperature measured after this iteration, without choosing one?"""
    return cfg.watch_every > 0 and iteration % cfg.watch_every == 0 and not sweeps_at(cfg, iteration)


def generate(policy, prompts, tokenizer, cfg, temperature, seed, title):
    """L responses to each prompt: (texts [question][response], tokens written, seconds)."""
    began = time.time()
    texts, responses = sample_texts(policy, prompts, tokenizer, cfg.rollouts_per_question, temperature, cfg.max_new_tokens, seed, title)
    return texts, sum(len(response.tokens) for group in responses for response in group), time.time() - began


def select(cfg, prm, prompts, right, tokenizer, iteration):
    """Which of the right and different responses, (question index, text) pairs, are trained on; their R_p is asked for where it counts."""
    if cfg.select == "all":
        return right
    rewards = response_rewards(prm, prompts, right, tokenizer) if needs_prm(cfg) else [0.0] * len(right)
    return rerank(right, rewards, cfg.select, cfg.keep_top, cfg.threshold, seed_of(cfg, "random", iteration))


def response_rewards(prm, prompts, right, tokenizer):
    """R_p = min over steps of the PRM's scores, of (question index, text) pairs."""
    scores = score(prm, [prompts[i] for i, _ in right], [[tokenizer.response(text)] for _, text in right], tokenizer)
    return [min(steps) for (steps,) in scores]


def training_metrics(questions, answered, n_labeled, counts, right, kept):
    """What an iteration was trained on, in the words of metrics.jsonl. answered: the questions with the answers that were gone by."""
    unlabeled = len(questions) - n_labeled
    pseudo = [voted.answer == question.answer for voted, question in zip(answered[n_labeled:], questions[n_labeled:])]
    return {"queries": len(questions), "responses": counts["responses"], "correct": counts["right"], "right": len(right), "kept": len(kept),
            "none_right": counts["none_right"], "all_right": counts["all_right"],
            "right_false_step": false_steps(questions, right) / max(1, len(right)),
            "kept_false_step": false_steps(questions, kept) / max(1, len(kept)),
            "unlabeled": unlabeled, "pseudo_right": sum(pseudo) / max(1, unlabeled)}


def questions_of(cfg, iteration, world):
    """(questions of an iteration, how many of them are labeled). They are its part of an endless row, in which every question comes
    once before any comes again, in a new random order each time. Once unlabeled questions have joined they are half of them, so
    that no method asks more questions than another (our choice: the paper adds them on top). Unlabeled ones come last."""
    def part(split, first, last):
        rng = random.Random(seed_of(cfg, "questions") if split == "labeled" else seed_of(cfg, "questions", split))
        row = chain.from_iterable(rng.sample(world[split], len(world[split])) for _ in count())
        return list(islice(row, first, last))

    # how many iterations have had unlabeled ones, this one included
    joined = 0 if cfg.unlabeled == "none" else max(0, iteration - round(cfg.mix_in * cfg.iterations))
    half = cfg.queries // 2                                        # with 4 an iteration, joined at the second: labeled 0-3; 4-5 and unlabeled 0-1; 6-7 and 2-3
    before, now = (iteration - 1) * cfg.queries - half * max(0, joined - 1), cfg.queries - half * bool(joined)
    return part("labeled", before, before + now) + part("unlabeled", half * max(0, joined - 1), half * joined), now


def pseudo_labeled(cfg, prm, questions, prompts, texts, tokenizer):
    """Unlabeled questions with the answers that their responses vote for, weighted by R_p (the paper's pseudo answers), instead of the
    true ones, which stay hidden; where nobody votes there is nothing that could be right. With `unlabeled` oracle: with the true ones."""
    if not questions or cfg.unlabeled == "oracle":
        return questions
    scores = score(prm, prompts, [[tokenizer.response(text) for text in group] for group in texts], tokenizer)
    votes = [weighted_vote([find_answer(text) for text in group], [min(steps) for steps in rewards]) for group, rewards in zip(texts, scores)]
    return [replace(question, answer=-1 if vote is None else vote) for question, vote in zip(questions, votes)]


def keep_right(questions, texts):
    """The binary reward as a filter. Returns ([(question index, text)] of right responses, each text once per question,
    and a Counter of responses, right, wrong and unparseable, and of questions with none_right and all_right)."""
    kept, counts = [], Counter(responses=sum(map(len, texts)))
    for i, (question, group) in enumerate(zip(questions, texts)):
        grades = [grade(text, question.answer) for text in group]
        counts.update(grades)
        counts.update({"none_right": "right" not in grades, "all_right": set(grades) == {"right"}})
        kept += [(i, text) for text in dict.fromkeys(text for text, g in zip(group, grades) if g == "right")]
    return kept, counts


def false_steps(questions, kept):
    """How many of the (question index, text) pairs hold a line that the oracle calls false."""
    return sum(not all(oracle(questions[i], text)) for i, text in kept)


def monitor(cfg, policy, prm, world, tokenizer, iteration, temperature, all_temperatures):
    """Metrics on the validation questions: one greedy response each and `monitor_rollouts` sampled ones, at `temperature` and, if
    `all_temperatures`, at every one of the grid: in one call, with the same random numbers at every temperature and iteration.
    pass@k is over all of a temperature's n responses. Reward-Pass@k is over as many as a training question gets, L, and the mean
    of the n / L groups of that size: with twice the responses to choose from, hotter sampling would look better than it trains."""
    questions, n = world["validation"], cfg.monitor_rollouts
    L = min(cfg.rollouts_per_question, n)
    grid = sorted({temperature, *GRID}) if all_temperatures else [temperature]
    prompts = make_prompts(questions, tokenizer, cfg.image_size)
    temperatures = torch.tensor([0.0] + [t for t in grid for _ in range(n)])
    texts, responses = sample_texts(policy, prompts, tokenizer, 1 + n * len(grid), temperatures, cfg.max_new_tokens, seed_of(cfg, "monitor"),
                                    f"iteration {iteration}: validation", streams=[0, *list(range(1, n + 1)) * len(grid)])
    grades = [[grade(text, question.answer) for text in group] for group, question in zip(texts, questions)]
    right = np.array([[g == "right" for g in group] for group in grades])
    if prm:
        scores = score(prm, prompts, [[response.tokens for response in group] for group in responses], tokenizer)
        rewards = np.array([[min(steps) for steps in group] for group in scores])
    surface = {}                                                   # temperature -> name -> value of each question
    for i, t in enumerate(grid):
        these = slice(1 + n * i, 1 + n * (i + 1))
        surface[t] = {"pass_at_1": right[:, these].mean(axis=1), "pass_at_k": right[:, these].any(axis=1).astype(float)}
        for k in sorted({k for k in (1, 2, 4, cfg.keep_top) if k <= L and prm}):
            groups = [slice(start, start + L) for start in range(these.start, these.stop - L + 1, L)]
            surface[t][f"reward_pass_at_{k}"] = np.array([np.mean([reward_pass_at_k(r[g], s[g], k) for g in groups]) for r, s in zip(right, rewards)])
    now = slice(1 + n * grid.index(temperature), 1 + n * (grid.index(temperature) + 1))
    right_texts, _ = keep_right(questions, [group[now] for group in texts])
    sampled = [response for group in responses for response in group[now]]
    metrics = {"temperature": temperature, "greedy_accuracy": float(right[:, 0].mean()), "k": n,
               **{name: float(values.mean()) for name, values in surface[temperature].items()},
               # of each question: is the greedy response right; how many of the sampled ones; Reward-Pass@2
               "by_question": {name: " ".join(f"{v:g}" for v in values) for name, values in {
                   "greedy": right[:, 0], "right": right[:, now].sum(axis=1), "reward_pass_at_2": surface[temperature].get("reward_pass_at_2", ())}.items()},
               "false_step": false_steps(questions, right_texts) / max(1, len(right_texts)),      # among different right responses
               "distinct": float(np.mean([len(set(group[now])) / n for group in texts])),          # different texts per sampled response
               # the mean of -log p over sampled tokens estimates the entropy per token of the distribution sampled from, in nats
               "entropy": -float(np.mean([log_prob for response in sampled for log_prob in response.log_probs])),
               "unparseable": sum(group[now].count("unparseable") for group in grades) / len(sampled),
               "truncated": sum(not response.complete for response in sampled) / len(sampled)}
    if prm:                                                        # does the PRM, fixed since pi_0, still know this policy's right responses?
        metrics["mean_reward"], metrics["reward_auc"] = float(rewards[:, now].mean()), auc(right[:, now].ravel(), rewards[:, now].ravel())
    if all_temperatures:
        aim = "pass_at_k" if cfg.adapt_by == "pass_at_k" or not prm else f"reward_pass_at_{min(cfg.keep_top, L)}"
        metrics["sweep"] = choose_temperature({t: values[aim] for t, values in surface.items()}, temperature) | {
            "aim": aim, "surface": {str(t): {name: float(v.mean()) for name, v in values.items()} for t, values in surface.items()},
            "any_right": {str(t): " ".join(f"{v:g}" for v in values["pass_at_k"]) for t, values in surface.items()}}         # pass@k of each question
    return metrics


def write_samples(folder, cfg, iteration, policy, warm, prm, world, tokenizer, temperature):
    """What the report shows of an iteration: SHOWN questions of each task type (from validation) and of each testbed, with L responses
    at `temperature`; each with its grade, whether selection would take it, and for each step the PRM's score, the Monte-Carlo
    label (rollouts of pi_0) and the oracle's verdict. Written to folder/ITERATION.json. Nothing of it is used for training."""
    questions = [q for task in TASKS for q in [q for q in world["validation"] if q.task == task][:SHOWN]]
    questions += [q for bed in TESTBEDS for q in world[bed][:SHOWN]]
    prompts = make_prompts(questions, tokenizer, cfg.image_size)
    texts, responses = sample_texts(policy, prompts, tokenizer, cfg.rollouts_per_question, temperature, cfg.max_new_tokens, seed_of(cfg, "samples"),
                                    f"iteration {iteration}: samples for the report")
    tokens = [[tuple(response.tokens) for response in group] for group in responses]
    scores, labels = [[None] * len(group) for group in tokens], {}
    if prm:
        scores = score(prm, prompts, tokens, tokenizer)
        different = [list(dict.fromkeys(group)) for group in tokens]
        labeled = label_responses(warm, questions, prompts, different, tokenizer, cfg.prm_rollouts, cfg.prm_temperature, cfg.max_new_tokens, seed_of(cfg, "samples"))
        labels = {(label.question, tuple(label.tokens)): [right / label.rollouts for right in label.right] for label in labeled}
    right, _ = keep_right(questions, texts)
    rewards = [min(scores[i][texts[i].index(text)]) if prm else 0.0 for i, text in right]
    selected = set(rerank(right, rewards, cfg.select, cfg.keep_top, cfg.threshold, seed_of(cfg, "random", iteration)))
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{iteration}.json", {"iteration": iteration, "temperature": temperature, "questions": [
        {"id": question.id, "responses": [
            {"text": text, "grade": grade(text, question.answer), "selected": (i, text) in selected and texts[i].index(text) == l,
             "truncated": not responses[i][l].complete, "scores": scores[i][l], "labels": labels.get((i, tokens[i][l])),
             "oracle": oracle(question, text)}
            for l, text in enumerate(texts[i])]} for i, question in enumerate(questions)]})


def choose_temperature(values, current):
    """The temperature of the largest mean, if it beats the current one; a tie keeps the current one, and it is a tie if the
    difference, paired by question, is not above its own standard error. values: temperature -> value of each question."""
    means = {t: round(float(v.mean()), 9) for t, v in values.items()}
    best = min((t for t in means if means[t] == max(means.values())), key=lambda t: (abs(t - current), t))
    gain = values[best] - values[current]
    tie = means[best] - means[current] <= gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else means[best] == means[current]
    return {"chosen": current if tie else best, "best": best, "best_value": means[best], "best_ci95": bootstrap_interval([values[best]]),
            "current_value": means[current], "gain_ci95": bootstrap_interval([gain])}


# ---------------------------------------------------------------- small parts of the stages

def as_examples(prompts, kept, tokenizer):
    """Training examples of (question index, text) pairs: the answer-free prompt and the text."""
    return [Example(*prompts[i], tokenizer.response(text)) for i, text in kept]


def new_policy(cfg, tokenizer):
    """A policy of the configured size with fresh weights (from torch's current random state)."""
    return Policy(ModelConfig(vocabulary=len(tokenizer), **sizes_of(cfg)))


def sizes_of(cfg):
    """What a Config says of the network, by name."""
    return {f.name: getattr(cfg, f.name) for f in fields(ModelConfig) if hasattr(cfg, f.name)}


def train(policy, optimizers, schedules, examples, updates, cfg, title, done, seed=0):
    """SFT on examples in random order, up to two of one image side by side (whatever is kept per question, so that methods are
    compared on like batches). Returns the mean loss of the last 100 updates, or None without examples."""
    if not examples:
        print(f"{title}: nothing to train on, going on without an update")
        return None
    stream = batches(examples, cfg.batch_size, random.Random(seed_of(cfg, "SFT", seed)), together=2)
    return fit(policy, optimizers, schedules, stream, updates, title, done.training)


def seed_of(cfg, *what):
    """A seed for one purpose of one run: independent streams, none depends on what ran before."""
    return zlib.crc32(repr((cfg.seed, *what)).encode())


# ---------------------------------------------------------------- nothing is lost

class Checkpoint:
    """What a run has finished: results of pieces of work, the state after each iteration, and the last states of the training
    that goes on (model.fit writes them into the folder `training`). Each piece has its own seeds, so that one whose file is
    missing or damaged is computed again, to the same result, and the order of pieces is all that has to be kept."""

    def __init__(self, folder, tokenizer, device):
        folder.mkdir(exist_ok=True)
        self.folder, self.training, self.symbols, self.device = folder, folder / "training", tokenizer.symbols, device
        self.seconds = self._read(folder / "seconds.json", lambda path: load_tensors(path)[1]["result"], {})

    @contextmanager
    def stage(self, name):
        """Count the seconds of a stage; those of a try that was killed inside it are lost, as is what it had not saved."""
        began = time.time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.time() - began
        self._write(self.folder / "seconds.json", self.seconds)

    def once(self, name, make):
        """The result of make(), which is whatever JSON can hold; read back if it was made before."""
        path = self.folder / f"{name}.json"
        result = self._read(path, lambda path: load_tensors(path)[1]["result"])
        return self._write(path, json.loads(json.dumps(make()))) if result is None else result

    def has(self, file):
        """Is there a file of this name? (Whether it is whole shows when it is read.)"""
        return (self.folder / file).exists()

    def network(self, name, make):
        """The Policy that make() returns; read back if it was made before."""
        path = self.folder / f"{name}.safetensors"
        policy = self._read(path, lambda path: load_policy(path, self.device)[0])
        if policy is None:
            policy = make()
            save_policy(policy, path, self.symbols)
        return policy

    def save(self, arm, policy, optimizers, schedules, temperature, metrics):
        """Everything that the next iteration of an arm needs. What its last iteration has kept by `once` goes."""
        save_training(self.folder / arm, policy, optimizers, schedules, {"temperature": temperature, "metrics": metrics})
        for old in self.folder.glob(f"{arm} *.json"):
            old.unlink()

    def load(self, arm, policy, optimizers, schedules):
        """Put back what `save` wrote; returns (temperature, metrics), or None if there is nothing."""
        about = load_training(self.folder / arm, policy, optimizers, schedules)
        return about and (about["temperature"], about["metrics"])

    def _read(self, path, read, otherwise=None):
        try:
            return read(path)
        except FileNotFoundError:
            return otherwise
        except ValueError as error:
            print(f"{error}: made again", flush=True)
            return otherwise

    def _write(self, path, result):
        save_tensors(path, {}, {"result": result})
        return result


@contextmanager
def alone_in(out):
    """Hold the folder's lock, which goes with the process however it ends. Exit 2 if another process holds it."""
    with open(out / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"mstar.py: {out}: process {file.read()} is at work in this folder; wait for it, or stop it first", file=sys.stderr)
            sys.exit(2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        (out / "lock").unlink()


@contextmanager
def stopped_cleanly(again, out=None):
    """One line instead of a traceback for what can stop a run from outside, and how to go on: python mstar.py `again`, or --resume out
    once there is something to resume."""
    try:
        yield
    except KeyboardInterrupt:
        line, status = "stopped", 130
    except OSError as error:                                       # disk full, folder gone or read-only
        line, status = f"{error.filename or out or again}: {error.strerror or error}", 2
    except FloatingPointError as error:
        line, status = str(error), 1
    else:
        return
    again = f"--resume {out}" if out and (out / "config.json").exists() else again
    print(f"mstar.py: {line}; what was saved is whole, go on with: python mstar.py {again}", file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------- command line, screen and files

def parse(argv):
    """Flags to (Config, preset name, folder): the preset first, then the method's switches, then what was typed; or, with --resume,
    what the run in that folder was begun with. Without --resume the folder is None. Exits 2 on wrong use."""
    parser = argparse.ArgumentParser(description="M-STaR on a small world of visual math.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"mstar.py: {message}; see python mstar.py --help\n")
    parser.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS)
    parser.add_argument("--resume", metavar="runs/NAME", help="go on with a run that was stopped", default=argparse.SUPPRESS)
    choices = {"method": METHODS, "experiment": TABLES, "device": available(), "start_from": ("last", "warmup"), "optimizer": ("inherit", "reset"),
               "select": ("all", "top", "threshold", "random"), "unlabeled": ("none", "oracle", "vote"),
               "adapt_by": ("reward_pass_at_k", "pass_at_k"), "prm_labels": ("soft", "hard")}
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?# (.*)", inspect.getsource(Config), re.MULTILINE))     # a field's comment is its help
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=type(f.default), choices=choices.get(f.name), default=argparse.SUPPRESS, metavar=None if f.name in choices else "",
                            help=f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    if folder := given.pop("resume", None):
        preset, cfg = begun_with(parser, Path(folder), given)
    else:
        preset = given.pop("preset", "gpu" if torch.cuda.is_available() else "cpu")
        set_by_arms = {"arms", "method", "minutes", "seed", *CONTINUOUS, "keep_top", "adapt_by", "unlabeled", "mix_in", "watch_every"}
        if "experiment" in given and (clash := given.keys() & set_by_arms):
            parser.error(f"--experiment {given['experiment']}: it sets --{sorted(clash)[0]} itself; leave it out")
        of_table = ",".join(arm for arm in TABLES.get(given.get("experiment"), {}) if arm in METHODS)
        given["arms"] = given.get("arms") or of_table or given.get("method") or COMPARED
        given.setdefault("method", "" if "experiment" in given else given["arms"].split(",")[-1])
        cfg = Config(**{**PRESETS[preset], **METHODS.get(given["method"], {}), **given})
    if unknown := set(cfg.arms.split(",")) - METHODS.keys():
        parser.error(f"--arms {cfg.arms}: {sorted(unknown)[0]!r} is not a method; known: {', '.join(METHODS)}")
    if cfg.method not in cfg.arms.split(",") and not cfg.experiment:
        parser.error(f"--arms {cfg.arms}: --method {cfg.method} must be among them")
    if cfg.temperature != "adaptive" and not re.fullmatch(r"\d+(\.\d*)?|\.\d+", cfg.temperature):
        parser.error(f"--temperature {cfg.temperature}: must be a number of at least 0, or adaptive")
    may_be_0 = ("seed", "world_seed", "base_arithmetic", "base_worked", "base_worked_with_answer", "base_caption_updates", "vision_layers",
                "watch_every")
    for f in fields(Config):
        value, usual = getattr(cfg, f.name), int(isinstance(f.default, int) and f.name not in may_be_0)
        least = {"prm_questions": 2, "labeled": 2, "test": len(TASKS)}.get(f.name, usual)        # at least one question of each task type
        if not isinstance(value, str) and (not math.isfinite(value) or value < least):
            parser.error(f"--{f.name} {value}: must be at least {least}")
    if not 0 < cfg.interval <= 1:
        parser.error(f"--interval {cfg.interval}: must be above 0 and at most 1, the share of the questions per iteration")
    if not cfg.mix_in < 1:
        parser.error(f"--mix_in {cfg.mix_in}: must be below 1, the share of the iterations before unlabeled questions join")
    if cfg.image_size % 64:
        parser.error(f"--image_size {cfg.image_size}: must be a multiple of 64")
    if cfg.seeds > 1 and not cfg.experiment:
        parser.error(f"--seeds {cfg.seeds}: only with --experiment; one run has one --seed")
    if cfg.experiment == "dynamics" and min(cfg.rollouts_per_question, cfg.monitor_rollouts) < 2:
        parser.error("--experiment dynamics: Reward-Pass@2 needs at least 2 --rollouts_per_question and --monitor_rollouts")
    try:
        for size, factor in SIZES.get(cfg.experiment, {"": 1.0}).items():
            ModelConfig(vocabulary=1, **sizes_of(of_size(cfg, factor)))
    except ValueError as error:
        parser.error(f"--{error}" + f" (in the {size} policy of {cfg.experiment})" * bool(size))
    loops = [switches for arm, switches in arms_of(cfg).items() if arm != "sft"]
    if len({loop.iterations * loop.queries for loop in loops}) > 1 or cfg.minutes and len({loop.interval for loop in loops}) > 1:
        parser.error(f"--passes {cfg.passes:g} of --labeled {cfg.labeled}: arms of different --interval would ask different numbers of questions; "
                     "take whole passes, without --minutes, and a number of questions that every interval divides")
    return cfg, preset, folder and Path(folder)


def begun_with(parser, folder, given):
    """(preset, Config) of the run in a folder. Exits 2 if there is none, or if a flag that was typed says something else."""
    try:
        about = load_tensors(folder / "config.json")[1]
        saved = {f.name: about[f.name] for f in fields(Config)} | {"preset": about["preset"]}
        if odd := [f.name for f in fields(Config) if type(saved[f.name]) is not type(f.default)]:
            raise ValueError(f"{folder}/config.json: {odd[0]} {saved[odd[0]]!r} is of another type than in this version")
    except (OSError, ValueError, KeyError) as error:
        words = {FileNotFoundError: "no run was begun there", KeyError: f"a run of another version, without {error}"}
        parser.error(f"--resume {folder}: {words.get(type(error), error)}")
    if saved["experiment"]:
        parser.error(f"--resume {folder}: it belongs to an experiment, which goes on by its own command: {about['command']}")
    if differ := [f"--{name} {value} (there: {saved[name]})" for name, value in given.items() if value != saved[name]]:
        parser.error(f"--resume {folder}: a run goes on as it was begun, without {', '.join(differ)}")
    return saved.pop("preset"), Config(**saved)


def same_as_before(cfg, out):
    """The Config, if what is kept in the folder of an experiment was made with its values. Exits 2 and names the difference if not."""
    if (out / "config.json").exists():
        try:
            before = load_tensors(out / "config.json")[1]
        except ValueError as error:
            print(f"mstar.py: {error}; give the experiment another --out", file=sys.stderr)
            sys.exit(2)
        for name, value in asdict(cfg).items():
            if name not in ("experiment", "seeds", "arms", "method", "out") and before.get(name) != value:
                print(f"mstar.py: {out}: was begun with --{name} {before.get(name)}, not {value}; give the experiment another --out", file=sys.stderr)
                sys.exit(2)
    return cfg


def arms_of(cfg):
    """{method: Config} of the arms to run. A switch that was typed is for the arm of --method; the others have their own bundles."""
    plain = {name: getattr(Config, name) for bundle in METHODS.values() for name in bundle}
    return {arm: cfg if arm == cfg.method else replace(cfg, **{**plain, **METHODS[arm]}) for arm in cfg.arms.split(",")}


def available():
    """Devices of this machine, the best first."""
    return ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


def new_folder(cfg, preset):
    """Make and return the folder of the run. An existing folder that holds anything is never written to: exit 2."""
    out = Path(cfg.out) if cfg.out else Path("runs") / f"{preset}-{cfg.method}-seed{cfg.seed}"
    number = 2
    while not cfg.out and out.exists():
        out, number = Path("runs") / f"{preset}-{cfg.method}-seed{cfg.seed}-{number}", number + 1
    try:
        out.mkdir(parents=True, exist_ok=True)
        left = [path for path in out.rglob("*") if path not in (out / "lock", out / "checkpoint")]     # these two if it was stopped in its first seconds
        if left:
            raise OSError("not empty; nothing is overwritten, choose a new name, or go on with a stopped run by --resume")
        if not os.access(out, os.W_OK):
            raise OSError("not writable")
    except OSError as error:
        print(f"mstar.py: --out {out}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    return out


# What a response and an update of a stage cost, in responses of true length and updates of worked examples (`expected_minutes`)
WEIGHTS = {"warm-up": 0.9, "PRM": 1.6, "self-evolving": 1.0, "watching": 1.5, "sweeps": 0.75, "audit": 2.4, "tests": 2.6,
           "base update": 1.5, "SFT update": 0.7}
SCALED = ("base_caption_updates", "base_updates", "warmup_questions", "warmup_updates", "prm_questions", "passes", "evolve_updates")  # by --minutes


def work_of(cfg):
    """(responses, updates) of a run by stage: what its cost is made of."""
    arms = arms_of(cfg)
    loops = [switches for arm, switches in arms.items() if arm != "sft"]
    with_prm = any(map(needs_prm, loops))
    sweeps = sum(sweeps_at(loop, i) or only_watches_at(loop, i) for loop in loops for i in range(loop.iterations + 1))
    monitored = sum(loop.iterations + 1 for loop in loops)          # each time one greedy response and monitor_rollouts per temperature
    responses = {"warm-up": min(cfg.warmup_questions, cfg.labeled) * cfg.warmup_rollouts,
                 "PRM": with_prm * min(cfg.prm_questions, cfg.labeled) * cfg.prm_responses,
                 "self-evolving": sum(loop.iterations * loop.queries * loop.rollouts_per_question for loop in loops),
                 "watching": cfg.validation * (1 + cfg.monitor_rollouts) * (monitored - sweeps),
                 "sweeps": cfg.validation * (1 + cfg.monitor_rollouts * len(GRID)) * sweeps,
                 "audit": with_prm * 17 * cfg.test, "tests": (2 + len(arms)) * (2 * cfg.test + len(TESTBEDS) * cfg.testbed)}
    updates = {"base": cfg.base_caption_updates + cfg.base_updates, "warm-up": cfg.warmup_updates,
               "SFT": (cfg.warmup_updates + cfg.evolve_updates) * ("sft" in arms), "self-evolving": cfg.evolve_updates * len(loops)}
    return responses, updates


def expected_minutes(cfg, policy, world, tokenizer):
    """{stage: minutes} on this machine, from a short calibration: seconds of an update and of a response of true length.

    WEIGHTS is what a response or an update of a stage cost in a run on 2 cores, measured in those units: responses
    with the same beginning share work, so that a sweep's are cheap; a label's response takes its rollouts with it; PRM scores
    are part of watching and sweeping; greedy test responses share nothing."""
    rng, questions = random.Random(0), world["labeled"][:64]
    prompts, probe = make_prompts(questions, tokenizer, cfg.image_size), copy.deepcopy(policy)
    texts = [[tokenizer.response(write_reasoning(question, rng)) for _ in range(8)] for question in questions]
    stream = batches([Example(*prompt, text) for prompt, group in zip(prompts, texts) for text in group], cfg.batch_size, rng, together=2)

    def seconds(run):
        began = time.time()
        run()
        return time.time() - began

    fit(probe, *new_optimizers(probe, 1e-4, 1), stream, 1, "calibration")
    update = seconds(lambda: fit(probe, *new_optimizers(probe, 1e-4, 1), stream, 5, "calibration")) / 5
    length = min(32, cfg.max_new_tokens)                           # tokens that are written, the last of them freely: about the mean response
    prefixes = [[text[:-1][:length - 1] for text in group] for group in texts]
    response = seconds(lambda: sample(policy, prompts, 1, 1.0, length, 0, tokenizer.EOS, prefixes=prefixes)) / sum(map(len, texts))
    responses, updates = work_of(cfg)
    weight = WEIGHTS | {"PRM": WEIGHTS["PRM"] * cfg.prm_rollouts}
    return {stage: (responses.get(stage, 0) * weight.get(stage, 0) * response + updates.get(stage, 0) * weight.get(f"{stage} update", 1.0) * update) / 60
            for stage in {**updates, **responses}}


def expected_memory(cfg, policy):
    """Gigabytes: the program, the pictures of the largest split that is trained on, and the sampler's caches."""
    largest = max(cfg.base_images, cfg.base_worked + cfg.base_worked_with_answer, cfg.labeled if "sft" in cfg.arms else cfg.queries)
    pictures = largest * 3 * cfg.image_size ** 2
    rows, workers, size = (1024, WORKERS, 4) if policy.device.type == "cpu" else (4096, 1, 2)
    cache = workers * size * 2 * cfg.layers * cfg.width * cfg.kv_heads // cfg.heads * rows * (cfg.max_new_tokens + 8)
    return 0.5 + (pictures + cache) / 2**30


def announce(cfg, preset, out, device, policy, world, tokenizer, done, to_be_scaled):
    """Say what is about to happen, before it starts. Returns the Config, which is scaled to fit into cfg.minutes if it is `to_be_scaled`."""
    if to_be_scaled:                                               # everything but the tests
        minutes = expected_minutes(cfg, policy, world, tokenizer)
        factor = max(0.01, (cfg.minutes - minutes["tests"]) / (sum(minutes.values()) - minutes["tests"]))
        numbers = {name: max(2, round(factor * getattr(cfg, name))) for name in SCALED if name != "passes"}
        cfg = replace(cfg, passes=factor * cfg.passes, **numbers)
        print(f"scaled    by {factor:.2f} to fit {cfg.minutes:g} minutes: " + ", ".join(f"{name} {getattr(cfg, name):.4g}" for name in SCALED))
    left = [arm for arm in arms_of(cfg) if not done.has(f"arm {arm}.json")]
    if left:
        minutes = expected_minutes(replace(cfg, arms=",".join(left)), policy, world, tokenizer)
        files = {"base": "base.safetensors", "warm-up": "pi_0.safetensors", "PRM": "labels.json", "audit": "audit.json"}
        minutes |= {stage: 0.0 for stage, file in files.items() if done.has(file)}
    responses, updates = work_of(cfg)

    def listed(numbers):
        return f"{sum(numbers.values()):,}: " + ", ".join(f"{name} {n:,}" for name, n in numbers.items())

    print(f"run       {out}   preset {preset}, {f'experiment {cfg.experiment}' if cfg.experiment else f'method {cfg.method}'}, "
          f"seed {cfg.seed}, on {device} ({WORKERS} workers)")
    print(f"policy    {sum(p.numel() for p in policy.parameters()):,} parameters")
    print("sets      " + ", ".join(f"{name} {len(questions):,}" for name, questions in world.items()))
    print(f"responses {listed(responses)}; {cfg.prm_rollouts} rollouts from each step of the PRM's")
    print(f"updates   {listed(updates)} ({', '.join(arms_of(cfg))}; {cfg.iterations} iterations)")
    if left:
        parts = ", ".join(f"{name} {m:.1f}" for name, m in minutes.items() if m)
        print(f"expected  {sum(minutes.values()):.1f} minutes: {parts}; {expected_memory(cfg, policy):.1f} GB of memory", flush=True)
    else:
        print("finished  all arms", flush=True)
    return cfg


def log(out, metrics):
    """metrics.jsonl, one line per iteration, and the last of them on screen, with a second line about a sweep."""
    write_whole(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics).encode())
    m, begin = metrics[-1], f"{metrics[-1]['arm']} {metrics[-1]['iteration']:>2}: "
    names = {"greedy_accuracy": "greedy", "pass_at_1": "pass@1", "pass_at_k": f"pass@{m['k']}", "reward_pass_at_2": "Reward-Pass@2",
             "false_step": "right with a false step", "unparseable": "unparseable", "truncated": "truncated"}
    parts = [f"T {m['temperature']}", *(f"{words} {share(m[name], 1)}" for name, words in names.items() if name in m),
             f"distinct {m['distinct']:.2f}", f"entropy {m['entropy']:.3f}"]
    if "kept" in m:
        parts += [f"kept {m['kept']:,} of {m['right']:,} right and different, {share(m['kept_false_step'], 1)} of them with a false step",
                  "no update" if m["loss"] is None else f"loss {m['loss']:.3f}"]
    print(begin + ", ".join(parts) + f", {m['seconds']:.0f} s", flush=True)
    if sweep := m.get("sweep"):
        low, high = sweep["best_ci95"]
        print(f"{begin}sweep chose T {sweep['chosen']}: {sweep['aim']} is best at T {sweep['best']}, {share(sweep['best_value'], 1)} "
              f"[{100 * low:.1f}, {100 * high:.1f}]; T {m['temperature']} would give {share(sweep['current_value'], 1)}", flush=True)


def make_report(command, cfg, preset, device, world, rows, iterations, prm_metrics, audited, seconds):
    """report.json: everything a table or figure is made from."""
    mine = next((row for row in rows if row["name"] == ROWS.get(cfg.method, cfg.method)), None)
    return {"command": command, "preset": preset, "method": cfg.method, "seed": cfg.seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "device": torch.cuda.get_device_name() if device == "cuda" else f"{device}, {platform.machine()}, {WORKERS} worker{'s' * (WORKERS > 1)}",
            "seconds": round(sum(seconds.values()), 1), "stages": {name: round(s, 1) for name, s in seconds.items()}, "config": asdict(cfg),
            "rows": rows, "iterations": iterations, "prm": prm_metrics, "verifier": audited and audited["by_question"],
            "names": ROWS, "tasks": " ".join(question.task for question in world["test"]),
            "controls": {"most_frequent_answer": most_frequent_answer(world["labeled"], world["test"])},
            "gain_over": {row["name"]: paired_gain((mine, row)) for row in rows if row is not mine} if mine else {}}


if __name__ == "__main__":
    main()
