"""
model.py: a small vision-language transformer and its sampler.

Paper (arXiv 2412.17451v3): the policy model pi. There it is MiniCPM-V-2.5 (8B), Phi-3.5-vision or InternVL2; here a small
    member of the public SigLIP + pixel-shuffle + Llama family: a ViT reads patches, neighbouring patches are folded into
    one token ("pixel shuffle"), a linear map takes them into a Llama-style decoder that writes text.
Read:     VisionTower -> Decoder -> Policy -> sample   (bottom-up: the parts explain the whole)
Departs:  sizes, and trained from scratch. One image per question, of one fixed size; no image tiling.
          The sampler works in waves: the rows of a wave that finish leave it, new rows join at the next wave.
Run:      nothing by itself; `sample` is the only entrance for generating text.

Letters in shape comments: B batch rows, P image patches, I image tokens, T text tokens, S cached tokens, C width, H heads,
G key/value heads, D = C / H, V vocabulary, Q questions, L rollouts per question.
"""
import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


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
    kv_heads: int = 2             # grouped-query attention: heads / kv_heads query heads share one key/value head
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
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1         # (B, 3, size, size) in [-1, 1]
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position                  # (B, P, C)
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

    def forward(self, x, cos, sin):                                # full causal pass; also returns keys and values for a cache
        q, k, v = self.project(x, cos, sin)
        share = self.heads // self.kv_heads
        attended = F.scaled_dot_product_attention(q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), is_causal=True)
        return self.finish(x, attended), k, v

    def decode(self, x, cos, sin, keys, values, column, mask):
        """One new token per row: x (B, 1, C). Writes its key and value into cache column `column`, attends where `mask`
        (B, 1, 1, S) is True. keys, values (B, G, S_max, D) are changed in place: they are the cache."""
        q, k, v = self.project(x, cos, sin)
        keys[:, :, column:column + 1], values[:, :, column:column + 1] = k, v
        # query heads that share a key/value head stand as H/G "positions" of it, so nothing is copied per query head
        q = q.view(q.shape[0], self.kv_heads, -1, self.head_dim)   # (B, G, H/G, D)
        attended = F.scaled_dot_product_attention(q, keys[:, :, :column + 1], values[:, :, :column + 1], attn_mask=mask)
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

    def hidden(self, images, ids, keep_cache=False):
        """Last hidden states of the text: images (B, size, size, 3) uint8, ids (B, T) -> (B, T, C).

        Rows may be padded on the right: attention is causal, so nothing before the padding sees it.
        With `keep_cache` also returns a list of (keys, values), each (B, G, I+T, D), one per layer."""
        x = torch.cat([self.vision(images), self.embed(ids)], dim=1)                 # (B, I+T, C) image first: every word sees it
        cos, sin = self.rope(torch.arange(x.shape[1], device=x.device)[None])
        cache = []
        for block in self.blocks:
            x, k, v = block(x, cos, sin)
            if keep_cache:
                cache.append((k, v))
        x = self.norm(x)[:, self.image_tokens:]                    # (B, T, C) image tokens predict nothing
        return (x, cache) if keep_cache else x

    def logits(self, hidden):
        """(..., C) hidden states -> (..., V) fp32 logits of the next token. Tied: the embedding read backwards."""
        return F.linear(hidden, self.embed.weight).float()

    def forward(self, images, ids):                                # -> (B, T, V)
        return self.logits(self.hidden(images, ids))

    def loss(self, images, ids, targets):
        """SFT loss, mean over all response tokens of the batch (a mean per row would weigh tokens of long responses less).
        targets (B, T): the token that follows each position, or -1 where nothing is to be learned: prompt and padding."""
        learned = targets >= 0
        logits = self.logits(self.hidden(images, ids)[learned])    # (number of response tokens, V): no logits for the rest
        return F.cross_entropy(logits, targets[learned])


# ---------------------------------------------------------------- weights on disk

def save_policy(policy, path, symbols):
    """Write `path` (.safetensors) and beside it a JSON with the sizes and the vocabulary. Each file appears whole or not at all."""
    path = Path(path)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}, f"{path}.part")
    description = {"model": asdict(policy.config), "vocabulary": list(symbols)}
    path.with_suffix(".json.part").write_text(json.dumps(description, indent=1))
    path.with_suffix(".json.part").replace(path.with_suffix(".json"))
    Path(f"{path}.part").replace(path)


def load_policy(path, device="cpu"):
    """Read what `save_policy` wrote: (policy, vocabulary). ValueError names the file when it is damaged or does not fit."""
    path = Path(path)
    try:
        description = json.loads(path.with_suffix(".json").read_text())
        policy = Policy(ModelConfig(**description["model"]))
        policy.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a policy this program wrote, or damaged ({error})") from error
    return policy.to(device), description["vocabulary"]


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


def draw(logits, temperature, uniform):
    """Next tokens by inverse CDF: logits (B, V), temperature (B,), uniform (B,) in [0, 1) -> tokens (B,), log_probs (B,).
    Each row has its own uniform number, so what it draws does not depend on the rows beside it. Temperature 0 is greedy."""
    greedy = temperature == 0
    log_probs = F.log_softmax(logits / torch.where(greedy, 1.0, temperature)[:, None], dim=-1)
    cdf = log_probs.exp().cumsum(dim=-1)
    sampled = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    tokens = torch.where(greedy, logits.argmax(dim=-1), sampled)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


@torch.inference_mode()
def sample(policy, prompts, rollouts_per_question, temperature, max_new_tokens, seed, end_token, rows=None, progress=None):
    """Sample responses: list of Prompt -> list (Q) of lists (L = rollouts_per_question) of Response.

    temperature: a number, or anything that broadcasts to (Q, L), so that one call can mix temperatures. 0 is greedy.
    seed: response l of question q draws its token t with uniform number (q, l, t) of one seeded table. The same seed gives
        the same responses whatever `rows` is, up to the floating-point order of the matrix products.
    rows: how many responses are decoded together; bounds the memory of the cache. By default 512 on a CPU, 4096 elsewhere.
    progress: called as progress(responses just ended, tokens just written) after every decode step.
    Raises ValueError for a negative temperature or an empty prompt."""
    L, device = rollouts_per_question, policy.device
    temperature = torch.as_tensor(temperature, dtype=torch.float32).expand(len(prompts), L)
    if (temperature < 0).any():
        raise ValueError(f"temperature {temperature.min().item()} is negative; 0 is greedy")
    if any(len(prompt.ids) == 0 for prompt in prompts):
        raise ValueError("empty prompt")
    uniforms = torch.rand(len(prompts), L, max_new_tokens, generator=torch.Generator().manual_seed(seed))
    responses = [[([], []) for _ in range(L)] for _ in prompts]    # tokens, log_probs
    was_training = policy.training
    policy.eval()
    # Questions of equal length go together: the prompts of a wave then need little padding.
    by_length = sorted(range(len(prompts)), key=lambda q: len(prompts[q].ids))
    per_wave = max(1, (rows or (512 if device.type == "cpu" else 4096)) // L)
    for start in range(0, len(prompts), per_wave):
        wave = by_length[start:start + per_wave]
        with policy.precision():
            _sample_wave(policy, [prompts[q] for q in wave], temperature[wave].flatten().to(device), uniforms[wave].flatten(0, 1).to(device),
                         end_token, [responses[q][l] for q in wave for l in range(L)], progress)
    policy.train(was_training)
    return [[Response(tokens, tokens[-1] == end_token, log_probs) for tokens, log_probs in group] for group in responses]


def _sample_wave(policy, prompts, temperature, uniforms, end_token, out, progress):
    """Decode L rollouts of each prompt together and append to `out`, one (tokens, log_probs) per row.

    A row's cache has the prompt in columns [0, length) of the first `prefix` columns (padded on the right, masked) and its
    own tokens from column `prefix` on, so that every row writes the same column at the same time. Positions for RoPE are
    the true ones, without the gap."""
    device, max_new_tokens, L = policy.device, uniforms.shape[1], len(uniforms) // len(prompts)
    # Prefill: each image is encoded and each prompt read once, for all its rollouts.
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(prompt.ids) for prompt in prompts], batch_first=True).to(device)    # (Q, T)
    hidden, prefix_cache = policy.hidden(torch.stack([prompt.image for prompt in prompts]).to(device), ids, keep_cache=True)
    last = policy.logits(hidden[torch.arange(len(prompts), device=device), lengths - 1])                               # (Q, V)
    lengths, prefix = lengths + policy.image_tokens, ids.shape[1] + policy.image_tokens

    logits = last.repeat_interleave(L, 0)                                                                             # (B, V), B = Q L
    length = lengths.repeat_interleave(L)                                                                             # (B,)
    mask = torch.arange(prefix + max_new_tokens, device=device)[None] < length[:, None]                               # (B, S_max)
    mask[:, prefix:] = True
    cache = [tuple(F.pad(part.repeat_interleave(L, 0), (0, 0, 0, max_new_tokens)) for part in layer) for layer in prefix_cache]
    row = torch.arange(len(out), device=device)                    # which response each row of the batch is
    alive, count = torch.ones_like(row, dtype=torch.bool), len(out)

    steps = []                                                     # (row, token, log_prob) per decoded token, moved to lists at the end
    for t in range(max_new_tokens):
        tokens, log_probs = draw(logits, temperature[row], uniforms[row, t])
        steps.append((row, tokens, log_probs))
        alive &= tokens != end_token
        before, count = count, int(alive.sum()) if t + 1 < max_new_tokens else 0
        if progress:
            progress(before - count, before)
        if count == 0:
            break
        # Finished rows leave. Moving the cache costs a copy, so wait until a fifth of the rows is done; rows that are done
        # but still there go on writing, and what they write is dropped below.
        if count < 0.8 * len(row):
            keep = alive.nonzero()[:, 0]
            row, tokens, length, mask, alive = row[keep], tokens[keep], length[keep], mask[keep], alive[keep]
            cache = [(k[keep], v[keep]) for k, v in cache]
        column = prefix + t
        cos, sin = policy.rope((length + t)[:, None])
        x = policy.embed(tokens)[:, None]                                                                             # (B, 1, C)
        for block, (keys, values) in zip(policy.blocks, cache):
            x = block.decode(x, cos, sin, keys, values, column, mask[:, None, None, :column + 1])
        logits = policy.logits(policy.norm(x)[:, 0])                                                                  # (B, V)

    for row, tokens, log_probs in steps:
        for r, token, log_prob in zip(row.tolist(), tokens.tolist(), log_probs.tolist()):
            if not out[r][0] or out[r][0][-1] != end_token:
                out[r][0].append(token)
                out[r][1].append(log_prob)


@torch.inference_mode()
def sample_without_cache(policy, prompt, temperature, uniforms, end_token):
    """The slow reference for `sample`: one response, a full forward pass per token. uniforms (max_new_tokens,) -> Response."""
    tokens, log_probs = [], []
    while len(tokens) < len(uniforms) and end_token not in tokens:
        ids = torch.tensor([prompt.ids + tokens], device=policy.device)
        logits = policy(prompt.image[None].to(policy.device), ids)[:, -1]
        token, log_prob = draw(logits, torch.tensor([float(temperature)]), uniforms[len(tokens)][None])
        tokens.append(token.item())
        log_probs.append(log_prob.item())
    return Response(tokens, tokens[-1] == end_token, log_probs)
