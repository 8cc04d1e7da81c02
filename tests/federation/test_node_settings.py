"""A node without cards of its own, or with a misspelt setting, does nothing; one that only plays a hospital says so."""

import pytest
import tiny
from flwr.app import Context, RecordDict
from omegaconf import OmegaConf

from fedllm_helpers.federation import client_app, node_settings
from fedllm_helpers.grids import in_process

NODE = {"partition-id": 1, "num-partitions": 3}
WRONG = {
    "no cards": ({}, "names no folder of cards", "--node-config names no cards"),
    "data misspelt": (
        {"dta": "/private/cards"},
        "a setting that is unknown",
        "'dta' in --node-config; did you mean 'data'?",
    ),
    "policy misspelt": (
        {"data": "/private/cards", "polcy": "/private/policy.yaml"},
        "a setting that is unknown",
        "'polcy' in --node-config; did you mean 'policy'?",
    ),
    "of another app": (
        {"data": "/private/cards", "gpu": 3},
        "a setting that is unknown",
        "'gpu' in --node-config; known are",
    ),
}


def node(**more):
    text = OmegaConf.to_yaml(tiny.settings(hospitals=3))
    return Context(1, 2, NODE | more, RecordDict(), {"config": text})


@pytest.mark.parametrize("given, told, logged", WRONG.values(), ids=WRONG)
def test_a_node_without_cards_or_with_a_misspelt_setting_does_nothing(given, told, logged, caplog):
    with pytest.raises(ValueError, match=told) as error:
        client_app.node_cards(node(**given), 1)
    assert (
        "\n" not in str(error.value)
        and "/private" not in str(error.value)
        and str(error.value).startswith("hospital 1")
    )
    assert logged in caplog.text and "/private" not in caplog.text


def test_it_says_so_when_it_introduces_itself():
    with in_process.InProcessGrid(client_app.app, 3, dict(node().run_config)) as grid:
        for more, fails in ((NODE, True), (NODE | {"simulated": True}, False)):
            grid.names = lambda number, more=more: more
            (reply,) = grid.send_and_receive([tiny.Message(RecordDict(), 2, "query")])
            assert reply.has_error() == fails, more


def test_a_simulated_node_takes_its_share_of_the_configured_dataset():
    assert node_settings.simulated(node(simulated=True)) and not node_settings.simulated(node())
    train, test = client_app.node_cards(node(simulated=True), 1)
    assert len(train) and train.to_list() == client_app.own_cards(tiny.settings(hospitals=3), 1)[0].to_list()
