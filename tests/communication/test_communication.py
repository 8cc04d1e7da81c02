"""Counts by configuration alone, against published numbers and the loaded model."""

import re

import numpy as np
import pandas as pd
import pytest

from fedllm_helpers import communication, config, models
from fedllm_helpers.communication import compression, estimates, networks


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


# Parameters as published: https://github.com/EleutherAI/pythia#models, and the safetensors index of each hub id
PUBLISHED = {
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-27b": 27_227_128_320,
}
MIB, GIB, TIB = 2**20, 2**30, 2**40


@pytest.mark.parametrize("name", PUBLISHED)
def test_carried_architectures_have_their_published_parameters(name, cfg):
    counts = communication.parameter_counts(name, cfg.model.lora)
    assert counts.total - counts.trainable == PUBLISHED[name]


def test_the_figures_of_the_course_come_out_for_pythia():
    lora = config.load("course").model.lora
    cost = communication.estimate("EleutherAI/pythia-70m", lora, rounds=2, clients=4)  # 20 % of 20 hospitals
    assert round(cost.model_bytes / MIB, 2) == 269.41 and round(cost.adapter_bytes / MIB, 2) == 0.75
    # its seconds divide MiB by megabits: 107.76 s and 0.30 s; in bytes of eight bits it is 113.0 s and 0.31 s
    assert round(cost.model_bytes / MIB * 8 / 20, 2) == 107.76 and round(cost.adapter_bytes / MIB * 8 / 20, 2) == 0.3
    assert round(cost.model_seconds, 1) == 113.0 and round(cost.adapter_seconds, 2) == 0.31
    assert round(cost.model_total / GIB, 1) == 4.2 and round(cost.adapter_total / MIB, 1) == 12.0
    assert round(cost.ratio, 1) == 359.2


def test_the_figures_of_the_course_come_out_for_mistral():
    lora = config.load("gpu").model.lora
    cost = communication.estimate("mistralai/Mistral-7B-v0.1", lora, rounds=200, clients=16)  # 80 % of 20 hospitals
    assert round(cost.adapter_bytes / MIB) == 26 and round(cost.model_bytes / GIB) == 27
    assert round(cost.adapter_total / GIB, 1) == 162.5 and round(cost.model_total / TIB) == 169
    assert int(cost.ratio) == 1063


def test_a_base_model_is_fetched_once_by_each_participant(cfg):
    cost = communication.estimate(cfg.model.name, cfg.model.lora, rounds=3, clients=2, participants=5)
    assert cost.transfers == 12 and cost.base_download == 5 * 2 * 134_515_008
    assert cost.adapter_total == 12 * 4 * 921_600


@pytest.mark.parametrize("number_format", communication.BITS)
def test_the_formula_counts_what_the_encoding_holds(number_format, cfg, loaded):
    adapter = models.get_adapter(loaded[0])
    rng = np.random.default_rng(0)
    adapter = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in adapter.items()}
    counts = communication.parameter_counts(cfg.model.name, cfg.model.lora)
    held = sum(value.nbytes for value in compression.encode(adapter, number_format).values())
    assert communication.transfer_bytes(counts.trainable, number_format, counts.rows) == held


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bandwidth": 0}, "bandwidth=0: allowed are numbers above 0"),
        ({"bandwidth": -1e6}, "bandwidth=-1000000.0: allowed"),
        ({"bandwidth": float("nan")}, "bandwidth=nan: allowed"),
        ({"rounds": 0}, "rounds=0: allowed are whole numbers from 1"),
        ({"clients": 2.5}, "clients=2.5: allowed are whole"),
        ({"number_format": "int3"}, "number format 'int3': allowed are fp32, fp16, int8, int4"),
        ({"model": None}, "model=None: expected a name, a hub id or a folder"),
        ({"model": 3}, "model=3: expected a name"),
        ({"lora": {"peft_lora_r": 4}}, "expected the adapter's settings, config.load('cpu').model.lora"),
        ({"number_format": ["fp32"]}, "number format ['fp32']: allowed are fp32"),
    ],
)
def test_impossible_questions_are_refused_in_one_line(change, said, cfg):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        communication.estimate(
            **({"model": cfg.model.name, "lora": cfg.model.lora, "rounds": 1, "clients": 1} | change)
        )
    assert "\n" not in str(caught.value)


def test_a_configuration_without_what_is_needed_is_named(tmp_path, cfg):
    faults = {
        '{"model_type": "resnet"}': "does not say 'vocab_size'",
        '{"model_type": "llama", "vocab_size": 9, "hidden_size": 64}': "does not say 'num_hidden_layers'",
        '{"model_type": "llama", "hidden_size": "wide"}': "expected int, got str",
        '{"model_type": "llama", "vocab_size": 9, "hidden_size": 0, "num_hidden_layers": 1}': "not that of a language",
        "{}": "is not whole",
        "no json": "is not whole",
    }
    for text, said in faults.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises((ValueError, OSError), match=said) as caught:
            communication.parameter_counts(str(tmp_path), cfg.model.lora)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_ledger_of_a_run_holds_the_bytes_of_its_messages():
    rows = [(1, client, "used", 4 * 1000 + 40, 504 + 6) for client in range(3)]
    rows += [(1, 3, "no reply", 4040, 0), (1, 4, "it failed", 4040, 77), (2, 0, "it failed", 4040, 77)]
    clients = pd.DataFrame(rows, columns=["round", "client", "status", "bytes_down", "bytes_up"])
    table = communication.ledger(clients, estimates.ParameterCounts(9000, 1000, 0), up="int4")
    down, up = (table[table["direction"] == way].iloc[0] for way in ("down", "up"))
    assert (down["messages"], down["bytes"], down["formula"]) == (5, 20200, 20000)
    assert (up["messages"], up["bytes"], up["formula"]) == (3, 1530, 1500)
    assert down["overhead"] == pytest.approx(0.01) and up["overhead"] == pytest.approx(0.02)
    assert np.isnan(table["overhead"].iloc[-1]), "nobody's update came through"


def test_one_server_saturates_where_its_line_is_as_wide_as_all_of_theirs():
    lines = {"client_bandwidth": 20e6, "server_bandwidth": 10e9}
    flat = networks.network([1, 500, 1000, 1_000_000], 1e6, **lines).set_index("clients")
    assert flat.loc[1, "seconds"] == flat.loc[500, "seconds"] == pytest.approx(2 * 8 / 20)
    assert flat.loc[1000, "seconds"] == pytest.approx(2 * flat.loc[500, "seconds"])
    assert flat.loc[1_000_000, "server_bytes"] == 2e12
    tree = networks.network([1_000_000], 1e6, fan_out=100, **lines).iloc[0]
    assert (tree["levels"], tree["aggregators"], tree["server_bytes"]) == (3, 10_101, 2e8)
    assert tree["seconds"] == pytest.approx(2 * 8 * (1 / 20 + 2 * 100 / 1e4))


def test_a_tree_that_does_not_fill_up_is_counted_right():
    table = networks.network([1, 2, 3, 7], 1.0, fan_out=2)
    assert table["levels"].tolist() == [1, 1, 2, 3]
    assert table["aggregators"].tolist() == [1, 1, 3, 7]  # 7 → 4 + 2 + 1
    for wrong in ({"fan_out": 1}, {"client_bandwidth": 0}, {"server_bandwidth": -1}, {"train_seconds": float("nan")}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
            networks.network([1], 1.0, **wrong)
    with pytest.raises(ValueError, match="clients=0"):
        networks.network([0], 1.0)
