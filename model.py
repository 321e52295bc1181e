"""
model.py: a small vision-language transformer, its training loop and its sampler.

Paper (arXiv 2412.17451v3): the policy model pi. There it is MiniCPM-V-2.5 (8B), Phi-3.5-vision or InternVL2; here a small
    member of the public SigLIP + pixel-shuffle + Llama family: a ViT reads patches, neighbouring patches are folded into
    one token ("pixel shuffle"), a linear map takes them into a Llama-style decoder that writes text.
Read:     VisionTower -> DecoderBlock -> Policy -> fit -> sample   (bottom-up: the parts explain the whole)
Departs:  sizes, and trained from scratch. One image per question, of one fixed size; no image tiling.
Run:      nothing by itself; `fit` is the only entrance for training, `sample` for generating text.

Letters in shape comments: B batch rows, P image patches, I image tokens, T text tokens, S cached tokens, C width, H heads,
G key/value heads, D = C / H, V vocabulary, Q questions, L rollouts per question.
"""
import json
import math
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network. Heads and shuffle follow the SigLIP + Llama family; `head_dim` is width / heads in both parts."""
    vocabulary: int
    image_size: int = 128
    patch_size: int = 16
    shuffle: int = 2              # shuffle x shuffle neighbouring patches become one image token
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 2
    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4             # fewer than heads: grouped-query attention, heads / kv_heads query heads share one key/value head
    rope_theta: float = 10_000.0


# ---------------------------------------------------------------- vision: SigLIP

class VisionBlock(nn.Module):
    """Pre-norm transformer block without a mask: every patch sees every patch. LayerNorm, biases and GELU, as in SigLIP."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):                                          # (B, P, C)
        B, P, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, P, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)   # (B, H, P, D) each
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P, C))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def sine_positions(side, width):
    """(side^2, width) start values of the learned positions: sines and cosines of x and of y, so that "the patch to the
    left" is one linear map for all patches. Our choice; in one trial of 400 updates random values did about as well."""
    frequency = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return 0.7 * torch.cat([wave(place.flatten()[:, None] * frequency) for place in (x, y) for wave in (torch.sin, torch.cos)], dim=1)


class VisionTower(nn.Module):
    """Images to image tokens of the decoder's width: patches, ViT, pixel shuffle, linear projector."""

    def __init__(self, c):
        super().__init__()
        self.side, self.shuffle = c.image_size // c.patch_size, c.shuffle
        self.patch = nn.Conv2d(3, c.vision_width, c.patch_size, c.patch_size)
        self.position = nn.Parameter(sine_positions(self.side, c.vision_width))       # (P, C) learned, one per patch
        self.blocks = nn.ModuleList(VisionBlock(c.vision_width, c.vision_heads) for _ in range(c.vision_layers))
        self.norm = nn.LayerNorm(c.vision_width, eps=1e-6)
        self.project = nn.Linear(c.vision_width * c.shuffle ** 2, c.width, bias=False)

    def forward(self, images):                                     # (B, size, size, 3) uint8
        # the patch convolution as one matrix product, a third of the convolution's time on a CPU: cut patches out as bytes first
        p = self.patch.kernel_size[0]
        x = images.unflatten(1, (self.side, p)).unflatten(3, (self.side, p)).permute(0, 1, 3, 5, 2, 4)     # (B, side, side, 3, p, p)
        x = x.reshape(len(images), self.side ** 2, 3 * p * p).float().div_(127.5).sub_(1)                  # (B, P, 3 p^2) in [-1, 1]
        x = F.linear(x, self.patch.weight.flatten(1), self.patch.bias) + self.position                     # (B, P, C)
        for block in self.blocks:
            x = block(x)
        x, s, n = self.norm(x), self.shuffle, self.side // self.shuffle
        # pixel shuffle: s x s neighbours are laid side by side, so I = P / s^2 tokens carry what P patches carried
        x = x.view(-1, n, s, n, s, x.shape[-1]).transpose(2, 3).flatten(3).flatten(1, 2)     # (B, I, s*s*C)
        return self.project(x)                                     # (B, I, C of the decoder)


# ---------------------------------------------------------------- decoder: Llama

def rotate(x, cos, sin):
    """Rotary positions (RoPE), Llama's layout: dimension i turns together with dimension i + D/2. x (B, H, T, D)."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).type_as(x)      # angles are fp32, x may be bf16


class DecoderBlock(nn.Module):
    """Pre-norm block: RMSNorm, grouped-query attention with rotary positions, SwiGLU. No biases."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.width // c.heads
        hidden = 8 * math.ceil(c.width / 3)                        # SwiGLU has three matrices: 8/3 keeps the usual 8 C^2 parameters
        self.norm1, self.norm2 = nn.RMSNorm(c.width, eps=1e-5), nn.RMSNorm(c.width, eps=1e-5)
        self.q, self.out = nn.Linear(c.width, c.width, bias=False), nn.Linear(c.width, c.width, bias=False)
        self.kv = nn.Linear(c.width, 2 * c.kv_heads * self.head_dim, bias=False)
        self.gate, self.up = nn.Linear(c.width, hidden, bias=False), nn.Linear(c.width, hidden, bias=False)
        self.down = nn.Linear(hidden, c.width, bias=False)

    def project(self, x, cos, sin):
        """Queries (B, H, T, D) and keys, values (B, G, T, D) of x (B, T, C), positions already turned in."""
        B, T, _ = x.shape
        x = self.norm1(x)
        q = self.q(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).view(B, T, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x, attended):
        """Close the block: x (B, T, C) plus what attention found (B, H, T, D), then the SwiGLU."""
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def forward(self, x, cos, sin, past=None):
        """Full causal pass over x (B, T, C), after `past` (keys, values) of what stands before it. Also returns the keys and
        values (B, G, S, D) of both together."""
        q, k, v = self.project(x, cos, sin)
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        T, S = x.shape[1], k.shape[2]
        seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.finish(x, attended), k, v

    def decode(self, x, cos, sin, keys, values, column, bias):
        """One new token per row: x (B, 1, C). Writes its key and value into each row's own cache column, column (B,), and
        adds `bias` (B, 1, 1, S), 0 or -inf, to the attention scores. keys, values (B, G, S, D) are changed in place: they are the cache."""
        q, k, v = self.project(x, cos, sin)
        every = torch.arange(len(x), device=x.device)
        keys[every, :, column], values[every, :, column] = k[:, :, 0], v[:, :, 0]
        # query heads that share a key/value head stand as H/G "positions" of it, so nothing is copied per query head
        q = q.view(q.shape[0], self.kv_heads, -1, self.head_dim)   # (B, G, H/G, D)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias.type_as(q))
        return self.finish(x, attended.reshape(x.shape[0], self.heads, 1, self.head_dim))


class Policy(nn.Module):
    """The vision-language transformer pi(y | x, o): image tokens first, then text, one causal sequence; tied embeddings."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name != "vision.position":  # residual outputs start small: the sum over layers keeps its scale
                scale = (2 * config.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=scale * (parameter[0].numel() ** -0.5 if "embed" not in name else 0.05))

    @property
    def device(self):
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def image_tokens(self):
        """I, the number of tokens one image takes."""
        return (self.config.image_size // self.config.patch_size // self.config.shuffle) ** 2

    def precision(self):
        """bf16 arithmetic on a GPU; fp32 elsewhere, where bf16 would be many times slower."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def rope(self, positions):
        """cos and sin for RoPE: positions (B, T) -> (B, 1, T, D) each."""
        D = self.config.width // self.config.heads
        frequency = self.config.rope_theta ** (-torch.arange(0, D, 2, device=positions.device).float() / D)   # (D/2,)
        angle = (positions[..., None] * frequency).repeat(1, 1, 2)[:, None]                                    # (B, 1, T, D)
        return angle.cos(), angle.sin()

    def hidden(self, images, ids, owner=None, keep_cache=False):
        """Last hidden states of the text: images (N, size, size, 3) uint8, ids (B, T), owner (B,) the number of each row's
        image (without it, every row has its own) -> (B, T, C).

        An image is read once, however many rows it has: it stands first and attention is causal, so that its keys and values
        depend on no text. Rows may be padded on the right: nothing before the padding sees it.
        With `keep_cache` also returns a list of (keys, values), each (B, G, I+T, D), one per layer."""
        owner = torch.arange(len(ids), device=ids.device) if owner is None else owner
        image, text, cache = self.vision(images), self.embed(ids), []                # (N, I, C), (B, T, C)
        I, T = image.shape[1], text.shape[1]
        cos, sin = self.rope(torch.arange(I + T, device=ids.device)[None])           # (1, 1, I+T, D)
        for block in self.blocks:
            image, k, v = block(image, cos[:, :, :I], sin[:, :, :I])
            text, k, v = block(text, cos[:, :, I:], sin[:, :, I:], past=(k[owner], v[owner]))
            if keep_cache:
                cache.append((k, v))
        text = self.norm(text)
        return (text, cache) if keep_cache else text

    def logits(self, hidden):
        """(..., C) hidden states -> (..., V) fp32 logits of the next token. Tied: the embedding read backwards."""
        return F.linear(hidden, self.embed.weight).float()

    def forward(self, images, ids, owner=None):                    # -> (B, T, V)
        return self.logits(self.hidden(images, ids, owner))

    def loss(self, images, ids, owner, targets):
        """SFT loss, mean over all response tokens of the batch (a mean per row would weigh tokens of long responses less).
        targets (B, T): the token that follows each position, or -1 where nothing is to be learned: prompt and padding."""
        learned = targets >= 0
        logits = self.logits(self.hidden(images, ids, owner)[learned])             # (number of response tokens, V): no logits for the rest
        return F.cross_entropy(logits, targets[learned])


# ---------------------------------------------------------------- weights on disk

def save_policy(policy, path, symbols):
    """Write `path` (.safetensors) of a Policy, or of another network with a ModelConfig as `config`, and beside it a JSON with the
    sizes and the vocabulary. Each file appears whole or not at all."""
    path = Path(path)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}, f"{path}.part")
    description = {"model": asdict(policy.config), "vocabulary": list(symbols)}
    path.with_suffix(".json.part").write_text(json.dumps(description, indent=1))
    path.with_suffix(".json.part").replace(path.with_suffix(".json"))
    Path(f"{path}.part").replace(path)


def load_policy(path, device="cpu", kind=Policy):
    """Read what `save_policy` wrote of a network of class `kind`: (network, vocabulary). ValueError names the file when it is
    damaged or does not fit."""
    path = Path(path)
    try:
        description = json.loads(path.with_suffix(".json").read_text())
        policy = kind(ModelConfig(**description["model"]))
        policy.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a policy this program wrote, or damaged ({error})") from error
    return policy.to(device), description["vocabulary"]


# ---------------------------------------------------------------- training, used by every stage

class Example(NamedTuple):
    """One training example: picture, prompt ids, response ids."""
    image: torch.Tensor
    prompt: list
    response: list


def fit(model, optimizers, schedules, stream, updates, title):
    """The training loop of every stage: `updates` optimizer updates on `model.loss(*batch)` of the next batches of `stream`.
    Returns the mean loss of the last 100. FloatingPointError names the update whose loss is not a finite number."""
    losses, began, read = [], time.time(), 0
    with tqdm(total=updates, desc=title, unit=" updates", leave=False, mininterval=1) as bar:
        for _ in range(updates):
            batch = [part.to(model.device) for part in next(stream)]
            with model.precision():
                loss = model.loss(*batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"{title}: the loss of update {len(losses)} is not a finite number")
            read += batch[1].numel()
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {read / (time.time() - began):,.0f} tokens/s", refresh=False)
            bar.update()
    return sum(losses[-100:]) / len(losses[-100:]) if losses else None


def collate(examples):
    """Tensors of a batch: images (N, size, size, 3), ids (B, T) padded on the right, owner (B,), targets (B, T): the token after
    each position where that is a response token, else -1, so that neither prompt nor padding is learned."""
    images, ids, owner = pad_together(examples)
    targets = torch.full_like(ids, -1)
    for row, example in enumerate(examples):
        first, last = len(example.prompt), len(example.prompt) + len(example.response)
        targets[row, first - 1:last - 1] = ids[row, first:last]
    return images, ids[:, :-1], owner, targets[:, :-1]


def pad_together(examples):
    """The different images of a batch (N, size, size, 3), ids (B, T) of prompts and responses, and whose image is each row's (B,)."""
    number = {}                                                    # an image, by identity -> its place among the different ones
    owner = torch.tensor([number.setdefault(id(example.image), len(number)) for example in examples])
    images = torch.stack([example.image for example in {id(example.image): example for example in examples}.values()])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(example.prompt + example.response) for example in examples], batch_first=True)
    return images, ids, owner


def batches(examples, batch_size, rng, collate=collate, together=1):
    """Endless batches of `collate`, every example once per pass. Up to `together` examples of one image are neighbours, so
    that the image is read once for them; such groups are sorted by length within windows of two batches: less padding, and a
    batch still mixes task types. (Longer windows would pad less, but fill a batch with one task type; not measured.)"""
    of_image = defaultdict(list)
    for i, example in enumerate(examples):
        of_image[id(example.image)].append(i)

    def length(i):
        return len(examples[i].prompt) + len(examples[i].response)

    while True:
        groups = []
        for members in of_image.values():
            members = rng.sample(members, len(members))
            groups += [members[i:i + together] for i in range(0, len(members), together)]
        order, window = [], []
        for group in rng.sample(groups, len(groups)):
            window.append(group)
            if sum(map(len, window)) >= 2 * batch_size:
                order += sorted(window, key=lambda group: max(map(length, group)))
                window = []
        order = [i for group in order + window for i in group]
        for start in rng.sample(range(0, len(order), batch_size), math.ceil(len(order) / batch_size)):
            yield collate([examples[i] for i in order[start:start + batch_size]])


def new_optimizers(policy, lr, lr_warmup_updates, muon_lr=0.0, decay_over=0):
    """Optimizers of a Policy and their schedules (two lists of equal length): AdamW on everything, or, with `muon_lr`, Muon on the
    matrices of the blocks and AdamW on the rest. The schedule: linear start, then constant, or a cosine to a tenth over
    `decay_over` updates. Muon needed about half of AdamW's updates to read bars and to add, in one trial from nothing, so the base
    stage uses it; the stages of the paper use AdamW."""
    inner = [p for name, p in policy.named_parameters() if p.dim() == 2 and name.split(".")[-2] not in ("embed", "vision")] if muon_lr else []
    rest = [p for p in policy.parameters() if all(p is not q for q in inner)]
    groups = [{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.05},       # no decay for norms and biases
              {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=policy.device.type in ("cuda", "cpu"))]
    if inner:
        optimizers.append(Muon(inner, lr=muon_lr, weight_decay=0.05))

    def factor(update):
        start = min(1.0, (update + 1) / lr_warmup_updates)
        return start * (0.55 + 0.45 * math.cos(math.pi * min(1.0, update / decay_over)) if decay_over else 1.0)

    return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (adjust_lr_fn="match_rms_adamw": updates of AdamW's size) in the precision of the weights. Torch's own
    always computes in bf16, which took 1 second per update on a CPU without bf16 arithmetic; this takes a twentieth of it.

    Muon (Jordan 2024, kellerjordan.github.io/posts/muon): momentum, then the nearest orthogonal matrix to it as the update, so
    that all directions of a matrix learn equally fast. Five Newton-Schulz steps bring singular values close to 1."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, group["momentum"])))      # Nesterov
            for (rows, columns), pairs in by_shape.items():        # matrices of one shape go through together
                x = torch.stack([update if rows <= columns else update.T for _, update in pairs])
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                for (p, _), update in zip(pairs, x if rows <= columns else x.mT):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


# ---------------------------------------------------------------- sampler

class Prompt(NamedTuple):
    """What the policy is asked: an image (size, size, 3) uint8 tensor and prompt token ids."""
    image: torch.Tensor
    ids: list


class Response(NamedTuple):
    """One sampled response. `tokens` end with the end token if `complete`; else the response was cut off at
    max_new_tokens. `log_probs[i]` is the log-probability of tokens[i] under the distribution it was drawn from
    (for a greedy response: under the policy at temperature 1)."""
    tokens: list
    complete: bool
    log_probs: list


def draw(logits, temperature, uniform, forced):
    """Next tokens by inverse CDF: logits (B, V), temperature (B,), uniform (B,) in [0, 1) -> tokens (B,), log_probs (B,).
    Each row has its own uniform number, so what it draws does not depend on the rows beside it. Temperature 0 is greedy.
    forced (B,): a token that is taken instead of a drawn one, or -1."""
    greedy = temperature == 0
    log_probs = F.log_softmax(logits / torch.where(greedy, 1.0, temperature)[:, None], dim=-1)
    cdf = log_probs.exp().cumsum(dim=-1)
    sampled = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    tokens = torch.where(forced >= 0, forced, torch.where(greedy, logits.argmax(dim=-1), sampled))
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


@torch.inference_mode()
def sample(policy, prompts, rollouts_per_question, temperature, max_new_tokens, seed, end_token, prefixes=None, streams=None, rows=None, progress=None):
    """Sample responses: list (Q) of Prompt -> list (Q) of lists (L = rollouts_per_question) of Response.

    Responses of a question that have the same tokens so far share one row of the batch, whatever their temperature: one
    forward pass and one cache entry for all of them, until they draw different tokens; then each branch goes on in a row of
    its own. A row that no response is in any more is given to the next branch or the next waiting question.

    temperature: a number, or anything that broadcasts to (Q, L), so that one call can mix temperatures. 0 is greedy.
    seed: response l of question q draws its token t with uniform number (q, streams[l], t) of one seeded table. The same seed
        gives the same responses whatever `rows` is, up to the floating-point order of the matrix products.
    prefixes: for each question a list of token lists. Each of them is continued L times, and the question's responses are
        those of its first prefix, then those of its second ... The prefix is part of a response and of max_new_tokens.
    streams: L integers, by default 0 .. L-1: responses of a question with the same stream draw with the same random numbers
        (a sweep over temperatures with common random numbers).
    rows: how many responses are in work at a time. The cache has that many rows, so its size is known before the start:
        2 x layers x rows x kv_heads x (image + longest prompt + max_new_tokens) x head_dim numbers. By default 1024 on a CPU,
        4096 elsewhere, and never less than the responses of one question.
    progress: called as progress(responses just ended, tokens just written) after every decode step.
    Raises ValueError for a negative temperature, an empty prompt, or a prefix that leaves nothing to write."""
    L, T, V, device = rollouts_per_question, max_new_tokens, policy.config.vocabulary, policy.device
    prefixes = prefixes or [[[]]] * len(prompts)
    temperature = torch.as_tensor(temperature, dtype=torch.float32).expand(len(prompts), L)
    if (temperature < 0).any():
        raise ValueError(f"temperature {temperature.min().item()} is negative; 0 is greedy")
    if any(len(prompt.ids) == 0 for prompt in prompts):
        raise ValueError("empty prompt")
    # One entry per response, a question's responses side by side: (its question, its place among L, its forced tokens)
    counts = [L * len(group) for group in prefixes]
    first = [0, *accumulate(counts)]
    question = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    place = torch.arange(first[-1]) % L
    forced = torch.full((first[-1], T), -1)
    for i, prefix in enumerate(prefix for group in prefixes for prefix in group):
        if len(prefix) >= T or end_token in prefix:
            raise ValueError(f"a prefix of {len(prefix)} tokens leaves nothing to write: at most {T}, and no end token inside")
        forced[i * L:(i + 1) * L, :len(prefix)] = torch.tensor(prefix, dtype=torch.long)
    streams = torch.arange(L) if streams is None else torch.as_tensor(streams)
    uniforms = torch.rand(len(prompts), int(streams.max()) + 1, T, generator=torch.Generator().manual_seed(seed))
    temperature, stream = temperature[question, place].to(device), streams[place].to(device)
    question, forced, uniforms = question.to(device), forced.to(device), uniforms.to(device)
    slots = max([min(rows or (1024 if device.type == "cpu" else 4096), first[-1]), *counts])
    waiting = sorted((q for q in range(len(prompts)) if counts[q]), key=lambda q: len(prompts[q].ids))       # equal lengths together: little padding
    longest = policy.image_tokens + max((len(prompt.ids) for prompt in prompts), default=0) + T
    was_training = policy.training
    policy.eval()

    cache, B = None, 0                                             # rows [0, B) of the cache are in use
    logits = torch.empty(0, V, device=device)                      # (B, V) what each row expects next
    length = torch.zeros(slots, dtype=torch.long, device=device)   # columns of each row that are filled: image, prompt, response
    live = row = t = torch.empty(0, dtype=torch.long, device=device)          # per response in work: its number, its row, its tokens so far
    history = []                                                   # (live, tokens, log_probs) of every draw
    while waiting or len(live):
        # 1. Prefill: waiting questions take free room, one row each for all their responses, an eighth of the rows at a time
        batch, room = [], slots - len(live)
        if not len(live) or room >= slots // 8:
            while waiting and counts[waiting[0]] <= room:
                batch.append(waiting.pop(0))
                room -= counts[batch[-1]]
        if batch:
            with policy.precision():
                last, lengths, filled = _prefill(policy, [prompts[q] for q in batch])
            cache = cache or [tuple(part.new_zeros(slots, part.shape[1], longest, part.shape[3]) for part in layer) for layer in filled]
            for layer, new in zip(cache, filled):
                for part, new_part in zip(layer, new):
                    part[B:B + len(batch), :, :new_part.shape[2]] = new_part
            length[B:B + len(batch)] = lengths
            logits = torch.cat([logits, last])
            joining = torch.cat([torch.arange(first[q], first[q + 1], device=device) for q in batch])
            live, t = torch.cat([live, joining]), torch.cat([t, torch.zeros_like(joining)])
            row = torch.cat([row, torch.arange(B, B + len(batch), device=device).repeat_interleave(torch.tensor([counts[q] for q in batch], device=device))])
            B += len(batch)
        # 2. Draw: every response for itself, from the logits of its row
        tokens, log_probs = draw(logits[row], temperature[live], uniforms[question[live], stream[live], t], forced[live, t])
        history.append((live, tokens, log_probs))
        goes_on = (tokens != end_token) & (t + 1 < T)
        drawn = len(live)
        live, row, t, tokens = live[goes_on], row[goes_on], t[goes_on] + 1, tokens[goes_on]
        if progress:
            progress(drawn - len(live), drawn)
        # 3. Branch: one row for each different (row, token). The first branch of a row stays in it, the others are copied
        #    into rows that nobody is in any more, so that the rows in use stay [0, B).
        branches, branch = torch.unique(row * V + tokens, return_inverse=True)
        parent, token, B = branches // V, branches % V, len(branches)
        stays = (parent.diff(prepend=parent.new_full((1,), -1)) > 0) & (parent < B)
        free = torch.ones(B, dtype=torch.bool, device=device)
        free[parent[stays]] = False
        target, to, source = parent.clone(), free.nonzero()[:, 0], parent[~stays]
        target[~stays] = to
        columns = int(length[parent].max()) + 1 if B else 0
        for part in (part for layer in cache for part in layer):
            part[to, :, :columns] = part[source, :, :columns]
        length[to] = length[source]
        row, feed = target[branch], torch.empty_like(token).scatter_(0, target, token)
        # 4. Decode: one forward pass of one token per row
        if B:
            with policy.precision():
                logits = _decode(policy, feed, length[:B], [tuple(part[:B, :, :columns] for part in layer) for layer in cache])
            length[:B] += 1
        else:
            logits = logits[:0]

    policy.train(was_training)
    if not history:
        return [[] for _ in prompts]
    live, tokens, log_probs = (torch.cat(parts) for parts in zip(*history))
    order = live.sort(stable=True).indices                         # by response, its tokens in the order they were drawn
    sizes = live.bincount(minlength=first[-1]).tolist()
    tokens, log_probs = tokens[order].split(sizes), log_probs[order].split(sizes)
    responses = [Response(a.tolist(), a[-1].item() == end_token, b.tolist()) for a, b in zip(tokens, log_probs)]
    return [responses[a:b] for a, b in pairwise(first)]


def _prefill(policy, prompts):
    """Read each image and prompt once: (logits of the first token (Q, V), lengths (Q,), keys and values per layer)."""
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=policy.device)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(prompt.ids) for prompt in prompts], batch_first=True).to(policy.device)      # (Q, T)
    hidden, filled = policy.hidden(torch.stack([prompt.image for prompt in prompts]).to(policy.device), ids, keep_cache=True)
    return policy.logits(hidden[torch.arange(len(prompts)), lengths - 1]), lengths + policy.image_tokens, filled


def _decode(policy, tokens, length, cache):
    """Feed one token to each row and write its keys and values to column `length` of the cache: tokens (B,), length (B,),
    cache per layer (keys, values) (B, G, S, D) -> logits (B, V)."""
    columns = torch.arange(cache[0][0].shape[2], device=policy.device)
    bias = torch.zeros(len(length), len(columns), device=policy.device).masked_fill(columns > length[:, None], -math.inf)   # (B, S)
    cos, sin = policy.rope(length[:, None])
    x = policy.embed(tokens)[:, None]                                                                                 # (B, 1, C)
    for block, (keys, values) in zip(policy.blocks, cache):
        x = block.decode(x, cos, sin, keys, values, length, bias[:, None, None])
    return policy.logits(policy.norm(x)[:, 0])


@torch.inference_mode()
def sample_without_cache(policy, prompt, temperature, uniforms, end_token):
    """The slow reference for `sample`: one response, a full forward pass per token. uniforms (max_new_tokens,) -> Response."""
    tokens, log_probs = [], []
    while len(tokens) < len(uniforms) and end_token not in tokens:
        ids = torch.tensor([prompt.ids + tokens], device=policy.device)
        logits = policy(prompt.image[None].to(policy.device), ids)[:, -1]
        token, log_prob = draw(logits, torch.tensor([float(temperature)]), uniforms[len(tokens)][None], torch.tensor([-1]))
        tokens.append(token.item())
        log_probs.append(log_prob.item())
    return Response(tokens, tokens[-1] == end_token, log_probs)
