"""
against_transformers.py: the sampler beside Hugging Face `generate`, on the same weights. Not a test, and no part of the program: it
needs `pip install transformers` on top of requirements.txt.

The decoder is a Llama, so its weights fit into transformers.LlamaForCausalLM as they are; image tokens are given to it as embeddings.
First it is checked that both write the same greedy responses; then the three workloads of `python model.py --bench` are timed in turns,
`generate` in one call per temperature with all threads in its matrix products, as one would write it, and with care: prompts sorted by
length, 256 rows a call, calls on as many Python threads as ours.
Run:      python tests/against_transformers.py runs/NAME [--repeats 5]
"""
import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Tokenizer, build_world                            # noqa: E402  (after the path is set)
from evaluate import make_prompts                                  # noqa: E402
from model import WORKERS, Prompt, alternate, load_policy, sample  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM             # noqa: E402

T, ROWS = 72, 256                                                  # most tokens of a response; rows of a call of generate


def as_llama(policy, end_token):
    """The decoder of a Policy as a LlamaForCausalLM."""
    c, block = policy.config, policy.blocks[0]
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocabulary, hidden_size=c.width, intermediate_size=block.up.out_features, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, rms_norm_eps=block.norm1.eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=end_token, pad_token_id=0)).eval()
    with torch.no_grad():
        llama.model.embed_tokens.weight.copy_(policy.embed.weight)
        llama.model.norm.weight.copy_(policy.norm.weight)
        for theirs, ours in zip(llama.model.layers, policy.blocks):
            keys, values = ours.kv.weight.chunk(2)
            for module, weight in ((theirs.input_layernorm, ours.norm1.weight), (theirs.post_attention_layernorm, ours.norm2.weight),
                                   (theirs.self_attn.q_proj, ours.q.weight), (theirs.self_attn.k_proj, keys), (theirs.self_attn.v_proj, values),
                                   (theirs.self_attn.o_proj, ours.out.weight), (theirs.mlp.gate_proj, ours.gate.weight),
                                   (theirs.mlp.up_proj, ours.up.weight), (theirs.mlp.down_proj, ours.down.weight)):
                module.weight.copy_(weight)
    return llama


def generate(llama, policy, prompts, n, temperature, end_token):
    """n responses to each Prompt by Hugging Face: lists of tokens, those of the first prompt first. Prompts are padded on the left."""
    with torch.inference_mode():
        pictures = policy.vision(torch.stack([prompt.image for prompt in prompts]))
        texts = [torch.cat([picture, policy.embed(torch.tensor(prompt.ids))]) for picture, prompt in zip(pictures, prompts)]
        longest = max(map(len, texts))
        given = torch.stack([torch.cat([text.new_zeros(longest - len(text), text.shape[1]), text]) for text in texts])
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
        written = llama.generate(inputs_embeds=given, attention_mask=mask, num_return_sequences=n, max_new_tokens=T, **how).tolist()
    return [row[:row.index(end_token) + 1] if end_token in row else row for row in written]


def main():
    parser = argparse.ArgumentParser(description="The sampler beside Hugging Face generate, on the same weights.")
    parser.add_argument("run", metavar="runs/NAME", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    tokenizer, (policy, _) = Tokenizer(), load_policy(args.run / "policy.safetensors")
    end, line_break, policy = tokenizer.EOS, tokenizer.ids["\n"], policy.eval()
    llama, prompts, pool = as_llama(policy, end), make_prompts(build_world({"labeled": 256})["labeled"], tokenizer, policy.config.image_size), ThreadPoolExecutor(WORKERS)
    few, grid = prompts[:16], [round(0.3 + 0.1 * i, 1) for i in range(14)]

    def one_call(prompts, n, temperature):
        torch.set_num_threads(WORKERS)
        written = sum(map(len, generate(llama, policy, prompts, n, temperature, end)))
        torch.set_num_threads(1)
        return written

    def with_care(prompts, n, temperature):
        prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))
        size = min(max(1, ROWS // n), -(-len(prompts) // WORKERS))
        return sum(sum(map(len, part)) for part in pool.map(
            lambda start: generate(llama, policy, prompts[start:start + size], n, temperature, end), range(0, len(prompts), size)))

    def ours(prompts, L, temperature, given=0, **more):
        return sum(len(response.tokens) for group in sample(policy, prompts, L, temperature, T, 0, end, **more) for response in group) - given

    greedy = [group[0].tokens for group in sample(policy, prompts, 1, 0.0, T, 0, end)]
    same = sum(a == b for prompt, a in zip(prompts, greedy) for b in generate(llama, policy, [prompt], 1, 0.0, end))
    print(f"greedy responses: {same} of {len(prompts)} are the same")
    steps = [[response.tokens[:i + 1] for response in group for i, token in enumerate(response.tokens[:-1]) if token == line_break]
             for group in sample(policy, few, 4, 1.0, T, 0, end)]
    longer = [Prompt(prompt.image, prompt.ids + step) for prompt, group in zip(few, steps) for step in group]
    sweep = torch.tensor([t for t in grid for _ in range(16)])
    given = 8 * sum(len(step) for group in steps for step in group)                      # tokens that nobody writes
    work = {"T = 1": (lambda: ours(prompts[:64], 16, 1.0), lambda way: way(prompts[:64], 16, 1.0)),
            "sweep": (lambda: ours(few, 16 * len(grid), sweep, streams=list(range(16)) * len(grid)), lambda way: sum(way(few, 16, t) for t in grid)),
            "step labels": (lambda: ours(few, 8, 0.6, given, prefixes=steps), lambda way: way(longer, 8, 0.6))}
    found = {}
    for name, (mine, theirs) in work.items():
        found[name] = speeds = alternate({"sample": mine, "one call": lambda: theirs(one_call), "with care": lambda: theirs(with_care)}, args.repeats)
        print(f"{name:12} sample {speeds['sample']:,.0f} tokens/s, generate " + ", ".join(
            f"{way} {speeds[way]:,.0f} ({speeds['sample'] / speeds[way]:.1f}x slower)" for way in ("one call", "with care")), flush=True)
    print(json.dumps({"greedy_same": same, "greedy": len(prompts), "workers": WORKERS, "transformers": transformers.__version__, "repeats": args.repeats, "tokens_per_second": found}))


if __name__ == "__main__":
    main()
