"""Settings and calls that cannot be right: each is one line that names what was given and what is allowed."""

from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError
from transformers import LlamaConfig, LlamaForCausalLM, SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from fedllm_helpers import communication, config, data, deployment, models, training
from fedllm_helpers.config import training_arguments
from fedllm_helpers.evaluation import multiple_choice, scoring
from fedllm_helpers.federation import client_app, simulation

# overrides of the cpu preset, and what the line says
REFUSED = """
train.learning_rate_max=.inf | train.learning_rate_max=inf: allowed is from
train.learning_rate_max=1e10 | from 1e-12 to 10
train.learning_rate_max=0 | from 1e-12 to 10
train.learning_rate_min=.nan | train.learning_rate_min=nan
federation.timeout=inf | federation.timeout=inf
federation.compression.keep=.nan | federation.compression.keep=nan
federation.dirichlet_alpha=.inf | federation.dirichlet_alpha=inf
federation.secure_aggregation.value_range=inf | value_range=inf
federation.privacy.record.epsilon=.nan | epsilon=nan
federation.privacy.record.noise_multiplier=0 | noise_multiplier=0.0: allowed is from 1e-09 to 1000000.0, or null
federation.privacy.record.delta=0.4 federation.privacy.record.epsilon=8 | delta=0.4: allowed is from
federation.privacy.client.noise_multiplier=1 federation.privacy.client.delta=0.4 | not below 1 / 6 hospitals
seed=-1 | seed=-1
seed=99999999999 | from 0 to 4294967295
seed=1.5 | seed
seed=yes | seed
model.lora.peft_lora_r=1000000000 | from 1 to 8192
model.lora.target_modules=[] | model.lora.target_modules=[]: it is empty
model.lora.target_modules=[q_proj,""] | it is empty
dataset.specialties=[] | dataset.specialties=[]: it is empty
dataset.name="" | dataset.name=: it is empty
model.name="  " | it is empty
federation.ranks=[] federation.aggregation=FLoRA | federation.ranks=[]: it is empty
federation.num_rounds=3.5 | federation.num_rounds
federation.num_rounds=-2 | from 1 to
federation.min_replies=9 | federation.min_replies=9: a round asks 6 hospitals
train.training_arguments.label_smoothing_factor=0.1 | is not taken: labels are aligned
train.training_arguments.resume_from_checkpoint=here | checkpoints hold the adapter alone
train.training_arguments.load_best_model_at_end=true | evaluation.score_answers
train.training_arguments.metric_for_best_model=loss | evaluation.score_answers
train.training_arguments.eval_strategy=steps | a training scores nothing
train.training_arguments.eval_steps=5 | a training scores nothing
train.training_arguments.per_device_eval_batch_size=4 | a training scores nothing
train.training_arguments.do_eval=true | a training scores nothing
train.training_arguments.push_to_hub=true | nothing is uploaded
train.training_arguments.hub_model_id=me/mine | nothing is uploaded
train.training_arguments.gradient_checkpointing=true | set model.gradient_checkpointing
federation.training_arguments.gradient_checkpointing=true | set model.gradient_checkpointing
train.training_arguments.activation_checkpointing=true | set model.gradient_checkpointing
train.training_arguments.fp16=true | set model.dtype
train.training_arguments.bf16=true | set model.dtype
train.training_arguments.tf32=true | set model.dtype
train.training_arguments.use_cpu=true | set model.device
train.training_arguments.seed=3 | set seed at the top
train.training_arguments.data_seed=3 | set seed at the top
train.training_arguments.dataloader_drop_last=true | the last one counts
federation.training_arguments.dataloader_drop_last=true | the last one counts
train.training_arguments.dataloader_num_workers=4 | batches are made from cards in memory
train.training_arguments.group_by_length=true | train_sampling_strategy=group_by_length
train.training_arguments.warmup_ratio=0.1 | set warmup_steps
train.training_arguments.remove_unused_columns=true | the columns are made here
train.training_arguments.deepspeed=ds.json | one process trains on one device
train.training_arguments.fsdp=full_shard | one process trains on one device
train.training_arguments.torch_compile=true | as it was loaded
train.training_arguments.neftune_noise_alpha=5 | as it was loaded
train.training_arguments.auto_find_batch_size=true | depend on the memory
train.training_arguments.lr_scheduler_kwargs={num_cycles:2} | need none
train.training_arguments.disable_tqdm=false | fine_tune(description=None)
train.training_arguments.learning_rat=1 | did you mean 'learning_rate'
train.training_arguments.colour=blue | taken are per_device_train_batch_size
train.training_arguments.weight_decay=lots | allowed are numbers from 0 to 1
train.training_arguments.weight_decay=-0.1 | allowed are numbers from 0 to 1
train.training_arguments.learning_rate=.inf | from 1e-12 to 10
train.training_arguments.learning_rate=.nan | from 1e-12 to 10
train.training_arguments.learning_rate=1e10 | from 1e-12 to 10
train.training_arguments.learning_rate=true | from 1e-12 to 10
train.training_arguments.learning_rate="'1e-3'" | from 1e-12 to 10
train.training_arguments.adam_beta1=2 | adam_beta1=2: allowed are numbers from 0 to 0.999999999
train.training_arguments.adam_beta2=1 | adam_beta2=1
train.training_arguments.adam_epsilon=0 | adam_epsilon=0
train.training_arguments.max_grad_norm=-1 | from 0
train.training_arguments.num_train_epochs=0 | num_train_epochs=0
train.training_arguments.max_steps=0 | or -1 for num_train_epochs
train.training_arguments.max_steps=2.5 | whole numbers from 1
train.training_arguments.max_steps=1000000000 | to 1000000
train.training_arguments.max_steps="'3'" | whole numbers from 1
train.training_arguments.per_device_train_batch_size=many | whole numbers from 1
train.training_arguments.gradient_accumulation_steps=0 | whole numbers from 1
train.training_arguments.save_total_limit=0 | whole numbers from 1
train.training_arguments.logging_steps=0 | whole numbers from 1
train.training_arguments.logging_steps=2.5 | or a share below 1
train.training_arguments.warmup_steps=-3 | whole numbers from 0
train.training_arguments.logging_first_step=often | true and false
train.training_arguments.optim=foo | adamw_torch
train.training_arguments.optim=galore_adamw | adafactor
train.training_arguments.lr_scheduler_type=reduce_lr_on_plateau | linear, cosine
train.training_arguments.train_sampling_strategy=alphabet | group_by_length, random, sequential
train.training_arguments.save_strategy=best | no, steps, epoch
train.training_arguments.report_to=abacus | null, tensorboard
train.training_arguments.report_to=[7] | allowed are null
train.training_arguments.save_steps=10 | no effect beside save_strategy=no
train.training_arguments.output_dir=mine | no effect beside save_strategy=no
train.training_arguments.run_name=first | no effect without a tracker
train.training_arguments.logging_steps=2 train.training_arguments.logging_strategy=epoch | no effect beside
train.training_arguments.optim=sgd train.training_arguments.adam_beta1=0.8 | no effect beside optim=sgd
train.training_arguments.num_train_epochs=3 train.training_arguments.max_steps=9 | give one of them
federation.training_arguments.num_train_epochs=3 federation.training_arguments.max_steps=9 | give one of them
federation.training_arguments.learning_rate=1e-3 | train.learning_rate_max
federation.training_arguments.save_strategy=steps | train.save_every_round
federation.training_arguments.warmup_steps=2 | constant_with_warmup
federation.strategy=FedAvg federation.strategy_arguments.eta=0.1 | FedAvg takes none
federation.strategy=FedAdam federation.strategy_arguments.eta=-1 | eta=-1: allowed are numbers from
federation.strategy=FedAdam federation.strategy_arguments.eta_l=0.1 | it is unknown
federation.strategy=FedAdam federation.strategy_arguments.beta_1=2 | beta_1=2
federation.strategy=FedYogi federation.strategy_arguments.beta_2=1 | beta_2=1
federation.strategy=FedAdagrad federation.strategy_arguments.tau=0 | tau=0
federation.strategy=FedAdagrad federation.strategy_arguments.beta_1=0.5 | FedAdagrad takes eta, tau
federation.strategy=FedAvgM federation.strategy_arguments.server_momentum=5 | server_momentum=5
federation.strategy=FedAvgM federation.strategy_arguments.server_learning_rate=.nan | server_learning_rate=nan
federation.strategy=FedAvgM | without server_momentum or server_learning_rate it is FedAvg
federation.strategy=FedProx federation.strategy_arguments.proximal_mu=-1 | proximal_mu=-1
federation.strategy=FedProx | without proximal_mu it is FedAvg
federation.strategy=QFedAvg federation.strategy_arguments.q=-5 | q=-5
federation.strategy=QFedAvg federation.strategy_arguments.train_loss_key=mine | the server app's
federation.strategy=FedTrimmedAvg federation.strategy_arguments.beta=0.5 | beta=0.5
federation.strategy=Krum federation.num_clients=2 federation.strategy_arguments.num_malicious_nodes=10 | needs 23
federation.strategy=Krum federation.strategy_arguments.num_malicious_nodes=1.5 | whole numbers
federation.strategy=Krum federation.fraction_train=0.5 federation.strategy_arguments.num_malicious_nodes=1 | needs 5
federation.strategy=Bulyan federation.strategy_arguments.num_malicious_nodes=1 | Bulyan needs 7 hospitals in a round
federation.strategy=MultiKrum federation.strategy_arguments.num_nodes_to_select=0 | num_nodes_to_select=0
federation.strategy=MultiKrum federation.strategy_arguments.num_nodes_to_select=7 | a round asks 6 hospitals
federation.privacy.record.delta=1e-5 | nothing is protected without epsilon or noise_multiplier
federation.privacy.record.clipping_norm=0.5 | nothing is protected without
federation.privacy.client.clipping_norm=2 | nothing is protected without noise_multiplier
federation.privacy.client.weights=cards | nothing is protected without noise_multiplier
federation.secure_aggregation.value_range=4 | nothing is protected without threshold
federation.privacy.record.epsilon=8 federation.training_arguments.max_grad_norm=1 | max_grad_norm=1: it has no effect
federation.privacy.record.epsilon=8 train.training_arguments.train_sampling_strategy=random | draws its cards by chance
federation.privacy.record.epsilon=8 federation.training_arguments.num_train_epochs=2 | counts its steps beforehand
model.gradient_checkpointing=3 | allowed are true and false
model.lora.use_rslora=-1 | allowed are true and false
federation.compression.error_feedback="2" | allowed are true and false
seed=??? | seed=???: it is left open
dataset.specialties=??? | it is left open
train.training_arguments.max_steps=??? | it is left open
max_steps=4 | did you mean 'train.training_arguments.max_steps'
train.learning_rate=1 | did you mean 'train.training_arguments.learning_rate'
train.batch_size=3 | known: evaluate_split
model.lora.r=4 | peft_lora_r
dataset..name=x | expected 'key.path=value'
seed.=3 | expected 'key.path=value'
dataset.specialties[0]=eye | a list and named settings meet in one place
federation.strategy_arguments=[1] | a list and named settings meet in one place
--seed=3 | expected 'key.path=value'
seed:3 | expected 'key.path=value'
=3 | expected 'key.path=value'
"""
CASES = [tuple(part.strip() for part in line.split(" | ")) for line in REFUSED.strip().splitlines()]


@pytest.mark.parametrize(("overrides", "says"), CASES)
def test_what_cannot_be_right_is_one_line_at_load(overrides, says):
    with pytest.raises(ValueError) as caught:
        config.load("cpu", *overrides.replace("  ", "\t").split(" "))
    said = str(caught.value)
    assert says in said and "\n" not in said and len(said) < 450


def test_the_table_is_as_long_as_it_says():
    assert len(CASES) == len(set(CASES)) >= 130


def test_every_argument_of_the_installed_transformers_is_taken_or_refused_with_a_reason():
    known = {item.name for item in fields(TrainingArguments) if item.init}
    patterns = [one for names in training_arguments.REFUSED for one in names.split()]
    refused = {name for name in known if any(fnmatch(name, one) for one in patterns)}
    assert known == refused | set(training_arguments.TAKEN) and not refused & set(training_arguments.TAKEN)
    assert set(training_arguments.OPTIMIZERS) <= {item.value for item in OptimizerNames}
    assert set(training_arguments.CHOICES["lr_scheduler_type"]) <= {item.value for item in SchedulerType}
    meanings = OmegaConf.load(config.CONF / "training_arguments.yaml")
    assert set(meanings) == set(training_arguments.TAKEN)


def test_of_epochs_and_steps_the_one_said_last_counts(tmp_path):
    epochs, steps = "train.training_arguments.num_train_epochs=2", "train.training_arguments.max_steps=7"
    cfg = config.load("cpu", epochs)
    assert cfg.train.training_arguments.max_steps == -1 and cfg.federation.training_arguments.max_steps == 8
    again = config.load(cfg, steps)
    assert again.train.training_arguments.max_steps == 7 and "num_train_epochs" not in again.train.training_arguments
    assert config.load(OmegaConf.create(OmegaConf.to_yaml(cfg))) == cfg, "as it goes to the hospitals"
    (tmp_path / "both.yaml").write_text("train: {training_arguments: {num_train_epochs: 2, max_steps: 7}}\n")
    with pytest.raises(ValueError, match="train.training_arguments.num_train_epochs=2 beside max_steps=7"):
        config.load(tmp_path / "both.yaml")
    own = config.load("cpu", "federation.training_arguments.num_train_epochs=2")
    assert training.round_config(own).train.training_arguments.max_steps == -1


def test_what_is_taken_has_its_effect(loaded, cards, cfg):
    """On a model of one small layer, where a training takes a moment."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer, base = loaded[1], LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded[1]), **sizes))
    model = models.add_adapter(base, cfg.model.lora)
    few, before = cards[0].select(range(6)), models.get_adapter(model)

    def trained(*changes):
        models.set_adapter(model, before)
        given = ["train.training_arguments.per_device_train_batch_size=3", "train.training_arguments.max_steps=2"]
        changed = config.load(config.load(cfg, *given), *(f"train.training_arguments.{one}" for one in changes))
        record = training.fine_tune(model, tokenizer, few, changed, description=None)
        return record, models.get_adapter(model)

    plain, after = trained()
    assert plain.examples == 6 and trained("num_train_epochs=2")[0].examples == 12
    assert trained("logging_strategy=epoch", "logging_steps=null")[0].history["step"].tolist() == [2]
    assert trained("lr_scheduler_type=constant_with_warmup", "warmup_steps=0.5")[0].history["learning_rate"][0] == 0
    for change in ("weight_decay=0.5", "max_grad_norm=0.001", "optim=sgd", "optim=adafactor", "adam_beta1=0.1",
                   "adam_epsilon=0.1", "train_sampling_strategy=sequential"):  # fmt: skip
        other = trained(change)[1]
        assert any((other[key] != after[key]).any() for key in after), change


WRONG_FILES = {
    "empty": ("", "is empty"),
    "comments": ("# nothing here\n", "is empty"),
    "a list": ("- seed\n", "expected|cannot be read|list"),
    "a word": ("seed\n", "seed: Incompatible value 'None'"),
    "tabs": ("train:\n\tseq_length: 3\n", "cannot be read"),
    "a key twice": ("seed: 1\nseed: 2\n", "duplicate"),
    "steps to save at": (
        "train: {training_arguments: {save_strategy: 'no', save_steps: 5}}\n",
        "save_steps has no effect",
    ),
    "a flag of 3": ("model: {gradient_checkpointing: 3}\n", "allowed are true and false"),
    "left open": ("seed: ???\n", "left open"),
    "a typo": ("sed: 1\n", "did you mean 'seed'"),
    "a number for a section": ("train: 3\n", "do not fit into seed, dataset, model, train, federation: .*Train"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_one_line(tmp_path, name):
    text, says = WRONG_FILES[name]
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        config.load(tmp_path / "mine.yaml")
    assert "\n" not in str(caught.value)


def _lora():
    return config.load("cpu").model.lora


CALLS = {
    "a named setting": (lambda: config.load("cpu", seed=3), "config.load.'cpu', 'seed=3'"),
    "a list of overrides": (lambda: config.load("cpu", ["seed=3"]), "each a text of its own"),
    "a number as override": (lambda: config.load("cpu", 3), "each a text of its own"),
    "a dict": (lambda: config.load({"seed": 3}), "expected cpu, course, gpu, the path of a .yaml file"),
    "nothing": (lambda: config.load(None), "expected cpu, course, gpu"),
    "an empty name": (lambda: config.load(""), "unknown preset ''"),
    "a path without an ending": (lambda: config.load(Path("mine")), "path to a .yaml file"),
    "a part": (lambda: config.load(config.load("cpu").model), "do not fit into seed, dataset, model"),
    "explain a name": (lambda: config.explain("cpu"), "expected a whole configuration"),
    "explain a part": (lambda: config.explain(config.load("cpu").train), "a part of a configuration"),
    "run a name": (lambda: simulation.run("cpu"), "expected a whole configuration"),
    "cards of a name": (lambda: data.load("cpu"), "expected a whole configuration"),
    "a model of a name": (lambda: models.load("cpu"), "expected a whole configuration"),
    "a model of a part": (lambda: models.load(config.load("cpu").model), "expected a whole configuration"),
    "no actors": (lambda: simulation.run(config.load("cpu"), "ray", actors=0), "actors=0: allowed are whole"),
    "half an actor": (lambda: simulation.run(config.load("cpu"), "ray", actors=1.5), "actors=1.5"),
    "another backend": (lambda: simulation.run(config.load("cpu"), "Ray"), "known are in-process, side-by-side, ray"),
    "workers in process": (lambda: simulation.run(config.load("cpu"), workers=2), "workers=2: they are of backend="),
    "no workers": (lambda: simulation.run(config.load("cpu"), "side-by-side", workers=0), "workers=0: allowed"),
    "workers as text": (lambda: simulation.run(config.load("cpu"), "side-by-side", workers="2"), "workers='2': all"),
    "too many workers": (
        lambda: simulation.run(config.load("cpu"), "side-by-side", workers=9999), "fit into",
    ),
    "a client without a name": (
        lambda: simulation.run(config.load("cpu"), "side-by-side", client=lambda m, c: None), "each worker imports it",
    ),
    "side by side with a name": (lambda: simulation.run("cpu", "side-by-side"), "expected a whole configuration"),
    "a port beyond": (lambda: deployment.start(config.load("cpu"), "nowhere", port=99999), "from 1 to 65535"),
    "a port as text": (lambda: deployment.start(config.load("cpu"), "nowhere", port="80"), "port='80'"),
    "a port below": (lambda: deployment.start(config.load("cpu"), "nowhere", port=-1), "from 1 to 65535"),
    "deploy a name": (lambda: deployment.start("cpu", "nowhere"), "expected a whole configuration"),
    "lora as a dict": (
        lambda: communication.estimate("smollm2-135m", {"peft_lora_r": 4}, rounds=1, clients=1), "lora=",
    ),
    "lora as text": (lambda: communication.estimate("smollm2-135m", "cpu", rounds=1, clients=1), "lora=cpu"),
    "half a round": (lambda: communication.estimate("smollm2-135m", _lora(), rounds=1.5, clients=1), "rounds=1.5"),
    "rounds as text": (lambda: communication.estimate("smollm2-135m", _lora(), rounds="2", clients=1), "rounds='2'"),
    "a line as text": (
        lambda: communication.estimate("smollm2-135m", _lora(), rounds=1, clients=1, bandwidth="fast"), "bandwidth=",
    ),
    "an endless line": (
        lambda: communication.estimate("smollm2-135m", _lora(), rounds=1, clients=1, bandwidth=float("inf")), "bandw",
    ),
    "a layer that is not there": (
        lambda: communication.parameter_counts(
            "smollm2-135m", config.load("cpu", "model.lora.target_modules=[q_proj,nope]").model.lora
        ),
        "no layer is named nope; layers here: .*q_proj",
    ),
    "both parts as cards": (
        lambda: training.fine_tune(None, None, ([], []), config.load("cpu")), "train, test = data.load",
    ),
    "a share below 0": (lambda: data.split(Dataset.from_list([]), -1), "train.evaluate_split=-1: allowed is a share"),
    "a share of all": (lambda: data.split(Dataset.from_list([]), 1.0), "train.evaluate_split=1.0"),
    "no card of each": (
        lambda: data.choose(Dataset.from_list([{"specialty": "eye"}]), None, 0),
        "dataset.max_cards_per_specialty=0: allowed is 1",
    ),
    "one option": (lambda: multiple_choice.from_cards([], [], 1), "n_options=1: allowed are whole numbers from 2"),
    "no questions": (lambda: multiple_choice.choose(None, None, [], None), "questions: there are none"),
    "many copies of a card": (
        lambda: client_app.cards_of_round(
            Dataset.from_list([{"question": "q", "answer": "a"}] * 51),
            config.load("cpu", "federation.training_arguments.per_device_train_batch_size=500"), 1,
        ),
        "batch_size=500: hospital 0 has 51 cards",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_one_line(name):
    call, says = CALLS[name]
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


CHANGES = {
    "a field": lambda cfg: setattr(cfg, "seed", 3),
    "a key": lambda cfg: cfg.model.lora.__setitem__("peft_lora_r", 4),
    "an argument": lambda cfg: cfg.train.training_arguments.update({"max_steps": 3}),
    "a list": lambda cfg: cfg.dataset.specialties.append("ear"),
    "an item": lambda cfg: cfg.dataset.specialties.pop(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_who_changes_a_configuration_is_told_how(name):
    cfg = config.load("cpu")
    with pytest.raises(ReadonlyConfigError, match=r"config.load\(cfg, '[a-z_.]+=…'\) gives a changed one") as caught:
        CHANGES[name](cfg)
    assert "\n" not in str(caught.value) and cfg == config.load("cpu") and isinstance(cfg, DictConfig)


def test_settings_that_fit_nobody_are_said_before_anyone_trains(monkeypatch):
    monkeypatch.setattr(scoring, "score_answers", None)  # nothing gets as far as a model
    small = ["dataset.max_cards_per_specialty=12", "federation.training_arguments.per_device_train_batch_size=90"]
    with pytest.raises(ValueError, match="batch_size=90: hospital 0 has 10 cards"):
        simulation.run(config.load("cpu", *small), progress=False)
    with pytest.raises(ValueError, match="batch_size=90: a hospital has 10 cards, allowed are 1 to that"):
        simulation.run(config.load("cpu", *small, "federation.privacy.record.epsilon=8"), progress=False)


TAKEN = """
cpu | federation.strategy=Krum federation.num_clients=3
cpu | federation.privacy.record.epsilon=8 federation.privacy.record.delta=1e-5
cpu | federation.strategy=FedProx federation.strategy_arguments.proximal_mu=0.1 federation.aggregation=FLoRA
gpu | train.training_arguments.lr_scheduler_type=constant
gpu | train.training_arguments.save_strategy=no
gpu | train.training_arguments.num_train_epochs=1 federation.training_arguments.num_train_epochs=1
course | train.training_arguments.save_steps=5 model.dtype=float32 model.quantization=null
course | federation.secure_aggregation.threshold=4 federation.aggregation=FFA-LoRA
"""


@pytest.mark.parametrize("line", TAKEN.strip().splitlines())
def test_what_is_sensible_is_taken(line):
    preset, _, overrides = line.partition(" | ")
    cfg = config.load(preset, *overrides.split())
    assert config.load(OmegaConf.create(OmegaConf.to_yaml(cfg))) == cfg, "as it goes to the hospitals"


def test_a_path_is_taken_as_it_was_typed():
    assert config.load("cpu", "model.name=~/my #1 model").model.name == "~/my #1 model"
    given = config.load("gpu", "train.training_arguments.output_dir=runs/a #2").train.training_arguments
    assert given.output_dir == "runs/a #2"


def test_blanks_around_the_sign_are_no_part_of_a_setting():
    assert config.load("cpu", "seed = 3").seed == 3
