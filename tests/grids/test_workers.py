"""Clients in worker processes: what they answer and remember, how they die, and that none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import clients
import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm_helpers.grids import workers as workers_module
from fedllm_helpers.grids.in_process import CLIENT_RAISED, FIRST_CLIENT_NODE, InProcessGrid
from fedllm_helpers.grids.side_by_side import SideBySideGrid

NODES = 5


def ask(grid, **faults):
    """The replies of all nodes, in order; ``faults`` has orders for some, by ``nodeK``."""

    def requests():
        for node in grid.get_node_ids():
            orders = ConfigRecord(faults.get(f"node{node - FIRST_CLIENT_NODE}", {}))
            yield Message(RecordDict({"config": orders}), node, "train")

    replies = list(grid.send_and_receive(requests()))
    assert [reply.metadata.src_node_id for reply in replies] == list(grid.get_node_ids())
    return replies


def counted(reply):
    return reply.content["arrays"]["count"].numpy().tolist()


@pytest.fixture(scope="module")
def workers():
    """Two of them, for the tests of this file: each leaves them as it found them."""
    with SideBySideGrid(clients.counts, NODES, {"rate": 0.5}, 2) as grid:
        list(grid.team.work([]))
        while not all(worker.ready for worker in grid.team.workers):
            grid.team._come()
        yield grid


@pytest.fixture
def grid(workers):
    workers.states.clear()
    return workers


def test_replies_come_in_order_and_any_worker_knows_what_a_client_remembers(grid):
    first = ask(grid, node0={"sleep": 0.5})  # the other worker does all the others meanwhile
    second = ask(grid, node4={"sleep": 0.5})
    assert all(counted(reply) == [1, 1, 1] for reply in first) and all(counted(reply) == [2] * 3 for reply in second)
    told = [reply.content["told"]["process"] for reply in first + second]
    assert len({reply.content["told"]["dice"] for reply in first + second}) == 2 * NODES, "workers throw the same dice"
    assert len(set(told)) == 2 and os.getpid() not in told
    assert told.count(told[0]) < NODES, "who is busy gets no more"
    assert all(reply.content["told"]["of"] == NODES and reply.content["given"]["rate"] == 0.5 for reply in first)
    kept = grid.remembered()
    with InProcessGrid(clients.counts, NODES, {"rate": 0.5}) as alone:
        alone.remember(kept)
        assert counted(ask(alone)[3]) == [3, 3, 3]
        grid.remember(alone.remembered())
    assert counted(ask(grid)[3]) == [4, 4, 4], "and back"
    assert grid.kept("kept")[3]["count"].tolist() == [4, 4, 4]


def test_messages_may_be_pushed_and_pulled(grid):
    ids = grid.push_messages([Message(RecordDict({"config": ConfigRecord()}), node, "train") for node in (4, 2)])
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [4, 2]


def test_a_client_that_raises_is_one_failed_reply_as_in_process(grid):
    with InProcessGrid(clients.counts, NODES, {}) as alone:
        for one in (grid, alone):
            replies = ask(one, node1={"fault": "raise"})
            assert [reply.has_error() for reply in replies] == [False, True, False, False, False]
            assert replies[1].error.code == CLIENT_RAISED
            assert "ArithmeticError: no good at hospital 1" in replies[1].error.reason
            assert counted(ask(one)[1]) == [1, 1, 1], "a first memory is lost with the failure"
            ask(one, node1={"fault": "raise"})
        assert grid.remembered().keys() == alone.remembered().keys()
        assert all(np.array_equal(value, alone.remembered()[key]) for key, value in grid.remembered().items())


def test_a_worker_that_dies_is_one_hospitals_failure_and_is_started_anew(grid):
    before = {worker.process.pid for worker in grid.team.workers}
    replies = ask(grid, node2={"fault": "die"})
    assert [reply.has_error() for reply in replies] == [False, False, True, False, False]
    said = replies[2].error.reason
    assert said == "the worker process was killed by SIGKILL (as for want of memory)"
    assert not any(reply.has_error() for reply in ask(grid)) and counted(ask(grid)[2]) == [2, 2, 2]
    after = {worker.process.pid for worker in grid.team.workers}
    assert len(after) == 2 and len(after & before) == 1


def test_one_that_is_killed_while_it_has_nothing_to_do_is_nobodys_failure(grid):
    ask(grid, node0={"sleep": 0.3})
    victim = grid.team.workers[0].process
    victim.kill()
    victim.join()
    assert not any(reply.has_error() for reply in ask(grid))
    assert len({worker.process.pid for worker in grid.team.workers} - {victim.pid}) == 2


def test_answers_that_nobody_waits_for_are_left_out(grid):
    requests = [Message(RecordDict({"config": ConfigRecord({"sleep": 0.3})}), node, "train") for node in (2, 3)]
    replies = grid.send_and_receive(iter(requests))
    next(replies)
    replies.close()
    assert [counted(reply)[0] for reply in ask(grid)][1:] == [1, 1, 1, 1]


def test_what_a_client_writes_into_its_log_stands_in_ours(grid, caplog):
    ask(grid, node1={"fault": "warn"})
    assert [record.getMessage() for record in caplog.records] == ["too few cards"]
    assert caplog.records[0].name == "fedllm_helpers.of.a.client"


def test_a_worker_that_cannot_begin_fails_its_hospitals_with_the_reason(workers):
    with SideBySideGrid(clients.counts, 2, {}, 1) as grid:
        grid.begin = clients.cannot_begin
        replies = ask(grid)
        assert all("OSError: no room for the model" in reply.error.reason for reply in replies)
        grid.begin = None
        assert not any(reply.has_error() for reply in ask(grid))


def test_workers_have_the_environment_of_the_time_when_they_are_started(workers, monkeypatch):
    monkeypatch.setenv("TOLD", "later")
    with SideBySideGrid(clients.counts, 2, {}, 1) as grid:
        assert all(reply.content["told"]["heard"] == "later" for reply in ask(grid))
        assert not any(reply.content["told"]["imported"] for reply in ask(grid))


def test_an_app_that_workers_cannot_import_is_refused():
    with pytest.raises(ValueError, match="each worker imports it from a module") as caught:
        SideBySideGrid(lambda message, context: None, 2, {}, 1)
    assert "\n" not in str(caught.value)


PROGRAM = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background has it ignored
sys.path.insert(0, {folder!r})
import clients
from flwr.app import ConfigRecord, Message, RecordDict
from fedllm_helpers.grids.side_by_side import SideBySideGrid
{guard}
    scratch = Path({scratch!r})
    scratch.mkdir()
    with SideBySideGrid(clients.counts, 2, {{}}, 2) as grid:
        grid.scratch = str(scratch)
        for sleep in (0.2, 600):
            requests = [Message(RecordDict({{"config": ConfigRecord({{"sleep": sleep}})}}), n, "train") for n in (2, 3)]
            for reply in grid.send_and_receive(requests):
                assert sleep < 1
            print(*(worker.process.pid for worker in grid.team.workers), flush=True)
"""


def program(tmp_path, guard="if __name__ == '__main__':"):
    """A script with two workers that are at work for ten minutes, once it has said their numbers."""
    path, given = tmp_path / "program.py", {"folder": str(Path(__file__).parent), "scratch": str(tmp_path / "scratch")}
    path.write_text(PROGRAM.format(guard=guard, **given))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(path)], start_new_session=True, cwd=tmp_path, **pipes)


@pytest.mark.processes
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_workers_end_with_their_parent(how, tmp_path):
    parent = program(tmp_path)
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(worker.is_running() for worker in workers)
    if how == "killed":
        parent.kill()
    else:  # as a terminal or a notebook does: all processes at once
        os.killpg(parent.pid, signal.SIGINT)
    _, err = parent.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "they would work on for nobody"
    if how == "killed":
        assert parent.returncode == -signal.SIGKILL and not (tmp_path / "scratch").exists()
    else:
        assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt"), err


AHEAD = """
import sys
sys.path.insert(0, {folder!r})
import clients
from flwr.app import ConfigRecord, Message, RecordDict
from fedllm_helpers.grids import workers
from fedllm_helpers.grids.side_by_side import SideBySideGrid
if __name__ == "__main__":
    workers.import_ahead(clients.AHEAD, "no_such_module")
    with SideBySideGrid(clients.counts, 2, {{}}, 2) as grid:
        requests = [Message(RecordDict({{"config": ConfigRecord()}}), n, "train") for n in (2, 3)]
        there = [reply.content["told"]["imported"] for reply in grid.send_and_receive(requests)]
    print(there, clients.AHEAD in sys.modules)
"""


@pytest.mark.processes
@pytest.mark.skipif(not workers_module.forks(), reason="workers are spawned here, and import for themselves")
def test_workers_find_imported_what_was_imported_ahead(tmp_path):
    (tmp_path / "program.py").write_text(AHEAD.format(folder=str(Path(__file__).parent)))
    run = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[True, True] False" and not run.stderr, run.stderr


SLOW = """
import os
import signal
import time
from fedllm_helpers.grids import workers
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background has it ignored
if __name__ == "__main__":
    workers.import_ahead("slow")
    child = os.fork()
    if not child:
        os._exit(workers.forks())
    print(workers.forks(), os.waitpid(child, 0)[1], flush=True)
    time.sleep(600)
"""


@pytest.mark.processes
@pytest.mark.skipif(not workers_module.forks(), reason="workers are spawned here, and import for themselves")
def test_an_interruption_does_not_reach_what_is_just_imported_and_a_forked_program_spawns(tmp_path):
    (tmp_path / "program.py").write_text(SLOW)
    mark = tmp_path / "imported"
    slow = f"import pathlib, time\npathlib.Path({str(mark)!r}).touch()\ntime.sleep(2)\nprint('through', flush=True)\n"
    slow = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + slow
    (tmp_path / "slow.py").write_text(slow)  # it is found beside the program, as by the program itself
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "program.py"], start_new_session=True, cwd=tmp_path, **pipes)
    assert parent.stdout.readline() == "True 0\n"
    while not mark.exists():
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=60)
    assert out == "through\n" and err.count("Traceback") == 1, err


@pytest.mark.skipif(not workers_module.forks(), reason="workers are spawned here")
def test_workers_whose_origin_is_killed_are_replaced_and_nothing_of_theirs_is_deleted(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with SideBySideGrid(clients.counts, NODES, {"rate": 0.5}, 2) as grid:
        grid.scratch = str(scratch)
        ask(grid)
        before = [psutil.Process(worker.process.pid) for worker in grid.team.workers]
        before[0].parent().kill()
        replies = ask(grid, node0={"sleep": 0.5})
        assert all("status 255" in reply.error.reason for reply in replies if reply.has_error())
        assert not any(reply.has_error() for reply in ask(grid))
        at_work = {worker.process.pid for worker in grid.team.workers}
        _, left = psutil.wait_procs([worker for worker in before if worker.pid not in at_work], timeout=10)
        assert not left and len(at_work) == 2 and scratch.is_dir()


def test_a_team_that_could_not_start_says_so_again(monkeypatch):
    with SideBySideGrid(clients.counts, NODES, {}, 1) as grid:
        monkeypatch.setattr(workers_module, "_started", no_worker)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no worker can begin"):
                ask(grid)
        monkeypatch.undo()
        assert not any(reply.has_error() for reply in ask(grid))


def no_worker(app):
    raise RuntimeError("no worker can begin")


@pytest.mark.processes
def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path):
    parent = program(tmp_path, guard="if True:")
    _, err = parent.communicate(timeout=120)
    assert "does so under `if __name__ == '__main__':`" in err.splitlines()[-1]
