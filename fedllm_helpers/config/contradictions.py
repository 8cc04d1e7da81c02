"""Settings that do not go together, and settings without an effect: all of them, from the configuration alone.

What needs the cards or the model is said where they are known: batches and promises by
:func:`client_app.check_cards`, ranks by :func:`rules.check_shapes`.
"""

import logging

from omegaconf import DictConfig, OmegaConf

from fedllm_helpers.config import protections, strategy_arguments, training_arguments
from fedllm_helpers.config.protections import promises
from fedllm_helpers.config.rounds import asked, within_a_round
from fedllm_helpers.config.schema import AVERAGING, BY_PRODUCT, EDITING, MIXED

logger = logging.getLogger(__name__)
# strategies that keep no factors from one round to the next
FORGETFUL = ("FedAvg", "FedProx", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "QFedAvg")
# training arguments that have an effect only where another one has, or has not, a value
SCHEDULES = [name for name in training_arguments.CHOICES["lr_scheduler_type"] if name != "constant"]
BESIDE = {
    "warmup_steps": ("lr_scheduler_type", "linear", SCHEDULES),
    "logging_steps": ("logging_strategy", "steps", ("steps",)),
    "save_steps": ("save_strategy", "steps", ("steps",)),
    "save_total_limit": ("save_strategy", "steps", ("steps", "epoch")),
    "output_dir": ("save_strategy", "steps", ("steps", "epoch")),
}


def check(cfg: DictConfig, said: set[str] = frozenset()) -> None:
    """Raise ValueError, in one line, for settings that contradict each other or would do nothing.

    Args:
        cfg: every value of which is within its own limits.
        said: keys that the call itself gave: where one of them does nothing beside a preset's other settings, it is
            refused; a preset's own may stand idle.
    """
    _check_rounds(cfg)
    _check_training(cfg, said)
    protections.check(cfg)
    _check_strategy(cfg)
    strategy_arguments.check(cfg.federation, asked(cfg))
    _check_rule(cfg)
    training_arguments.check_trackers(cfg.federation.report_to)


def _check_rounds(cfg: DictConfig) -> None:
    if cfg.train.learning_rate_min > cfg.train.learning_rate_max:
        raise ValueError(
            f"train.learning_rate_min={cfg.train.learning_rate_min} is above "
            f"train.learning_rate_max={cfg.train.learning_rate_max}: the rate falls over the rounds"
        )
    if cfg.federation.min_replies > asked(cfg):
        raise ValueError(f"federation.min_replies={cfg.federation.min_replies}: a round asks {asked(cfg)} hospitals")
    if cfg.federation.partition != "dirichlet" and cfg.federation.dirichlet_alpha != 0.5:
        said = f"federation.dirichlet_alpha={cfg.federation.dirichlet_alpha} has no effect"
        logger.warning("%s beside federation.partition=%s", said, cfg.federation.partition)


def _check_training(cfg: DictConfig, said: set[str]) -> None:
    own = OmegaConf.to_container(cfg.train.training_arguments)
    for section, given in (("train", own), ("federation", within_a_round(cfg))):
        where, mine = f"{section}.training_arguments", OmegaConf.to_container(cfg[section].training_arguments)
        said_here = {name for name, value in mine.items() if f"{where}.{name}" in said and value not in (None, 0)}
        for name in sorted(said_here & BESIDE.keys()):
            other, default, allowed = BESIDE[name]
            value = given.get(other) or default
            if value not in allowed:
                raise ValueError(
                    f"{where}.{name} has no effect beside {other}={value}; allowed are {', '.join(allowed)}"
                )
        if "run_name" in said_here and not training_arguments.trackers(given.get("report_to")):
            raise ValueError(f"{where}.run_name has no effect without a tracker; set report_to")
        optimizer = given.get("optim") or "adamw_torch_fused"
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if mine.get(name) is not None and name not in training_arguments.OPTIMIZERS[optimizer]:
                raise ValueError(f"{where}.{name} has no effect beside optim={optimizer}; leave it out")


def _check_strategy(cfg: DictConfig) -> None:
    name, (_, noisy, masked), keep = cfg.federation.strategy, promises(cfg), cfg.federation.compression.keep
    if (noisy or masked) and name not in AVERAGING:
        raise ValueError(
            f"federation.strategy={name}: it compares replies, and noise or masks need a mean; allowed are "
            f"{', '.join(AVERAGING)}"
        )
    if keep < 1 and name not in AVERAGING:
        raise ValueError(
            f"federation.compression.keep={keep} with {name}: it compares replies number by number, and few were sent "
            f"by several; allowed are 1, or one of {', '.join(AVERAGING)}"
        )


def _check_rule(cfg: DictConfig) -> None:
    how = cfg.federation
    rule, where = how.aggregation, f"federation.aggregation={how.aggregation}"
    if how.ranks is not None:
        _check_ranks(cfg)
    if cfg.model.lora.core != (rule == "LoRA-XS"):
        said = f"model.lora.core={str(cfg.model.lora.core).lower()}"
        raise ValueError(f"{said} beside {where}: cores go with LoRA-XS, and with no other rule; leave it out")
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


def _check_ranks(cfg: DictConfig) -> None:
    how, ranks, largest = cfg.federation, cfg.federation.ranks, cfg.model.lora.peft_lora_r
    if how.aggregation not in MIXED:
        raise ValueError(
            f"federation.ranks: {how.aggregation} needs equal ranks; set it to null, or take {' or '.join(MIXED)}"
        )
    if len(ranks) != how.num_clients:
        raise ValueError(f"federation.ranks: {len(ranks)} ranks for {how.num_clients} hospitals; give one for each")
    odd = next((r for r in ranks if not 1 <= r <= largest), None)
    if odd is not None:
        raise ValueError(f"federation.ranks: {odd}; allowed are 1 to model.lora.peft_lora_r={largest}")
    if promises(cfg)[0]:
        raise ValueError("federation.ranks: DP-SGD would add noise to ranks that a hospital has not; set it to null")


def _check_products(cfg: DictConfig, where: str) -> None:
    how, (_, noisy, masked) = cfg.federation, promises(cfg)
    if how.strategy not in ("FedAvg", "FedProx"):
        raise ValueError(f"{where}: it combines products itself; allowed strategies are FedAvg and FedProx")
    if noisy or masked:
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
