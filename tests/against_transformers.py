"""
against_transformers.py: the sampler beside Hugging Face `generate`, on the same weights. It
measures, and is no test; it needs `pip install transformers` on top of requirements.txt.

The decoder is a Llama, so its weights fit into transformers.LlamaForCausalLM as they are; image
tokens are given to it as embeddings. First it is checked that both write the same greedy responses.
Then the workloads of bench.py are timed in turns: `sample`; `generate` in one call per temperature
with all threads in its matrix products, as one would write it; and `generate` with care: prompts
sorted by length, 256 rows a call, calls on as many Python threads as ours.
Read:     as_llama -> generate -> in_one_call, with_care -> main
Run:      python tests/against_transformers.py runs/NAME [--repeats 5]
          The last line is one JSON object.
"""
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    sys.path.insert(0, str(folder))
from bench import (LONGEST, ROWS, alternate, arguments, policy_of,         # noqa: E402
                   separate_calls, tokens_written, workloads)
from data import build_world                                               # noqa: E402
from evaluate import make_prompts, tokens_of                               # noqa: E402
from model import WORKERS, Sampling, sample                                # noqa: E402

def as_llama(policy):
    """The decoder of a Policy as a LlamaForCausalLM."""
    c, block = policy.config, policy.blocks[0]
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocabulary, hidden_size=c.width, intermediate_size=block.up.out_features,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        rms_norm_eps=block.norm1.eps, tie_word_embeddings=True, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        eos_token_id=policy.tokenizer.EOS, pad_token_id=policy.tokenizer.PAD)).eval()
    with torch.no_grad():
        llama.model.embed_tokens.weight.copy_(policy.embed.weight)
        llama.model.norm.weight.copy_(policy.norm.weight)
        for theirs, ours in zip(llama.model.layers, policy.blocks):
            keys, values = ours.kv.weight.chunk(2)
            theirs.input_layernorm.weight.copy_(ours.norm1.weight)
            theirs.post_attention_layernorm.weight.copy_(ours.norm2.weight)
            theirs.self_attn.q_proj.weight.copy_(ours.q.weight)
            theirs.self_attn.k_proj.weight.copy_(keys)
            theirs.self_attn.v_proj.weight.copy_(values)
            theirs.self_attn.o_proj.weight.copy_(ours.out.weight)
            theirs.mlp.gate_proj.weight.copy_(ours.gate.weight)
            theirs.mlp.up_proj.weight.copy_(ours.up.weight)
            theirs.mlp.down_proj.weight.copy_(ours.down.weight)
    return llama

@torch.inference_mode()
def generate(llama, policy, prompts, n, temperature):
    """n responses to each Prompt by Hugging Face: lists of tokens, those of the first prompt first.
    Prompts are padded on the left."""
    images = policy.vision(torch.stack([prompt.image for prompt in prompts]))          # (N, I, C)
    texts = [torch.cat([image, policy.embed(torch.tensor(prompt.ids))])                # (I+T, C)
             for image, prompt in zip(images, prompts)]
    longest = max(map(len, texts))
    given, mask = [], []
    for text in texts:
        missing = longest - len(text)
        given.append(torch.cat([text.new_zeros(missing, text.shape[1]), text]))
        mask.append([0] * missing + [1] * len(text))
    how = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    written = llama.generate(inputs_embeds=torch.stack(given), attention_mask=torch.tensor(mask),
                             num_return_sequences=n, max_new_tokens=LONGEST, **how)
    responses, end = [], policy.tokenizer.EOS
    for tokens in written.tolist():                                # padded behind their end
        responses.append(tokens[:tokens.index(end) + 1] if end in tokens else tokens)
    return responses

def in_one_call(llama, policy, calls):
    """Do the calls of `separate_calls` as they are; returns how many tokens were written."""
    torch.set_num_threads(WORKERS)
    written = 0
    for prompts, n, temperature in calls:
        written += sum(map(len, generate(llama, policy, prompts, n, temperature)))
    torch.set_num_threads(1)
    return written

def with_care(llama, policy, calls, pool):
    """The same in parts that suit the machine: like lengths together, about ROWS responses each,
    and at least as many parts as workers."""
    parts = []
    for prompts, n, temperature in calls:
        in_order = sorted(prompts, key=lambda prompt: len(prompt.ids))
        size = min(max(1, ROWS // n), -(-len(in_order) // WORKERS))                # rounded up
        for i in range(0, len(in_order), size):
            parts.append((in_order[i:i + size], n, temperature))

    def run(part):
        return sum(map(len, generate(llama, policy, *part)))

    return sum(pool.map(run, parts))

def same_greedy_responses(llama, policy, prompts):
    """To how many prompts both write the same greedy response."""
    ours = tokens_of(sample(policy, prompts, Sampling(1, 0.0, LONGEST, seed=0)))
    same = 0
    for prompt, (tokens,) in zip(prompts, ours):
        same += generate(llama, policy, [prompt], 1, 0.0) == [tokens]
    return same

def main(argv=None):
    """Command line of this file."""
    args = arguments(argv, "The sampler beside Hugging Face generate, on the same weights.")
    policy = policy_of(args.run).eval()
    llama = as_llama(policy)
    prompts = make_prompts(policy, build_world({"labeled": 256})["labeled"])
    same = same_greedy_responses(llama, policy, prompts)
    print(f"greedy responses: {same} of {len(prompts)} are the same", flush=True)
    found = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, work in workloads(policy, prompts).items():
            calls = separate_calls(work)
            found[name] = speeds = alternate({
                "sample": partial(tokens_written, policy, work),
                "one call": partial(in_one_call, llama, policy, calls),
                "with care": partial(with_care, llama, policy, calls, pool)}, args.repeats)
            one, care = speeds["one call"], speeds["with care"]
            print(f"{name:12} sample {speeds['sample']:,.0f} tokens/s, generate in one call "
                  f"{one:,.0f} ({speeds['sample'] / one:.1f}x slower), with care {care:,.0f} "
                  f"({speeds['sample'] / care:.1f}x slower)", flush=True)
    print(json.dumps({"greedy_same": same, "greedy": len(prompts), "workers": WORKERS,
                      "transformers": transformers.__version__, "repeats": args.repeats,
                      "tokens_per_second": found}, allow_nan=False))

if __name__ == "__main__":
    main()
