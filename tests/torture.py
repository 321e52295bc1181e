"""
torture.py: kill a run again and again, at any moment, and see that it ends as if nobody had.

A small run is started, killed (half of the time by SIGKILL at a random moment, half of the time in the middle of a write: before,
within, or after it), resumed, killed again, and so on to its end; then its result rows, its metrics and the bytes of its weights are
compared with those of a run that was not touched. Runs are processes made by fork, so that none waits for imports. A policy of a
few seconds' training is never right: `grade` is replaced by a guess that depends on the text alone, so that there is something to learn.
Run:      python tests/torture.py --kills 200
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch                                                       # noqa: E402  (after the path is set)

import evaluate                                                    # noqa: E402
import model                                                       # noqa: E402
import mstar                                                       # noqa: E402
import prm                                                         # noqa: E402


def guess(text, gold):
    """A grade from the text alone: right, wrong or unparseable."""
    return ("right", "right", "wrong", "unparseable")[zlib.crc32(text.encode()) % 4]


def begin(argv, log, dies_at=None, rng=random):
    """Start mstar.main(argv) in a new process; returns its id. `dies_at`: the number of the write in which it dies."""
    if process := os.fork():
        return process
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    mstar.grade = prm.grade = evaluate.grade = guess
    model.SAVE_EVERY, writes, write_whole = 0, 0, model.write_whole

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

    model.write_whole = mstar.write_whole = deadly
    status = 1
    try:
        mstar.main(argv)
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:                                                       # a child must never go on with its parent's code
        if status == 1:
            traceback.print_exc()
        os._exit(status)


def result(folder):
    """What must not depend on kills."""
    report = json.loads((folder / "report.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untimed = [[{name: value for name, value in line.items() if "seconds" not in name} for line in part] for part in (report["iterations"], lines)]
    samples = [path.read_text() for path in sorted((folder / "samples").iterdir())]
    return [samples, report["rows"], report["gain_over"], report["prm"], *untimed] + [(folder / f"{name}.safetensors").read_bytes() for name in ("warmup", "prm", "policy")]


def torture(kills, seed, folder, flags=()):
    """Returns (kills survived, runs compared, faults: list of str)."""
    rng, faults, survived, runs = random.Random(seed), [], 0, 0
    torch.optim.AdamW([torch.zeros(1)])                            # imports much, once instead of in every process
    start = ["--preset", "test", *flags, "--out"]
    began = time.time()
    assert os.waitpid(begin([*start, str(folder / "untouched")], folder / "untouched.log"), 0)[1] == 0, (folder / "untouched.log").read_text()[-2000:]
    seconds, expected = time.time() - began, result(folder / "untouched")
    assert expected[4][1]["kept"], "nothing was trained on: the test would prove little"
    while survived < kills:
        runs += 1
        out, log, died = folder / f"run{runs}", folder / f"run{runs}.log", 0
        while True:
            argv = ["--resume", str(out)] if (out / "config.json").exists() else [*start, str(out)]
            by_write = survived + died < kills and rng.random() < 0.5
            process = begin(argv, log, rng.randint(1, 12) if by_write else None, rng)
            if survived + died < kills and not by_write:
                time.sleep(rng.uniform(0, seconds / 2))
                os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            if status == 0:
                break
            if status != signal.SIGKILL:
                faults.append(f"run {runs} ended with status {status} after {died} kills: {log.read_text()[-1500:]}")
                return survived, runs, faults
            died += 1
            if out.exists() and not (out / "config.json").exists():     # nothing was begun: the user starts again, in an empty folder
                for path in out.rglob("*"):
                    path.is_file() and path.unlink()
                (out / "checkpoint").is_dir() and (out / "checkpoint").rmdir()
        if result(out) != expected:
            faults.append(f"run {runs} ended differently after {died} kills")
        if (out / "checkpoint").exists() or list(out.rglob("*.part")):
            faults.append(f"run {runs} left {sorted(path.name for path in out.rglob('*'))}")
        survived += died
    return survived, runs, faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill runs at random moments, resume them, compare.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        survived, runs, faults = torture(args.kills, args.seed, Path(folder))
    print("\n".join(faults))
    print(f"{survived} kills in {runs} runs, {time.time() - began:.0f} s: {len(faults)} runs lost anything")
    sys.exit(bool(faults))
