"""What reading and splitting cost per row, from ten thousand rows to half a million: flat (``make bench``)."""

import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from fedllm_helpers import data

SIZES = (10_000, 100_000, 500_000)
logging.disable(logging.WARNING)


def rows(n: int) -> pd.DataFrame:
    """Questions of their own, answers of which one in fifty is shared, and a specialty for every hundred rows."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(5000)])
    texts = [" ".join(row) for row in words[rng.integers(0, 5000, (n, 24))]]
    shared = rng.random(n) < 0.02
    answers = np.where(shared, np.roll(texts, 1), texts)
    specialties = [f"specialty {i}" for i in rng.integers(0, max(n // 100, 1), n)]
    return pd.DataFrame({"question": [f"What is {i}?" for i in range(n)], "answer": answers, "specialty": specialties})


def write(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """The same rows in four kinds of file."""
    paths = [folder / f"cards.{suffix}" for suffix in ("csv", "jsonl", "json", "parquet")]
    frame.to_csv(paths[0], index=False)
    records = frame.to_dict("records")
    paths[1].write_text("\n".join(map(json.dumps, records)))
    paths[2].write_text(json.dumps(records))
    frame.to_parquet(paths[3])
    return paths


if __name__ == "__main__":
    print(f"{'µs per row':12s}" + "".join(f"{name:>12s}" for name in (".csv", ".jsonl", ".json", ".parquet", "split")))
    for n in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            spent = []
            for path in write(rows(n), Path(folder)):
                start = time.perf_counter()
                cards = data.load_flashcards(str(path))
                spent.append(time.perf_counter() - start)
            start = time.perf_counter()
            train, test = data.split(data.choose(cards, None, None), 0.1)
            spent.append(time.perf_counter() - start)
        assert len(train) + len(test) == n
        print(f"{n:<12,d}" + "".join(f"{seconds / n * 1e6:12.1f}" for seconds in spent), flush=True)
