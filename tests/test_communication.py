"""Counts by configuration alone, against published numbers and the loaded model."""

import pytest

from fedllm_helpers import communication, config, models


@pytest.mark.parametrize(
    ("preset", "trainable", "total"),
    [("course", 196_608, 70_623_232), ("gpu", 6_815_744, 7_241_732_096 + 6_815_744), ("cpu", 921_600, 135_436_608)],
)
def test_counts_by_configuration_alone(preset, trainable, total):
    cfg = config.load(preset)
    counts = communication.parameter_counts(cfg.model.name, cfg.model.lora)
    assert (counts.trainable, counts.total) == (trainable, total)
    assert counts.share == trainable / total


def test_the_count_is_that_of_the_loaded_model(loaded, cfg):
    counts = communication.parameter_counts(cfg.model.name, cfg.model.lora)
    assert (counts.trainable, counts.total) == loaded[0].get_nb_trainable_parameters()


def test_a_folder_is_counted_from_its_configuration(tmp_path, cfg):
    communication.architecture("EleutherAI/pythia-70m").save_pretrained(tmp_path)
    assert communication.parameter_counts(str(tmp_path), cfg.model.lora).trainable == 196_608


def test_an_unknown_model_without_a_hub_says_what_to_set(monkeypatch, cfg):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="set model.name to 'smollm2-135m'") as caught:
        communication.parameter_counts("nobody/nothing", cfg.model.lora)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        models.locate("/no/such/model")
