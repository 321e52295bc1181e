"""
model.py: a small vision-language transformer, its training loop and its sampler.

Paper (arXiv 2412.17451v3): the policy model pi. There it is MiniCPM-V-2.5 (8B), Phi-3.5-vision or InternVL2; here a small
    member of the public SigLIP + pixel-shuffle + Llama family: a ViT reads patches, neighbouring patches are folded into
    one token ("pixel shuffle"), a linear map takes them into a Llama-style decoder that writes text.
Read:     VisionTower -> DecoderBlock -> Policy -> fit -> sample   (bottom-up: the parts explain the whole)
Departs:  sizes, and trained from scratch. One image per question, of one fixed size; no image tiling. On a GPU the sampler runs
          step by step, without CUDA graphs: there was none to measure on.
Run:      python model.py --bench runs/NAME      (how fast it is; `fit` is the only entrance for training, `sample` for generating)

Letters in shape comments: B batch rows, P image patches, I image tokens, T text tokens, S cached tokens, C width, H heads,
G key/value heads, D = C / H, V vocabulary, Q questions, L rollouts per question.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import random
import signal
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain, islice, pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm


# On a CPU the work is cut into parts for Python threads with one torch thread each (torch releases Python's lock while it computes).
# Threads inside a matrix product wait for one another by spinning: two of them took 1.3 times as long as two workers on a quiet
# machine, and 7 times as long beside two busy processes.
# What is computed together does not depend on the number of workers: neither do the results, to the bit.
WORKERS = torch.get_num_threads()                                  # as many as cores, or OMP_NUM_THREADS
torch.set_num_threads(1)
SAVE_EVERY = 20                                                    # seconds of training that a crash may cost


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

    def __post_init__(self):
        for name, value in asdict(self).items():                   # sizes may come from a file that somebody else wrote
            least = int(name != "vision_layers")
            most = {"vocabulary": 10**6, "rope_theta": 10**9}.get(name, 100 if name.endswith("layers") else 2**14)
            if type(value) not in (int, float) or not least <= value <= most:
                raise ValueError(f"{name} {value!r}: must be a number from {least} to {most}")
        for name, unit, words in (("image_size", self.shuffle * self.patch_size, "twice --patch_size"), ("width", 2 * self.heads, "twice --heads"),
                                  ("heads", self.kv_heads, "--kv_heads"), ("vision_width", 4 * self.vision_heads, "4 x --vision_heads")):
            if getattr(self, name) % unit:
                raise ValueError(f"{name} {getattr(self, name)}: must be a multiple of {words}")


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

    def forward(self, x, cos, sin, seen, past=None):
        """One pass over x (B, T, C), after `past` (keys, values) of what stands before it; seen: where who may look, (T, S) or
        (B, 1, T, S). Also returns the keys and values (B, G, S, D) of both together."""
        q, k, v = self.project(x, cos, sin)
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.finish(x, attended), k, v

    def decode(self, x, cos, sin, prefix, suffix, place):
        """One new token per row: x (B, 1, C). A row attends to its question's image and prompt, prefix = (keys, values) (N, G, P, D),
        and to what was written in the row, suffix = (keys, values) (B, G, S, D), in one softmax. The token's own key and value
        become the suffix's last column, which is written here: it is the cache. place: see `Place`."""
        q, k, v = self.project(x, cos, sin)
        (prefix_keys, prefix_values), (keys, values) = prefix, suffix
        keys[:, :, -1], values[:, :, -1] = k[:, :, 0], v[:, :, 0]
        # query heads that share a key/value head stand side by side as its "positions", so nothing is copied per query head
        q = q.view(len(x), self.kv_heads, -1, self.head_dim) * self.head_dim ** -0.5                           # (B, G, H/G, D)
        # plain products: scaled_dot_product_attention takes three times as long on a CPU when there is one query per head
        scores = torch.cat([place.with_question(q, prefix_keys.mT) + place.bias, (keys @ q.mT).mT], dim=-1)
        weights = scores.softmax(dim=-1).type_as(v)
        attended = place.with_question(weights[..., :-keys.shape[2]], prefix_values) + weights[..., -keys.shape[2]:] @ values
        return self.finish(x, attended.view(len(x), self.heads, 1, self.head_dim))


class Place(NamedTuple):
    """Where the rows of a decode step belong, the same for all layers."""
    owner: torch.Tensor           # (B,) the number of each row's question
    rank: torch.Tensor            # (B,) the number of the row among its question's rows
    shape: tuple                  # N questions, most rows of one
    bias: torch.Tensor            # (B, 1, 1, P) 0, or -inf on the padding of a prompt

    def with_question(self, rows, matrices):
        """rows (B, G, H/G, X) times the matrix (N, G, X, Y) of each row's question -> (B, G, H/G, Y). All rows of a question go
        into one product: its matrix is read once, not once per row (1.2 times as long at T = 1, 1.1 times for a sweep)."""
        side_by_side = rows.new_zeros(*self.shape, *rows.shape[1:])
        side_by_side[self.owner, self.rank] = rows
        product = side_by_side.transpose(1, 2).flatten(2, 3) @ matrices                                        # (N, G, most rows x H/G, Y)
        return product.unflatten(2, (self.shape[1], -1)).transpose(1, 2)[self.owner, self.rank]


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

    def forward(self, images, ids):
        """One causal sequence, image tokens first: images (B, size, size, 3) uint8, text ids (B, T) -> (B, T, V) logits of what
        follows each token. The plain way, and the reference: training and sampling find the same with less work, by `hidden`."""
        x = torch.cat([self.vision(images), self.embed(ids)], dim=1)                 # (B, I+T, C)
        (cos, sin), seen = self.rope(torch.arange(x.shape[1], device=x.device)[None]), causal(x.shape[1], x.device)
        for block in self.blocks:
            x, _, _ = block(x, cos, sin, seen)
        return self.logits(self.norm(x[:, -ids.shape[1]:]))

    def hidden(self, images, prompts, lengths, owner, ids, keep_cache=False):
        """Last hidden states of rows of text, many of which begin alike: ids (B, T), each row behind the image and prompt number
        owner (B,), of images (N, size, size, 3) uint8 and prompts (N, P) with lengths (N,), padded on the right -> (B, T, C).

        An image and its prompt are read once, however many rows follow: attention is causal, so that their keys and values depend
        on nothing behind them. Of their last block nobody needs more than those. (With the prompt read for each row, an update took
        1.08 times as long, and PRM scores 1.3 times.) Rows may be padded on the right, too: nothing before the padding sees it.
        With `keep_cache` also returns a list of (keys, values), each (B, G, I+P+T, D), one per layer."""
        prefix, rows, cache = torch.cat([self.vision(images), self.embed(prompts)], dim=1), self.embed(ids), []      # (N, I+P, C), (B, T, C)
        (S, T), device = (prefix.shape[1], ids.shape[1]), ids.device
        begin = (self.image_tokens + lengths)[owner, None]                           # (B, 1) the position of each row's first token
        angles, row_angles = self.rope(torch.arange(S, device=device)[None]), self.rope(begin + torch.arange(T, device=device))
        not_padding = (torch.arange(S, device=device) < begin)[:, None, None].expand(-1, -1, T, -1)
        seen = torch.cat([not_padding, causal(T, device).expand(len(ids), 1, -1, -1)], dim=-1)                       # (B, 1, T, S+T)
        for block in self.blocks:
            if block is self.blocks[-1]:
                _, k, v = block.project(prefix, *angles)
            else:
                prefix, k, v = block(prefix, *angles, causal(S, device))
            rows, k, v = block(rows, *row_angles, seen, past=(k[owner], v[owner]))
            if keep_cache:
                cache.append((k, v))
        rows = self.norm(rows)
        return (rows, cache) if keep_cache else rows

    def logits(self, hidden):
        """(..., C) hidden states -> (..., V) fp32 logits of the next token. Tied: the embedding read backwards."""
        return F.linear(hidden, self.embed.weight).float()

    def loss(self, images, prompts, lengths, owner, ids, targets):
        """SFT loss, mean over all response tokens of the batch (a mean per row would weigh tokens of long responses less).
        targets (B, T): the token that follows each of `ids`, or -1 on padding. The rest: see `hidden`."""
        learned = targets >= 0
        hidden = self.hidden(images, prompts, lengths, owner, ids)[learned]          # (number of response tokens, C)
        return F.cross_entropy(self.logits(hidden), targets[learned])


def causal(T, device):
    """(T, T) True where a token (row) may look: at itself and at what stands before it."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


# ---------------------------------------------------------------- files: whole or not at all, checked when read

def write_whole(path, data):
    """Write bytes beside `path`, down to the disk, and rename them into place: whatever stops the program, `path` is the old file
    or the new one. OSError as of open(), and nothing is left beside it."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(part.parent, os.O_RDONLY)                 # the new name must reach the disk, too
        os.fsync(folder)
        os.close(folder)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path, content):
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1).encode())


def save_tensors(path, tensors, about):
    """Write `path` (.safetensors) of {name: tensor}, if there are any, then beside it a JSON of the dictionary `about`, with a
    checksum of both: together they are whole, or `load_tensors` says that they are not."""
    about = json.loads(json.dumps(about))                          # as it will be read
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}) if tensors else b""
    if tensors:
        write_whole(path, data)
    write_json(Path(path).with_suffix(".json"), about | {"checksum": _checksum(data, about)})


def load_tensors(path):
    """Read what `save_tensors` wrote: (tensors, about). Only safetensors and JSON are read: nothing in them can run code.
    FileNotFoundError if there is nothing; ValueError names the file if it is damaged or something else."""
    path = Path(path)
    try:
        about = json.loads(path.with_suffix(".json").read_bytes())
        given, data = about.pop("checksum"), path.read_bytes() if path.suffix == ".safetensors" else b""
        if given != _checksum(data, about):
            raise ValueError("its checksum is another")
        return load(data) if data else {}, about
    except (SafetensorError, AttributeError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not written by this program ({type(error).__name__}: {str(error)[:200]})") from error


def _checksum(data, about):
    return hashlib.sha256(data + json.dumps(about, sort_keys=True).encode()).hexdigest()


def save_policy(policy, path, symbols):
    """Write the weights of a Policy, or of another network with a ModelConfig as `config`, and a JSON with sizes and vocabulary."""
    save_tensors(path, policy.state_dict(), {"model": asdict(policy.config), "vocabulary": list(symbols)})


def load_policy(path, device="cpu", kind=Policy):
    """Read what `save_policy` wrote of a network of class `kind`: (network, vocabulary). ValueError names the file when it is
    damaged or does not fit."""
    tensors, about = load_tensors(path)
    try:
        config = ModelConfig(**about["model"])
        with torch.device("meta"):                                 # shapes first: a declared size takes no memory here
            expected = {name: (tensor.shape, tensor.dtype) for name, tensor in kind(config).state_dict().items()}
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in tensors or name not in expected or expected[name] != (tensors[name].shape, tensors[name].dtype):
                raise ValueError(f"{name} is missing, is too much, or has another shape or type")
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
        policy = kind(config)
        policy.load_state_dict(tensors)
        if not all(isinstance(symbol, str) for symbol in about["vocabulary"]) or len(about["vocabulary"]) != config.vocabulary:
            raise ValueError("its vocabulary does not fit its sizes")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a policy of this program ({type(error).__name__}: {error})") from error
    return policy.to(device), about["vocabulary"]


def save_training(folder, model, optimizers, schedules, about):
    """Write the next generation folder/N.safetensors of a training: weights, optimizers, schedules, and the dictionary `about`.
    The generation before it is kept, in case this one gets damaged; older ones go."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{i}/{number}/{name}": value for name, value in state.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    number = max(_generations(folder), default=0) + 1
    save_tensors(Path(folder) / f"{number}.safetensors", tensors, {"schedules": [schedule.state_dict() for schedule in schedules], **about})
    for old in _generations(folder):
        if old < number - 1:
            for path in (Path(folder) / f"{old}.json", Path(folder) / f"{old}.safetensors"):
                path.unlink(missing_ok=True)


def load_training(folder, model, optimizers, schedules, **wanted):
    """Put the newest whole generation back into model, optimizers and schedules, in place; returns its `about`, or None if there
    is none, or if it is not of what is `wanted`."""
    for number in sorted(_generations(folder), reverse=True):
        try:
            tensors, about = load_tensors(Path(folder) / f"{number}.safetensors")
        except (ValueError, FileNotFoundError) as error:
            print(f"{error}: going back to the one before", flush=True)
            continue
        if any(about[name] != value for name, value in wanted.items()):
            return None
        model.load_state_dict({name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")})
        for i, (optimizer, schedule, kept) in enumerate(zip(optimizers, schedules, about["schedules"])):
            schedule.load_state_dict(kept)
            state = defaultdict(dict)
            for name, tensor in tensors.items():
                if name.startswith(f"{i}/"):
                    state[int(name.split("/")[1])][name.split("/")[2]] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": [group | {"lr": lr} for group, lr in zip(groups, schedule.get_last_lr())]})
        return about
    return None


def _generations(folder):
    return [int(path.stem) for path in Path(folder).glob("*.json") if path.stem.isdigit()]


# ---------------------------------------------------------------- training, used by every stage

class Example(NamedTuple):
    """One training example: picture, prompt ids, response ids."""
    image: torch.Tensor
    prompt: list
    response: list


def fit(model, optimizers, schedules, stream, updates, title, folder=None):
    """The training loop of every stage: `updates` optimizer updates on `model.loss` of the next batches of `stream` (lists of Example).
    On a CPU a batch is cut in two parts of about as many tokens, for two threads; the sum of their gradients is the gradient of
    the batch, and the same whether one worker does both. A GPU whose memory is too small gets smaller parts, with the same sum.

    folder: there the state is saved at the end, on Ctrl-C and every SAVE_EVERY seconds; if it holds a state of this `title`, training
    goes on from it, on the batches that follow, to the same weights as without a stop.
    Returns the mean loss of the last 100 updates. FloatingPointError names the update whose loss or gradient is not a finite number;
    that update is not made."""
    parameters, began, read, parts = list(model.parameters()), time.time(), 0, 2 if model.device.type == "cpu" else 1
    before = load_training(folder, model, optimizers, schedules, title=title) if folder else None
    losses, saved = before["losses"] if before else [], time.time()
    for _ in losses:
        next(stream)

    def gradient(part, total):
        """(loss, token positions, gradients) of a part of a batch with `total` response tokens: its share of the batch's mean loss."""
        batch = [tensor.to(model.device) for tensor in collate(part)]
        with model.precision():
            loss = model.loss(*batch) * (sum(len(example.response) for example in part) / total)
        return loss.item(), batch[4].numel(), torch.autograd.grad(loss, parameters)

    bar = tqdm(total=updates, initial=len(losses), desc=title, unit=" updates", leave=False, mininterval=1)
    with ThreadPoolExecutor(WORKERS) as pool, bar, ctrl_c_waits() as ctrl_c:
        while len(losses) < updates:
            examples = next(stream)
            total = sum(len(example.response) for example in examples)
            try:
                found = list(pool.map(gradient, cut(examples, parts), repeat(total)))
            except torch.OutOfMemoryError:
                if parts >= len(examples):
                    raise
                parts *= 2
                print(f"{title}: out of memory; from now on a batch goes through in {parts} parts, with the same sum", flush=True)
                stream = chain([examples], stream)
                continue
            for parameter, *gradients in zip(parameters, *(gradients for _, _, gradients in found)):
                parameter.grad = sum(gradients)
            loss = sum(loss for loss, _, _ in found)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not math.isfinite(loss + norm.item()):
                raise FloatingPointError(f"{title}: the loss or gradient of update {len(losses) + 1} is not a finite number")
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                schedule.step()
            losses.append(loss)
            read += sum(tokens for _, tokens, _ in found)
            bar.set_postfix_str(f"loss {loss:.3f}, {read / (time.time() - began):,.0f} tokens/s", refresh=False)
            bar.update()
            if folder and (ctrl_c or len(losses) == updates or time.time() - saved > SAVE_EVERY):
                save_training(folder, model, optimizers, schedules, {"title": title, "losses": losses})
                saved = time.time()
            if ctrl_c:
                raise KeyboardInterrupt
    return sum(losses[-100:]) / len(losses[-100:]) if losses else None


@contextmanager
def ctrl_c_waits():
    """Inside, Ctrl-C puts an entry into the list that is given; a second one interrupts at once."""
    asked, in_main = [], threading.current_thread() is threading.main_thread()              # only there can it be had

    def handler(*_):
        asked.append("Ctrl-C")
        if len(asked) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler) if in_main else None
    try:
        yield asked
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


def cut(examples, parts):
    """Neighbouring examples in `parts` lists, or fewer, with about as many tokens in each."""
    reach = list(accumulate(len(example.prompt) + len(example.response) for example in examples))
    ends = [next(i for i, tokens in enumerate(reach, 1) if parts * tokens >= n * reach[-1]) for n in range(1, parts + 1)]
    return [examples[start:end] for start, end in pairwise([0, *ends]) if start < end]


def collate(examples):
    """Tensors of a batch, as `Policy.loss` takes them: images (N, size, size, 3) and prompts (N, P) without their last token, each
    different one once, with lengths (N,); owner (B,), which of them is each row's; ids (B, T): the last token of the prompt and
    the response but for its last; targets (B, T): the response, so that no prompt is learned. Padded with 0, targets with -1."""
    def padded(lists, value=0):
        return nn.utils.rnn.pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in lists], batch_first=True, padding_value=value)

    number = {}                                                    # an image, by identity, and its prompt -> their place among the different ones
    owner = torch.tensor([number.setdefault((id(example.image), *example.prompt), len(number)) for example in examples])
    different = list({(id(example.image), *example.prompt): example for example in examples}.values())
    return (torch.stack([example.image for example in different]), padded([example.prompt[:-1] for example in different]),
            torch.tensor([len(example.prompt) - 1 for example in different]), owner,
            padded([[example.prompt[-1], *example.response[:-1]] for example in examples]), padded([example.response for example in examples], -1))


def batches(examples, batch_size, rng, together=1):
    """Endless batches (lists of Example), every example once per pass. Up to `together` examples of one image are neighbours, so
    that image and prompt are read once for them; such groups are sorted by length within windows of two batches: less padding, and a
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
            yield [examples[i] for i in order[start:start + batch_size]]


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
        def update(pairs):
            """Parameters of one shape go through together: [(parameter, what momentum says)]."""
            rows, columns = pairs[0][0].shape
            x = torch.stack([wanted if rows <= columns else wanted.T for _, wanted in pairs])
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            for (p, _), orthogonal in zip(pairs, x if rows <= columns else x.mT):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)

        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                by_shape[p.shape].append((p, p.grad.lerp(momentum, group["momentum"])))                      # Nesterov
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(torch.no_grad()(update), sorted(by_shape.values(), key=lambda pairs: -len(pairs) * pairs[0][0].numel())))


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


def sample(policy, prompts, rollouts_per_question, temperature, max_new_tokens, seed, end_token,
           prefixes=None, streams=None, rows=None, progress=None):
    """Sample responses: list (Q) of Prompt -> list (Q) of lists (L = rollouts_per_question) of Response.

    Questions go through in batches (`_sample_batch`). Responses of a question that have the same tokens so far share one row of
    the batch, whatever their temperature: one forward pass and one cache entry for all of them, until they draw different
    tokens; then each branch goes on in a row of its own. Rows that no response is in any more are not computed.

    temperature: a number, or anything that broadcasts to (Q, L), so that one call can mix temperatures. 0 is greedy.
    seed: response l of question q draws its token t with uniform number (q, streams[l], t) of one seeded table. The same seed
        gives the same responses with any number of workers, and whatever `rows` is up to the order of floating-point sums.
    prefixes: for each question a list of token lists. Each of them is continued L times, and the question's responses are
        those of its first prefix, then those of its second ... The prefix is part of a response and of max_new_tokens.
    streams: L integers, by default 0 .. L-1: responses of a question with the same stream draw with the same random numbers
        (a sweep over temperatures with common random numbers).
    rows: how many responses a batch has at most, but never less than one question's; by default 1024 (4096 on a GPU), or a quarter
        of all. Each worker has one batch in work, whose cache is known before it starts: 2 x layers x kv_heads x head_dim x
        (questions x (image + longest prompt) + rows x max_new_tokens) numbers.
    progress: called as progress(responses just ended, tokens just written) after every decode step.
    Raises ValueError for a negative temperature, an empty prompt, or a prefix that leaves nothing to write."""
    L, T, device = rollouts_per_question, max_new_tokens, policy.device
    prefixes = prefixes or [[[]]] * len(prompts)
    temperature = torch.as_tensor(temperature, dtype=torch.float32).expand(len(prompts), L)
    if (temperature < 0).any():
        raise ValueError(f"temperature {temperature.min().item()} is negative; 0 is greedy")
    if any(len(prompt.ids) == 0 for prompt in prompts):
        raise ValueError("empty prompt")
    streams = torch.arange(L) if streams is None else torch.as_tensor(streams)
    uniforms = torch.rand(len(prompts), int(streams.max()) + 1, T, generator=torch.Generator().manual_seed(seed))
    forced = [torch.full((len(group), T), -1) for group in prefixes]
    for group, table in zip(prefixes, forced):
        for prefix, line in zip(group, table):
            if len(prefix) >= T or end_token in prefix:
                raise ValueError(f"a prefix of {len(prefix)} tokens leaves nothing to write: at most {T}, and no end token inside")
            line[:len(prefix)] = torch.tensor(prefix, dtype=torch.long)
    # Batches of whole questions. Their size does not depend on the number of workers, so neither does what is sampled.
    batches, rows = [], rows or min(1024 if device.type == "cpu" else 4096, math.ceil(L * sum(map(len, prefixes)) / 4))
    for q in sorted((q for q in range(len(prompts)) if prefixes[q]), key=lambda q: len(prompts[q].ids)):      # equal lengths together: little padding
        if not batches or L * sum(len(prefixes[other]) for other in [*batches[-1], q]) > rows:
            batches.append([])
        batches[-1].append(q)

    def run(batch):
        """Sample for one batch: tables with one line per response, those of a question's first prefix first."""
        n = {q: len(prefixes[q]) for q in batch}
        return _sample_batch(policy, [prompts[q] for q in batch], [L * n[q] for q in batch], torch.cat([temperature[q].repeat(n[q]) for q in batch]),
                             torch.cat([uniforms[q, streams].repeat(n[q], 1) for q in batch]),
                             torch.cat([forced[q].repeat_interleave(L, dim=0) for q in batch]), end_token, progress)

    was_training = policy.training
    policy.eval()
    with ThreadPoolExecutor(WORKERS if device.type == "cpu" else 1) as pool:
        found = dict(zip((q for batch in batches for q in batch), (group for groups in pool.map(run, batches) for group in groups)))
    policy.train(was_training)
    return [found.get(q, []) for q in range(len(prompts))]


@torch.inference_mode()
def _sample_batch(policy, prompts, counts, temperature, uniforms, forced, end_token, progress):
    """The sampler's loop, for questions with counts (N,) responses: temperature (R,), uniforms and forced (R, T), where R = sum(counts)
    -> list (N) of lists of Response."""
    R, T, V, device = len(forced), forced.shape[1], policy.config.vocabulary, policy.device
    temperature, uniforms, forced, counts = temperature.to(device), uniforms.to(device), forced.to(device), torch.tensor(counts, device=device)
    # 1. Prefill: each question once. Its responses begin in one row.
    with policy.precision():
        logits, start, prefix = _prefill(policy, prompts)
    suffix = [tuple(part.new_empty(R, part.shape[1], T, part.shape[3]) for part in layer) for layer in prefix]
    live, history = torch.arange(R, device=device), []             # responses that go on; (live, tokens, log_probs) of every draw
    row = torch.arange(len(counts), device=device).repeat_interleave(counts)  # (live,) the row that each of them is in
    owner = torch.arange(R, device=device)                         # (R,) the question of each row
    for t in range(T):
        # 2. Draw: every response for itself, from the logits of its row
        tokens, log_probs = draw(logits[row], temperature[live], uniforms[live, t], forced[live, t])
        history.append((live, tokens, log_probs))
        goes_on = (tokens != end_token) & (t + 1 < T)
        drawn = len(live)
        live, row, tokens = live[goes_on], row[goes_on], tokens[goes_on]
        if progress:
            progress(drawn - len(live), drawn)
        if not len(live):
            break
        # 3. Branch: one row for each different (row, token). The first branch of a row stays in it, the others are copied
        #    into rows that nobody is in any more, so that the rows in use are [0, B). A row for each response would take 1.4
        #    times as long at T = 1, 2.8 times for a sweep, 4.6 times for step labels (results/cpu-speed-trials.json)
        branches, branch = torch.unique(row * V + tokens, return_inverse=True)
        parent, token, B = branches // V, branches % V, len(branches)
        stays = (parent.diff(prepend=parent.new_full((1,), -1)) > 0) & (parent < B)
        free = torch.ones(B, dtype=torch.bool, device=device)
        free[parent[stays]] = False
        target, to, source = parent.clone(), free.nonzero()[:, 0], parent[~stays]
        target[~stays] = to
        for part in (part for layer in suffix for part in layer):
            part[to, :, :t] = part[source, :, :t]
        owner[to] = owner[source]
        row, feed = target[branch], torch.empty_like(token).scatter_(0, target, token)
        # questions that are done leave when they are half of all (at T = 1 a tenth of the time). Waiting ones do not take their
        # place: steps with at most 128 rows took 3 % of the time
        going = owner[:B].unique()
        if 2 * len(going) <= len(start):
            prefix, start = [tuple(part[going] for part in layer) for layer in prefix], start[going]
            owner[:B] = torch.searchsorted(going, owner[:B])
        # 4. Decode: one forward pass of one token per row
        with policy.precision():
            logits = _decode(policy, feed, owner[:B], start, t, prefix, [tuple(part[:B, :, :t + 1] for part in layer) for layer in suffix])
    live, tokens, log_probs = (torch.cat(parts) for parts in zip(*history))
    order = live.sort(stable=True).indices                         # by response, its tokens in the order they were drawn
    sizes = live.bincount(minlength=R).tolist()
    tokens, log_probs = tokens[order].split(sizes), log_probs[order].split(sizes)
    responses = iter([Response(a.tolist(), a[-1].item() == end_token, b.tolist()) for a, b in zip(tokens, log_probs)])
    return [list(islice(responses, count)) for count in counts.tolist()]


def _prefill(policy, prompts):
    """Read each image and prompt once: (logits of the first token (N, V), lengths (N,), keys and values per layer, in which the last
    token of a prompt stands behind the padding)."""
    batch = [part.to(policy.device) for part in collate([Example(*prompt, [0]) for prompt in prompts])]
    hidden, filled = policy.hidden(*batch[:-1], keep_cache=True)
    return policy.logits(hidden[:, 0]), batch[2][batch[3]] + 1 + policy.image_tokens, filled


def _decode(policy, tokens, owner, start, t, prefix, suffix):
    """Feed token t of the response to each row: tokens, owner (B,), start (N,) the lengths of the questions' prefixes, caches per
    layer (keys, values): prefix (N, G, P, D), suffix (B, G, t + 1, D), of which the last column is filled here -> logits (B, V)."""
    order, counts = owner.argsort(stable=True), owner.bincount(minlength=len(start))
    rank = torch.empty_like(owner)
    rank[order] = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
    padding = F.pad(torch.arange(1, prefix[0][0].shape[2], device=owner.device) >= start[:, None], (0, 1))             # (N, P)
    bias = torch.zeros(padding.shape, device=owner.device).masked_fill_(padding, -math.inf)[owner, None, None]
    place = Place(owner, rank, (len(start), int(counts.max())), bias)
    cos, sin = policy.rope((start[owner] + t)[:, None])
    x = policy.embed(tokens)[:, None]                                                                                 # (B, 1, C)
    for block, layer_prefix, layer_suffix in zip(policy.blocks, prefix, suffix):
        x = block.decode(x, cos, sin, layer_prefix, layer_suffix, place)
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


# ---------------------------------------------------------------- how fast it is

def sample_plainly(policy, prompts, temperature, uniforms, end_token, cached=True):
    """What `sample` is measured against: a row and a prefill for every response, all rows until the last has ended; without
    `cached`, all of the text is read again for every token. Prompts: one per response (R); uniforms (R, T) -> list (R) of tokens."""
    (R, T), device = uniforms.shape, policy.device
    forced, temperature = torch.full((R,), -1, device=device), torch.full((R,), temperature, device=device)
    images, ids = torch.stack([prompt.image for prompt in prompts]).to(device), [list(prompt.ids) for prompt in prompts]
    uniforms, own = uniforms.to(device), torch.arange(R, device=device)
    prompts = [Prompt(prompt.image.clone(), prompt.ids) for prompt in prompts]         # equal images would be read once
    with torch.inference_mode(), policy.precision():
        logits, start, prefix = _prefill(policy, prompts)
        suffix = [tuple(part.new_empty(R, part.shape[1], T, part.shape[3]) for part in layer) for layer in prefix]
        ended = torch.zeros(R, dtype=torch.bool, device=device)
        for t in range(T):
            tokens, _ = draw(logits, temperature, uniforms[:, t], forced)
            ended |= tokens == end_token
            for row, token in zip(ids, tokens.tolist()):
                row.append(token)
            if ended.all() or t + 1 == T:
                break
            if cached:
                logits = _decode(policy, tokens, own, start, t, prefix, [tuple(part[:, :, :t + 1] for part in layer) for layer in suffix])
            else:
                padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
                logits = policy(images, padded)[torch.arange(R), torch.tensor([len(row) - 1 for row in ids])]
    written = [row[len(prompt.ids):] for row, prompt in zip(ids, prompts)]
    return [tokens[:tokens.index(end_token) + 1] if end_token in tokens else tokens for tokens in written]


class Products(TorchDispatchMode):
    """Notes the shapes of all matrix products while it is entered, backward ones too: the arithmetic that cannot be left out.
    (Not those inside the fused attention of training and prefill: the ceiling is a little too high there, our share too low.)"""

    def __init__(self):
        super().__init__()
        self.shapes = []                                           # of the two factors of each product

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self:                                                 # linear and matmul are made of the products below
            parts = function.decompose(*args, **kwargs or {})
        if parts is not NotImplemented:
            return parts
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(factor.shape for factor in args[-2:]))
        return function(*args, **kwargs or {})


def alternate(ways, repeats):
    """Time ways to do one thing in turns: {name: function that returns its number of tokens} -> {name: median tokens per second}."""
    speeds = defaultdict(list)
    for _ in range(repeats):
        for name, run in ways.items():
            began = time.perf_counter()
            tokens = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            speeds[name].append(tokens / (time.perf_counter() - began))
    return {name: sorted(found)[len(found) // 2] for name, found in speeds.items()}


def bench_sampling(policy, prompts, end_token, line_break, T, repeats):
    """Tokens per second of `sample` and `sample_plainly` on the three workloads of a run, all workers: 16 responses per question
    at T = 1; a sweep of 14 temperatures; 8 rollouts from every step of 4 responses per question."""
    grid, L, few, pool = [round(0.3 + 0.1 * i, 1) for i in range(14)], 16, prompts[:16], ThreadPoolExecutor(WORKERS)

    def ours(prompts, L, temperature, given=0, **more):
        responses = sample(policy, prompts, L, temperature, T, 0, end_token, **more)
        return sum(len(response.tokens) for group in responses for response in group) - given

    def plain(prompts, temperature, cached=True, rows=256):
        def run(start):
            part = prompts[start:start + rows]
            return sum(map(len, sample_plainly(policy, part, temperature, torch.rand(len(part), T), end_token, cached)))
        return sum(pool.map(run, range(0, len(prompts), rows)))

    steps = [[response.tokens[:i + 1] for response in group for i, token in enumerate(response.tokens[:-1]) if token == line_break]
             for group in sample(policy, few, 4, 1.0, T, 0, end_token)]
    longer = [Prompt(prompt.image, prompt.ids + step) for prompt, group in zip(few, steps) for step in group for _ in range(8)]
    given = 8 * sum(len(step) for group in steps for step in group)                         # tokens that nobody writes
    return {"T = 1": alternate({"sample": lambda: ours(prompts, L, 1.0), "plain": lambda: plain([p for p in prompts for _ in range(L)], 1.0),
                                "no cache": lambda: plain([p for p in few[:4] for _ in range(L)], 1.0, cached=False, rows=32)}, repeats),
            "sweep": alternate({"sample": lambda: ours(few, L * 14, torch.tensor([t for t in grid for _ in range(L)]), streams=list(range(L)) * 14),
                                "plain": lambda: sum(plain([p for p in few for _ in range(L)], t) for t in grid)}, repeats),
            "step labels": alternate({"sample": lambda: ours(few, 8, 0.6, given, prefixes=steps),
                                      "plain": lambda: plain(longer, 0.6)}, repeats) if longer else {}}


def bench_parts(policy, prompts, examples, end_token, T, repeats):
    """Tokens per second of one worker's parts, beside their own matrix products alone, in turns: the ceiling."""
    n, device, generator = min(len(prompts), 64), policy.device, torch.Generator().manual_seed(0)
    few, counts, rows = prompts[:n], [1024 // n] * n, 1024 // n * n
    with torch.inference_mode(), policy.precision():
        _, start, prefix = _prefill(policy, few)
        owner = torch.arange(n, device=device).repeat_interleave(rows // n)
        suffix = [tuple(torch.randn(rows, part.shape[1], 17, part.shape[3], device=device, dtype=part.dtype) for part in layer) for layer in prefix]
    table = dict(temperature=torch.ones(rows), uniforms=torch.rand(rows, T, generator=generator), forced=torch.full((rows, T), -1))
    batch, parameters = [part.to(device) for part in collate(examples)], list(policy.parameters())

    def prefill():
        with torch.inference_mode(), policy.precision():
            _prefill(policy, few)
        return sum(len(prompt.ids) + policy.image_tokens for prompt in few)

    def decode():
        with torch.inference_mode(), policy.precision():
            _decode(policy, torch.zeros_like(owner), owner, start, 16, prefix, suffix)
        return rows

    def whole():
        responses = _sample_batch(policy, few, counts, **table, end_token=end_token, progress=None)
        return sum(len(response.tokens) for group in responses for response in group)

    def training():
        with policy.precision():
            torch.autograd.grad(policy.loss(*batch), parameters)
        return sum(len(example.prompt) + len(example.response) for example in examples)

    found, dtype = {}, prefix[0][0].dtype
    for name, run in (("prefill", prefill), (f"decode {rows} rows", decode), (f"sample {rows} responses", whole), ("training", training)):
        with Products() as products:
            tokens = run()
        factors = {pair: [torch.randn(shape, device=device, dtype=dtype) for shape in pair] for pair in products.shapes}

        def alone():
            for pair in products.shapes:
                torch.matmul(*factors[pair])
            return tokens
        found[name] = alternate({"ours": run, "products": torch.inference_mode()(alone)}, repeats)
    return found


def bench_growth(policy, prompts, end_token, T):
    """Seconds of `sample` for growing numbers of questions, responses and tokens, and for growing width with random weights."""
    c = policy.config

    def seconds(policy, Q, L, T, end):
        began = time.perf_counter()
        sample(policy, prompts[:Q], L, 1.0, T, 0, end)
        return time.perf_counter() - began

    def of_width(width):
        heads = width * c.heads // c.width                         # of equal size
        return Policy(replace(c, width=width, heads=heads, kv_heads=heads)).to(policy.device)

    return {"questions": {Q: seconds(policy, Q, 16, T, end_token) for Q in (32, 64, 128, 256)},
            "responses": {L: seconds(policy, 64, L, T, end_token) for L in (4, 8, 16, 32)},
            "tokens": {n: seconds(policy, 16, 16, n, -1) for n in (18, 36, 72, 144)},              # -1: nobody ends
            "width": {width: seconds(of_width(width), 16, 16, 36, -1) for width in (c.width // 2, c.width, 2 * c.width, 4 * c.width)}}


def main(argv=None):
    """Command line of this file: --bench [runs/NAME]."""
    import resource                                                # not on every system

    from data import Tokenizer, build_world, write_reasoning       # only here: the network and its sampler know nothing of the world
    from evaluate import make_prompts
    from mstar import PRESETS, new_policy, parse
    parser = argparse.ArgumentParser(description="How fast the sampler and the training are.")
    parser.add_argument("--bench", metavar="runs/NAME", nargs="?", required=True, const="",
                        help="on the policy of this run; without one, random weights, which hide what sharing gains")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes of the random weights [cpu]")
    parser.add_argument("--repeats", type=int, default=5, help="how often each way is timed [5]")
    parser.error = lambda message: parser.exit(2, f"model.py: {message}; see python model.py --help\n")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: must be at least 1")
    tokenizer, device = Tokenizer(), "cuda" if torch.cuda.is_available() else "cpu"
    if args.bench:
        try:
            policy, _ = load_policy(Path(args.bench) / "policy.safetensors", device)
        except (OSError, ValueError) as error:
            parser.exit(2, f"model.py: {args.bench}: not the folder of a finished run ({error})\n")
    else:
        policy = new_policy(parse(["--preset", args.preset])[0], tokenizer).to(device)
    questions, T, rng = build_world({"labeled": 256})["labeled"], 72, random.Random(0)
    prompts = make_prompts(questions, tokenizer, policy.config.image_size)
    examples = [Example(*prompt, tokenizer.response(write_reasoning(question, rng)))
                for prompt, question in zip(prompts, questions) for _ in range(2)]
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {WORKERS} workers"
    size = sum(p.numel() for p in policy.parameters())
    print(f"{args.bench or f'random weights, {args.preset} preset'}: {size:,} parameters, {where}; tokens/s, medians of {args.repeats}")
    found = {"sampling": bench_sampling(policy, prompts[:64], tokenizer.EOS, tokenizer.ids["\n"], T, args.repeats)}
    for work, speeds in found["sampling"].items():
        print(f"{work:12} " + ", ".join(f"{name} {speed:,.0f}" + f" ({speeds['sample'] / speed:.1f}x slower)" * (name != "sample")
                                        for name, speed in speeds.items()))
    found["parts"] = bench_parts(policy, prompts, next(batches(examples, 32, rng, together=2)), tokenizer.EOS, T, args.repeats)
    for part, speeds in found["parts"].items():
        ours, products = speeds["ours"], speeds["products"]
        print(f"{part:22} {ours:,.0f}, its matrix products alone {products:,.0f}: {100 * ours / products:.0f} % of the ceiling")
    found["seconds"] = bench_growth(policy, prompts, tokenizer.EOS, T)
    for what, seconds in found["seconds"].items():
        print(f"seconds by {what}: " + ", ".join(f"{n}: {s:.2f}" for n, s in seconds.items()))
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {found['peak_gb']:.2f} GB")
    print(json.dumps({"device": where, "repeats": args.repeats, **found}))


if __name__ == "__main__":
    main()
