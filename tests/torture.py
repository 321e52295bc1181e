"""
torture.py: kill a run again and again, at any moment, and see that it ends as if nobody had.

A small run is started, killed (half of the time by SIGKILL at a random moment, half of the time in
the middle of a write: before, within, or after it), resumed, killed again, and so on to its end.
Then its result rows, its metrics and the bytes of its weights are compared with those of a run that
was not touched. Runs are processes made by fork, so that none waits for imports. A policy of a few
seconds' training is never right: `grade` is replaced by a guess that depends on the text alone, so
that there is something to learn.
Run:      python tests/torture.py --kills 200
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch                                                       # noqa: E402  (after the path)

import evaluate                                                    # noqa: E402
import model                                                       # noqa: E402
import mstar                                                       # noqa: E402
import prm                                                         # noqa: E402
import results.report                                              # noqa: E402

model.tqdm.monitor_interval = 0                # no thread of it may hold a lock in a fork
model.tqdm.set_lock(threading.RLock())         # its own is shared by forks: a killed one keeps it


def guess(text, gold):
    """A grade from the text alone."""
    return ("correct", "correct", "wrong", "unparseable")[zlib.crc32(text.encode()) % 4]


def begin(argv, log, dies_at=None, rng=random):
    """Start mstar.main(argv) in a new process; returns its id. `dies_at`: the number of the write
    in which it dies."""
    if process := os.fork():
        return process
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    for module in (prm, evaluate, results.report):
        module.grade = guess
    mstar.Run.fit.__defaults__ = (3,)                              # saved every 3 updates
    # a shell starts what runs in its background with Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    writes, write_whole = 0, model.write_whole

    def deadly(path, data):
        nonlocal writes
        writes += 1
        if writes == dies_at:
            place = rng.choice(("before", "within", "after"))
            if place == "within":
                Path(f"{path}.part").write_bytes(data[:rng.randint(0, len(data))])
            if place == "after":
                write_whole(path, data)
            os.kill(os.getpid(), signal.SIGKILL)
        write_whole(path, data)

    model.write_whole = mstar.write_whole = results.report.write_whole = deadly
    status = 1
    try:
        mstar.main(argv)
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:                                   # a child must never go on with its parent's code
        if status == 1:
            traceback.print_exc()
        os._exit(status)


def without_times(line):
    return {name: value for name, value in line.items() if "seconds" not in name}


def result(folder):
    """What must not depend on kills."""
    report = model.read_json(folder / "report.json")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    files = []
    for path in sorted((folder / "samples").iterdir()):
        files.append(path.read_bytes())
    for name in ("pi_0", "prm", "policy"):
        files.append((folder / f"{name}.safetensors").read_bytes())
    rows = [without_times(row) for row in report["rows"]]
    return {"lines": [without_times(json.loads(line)) for line in lines], "files": files,
            "iterations": [without_times(line) for line in report["iterations"]], "rows": rows,
            "gains": report["gain_over"],
            "labels": model.read_json(folder / "labels.json")["labels"]}


def torture(kills, seed, folder, flags=()):
    """Returns (kills survived, runs compared, faults: list of str)."""
    rng, faults, survived, runs = random.Random(seed), [], 0, 0
    torch.optim.AdamW([torch.zeros(1)])        # imports much: once, instead of in every process
    start = ["--preset", "test", *flags, "--out"]
    began, log = time.time(), folder / "untouched.log"
    status = os.waitpid(begin([*start, str(folder / "untouched")], log), 0)[1]
    assert status == 0, log.read_text()[-2000:]
    seconds, expected = time.time() - began, result(folder / "untouched")
    assert expected["lines"][1]["num_kept"], "nothing was trained on: this would prove little"
    while survived < kills:
        runs += 1
        out, log, died = folder / f"run{runs}", folder / f"run{runs}.log", 0
        while True:
            begun = (out / "config.json").exists()
            argv = ["--resume", str(out)] if begun else [*start, str(out)]
            if out.exists() and not begun:     # killed before anything was begun: only a .part
                for path in out.iterdir():
                    path.unlink()
            at_write = survived + died < kills and rng.random() < 0.5
            process = begin(argv, log, rng.randint(1, 12) if at_write else None, rng)
            if survived + died < kills and not at_write:
                time.sleep(rng.uniform(0, seconds / 2))
                os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            if status == 0:
                break
            if status != signal.SIGKILL:
                faults.append(f"run {runs} ended with status {status} after {died} kills: "
                              f"{log.read_text()[-1500:]}")
                return survived, runs, faults
            died += 1
        if result(out) != expected:
            faults.append(f"run {runs} ended differently after {died} kills")
        if (out / "checkpoint").exists() or list(out.rglob("*.part")):
            left = sorted(path.name for path in out.rglob("*"))
            faults.append(f"run {runs} left {left}")
        survived += died
    return survived, runs, faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill runs at random moments, resume, compare.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        survived, runs, faults = torture(args.kills, args.seed, Path(folder))
    print("\n".join(faults))
    print(f"{survived} kills in {runs} runs, {time.time() - began:.0f} s: {len(faults)} faults")
    sys.exit(bool(faults))
