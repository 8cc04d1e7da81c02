"""Settings that a rule of combining adapters does not go with: said in one line, before anyone trains."""

from omegaconf import DictConfig

from fedllm_helpers import factors
from fedllm_helpers.models import Adapter
from fedllm_helpers.rules import BY_PRODUCT, EDITING, MIXED

# strategies that keep no factors from one round to the next
FORGETFUL = ("FedAvg", "FedProx", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "QFedAvg")


def check(cfg: DictConfig) -> None:
    """Settings that the rule does not go with.

    Raises:
        ValueError: in one line.
    """
    how = cfg.federation
    rule, ranks, where = how.aggregation, how.ranks, f"federation.aggregation={how.aggregation}"
    if ranks is not None and rule not in MIXED:
        raise ValueError(f"federation.ranks: {rule} needs equal ranks; set it to null, or take {' or '.join(MIXED)}")
    if ranks is not None and len(ranks) != how.num_clients:
        raise ValueError(f"federation.ranks: {len(ranks)} ranks for {how.num_clients} hospitals; give one for each")
    odd = next((r for r in ranks or () if not 1 <= r <= cfg.model.lora.peft_lora_r), None)
    if odd is not None:
        raise ValueError(
            f"federation.ranks: {odd}; allowed are 1 to model.lora.peft_lora_r={cfg.model.lora.peft_lora_r}"
        )
    private = how.privacy.record.epsilon is not None or how.privacy.record.noise_multiplier is not None
    if ranks is not None and private:
        raise ValueError("federation.ranks: DP-SGD would add noise to ranks that a hospital has not; set it to null")
    if rule in EDITING and cfg.model.quantization is not None:
        bits = f"model.quantization={cfg.model.quantization}"
        raise ValueError(f"{where}: it edits the base model, and {bits} cannot hold an edit; set that to null")
    if rule in EDITING and {"lm_head", "embed_out"} & set(cfg.model.lora.target_modules or ()):
        raise ValueError(f"{where}: the last layer may share its weights with the first one, and is not edited")
    if rule in BY_PRODUCT:
        _check_products(cfg, where)
    if rule == "RoLoRA" and how.strategy not in FORGETFUL:
        raise ValueError(
            f"{where}: {how.strategy} remembers both factors, and one rests; allowed are {', '.join(FORGETFUL)}"
        )


def _check_products(cfg: DictConfig, where: str) -> None:
    how = cfg.federation
    if how.strategy not in ("FedAvg", "FedProx"):
        raise ValueError(f"{where}: it combines products itself; allowed strategies are FedAvg and FedProx")
    if how.secure_aggregation.threshold is not None or how.privacy.client.noise_multiplier is not None:
        raise ValueError(
            f"{where}: masks, and noise on the average, need a mean of what is sent: take FFA-LoRA or FedIT"
        )
    if how.aggregation == "FLoRA" and how.compression.down != "fp32":
        raise ValueError(
            f"{where}: stacks come down, and they are not compressed; set federation.compression.down=fp32"
        )
    packed = how.compression.up != "fp32" or how.compression.keep < 1
    if how.aggregation in MIXED and packed and how.compression.error_feedback:
        raise ValueError(
            f"{where}: its factors are others in every round, so that what one update lost does not fit the next; set "
            "federation.compression.error_feedback to false"
        )


def check_shapes(cfg: DictConfig, adapter: Adapter) -> None:
    """Raise ValueError, before anyone trains, for layers without factors A and B, and for FlexLoRA's rank too large."""
    if cfg.federation.aggregation != "FedIT":
        factors.pairs(adapter)
    if cfg.federation.aggregation == "FlexLoRA":
        for layer, (first, second) in factors.pairs(adapter).items():
            largest = min(second.shape[0], first.shape[1])
            if first.shape[0] > largest:
                raise ValueError(f"model.lora.peft_lora_r={first.shape[0]}: {layer!r} has no rank above {largest}")
