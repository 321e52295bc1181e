"""Whole runs: what they leave, the same twice, going on after a stop; and the paper's tables."""
import errno
import json
import os
import shutil
import signal
import time
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

import data
import evaluate
import model
import mstar
import prm
import results.tables
import torture
from data import TESTBEDS, Tokenizer
from model import read_json, write_json


TINY = ["--preset", "test", "--epochs", "0.5"]
SMALL = ["--preset", "test", "--arms", "mstar", "--epochs", "0.5", "--test", "10",
         "--testbed_questions", "2", "--validation", "4", "--seed", "3"]


@pytest.fixture(scope="module", autouse=True)
def tiny_policies_have_something_to_learn_and_worlds_are_built_once():
    """They are never right, so that nothing would be trained on: a guess by the text grades them.
    The runs have a few worlds in common, and each takes a quarter of a second."""
    build = data.build_world
    once = lru_cache(lambda sizes, seed: build(json.loads(sizes), seed))
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluate, prm, results.report):
            patch.setattr(module, "grade", torture.guess)
        patch.setattr(data, "build_world", lambda sizes, seed: once(json.dumps(sizes), seed))
        yield


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """(folders, reports) of two runs by the same command."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in "ab"]
    return folders, [mstar.main([*TINY, "--out", str(folder)]) for folder in folders]


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- what a run leaves

def test_a_run_writes_its_files(two_runs):
    folders, (report, _) = two_runs
    assert sorted(path.name for path in folders[0].iterdir()) == [
        "audit.json", "config.json", "labels.json", "metrics.jsonl", "pi_0.json",
        "pi_0.safetensors", "policy.json", "policy.safetensors", "prm.json", "prm.safetensors",
        "report.html", "report.json", "samples"]
    assert read_json(folders[0] / "report.json") == report
    assert [row["name"] for row in report["rows"]] == [
        "base", "pi_0 (warm-up)", "SFT (direct answers)", "continuous", "+ PRM re-rank", "M-STaR"]
    assert [line["iteration"] for line in report["iterations"]] == [0, 1, 2] * 3


def test_a_policy_of_a_run_goes_on_only_with_tests_that_it_has_not_seen(two_runs, capsys):
    """Its base has seen pictures of all others."""
    for name in ("policy", "pi_0"):
        file = str(two_runs[0][0] / f"{name}.safetensors")
        flags = [*TINY, "--policy", file]
        mstar.parse(flags)
        for other in (["--world_seed", "1"], ["--test", "751"], ["--validation", "251"]):
            with pytest.raises(SystemExit):
                mstar.parse([*flags, *other])
            assert "has seen pictures of these tests" in capsys.readouterr().err


def test_arms_get_equal_responses_and_updates_and_their_own_switches(two_runs):
    report, arms = two_runs[1][0], {}
    for line in report["iterations"]:
        arms.setdefault(line["arm"], []).append(line)
    for name in ("num_responses", "num_questions", "iteration", "updates"):
        assert len({tuple(line.get(name) for line in lines) for lines in arms.values()}) == 1
    assert "sweep" in arms["mstar"][1]
    assert not any("sweep" in line for arm in ("continuous", "prm") for line in arms[arm])


def test_rows_files_and_gains_are_of_the_weights_that_they_name(tmp_path, monkeypatch):
    measured, started, evaluate_policy, direct_sft = {}, {}, mstar.evaluate_policy, mstar.direct_sft

    def watch(name, policy, *rest, **more):
        measured[name] = weights(policy)
        return evaluate_policy(name, policy, *rest, **more)

    def begin(cfg, base, world, run):
        started["sft"] = weights(base)
        return direct_sft(cfg, base, world, run)

    monkeypatch.setattr(mstar, "evaluate_policy", watch)
    monkeypatch.setattr(mstar, "direct_sft", begin)
    report = mstar.main([*TINY, "--arms", "sft,continuous", "--testbed_questions", "1",
                         "--validation", "2", "--max_new_tokens", "6", "--out", str(tmp_path)])
    names = ["base", "pi_0 (warm-up)", "SFT (direct answers)", "continuous"]
    assert list(measured) == names and same(started["sft"], measured["base"])
    for name, file in (("pi_0 (warm-up)", "pi_0"), ("continuous", "policy")):
        saved = model.load_network(tmp_path / f"{file}.safetensors", Tokenizer())
        assert same(measured[name], weights(saved))
    for a, b in combinations(names, 2):
        assert not same(measured[a], measured[b])
    accuracy = {row["name"]: row["id"]["all"] for row in report["rows"]}
    assert len(set(accuracy.values())) > 1
    for name, gain in report["gain_over"].items():
        assert gain["id"][0] == pytest.approx(accuracy["continuous"] - accuracy[name])


def test_samples_show_fixed_questions_with_a_verdict_per_step(two_runs):
    shown = [read_json(two_runs[0][0] / "samples" / f"{iteration}.json") for iteration in range(3)]
    ids = [[question["id"] for question in part["questions"]] for part in shown]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 2 * 10
    assert {name.split("/")[0] for name in ids[0]} == {"validation", *TESTBEDS}
    for part in shown:
        for question in part["questions"]:
            for response in question["responses"]:
                number = response["text"].count("\n") + 1
                assert len(response["oracle"]) == number
                assert len(response["scores"]) == len(response["labels"]) <= number
                assert not response["selected"] or response["grade"] == "correct"


def test_the_prm_learns_from_questions_that_pi_0_was_not_warmed_up_on(tmp_path, monkeypatch):
    """Else its metrics on held-out questions would be on questions that pi_0 knows."""
    seen, real = {}, (mstar.make_prompts, mstar.train_prm)

    def warm_up(policy, questions, **more):
        seen.setdefault("warm-up", {question.id for question in questions})
        return real[0](policy, questions, **more)

    def train(cfg, pi_0, questions, labels):
        seen["PRM"] = {question.id for question in questions}
        return real[1](cfg, pi_0, questions, labels)

    monkeypatch.setattr(mstar, "make_prompts", warm_up)
    monkeypatch.setattr(mstar, "train_prm", train)
    mstar.main([*SMALL, "--out", str(tmp_path)])
    assert len(seen["warm-up"]) == 10 and len(seen["PRM"]) == 20
    assert not seen["warm-up"] & seen["PRM"]


def test_same_seed_same_rows_and_bytes(two_runs):
    a, b = (torture.result(folder) for folder in two_runs[0])
    assert a == b


def test_a_finished_run_can_be_scored_and_audited_again(two_runs, capsys):
    folder = two_runs[0][0]
    evaluate.main([str(folder)])
    assert "in-domain accuracy" in capsys.readouterr().out.splitlines()[-1]
    before = read_json(folder / "audit.json")
    prm.main([str(folder)])
    assert "AUC" in capsys.readouterr().out.splitlines()[-1]
    after = read_json(folder / "audit.json")
    assert after.keys() == before.keys() and after.pop("seconds") != before.pop("seconds")
    assert after == before


def test_a_run_without_a_prm_ends_with_a_report_and_can_be_watched(tmp_path):
    # with a watch after each of two iterations, and a validation after the second alone
    flags = "--method", "continuous", "--watches", "2", "--validations", "1", "--out", str(tmp_path)
    report = mstar.main([*TINY, *flags])
    assert report["audit"] is None and not (tmp_path / "prm.safetensors").exists()
    assert ["watched" in line for line in report["iterations"]] == [True, True, True]
    assert "data-outcome" in (tmp_path / "report.html").read_text()


def test_a_finished_run_with_damaged_files_says_so_in_one_line(two_runs, tmp_path, capsys):
    out = tmp_path / "b"
    shutil.copytree(two_runs[0][1], out)
    page = (out / "report.html").read_bytes()
    for damage in (b"", b"[]", b"{}", b"\xff"):                    # the report has the same lines
        (out / "metrics.jsonl").write_bytes(damage)
        mstar.main(["--resume", str(out)])
        assert (out / "report.html").read_bytes() == page
    (out / "samples/1.json").write_text("{}")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        mstar.main(["--resume", str(out)])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and "M-STaR over" in shown.out     # the result all the same
    assert shown.err.count("\n") == 1 and "1.json" in shown.err


# ---------------------------------------------------------------- stopped, and going on

def test_killed_at_random_moments_and_resumed_nothing_differs(tmp_path):
    survived, runs, faults = torture.torture(4, 0, tmp_path, SMALL[2:])
    assert not faults and survived >= 4 and runs >= 1


def test_ctrl_c_says_how_to_go_on(tmp_path):
    log, out = tmp_path / "log", tmp_path / "run"
    process = torture.begin([*SMALL, "--out", str(out)], log)
    while not list(out.glob("checkpoint/base-*.json")):            # the base is in training
        time.sleep(0.01)
    os.kill(process, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert f"go on with: python mstar.py --resume {out}\n" in log.read_text()


def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on_later(tmp_path, monkeypatch, capsys):
    writes, real, out = [], model.write_whole, tmp_path / "run"

    def fails(path, data):
        writes.append(path)
        if len(writes) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(model, "write_whole", fails)
        with pytest.raises(SystemExit) as stop:
            mstar.main([*SMALL, "--out", str(out)])
    lines = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and "No space left" in lines[-1] and "--resume" in lines[-1]
    mstar.main(["--resume", str(out)])
    assert (out / "report.json").exists() and not (out / "checkpoint").exists()


def test_a_damaged_piece_is_named_and_made_again(tmp_path, monkeypatch, capsys):
    """Stopped in the second arm, then every file of the folder damaged in turn. Grades are by the
    text, so that the untrained policies have correct responses to train on."""
    for module in (evaluate, prm, results.report):
        monkeypatch.setattr(module, "grade", torture.guess)
    out, whole = tmp_path / "run", tmp_path / "whole"

    def stop_in_mstar(cfg, *rest):
        if cfg.method == "mstar":
            raise KeyboardInterrupt
        return evolve(cfg, *rest)

    evolve = mstar.self_evolve
    flags = [*SMALL, "--arms", "continuous,mstar", "--max_new_tokens", "6", "--out"]
    expected = mstar.main([*flags, str(tmp_path / "expected")])
    assert all(line["num_kept"] for line in expected["iterations"] if line["iteration"])
    with monkeypatch.context() as patch:
        patch.setattr(mstar, "self_evolve", stop_in_mstar)
        with pytest.raises(SystemExit):
            mstar.main([*flags, str(whole)])
    for name in ("pi_0.safetensors", "labels.json", "prm.json", "checkpoint/base.safetensors",
                 "checkpoint/arm continuous.json"):
        shutil.copytree(whole, out)
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:len(data) // 2])
        capsys.readouterr()
        report = mstar.main(["--resume", str(out)])
        assert str(out / name.replace(".json", "")) in capsys.readouterr().out
        without_times = [torture.without_times(row) for row in report["rows"]]
        assert without_times == [torture.without_times(row) for row in expected["rows"]]
        weights = (out / "policy.safetensors").read_bytes()
        assert weights == (tmp_path / "expected/policy.safetensors").read_bytes()
        shutil.rmtree(out)


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(tmp_path, monkeypatch, capsys):
    def refused(flags, *words):
        with pytest.raises(SystemExit) as stop:
            mstar.main(flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert all(word in error for word in words), error

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(mstar, "train_base", lambda *a: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit):
            mstar.main([*SMALL, "--out", str(out)])
    capsys.readouterr()
    refused(["--resume", str(out), "--seed", "4"], "--seed")
    with monkeypatch.context() as patch:                           # a word of the world is another
        patch.setattr(Tokenizer, "__init__", other_vocabulary)
        refused(["--resume", str(out)], "world")
    config = read_json(out / "config.json")
    write_json(out / "config.json", {**config, "labeled": config["labeled"] + 1})
    refused(["--resume", str(out)], "splits")                      # changed by hand
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"seed": 3', '"seed": 4'))
    refused(["--resume", str(out)], "config.json")
    refused(["--resume", str(tmp_path / "nowhere")], "nowhere")


def test_a_run_does_not_go_on_from_another_base_of_the_same_name(two_runs, tmp_path, capsys,
                                                                 monkeypatch):
    policy = tmp_path / "policy.safetensors"
    for name in ("pi_0", "policy"):                                # as it was begun, and now
        for kind in ("safetensors", "json"):
            shutil.copy(two_runs[0][0] / f"{name}.{kind}", policy.with_suffix(f".{kind}"))
        if name == "pi_0":
            with monkeypatch.context() as patch:
                patch.setattr(mstar, "stage_warmup", lambda *a: os.kill(os.getpid(), signal.SIGINT))
                with pytest.raises(SystemExit):
                    mstar.main([*SMALL, "--policy", str(policy), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        mstar.main(["--resume", str(tmp_path / "run")])
    assert stop.value.code == 2 and "begun with another world" in capsys.readouterr().err


def other_vocabulary(self, real=Tokenizer.__init__):
    real(self)
    self.symbols[-1] = "zebra"
    self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}


def test_a_damaged_later_state_does_not_cost_the_new_one(policy, tokenizer, tmp_path, capsys):
    run = mstar.Run(tmp_path, "mstar", tokenizer, "cpu")
    optimizer = model.Optimizer([model.adamw(policy.parameters(), 1e-3)], 1)
    run.save("mstar", 5, policy, optimizer)
    file = tmp_path / "checkpoint" / "mstar-5.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert run.load("mstar", policy, optimizer) == {} and str(file) in capsys.readouterr().out
    run.save("mstar", 1, policy, optimizer)
    assert run.load("mstar", policy, optimizer)["number"] == 1 and not file.exists()


def test_a_damaged_report_of_a_finished_run_is_one_line(two_runs, tmp_path, capsys):
    """And nothing is made again, which could take hours, or overwritten."""
    out = tmp_path / "run"
    shutil.copytree(two_runs[0][0], out)
    damaged = (out / "report.json").read_bytes()[:-100]
    (out / "report.json").write_bytes(damaged)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        mstar.main(["--resume", str(out)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(out / "report.json") in error
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_rounds_of_other_switches_are_not_gone_on_with(policy, tokenizer, tmp_path, capsys):
    run = mstar.Run(tmp_path, "prm", tokenizer, "cpu")
    cfg, _ = mstar.parse([*SMALL, "--method", "prm"])
    other = {**mstar.switches_of(cfg), "select": "random"}         # METHODS was changed
    optimizer = mstar.new_optimizer(cfg, policy, cfg.evolve_lr)
    for switches in (mstar.switches_of(cfg), other):
        run.save("prm", 1, policy, optimizer, temperature=1.0, switches=switches)
        if switches is not other:
            assert mstar.start_or_resume(cfg, policy, None, None, run)[2:] == (1.0, 2)
    with pytest.raises(SystemExit) as stop:
        mstar.start_or_resume(cfg, policy, None, None, run)
    assert stop.value.code == 2 and "other switches" in capsys.readouterr().err

def test_running_out_of_memory_names_the_flag(tmp_path, monkeypatch, capsys):
    def full(*rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model, "backward", full)
    with pytest.raises(SystemExit) as stop:
        mstar.main([*SMALL, "--arms", "continuous", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--resume with a smaller --micro_batch" in error
    monkeypatch.undo()                                             # and so it does go on
    report = mstar.main(["--resume", str(tmp_path / "run"), "--micro_batch", "1"])
    assert report["rows"][-1]["name"] == "continuous"
    assert read_json(tmp_path / "run/config.json")["micro_batch"] == 1     # if it stops once more


# ---------------------------------------------------------------- the paper's tables

FLAGS = ["--preset", "test", "--validation", "4", "--test", "10", "--testbed_questions", "2",
         "--labeled", "16", "--prm_questions", "6", "--threshold", "0", "--max_new_tokens", "6",
         "--monitor_rollouts", "2", "--validations", "1"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """All tables in one folder, with grades by the text, so that the untrained policies have
    correct responses to train on, and with sweeps that always choose T = 0.5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mstar, "best_temperature", lambda values, current: (0.5, 0.5))
        for module in (evaluate, prm, results.report):
            patch.setattr(module, "grade", torture.guess)
        patch.chdir(tmp_path_factory.mktemp("tables"))
        found = {name: results.tables.main([name, *FLAGS]) for name in results.tables.TABLES}
        with pytest.MonkeyPatch.context() as inner:                # once more: nothing is run again
            inner.setattr(mstar, "self_evolve", None)
            inner.setattr(mstar, "train_base", None)
            again = {name: results.tables.main([name, *FLAGS]) for name in results.tables.TABLES}
        files = {name: read_json(f"results/test-{name}.json") for name in results.tables.TABLES}
        yield found, again, files


@pytest.mark.parametrize("name", results.tables.TABLES)
def test_every_table_has_its_arms_with_equal_budgets_and_verdicts(tables, name):
    result, rows = tables[0][name], results.tables.TABLES[name]
    assert {arm["arm"] for arm in result["arms"]} == set(rows)
    assert len(result["arms"]) == len(rows) * (3 if name == "table5" else 1)
    for size in {arm["size"] for arm in result["arms"]}:
        evolved = [arm for arm in result["arms"] if arm["responses"] and arm["size"] == size]
        assert {arm["responses"] for arm in evolved} == {32}
        for arm in evolved:                                        # a round without correct ones
            idle = [line for line in arm["iterations"] if line.get("num_kept") == 0]   # has none
            assert arm["updates"] == 3 + 4 or idle and arm["updates"] < 3 + 4
        assert all(arm["updates"] == 3 + 4 for arm in result["arms"] if arm["arm"] == "sft")
    assert len(result["claims"]) >= len(results.tables.CLAIMS.get(name, ())) and result["claims"]
    text = results.tables.format_table(result)
    for claim in result["claims"]:
        assert claim["verdict"] in ("holds", "fails", "unresolved") and claim["words"] in text
        assert all(low <= effect <= high for effect, low, high in claim["effects"].values())
    assert all(row["words"] in text for row in rows.values())


def test_finished_arms_are_not_run_again_and_the_file_holds_the_result(tables):
    found, again, files = tables
    for name in results.tables.TABLES:
        assert found[name]["claims"] == again[name]["claims"]
        assert files[name] == json.loads(json.dumps(again[name]))


def test_arms_differ_in_their_switches_only(tables):
    """Arms of all tables stand in one folder, from one pi_0 and PRM; watching changes nothing."""
    arms = {}
    for name in results.tables.TABLES:
        arms |= {arm["arm"]: arm for arm in tables[0][name]["arms"] if arm["size"] == "medium"}
    lines = {name: arm["iterations"] for name, arm in arms.items()}
    looks = {tuple(one[0][key] for key in ("greedy_accuracy", "pass_at_1", "entropy"))
             for one in lines.values() if one}
    assert len(looks) == 1                                         # at pi_0
    for watched, plain in (("prm_watched", "prm"), ("mstar_watched", "mstar")):
        assert arms[watched]["row"]["graded"] == arms[plain]["row"]["graded"]
        assert [line["loss"] for line in lines[watched][1:]] == \
            [line["loss"] for line in lines[plain][1:]]
    assert {line["temperature"] for line in lines["prm_watched"]} == {1.0}
    assert [line["temperature"] for line in lines["mstar"]] == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert [line["num_unlabeled"] for line in lines["vote_50"][1:]] == [0, 0, 2, 2]
    assert [line["num_unlabeled"] for line in lines["true_answers"][1:]] == [2, 2, 2, 2]
    kept = {name: [line["num_kept"] for line in lines[name][1:]] for name in ("top_1", "top_4")}
    assert kept["top_1"] != kept["top_4"]
    assert [lines[f"continuous_{n}"][-1]["iteration"] for n in ("100", "50", "25", "12.5")] == \
        [1, 2, 4, 8]


def test_a_table_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags, real, begun = ["dynamics", *FLAGS, "--out", "mine"], mstar.self_evolve, []

    def stop_in_the_second(cfg, *rest):
        begun.append(cfg.method)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(cfg, *rest)

    def refused(run, argv, *words):
        with pytest.raises(SystemExit) as stop:
            run(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1, error
        assert all(word in error for word in words), error

    monkeypatch.setattr(mstar, "self_evolve", stop_in_the_second)
    with pytest.raises(SystemExit) as stop:
        results.tables.main(flags)
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    results.tables.main(flags)
    assert begun == ["prm_watched", "mstar_watched", "mstar_watched", "mstar_pass_at_k"]
    assert Path("mine/test-dynamics.json").exists() and not Path("results").exists()
    left = {path.name for path in Path("mine/seed0").iterdir()}    # of no arm among many
    assert "pi_0.safetensors" in left and not left & {"policy.safetensors", "samples"}
    capsys.readouterr()
    monkeypatch.setitem(mstar.METHODS, "prm_watched", {"select": "random", "watches": 4})
    refused(results.tables.main, flags, "prm_watched: what is saved", "other switches")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    refused(results.tables.main, [*flags, "--rollouts_per_question", "3"], "rollouts_per_question")
    refused(mstar.main, ["--resume", "mine/seed0"], "python -m results.tables dynamics")
    refused(mstar.main, [*FLAGS, "--out", "mine/seed0"], "nothing is overwritten")
    monkeypatch.setattr(mstar, "self_evolve", real)
    mstar.main([*SMALL, "--out", "plain/seed0"])                   # a plain run's folder
    capsys.readouterr()
    refused(results.tables.main, ["table2", *FLAGS, "--out", "plain"], "plain/seed0")


@pytest.mark.parametrize("argv, word", [
    ([], "table"), (["table9"], "table9"), (["table1", "--seeds", "0"], "--seeds"),
    (["table1", "--seeds"], "--seeds"), (["table1", "--seed", "1"], "--seed"),
    (["table1", "--method", "prm"], "--method"), (["table1", *TINY], "--epochs 0.5"),
    (["table5", "--preset", "test", "--policy", "mine.safetensors"], "mine"),
    (["table5", "--preset", "test", "--recipe", "gpu"], "gpu"),
    (["dynamics", "--preset", "test", "--monitor_rollouts", "1"], "Reward-Pass@2"),
    (["table4", "--preset", "test"], "results/test-table4.json: damaged")])
def test_wrong_use_of_tables(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/test-table4.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        results.tables.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error


def test_a_table_of_more_seeds_or_other_settings_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mstar, "run_stages", lambda *a: {})
    monkeypatch.setattr(results.tables, "make_table",
                        lambda name, reports, command: {"seeds": list(range(len(reports))),
                                                        "config": {"labeled": labeled[-1]}})
    monkeypatch.setattr(results.tables, "format_table", lambda result: "the table")
    file = Path("results/test-table2.json")
    labeled = [48]
    for seeds, kept in ((2, 2), (1, 2), (3, 3)):
        results.tables.main(["table2", "--preset", "test", "--seeds", str(seeds)])
        assert read_json(file)["seeds"] == list(range(kept))
        where = file if seeds == kept else "runs/test-tables/test-table2.json"
        assert f"wrote {where}" in capsys.readouterr().out
    labeled.append(49)                                             # other settings
    results.tables.main(["table2", "--preset", "test", "--seeds", "3"])
    assert "wrote runs/test-tables/test-table2.json" in capsys.readouterr().out
