"""What one update of the first round gives away, as the server sees it: open, behind masks, or under DP-SGD."""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from flwr.app import ConfigRecord, Context, Message, RecordDict
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import attacks, config, folders, models
from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.adapters.screening import complaint
from fedllm_helpers.attacks.battery import Audit, audit
from fedllm_helpers.federation import client_app
from fedllm_helpers.federation.provenance import fingerprint, provenance
from fedllm_helpers.grids import in_process
from fedllm_helpers.models.process import base_model, first_adapter
from fedllm_helpers.privacy import secure_aggregation as secure
from fedllm_helpers.study.arms import KEPT, key_of, pool, run_all
from fedllm_helpers.study.audits import COPIES, FEDERATED, PRIVACY, RECORD, SETTINGS, TUNED, stage

logger = logging.getLogger(__name__)
# what the server may get, and how it is trained; the masked view is the open one behind masks
VIEWS = {"open": PRIVACY["federated"], "record ε = 8": (FEDERATED, TUNED["record ε = 8"], f"{RECORD}8")}


def first_update(cfg: DictConfig, hospital: int, rate: float) -> Adapter:
    """What a hospital (from 0) sends in round 1, less what it got: by the ClientApp, with DP-SGD where ``cfg`` has it.

    Raises:
        RuntimeError: the hospital's training failed.
    """
    start, given = first_adapter(cfg), {"config": OmegaConf.to_yaml(cfg)}
    orders = {"arrays": to_record(start), "config": ConfigRecord({"server-round": 1, "lr": rate})}
    with in_process.InProcessGrid(client_app.app, cfg.federation.num_clients, given) as grid:
        request = Message(RecordDict(orders), in_process.FIRST_CLIENT_NODE + hospital, "train")
        (reply,) = grid.send_and_receive([request])
    if reply.has_error():
        raise RuntimeError(f"hospital {hospital} failed: {complaint(reply)}")
    sent = from_record(reply.content["arrays"])
    return {key: sent[key] - start[key] for key in start}


def recorder(kept: dict[tuple[int, int], Adapter]) -> Callable[[Message, Context], Message]:
    """A client for ``simulation.run``: the package's, and what it sends is kept by round and hospital (from 0).

    Built by hand in notebook 04.
    """

    def app(message: Message, context: Context) -> Message:
        """Pass the message on, and look at the reply."""
        reply = client_app.app(message, context)
        if message.metadata.message_type == "train" and not reply.has_error():
            number, hospital = message.content["config"]["server-round"], context.node_config["partition-id"]
            kept[number, hospital] = from_record(reply.content["arrays"])
        return reply

    return app


def masked_view(update: Adapter, hospital: int, weights: Sequence[int], value_range: float = 1.0) -> Adapter:
    """A masked update, decoded as if it were an open one: what a server can make of it alone. Taught in notebook 05b.

    ``weights`` are the cards of every hospital of the round. The view is uniform over ±2^31 steps of the encoding, and
    fresh keys make it another one with each call.
    """
    code, keys = secure.fixed_point(weights, value_range), [secure.make_keys() for _ in weights]
    whole, public = secure.encode(update, weights[hospital], code), {k: key[1] for k, key in enumerate(keys)}
    masked = secure.mask(whole, hospital, keys[hospital][0], public, number=1)
    return secure.decode(masked, weights[hospital], code, update)


def gains(before: Audit, after: Audit, systems: Sequence[str]) -> pd.Series:
    """Nats per token that the cards of each specialty gain, beyond the mean over specialties. Taught in notebook 05a.

    Args:
        before, after: audits, of which the last cards count; one whose loss is not finite is taken as unchanged.
        systems: the specialty of each of those cards.
    """
    was, now = (one.nll[-len(systems) :] for one in (before, after))
    gain = (was - np.where(np.isfinite(now), now, was)) / after.tokens[-len(systems) :]
    by_system = pd.Series(gain).groupby(np.array(systems, dtype=str)).mean()
    return by_system - by_system.mean()


def read(before: Audit, after: Audit, systems: Sequence[str], truth: str) -> dict[str, Any]:
    """What the attacks of notebook 05a say about one update; arguments of :func:`gains`, and the hospital's specialty.

    ``nll`` is of held-out cards in nats per token, ``exposure`` a mean in bits, ``extracted`` a number of canaries;
    ``area`` is of the loss ratio, the hospital's cards (those that come first) against held-out ones of its specialty.
    """
    nll, apart = np.where(np.isfinite(after.nll), after.nll, before.nll), len(after.nll) - len(systems)
    by_system, score = gains(before, after, systems), -nll / np.maximum(before.nll, 1e-6)
    area = attacks.membership(score[:apart], score[apart:][np.array(systems) == truth]).auc.value
    found = {"truth": truth, "guess": by_system.idxmax(), "right": int(by_system.idxmax() == truth)}
    found |= {"nll": round(float(nll[apart:].sum() / after.tokens[apart:].sum()), 3), "area": round(area, 3)}
    found |= {"exposure": round(float(after.exposure.mean()), 2), "extracted": int(after.extracted.sum())}
    return found | {f"gain: {name}": round(value, 4) for name, value in by_system.items()}


def attack_hospital(cfg: DictConfig, hospital: int, each: int, folder: Path = KEPT) -> list[dict[str, Any]]:
    """A row of :func:`read` for each of :data:`VIEWS` of a hospital; what an earlier call found is read back.

    Only the canaries with most copies are asked for; where they are another hospital's, their exposure is a control.
    """
    path = Path(folder) / f"views-{key_of(cfg, hospital, each, VIEWS)}.json"
    with contextlib.suppress(FileNotFoundError):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            logger.warning("%s is damaged (%s) and is made anew", path, error)
    staged, members, others, planted = stage(cfg, folder, each=each)
    own = [client_app.own_cards(staged, other)[0] for other in range(cfg.federation.num_clients)]
    truth, start, (model, tokenizer) = own[hospital]["specialty"][0], first_adapter(staged), base_model(staged)
    mine = members.select(np.flatnonzero(np.array(members["specialty"]) == truth))
    often = [canary for canary in planted if canary.copies == max(COPIES)]
    look = partial(audit, model, tokenizer, mine, others, cfg=cfg)
    updates = {}
    for view, (_, rate, changes) in VIEWS.items():
        changed = config.load(staged, f"federation.privacy.noise_seed={cfg.seed}", *changes.split())
        updates[view] = first_update(changed, hospital, rate)
    updates["masked"] = masked_view(updates["open"], hospital, [len(cards) for cards in own])
    models.set_adapter(model, start)
    before, rows = look([]), []
    for view, update in updates.items():
        models.set_adapter(model, {key: start[key] + update[key] for key in start})
        found = read(before, look(often), others["specialty"], truth)
        rows.append({"seed": cfg.seed, "hospital": hospital, "view": view, **found})
    folders.write(path, json.dumps(rows))
    return rows


def views_grid(seeds: list[int], folder: Path, processes: int, each: int = 3) -> None:
    """Attack every hospital's first update over seeds; write ``privacy_views.csv`` and ``privacy_views.json``.

    Arguments of :func:`fedllm_helpers.study.audits.privacy_grid`.
    """
    cfg = config.load("cpu", "federation.threads=1", *SETTINGS)
    keys = list(itertools.product(seeds, range(cfg.federation.num_clients)))
    jobs = {(s, k): partial(attack_hospital, config.load(cfg, f"seed={s}"), k, each) for s, k in keys}
    with pool(processes) as workers:
        found = dict(run_all(workers, jobs, "hospitals"))
    rows = [row for key in keys for row in found[key]]
    folders.write(folder / "privacy_views.csv", pd.DataFrame(rows).to_csv(index=False))
    views = {name: dict(zip(("trained", "learning_rate", "settings"), how, strict=True)) for name, how in VIEWS.items()}
    more = {"seeds": seeds, "canaries": each, "views": views, "fingerprint": fingerprint(cfg, seeds=seeds)}
    text = json.dumps(provenance(cfg, **more), indent=1, ensure_ascii=False)
    folders.write(folder / "privacy_views.json", text + "\n")
