"""What privacy costs in time and bytes: DP-SGD steps, and secure aggregation for 10 and 100 hospitals (``make bench``).

Steps: the same cards in the same batches (every card in every step), plain and with DP-SGD in turns. Masks: adapters of
the default size; "hospital" is one hospital's time for keys, shares, mask and opening, "server" the server's for the
sum and for taking the masks off, without drop-outs and with a tenth of the hospitals gone. Bytes are those of keys,
shares and openings beside the update itself, up and down together, per hospital.
"""

import statistics
import time

import numpy as np

from fedllm_helpers import config, data, models, training
from fedllm_helpers.privacy import accounting, secure_aggregation
from fedllm_helpers.training import dp_sgd

VALUES, BATCH, STEPS, TURNS = 921_600, 8, 6, 4


def steps() -> None:
    """Seconds per step with and without DP-SGD, in turns."""
    cfg = config.load("cpu")
    model, tokenizer = models.load(cfg)
    cards, start = data.load(cfg)[0].select(range(BATCH)), models.get_adapter(model)
    plan = accounting.RecordPrivacy(1.0, 1.0, 1.0, STEPS, 1e-3, 1.0)
    local = training.round_config(cfg, max_steps=STEPS, per_device_train_batch_size=BATCH, lr_scheduler_type="constant")
    seconds = {"plain": [], "DP-SGD": []}
    for turn in range(TURNS + 1):
        for name, trainer in (("plain", None), ("DP-SGD", dp_sgd.trainer(plan, np.random.SeedSequence(0)))):
            models.set_adapter(model, start)
            record = training.fine_tune(
                model, tokenizer, cards, local, learning_rate=1e-4, trainer=trainer, description=None
            )
            if turn:  # the first is for warming up
                seconds[name].append(record.seconds / STEPS)
    plain, private = (statistics.median(times) for times in seconds.values())
    print(f"a step of {BATCH} cards: plain {plain:.2f} s, DP-SGD {private:.2f} s, ratio {private / plain:.2f}\n")


def masks(hospitals: int, gone: int) -> None:
    """Seconds and bytes of one masked round."""
    ids, threshold, number = list(range(hospitals)), hospitals * 2 // 3 + 1, 1
    code, values, clock = (
        secure_aggregation.fixed_point([200] * hospitals, 1.0),
        np.zeros(VALUES, np.uint32),
        time.perf_counter,
    )
    keys = {k: secure_aggregation.make_keys() for k in ids}
    public = {k: key[1] for k, key in keys.items()}
    start = clock()
    secure_aggregation.make_keys()
    shares = {k: secure_aggregation.make_shares(k, keys[k][0], public, threshold, number) for k in ids[:1]}
    made = clock() - start
    shares |= {k: secure_aggregation.make_shares(k, keys[k][0], public, threshold, number) for k in ids[1:]}
    survivors = set(ids[gone:])
    total, server, masking = np.zeros(VALUES, np.uint32), 0.0, 0.0
    for k in sorted(survivors):
        start = clock()
        masked = secure_aggregation.mask(values, k, keys[k][0], public, number)
        masking = clock() - start
        start = clock()
        total = total + masked
        server += clock() - start
    opened = {}
    for k in sorted(survivors):
        start = clock()
        held = {maker: some[k] for maker, some in shares.items()}
        opened[k] = secure_aggregation.reveal(k, keys[k][0], public, held, survivors, number, threshold)
        opening = clock() - start
    places = {k: place for place, k in enumerate(ids, 1)}
    start = clock()
    total = secure_aggregation.unmask(total, public, places, survivors, opened, number, threshold)
    server += clock() - start
    assert not secure_aggregation.decode(total, 200, code, {"x": values})["x"].any()
    share = len(shares[0][1])
    extra = 96 * (1 + 2 * hospitals) + hospitals * (
        2 * share + 16
    )  # keys up, all down twice; shares up, down; openings up
    own = f"hospital {made + masking + opening:.2f} s (shares {made:.2f}, mask {masking:.2f}, opening {opening:.2f})"
    print(f"{hospitals} hospitals, {gone} gone: {own}, server {server:.2f} s;")
    print(
        f"  {extra / 1e3:.1f} kB beside an update of {4 * VALUES / 1e6:.2f} MB, {extra / (8 * VALUES):.2%} of both ways"
    )


if __name__ == "__main__":
    steps()
    for hospitals in (10, 100):
        for gone in (0, hospitals // 10):
            masks(hospitals, gone)
