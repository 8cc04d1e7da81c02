"""Training arguments of transformers: those that are taken, within which limits, and why no others are.

An argument that is taken has its effect in :func:`fedllm_helpers.training.fine_tune`. One that a newer transformers
brings is unknown here until somebody has looked at what it does.
"""

import difflib
import math
from fnmatch import fnmatch
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedllm_helpers.config.schema import HIGHEST_RATE

WHOLE = {  # whole numbers, and the largest
    "per_device_train_batch_size": 65536,
    "gradient_accumulation_steps": 65536,
    "max_steps": 1_000_000,
    "save_total_limit": 1_000_000,
}
NUMBERS = {  # from, below or up to
    "learning_rate": (1e-12, HIGHEST_RATE),
    "num_train_epochs": (1e-6, 1_000_000),
    "weight_decay": (0, 1),
    "adam_beta1": (0, 1 - 1e-9),
    "adam_beta2": (0, 1 - 1e-9),
    "adam_epsilon": (1e-30, 1),
    "max_grad_norm": (0, 1e6),  # 0 clips nothing
}
STEPS = {"logging_steps": 1e-6, "save_steps": 1e-6, "warmup_steps": 0}  # below 1 a share of all steps; and the least
FLAGS = ("logging_first_step",)
TEXTS = ("output_dir", "run_name")
OPTIMIZERS = {  # those that are installed, and which of Adam's arguments they take
    **dict.fromkeys(("adamw_torch_fused", "adamw_torch"), ("adam_beta1", "adam_beta2", "adam_epsilon")),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), ("adam_beta1", "adam_beta2", "adam_epsilon")),
    **dict.fromkeys(("paged_adamw_8bit", "paged_adamw_32bit"), ("adam_beta1", "adam_beta2", "adam_epsilon")),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"), ("adam_beta1", "adam_beta2")),
    **dict.fromkeys(("adafactor", "sgd", "adagrad", "rmsprop"), ()),
}
CHOICES = {
    "lr_scheduler_type": (
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    ),
    "optim": tuple(OPTIMIZERS),
    "logging_strategy": ("no", "steps", "epoch"),
    "save_strategy": ("no", "steps", "epoch"),
    "train_sampling_strategy": ("group_by_length", "random", "sequential"),
}  # fmt: skip
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}  # and packages
TAKEN = (*WHOLE, *NUMBERS, *STEPS, *FLAGS, *TEXTS, *CHOICES, "report_to")
REFUSED = {  # patterns of names, and why they have no place here
    "label_smoothing_factor": "labels are aligned with the logits already, and smoothing would shift them once more",
    "eval_* do_eval do_predict *_full_eval per_device_eval_batch_size prediction_loss_only batch_eval_metrics "
    "include_for_metrics include_inputs_for_metrics load_best_model_at_end metric_for_best_model greater_is_better "
    "evaluation_strategy": "a training scores nothing; evaluation.score_answers does, after it",
    "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint enable_jit_checkpoint "
    "save_only_model save_on_each_node save_safetensors": "checkpoints hold the adapter alone, so that a training "
    "starts anew; a federation goes on from its folder",
    "push_to_hub* hub_*": "nothing is uploaded; models.save_adapter writes the folder that one would upload",
    "gradient_checkpointing* activation_checkpointing*": "set model.gradient_checkpointing",
    "bf16 fp16 tf32 fp16_* half_precision_backend": "set model.dtype, which says how products are computed",
    "use_cpu no_cuda use_mps_device": "set model.device",
    "seed data_seed full_determinism": "set seed at the top, which seeds all of a run",
    "dataloader_*": "batches are made from cards in memory, and the last one counts although it is smaller",
    "group_by_length": "set train_sampling_strategy=group_by_length",
    "warmup_ratio": "set warmup_steps, which is a share where it is below 1",
    "remove_unused_columns label_names length_column_name": "the columns are made here",
    "fsdp* deepspeed ddp_* local_rank parallelism_config accelerator_config average_tokens_across_devices "
    "log_on_each_node log_level_replica tpu_*": "one process trains on one device",
    "lr_scheduler_kwargs optim_args optim_target_modules": "schedules and optimisers that are taken need none",
    "auto_find_batch_size": "what was trained and promised would depend on the memory",
    "torch_compile* use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps": "the "
    "model is trained as it was loaded, and left as it was",
    "disable_tqdm": "fine_tune(description=None) leaves the bar out",
    "logging_nan_inf_filter": "a loss that is not finite ends the training",
    "include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics debug log_level logging_dir": "the "
    "record of a training has its losses, examples, tokens and seconds",
    "do_train overwrite_output_dir project trackio_*": "it has no effect here",
}
ROUND = {  # why federation.training_arguments takes no such argument
    "learning_rate": "the rounds set it; set train.learning_rate_max and train.learning_rate_min",
    **dict.fromkeys(
        ("save_strategy", "save_steps", "save_total_limit", "output_dir"),
        "the server keeps the adapters of a federation; set train.save_every_round",
    ),
}


def check(arguments: DictConfig, section: str) -> None:
    """Each argument by itself: known, taken here, and within its limits.

    Raises:
        ValueError: in one line that names the argument and what is allowed.
    """
    for name, value in OmegaConf.to_container(arguments).items():
        where = f"{section}.training_arguments.{name}"
        why = next((why for names, why in REFUSED.items() if any(fnmatch(str(name), one) for one in names.split())), "")
        why = ROUND.get(name, why) if section == "federation" else why
        if why:
            raise ValueError(f"{where}={value} is not taken: {why}")
        if name not in TAKEN:
            close = difflib.get_close_matches(str(name), TAKEN, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"taken are {', '.join(TAKEN)}"
            raise ValueError(f"unknown key {where!r}; {hint}")
        said = _out_of_limits(name, value)
        if value is not None and said:
            raise ValueError(f"{where}={value}: {said}")


def settle(arguments: DictConfig, said: set[str]) -> None:
    """Put what YAML and null mean: ``no``, defaults, and of epochs and steps the one that was said last.

    Args:
        arguments: of one section; changed in place.
        said: names that the call itself gave, which stand above those of a preset or file.

    Raises:
        ValueError: both epochs and steps were given at once.
    """
    for name in ("save_strategy", "logging_strategy"):
        if arguments.get(name) is False:  # what YAML makes of an unquoted no
            arguments[name] = "no"
    defaults = {"max_steps": -1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    arguments.update({name: value for name, value in defaults.items() if name in arguments and arguments[name] is None})
    epochs, steps = arguments.get("num_train_epochs"), arguments.get("max_steps", -1)
    if epochs is None:
        return
    if "max_steps" in said and "num_train_epochs" not in said and steps != -1:
        del arguments["num_train_epochs"]
    elif "num_train_epochs" in said and "max_steps" not in said or steps == -1:
        arguments["max_steps"] = -1
    else:
        raise ValueError(f"num_train_epochs={epochs} beside max_steps={steps}: steps would win; give one of them")


def _out_of_limits(name: str, value: Any) -> str:
    """What is allowed, where the value is not; else nothing."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or isinstance(value, float) and math.isfinite(value)
    if name in WHOLE:
        more = ", or -1 for num_train_epochs" if name == "max_steps" else ""
        fits = whole and (1 <= value <= WHOLE[name] or (name, value) == ("max_steps", -1))
        return "" if fits else f"allowed are whole numbers from 1 to {WHOLE[name]}{more}"
    if name in NUMBERS:
        low, high = NUMBERS[name]
        return "" if number and low <= value <= high else f"allowed are numbers from {low:g} to {high:.10g}"
    if name in STEPS:
        fits = number and STEPS[name] <= value <= 1_000_000 and (value < 1 or value == int(value))
        return "" if fits else f"allowed are whole numbers from {bool(STEPS[name]):d} to 1000000, or a share below 1"
    if name in FLAGS:
        return "" if isinstance(value, bool) else "allowed are true and false"
    if name in TEXTS:
        return "" if isinstance(value, str) and value.strip() else "allowed is a text that is not empty"
    if name == "report_to":
        return _no_tracker(value)
    return "" if value in CHOICES[name] else f"allowed are {', '.join(CHOICES[name])}"


def trackers(value: Any) -> list:
    """The trackers of ``report_to``, as a list; [] for none of them."""
    return [] if value in (None, "none") else value if isinstance(value, list) else [value]


def check_trackers(value: Any) -> None:
    """Raise ValueError, in one line, for what is none of a federation's own trackers; only the server needs them."""
    for name in trackers(value):
        if name not in ("tensorboard", "mlflow"):
            raise ValueError(f"federation.report_to={name!r:.60}: allowed are null, tensorboard, mlflow")


def _no_tracker(value: Any) -> str:
    for name in trackers(value):
        if not isinstance(name, str) or name not in TRACKERS:
            return f"allowed are null, {', '.join(TRACKERS)}"
        if not any(find_spec(package) for package in TRACKERS[name]):
            return f"{name} is not installed: pip install {TRACKERS[name][0]}"
    return ""
