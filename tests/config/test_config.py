"""Every key has an effect, and every wrong value is one clear line."""

import math

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from fedllm_helpers import communication, config, data, models, training
from fedllm_helpers.training import batches

COURSE = """
dataset: {name: medalpaca/medical_meadow_medical_flashcards}
model:
  name: EleutherAI/pythia-70m
  quantization: 4
  gradient_checkpointing: true
  lora: {peft_lora_r: 16, peft_lora_alpha: 64, target_modules: null}
train:
  save_every_round: 5
  seq_length: 512
  padding_side: left
  training_arguments:
    learning_rate: 5e-4
    per_device_train_batch_size: 2
    gradient_accumulation_steps: 1
    logging_steps: 1
    max_steps: 5
    report_to: null
    save_steps: 200
    save_total_limit: 10
    lr_scheduler_type: cosine
"""


def test_course_says_exactly_what_the_course_says():
    ours = config.load("course")
    wanted = OmegaConf.create(COURSE)
    assert OmegaConf.merge(ours, wanted) == ours
    assert set(ours.train.training_arguments) == set(wanted.train.training_arguments)


@pytest.mark.parametrize("preset", config.PRESETS)
def test_presets_load_and_are_explained_in_full(preset):
    loaded = config.load(preset)
    explained = config.explain(loaded)
    assert (explained["meaning"].str.len() > 5).all()
    leaves = {key.split("=")[0] for key in OmegaConf.to_container(loaded.train.training_arguments)}
    assert leaves <= {key.split(".")[-1] for key in explained["key"]}
    assert not explained["meaning"].eq("passed to transformers.TrainingArguments as it is").any()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.lora.peft_lora_rank=8", "did you mean 'model.lora.peft_lora_r'"),
        ("modle.name=x", "did you mean 'model'"),
        ("model.lora.peft_lora_r=0", "from 1 to"),
        ("model.lora.peft_lora_r=many", "expected"),
        ("model.quantization=3", "null, 4, 8"),
        ("model.lora.lora_dropout=1.0", "from 0 to 0.99"),
        ("train.training_arguments.per_device_train_batch_size=0", "whole numbers from 1"),
        ("train.training_arguments.max_step=3", "did you mean 'max_steps'"),
        ("train.training_arguments.learning_rate=-1", "from 1e-12"),
        ("train.training_arguments=3", "train.training_arguments"),
        ("train.seq_length=null", "train.seq_length"),
        ("train.evaluate_split=1.5", "from 0 to 0.9"),
        ("train.learning_rate_min=1", "train.learning_rate_max"),
        ("train.padding_side=top", "left, right"),
        ("federation.fraction_train=1.5", "to 1"),
        ("federation.num_clients=0", "from 1 to"),
        ("dataset.specialties=eye", "list"),
        ("peft_lora_r=8", "did you mean 'model.lora.peft_lora_r'"),
        ("train.training_arguments.lr_scheduler_type=cosin", "cosine"),
        ("train.training_arguments.save_strategy=never", "allowed are no"),
        ("train.training_arguments.logging_steps=many", "whole numbers from 1"),
        ("model.name=${nothing}", "nothing"),
        ("model.name=[", "override"),
        ("seed", "key.path=value"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(override, says):
    with pytest.raises(ValueError) as caught:
        config.load("cpu", override)
    message = str(caught.value)
    assert (
        says in message
        and "\n" not in message
        and any(part in message for part in override.split("=")[0].split(".")[::2])
    )


def test_unknown_preset_missing_file_and_broken_yaml(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'cpu'"):
        config.load("cup")
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        config.load("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- model\n")
    with pytest.raises(ValueError, match="list.yaml"):
        config.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("model: [")
    with pytest.raises(ValueError, match="broken.yaml") as caught:
        config.load(tmp_path / "broken.yaml")
    assert "\n" not in str(caught.value)


def test_no_means_no_where_yaml_reads_false(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {training_arguments: {save_strategy: no}}\n")
    said = "train.training_arguments.save_strategy=no"
    for loaded in (
        config.load(tmp_path / "mine.yaml"),
        config.load("gpu", said),
        config.load(config.load("gpu"), said),
    ):
        assert loaded.train.training_arguments.save_strategy == "no"


def test_a_file_a_config_and_overrides_in_that_order(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {lora: {peft_lora_r: 4}}\n")
    mine = config.load(tmp_path / "mine.yaml", "seed=7")
    assert (mine.model.lora.peft_lora_r, mine.seed) == (4, 7)
    assert config.load(mine, "seed=8").model.lora.peft_lora_r == 4
    with pytest.raises(ReadonlyConfigError):
        mine.seed = 3


# --- every key has an effect; those of the embedded model and of the hub are in test_models.py and test_hub.py


def test_seed_changes_split_adapter_and_order():
    cfg = config.load("cpu", "dataset.max_cards_per_specialty=24")
    other = config.load(cfg, "seed=1")
    assert data.load(cfg)[1]["card_id"] != data.load(other)[1]["card_id"]
    assert list(batches.LengthBatches([3] * 40, 4, seed=0)) != list(batches.LengthBatches([3] * 40, 4, seed=1))
    first, second = (models.get_adapter(models.load(config.load("cpu", f"seed={seed}"))[0]) for seed in (0, 1))
    key = next(key for key in first if "lora_A" in key)
    assert (first[key] != second[key]).any()


@pytest.mark.parametrize(
    ("override", "number"), [("dataset.specialties=[eye]", 240), ("dataset.specialties=null", 3529)]
)
def test_dataset_keys(override, number):
    train, test = data.load(config.load("cpu", override))
    assert len(train) + len(test) >= number
    smaller = data.load(config.load("cpu", override, "dataset.max_cards_per_specialty=10"))
    assert len(smaller[0]) + len(smaller[1]) < len(train) + len(test)


def test_prompt_name_and_seq_length(cards, loaded):
    tokenizer = loaded[1]
    short, course = (batches.encode(cards[0].select(range(4)), tokenizer, 128, name) for name in ("short", "course"))
    assert all(len(c["input_ids"]) > len(s["input_ids"]) for s, c in zip(short, course, strict=True))
    cut = batches.encode(cards[0].select(range(4)), tokenizer, 22)
    assert max(len(row["input_ids"]) for row in cut) == 22


@pytest.mark.parametrize(("share", "held_out"), [("false", 0.0), ("true", 0.1), ("0.25", 0.25)])
def test_evaluate_split(share, held_out):
    train, test = data.load(config.load("cpu", f"train.evaluate_split={share}", "dataset.max_cards_per_specialty=40"))
    assert len(test) / (len(train) + len(test)) == pytest.approx(held_out, abs=0.02)


@pytest.mark.parametrize(
    ("override", "trainable"),
    [
        ("model.lora.peft_lora_r=4", 230_400),
        ("model.lora.target_modules=[k_proj]", 30 * 16 * (576 + 192)),
        ("model.lora.target_modules=null", 921_600),
    ],
)
def test_rank_and_targets_by_configuration_alone(override, trainable):
    cfg = config.load("cpu", override)
    assert communication.parameter_counts(cfg.model.name, cfg.model.lora).trainable == trainable


def test_rounds_follow_the_federation_keys():
    plan = training.rounds(
        config.load(
            "course", "federation.num_rounds=7", "train.save_every_round=3", "federation.num_clients=9",
            "federation.fraction_train=0.5", "train.learning_rate_max=1.0", "train.learning_rate_min=0.2",
        )
    )  # fmt: skip
    assert [r.saved for r in plan] == [False, False, True, False, False, True, True]
    assert {r.clients for r in plan} == {4}
    expected = [0.2 + 0.4 * (1 + math.cos(math.pi * t / 7)) for t in range(7)]
    assert [r.learning_rate for r in plan] == pytest.approx(expected)
