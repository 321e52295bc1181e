"""The code on another device, where there is none: tensors that compute on the CPU and say that
they lie elsewhere. Whoever lets them meet a tensor of the CPU is caught, as a GPU would. And
several processes, without a GPU each."""
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import model
import mstar
import prm
from model import Example, Sampling, adamw, batches, fit, load_network, read_json, sample, save
from prm import RewardModel

ELSEWHERE = torch.device("meta")               # the one such device whose gradients need no driver


class Elsewhere(torch.Tensor):
    """A tensor of the CPU, `held`, that says it lies on another device."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=ELSEWHERE)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """What is made on that device, or moved there, is Elsewhere."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """One operation, on what the tensors hold."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    if there and here and "copy" not in function.__name__:         # a copy may cross
        raise RuntimeError(f"{function}: tensors on different devices")
    target = kwargs.get("device") or (ELSEWHERE if there else None)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu", "pin_memory": None}
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
    inner = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
    result = function(*inner[0], **inner[1])

    def outside(x):
        if not isinstance(x, torch.Tensor) or target is None or torch.device(target).type == "cpu":
            return x
        same = [one for one in there if one.held is x]            # of an operation in place
        return same[0] if same else Elsewhere(x)

    return tree_map(outside, result)


class Serial:
    """Instead of a pool of threads: a mode holds for its own thread only."""

    def __init__(self, workers):
        assert workers == 1, "one worker on a GPU, or splitting a batch frees no memory"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    map = staticmethod(map)


@pytest.fixture
def elsewhere(monkeypatch):
    """A function that moves a network there."""
    monkeypatch.setattr(model, "ThreadPoolExecutor", Serial)

    def move(network):
        for part in network.modules():
            for name, p in list(part._parameters.items()):
                if p is None:                                      # a layer without biases
                    continue
                moved = torch.nn.Parameter(Elsewhere(p.data), requires_grad=p.requires_grad)
                part._parameters[name] = moved
        return network

    with Device():
        yield move


def same_tokens(responses, expected):
    return [[one.tokens for one in group] for group in responses] == \
        [[one.tokens for one in group] for group in expected]


def examples_of(policy, prompts):
    ids = policy.tokenizer.response("red is 7\nanswer: 7")
    return [Example(*prompt, ids[i % 3:]) for i, prompt in enumerate(prompts)]


def test_a_tensor_left_behind_is_caught(elsewhere, policy):
    with pytest.raises(RuntimeError, match="different devices"):
        elsewhere(policy).embed(torch.tensor([1, 2]))              # ids that nobody moved
    with pytest.raises(RuntimeError, match="different devices"):
        policy.embed.weight + torch.ones(1, 1)
    policy.embed.weight + torch.ones(1, 1, device=ELSEWHERE)


def test_the_sampler_writes_the_same_there(elsewhere, policy, prompts):
    how = Sampling(3, [0.0, 0.7, 1.3], 12, seed=0)
    prefixes = [[[], [5, 9, 8]]] * len(prompts)
    expected = sample(policy, prompts, how, prefixes, rows=16)
    responses = sample(elsewhere(policy), prompts, how, prefixes, rows=16)
    assert same_tokens(responses, expected)


def test_the_reference_works_there(elsewhere, policy, prompts):
    uniforms = torch.rand(6)
    expected = model.sample_without_cache(policy, prompts[0], 1.0, uniforms)
    response = model.sample_without_cache(elsewhere(policy), prompts[0], 1.0, uniforms)
    assert response.tokens == expected.tokens


def test_training_there_gives_the_same_weights(elsewhere, policy, prompts, tmp_path):
    weights = {}
    for place in ("here", "there"):
        torch.manual_seed(0)
        network = model.Policy(policy.config, policy.tokenizer)
        network = elsewhere(network) if place == "there" else network
        optimizer = model.Optimizer([adamw(network.parameters(), 1e-3)], 1)
        stream = batches(examples_of(network, prompts), 6, Random(0))
        fit(network, optimizer, stream, 3, micro_batch=4, title=place)
        save(tmp_path / "x.safetensors", network, optimizer)       # read back on the CPU
        weights[place] = load_network(tmp_path / "x.safetensors", policy.tokenizer).state_dict()
    for name, weight in weights["here"].items():
        torch.testing.assert_close(weights["there"][name], weight, atol=1e-4, rtol=1e-3)


def test_the_reward_model_reads_and_learns_the_same_there(elsewhere, policy, prompts):
    torch.manual_seed(0)
    network = RewardModel(policy.config, policy.tokenizer)
    torch.nn.init.normal_(network.head.weight)
    examples = [one._replace(labels=[0.5] * len(one.response))
                for one in examples_of(policy, prompts)]
    responses = [[one.response] for one in examples]
    parameters = [p for p in network.parameters() if p.requires_grad]
    results = []
    for place in (lambda same: same, elsewhere):
        network = place(network)
        with model.ThreadPoolExecutor(1) as pool:
            loss = model.backward(network, examples, 5, pool)
        parameters = [p for p in network.parameters() if p.requires_grad]
        gradients = [p.grad.cpu() for p in parameters]
        results.append((loss, gradients, prm.score(network, prompts, responses)))
    (loss, gradients, scores), (loss_there, gradients_there, scores_there) = results
    assert loss_there == pytest.approx(loss, abs=1e-5)
    for gradient, there in zip(gradients, gradients_there):
        torch.testing.assert_close(there, gradient, atol=1e-5, rtol=1e-3)
    for (one,), (there,) in zip(scores, scores_there):
        assert there == pytest.approx(one, abs=1e-4)


def test_batches_fit_into_the_memory_of_a_gpu(policy, monkeypatch):
    """Rows of a batch grow with free memory, and no further than half of it (here: the cache and
    the logits of all rows, in fp32, and what a vision block makes of an image)."""
    gpu = SimpleNamespace(device=torch.device("cuda"), config=policy.config, vision=policy.vision,
                          image_tokens=policy.image_tokens)
    c = policy.config
    needed = 4 * (c.layers * 2 * c.kv_heads * (c.width // c.heads) * 64 + c.vocabulary)
    rows = []
    for free in (10**7, 10**9, 10**10):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2 * free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
        rows.append(model._rows_at_once(gpu, [10**9], 64))
        assert 0 < rows[-1] * needed <= free / 2
    assert rows[0] < rows[1] < rows[2]
    image = 4 * 10 * policy.vision.side ** 2 * c.vision_width      # q, k, v, out and twice 4 C
    assert 0 < model._rows_at_once(gpu, [1] * 10**6, 64) * (needed + image) <= 10**10 / 2
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10**9 + 5)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5)
    mac = SimpleNamespace(**{**vars(gpu), "device": torch.device("mps")})
    assert model._rows_at_once(mac, [10**9], 64) == rows[1]
    # what torch keeps for itself is free, too; of two processes each takes a share of whole
    # questions (of 7 here: 501 rows would leave one for a third batch), and both the first one's
    # number, however much memory they have: their batches must be the same
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 10**10)
    assert model._rows_at_once(gpu, [10**9], 64) > rows[2]
    monkeypatch.setattr(model, "PROCESSES", 2)
    monkeypatch.setattr(model, "broadcast", lambda rows: ("the first one's", rows))
    assert model._rows_at_once(gpu, [7] * 143, 64) == ("the first one's", 508)
    assert len(model._batches([model.Prompt(None, [0])] * 143, [7] * 143, 508)) == 2


def test_several_processes_do_what_one_does(tmp_path):
    """Bit for bit: each response has its own random numbers, and two summands have one sum."""
    project = Path(model.__file__).parent
    base = str(project / "weights/base.safetensors")
    flags = ["--preset", "test", "--method", "mstar", "--policy", base, "--labeled", "20",
             "--warmup_questions", "8", "--prm_questions", "8", "--validation", "3", "--test", "6",
             "--testbed_questions", "1", "--epochs", "0.5", "--rollouts_per_question", "4",
             "--max_new_tokens", "32"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one, several = tmp_path / "one", tmp_path / "several"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*run, "mstar.py", *flags, "--out", several], cwd=project,
                                   env=environment, stdout=log, stderr=log)
    mstar.main([*flags, "--out", str(one)])                        # meanwhile
    assert process.wait() == 0, (tmp_path / "log").read_text()[-2000:]
    assert {path.name for path in one.iterdir()} == {path.name for path in several.iterdir()}
    for name in ("pi_0", "prm", "policy"):
        file = f"{name}.safetensors"
        assert (one / file).read_bytes() == (several / file).read_bytes()
    assert read_json(one / "labels.json")["labels"] == read_json(several / "labels.json")["labels"]
    for path in (one / "samples").iterdir():
        assert path.read_bytes() == (several / "samples" / path.name).read_bytes()
    assert sum(line["num_kept"] for line in read_json(one / "report.json")["iterations"][1:])
    subprocess.run([*run, "prm.py", several], cwd=project, env=environment, check=True,
                   capture_output=True)
    audits = [{**read_json(out / "audit.json"), "seconds": 0} for out in (one, several)]
    assert audits[0] == audits[1]                                  # the same, made again
