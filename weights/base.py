"""
weights/base.py: the stand-in for a pretrained LMM, trained from nothing: it sees and speaks, but
reasons badly without the answer in its prompt. Not part of the paper's method, which starts from
such a model.

base.safetensors (with base.json: sizes, vocabulary, how it was made) is what a run starts from.
Read:     Recipe -> train_base -> Muon
Run:      python mstar.py --method base --policy scratch --out runs/base
          (runs/base/policy.safetensors is a base then; --recipe cpu-small, cpu-large for Table 5)
"""
import random
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import chain, islice

import torch

from data import OPERATIONS, write_reasoning
from evaluate import make_prompts
from model import Example, ModelConfig, Optimizer, Policy, adamw, batches, seed_for

@dataclass(frozen=True)
class Recipe:
    """How a base is made: the sizes of the network, and what it is trained on, all from pictures
    that no other split of its world has."""
    sizes: dict                        # of ModelConfig, where they are not its defaults
    images: int = 40_000               # captioned pictures
    arithmetic: int = 20_000           # texts of five arithmetic facts
    worked: int = 300                  # worked examples that are asked like a test question
    worked_with_answer: int = 6000     # worked examples with the answer in the prompt
    texts: int = 5                     # reasoning texts drawn per worked example, equal ones once
    caption_updates: int = 6000        # updates on captions and arithmetic alone; then
    updates: int = 2000                # on a mix of these (a third) and worked examples
    lr: float = 3e-3                   # of AdamW (embeddings, norms, biases, patches)
    muon_lr: float = 2e-3              # of Muon (the matrices)

    @property
    def questions(self):
        """Size of the split `base`."""
        return max(self.images, self.worked + self.worked_with_answer)

FEW = dict(images=60, arithmetic=20, worked=20, worked_with_answer=20, caption_updates=4, updates=4)
TINY = dict(layers=1, vision_width=16, vision_layers=1, kv_heads=1)
RECIPES = {
    "cpu": Recipe({}),                 # weights/base.safetensors
    # Table 5's other sizes
    "cpu-small": Recipe(dict(width=64, heads=2, kv_heads=2, vision_width=32)),
    "cpu-large": Recipe(dict(width=192, heads=6, kv_heads=6, vision_width=96)),
    "test": Recipe(TINY | dict(width=32, heads=2), **FEW),
    "test-small": Recipe(TINY | dict(width=16, heads=1), **FEW),
    "test-large": Recipe(TINY | dict(width=48, heads=3), **FEW),
    # sized on paper, not measured yet
    "gpu": Recipe(dict(width=384, layers=6, heads=6, kv_heads=6, vision_width=256, vision_layers=4,
                       vision_heads=4, patch_size=8), lr=1e-3),
}

def train_base(questions, cfg, run):
    """Train a policy from nothing by the recipe cfg.recipe, saved every 500 updates, or more, by
    run.fit. Returns (policy, {loss, recipe, world_seed: whose tests it has not seen}).

    Captions name everything in a picture, or what the prompt asks for by name (in trials without
    the latter, pi_0's readings were mostly true, but of the wrong thing). Worked examples with the
    answer in the prompt are how it can explain answers at warm-up. Captions first: in one trial of
    1,200 updates, the mix from the start read prices at 55 %, captions first at 100 %."""
    tokenizer, recipe = run.tokenizer, RECIPES[cfg.recipe]
    torch.manual_seed(cfg.seed)
    policy = Policy(ModelConfig(len(tokenizer), **recipe.sizes), tokenizer).to(run.device)
    rng = random.Random(seed_for(cfg.seed, "base"))
    prompts = make_prompts(policy, questions)
    perception = []                                                # captions, then arithmetic
    for prompt, question in zip(prompts[:recipe.images], questions):
        repeats = 2 if question.task == "TQA" else 1               # tables have the most to read
        for asked in (False, True) * repeats:
            text, response = write_caption(question, rng, asked)
            perception.append(Example(prompt.image, tokenizer.prompt(text),
                                      tokenizer.response(response)))
    blank = torch.full_like(prompts[0].image, 255)
    for _ in range(recipe.arithmetic):
        perception.append(Example(blank, tokenizer.prompt("calculate"),
                                  tokenizer.response(arithmetic(rng))))
    worked = []
    number = recipe.worked + recipe.worked_with_answer
    for i, (prompt, question) in enumerate(zip(prompts[:number], questions)):
        answer = question.answer if i >= recipe.worked else None
        ids = tokenizer.prompt(question.text, answer)
        for text in dict.fromkeys(write_reasoning(question, rng) for _ in range(recipe.texts)):
            worked.append(Example(prompt.image, ids, tokenizer.response(text)))
    mixed = rng.sample(perception, min(len(perception), len(worked) // 2)) + worked
    # together=1: with up to four rows of a picture side by side, pi_0 was 12 points worse (a trial)
    first = batches(perception, cfg.batch_size, random.Random(seed_for(cfg.seed, "captions")))
    then = batches(mixed, cfg.batch_size, random.Random(seed_for(cfg.seed, "worked examples")))
    stream = chain(islice(first, recipe.caption_updates), then)
    total = recipe.caption_updates + recipe.updates
    matrices, rest = split_parameters(policy)
    optimizer = Optimizer([adamw(rest, recipe.lr), Muon(matrices, lr=recipe.muon_lr)],
                          cfg.lr_warmup_updates, decay_over=total)
    loss = run.fit(policy, optimizer, stream, total, cfg.micro_batch, "base")
    print(f"base      {len(perception):,} captions and arithmetic texts, {len(worked):,} worked "
          f"examples; loss {loss:.3f}", flush=True)
    return policy, {"loss": loss, "recipe": asdict(recipe), "world_seed": cfg.world_seed}

def write_caption(question, rng, asked):
    """(prompt text, response text) about what can be read off the picture, worded like the readings
    of a reasoning text: all of it, or, if `asked`, two to six facts that the prompt names."""
    number = min(rng.randint(2, 6), len(question.facts)) if asked else len(question.facts)
    subjects = rng.sample(sorted(question.facts), number)          # which facts
    prompt = "describe " + " and ".join(subjects) if asked else "describe"
    lines = [f"{subject} is {question.facts[subject]}" for subject in rng.sample(subjects, number)]
    return prompt, "\n".join(lines)

def arithmetic(rng):
    """Five facts with numbers such as reasoning in the world needs: digits, their sums and
    products, and round sums of money."""
    def number():
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return rng.choice((a, a + b, a * b, a * b, 10 * a))

    lines = []
    while len(lines) < 5:
        sign = rng.choice("+-*")
        if sign == "*":
            left, right = rng.randint(1, 18), rng.randint(2, 9)
        else:
            left, right = number(), number()
        result = OPERATIONS[sign](left, right)
        if 1 <= result <= 99:
            lines.append(f"{left} {sign} {right} = {result}")
    return "\n".join(lines)

def split_parameters(policy):
    """(matrices inside the network, for Muon; all other parameters, for AdamW)."""
    matrices, rest = [], []
    for name, p in policy.named_parameters():
        outside = name.split(".")[-2] in ("embed", "vision")       # embeddings, positions
        (matrices if p.dim() == 2 and not outside else rest).append(p)
    return matrices, rest

class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (adjust_lr_fn="match_rms_adamw": updates of AdamW's size) in the precision
    of the weights. Torch's own always computes in bf16, which took 1 second per update on a CPU
    without bf16 arithmetic; this takes a twentieth of it. It needed about half of AdamW's updates
    to read bars and to add, in one trial from nothing.

    Muon (Jordan 2024, kellerjordan.github.io/posts/muon): momentum, then as the update the nearest
    orthogonal matrix to it, so that all directions of a matrix learn equally fast. Five
    Newton-Schulz steps bring its singular values close to 1."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = defaultdict(list)                         # they go through together
            for p in group["params"]:
                same_shape[p.shape].append(p)
            for (rows, columns), parameters in same_shape.items():
                x = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                x = self._orthogonal(x if rows <= columns else x.mT.contiguous())
                scale = 0.2 * max(rows, columns) ** 0.5            # to the size of AdamW's updates
                for p, update in zip(parameters, x if rows <= columns else x.mT):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)

    def _nesterov(self, p, beta):
        momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(p.grad, 1 - beta)
        return p.grad.lerp(momentum, beta)

    def _orthogonal(self, x):                                      # (n, rows <= columns, columns)
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x
