"""Training speed against the machine's own matrix products, padding, and 4 bits (``make bench``).

The work of a step: a frozen parameter costs 2 FLOP per token forwards and 2 backwards (no weight gradient), so
FLOP = 4 · (parameters of the layers · tokens + parameters of the output layer · tokens with logits). "As the course
counts" charges all parameters for every token that went in, padding not counted. Each step is timed beside a matrix
product of 2048³ and beside bare products of the model's own shapes (all frozen layers, forwards and backwards). "Bound"
is the "as the course counts" figure of a step with nothing in it but those products, the adapter's, attention's and the
loss, each run bare in the model's dtype: no norm, no rotation, no activation, no optimiser. No step exceeds it here.
"""

import statistics
import time

import torch

from fedllm_helpers import communication, config, data, models
from fedllm_helpers.training import batches, memory

REPEATS = 8


def seconds(action, repeats=REPEATS):
    """Median time of an action after one warm-up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turn(*actions):
    """Rows of seconds: each action once a turn, so that whatever slows the machine slows all of them."""
    return [[seconds(action, 1) for action in actions] for _ in range(REPEATS)]


def square_rate(dtype):
    """FLOP/s of a product of two 2048 × 2048 matrices."""
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / seconds(lambda: a @ b)


def bare_products(model, batch):
    """The frozen layers' products alone, forwards and backwards, on weights as large and as many."""
    base, rows = model.get_base_model(), batch["input_ids"].numel()
    kept = batch["logits_to_keep"].numel() * len(batch["input_ids"])
    work = []
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lora" not in name:
            m = kept if name == "lm_head" else rows
            weight = layer.weight
            x, g = (
                torch.randn(m, weight.shape[1], dtype=weight.dtype),
                torch.randn(m, weight.shape[0], dtype=weight.dtype),
            )
            work.append((weight.detach(), x, g))

    def run():
        for weight, x, g in work:
            torch.nn.functional.linear(x, weight)
            g @ weight

    return run


def other_products(model, batch):
    """What no step can leave out beside the frozen layers: adapter, attention products, loss."""
    shape, rows, dtype = model.get_base_model().config, batch["input_ids"].numel(), model.get_base_model().dtype
    logits = batch["logits_to_keep"].numel() * len(batch["input_ids"])
    scores = torch.randn(logits, shape.vocab_size, dtype=dtype, requires_grad=True)
    labels = torch.randint(shape.vocab_size, (logits,))
    pairs = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in model.modules() if hasattr(m, "lora_A")]
    pairs = [
        (a.detach().to(dtype), b.detach().to(dtype), *(torch.randn(rows, n, dtype=dtype) for n in (a.shape[1], len(b))))
        for a, b in pairs
    ]
    heads, width = shape.num_attention_heads, shape.hidden_size // shape.num_attention_heads
    q = torch.randn(len(batch["input_ids"]), heads, batch["input_ids"].shape[1], width, dtype=dtype)

    def run():
        scores.grad = None
        torch.nn.functional.cross_entropy(scores, labels).backward()
        for a, b, x, g in pairs:
            h, back = x @ a.T, g @ b
            _ = h @ b.T, back @ a, g.T @ h, back.T @ x
        for _ in range(shape.num_hidden_layers):
            p = q @ q.transpose(-1, -2)
            out = p @ q
            back = out @ q.transpose(-1, -2)
            _ = p.transpose(-1, -2) @ out, back @ q, back.transpose(-1, -2) @ q

    return run


def step_of(model, batch):
    """One optimiser step on a batch, as the Trainer takes it."""
    memory.freed_used_again()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def run():
        with models.autocast(model):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def step_table(cfg, train):
    """Efficiency of a step at batch 8, for cards as they come and for full rows of 48 tokens."""
    model, tokenizer = models.load(cfg)
    model.train()
    rows = batches.encode(train, tokenizer, cfg.train.seq_length)
    middle = sorted(rows, key=lambda row: len(row["input_ids"]))[len(rows) // 2 :][:8]
    full = [{"input_ids": [500 + i] * 48, "labels": [500 + i] * 48} for i in range(8)]
    head = model.get_base_model().lm_head.weight.numel()
    layers = sum(p.numel() for p in model.get_base_model().model.layers.parameters() if not p.requires_grad)
    heads = ("tokens/s", "step s", "course/2048³", "strict/2048³", "bare/step", "bound/2048³")
    print(f"{'batch':24s}" + "".join(f"{head:>14s}" for head in heads))
    for name, chosen in (("8 median cards", middle), ("8 x 48, all labelled", full)):
        batch = batches.collate(chosen, tokenizer)
        rate = square_rate(model.get_base_model().dtype)
        taken = in_turn(step_of(model, batch), bare_products(model, batch), other_products(model, batch))
        step, bare, other = map(statistics.median, zip(*taken, strict=True))
        tokens = int(batch["attention_mask"].sum())
        logits = batch["logits_to_keep"].numel() * len(chosen)
        course = 4 * (layers + head) * tokens / step / rate
        strict = 4 * (layers * tokens + head * logits) / step / rate
        bound = course * step / (bare + other)
        figures = (f"{tokens / step:.0f}", *(f"{figure:.2f}" for figure in (step, course, strict, bare / step, bound)))
        print(f"{name:24s}" + "".join(f"{figure:>14s}" for figure in figures))
    print(f"GEMM 2048³: {rate / 1e9:.0f} GFLOP/s in {model.get_base_model().dtype}")


def padding_table(cfg, train):
    """Share of padding in batches of 8: grouped by length against random order."""
    _, tokenizer = models.load(cfg)
    rows = batches.encode(train, tokenizer, cfg.train.seq_length)
    grouped = batches.LengthBatches([len(row["input_ids"]) for row in rows], 8)
    for name, order in (("grouped by length", list(grouped)), ("random order", range(len(rows)))):
        parts = [batches.collate([rows[i] for i in list(order)[s : s + 8]], tokenizer) for s in range(0, len(rows), 8)]
        waste = 1 - sum(int(p["attention_mask"].sum()) for p in parts) / sum(p["input_ids"].numel() for p in parts)
        print(f"padding, {name:18s} {waste:6.1%} of cells")


def quantization_table(cfg, train):
    """A 4-bit step against a whole one, taken in turn, and the bytes of the base."""
    whole, tokenizer = models.load(cfg)
    four, _ = models.load(config.load(cfg, "model.quantization=4"))
    batch = batches.collate(batches.encode(train.select(range(8)), tokenizer, cfg.train.seq_length), tokenizer)
    ratios = [few / all_ for all_, few in in_turn(step_of(whole.train(), batch), step_of(four.train(), batch))]
    adapter = sum(array.nbytes for array in models.get_adapter(whole).values())
    size = [communication.weight_bytes(model.get_base_model()) - adapter for model in (whole, four)]
    print(f"4-bit step / whole step: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"4-bit bytes / whole bytes: {size[1]:,} / {size[0]:,} = {size[1] / size[0]:.2f}")


if __name__ == "__main__":
    settings = config.load("cpu")
    cards, _ = data.load(settings)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    step_table(settings, cards)
    print()
    padding_table(settings, cards)
    print()
    quantization_table(settings, cards)
