"""What a start costs: importing, cards, model; ``--fetch``: the first fetch (``make bench``)."""

import sys
import tempfile
import time
from pathlib import Path

start = time.perf_counter()
from fedllm_helpers import config, data, models  # noqa: E402  (importing is timed)
from fedllm_helpers.models import embedded  # noqa: E402  (importing is timed)

IMPORT = time.perf_counter() - start


def timed(name, action):
    """Run an action and print its seconds."""
    begin = time.perf_counter()
    result = action()
    print(f"{name:32s} {time.perf_counter() - begin:6.1f} s", flush=True)
    return result


if __name__ == "__main__":
    print(f"{'importing the package':32s} {IMPORT:6.1f} s")
    cfg = config.load("cpu")
    timed("cards, read and split", lambda: data.load(cfg))
    timed("model and adapter, from the cache", lambda: models.load(cfg))
    if "--fetch" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            timed("fetch and convert, empty cache", lambda: embedded.fetch(Path(folder)))
