"""A deployed federation against the same one in this process: start and stop, a round, and what a message costs."""

import subprocess
import sys
import tempfile
import time
from importlib import import_module

import numpy as np
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import config, deployment
from fedllm_helpers.deployment import runs as deployed_runs
from fedllm_helpers.deployment import watchdog
from fedllm_helpers.deployment.parties import Deployment
from fedllm_helpers.federation import simulation

STARTS = 20
SETTINGS = (
    "federation.num_clients=2",
    "federation.num_rounds=3",
    "federation.threads=1",
    "federation.evaluate_every=0",
    "federation.training_arguments.max_steps=8",
    "dataset.max_cards_per_specialty=60",
    "federation.timeout=300",
)
ALONE = """
import sys
from omegaconf import OmegaConf
from fedllm_helpers import config
from fedllm_helpers.federation import simulation
simulation.run(config.load(OmegaConf.create(sys.argv[1])), progress=False)
"""
TWO_ROUNDS = ("federation.num_rounds=2", "federation.training_arguments.max_steps=2")
PARTS = """
import time
start = time.perf_counter()
from fedllm_helpers import config
from fedllm_helpers.federation import client_app
from fedllm_helpers.models.process import base_model
imported = time.perf_counter()
base_model(config.load("cpu"))
print(imported - start, time.perf_counter() - imported)
"""


def ways(cfg: DictConfig) -> None:
    """Print what a run of two rounds takes, from handing it in to its end: deployed, and in a process of its own."""
    import_module("fedllm_helpers.training.fine_tuning")  # so that "in this process" has nothing to import
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", ALONE, OmegaConf.to_yaml(cfg)], check=True)
    took, adapters = {"in a process, with its start": (time.perf_counter() - begin, "")}, {}
    begin = time.perf_counter()
    adapters["here"] = simulation.run(cfg, progress=False).adapter
    took["in this process"] = time.perf_counter() - begin, ""
    for warm in (True, False):
        with tempfile.TemporaryDirectory() as folder, deployment.start(cfg, folder, warm=warm) as running:
            for name in ("first", "next"):
                begin = time.perf_counter()
                adapters[name] = deployed_runs.run(running, cfg, name, show=lambda line: None).adapter
                took[f"deployed, {'warm' if warm else 'cold'}, {name} run"] = time.perf_counter() - begin, held(running)
        same = all(np.array_equal(adapters["next"][key], value) for key, value in adapters["here"].items())
        print(f"{'warm' if warm else 'cold'}: the adapter has {'the same bits' if same else 'OTHER BITS'}")
    unit = took["in this process"][0]
    print(f"{'two rounds, two hospitals':32s} {'s':>6s} {'ratio':>6s}  memory of all processes (PSS)")
    for name, (seconds, memory) in took.items():
        print(f"{name:32s} {seconds:6.1f} {seconds / unit:6.2f}  {memory}")
    print()


def held(running: Deployment) -> str:
    """Memory of a deployment's processes, and of those that are ready for messages."""
    sizes = {process: process.memory_full_info().pss / 1e6 for process in watchdog.marked(running.mark)}
    ready = [size for process, size in sizes.items() if "fedllm_helpers.deployment.forking" in process.cmdline()]
    return f"{sum(sizes.values()):.0f} MB, {', '.join(f'{size:.0f}' for size in ready) or 'none'} ready for messages"


def main() -> None:
    """Print four small tables."""
    cfg, starts, stops, left = config.load("cpu", *SETTINGS), [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(STARTS):
            begin = time.perf_counter()
            running = deployment.start(cfg, folder)
            starts.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            running.stop()
            stops.append(time.perf_counter() - begin)
            left += len(list(watchdog.marked(running.mark)))
    print(f"{STARTS} starts and stops of a server and two hospitals: {left} processes left behind")
    print(f"start {np.median(starts):.1f} s ({min(starts):.1f} to {max(starts):.1f}), stop {np.median(stops):.1f} s\n")
    ways(config.load(cfg, *TWO_ROUNDS))
    with tempfile.TemporaryDirectory() as folder, deployment.start(cfg, folder) as running:
        deployed = deployed_runs.run(running, cfg, show=lambda line: None)
    here = simulation.run(cfg, progress=False)
    same = all(np.array_equal(deployed.adapter[key], here.adapter[key]) for key in here.adapter)
    print(f"three rounds, two hospitals: the adapters are {'the same bits' if same else 'NOT the same'}")
    print(f"{'seconds of a round':24s} {'first':>7s} {'others':>7s} {'training':>9s}")
    for name, record in {"deployed": deployed, "in this process": here}.items():
        seconds, training = record.history["seconds"], record.clients.groupby("round")["train_seconds"]
        trained = (training.max() if name == "deployed" else training.sum()).median()
        print(f"{name:24s} {seconds.iloc[0]:7.1f} {seconds.iloc[1:].median():7.1f} {trained:9.1f}")
    parts = [subprocess.run([sys.executable, "-c", PARTS], capture_output=True, text=True).stdout for _ in range(5)]
    imported, loaded = np.median([list(map(float, line.split())) for line in parts], axis=0)
    print(f"\nwithout a warm process, each message: import {imported:.1f} s, model {loaded:.1f} s (alone, median of 5)")


if __name__ == "__main__":
    main()
