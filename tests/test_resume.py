"""Nothing is lost: kills, Ctrl-C, a full disk, damaged and hostile files, two runs in one folder, another config, a full GPU."""
import errno
import io
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import model
import mstar
import torture
from model import Example, Policy, fit, load_policy, load_tensors, load_training, new_optimizers, save_policy, save_tensors, save_training, write_whole

TINY = ["--preset", "test", "--arms", "mstar", "--passes", "0.25", "--test", "10", "--testbed", "2", "--validation", "4", "--seed", "3"]


def test_killed_at_random_moments_and_resumed_nothing_differs(tmp_path):
    survived, runs, faults = torture.torture(20, 0, tmp_path, TINY[2:])
    assert not faults and survived >= 20 and runs >= 2


# ---------------------------------------------------------------- stopped from outside

def run_aside(argv, log, **more):
    """Start a run in another process and return the id."""
    return torture.begin(argv, log, **more)


def test_ctrl_c_says_how_to_go_on_and_the_run_ends_the_same(tmp_path):
    log = tmp_path / "log"
    assert os.waitpid(run_aside([*TINY, "--out", str(tmp_path / "a")], log), 0)[1] == 0
    process = run_aside([*TINY, "--out", str(tmp_path / "b")], log)
    while not (tmp_path / "b" / "checkpoint" / "training").exists():       # the base model is in training
        time.sleep(0.01)
    os.kill(process, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert f"go on with: python mstar.py --resume {tmp_path / 'b'}\n" in log.read_text()
    assert os.waitpid(run_aside(["--resume", str(tmp_path / "b")], log), 0)[1] == 0
    assert torture.result(tmp_path / "a") == torture.result(tmp_path / "b")


def test_a_second_run_in_the_same_folder_is_refused_and_a_stale_lock_is_not(tmp_path, capsys):
    save_tensors(tmp_path / "config.json", {}, mstar.asdict(mstar.parse(TINY)[0]) | {"preset": "test"})
    before = sorted(path.name for path in tmp_path.iterdir())
    with mstar.alone_in(tmp_path):
        with pytest.raises(SystemExit) as stop:
            mstar.main(["--resume", str(tmp_path)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and f"process {os.getpid()} is at work" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "lock").write_text("1")                            # left by a process that was killed; number 1 is alive, but not it
    with mstar.alone_in(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_run_does_not_go_on_with_another_config(tmp_path, capsys):
    save_tensors(tmp_path / "config.json", {}, mstar.asdict(mstar.parse(TINY)[0]) | {"preset": "test"})
    for flags, words in ((["--seed", "4"], "--seed 4 (there: 3)"), (["--batch_size", "9", "--preset", "cpu"], "--batch_size 9 (there: 8)")):
        with pytest.raises(SystemExit) as stop:
            mstar.main(["--resume", str(tmp_path), *flags])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and words in error
    assert mstar.parse(["--resume", str(tmp_path), "--seed", "3"])[0] == mstar.parse(TINY)[0]
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"seed": 3', '"seed": 4'))
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as stop:
            mstar.main(["--resume", str(folder)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and str(folder) in error


# ---------------------------------------------------------------- files

def full_after(left):
    """`open` on a disk that is full after `left` bytes."""
    class File(io.FileIO):
        def write(self, data):
            nonlocal left
            written = super().write(data[:left])
            left -= written
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return written
    return lambda path, mode="r": File(path, mode.replace("b", "")) if "w" in mode else open(path, mode)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(policy, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "policy.safetensors"
    save_policy(policy, path, tokenizer.symbols)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = Policy(policy.config)
    for left in (0, 1, 100, 10_000, len(old[path.name]) - 1):
        monkeypatch.setattr(model, "open", full_after(left), raising=False)
        with pytest.raises(OSError, match="space"):
            save_policy(other, path, tokenizer.symbols)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old
    monkeypatch.setattr(model, "open", full_after(len(old[path.name]) + 10), raising=False)
    with pytest.raises(OSError, match="space"):
        save_policy(other, path, tokenizer.symbols)                # the weights are written, their description is not
    with pytest.raises(ValueError, match="policy.safetensors.*checksum"):
        load_policy(path)


def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on_later(tmp_path, monkeypatch, capsys):
    writes, real = [], model.write_whole

    def fails(path, data):
        writes.append(path)
        if len(writes) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(model, "write_whole", fails)
        with pytest.raises(SystemExit) as stop:
            mstar.main([*TINY, "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and "No space left" in lines[-1] and "--resume" in lines[-1]
    mstar.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.json").exists() and not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("name", ["policy.safetensors", "policy.json"])
def test_no_damage_is_read_as_something_else(name, tmp_path):
    """Every tenth byte changed in turn, and truncations: an error that names the file, or, in white space of a JSON, the same content."""
    path, rng = tmp_path / "policy.safetensors", random.Random(0)
    tensors, about = {"a": torch.arange(50.0).view(5, 10), "b": torch.ones(3, dtype=torch.int64)}, {"model": {"width": 12}, "vocabulary": ["x", "é"]}
    save_tensors(path, tensors, about)
    whole = (tmp_path / name).read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1:] for i in range(0, len(whole), 10)]
    damaged += [whole[:rng.randrange(len(whole))] for _ in range(30)] + [whole + b"x", b"", b"\0" * 1000]
    refused = 0
    for data in damaged:
        (tmp_path / name).write_bytes(data)
        try:
            found, same = load_tensors(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            assert name == "policy.json" and same == about and all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert refused >= 0.7 * len(damaged) and (name == "policy.json" or refused == len(damaged))


def hostile_files(policy, tokenizer):
    """(name, tensors, about) of files that are whole, but not what they should be."""
    good = dict(policy.state_dict())
    about = {"model": model.asdict(policy.config), "vocabulary": tokenizer.symbols}
    first = next(iter(good))
    nested = current = []
    for _ in range(500):
        current.append([])
        current = current[0]
    yield "missing", {name: tensor for name, tensor in good.items() if name != first}, about
    yield "extra", good | {"more": torch.zeros(1)}, about
    yield "shape", good | {first: torch.zeros(2, 2)}, about
    yield "type", good | {first: good[first].double()}, about
    yield "not finite", good | {first: torch.full_like(good[first], float("nan"))}, about
    for name, value in (("width", 10**12), ("layers", 10**9), ("width", -4), ("width", "32"), ("heads", 0), ("image_size", 65), ("width", None), ("width", True), ("vocabulary", 7)):
        yield f"{name} {value}", good, about | {"model": about["model"] | {name: value}}
    yield "unknown field", good, about | {"model": about["model"] | {"power": 1}}
    yield "no list", good, about | {"vocabulary": 5}
    yield "nested", good, about | {"model": nested}
    yield "no model", good, {"vocabulary": tokenizer.symbols}


def test_hostile_files_give_one_clear_error(policy, tokenizer, tmp_path):
    path = tmp_path / "policy.safetensors"
    for name, tensors, about in hostile_files(policy, tokenizer):
        save_tensors(path, tensors, about)
        with pytest.raises(ValueError, match="policy.safetensors") as caught:
            load_policy(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000, name
    save_policy(policy, path, tokenizer.symbols)
    for text in ("[" * 100_000, "[1]", "3", '{"checksum": 3}', "\xff"):
        path.with_suffix(".json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="policy.safetensors"):
            load_policy(path)
    huge = save({"a": torch.zeros(4)}).replace(b"[4]", b"[4000000000000]").replace(b"[0,16]", b"[0,16000000000000]")
    huge = len(huge[8:huge.index(b"}}") + 2]).to_bytes(8, "little") + huge[8:huge.index(b"}}") + 2] + bytes(16)
    path.write_bytes(huge)
    model.write_json(path.with_suffix(".json"), {"model": {}, "checksum": model._checksum(huge, {"model": {}})})
    with pytest.raises(ValueError, match="policy.safetensors"):
        load_policy(path)


# ---------------------------------------------------------------- training

def examples_of(prompts):
    return [Example(prompts[q].image, prompts[q].ids, [20 + q] * (1 + q) + [3]) for q in range(8)]


def endless(examples):
    rng = random.Random(0)
    while True:
        yield rng.sample(examples, 4)


def test_training_goes_on_to_the_same_bits_and_from_the_generation_before_a_damaged_one(policy, prompts, tmp_path, monkeypatch, capsys):
    examples, start = examples_of(prompts), {name: tensor.clone() for name, tensor in policy.state_dict().items()}

    def trained(updates, folder):
        policy.load_state_dict(start)
        optimizers, schedules = new_optimizers(policy, 1e-2, 3, muon_lr=1e-2, decay_over=9)
        loss = fit(policy, optimizers, schedules, endless(examples), updates, "test", folder)
        return loss, {name: tensor.clone() for name, tensor in policy.state_dict().items()}

    loss, expected = trained(9, None)
    monkeypatch.setattr(model, "SAVE_EVERY", 0)
    trained(5, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4.json", "4.safetensors", "5.json", "5.safetensors"]
    (tmp_path / "5.safetensors").write_bytes((tmp_path / "5.safetensors").read_bytes()[:-5])
    again, weights = trained(9, tmp_path)
    assert again == loss and all(torch.equal(weights[name], expected[name]) for name in expected)
    assert "5.safetensors" in capsys.readouterr().out
    assert load_training(tmp_path, policy, *new_optimizers(policy, 1e-2, 3, muon_lr=1e-2), title="another") is None
    assert trained(9, tmp_path)[0] == loss                         # all is done: nothing is trained, the loss is still known


def test_ctrl_c_in_training_ends_the_update_and_saves(policy, prompts, tmp_path):
    examples = examples_of(prompts)

    def interrupted():
        for number, batch in enumerate(endless(examples), 1):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    optimizers, schedules = new_optimizers(policy, 1e-2, 3)
    with pytest.raises(KeyboardInterrupt):
        fit(policy, optimizers, schedules, interrupted(), 9, "test", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "1.safetensors"]
    other = Policy(policy.config)
    assert len(load_training(tmp_path, other, *new_optimizers(other, 1e-2, 3))["losses"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters()))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_gpu_gets_smaller_parts_and_the_same_sum(policy, prompts, monkeypatch, capsys):
    """Memory for three examples at a time: the update is that of the whole batch."""
    examples, start, collate, weights = examples_of(prompts), {name: tensor.clone() for name, tensor in policy.state_dict().items()}, model.collate, []

    def small(part):
        if len(part) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return collate(part)

    monkeypatch.setattr(model, "collate", small)
    for room in (8, 3):
        policy.load_state_dict(start)
        sgd = torch.optim.SGD(policy.parameters(), lr=0.1)
        fit(policy, [sgd], [torch.optim.lr_scheduler.LambdaLR(sgd, lambda update: 1.0)], iter([examples] * 3), 3, "test")
        weights.append([p.detach().clone() for p in policy.parameters()])
    for one, other in zip(*weights):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().out.count("out of memory") in (1, 2)        # once for each halving, not once for each update
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        fit(policy, [sgd], [torch.optim.lr_scheduler.LambdaLR(sgd, lambda update: 1.0)], iter([examples]), 1, "test")


def test_write_whole_replaces_and_leaves_nothing_beside(tmp_path):
    for data in (b"one", b"two" * 1000):
        write_whole(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        write_whole(Path(tmp_path / "nowhere" / "file"), b"x")
