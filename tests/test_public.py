"""Public weights and their tokenizer: read as they are, or refused in one line. tokenizer.json here
is a small one of the same kind, trained once on texts of the world; public_ids.json holds what the
library `tokenizers` makes of some texts with it."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import evaluate
import mstar
import prm
from data import Tokenizer
from evaluate import make_prompts
from model import ModelConfig, Policy, Sampling, sample, sample_without_cache
from weights.public import PublicTokenizer, load_public, tokenizer_for

TESTS = Path(__file__).parent
TABLES = json.loads((TESTS.parent / "weights/public_names.json").read_bytes())
SIZES = dict(image_size=64, patch_size=16, shuffle=2, vision_width=16, vision_layers=1,
             vision_heads=2, width=24, layers=2, heads=4, kv_heads=2, hidden=40,
             rope_theta=100_000.0)
SMOLVLM = {"model_type": "idefics3", "scale_factor": 2,
           "vision_config": {"image_size": 64, "patch_size": 16, "hidden_size": 16,
                             "num_hidden_layers": 1, "num_attention_heads": 2},
           "text_config": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                           "num_key_value_heads": 2, "intermediate_size": 40,
                           "rope_theta": 100000.0, "rms_norm_eps": 1e-5}}
NANOVLM = {"vit_img_size": 64, "vit_patch_size": 16, "mp_pixel_shuffle_factor": 2,
           "vit_hidden_dim": 16, "vit_n_blocks": 1, "vit_n_heads": 2, "lm_hidden_dim": 24,
           "lm_n_blocks": 2, "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_inter_dim": 40,
           "lm_re_base": 100000, "vit_cls_flag": False}

@pytest.fixture(scope="module")
def tokenizer():
    return PublicTokenizer(TESTS / "tokenizer.json")

def as_public(policy, family):
    """A policy's tensors by their public names: those that stand below one another taken apart."""
    tensors = {}
    for name, tensor in policy.state_dict().items():
        number = "".join(part for part in name.split(".") if part.isdecimal())
        stem, kind = name.replace(f".{number}.", ".#.").rsplit(".", 1)
        if name == "vision.position":
            stem, kind = name, ""
        first, *below = TABLES[family]["names"][stem].replace("#", number).split("+")
        paths = [first, *(f"{first.rsplit('.', 1)[0]}.{part}" for part in below)]
        height = len(tensor) // len(paths)                         # all of a block are equally high
        for i, path in enumerate(paths):
            part = tensor[i * height:(i + 1) * height] if below else tensor
            tensors[f"{path}.{kind}".rstrip(".")] = part.clone()
    return tensors

def write_public(folder, family, tokenizer):
    """A folder with small random public weights; returns the policy that they are of."""
    torch.manual_seed(0)
    config = ModelConfig(len(tokenizer), **SIZES, tied=family == "nanovlm", lead=tokenizer.lead)
    policy = Policy(config, tokenizer)
    for p in policy.parameters():
        p.data += 0.1 * torch.randn_like(p)                        # norms and biases, too
    folder.mkdir(exist_ok=True)
    about = json.loads(json.dumps(SMOLVLM if family == "smolvlm" else NANOVLM))
    about.get("text_config", about)[
        "vocab_size" if family == "smolvlm" else "lm_vocab_size"] = len(tokenizer)
    (folder / "config.json").write_text(json.dumps(about))
    tensors = as_public(policy, family)
    if family == "nanovlm":
        tensors["vision_encoder.patch_embedding.position_embedding"].unsqueeze_(0)
        tensors["decoder.rotary_embd.inv_freq"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(TESTS / "tokenizer.json", folder / "tokenizer.json")
    return policy

@pytest.fixture
def folder(tmp_path, tokenizer):
    write_public(tmp_path / "public", "smolvlm", tokenizer)
    return tmp_path / "public"

# ---------------------------------------------------------------- tokenizer

def test_ids_are_those_of_the_library(tokenizer):
    for text, ids in json.loads((TESTS / "public_ids.json").read_text()).items():
        assert tokenizer.encode(text) == ids
        shown = "".join(tokenizer.added.split(text)[::2])          # special tokens are not
        assert tokenizer.decode(ids) == shown.removeprefix(" ")

def test_a_byte_without_a_token_is_left_out_before_anything_is_merged(tmp_path):
    about = json.loads((TESTS / "tokenizer.json").read_text())
    i = about["model"]["vocab"].pop("\u0114")              # the sign of \x14: SmolLM2 has none
    about["model"]["vocab"]["none"] = i
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    tokenizer = PublicTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode(" \x14+ 3") == tokenizer.encode(" + 3") and tokenizer.ids["\u0120+"]

def test_a_step_ends_where_a_token_holds_a_line_break(tokenizer):
    tokens = tokenizer.response("red is 7\n7 + 7 = 14\nanswer: 14")
    ends = tokenizer.step_ends(tokens)
    steps = list(map(str.strip, tokenizer.steps(tokens)))
    assert steps == ["red is 7", "7 + 7 = 14", "answer: 14"]
    assert len(ends) == 3 and ends[-1] == len(tokens) - 1
    assert all("\n" in tokenizer.symbols[tokens[end]].replace("Ċ", "\n") for end in ends[:-1])

def test_half_a_number_is_no_answer(tokenizer):
    whole = tokenizer.response("3 + 9 = 12\nanswer: 12")
    assert tokenizer.text_of(whole) == "3 + 9 = 12\nanswer: 12"
    cut = whole[:-2]                                               # at max_new_tokens
    assert tokenizer.decode(cut).endswith("answer: 1") and tokenizer.text_of(cut) == "3 + 9 = 12\n"
    assert tokenizer.text_of(cut[:3]) == ""

def test_prompts_stand_behind_the_image_and_ask_for_steps(tokenizer):
    asked, given = tokenizer.prompt("what is it?"), tokenizer.prompt("what is it?", 42)
    assert tokenizer.decode(asked).startswith("what is it?\nReason step by step")
    assert "The answer is 42." in tokenizer.decode(given)
    direct = tokenizer.decode(tokenizer.prompt("what is it?", direct=True))
    assert "Reason" not in direct and direct.endswith("nothing else.\nAssistant:")
    assert tokenizer.symbols[asked[0]] == "<fake_token_around_image>"
    assert tokenizer.decode(asked).endswith("Assistant:") and tokenizer.EOS in asked
    assert tokenizer.decode(tokenizer.lead) == "User:"

DIGITS, BYTES = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}

@pytest.mark.parametrize("change", [{"normalizer": {"type": "NFC"}}, {"model": {"type": "Unigram"}},
                                    {"pre_tokenizer": {"type": "ByteLevel"}},
                                    {"added_tokens": None},
                                    {"model": {"type": "BPE", "vocab": {}}},
                                    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
                                     "added_tokens": []},          # no end token
                                    {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
                                    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1]}},
                                    {"pre_tokenizer": {"pretokenizers": []}},
                                    {"pre_tokenizer": {"pretokenizers": [
                                        DIGITS | {"individual_digits": False}, BYTES]}},
                                    {"pre_tokenizer": {"pretokenizers": [
                                        DIGITS, BYTES | {"add_prefix_space": True}]}}])
def test_another_kind_of_tokenizer_is_refused(change, tmp_path):
    about = json.loads((TESTS / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="tokenizer.json"):
        tokenizer_for(tmp_path)

# ---------------------------------------------------------------- weights

@pytest.mark.parametrize("family", ["smolvlm", "nanovlm"])
def test_public_weights_are_read_as_they_are(family, tmp_path, tokenizer):
    policy = write_public(tmp_path, family, tokenizer)
    loaded = load_public(tmp_path, tokenizer)
    assert loaded.config == policy.config
    for name, tensor in policy.state_dict().items():
        if family == "smolvlm" or not name.startswith("vision.patch"):
            assert torch.equal(loaded.state_dict()[name], tensor), name

def test_nanovlm_pixels_are_between_0_and_1(tmp_path, tokenizer):
    policy = write_public(tmp_path, "nanovlm", tokenizer)
    loaded = load_public(tmp_path, tokenizer)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    pixels, patch = images.permute(0, 3, 1, 2) / 255, policy.vision.patch
    expected = F.conv2d(pixels, patch.weight, patch.bias, stride=16).flatten(2).mT
    seen = {}
    loaded.vision.blocks[0].register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    loaded.vision(images)
    torch.testing.assert_close(seen["x"] - loaded.vision.position, expected, atol=1e-5, rtol=1e-4)

def test_an_untied_nanovlm_is_refused(tmp_path, tokenizer):
    write_public(tmp_path, "nanovlm", tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    (name,) = {"decoder.head.weight", "decoder.token_embedding.weight"} & tensors.keys()
    for other in ("decoder.head.weight", "decoder.token_embedding.weight"):
        tensors[other] = tensors[name].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_public(tmp_path, tokenizer).config.tied            # equal under both names
    tensors["decoder.head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="decoder.head is not tied"):
        load_public(tmp_path, tokenizer)

def test_shards_and_half_precision(folder, tokenizer):
    whole = load_public(folder, tokenizer)
    tensors = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    loaded = load_public(folder, tokenizer)
    assert loaded.embed.weight.dtype == torch.float32
    assert torch.equal(loaded.head.weight, whole.head.weight.bfloat16().float())

def test_what_does_not_fit_is_named(folder, tokenizer):
    about, weights = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    tensors = load_file(weights)
    norm = "model.text_model.norm.weight"
    for name, changed in ((norm, {k: v for k, v in tensors.items() if k != norm}),
                          ("adapter", {**tensors, "adapter": torch.ones(1)}),
                          (norm, {**tensors, norm: torch.ones(5)})):
        save_file(changed, weights)
        with pytest.raises(ValueError, match=name):
            load_public(folder, tokenizer)
    save_file(tensors, weights)
    for place, key, value, words in (
            ("", "model_type", "llava", "llava"), ("text_config", "rms_norm_eps", 1e-6, "1e-06"),
            ("text_config", "hidden_size", None, "lacks the width"), ("", "scale_factor", 3, "3"),
            ("text_config", "rope_theta", None, "lacks the rope_theta"),
            ("text_config", "hidden_act", "gelu", "gelu"),
            ("vision_config", "patch_size", 0, "zero"),
            ("text_config", "rope_theta", 10**400, "too large"),
            ("text_config", "vocab_size", 600, "tokens in tokenizer.json"),
            ("vision_config", "image_size", 96, "power of two")):
        changed = json.loads(json.dumps(about))
        changed.get(place, changed)[key] = value
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{folder}.*{words}"):
            load_public(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps(about))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 513028808\n")
    with pytest.raises(ValueError, match="model.safetensors is only a pointer: run `git lfs pull`"):
        load_public(folder, tokenizer)
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        load_public(folder, tokenizer)

def test_the_sampler_writes_what_the_reference_writes(folder, tokenizer, world):
    """Also with an untied head and ids before the image."""
    policy = load_public(folder, tokenizer)
    prompts = make_prompts(policy, world["test"][:3])
    for (response,), prompt in zip(sample(policy, prompts, Sampling(1, 0.0, 6, 0)), prompts):
        assert response.tokens == sample_without_cache(policy, prompt, 0, torch.rand(6)).tokens

# ---------------------------------------------------------------- a run from them

def test_every_stage_runs_from_public_weights(folder, tmp_path, capsys):
    flags = ["--preset", "test", "--method", "mstar", "--policy", str(folder), "--labeled", "16",
             "--warmup_questions", "4", "--prm_questions", "4", "--validation", "2",
             "--testbed_questions", "1", "--test", "5", "--epochs", "0.25", "--max_new_tokens", "8"]
    out = tmp_path / "run"
    report = mstar.main([*flags, "--out", str(out)])
    assert [row["name"] for row in report["rows"]] == ["base", "pi_0 (warm-up)", "M-STaR"]
    evaluate.main([str(out)])
    prm.main([str(out)])
    assert "AUC" in capsys.readouterr().out
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        mstar.main([*flags, "--out", str(tmp_path / "other")])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1

@pytest.mark.parametrize("preset", ["cpu", "few"])
def test_public_weights_are_not_trained_at_the_rates_of_small_ones(preset, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        mstar.parse(["--preset", preset, "--policy", str(folder)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "smolvlm" in error and error.count("\n") == 1

def test_what_is_a_folder_of_public_weights(folder, tmp_path, monkeypatch):
    """Not `scratch`, even where a folder has that name; one that was moved is missed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    assert type(tokenizer_for("scratch")) is type(tokenizer_for("pi_0.safetensors")) is Tokenizer
    assert type(tokenizer_for(str(folder))) is PublicTokenizer
    with pytest.raises(FileNotFoundError, match="moved/tokenizer.json"):
        tokenizer_for("moved")
