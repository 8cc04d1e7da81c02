"""Rounds over lines of 2, 20 and 200 Mbit/s, between three booted machines: `make bench-network`, as root.

Writes ``network.csv`` and ``network.json`` of ``notebooks/results``: for each rate and what travels, seconds a round,
bytes on the wire and bytes of the ledger. Elsewhere it says in one line why not.
"""

import json
import sys
from pathlib import Path

import federations
import machines
import pandas as pd

from fedllm_helpers import config
from fedllm_helpers.federation.provenance import provenance

RATES = (2, 20, 200)  # 10⁶ bits a second, each way, at each hospital
SENT = {
    "LoRA r 16": "",
    "LoRA r 16, int4 up": "federation.compression.up=int4",
    "LoRA-XS r 16": "federation.aggregation=LoRA-XS",
}
RESULTS = machines.ROOT / "notebooks" / "results"


def measured(fed: federations.Federation, rate: float, sent: str) -> dict[str, object]:
    """A run over lines of a rate: medians over its rounds, and the first hospital's bytes."""
    for name in fed.lines.names:
        fed.lines.shape(name, rate if name != "server" else 1000)
    name = f"{sent} {rate}".replace(" ", "-").replace(",", "")
    before = fed.lines.bytes("h0")
    said = fed.run(name, *SENT[sent].split())
    history, clients = fed.tables(name)
    up, down = (after - first for after, first in zip(fed.lines.bytes("h0"), before, strict=True))
    assert set(clients["status"]) == {"used"}, said
    own = clients[clients["client"] == 0]
    row = {"megabits": rate, "sent": sent, "rounds": len(history), "seconds": round(history["seconds"].median(), 2)}
    row |= {"trained": round(clients.groupby("round")["seconds"].max().median(), 2), "wire_up": up, "wire_down": down}
    return row | {"bytes_up": int(own["bytes_up"].sum()), "bytes_down": int(own["bytes_down"].sum())}


def main() -> None:
    """Measure all, print the table, and keep it."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    with federations.machines() as fed:
        fed.founds()
        rows = []
        for sent, settings in SENT.items():
            fed.run(f"{len(rows)}-first", *settings.split())  # afterwards every hospital holds the model
            rows += [measured(fed, rate, sent) for rate in RATES]
    table = pd.DataFrame(rows).sort_values(["sent", "megabits"])
    table["formula"] = (8e-6 * (table["bytes_up"] + table["bytes_down"]) / table["rounds"] / table["megabits"]).round(4)
    print(table.to_string(index=False))
    table.to_csv(folder / "network.csv", index=False)
    cfg = config.load("cpu", *federations.SETTINGS.split())
    told = provenance(cfg, hospitals=federations.HOSPITALS, machines="three, booted by systemd on one computer")
    (folder / "network.json").write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
