"""Processes of a run watch each other: a lost one is named by all others, and what must be the same is compared."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from looped.errors import UserError
from looped.training import processes
from looped.training.heartbeat import LostProcess, Watch
from looped.training.processes import Processes, leave_group, several

SCRIPT = Path(__file__).parents[2] / "scripts" / "inject_faults.py"


def inject(tmp_path, kinds, num, seed=0):
    flags = ["--num", str(num), "--kinds", kinds, "--seed", str(seed), "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=540,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads((tmp_path / "out" / "faults.json").read_text(encoding="utf-8"))


def test_faults_in_one_of_two_processes_end_both_with_one_sentence_and_lose_no_saved_step(tmp_path):
    rows = inject(tmp_path, "SIGKILL,two SIGTERMs to all,another seed,an error of the user's", 4)
    assert [row["wrong"] for row in rows] == [[]] * 4


FAULTS = ("SIGTERM to one,SIGINT to all,SIGUSR1 to one,frozen,disk full,another text,another disk,NaN,a bug,"
          "long evaluation")


@pytest.mark.slow
def test_so_do_all_other_kinds_of_fault(tmp_path):
    assert not any(row["wrong"] for row in inject(tmp_path, FAULTS, 2 * len(FAULTS.split(",")), seed=1))


@pytest.fixture
def two(monkeypatch):
    """The watches of two ranks in this process, with a short limit, which find nobody lost."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    shared, barrier, made = [], threading.Barrier(2), {}

    def share(rank):
        def give(value):
            if rank == 0:
                shared.append(value)
            barrier.wait(20)
            found = shared[-1]
            barrier.wait(20)
            return found

        return give

    def make(rank):
        made[rank] = Watch(rank, 2, 3.0, share(rank))

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    yield made[0], made[1]
    ends = [threading.Thread(target=watch.close) for watch in made.values()]
    for thread in ends:
        thread.start()
    for thread in ends:
        thread.join(30)
    assert not ended


def test_work_of_the_first_process_may_take_longer_than_the_limit_and_its_error_is_everybodys(two):
    first, second = two
    results = {}

    def wait():
        results["second"] = second.first(lambda: results.setdefault("worked", True))
        try:
            second.first(lambda: None)
        except UserError as error:
            results["error"] = str(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert first.first(lambda: threading.Event().wait(4) or 7) == 7

    def full():
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        first.first(full)
    thread.join(20)
    assert results == {"second": None, "error": "the disk is full"}


def test_each_process_waits_for_the_work_of_all_and_the_error_of_one_is_everybodys(two):
    results = {0: [], 1: []}

    def refuse(rank):
        if rank == 1:
            raise UserError("no such depth")

    def work(rank):
        results[rank].append(two[rank].every(lambda: threading.Event().wait(4 * rank) or rank))  # past the limit
        results[rank].append(time.monotonic())
        try:
            two[rank].every(lambda: refuse(rank))
        except UserError as error:
            results[rank].append(str(error))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for rank in (0, 1):
        own, ended, error = results[rank]
        assert (own, error) == (rank, "no such depth")
        assert ended - start >= 4


def test_the_first_process_waits_at_the_end_for_one_that_is_still_at_work(two):
    first, second = two
    end = threading.Thread(target=first.close)
    end.start()
    end.join(first.gone + 3)  # longer than it waits after a failure
    assert end.is_alive()
    second.close()
    end.join(20)
    assert not end.is_alive()


def test_a_first_process_that_fails_keeps_the_store_until_the_others_have_read_why(two):
    first, second = two
    end = threading.Thread(target=first.close, kwargs={"failed": True})
    first.tell("the disk is full", 2)
    while first.found is None:
        time.sleep(0.01)
    end.start()
    end.join(0.5)
    assert end.is_alive()
    assert str(second.reason(RuntimeError("Connection closed by peer"))) == "rank 0 ended: the disk is full"
    second.close(failed=True)
    end.join(10)
    assert not end.is_alive()


def test_a_failed_exchange_is_the_error_itself_if_nobody_is_missing(two):
    error = RuntimeError("the shapes differ")
    assert two[0].reason(error) is error


def test_the_first_finding_stands_and_is_the_reason_of_a_failed_exchange(two):
    first, second = two
    second.tell("the data cannot be read", 2)
    first.tell("its neighbour is gone", 1)
    found = first.reason(RuntimeError("Connection closed by peer"))
    assert isinstance(found, LostProcess)
    assert (str(found), found.exit_code) == ("rank 1 ended: the data cannot be read", 2)


@pytest.mark.parametrize(("theirs", "said"), [
    ({"training": {"seed": 7}}, "rank 1 has training.seed 7, and rank 0 has 0; the way out"),
    ({"training": {"seed": 0, "rate": 2}}, "rank 1 has training.rate 2, and rank 0 has None"),
    ({"training": {}}, "rank 1 has training.seed None, and rank 0 has 0")])
def test_the_first_fact_that_differs_is_named(theirs, said):
    ours = {"training": {"seed": 0}}
    some = Processes(SimpleNamespace(is_main_process=True), None)
    some.gather = lambda values: [*values, theirs]
    with pytest.raises(UserError, match=said):
        some.check_same(ours, "the way out")
    some.gather = lambda values: [*values, ours]
    some.check_same(ours, "the way out")


# ---- srun without a launcher -----------------------------------------------------------------------------------------

STEP = {"SLURM_JOB_ID": "123456", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.fixture
def environment(monkeypatch):
    """`environment(variables)`: those of processes in this process are these alone."""
    def put(variables):
        for name in [name for name in os.environ if name.startswith("SLURM") or name in processes.GROUP]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    for name in processes.GROUP:  # restored at the end, whatever is set meanwhile
        monkeypatch.setenv(name, "")
    put({})
    return put


def test_processes_that_srun_starts_are_a_group(environment):
    environment(STEP)
    assert several()
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456"}


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
                                       STEP | {"SLURM_STEP_NUM_TASKS": "1"}],
                         ids=["no cluster", "a batch script", "one task"])
def test_one_process_is_no_group(environment, variables):
    environment(variables)
    assert not several()
    assert "RANK" not in os.environ


def test_a_launcher_within_a_step_describes_the_group_itself(environment):
    environment(STEP | {"RANK": "1", "WORLD_SIZE": "2"})
    assert several()
    assert os.environ["RANK"] == "1"


def test_the_first_of_several_nodes_is_asked_of_scontrol(environment, tmp_path, monkeypatch):
    nodes = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[4-5]"}
    environment(STEP | nodes)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="set MASTER_ADDR to its address"):
        several()
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!{sys.executable}\nimport sys\nassert sys.argv[1:] == ["show", "hostnames", "node[4-5]"]\n'
                        'print("node4")\nprint("node5")\n')
    scontrol.chmod(0o755)
    assert several()
    assert os.environ["MASTER_ADDR"] == "node4"


def test_a_step_of_srun_gives_each_process_its_block(environment):
    environment(STEP)
    assert leave_group(4) == 3
    assert "RANK" not in os.environ
