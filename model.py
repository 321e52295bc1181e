"""
model.py: a small vision-language transformer, its training loop and its sampler.

Paper (arXiv 2412.17451v3): the policy pi. There it is MiniCPM-V-2.5 (8B), Phi-3.5-vision or
    InternVL2; here a small member of the public SigLIP + pixel-shuffle + Llama family: a ViT reads
    patches, neighbouring patches are folded into one token ("pixel shuffle"), a linear map takes
    them into a Llama-style decoder, which writes text.
Read:     VisionTower -> DecoderBlock -> Policy -> save, load -> fit -> sample   (bottom-up)
Departs:  sizes, and trained from scratch; one image per question, of one size, without tiling.
Run:      python tests/bench.py runs/NAME      (how fast it is)

Letters in shape comments: N distinct (image, prompt) pairs, B batch rows, P patches or (in the
decoder) prompt tokens, I image tokens, T text tokens, S tokens that are attended to, C width,
H heads, G key/value heads, D = C / H, V vocabulary, Q questions, L responses per question, R
responses of a batch.
"""
import hashlib
import json
import math
import os
import sys
import zlib
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load as tensors_of_bytes
from safetensors.torch import save as bytes_of_tensors
from torch import distributed, nn
from tqdm import tqdm

# On a CPU, work is cut into parts for Python threads with one torch thread each. Threads *inside* a
# matrix product wait for one another by spinning: two of them took 1.3 times as long as two workers
# on a quiet machine, and beside busy processes three times as long as one thread alone. How work is
# cut never depends on the number of workers, so neither does any result.
WORKERS = torch.get_num_threads()          # as many as cores, or OMP_NUM_THREADS
torch.set_num_threads(1)

@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network. Head size is width / heads, in both parts."""
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
    kv_heads: int = 4             # fewer than heads: grouped-query attention
    rope_theta: float = 10_000.0
    # what public weights need besides
    hidden: int = 0               # width inside the SwiGLU; 0: 8/3 of the width
    tied: bool = True             # the logits come from the embedding, read backwards
    lead: tuple = ()              # token ids that stand before every image

    def __post_init__(self):
        object.__setattr__(self, "lead", tuple(self.lead))         # JSON gives a list
        for f in fields(self):                 # public weights may leave a size out: None
            if type(value := getattr(self, f.name)) is not f.type:
                raise ValueError(f"{f.name} {value!r}: must be of type {f.type.__name__}")
        if self.image_size % (self.patch_size * self.shuffle) or self.heads % self.kv_heads:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {self.shuffle} x "
                             f"patch_size, heads {self.heads} of kv_heads")
        if self.width % (2 * self.heads) or self.vision_width % (4 * self.vision_heads):
            raise ValueError(f"width {self.width} must be a multiple of 2 x heads, vision_width "
                             f"{self.vision_width} of 4 x vision_heads (for their positions)")

# ---------------------------------------------------------------- vision: SigLIP

class VisionBlock(nn.Module):
    """Pre-norm transformer block without a mask: every patch sees every patch. As in SigLIP."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):                                          # (B, P, C)
        B, P, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, P, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # (B, H, P, D) each
        attended = F.scaled_dot_product_attention(q, k, v)         # (B, H, P, D)
        x = x + self.out(attended.transpose(1, 2).reshape(B, P, C))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

def sine_positions(side, width):
    """(side^2, width) start values of the learned positions: sines and cosines of x and y, so that
    "the patch to the left" is one linear map for all patches (our choice)."""
    frequency = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = []
    for coordinate in (x, y):
        angle = coordinate.flatten()[:, None] * frequency          # (side^2, width / 4)
        waves += [angle.sin(), angle.cos()]
    return 0.7 * torch.cat(waves, dim=1)

class VisionTower(nn.Module):
    """Images to image tokens of the decoder's width: patches, ViT, pixel shuffle, projector."""

    def __init__(self, c):
        super().__init__()
        self.side = c.image_size // c.patch_size                   # patches per side
        self.shuffle = c.shuffle
        self.patch = nn.Conv2d(3, c.vision_width, c.patch_size, c.patch_size)
        self.position = nn.Parameter(sine_positions(self.side, c.vision_width))        # (P, C)
        self.blocks = nn.ModuleList(
            VisionBlock(c.vision_width, c.vision_heads) for _ in range(c.vision_layers))
        self.norm = nn.LayerNorm(c.vision_width, eps=1e-6)
        self.project = nn.Linear(c.vision_width * c.shuffle ** 2, c.width, bias=False)

    def forward(self, images):                                     # (B, size, size, 3) uint8
        # the patch convolution as one matrix product: faster on a CPU, by how much depends on it
        p = self.patch.kernel_size[0]
        x = images.view(-1, self.side, p, self.side, p, 3).permute(0, 1, 3, 5, 2, 4)
        x = x.reshape(len(images), self.side ** 2, 3 * p * p)      # (B, P, 3 p^2)
        x = x.float().div_(127.5).sub_(1)                          # pixels in [-1, 1]
        x = F.linear(x, self.patch.weight.flatten(1), self.patch.bias) + self.position
        for block in self.blocks:
            x = block(x)                                           # (B, P, C)
        x = self.norm(x)
        # Pixel shuffle: s x s neighbours side by side, so I = P / s^2 tokens carry P patches
        s, n = self.shuffle, self.side // self.shuffle
        x = x.view(-1, n, s, n, s, x.shape[-1]).transpose(2, 3)    # (B, n, n, s, s, C)
        x = x.flatten(3).flatten(1, 2)                             # (B, I, s s C)
        return self.project(x)                                     # (B, I, C of the decoder)

# ---------------------------------------------------------------- decoder: Llama

def rotate(x, cos, sin):
    """Rotary positions (RoPE) in Llama's layout: dimension i turns together with i + D/2. x
    (B, H, T, D); cos, sin (B, 1, T, D)."""
    left, right = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat((-right, left), dim=-1) * sin
    return turned.type_as(x)                                       # angles are fp32, x may be bf16

def causal(T, device):
    """(T, T) True where a token (row) may look: at itself and at what stands before it."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()

class Grouping(NamedTuple):
    """The rows of a decode step by question, and their products with what it has once."""
    owner: torch.Tensor           # (B,) the number of each row's question
    rank: torch.Tensor            # (B,) the number of the row among its question's rows
    shape: tuple                  # N questions, and the most rows that one of them has
    bias: torch.Tensor            # (B, 1, 1, I+P) 0, or -inf on a prompt's padding

    def matmul(self, rows, matrices):
        """rows (B, G, H/G, X) times the matrix of each row's question, (N, G, X, Y), of any X and Y
        -> (B, G, H/G, Y): all rows of a question in one product, which reads its matrix once."""
        table = rows.new_zeros(*self.shape, *rows.shape[1:])       # (N, most, G, H/G, X)
        table[self.owner, self.rank] = rows
        product = table.transpose(1, 2).flatten(2, 3) @ matrices   # (N, G, most H/G, Y)
        product = product.unflatten(2, (self.shape[1], -1)).transpose(1, 2)
        return product[self.owner, self.rank]

class DecoderBlock(nn.Module):
    """Pre-norm block: RMSNorm, grouped-query attention with rotary positions, SwiGLU. No biases."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.width // c.heads
        # three matrices: 8/3 keeps the usual 8 C^2 weights
        hidden = c.hidden or 8 * math.ceil(c.width / 3)
        self.norm1 = nn.RMSNorm(c.width, eps=1e-5)
        self.norm2 = nn.RMSNorm(c.width, eps=1e-5)
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.kv = nn.Linear(c.width, 2 * c.kv_heads * self.head_dim, bias=False)
        self.gate = nn.Linear(c.width, hidden, bias=False)
        self.up = nn.Linear(c.width, hidden, bias=False)
        self.down = nn.Linear(hidden, c.width, bias=False)

    def qkv(self, x, cos, sin):
        """Queries (B, H, T, D), keys and values (B, G, T, D) of x (B, T, C), turned by position."""
        B, T, _ = x.shape
        x = self.norm1(x)
        q = self.q(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        kv = self.kv(x).view(B, T, 2, self.kv_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x, attended):
        """Close the block: x (B, T, C) plus what attention found (B, H, T, D), then the SwiGLU."""
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def forward(self, x, cos, sin, mask, past=None):
        """x (B, T, C), behind `past`, (keys, values) of what stands before it; mask (T, S) or
        (B, 1, T, S), True where a token may look. Also returns all keys and values (B, G, S, D)."""
        q, k, v = self.qkv(x, cos, sin)
        if past:
            k = torch.cat([past[0], k], dim=2)                     # (B, G, S, D)
            v = torch.cat([past[1], v], dim=2)
        # Each key/value head stands once for each of its query heads (a copy only where H > G). By
        # enable_gqa and with a mask, a GPU would take its slowest kernel, which keeps all scores
        shape = -1, -1, self.heads // self.kv_heads, -1, -1
        keys = k[:, :, None].expand(shape).flatten(1, 2)           # (B, H, S, D)
        values = v[:, :, None].expand(shape).flatten(1, 2)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.finish(x, attended), k, v

    def decode(self, x, cos, sin, prefix, suffix, grouping):
        """One new token per row, x (B, 1, C). In one softmax a row attends to its question's image
        and prompt, prefix = (keys, values) (N, G, I+P, D), and to what was written in it, suffix =
        (keys, values) (B, G, S, D): the KV cache, whose last column is filled here."""
        q, k, v = self.qkv(x, cos, sin)
        prefix_keys, prefix_values = prefix
        keys, values = suffix
        keys[:, :, -1], values[:, :, -1] = k[:, :, 0], v[:, :, 0]
        # Query heads that share a key/value head stand side by side, so no key is copied. For one
        # token per row, scaled_dot_product_attention takes three times as long on a CPU
        q = q.view(len(x), self.kv_heads, -1, self.head_dim)       # (B, G, H/G, D)
        q = q * self.head_dim ** -0.5
        prompt_scores = grouping.matmul(q, prefix_keys.mT) + grouping.bias             # (.., I+P)
        own_scores = (keys @ q.mT).mT                                                  # (.., S)
        weights = torch.cat([prompt_scores, own_scores], dim=-1).softmax(dim=-1).type_as(v)
        S = keys.shape[2]
        attended = grouping.matmul(weights[..., :-S], prefix_values) + weights[..., -S:] @ values
        return self.finish(x, attended.view(len(x), self.heads, 1, self.head_dim))

class Policy(nn.Module):
    """The vision-language transformer pi(y | x, o): image tokens (behind `lead`), then text, one
    causal sequence. The tokenizer travels with it: without it, ids mean nothing."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision = VisionTower(config)
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or name == "vision.position":
                continue                                           # norms, biases, positions
            scale = 0.05 if "embed" in name else parameter[0].numel() ** -0.5
            if name.endswith(("out.weight", "down.weight")):       # residual outputs start small,
                scale = (2 * config.layers) ** -0.5 * scale        # so their sum keeps its scale
            nn.init.normal_(parameter, std=scale)

    @property
    def device(self):
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def image_tokens(self):
        """I, the number of tokens that one image takes, with those of `lead`."""
        return len(self.config.lead) + (self.vision.side // self.vision.shuffle) ** 2

    def see(self, images):
        """(N, size, size, 3) uint8 images -> (N, I, C) image tokens, `lead` before them."""
        x = self.vision(images)
        if self.config.lead:
            lead = self.embed(torch.tensor(self.config.lead).to(self.device))
            x = torch.cat([lead.expand(len(x), -1, -1), x], dim=1)
        return x

    def rope(self, positions):
        """cos and sin for `rotate`: positions (B, T) -> (B, 1, T, D) each."""
        D = self.config.width // self.config.heads
        exponent = -torch.arange(0, D, 2, device=positions.device).float() / D         # (D/2,)
        angle = positions[..., None] * self.config.rope_theta ** exponent              # (B, T, D/2)
        angle = angle.repeat(1, 1, 2)[:, None]                     # (B, 1, T, D)
        return angle.cos(), angle.sin()

    def forward(self, images, ids):
        """The plain way and the reference: images (B, size, size, 3) uint8, text ids (B, T)
        -> (B, T, V) logits of what follows each token. `hidden` finds the same with less work."""
        x = torch.cat([self.see(images), self.embed(ids)], dim=1)                      # (B, I+T, C)
        cos, sin = self.rope(torch.arange(x.shape[1], device=x.device)[None])
        mask = causal(x.shape[1], x.device)
        for block in self.blocks:
            x, _, _ = block(x, cos, sin, mask)
        return self.logits(self.norm(x[:, -ids.shape[1]:]))        # image tokens predict nothing

    def hidden(self, images, prompts, lengths, owner, ids, keep_cache=False):
        """Last hidden states (B, T, C) of rows of text, many of which share an image and a prompt.

        images (N, size, size, 3), prompts (N, P) of lengths (N,): the distinct pairs, without the
        last token of the prompt. ids (B, T): the rows, from that token on (it predicts the first
        of the response); row b continues pair owner[b]. Prompts and rows are padded on the right.
        With `keep_cache` also each layer's (keys, values), (B, G, I+P+T, D) each. A pair is read
        once for all its rows: attention is causal, so that it depends on nothing behind it."""
        prefix = torch.cat([self.see(images), self.embed(prompts)], dim=1)             # (N, I+P, C)
        rows = self.embed(ids)                                                         # (B, T, C)
        S, T, device = prefix.shape[1], ids.shape[1], ids.device
        prefix_rope = self.rope(torch.arange(S, device=device)[None])
        start = (self.image_tokens + lengths)[owner, None]         # (B, 1) position of the first id
        row_rope = self.rope(start + torch.arange(T, device=device))
        in_prefix = (torch.arange(S, device=device) < start)[:, None, None]            # not padding
        mask = torch.cat([in_prefix.expand(-1, -1, T, -1),         # (B, 1, T, S+T)
                          causal(T, device).expand(len(ids), 1, -1, -1)], dim=-1)
        cache = []
        for block in self.blocks:
            if block is self.blocks[-1]:       # nothing reads the last block's output at the prefix
                _, k, v = block.qkv(prefix, *prefix_rope)
            else:
                prefix, k, v = block(prefix, *prefix_rope, causal(S, device))
            rows, k, v = block(rows, *row_rope, mask, past=(k[owner], v[owner]))
            if keep_cache:
                cache.append((k, v))
        rows = self.norm(rows)
        return (rows, cache) if keep_cache else rows

    def logits(self, hidden):
        """(..., C) hidden states -> (..., V) fp32 logits. Tied: the embedding read backwards."""
        head = self.embed if self.config.tied else self.head
        return F.linear(hidden, head.weight).float()

    def loss(self, images, prompts, lengths, owner, ids, targets):
        """SFT loss, mean over all response tokens of the batch (a mean per row would weigh those of
        long responses less). targets (B, T): what follows each of `ids`, or -1 on padding."""
        is_response = targets >= 0
        hidden = self.hidden(images, prompts, lengths, owner, ids)[is_response]        # (tokens, C)
        return F.cross_entropy(self.logits(hidden), targets[is_response])

# ---------------------------------------------------------------- several GPUs: skip at first

# `torchrun --nproc-per-node N mstar.py` (or -m results.tables, prm.py, evaluate.py) starts N
# processes, one per GPU, all with the same program and random numbers. Each takes every N-th part
# of sampling, scoring and of a batch, and they exchange what came out. So each knows everything,
# and the first one alone writes files.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def run_command(main):
    """Run a command's main; if torchrun started several processes, in each, connected."""
    if PROCESSES > 1:
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))   # what "cuda" means from here
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        if RANK:                                                   # the first one speaks for all
            sys.stdout = open(os.devnull, "w")
    main()

def barrier():
    """No process goes on before all are here."""
    if PROCESSES > 1:
        distributed.barrier()

def broadcast(value):
    """What the first process has."""
    values = [value]
    if PROCESSES > 1:
        distributed.broadcast_object_list(values)
    return values[0]

def my_part(things):
    """Those of a list that this process works on."""
    return things[RANK::PROCESSES]

def results_of(function, parts, device):
    """[function(part) for part in parts]: processes share the parts, and the threads of a CPU."""
    with ThreadPoolExecutor(WORKERS if device.type == "cpu" else 1) as pool:
        mine = list(pool.map(function, my_part(parts)))
    if PROCESSES == 1:
        return mine
    lists, results = [None] * PROCESSES, [None] * len(parts)
    distributed.all_gather_object(lists, mine)
    for rank, of_rank in enumerate(lists):
        results[rank::PROCESSES] = of_rank
    return results

def all_reduce(parameters, loss):
    """Make every gradient the sum of all processes'; returns the sum of their losses."""
    if PROCESSES == 1:
        return loss
    losses = torch.tensor(loss).to(parameters[0])
    distributed.all_reduce(losses)
    for p in parameters:                       # None: this process had no part of the batch
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
        distributed.all_reduce(p.grad)
    return losses.item()

# ---------------------------------------------------------------- files: whole or not at all

def write_whole(path, data):
    """Write bytes beside `path`, down to the disk, and rename them into place: whatever stops the
    program, `path` is the old file or the new one. OSError as of open()."""
    if RANK:                                                       # the first process writes
        return barrier()
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    barrier()

def write_json(path, content):
    """Write a dict as JSON with a checksum. ValueError if it holds NaN or infinity."""
    content = json.loads(json.dumps(content, allow_nan=False))     # as it will be read
    content["checksum"] = _checksum(content)
    write_whole(path, json.dumps(content, indent=1).encode())

def read_json(path):
    """Read what `write_json` wrote. FileNotFoundError; ValueError names a damaged file."""
    try:
        content = json.loads(Path(path).read_bytes())
        checksum = content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not a file of this program") from error
    if checksum != _checksum(content):
        raise ValueError(f"{path}: damaged or changed (its checksum is another)")
    return content

def _checksum(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

def save(path, network, optimizer=None, **about):
    """Write the weights of a Policy or RewardModel, and its optimizer's state, to `path`
    (.safetensors), then sizes, vocabulary, `about` and a checksum of the weights to a JSON beside
    it: a kill between the two leaves a pair that `load` refuses."""
    tensors = dict(network.state_dict())
    if optimizer:
        tensors |= optimizer.tensors()
        about["updates"] = optimizer.updates
    data = bytes_of_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    write_whole(path, data)
    write_json(Path(path).with_suffix(".json"), {
        "model": asdict(network.config), "vocabulary": list(network.tokenizer.symbols), **about,
        "weights": hashlib.sha256(data).hexdigest()})

def load(path, network, optimizer=None):
    """Put what `save` wrote into a network of the same sizes, and its optimizer. Returns what was
    saved `about` it. FileNotFoundError; ValueError names a file that is damaged or of another
    vocabulary. Only safetensors and JSON are read: no code."""
    about = read_json(Path(path).with_suffix(".json"))
    data = Path(path).read_bytes()
    if about.get("weights") != hashlib.sha256(data).hexdigest():
        raise ValueError(f"{path}: damaged, or not of the JSON beside it")
    if about.get("vocabulary") != list(network.tokenizer.symbols):
        raise ValueError(f"{path}: made with another vocabulary, so its token ids mean other words")
    tensors = tensors_of_bytes(data)
    names = [name for name in tensors if name.startswith("optimizer/")]
    of_optimizer = {name: tensors.pop(name) for name in names}
    network.load_state_dict(tensors, assign=network.device.type == "meta")
    if optimizer:
        optimizer.load(of_optimizer, about["updates"])
    return about

def load_network(path, tokenizer, device="cpu", kind=Policy):
    """The Policy (or RewardModel, by `kind`) that `save` wrote. Errors: as of `load`."""
    about = read_json(Path(path).with_suffix(".json"))
    try:
        with torch.device("meta"):                                 # nothing is initialized
            network = kind(ModelConfig(**about["model"]), tokenizer)
        load(path, network)
    except (KeyError, TypeError, RuntimeError) as error:           # a PRM where a policy should be
        what = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a {kind.__name__} of this program ({what})") from error
    return network.to(device)

def available_devices():
    """Devices of this machine, the best first."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [device for device in is_there if is_there[device]] + ["cpu"]

def has_bf16(device):
    """Is this a GPU that computes in bf16, and does not only emulate it?"""
    is_cuda = torch.device(device).type == "cuda"
    return is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)

def precision(device):
    """bf16 arithmetic on a GPU that has it; fp32 elsewhere, where it would not be faster."""
    return torch.autocast("cuda", torch.bfloat16) if has_bf16(device) else nullcontext()

# ---------------------------------------------------------------- training, used by every stage

def seed_for(seed, *purpose):
    """A seed for one purpose of one run: independent streams, none depends on what ran before."""
    return zlib.crc32(repr((seed, *purpose)).encode())

class Example(NamedTuple):
    """One training example: image (as in Prompt), prompt ids, response ids; for a reward model also
    a label per response token, -1 where no step ends."""
    image: object
    prompt: list
    response: list
    labels: list = ()

def fit(network, optimizer, stream, updates, micro_batch, title):
    """The training loop of every stage, of a Policy or RewardModel: an optimizer update for each of
    the next `updates` batches (lists of Example) of `stream`. Returns the mean loss of the last
    100. FloatingPointError names an update whose loss or gradient is not a finite number; it is not
    made."""
    losses = deque(maxlen=100)
    workers = WORKERS if network.device.type == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool, progress_bar(updates, title, " updates") as bar:
        for examples in islice(stream, updates):
            loss = backward(network, examples, micro_batch, pool)  # gradients are in .grad now
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            if not math.isfinite(loss + norm.item()):
                raise FloatingPointError(f"{title}: the loss or gradient of update "
                                         f"{optimizer.updates + 1} is not a finite number")
            optimizer.step()
            losses.append(loss)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
    network.zero_grad()                                            # frees the gradients' memory
    return sum(losses) / len(losses) if losses else None

def backward(network, examples, micro_batch, pool):
    """Put the gradient of a batch's mean loss into .grad; returns the loss. `micro_batch` rows go
    through at once, one part after another or on the threads of a CPU; processes share the parts.
    Each part counts by its share of the tokens, so the sum is the whole batch's."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    total = sum(len(example.response) for example in examples)
    parts = [examples[i:i + micro_batch] for i in range(0, len(examples), micro_batch)]

    def gradient_of(part):                     # .backward() would add to one .grad in any order
        batch = [tensor.to(network.device) for tensor in collate(part)]
        share_of_batch = sum(len(example.response) for example in part) / total
        with precision(network.device):
            loss = network.loss(*batch) * share_of_batch
        return loss.item(), torch.autograd.grad(loss, parameters)

    batch_loss = 0.0
    network.zero_grad()
    for loss, gradients in pool.map(gradient_of, my_part(parts)):  # in the order of the parts
        batch_loss += loss
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        del gradients, gradient                                    # the next part needs the memory
    return all_reduce(parameters, batch_loss)

def progress_bar(total, title, unit):
    """A progress bar that goes when it is full; none where there is no stderr."""
    return tqdm(total=total, desc=title, unit=unit, leave=False, mininterval=1,
                disable=sys.stderr is None or RANK > 0)

def collate(examples):
    """Tensors of a batch, as `Policy.loss` takes them: images and prompts without their last token,
    each distinct pair once, with lengths (N,); owner (B,), which of them is each row's; ids
    (B, T): the last token of the prompt, then the response but for its last; targets (B, T): the
    response, so that no prompt is learned, and -1 on padding; labels (B, T) where there are any."""
    labels = []
    if examples[0].labels:                                         # for a reward model
        labels = [_padded([example.labels for example in examples], -1.0, torch.float)]
    pairs = [(id(example.image), *example.prompt) for example in examples]     # image by identity
    example_of = dict(zip(pairs, examples))                        # of each distinct pair, in order
    distinct = example_of.values()
    index_of = {pair: i for i, pair in enumerate(example_of)}
    images = [example.image for example in distinct]
    if any(map(callable, images)):             # in files: opened side by side, each takes long
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(pixels_of, images))
    return (torch.stack(images),
            _padded([example.prompt[:-1] for example in distinct], 0),
            torch.tensor([len(example.prompt) - 1 for example in distinct]),
            torch.tensor([index_of[pair] for pair in pairs]),
            _padded([[example.prompt[-1], *example.response[:-1]] for example in examples], 0),
            _padded([example.response for example in examples], -1), *labels)

def pixels_of(image):
    """The tensor of a Prompt's image, which is opened only now if it is in a file."""
    return torch.as_tensor(image() if callable(image) else image)

def _padded(lists, value, dtype=torch.long):
    rows = [torch.tensor(numbers, dtype=dtype) for numbers in lists]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

def batches(examples, batch_size, rng, together=1):
    """Endless batches (lists of Example), every example once per pass. Up to `together` of one
    image are neighbours: it is read once for them. Such groups are sorted by length within windows
    of two batches: less padding, and a batch still mixes task types. The last batch of a pass may
    be smaller, and is an update like the others."""
    examples_of_image = defaultdict(list)
    for example in examples:
        examples_of_image[id(example.image)].append(example)

    def length(group):
        return max(len(example.prompt) + len(example.response) for example in group)

    while True:
        groups = []
        for same_image in examples_of_image.values():
            same_image = rng.sample(same_image, len(same_image))   # a shuffled copy
            groups += [same_image[i:i + together] for i in range(0, len(same_image), together)]
        sequence, window = [], []
        for group in rng.sample(groups, len(groups)):
            window.append(group)
            if sum(map(len, window)) >= 2 * batch_size:
                sequence += sorted(window, key=length)
                window = []
        in_order = [example for group in sequence + window for example in group]
        starts = range(0, len(in_order), batch_size)
        for start in rng.sample(starts, len(starts)):
            yield in_order[start:start + batch_size]

def adamw(parameters, lr):
    """torch's AdamW, without weight decay for norms and biases."""
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    fused = parameters[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=fused)

class Optimizer:
    """One or more torch optimizers with one learning-rate schedule: what lives on between the
    rounds of continuous self-evolving. The schedule: a linear start, then constant, or with
    `decay_over` a cosine to a tenth over so many updates."""

    def __init__(self, optimizers, lr_warmup_updates, decay_over=0):
        self.optimizers, self.updates = optimizers, 0
        self.lr_warmup_updates, self.decay_over = lr_warmup_updates, decay_over
        self.full_lr = [one.param_groups[0]["lr"] for one in optimizers]

    def step(self):
        """One update, from the gradients in .grad."""
        factor = min(1.0, (self.updates + 1) / self.lr_warmup_updates)
        if self.decay_over:
            progress = min(1.0, self.updates / self.decay_over)
            factor *= 0.55 + 0.45 * math.cos(math.pi * progress)
        for one, lr in zip(self.optimizers, self.full_lr):
            for group in one.param_groups:
                group["lr"] = lr * factor
            one.step()
        self.updates += 1

    def tensors(self):
        """Its state for a file: {"optimizer/number/parameter/name": tensor}."""
        tensors = {}
        for i, one in enumerate(self.optimizers):
            for number, state in one.state_dict()["state"].items():
                for name, tensor in state.items():
                    tensors[f"optimizer/{i}/{number}/{name}"] = tensor
        return tensors

    def load(self, tensors, updates):
        """Put back what `tensors` gave after so many `updates`."""
        states = [defaultdict(dict) for _ in self.optimizers]
        for key, tensor in tensors.items():
            _, i, number, name = key.split("/")
            states[int(i)][int(number)][name] = tensor
        self.updates = updates
        for one, state in zip(self.optimizers, states):
            groups = one.state_dict()["param_groups"]              # step() sets their lr
            one.load_state_dict({"state": state, "param_groups": groups})

# ---------------------------------------------------------------- sampler

class Prompt(NamedTuple):
    """What the policy is asked: an image and prompt token ids."""
    image: object                 # (size, size, 3) uint8 tensor, or a function that returns it
    ids: list

class Sampling(NamedTuple):
    """How to sample."""
    rollouts: int                 # L, responses to each prompt
    temperature: object           # of the responses: one number, or a list of L; 0 is greedy
    max_new_tokens: int           # what is longer is cut off
    seed: int
    streams: object = None        # which random numbers each of the L draws with; None: 0 .. L-1

class Response(NamedTuple):
    """One sampled response. `tokens` end with the end token if `complete`; else they were cut off
    at max_new_tokens. log_probs[i] is the log-probability of tokens[i] under the distribution it
    was drawn from (of a greedy response: the policy's at temperature 1)."""
    tokens: list
    complete: bool
    log_probs: list

def draw(logits, temperature, uniform, forced):
    """Next tokens by inverse CDF: logits (B, V), temperature (B,), uniform (B,) in [0, 1) -> tokens
    (B,), log_probs (B,). Each row has its own uniform number: what it draws does not depend on the
    rows beside it. Temperature 0 is greedy. forced (B,): a token to take instead, or -1."""
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    log_probs = F.log_softmax(scaled, dim=-1)                      # (B, V)
    cdf = log_probs.exp().cumsum(dim=-1)
    sampled = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    sampled = sampled.clamp(max=logits.shape[1] - 1)               # rounding at the upper end
    tokens = torch.where(greedy, logits.argmax(dim=-1), sampled)
    tokens = torch.where(forced >= 0, forced, tokens)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]

@torch.inference_mode()
def sample_without_cache(policy, prompt, temperature, uniforms):
    """The slow, obvious way to one response, the reference for `sample`: a full forward pass for
    every token. uniforms (max_new_tokens,) -> Response."""
    tokens, log_probs, end = [], [], policy.tokenizer.EOS
    image = pixels_of(prompt.image)[None].to(policy.device)
    while len(tokens) < len(uniforms) and end not in tokens:
        ids = torch.tensor([prompt.ids + tokens]).to(policy.device)
        logits = policy(image, ids)[:, -1].cpu()        # (1, V)
        uniform = uniforms[len(tokens)][None]
        token, log_prob = draw(logits, torch.tensor([float(temperature)]), uniform,
                               torch.tensor([-1]))
        tokens.append(token.item())
        log_probs.append(log_prob.item())
    return Response(tokens, tokens[-1] == end, log_probs)

def sample(policy, prompts, how, prefixes=None, rows=None, progress=None):
    """Sample responses: list (Q) of Prompt, Sampling -> list (Q) of lists (L) of Response.

    The same responses as `sample_without_cache` (in fp32), with less work: image and prompt are
    read once per batch; keys and values are cached; rows that are done are not computed;
    responses of a question that agree so far, whatever their temperature, share one row
    (`_branch`). Response l of question q draws its token t with number (q, streams[l], t) of one
    seeded table, so that they depend neither on workers nor, up to the order of floating-point
    sums, on `rows`.

    prefixes: for each question a list of token lists. Each is continued L times; a question's
        responses are those of its first prefix, then of its second ... A prefix is part of its
        responses and shorter than max_new_tokens.
    rows: responses per batch at most (never less than L); by default see _rows_at_once.
    progress: called with the number of responses that have just ended.
    FloatingPointError: weights that have left the finite numbers."""
    L, T = how.rollouts, how.max_new_tokens
    prefixes = prefixes or [[[]]] * len(prompts)
    temperature = torch.as_tensor(how.temperature, dtype=torch.float32).expand(L)
    streams = torch.arange(L) if how.streams is None else torch.as_tensor(how.streams)
    generator = torch.Generator().manual_seed(how.seed)
    uniforms = torch.rand(len(prompts), int(streams.max()) + 1, T, generator=generator)
    forced = [torch.full((len(group), T), -1) for group in prefixes]
    for group, table in zip(prefixes, forced):
        for prefix, line in zip(group, table):
            line[:len(prefix)] = torch.tensor(prefix, dtype=torch.long)

    def run(batch):                                # tables with one line per response
        some = [pieces[i] for i in batch]
        with precision(policy.device):
            return _sample_batch(
                policy, [prompts[q] for q, _ in some], [L * len(table) for _, table in some],
                torch.cat([temperature.repeat(len(table)) for _, table in some]),      # (R,)
                torch.cat([uniforms[q, streams].repeat(len(t), 1) for q, t in some]),  # (R, T)
                torch.cat([table.repeat_interleave(L, dim=0) for _, table in some]),   # (R, T)
                progress)

    rows = rows or _rows_at_once(policy, [L * len(table) for table in forced], T)
    most = max(1, rows // L)                       # prefixes of one question that go in at once
    pieces = []                                    # (question, some of its prefixes)
    for q, table in enumerate(forced):
        pieces += [(q, piece) for piece in table.split(most) if len(piece)]
    cut = _batches([prompts[q] for q, _ in pieces], [L * len(t) for _, t in pieces], rows)
    responses = [[] for _ in prompts]
    for batch, groups in zip(cut, results_of(run, cut, policy.device)):
        for i, group in zip(batch, groups):
            responses[pieces[i][0]] += group       # in order: `_batches` sorts stably
    return responses

def _rows_at_once(policy, counts, T):
    """How many responses go into one batch, the same in every process. counts: responses of each
    question. On a CPU at most 1024, and at most a quarter of all, so that four cores have work (not
    by the number of cores: results must not depend on it). On a GPU (not measured yet) a process's
    whole share, if half of the free memory holds it: there a decode step of many rows takes hardly
    longer than one of few."""
    c = policy.config
    # a prompt is taken to be as long as a response
    cache = 2 * c.layers * c.kv_heads * (c.width // c.heads) * (policy.image_tokens + 2 * T)
    logits = 6 * c.vocabulary                                      # and what `draw` makes of them
    # a vision block keeps 14 numbers per patch and channel, once for all rows of a question
    image = 14 * policy.vision.side ** 2 * c.vision_width * len(counts) / max(1, sum(counts))
    row = math.ceil(4 * (cache + logits + image))                  # bytes
    if policy.device.type == "cpu":                                # 4 GB for each worker at most
        return max(1, min(1024, math.ceil(sum(counts) / 4), 2**32 // row))
    if policy.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()   # torch's, unused
    else:                                                          # a Mac's
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    share = math.ceil(sum(counts) / PROCESSES) + max(counts, default=0)    # no question is cut
    return broadcast(min(max(1, free // 2 // row), share))

def _batches(prompts, counts, rows):
    """Indices of prompts, in batches of at most `rows` responses, like lengths together. counts:
    responses of each prompt."""
    batches, size = [], 0
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids)):
        if not batches or size + counts[i] > rows:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += counts[i]
    return batches

@torch.no_grad()       # not inference_mode: under it, autocast would cast all weights at every step
def _sample_batch(policy, prompts, counts, temperature, uniforms, forced, progress):
    """The sampler's loop, for N questions with `counts` responses: temperature (R,), uniforms and
    forced (R, T), R = sum(counts) -> list (N) of lists of Response."""
    (R, T), device, end = forced.shape, policy.device, policy.tokenizer.EOS
    temperature, uniforms, forced = (x.to(device) for x in (temperature, uniforms, forced))
    # 1. Prefill: each question once. All its responses begin in one row.
    logits, start, prefix = _prefill(policy, prompts)              # (N, V), (N,), (N, G, I+P, D)
    if not logits.isfinite().all():
        raise FloatingPointError("the policy's logits are not finite numbers")
    suffix = [[part.new_empty(R, part.shape[1], T, part.shape[3]) for part in layer]
              for layer in prefix]                                 # the cache: a line for each row
    row = torch.arange(len(counts), device=device).repeat_interleave(
        torch.tensor(counts).to(device))                           # (live,) each response's row
    owner = torch.arange(R, device=device)     # (R,) each row's question: at first row q is q's
    live = torch.arange(R, device=device)                          # the responses that go on
    history = []                                                   # (live, tokens, log_probs)
    # On a GPU the host must wait for each result that gives a tensor its size: nonzero, unique and
    # boolean masks (who goes on, in which row, who moves) and max (the most rows of a question).
    # Tokens and log-probabilities stay on the GPU until the end.
    for t in range(T):
        # 2. Draw: every response for itself, from the logits of its row
        tokens, log_probs = draw(logits[row], temperature[live], uniforms[live, t], forced[live, t])
        history.append((live, tokens, log_probs))
        goes_on = ((tokens != end) & (t + 1 < T)).nonzero()[:, 0]
        if progress:
            progress(len(live) - len(goes_on))
        live, row, tokens = live[goes_on], row[goes_on], tokens[goes_on]
        if not len(live):
            break
        # 3. Branch: one row for each distinct (row, token)
        row, feed = _branch(row, tokens, owner, suffix, t, policy.config.vocabulary)
        B = len(feed)
        # Questions that are done leave when they are half of all: up to a tenth faster
        going = owner[:B].unique()
        if 2 * len(going) <= len(start):
            prefix = [[part[going] for part in layer] for layer in prefix]
            start = start[going]
            owner[:B] = torch.searchsorted(going, owner[:B])       # their new numbers
        # 4. Decode: one forward pass of one token per row
        written = [[part[:B, :, :t + 1] for part in layer] for layer in suffix]
        logits = _decode(policy, feed, owner[:B], start, t, prefix, written)           # (B, V)
    return _responses(history, counts, end)

def _branch(row, tokens, owner, suffix, t, vocabulary):
    """Give each distinct (row, token) a row of its own: row, tokens (live,) -> (row of each
    response, token to feed to each row (B,)). Changes `owner` and the cache `suffix` in place.

    Six responses to one question, in two rows: those in one row have written the same so far.
        response                0  1  2  3  4  5
        row                     0  0  0  0  1  1
        token just drawn        7  7  9  7  5  5
    Their distinct (row, token) pairs, in order: (0, 7) (0, 9) (1, 5), so B = 3 rows are needed.
        (0, 7) and (1, 5) are the first of their rows, and stay in them;
        (0, 9) moves to row 2, in which nobody is, with a copy of row 0's cache and owner.
        row afterwards          0  0  2  0  1  1          feed: 7 to row 0, 5 to row 1, 9 to row 2
    Rows in use are always 0 .. B-1: if row 3 goes on while rows 0 and 1 are done, it moves, too.
    Exact, since each response draws with its own numbers. What it saves: results/README.md."""
    pairs, branch = torch.unique(row * vocabulary + tokens, return_inverse=True)
    parent, token = pairs // vocabulary, pairs % vocabulary        # (B,) each
    B = len(pairs)
    is_first = parent.diff(prepend=parent.new_full((1,), -1)) > 0
    stays = is_first & (parent < B)
    free = torch.ones(B, dtype=torch.bool, device=row.device)
    free[parent[stays]] = False
    moves = (~stays).nonzero()[:, 0]
    to, source = free.nonzero()[:, 0], parent[moves]               # rows to fill, and from where
    for layer in suffix:
        for part in layer:                                         # keys, values (R, G, T, D)
            part[to, :, :t] = part[source, :, :t]
    owner[to] = owner[source]
    target = parent.clone()                                        # (B,) the row of each pair
    target[moves] = to
    feed = torch.empty_like(token).scatter_(0, target, token)
    return target[branch], feed

def _responses(history, counts, end):
    """Put together what was drawn: history [(live, tokens, log_probs)], one entry per step."""
    live, tokens, log_probs = (torch.cat(parts).cpu() for parts in zip(*history))      # all at once
    order = live.sort(stable=True).indices                         # by response, steps in order
    sizes = live.bincount().tolist()                               # each has drawn at least once
    responses = []
    for tokens, log_probs in zip(tokens[order].split(sizes), log_probs[order].split(sizes)):
        tokens = tokens.tolist()
        responses.append(Response(tokens, tokens[-1] == end, log_probs.tolist()))
    remaining = iter(responses)
    return [list(islice(remaining, count)) for count in counts]

def _prefill(policy, prompts):
    """Read each image and prompt once: logits of the first token (N, V), lengths (N,), and the
    cache (here P counts the last token of a prompt, too, which stands behind the padding)."""
    # [0], a response of one token, is never read: such a row is the prompt's last token
    batch = collate([Example(*prompt, [0]) for prompt in prompts])
    images, beginnings, lengths, owner, ids, _ = [tensor.to(policy.device) for tensor in batch]
    hidden, cache = policy.hidden(images, beginnings, lengths, owner, ids, keep_cache=True)
    return policy.logits(hidden[:, 0]), lengths[owner] + 1 + policy.image_tokens, cache

def _decode(policy, tokens, owner, start, t, prefix, suffix):
    """Feed token t of the response to each row: tokens, owner (B,); start (N,) lengths of image and
    prompt; caches per layer: prefix (N, G, I+P, D), suffix (B, G, t + 1, D), whose last column is
    filled here -> logits (B, V)."""
    device, N = owner.device, len(start)
    counts = owner.bincount(minlength=N)
    first = counts.cumsum(0) - counts          # by question: where its rows begin, in their order
    rank = owner.argsort(stable=True).argsort() - first[owner]
    place = torch.arange(prefix[0][0].shape[2], device=device)     # (I+P,)
    padding = (place >= start[:, None] - 1) & (place < place[-1])  # the last is a prompt's token
    bias = torch.zeros(padding.shape, device=device).masked_fill_(padding, -math.inf)
    grouping = Grouping(owner, rank, (N, int(counts.max())), bias[owner, None, None])
    cos, sin = policy.rope((start[owner] + t)[:, None])
    x = policy.embed(tokens)[:, None]                              # (B, 1, C)
    for block, layer_prefix, layer_suffix in zip(policy.blocks, prefix, suffix):
        x = block.decode(x, cos, sin, layer_prefix, layer_suffix, grouping)
    return policy.logits(policy.norm(x)[:, 0])
