"""What a run promises, and settings that would break it or that protect nothing: from the configuration alone."""

from dataclasses import fields

from omegaconf import DictConfig

from fedllm_helpers.config import training_arguments
from fedllm_helpers.config.rounds import asked, within_a_round
from fedllm_helpers.config.schema import ClientPrivacy, RecordPrivacy, ScorePrivacy, SecureAggregation


def promises(cfg: DictConfig) -> tuple[bool, bool, bool]:
    """Whether there is DP-SGD, noise on the average, and masks."""
    how = cfg.federation.privacy
    private = how.record.epsilon is not None or how.record.noise_multiplier is not None
    return private, how.client.noise_multiplier is not None, cfg.federation.secure_aggregation.threshold is not None


def check(cfg: DictConfig) -> None:
    """Raise ValueError, in one line, for protections that contradict each other, or that nobody keeps."""
    _check_privacy(cfg)
    _check_promises(cfg)


def _check_privacy(cfg: DictConfig) -> None:
    how, secure = cfg.federation.privacy, cfg.federation.secure_aggregation.threshold
    if how.record.epsilon is not None and how.record.noise_multiplier is not None:
        raise ValueError(
            f"federation.privacy.record: epsilon={how.record.epsilon} and "
            f"noise_multiplier={how.record.noise_multiplier} are both set; the one follows from the other, so set one"
        )
    if how.record.cards_per_patient is not None and not promises(cfg)[0] and how.scores.epsilon is None:
        raise ValueError("federation.privacy.record.cards_per_patient says whom DP-SGD protects: set epsilon, too")
    if any(promises(cfg)):
        _check_silence(cfg)
    if promises(cfg)[0]:
        _check_dp_sgd(cfg)
    if secure and cfg.federation.compression.up != "fp32":
        raise ValueError("federation.compression.up: masked updates have a format of their own; set it to fp32")
    if secure and cfg.federation.compression.keep < 1:
        raise ValueError("federation.compression.keep: the largest values are not the same everywhere; set it to 1")
    if secure and not asked(cfg) / 2 < secure <= asked(cfg):
        raise ValueError(
            f"federation.secure_aggregation.threshold={secure}: a round asks {asked(cfg)} hospitals; allowed is more "
            "than half of them, up to all"
        )
    if how.client.noise_multiplier is not None and how.client.delta >= 1 / cfg.federation.num_clients:
        raise ValueError(
            f"federation.privacy.client.delta={how.client.delta} is not below 1 / {cfg.federation.num_clients} "
            "hospitals: it promises nothing; make it smaller"
        )


def _check_silence(cfg: DictConfig) -> None:
    """Where privacy is promised, losses stay with those who have the cards."""
    if cfg.federation.strategy == "QFedAvg":
        raise ValueError("federation.strategy=QFedAvg: it weights by losses, and with privacy they stay at home")
    scored = f"federation.fraction_evaluate={cfg.federation.fraction_evaluate}"
    if cfg.federation.fraction_evaluate and promises(cfg)[1]:
        raise ValueError(
            f"{scored}: noise on a score hides one card, and federation.privacy.client promises to hide a hospital; "
            "set this to 0"
        )
    if cfg.federation.fraction_evaluate and cfg.federation.privacy.scores.epsilon is None:
        raise ValueError(
            f"{scored}: hospitals' scores would leave unprotected; set federation.privacy.scores.epsilon, and they get "
            "noise, or set this to 0"
        )
    if training_arguments.trackers(within_a_round(cfg).get("report_to")):
        raise ValueError(
            "federation.training_arguments.report_to: hospitals' losses would leave unprotected; set it to none"
        )


def _check_dp_sgd(cfg: DictConfig) -> None:
    given, where = within_a_round(cfg), "federation.training_arguments"
    if given.get("max_steps", -1) < 1:
        raise ValueError(f"{where}.max_steps: DP-SGD counts its steps beforehand; set it from 1")
    if given.get("gradient_accumulation_steps", 1) != 1:
        raise ValueError("gradient_accumulation_steps: DP-SGD takes one batch a step; set it to 1")
    for name, why in (
        ("max_grad_norm", "each card's gradient is clipped instead, to federation.privacy.record.clipping_norm"),
        ("train_sampling_strategy", "every step draws its cards by chance"),
    ):
        if given.get(name) is not None:
            raise ValueError(f"{where}.{name}={given[name]}: it has no effect with DP-SGD, where {why}; set it to null")
    if cfg.model.gradient_checkpointing:
        raise ValueError("model.gradient_checkpointing=true: per-card gradients need the activations; set it to false")
    if cfg.federation.strategy == "FedProx":
        raise ValueError("federation.strategy=FedProx: its pull would be added to gradients that are clipped and noisy")


def _check_promises(cfg: DictConfig) -> None:
    """What someone set about a protection that is not there: they believe in a promise that nobody keeps."""
    how, (private, noisy, masked) = cfg.federation, promises(cfg)
    if how.privacy.scores.epsilon is not None and not how.fraction_evaluate:
        raise ValueError("federation.privacy.scores.epsilon: no hospital scores; set federation.fraction_evaluate, too")
    scored = how.privacy.scores.epsilon is not None
    for there, key, schema, settings, needed in (
        (private, "privacy.record", RecordPrivacy, how.privacy.record, "epsilon or noise_multiplier"),
        (noisy, "privacy.client", ClientPrivacy, how.privacy.client, "noise_multiplier"),
        (scored, "privacy.scores", ScorePrivacy, how.privacy.scores, "epsilon"),
        (masked, "secure_aggregation", SecureAggregation, how.secure_aggregation, "threshold"),
    ):
        for item in () if there else fields(schema):
            if item.name == "cards_per_patient" and scored:
                continue  # patients whose scores are protected
            if settings[item.name] != item.default:
                raise ValueError(
                    f"federation.{key}.{item.name}={settings[item.name]}: nothing is protected without {needed}; set "
                    f"that, too, or leave this at {item.default}"
                )
