"""A deployed federation against the same one in this process: start and stop, a round, and what a message costs."""

import subprocess
import sys
import tempfile
import time

import numpy as np

from fedllm_helpers import config, deployment
from fedllm_helpers.deployment import runs as deployed_runs
from fedllm_helpers.deployment import watchdog
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


def main() -> None:
    """Print three small tables."""
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
    print(f"\neach message, a new process: import {imported:.1f} s, model {loaded:.1f} s (alone, median of 5)")


if __name__ == "__main__":
    main()
