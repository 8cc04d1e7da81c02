"""DP-SGD for somebody else's Trainer: their collator and loss, gradients against single examples, and who may send."""

import numpy as np
import pytest
import somebody
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from test_pieces import far, plain, run, start_of
from transformers import Trainer, TrainingArguments

from fedllm_helpers.privacy import accounting, policy
from fedllm_helpers.privacy.ledger import Ledger
from fedllm_helpers.training import dp_sgd

ROWS = [
    {"words": [int(w) for w in np.random.default_rng(i).integers(0, 97, 9)], "answer": 7 * i % 97} for i in range(12)
]


class Theirs(Trainer):
    """Their Trainer: a class of its own, whose loss is that of a last word."""

    def compute_loss(self, model, inputs, return_outputs=False, **more):
        return last_word(model, inputs).mean()


def last_word(model, inputs):
    """One loss for each example."""
    logits = model(input_ids=inputs["words"]).logits[:, -1]
    return torch.nn.functional.cross_entropy(logits, inputs["answer"], reduction="none")


def collator(rows):
    """Their collator, with names of their own."""
    return {name: torch.tensor([row[name] for row in rows]) for name in ("words", "answer")}


def trainer(plan, tmp_path, steps=1, kind=Theirs, losses=last_word, family="llama", seed=0, **more):
    given = {
        "max_steps": steps,
        "per_device_train_batch_size": round(plan.sample_rate * len(ROWS)),
        "learning_rate": 0.5,
    }
    given |= {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, remove_unused_columns=False, **(given | more))
    made = dp_sgd.private(kind, losses)
    model = somebody.build(family)
    return made(model, arguments, collator, ROWS, plan=plan, seed=np.random.SeedSequence(seed))


def small_noise(clipping_norm, steps=1):
    return accounting.RecordPrivacy(1e-9, clipping_norm, 1.0, steps, 1e-3, 1e9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_is_the_clipped_gradients_of_single_examples(family, tmp_path):
    model = somebody.build(family)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    single = []
    for row in ROWS:
        model.zero_grad()
        last_word(model, collator([row])).sum().backward()
        single.append({name: p.grad.clone() for name, p in trained.items()})
    norms = [float(sum(g.square().sum() for g in one.values()).sqrt()) for one in single]
    norm = float(np.median(norms))
    wanted = {
        n: sum(g[n] * min(1, norm / size) for g, size in zip(single, norms, strict=True)) / len(ROWS) for n in trained
    }
    theirs = trainer(small_noise(norm), tmp_path, family=family)
    theirs.train()
    for name, p in theirs.model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p, trained[name] - 0.5 * wanted[name], atol=1e-6)


def test_the_noise_is_as_wide_as_promised(tmp_path):
    plan = accounting.plan(len(ROWS), 4, 1, delta=0.01, noise_multiplier=50.0, clipping_norm=0.1)
    start, theirs = somebody.build("llama"), trainer(plan, tmp_path)
    theirs.train()
    before = dict(start.named_parameters())
    moved = torch.cat([(p - before[n]).flatten() for n, p in theirs.model.named_parameters() if p.requires_grad])
    wide = 0.5 * 50.0 * 0.1 / 4
    assert float(moved.detach().std()) == pytest.approx(wide, rel=4 / np.sqrt(2 * len(moved)))


def test_a_plan_is_the_accountants_word():
    by_noise = accounting.plan(200, 8, 40, delta=1e-3, noise_multiplier=1.1)
    assert by_noise.epsilon == accounting.epsilon(1.1, 0.04, 40, 1e-3) and by_noise.examples == 320
    by_target = accounting.plan(200, 8, 40, delta=1e-3, target=4.0)
    assert by_target.epsilon == pytest.approx(4.0, rel=2e-3) and by_target.epsilon <= 4.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 201}, "batch_size=201: there are 200 examples"),
        ({"delta": 0.1}, "delta=0.1: it promises nothing"),
        ({"delta": 0}, "delta=0: it promises nothing"),
        ({"noise_multiplier": None}, "give one, and the other follows"),
        ({"target": 4.0}, "give one, and the other follows"),
        ({"noise_multiplier": 0}, "noise_multiplier=0: allowed are numbers above 0"),
        ({"steps": 0}, "steps=0: allowed are whole numbers"),
        ({"clipping_norm": -1}, "clipping_norm=-1"),
    ],
)
def test_plans_that_promise_nothing_are_one_line(change, says):
    given = {"examples": 200, "batch_size": 8, "steps": 40, "delta": 1e-3, "noise_multiplier": 1.0} | change
    with pytest.raises(ValueError, match=says):
        accounting.plan(given.pop("examples"), given.pop("batch_size"), given.pop("steps"), **given)


def test_losses_and_settings_that_break_the_promise_are_refused(tmp_path):
    with pytest.raises(TypeError, match="expected transformers.Trainer or a subclass of it"):
        dp_sgd.private(dict, last_word)
    with pytest.raises(ValueError, match=r"losses have the shape \(\), expected is \(12,\)"):
        trainer(small_noise(1.0), tmp_path, losses=lambda model, inputs: last_word(model, inputs).mean()).train()
    with pytest.raises(ValueError, match="max_steps=-1: DP-SGD counts steps"):
        trainer(small_noise(1.0), tmp_path, max_steps=-1)
    with pytest.raises(ValueError, match="neither FedProx nor gradient_accumulation_steps above 1"):
        trainer(small_noise(1.0), tmp_path, gradient_accumulation_steps=2)


def private_client(tmp_path, text, trained=True):
    """Their ClientApp, which trains by a plan and says so in its reply, and follows a policy of its own."""
    app, file = ClientApp(mods=[policy.mod]), tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
    plan = accounting.plan(len(ROWS), 4, 2, delta=0.01, noise_multiplier=1.0)
    file.write_text(text)
    Ledger(policy.load(file).ledger).begin()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        theirs = trainer(plan, tmp_path, steps=2, seed=int(context.node_config["partition-id"]))
        somebody.set_peft_model_state_dict(theirs.model, message.content["arrays"].to_torch_state_dict())
        said = {}
        if trained:
            theirs.train()
            said = theirs.promise(seeded=False)
        arrays = ArrayRecord(somebody.get_peft_model_state_dict(theirs.model))
        return Message(
            RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 12}), **said}), reply_to=message
        )

    def node(message: Message, context: Context) -> Message:
        context.node_config["policy"] = str(file)
        return app(message, context)

    return node


def test_only_what_was_trained_by_a_plan_leaves_a_client(tmp_path, caplog):
    caplog.set_level("INFO")
    moved = run(plain(), client=private_client(tmp_path, "largest_epsilon: 1000"), rounds=1)
    assert far(moved, start_of("llama")) > 0
    untrained = private_client(tmp_path, "largest_epsilon: 1000", trained=False)
    assert run(plain(), client=untrained, rounds=1) == {}, "Flower's own loop has nothing where every client refused"
    assert "largest_epsilon=1000.0, and this was no DP-SGD" in caplog.text
    caplog.clear()
    assert run(plain(), client=private_client(tmp_path, "largest_epsilon: 0.5"), rounds=1) == {}
    assert "largest_epsilon=0.5 over all runs, and with this round it would be" in caplog.text
    with pytest.raises(ValueError, match="0 of 2 steps are trained: nothing to promise"):
        plan = accounting.plan(len(ROWS), 4, 2, delta=0.01, noise_multiplier=1.0)
        trainer(plan, tmp_path, steps=2).promise(seeded=False)
