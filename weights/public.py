"""
weights/public.py: public weights of the SigLIP + pixel shuffle + Llama family, and their tokenizer,
for --policy FOLDER: SmolVLM, SmolVLM2 (256M, 500M) and nanoVLM-222M.

The network is model.Policy: names and sizes are translated, by public_names.json, and for nanoVLM
the scale of pixels. What these models do with pictures in tiles is left out: one picture, of one
size.
Read:     load_policy, tokenizer_for -> load_public -> PublicTokenizer
Run:      python mstar.py --policy SmolVLM-256M-Instruct/
"""
import json
import math
import re
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data import Tokenizer
from model import ModelConfig, Policy, load_network

def load_policy(path, tokenizer, device="cpu"):
    """The Policy that --policy names: a file of ours, or a folder with public weights."""
    if is_public(path):
        return load_public(path, tokenizer).to(device)
    return load_network(path, tokenizer, device)

def is_public(policy):
    """Does --policy name a folder with public weights? (Else it is a file of ours, or scratch.)"""
    return policy != "scratch" and Path(policy).suffix != ".safetensors"

def tokenizer_for(policy):
    """The tokenizer of what --policy names: a folder with public weights, or else our world's.
    FileNotFoundError, ValueError: as of PublicTokenizer."""
    if is_public(policy):
        return PublicTokenizer(Path(policy) / "tokenizer.json")
    return Tokenizer()

# ---------------------------------------------------------------- weights

def load_public(folder, tokenizer):
    """The Policy of a folder with public weights: config.json and model.safetensors (or shards) of
    SmolVLM, SmolVLM2 or nanoVLM, in fp32. FileNotFoundError; ValueError names what does not fit."""
    folder, tables = Path(folder), Path(__file__).parent / "public_names.json"
    try:
        about = json.loads((folder / "config.json").read_bytes())
        family = "nanovlm" if "lm_hidden_dim" in about else "smolvlm"
        if family == "smolvlm" and about.get("model_type") not in ("idefics3", "smolvlm"):
            raise ValueError(f"model_type is {about.get('model_type')!r}")
        table = json.loads(tables.read_bytes())[family]
        for place, value in table["fixed"].items():
            if (other := _place_in(about, place)) not in (None, value):
                raise ValueError(f"{place} is {other!r}, not {value!r}")
        sizes = {name: _place_in(about, place) for name, place in table["sizes"].items()}
        if lacking := [name for name, size in sizes.items() if size is None]:
            raise ValueError(f"config.json lacks the {lacking[0]}")
        sizes["rope_theta"] = float(sizes["rope_theta"])
        side = sizes["image_size"] // sizes["patch_size"]
        if family == "smolvlm" and side & (side - 1):              # else they round to other places
            raise ValueError(f"{side} patches a side are no power of two")
        if sizes["vocabulary"] != len(tokenizer):
            raise ValueError(f"a vocabulary of {sizes['vocabulary']}, but {len(tokenizer)} tokens "
                             "in tokenizer.json")
        files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
        if index.exists():                                         # in shards
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        theirs = {}
        for file in files:
            if (folder / file).stat().st_size < 1000:              # cloned without git-lfs
                raise ValueError(f"{file} is only a pointer: run `git lfs pull` in this folder")
            theirs |= load_file(folder / file)
        theirs.pop("decoder.rotary_embd.inv_freq", None)           # no weight
        if family == "nanovlm":                                    # tied, kept by either name
            tied = theirs.pop("decoder.head.weight", None)
            embedding = theirs.setdefault("decoder.token_embedding.weight", tied)
            if tied is not None and not torch.equal(tied, embedding):
                raise ValueError("decoder.head is not tied to the embedding")
        sizes["tied"] = f"{table['names']['head']}.weight" not in theirs
        with torch.device("meta"):
            policy = Policy(ModelConfig(**sizes, lead=tokenizer.lead), tokenizer)
        state = {}
        for name, tensor in policy.state_dict().items():           # taken out of `theirs`
            state[name] = _public_tensor(name, tensor.shape, table["names"], theirs)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
            SafetensorError) as error:
        raise ValueError(f"{folder}: no SmolVLM or nanoVLM that fits here (missing or wrong: "
                         f"{error})") from error
    if theirs:
        raise ValueError(f"{folder}: {min(theirs)} has no place in this network")
    if family == "nanovlm":                                        # its pixels are in [0, 1]
        state["vision.patch.weight"] /= 2
        state["vision.patch.bias"] += state["vision.patch.weight"].sum(dim=(1, 2, 3))
    policy.load_state_dict(state, assign=True)
    return policy

def _place_in(about, places):
    """The first that is there of "a.b or c.d or 12" in nested dicts, or None."""
    for place in places.split(" or "):
        if place.isdecimal():
            return int(place)
        value = about
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None

def _public_tensor(name, shape, names, theirs):
    """Our tensor of a name, in fp32, taken out of theirs. names: our stem -> theirs, "#" is the
    layer, and "a.k_proj+v_proj" are two that are one here, rows below rows."""
    number = "".join(re.findall(r"(?<=blocks\.)\d+", name))
    stem, _, kind = name.replace(f"blocks.{number}", "blocks.#").rpartition(".")
    if name == "vision.position":
        stem, kind = name, ""
    first, *below = names[stem].replace("#", number).split("+")
    paths = [first, *(f"{first.rpartition('.')[0]}.{part}" for part in below)]
    parts = [theirs.pop(f"{path}.{kind}".rstrip(".")) for path in paths]
    tensor = torch.cat(parts).float().squeeze(0)                   # nanoVLM's positions: (1, P, C)
    if tensor.shape != shape:
        raise ValueError(f"{first}.{kind} is {tuple(tensor.shape)}, not {tuple(shape)}")
    return tensor

# ---------------------------------------------------------------- tokenizer

# What GPT-2's expression cuts a text into, once the digits are out (so that [^\W_] is a letter):
# endings ('s, 'll), words, other signs, white space (not \x1c to \x1f, which `re` takes for it),
# each with the space before it
PIECES = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W_]+| ?(?:[^\w\s]|[_\x1c-\x1f])+"
                    r"|[^\S\x1c-\x1f]+(?![\S\x1c-\x1f])|[^\S\x1c-\x1f]+")

class PublicTokenizer(Tokenizer):
    """Byte-level BPE from the tokenizer.json of public weights (SmolLM2's: digits one by one), with
    the methods of Tokenizer. ValueError: a file of another kind."""

    def __init__(self, path):
        try:
            about = json.loads(Path(path).read_bytes())
            model, cuts = about["model"], about["pre_tokenizer"]["pretokenizers"]
            kinds = [model["type"], *(cut["type"] for cut in cuts), about["normalizer"]]
            added = {token["content"]: token["id"] for token in about["added_tokens"]}
            self.ids, merges = model["vocab"] | added, model["merges"]
            self.chat = "<end_of_utterance>" in self.ids           # SmolVLM; else nanoVLM
            self.EOS = self.ids["<end_of_utterance>" if self.chat else "<|endoftext|>"]
            self.symbols = [""] * (1 + max(self.ids.values()))
            for symbol, i in self.ids.items():
                self.symbols[i] = symbol
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
            self.rank = {pair: rank for rank, pair in enumerate(merges)}
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path}: no tokenizer.json that fits here ({error})") from error
        if (kinds != ["BPE", "Digits", "ByteLevel", None]
                or not cuts[0].get("individual_digits") or cuts[1].get("add_prefix_space")):
            raise ValueError(f"{path}: not byte-level BPE with single digits, as SmolLM2's")
        self.special = set(added.values())
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self.added = re.compile(f"({'|'.join(longest_first)})")
        digits = [chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i))[0] == "N"]
        self.digit = re.compile(f"([{''.join(digits)}])")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = (byte for byte in range(256) if byte not in printable)
        self.sign = {byte: chr(byte) for byte in printable}        # each byte has a visible sign
        self.sign |= {byte: chr(256 + i) for i, byte in enumerate(others)}
        self.byte = {sign: byte for byte, sign in self.sign.items()}
        self.breaks = {i for i, symbol in enumerate(self.symbols) if self.sign[10] in symbol}
        before = "<|im_start|>User:<fake_token_around_image><global-img>"
        self.lead = tuple(self.encode(before)) if self.chat else ()  # what stands before an image

    def encode(self, text):
        """Token ids of a text. Bytes without a token (some control characters) are left out
        before anything is merged."""
        ids = []
        for part in self.added.split(text):
            if part in self.ids and self.added.fullmatch(part):
                ids.append(self.ids[part])
                continue
            for i, run in enumerate(self.digit.split(part)):       # every second one is a digit
                for piece in [run] if i % 2 else PIECES.findall(run):
                    ids += self._merge(piece)
        return ids

    @lru_cache(maxsize=100_000)
    def _merge(self, piece):
        parts = [self.sign[byte] for byte in piece.encode() if self.sign[byte] in self.ids]
        while len(parts) > 1:
            ranks = [self.rank.get(pair, math.inf) for pair in zip(parts, parts[1:])]
            if min(ranks) == math.inf:                             # nothing is left to merge
                break
            i = ranks.index(min(ranks))                            # the best pair, the first of it
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]

    def decode(self, ids):
        """The text of token ids; special tokens are left out."""
        signs = "".join(self.symbols[i] for i in ids if i not in self.special)
        return bytes(self.byte[sign] for sign in signs).decode(errors="replace").removeprefix(" ")

    def prompt(self, text, answer=None, direct=False):
        """Prompt ids behind the image: reasoning asked for; with `answer`, the prompt of the
        paper's warm-up; or `direct`, the answer alone."""
        if answer is not None:
            text += f"\nThe answer is {answer}. Explain how to find it."
        if direct:
            text += '\nWrite "answer: " and the answer, nothing else.'
        else:
            text += '\nReason step by step, one step per line. End with "answer: " and the answer.'
        if self.chat:
            return self.encode(f"<fake_token_around_image>{text}<end_of_utterance>\nAssistant:")
        return self.encode(f"Question: {text} Answer:")

    def response(self, text):
        """Response ids: the text and the end token."""
        return [*self.encode(f" {text}"), self.EOS]

    def text_of(self, tokens):
        """The text of a response. If it was cut off at max_new_tokens, without the beginning of its
        last line: digits are tokens, and of "answer: 12" that may end in a 1."""
        text = self.decode(tokens)
        return text if tokens[-1] == self.EOS else text[:text.rfind("\n") + 1]
