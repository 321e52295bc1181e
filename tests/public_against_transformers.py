"""
public_against_transformers.py: load_public, PublicTokenizer and open_picture beside Hugging Face's
own code, on random weights in the format of SmolVLM and nanoVLM. It is no test; it needs
`pip install transformers` on top of requirements.txt, and the tokenizer.json of SmolVLM (or the one
that smollm2_speaks.py writes).

Ids of 2,000 made-up texts; pixels of pictures of many sizes and modes, without tiles; the prompt of
a question, by the library `tokenizers` and their processor.
For tiny networks of both architectures (Idefics3: SmolVLM; SmolVLM: SmolVLM2), and with --full for
one of the size of SmolVLM-256M: the largest difference between the logits, and whether `sample`,
with its cache, writes the greedy tokens that their `generate` writes. nanoVLM is no part of
transformers: a tiny one is put together from its SigLIP and its Llama.
Run:      python tests/public_against_transformers.py TOKENIZER.json [--full]
"""
import random
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (Idefics3Config, Idefics3ForConditionalGeneration,
                          Idefics3ImageProcessorPil, Idefics3Processor, LlamaConfig,
                          LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig,
                          SiglipVisionModel, SmolVLMConfig, SmolVLMForConditionalGeneration)

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    sys.path.insert(0, str(folder))
from data import open_picture                                              # noqa: E402
from model import Prompt, Sampling, sample                                 # noqa: E402
from test_public import SIZES, write_public                                # noqa: E402
from weights.public import PublicTokenizer, load_public                    # noqa: E402

TINY = dict(vision=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                        num_attention_heads=4, image_size=64, patch_size=8),
            text=dict(hidden_size=48, intermediate_size=100, num_hidden_layers=3,
                      num_attention_heads=6, num_key_value_heads=2, rope_theta=10_000.0),
            shuffle=2)
FULL = dict(vision=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                        num_attention_heads=12, image_size=512, patch_size=16),
            text=dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                      num_attention_heads=9, num_key_value_heads=3, rope_theta=100_000.0),
            shuffle=4)

PICTURES = ((640, 480), (480, 640), (1, 1), (3, 700), (700, 3), (2048, 2048), (513, 512), (37, 91),
            (2500, 1000), (511, 1023))                             # width, height
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "LA")
RANGES = ((32, 127), (0, 32), (127, 700), (0x370, 0x600), (0x2000, 0x2C00), (0x3000, 0x9FFF),
          (0xAC00, 0xD7A0), (0xF900, 0xFFFE), (0x1F000, 0x1FA00), (0x1D400, 0x1D7FF))
PARTS = ("\\frac{a}{b}", "$x_1^2$", "don't", "we'll", "  ", "\n\n", "\t ", "\r\n", "3.14", "7",
         "1,000", "A. 5 cm", "\u00bd\u00b2", "<image>", "<end_of_utterance>", "e\u0301", "\u2003",
         "\x1c", "'S")

def compare_ids(path, number=2000):
    """Made-up texts: words, LaTeX, digits, control characters, many scripts, special tokens."""
    ours, theirs, rng = PublicTokenizer(path), Tokenizer.from_file(path), random.Random(0)
    tokens, different = 0, 0
    for _ in range(number):
        parts = []
        for _ in range(rng.randint(0, 12)):
            start, end = rng.choice(RANGES)
            letters = "".join(chr(rng.randrange(start, end)) for _ in range(rng.randint(1, 6)))
            parts += [rng.choice(PARTS), letters, rng.choice(["", " ", str(rng.randint(0, 9999))])]
        text = "".join(rng.sample(parts, len(parts)))
        expected = theirs.encode(text, add_special_tokens=False).ids
        tokens += len(expected)
        different += ours.encode(text) != expected
    print(f"ids: {number:,} texts, {tokens:,} tokens; {different} texts have others")

def their_processor(path):
    """SmolVLM's processor, without tiles."""
    pictures = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    special = {"pad_token": "<|im_end|>", "eos_token": "<end_of_utterance>"}
    words = PreTrainedTokenizerFast(tokenizer_file=path, **special, extra_special_tokens={
        "image_token": "<image>", "global_image_token": "<global-img>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>"})
    return Idefics3Processor(pictures, words, image_seq_len=64)

def compare_pixels(processor, folder):
    """Each size in a mode of its own, and each mode."""
    rng, worst = np.random.default_rng(0), 0.0
    cases = [*((size, "RGB") for size in PICTURES), *(((90, 60), mode) for mode in MODES)]
    for (width, height), mode in cases:
        channels = 4 if mode in ("RGBA", "LA") else 3
        noise = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        picture = Image.fromarray(noise).convert(mode)
        path = Path(folder) / ("x.tiff" if mode == "CMYK" else "x.png")
        picture.save(path)
        expected = processor.image_processor(Image.open(path), return_tensors="np")["pixel_values"]
        expected = (expected[0, 0] + 1) * 127.5                     # from -1 .. 1 to 0 .. 255
        ours = open_picture(path, size=512, longest=2048).transpose(2, 0, 1)
        worst = max(worst, np.abs(ours - expected.round()).max())
    print(f"pixels: {len(cases)} pictures; the largest difference is {worst:g} of 255")

def compare_prompt(processor, path, question="What is 3 + 4?\nChoices:\n(A) 7\n(B) 12"):
    """What stands before the image, its tokens, and what stands behind it."""
    ours, image = PublicTokenizer(path), Image.new("RGB", (64, 48))
    asked = ours.decode(ours.prompt(question)).removesuffix("\nAssistant:")
    chat = f"<|im_start|>User:<image>{asked}<end_of_utterance>\nAssistant:"
    expected = processor(text=chat, images=[image])["input_ids"][0]
    whole = [*ours.lead, *[ours.ids["<image>"]] * 64, *ours.prompt(question)]
    print(f"prompt: {len(expected)} tokens, {'equal' if whole == expected else 'DIFFERENT'}")

def random_weights(config_of, network_of, sizes, tokenizer):
    """Their network, with random weights large enough that its choices are decided."""
    torch.manual_seed(0)
    text = dict(sizes["text"], model_type="llama", vocab_size=len(tokenizer), rms_norm_eps=1e-5,
                pad_token_id=2, max_position_embeddings=2048)
    theirs = network_of(config_of(
        vision_config=sizes["vision"], text_config=text, scale_factor=sizes["shuffle"],
        image_token_id=tokenizer.ids["<image>"], tie_word_embeddings=False, pad_token_id=2)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            width = p[0].numel() if p.dim() > 1 else 100
            p.add_(torch.randn_like(p) * width ** -0.5)
    return theirs

@torch.no_grad()
def compare(name, theirs, tokenizer, steps):
    """Save theirs, read it as ours, and print how far the two are apart."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_public(folder, tokenizer)
    c = ours.config
    image = torch.randint(0, 256, (c.image_size, c.image_size, 3), dtype=torch.uint8)
    ids = tokenizer.prompt("What is 3 + 4?")
    num_image = ours.image_tokens - len(tokenizer.lead)
    whole = [*tokenizer.lead, *[tokenizer.ids["<image>"]] * num_image, *ids]
    inputs = dict(
        input_ids=torch.tensor([whole]), attention_mask=torch.ones(1, len(whole)),
        pixel_values=(image.permute(2, 0, 1) / 127.5 - 1)[None, None],
        pixel_attention_mask=torch.ones(1, 1, c.image_size, c.image_size, dtype=torch.bool))
    expected = theirs(**inputs).logits[:, -len(ids):]
    logits = ours(image[None], torch.tensor([ids]))
    difference = (logits - expected).abs().max().item()
    tokens = theirs.generate(**inputs, max_new_tokens=steps, do_sample=False,
                             eos_token_id=tokenizer.EOS)[0, len(whole):].tolist()
    [[response]] = sample(ours, [Prompt(image, ids)], Sampling(1, 0.0, steps, 0))
    number = sum(p.numel() for p in ours.parameters())
    print(f"{name}: {number:,} parameters; logits up to {expected.abs().max():.1f} differ by "
          f"{difference:.1e}; greedy tokens {'equal' if response.tokens == tokens else 'DIFFER'} "
          f"({len(tokens)})")
    return difference, response.tokens == tokens

NANOVLM_NAMES = (
    ("vision_model.", ""), ("embeddings.patch_embedding", "vision_encoder.patch_embedding.conv"),
    ("embeddings.position_embedding.weight", "vision_encoder.patch_embedding.position_embedding"),
    ("encoder.layers", "vision_encoder.blocks"), ("layer_norm1", "ln1"), ("layer_norm2", "ln2"),
    ("post_layernorm", "vision_encoder.layer_norm"), ("model.layers", "decoder.blocks"),
    ("self_attn", "attn"), ("o_proj", "out_proj"), ("input_layernorm", "norm1"),
    ("post_attention_layernorm", "norm2"), ("model.norm", "decoder.norm"),
    ("model.embed_tokens", "decoder.token_embedding"), ("lm_head", "decoder.token_embedding"))

def nanovlm_name(name):
    """What nanoVLM calls a parameter of transformers' SigLIP or Llama."""
    for theirs, public in NANOVLM_NAMES:
        name = name.replace(theirs, public)
    return name

@torch.no_grad()
def compare_nanovlm(tokenizer):
    """The same for a file in nanoVLM's format, whose pixels are in [0, 1]."""
    with tempfile.TemporaryDirectory() as folder:
        write_public(Path(folder), "nanovlm", tokenizer)
        public = load_file(Path(folder) / "model.safetensors")
        ours = load_public(folder, tokenizer)
    c = SIZES
    vision = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=c["vision_width"], intermediate_size=4 * c["vision_width"],
        num_hidden_layers=c["vision_layers"], num_attention_heads=c["vision_heads"],
        image_size=c["image_size"], patch_size=c["patch_size"], vision_use_head=False)).eval()
    text = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=c["width"], intermediate_size=c["hidden"],
        num_hidden_layers=c["layers"], num_attention_heads=c["heads"], rms_norm_eps=1e-5,
        num_key_value_heads=c["kv_heads"], rope_theta=c["rope_theta"])).eval()
    for network in (vision, text):
        for name, parameter in network.named_parameters():
            tensor = public.get(nanovlm_name(name))
            if tensor is None:                                     # q, k and v stand in one
                of_all = re.sub("[qkv]_proj", "qkv_proj", nanovlm_name(name))
                part = "qkv".index(re.search("([qkv])_proj", name)[1])
                tensor = public[of_all].chunk(3)[part]
            parameter.copy_(tensor.view(parameter.shape))
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    seen = vision(image.permute(2, 0, 1)[None] / 255).last_hidden_state            # (1, P, C)
    side, s = c["image_size"] // c["patch_size"], c["shuffle"]
    seen = seen.view(1, side // s, s, side // s, s, -1).permute(0, 1, 3, 2, 4, 5)  # pixel shuffle
    seen = seen.flatten(3).flatten(1, 2) @ public["MP.proj.weight"].T              # (1, I, C)
    ids = tokenizer.prompt("What is 3 + 4?")
    lead = torch.tensor([tokenizer.lead], dtype=torch.long)        # the small tokenizer has them
    embed = text.model.embed_tokens
    whole = torch.cat([embed(lead), seen, embed(torch.tensor([ids]))], dim=1)
    expected = text(inputs_embeds=whole).logits[:, -len(ids):]
    logits = ours(image[None], torch.tensor([ids]))
    print(f"nanoVLM, tiny: logits up to {expected.abs().max():.1f} differ by "
          f"{(logits - expected).abs().max():.1e}")

if __name__ == "__main__":
    tokenizer, processor = PublicTokenizer(sys.argv[1]), their_processor(sys.argv[1])
    compare_ids(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        compare_pixels(processor, folder)
    compare_prompt(processor, sys.argv[1])
    kinds = {"Idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
             "SmolVLM": (SmolVLMConfig, SmolVLMForConditionalGeneration)}
    for name, kind in kinds.items():
        compare(f"{name}, tiny", random_weights(*kind, TINY, tokenizer), tokenizer, 24)
    compare_nanovlm(PublicTokenizer(Path(__file__).parent / "tokenizer.json"))
    if "--full" in sys.argv:
        theirs = random_weights(*kinds["Idefics3"], FULL, tokenizer)
        compare("Idefics3, 256M", theirs, tokenizer, 12)
