"""
bench.py: how fast the sampler and the training are. It measures, and is no test.

What is timed, in tokens per second, the ways to do one thing in turns:
    - three workloads of a run, by `model.sample` and by `sample_plainly`, a row per response;
    - the parts of the work on one core, beside their matrix products alone (the ceiling);
and the seconds of `sample` for growing questions, responses, tokens and width, and peak memory.
Read:     sample_plainly -> Work, workloads, separate_calls -> bench_sampling -> bench_parts ->
          bench_growth -> main
Run:      python tests/bench.py [runs/NAME] [--repeats 5]
          without a run: random weights of the cpu preset, which hide much of what sharing gains.
          The last line is one JSON object.
"""
import argparse
import copy
import json
import platform
import random
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Tokenizer, build_world, write_reasoning                   # noqa: E402
from evaluate import make_prompts, tokens_of                               # noqa: E402
from model import (WORKERS, Example, ModelConfig, Policy, Prompt, Sampling, # noqa: E402
                   _decode, _prefill, _sample_batch, batches, collate, draw, load_network,
                   precision, sample)
from mstar import GRID                                                     # noqa: E402

LONGEST = 72                                                       # most tokens of a response
ROWS = 256                                                         # responses per plain call
NOBODY_ENDS = SimpleNamespace(EOS=-1)                              # in place of a tokenizer

# ---------------------------------------------------------------- what the sampler is measured by

def sample_plainly(policy, prompts, temperature, uniforms, cached=True):
    """What `sample` is measured against: a row and a prefill for every response, all rows until the
    last has ended; without `cached`, all of the text is read again for every token. Prompts: one
    per response (R); uniforms (R, T) -> list (R) of tokens."""
    (R, T), device, end = uniforms.shape, policy.device, policy.tokenizer.EOS
    uniforms, temperature = uniforms.to(device), torch.full((R,), temperature, device=device)
    forced, own = torch.full((R,), -1, device=device), torch.arange(R, device=device)
    images = torch.stack([prompt.image for prompt in prompts]).to(device)
    ids = [list(prompt.ids) for prompt in prompts]                 # grow by a token per step
    # Equal images would be read once: give every response one of its own
    prompts = [Prompt(prompt.image.clone(), prompt.ids) for prompt in prompts]
    with torch.no_grad(), precision(policy.device):                # as `_sample_batch` does
        logits, start, prefix = _prefill(policy, prompts)          # (R, V), (R,), (R, G, P, D)
        suffix = _room_for(T, R, prefix)
        ended = torch.zeros(R, dtype=torch.bool, device=device)
        for t in range(T):
            tokens, _ = draw(logits, temperature, uniforms[:, t], forced)
            ended |= tokens == end
            for row, token in zip(ids, tokens.tolist()):
                row.append(token)
            if ended.all() or t + 1 == T:
                break
            if cached:
                written = [(k[:, :, :t + 1], v[:, :, :t + 1]) for k, v in suffix]
                logits = _decode(policy, tokens, own, start, t, prefix, written)       # (R, V)
            else:
                logits = _logits_without_cache(policy, images, ids)                    # (R, V)
    responses = []
    for row, prompt in zip(ids, prompts):
        tokens = row[len(prompt.ids):]
        responses.append(tokens[:tokens.index(end) + 1] if end in tokens else tokens)
    return responses

def _room_for(tokens, rows, prefix):
    """An empty cache like that of the prompts, for so many tokens of so many rows."""
    cache = []
    for layer in prefix:                                           # keys, values (N, G, P, D)
        cache.append([part.new_zeros(rows, part.shape[1], tokens, part.shape[3]) for part in layer])
    return cache

def _logits_without_cache(policy, images, ids):
    """Logits of what follows each of the texts `ids`, of unequal lengths, by one full pass."""
    rows = [torch.tensor(row) for row in ids]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(policy.device)
    last = torch.tensor([len(row) - 1 for row in ids])
    return policy(images, padded)[torch.arange(len(ids)), last]

class Products(TorchDispatchMode):
    """Notes the shapes of all matrix products while it is entered, backward ones too: the
    arithmetic that cannot be left out. (Not those inside the fused attention of training and
    prefill: the ceiling is a little too high there, our share too low.)"""

    def __init__(self):
        super().__init__()
        self.shapes = []                                           # of the factors of each product

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        with self:                                                 # linear and matmul are made of
            parts = function.decompose(*args, **kwargs or {})      # the products below
        if parts is not NotImplemented:
            return parts
        if function in (aten.mm.default, aten.bmm.default, aten.addmm.default):
            self.shapes.append(tuple(factor.shape for factor in args[-2:]))
        return function(*args, **kwargs or {})

    @property
    def multiplications(self):
        """How many they are in all: a product (.., n, k) times (.., k, m) takes .. n k m."""
        return sum(left.numel() * right[-1] for left, right in self.shapes)

def alternate(ways, repeats):
    """Time the ways to do one thing in turns, so that a busy minute of the machine hits all of
    them: {name: function that returns its number of tokens} -> {name: median tokens/s}."""
    speeds = defaultdict(list)
    for _ in range(repeats):
        for name, run in ways.items():
            began = time.perf_counter()
            tokens = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            speeds[name].append(tokens / (time.perf_counter() - began))
    return {name: sorted(found)[len(found) // 2] for name, found in speeds.items()}

# ---------------------------------------------------------------- the workloads of a run

class Work(NamedTuple):
    """A workload, as `sample` takes it."""
    prompts: list
    how: Sampling
    prefixes: list = None

def workloads(policy, prompts):
    """What a run asks of the sampler: {name: Work}. 16 responses to each of 64 questions at T = 1;
    a sweep of all temperatures on 16 of them; 8 rollouts from every step of 4 responses to each
    of those 16 (none if the policy writes no line breaks)."""
    L, few = 16, prompts[:16]
    temperatures = [temperature for temperature in GRID for _ in range(L)]
    streams = list(range(L)) * len(GRID)                           # common random numbers
    step_ends, steps = policy.tokenizer.step_ends, []
    for group in tokens_of(sample(policy, few, Sampling(4, 1.0, LONGEST, seed=0))):
        steps.append([tokens[:end + 1] for tokens in group for end in step_ends(tokens)[:-1]])
    found = {"T = 1": Work(prompts[:64], Sampling(L, 1.0, LONGEST, seed=0)),
             "sweep": Work(few, Sampling(len(streams), temperatures, LONGEST, 0, streams))}
    if any(steps):
        found["step labels"] = Work(few, Sampling(8, 0.6, LONGEST, seed=0), steps)
    return found

def separate_calls(work):
    """The same work for a sampler that takes one temperature and no prefixes: a list of (prompts,
    responses to each of them, temperature)."""
    prompts, how = work.prompts, work.how
    if work.prefixes:
        prompts = []
        for prompt, prefixes in zip(work.prompts, work.prefixes):
            prompts += [Prompt(prompt.image, prompt.ids + prefix) for prefix in prefixes]
    if isinstance(how.temperature, float):
        return [(prompts, how.rollouts, how.temperature)]
    return [(prompts, how.temperature.count(temperature), temperature)
            for temperature in dict.fromkeys(how.temperature)]

def tokens_written(policy, work):
    """Do the work by `model.sample`; returns how many tokens it wrote."""
    responses = sample(policy, *work)
    in_all = sum(len(tokens) for group in tokens_of(responses) for tokens in group)
    given = sum(len(prefix) for group in work.prefixes or [] for prefix in group)
    return in_all - work.how.rollouts * given                      # nobody wrote the prefixes

def tokens_written_plainly(policy, calls, pool, cached=True, rows=ROWS):
    """Do the calls of `separate_calls` by `sample_plainly`, `rows` responses at a time, on all
    workers of the pool; returns how many tokens it wrote."""
    parts = []
    for prompts, n, temperature in calls:
        asked = [prompt for prompt in prompts for _ in range(n)]
        parts += [(asked[i:i + rows], temperature) for i in range(0, len(asked), rows)]

    def run(part):
        prompts, temperature = part
        uniforms = torch.rand(len(prompts), LONGEST)
        return sum(map(len, sample_plainly(policy, prompts, temperature, uniforms, cached)))

    return sum(pool.map(run, parts))

def bench_sampling(policy, prompts, repeats):
    """Tokens per second of the workloads on all workers: {workload: {way: tokens/s}}."""
    found = {}
    with ThreadPoolExecutor(WORKERS if policy.device.type == "cpu" else 1) as pool:
        for name, work in workloads(policy, prompts).items():
            calls = separate_calls(work)
            ways = {"sample": partial(tokens_written, policy, work),
                    "plain": partial(tokens_written_plainly, policy, calls, pool)}
            if name == "T = 1":                                    # four questions: it is so slow
                calls = separate_calls(Work(work.prompts[:4], work.how))
                ways["no cache"] = partial(tokens_written_plainly, policy, calls, pool,
                                           cached=False, rows=32)
            found[name] = alternate(ways, repeats)
    return found

# ---------------------------------------------------------------- the parts of the work

def bench_parts(policy, prompts, examples, repeats):
    """Tokens per second of the parts of one worker's work, beside their own matrix products alone:
    {part: {"ours": tokens/s, "products": tokens/s}}."""
    device, few = policy.device, prompts[:64]
    N, each = len(few), 1024 // len(few)
    rows = N * each
    with torch.no_grad(), precision(policy.device):
        _, start, prefix = _prefill(policy, few)
    owner = torch.arange(N, device=device).repeat_interleave(each)                     # (rows,)
    suffix = _room_for(17, rows, prefix)                           # as if 16 tokens were written
    uniforms = torch.rand(rows, LONGEST, generator=torch.Generator().manual_seed(0))
    temperature, forced = torch.ones(rows), torch.full((rows, LONGEST), -1)
    batch = [part.to(device) for part in collate(examples)]
    parameters = list(policy.parameters())

    def prefill():
        with torch.no_grad(), precision(policy.device):
            _prefill(policy, few)
        return sum(len(prompt.ids) + policy.image_tokens for prompt in few)

    def decode():
        with torch.no_grad(), precision(policy.device):
            _decode(policy, torch.zeros_like(owner), owner, start, 16, prefix, suffix)
        return rows

    def whole():
        with precision(policy.device):
            groups = _sample_batch(policy, few, [each] * N, temperature, uniforms, forced, None)
        return sum(len(tokens) for group in tokens_of(groups) for tokens in group)

    def training():
        with precision(policy.device):
            torch.autograd.grad(policy.loss(*batch), parameters)
        return sum(len(example.prompt) + len(example.response) for example in examples)

    parts = {"prefill": prefill, f"decode {rows} rows": decode, f"sample {rows} responses": whole,
             "training": training}
    dtype = prefix[0][0].dtype
    return {name: _beside_its_products(run, device, dtype, repeats) for name, run in parts.items()}

def _beside_its_products(run, device, dtype, repeats):
    with Products() as products:
        tokens = run()
    factors = {}                                                   # random ones, of every shape
    for pair in products.shapes:
        factors[pair] = [torch.randn(shape, device=device, dtype=dtype) for shape in pair]

    @torch.inference_mode()
    def products_alone():
        for pair in products.shapes:
            torch.matmul(*factors[pair])
        return tokens

    return alternate({"ours": run, "products": products_alone}, repeats)

# ---------------------------------------------------------------- growth and memory

def bench_growth(policy, prompts):
    """Seconds of `sample` for growing numbers of questions, responses and tokens, and for growing
    width with random weights: {what: {how many: seconds}}."""
    c = policy.config
    endless = copy.copy(policy)                                    # the same weights
    endless.tokenizer = NOBODY_ENDS

    def seconds(policy, Q, L, T):
        began = time.perf_counter()
        sample(policy, prompts[:Q], Sampling(L, 1.0, T, seed=0))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def of_width(width):
        heads = width * c.heads // c.width                         # of equal size
        config = replace(c, width=width, heads=heads, kv_heads=heads)
        return Policy(config, NOBODY_ENDS).to(policy.device)

    widths = [c.width // 2, c.width, 2 * c.width, 4 * c.width]
    lengths = [LONGEST // 4, LONGEST // 2, LONGEST, 2 * LONGEST]
    return {"questions": {Q: seconds(policy, Q, 16, LONGEST) for Q in (32, 64, 128, 256)},
            "responses": {L: seconds(policy, 64, L, LONGEST) for L in (4, 8, 16, 32)},
            "tokens": {T: seconds(endless, 16, 16, T) for T in lengths},
            "width": {width: seconds(of_width(width), 16, 16, LONGEST // 2) for width in widths}}

def peak_gb(device):
    """Most memory that was held at once, of the GPU or of this process, in GB; "not known" on a
    system that does not say."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource                                            # not on every system
    except ImportError:
        return "not known"
    unit = 2**30 if sys.platform == "darwin" else 2**20            # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

# ---------------------------------------------------------------- command line

def fail(message):
    """Exit 2 with one line."""
    print(f"{Path(sys.argv[0]).name}: {message}; see --help", file=sys.stderr)
    sys.exit(2)

def arguments(argv, description, nargs=None):
    """The command line of a script that measures a run's policy; `nargs` of argparse for the run's
    folder."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("run", metavar="runs/NAME", nargs=nargs, help="the run whose policy writes")
    parser.add_argument("--repeats", type=int, default=5, help="how often each way is timed [5]")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        fail(f"--repeats {args.repeats}: must be at least 1")
    return args

def policy_of(run, device="cpu"):
    """The policy of a finished run."""
    try:
        return load_network(Path(run) / "policy.safetensors", Tokenizer(), device)
    except (OSError, ValueError) as error:
        fail(f"{run}: not the folder of a finished run ({error})")

def random_policy(device):
    """Random weights of the cpu preset."""
    torch.manual_seed(0)
    tokenizer = Tokenizer()
    return Policy(ModelConfig(len(tokenizer)), tokenizer).to(device)

def two_texts_each(policy, questions, prompts, rng):
    """Training examples, two worked texts to each question: side by side, as a run trains on its
    kept responses."""
    examples = []
    for question, prompt in zip(questions, prompts):
        for _ in range(2):
            response = policy.tokenizer.response(write_reasoning(question, rng))
            examples.append(Example(*prompt, response))
    return examples

def main(argv=None):
    """Command line of this file. Returns what was found."""
    args = arguments(argv, "How fast the sampler and the training are.", nargs="?")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = policy_of(args.run, device) if args.run else random_policy(device)
    where = f"{platform.machine()} CPU, {WORKERS} workers"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    size = sum(p.numel() for p in policy.parameters())
    print(f"{args.run or 'random weights'}: {size:,} parameters, {where}; tokens/s, medians of "
          f"{args.repeats}", flush=True)
    questions, rng = build_world({"labeled": 256})["labeled"], random.Random(0)
    prompts = make_prompts(policy, questions)
    examples = two_texts_each(policy, questions, prompts, rng)

    sampling = bench_sampling(policy, prompts, args.repeats)
    for name, speeds in sampling.items():
        ours = speeds["sample"]
        others = [f"{way} {speed:,.0f} ({ours / speed:.1f}x slower)"
                  for way, speed in speeds.items() if way != "sample"]
        print(f"{name:12} sample {ours:,.0f}, {', '.join(others)}", flush=True)
    parts = bench_parts(policy, prompts, next(batches(examples, 32, rng, together=2)), args.repeats)
    for name, speeds in parts.items():
        share = 100 * speeds["ours"] / speeds["products"]
        print(f"{name:22} {speeds['ours']:,.0f}, its matrix products alone "
              f"{speeds['products']:,.0f}: {share:.0f} % of the ceiling", flush=True)
    seconds = bench_growth(policy, prompts)
    for what, taken in seconds.items():
        as_text = ", ".join(f"{n}: {s:.2f}" for n, s in taken.items())
        print(f"seconds by {what}: {as_text}")
    peak = peak_gb(device)
    print("peak memory " + (peak if peak == "not known" else f"{peak:.2f} GB"))
    found = {"device": where, "repeats": args.repeats, "sampling": sampling, "parts": parts,
             "seconds": seconds, "peak_gb": peak}
    print(json.dumps(found, allow_nan=False))
    return found

if __name__ == "__main__":
    main()
