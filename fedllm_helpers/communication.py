"""What is sent: parameters and bytes of a model and its adapter, by its configuration alone."""

from dataclasses import dataclass
from importlib.resources import files

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from fedllm_helpers import models


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: of the base model with its adapter, and of the adapter alone."""

    total: int
    trainable: int

    @property
    def share(self) -> float:
        """Trainable part of the total, 0 to 1."""
        return self.trainable / self.total


def architecture(name: str) -> PreTrainedConfig:
    """The shape of a model: from the package for those it knows, else from a folder or the hub. No weights."""
    known = OmegaConf.to_container(OmegaConf.load(str(files("fedllm_helpers") / "conf" / "architectures.yaml")))
    if name in known:
        return AutoConfig.for_model(**known[name])
    return models.from_pretrained(AutoConfig, models.locate(name))


def parameter_counts(name: str, lora: DictConfig) -> ParameterCounts:
    """Count parameters by configuration alone: the model is laid out without memory for its weights."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(architecture(name))
        model = models.add_adapter(base, lora)
    trainable, total = model.get_nb_trainable_parameters()
    return ParameterCounts(total, trainable)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes that a model's parameters and buffers take in memory; quantised ones as they are stored."""
    quantised = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    scales = sum(state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0) for state in quantised)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) + scales
