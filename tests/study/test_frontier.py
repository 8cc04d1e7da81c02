"""Quality against bytes: arms that differ in what they say."""

import pytest

from fedllm_helpers import config
from fedllm_helpers.models import editing
from fedllm_helpers.study import frontier, lab

CFG = config.load("cpu", "federation.threads=1", *lab.SETTINGS)


@pytest.mark.parametrize("arm", frontier.ARMS)
def test_every_arm_is_what_its_name_says(arm):
    cfg = frontier.settings(CFG, arm, 2, "iid")
    size = int(arm.split(" r ")[1].split(",")[0])
    assert (cfg.seed, cfg.federation.partition, cfg.model.lora.peft_lora_r) == (2, "iid", size)
    assert editing.scaling(cfg.model.lora) == frontier.SCALE and cfg.model.lora.core == arm.startswith("LoRA-XS")
    assert cfg.federation.aggregation == ("LoRA-XS" if arm.startswith("LoRA-XS") else "FedIT")
    assert len(cfg.model.lora.target_modules or ()) == (7 if arm.endswith(", all") else 0)
    packed = cfg.federation.compression
    assert (packed.up, packed.keep) == ("int4" if "int4" in arm else "int8" if "int8" in arm else "fp32",
                                        0.1 if "top 10 %" in arm else 1.0)  # fmt: skip


def test_lora_at_rank_16_is_the_federation_of_the_other_grid():
    assert frontier.settings(CFG, "LoRA r 16") == CFG
