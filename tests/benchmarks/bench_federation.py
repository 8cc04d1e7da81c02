"""What a federation costs beside its clients' training: time, memory, and how both grow (``make bench``).

Overhead is the wall time of a federated run, once its process has loaded model and cards (which any training needs,
"loading"), over the sum of its clients' own times: of all that a client does for a training message, and of its
``Trainer.train`` alone (the rest: the loss on a few cards before and after, the adapter in and out, setting the
Trainer up). "wall" has the loading in it; with Ray every actor loads for itself, in its first client's time, and side
by side every worker before it. "whole" is the wall time of the process, imports included: what "start-up included"
means below. Memory is the proportional set size of the whole process tree, sampled twice a second. The clients of
the last table have adapters of 16 numbers and do nothing with them: what is left is the server, the messages and
their serialisation. Before it, crowds with the real model take one step each; ``… bench_federation.py crowd 1000``
adds one of so many, for a quarter of an hour and more.
"""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil

HERE = Path(__file__).resolve()
ALONE, ONE = "in process, all cores", "in process, one thread"
PAIR, RAY = "side by side, two workers", "Ray, two actors"
SINGLE = [(ONE, "in-process"), (PAIR, "side-by-side"), (RAY, "ray")]  # of one thread for each hospital
RATIOS = [(PAIR, ALONE), (PAIR, ONE), (PAIR, RAY), (RAY, ALONE)]
CROWD = ["federation.num_rounds=1", "federation.training_arguments.max_steps=1", "dataset.max_cards_per_specialty=null"]
CROWD += ["federation.training_arguments.per_device_train_batch_size=2", "federation.threads=1"]
RUN = ["federation.num_clients=8", "federation.num_rounds=3", "federation.partition=iid", "federation.evaluate_every=0"]


def on_a_backend(backend, *overrides):
    """In a process of its own: wall seconds of ``simulation.run``, and of its clients' training."""
    from fedllm_helpers import config
    from fedllm_helpers.federation import client_app, simulation
    from fedllm_helpers.models.process import base_model

    cfg = config.load("cpu", *RUN, *overrides)
    start = time.perf_counter()
    if backend == "in-process":
        base_model(cfg), client_app.own_cards(cfg, 0)
    loading = time.perf_counter() - start
    more = {"workers": 2} if backend == "side-by-side" else {}
    record = simulation.run(cfg, backend, progress=False, **more)
    wall = time.perf_counter() - start
    figures = {
        "whole": time.time() - psutil.Process().create_time(),
        "wall": wall,
        "loading": loading,
        "run": wall - loading,
        "clients": record.clients["seconds"].sum(),
    }
    figures |= {"training": record.clients["train_seconds"].sum(), "rounds": record.history["seconds"].tolist()}
    print(json.dumps(figures))


def many_clients(count):
    """In a process of its own: seconds per client, and the growth of this process, for tiny adapters."""
    sys.path.insert(0, str(HERE.parents[1]))
    import tiny

    tiny.federate(tiny.settings(hospitals=10, rounds=1))  # imports and first uses are not the server's growth
    cfg, process = tiny.settings(hospitals=int(count), rounds=1), psutil.Process()
    before, start, highest = process.memory_info().rss, time.perf_counter(), 0
    app, calls = tiny.client(), 0

    def watched(message, context):
        nonlocal highest, calls
        calls += 1
        if calls % 50 == 0:
            highest = max(highest, process.memory_info().rss)
        return app(message, context)

    tiny.federate(cfg, watched)
    seconds, highest = time.perf_counter() - start, max(highest, process.memory_info().rss)
    print(json.dumps({"per_client": seconds / int(count), "growth": highest - before}))


def measured(*arguments):
    """Run a function of this file in a new process: what it printed, and the peak memory of its process tree."""
    process = subprocess.Popen([sys.executable, str(HERE), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    tree, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for member in [tree, *tree.children(recursive=True)]:
            try:
                total += member.memory_full_info().pss
            except (psutil.Error, AttributeError):
                continue
        peak = max(peak, total)
        time.sleep(0.5)
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err.decode()[-2000:])
    return json.loads(out.decode().strip().splitlines()[-1]), peak


def crowds(counts):
    """Print a table of hospitals that each train the real model for a step, in one process."""
    heads = ("s a client", "of it the server's", "peak GB")
    print(f"\n{'real model, clients':>24s}" + "".join(f"{head:>20s}" for head in heads))
    for count in map(int, counts):
        figures, peak = measured("run", "in-process", *CROWD, f"federation.num_clients={count}")
        each, own = (value / count for value in (figures["run"], figures["run"] - figures["clients"]))
        print(f"{count:24,d}{each:20.2f}{own:20.3f}{peak / 1e9:20.2f}", flush=True)


def main():
    """Print the tables."""
    times = ("whole", "wall", "loading", "rounds", "clients", "training")
    pairs = (("run", "clients"), ("run", "training"))
    heads = [f"{what} s" for what in times] + ["/".join(pair) for pair in pairs] + ["peak GB"]
    print(f"{'8 clients, 3 rounds, 8 steps':34s}" + "".join(f"{head:>15s}" for head in heads))
    cases = [(ALONE, "in-process", []), *((name, backend, ["federation.threads=1"]) for name, backend in SINGLE)]
    cases = [case for case in cases if case[1] != "ray" or find_spec("ray")]
    kept = {}
    for name, backend, overrides in cases:
        figures, peak = measured("run", backend, *overrides)
        kept[name] = (figures["whole"], sum(figures["rounds"][-2:]), peak)
        figures["rounds"] = sum(figures["rounds"])
        seconds = "".join(f"{figures[what]:15.1f}" for what in times)
        ratios = "".join(f"{figures[a] / figures[b]:15.3f}" for a, b in pairs)
        print(f"{name:34s}{seconds}{ratios}{peak / 1e9:15.2f}", flush=True)
    for one, other in RATIOS:
        if {one, other} <= kept.keys():
            ratios = [mine / theirs for mine, theirs in zip(kept[one], kept[other], strict=True)]
            said = "wall with start-up {:.2f}, the last two rounds {:.2f}, peak memory (PSS) {:.2f}".format(*ratios)
            print(f"{one} / {other}: {said}")
    crowds((10, 100))
    print(f"\n{'tiny adapters, clients':>24s}{'ms a client':>13s}{'growth of the server MB':>26s}")
    for count in (10, 100, 1_000, 10_000):
        figures, _ = measured("many", str(count))
        print(f"{count:24,d}{figures['per_client'] * 1e3:13.2f}{figures['growth'] / 1e6:26.1f}")


if __name__ == "__main__":
    asked = {"run": on_a_backend, "many": many_clients, "crowd": lambda *counts: crowds(counts)}
    asked[sys.argv[1]](*sys.argv[2:]) if len(sys.argv) > 1 else main()
