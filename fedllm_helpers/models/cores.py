"""LoRA-XS in a model: an r × r core between two frozen factors is all that a layer trains. Taught in notebook 04.

With the singular value decomposition W = U·S·Vᵀ of a layer's weight, shape (outputs, inputs), the update is
α/r · P·R·A, with P = U_r·S_r, shape (outputs, r), and A = V_rᵀ, shape (r, inputs) (Bałazy et al. 2024,
arXiv:2405.17604). The core R starts at zero. P and A come from the weights as they are stored, never from data, in
float64 and with fixed signs: all machines find the same ones, to rounding, in whatever format they hold the model.

PEFT's PSOFT, without its orthogonality, trains such a core too. It takes factors from the weights as held, in float32
and with any sign, so that cores of two machines need not fit; and it knows no weights in few bits, and Opacus not it.
"""

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedllm_helpers import hub


class Factor(torch.nn.Module):
    """A LoRA layer's A that never moves: no parameter, and in no state."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A·x, shape (…, r)."""
        return torch.nn.functional.linear(x, self.weight)


class Core(torch.nn.Module):
    """A LoRA layer's B = P·R, of which R alone is trained."""

    def __init__(self, basis: torch.Tensor) -> None:
        super().__init__()
        size = basis.shape[1]
        self.core = torch.nn.Linear(size, size, bias=False, device=basis.device, dtype=basis.dtype)
        torch.nn.init.zeros_(self.core.weight)
        self.register_buffer("basis", basis, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """B, shape (outputs, r), for whoever merges the adapter or saves it."""
        return self.basis @ self.core.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """P·R·x, shape (…, outputs)."""
        return torch.nn.functional.linear(self.core(x), self.basis)


def put_in(model: PeftModel, where: str | None = None) -> None:
    """Make cores of a model's LoRA layers; ``models.get_adapter`` then has the cores alone, r × r for each layer.

    Args:
        model: with a fresh adapter; one without memory (device ``meta``) gets cores of the right size, to be counted.
        where: folder or hub id of the base model. It is read once more, as it is stored, where the model holds its
            weights in another format; None: the weights as the model holds them.

    Raises:
        ValueError: a layer is not linear, or smaller than the rank; or its weights are stored, or without ``where``
            held, in few bits.
    """
    layers = _layers(model)
    for name, layer in layers.items():
        size, largest = layer.r["default"], min(layer.in_features, layer.out_features)
        if not isinstance(layer.get_base_layer(), (torch.nn.Linear, Conv1D)):
            raise ValueError(f"LoRA-XS: {name} is no linear layer; leave it out of model.lora.target_modules")
        if size > largest:
            shape = f"{layer.out_features} × {layer.in_features}"
            raise ValueError(f"model.lora.peft_lora_r={size}: {name} is {shape}, and its core goes up to {largest}")
    weights = _as_stored(model, where)
    for name, layer in layers.items():
        start, weight = layer.lora_A["default"].weight, weights[name].weight.detach()
        shapes = ((layer.out_features, size := layer.r["default"]), (size, layer.in_features))
        if weight.is_meta:
            basis, first = (torch.empty(shape, device="meta") for shape in shapes)
        else:
            turned = weight.T if isinstance(weights[name], Conv1D) else weight  # which holds (inputs, outputs)
            both = bases(turned.double().cpu().numpy(), size)
            basis, first = (torch.from_numpy(one).to(start.device, start.dtype) for one in both)
        layer.lora_A["default"], layer.lora_B["default"] = Factor(first), Core(basis)


def bases(weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, A) of a weight, in float32: its largest singular values with their vectors, left and right.

    The largest entry of each row of A is positive.
    """
    if 4 * size < min(weight.shape) and weight.any():  # ARPACK, to machine precision, from the same start everywhere
        u, s, vt = scipy.sparse.linalg.svds(weight, k=size, v0=np.ones(min(weight.shape)))
        u, s, vt = u[:, ::-1], s[::-1], vt[::-1]
    else:
        u, s, vt = scipy.linalg.svd(weight, full_matrices=False)
        u, s, vt = u[:, :size], s[:size], vt[:size]
    sign = np.sign(np.take_along_axis(vt, np.abs(vt).argmax(1)[:, None], 1))
    return (u * s * sign.T).astype(np.float32), (vt * sign).astype(np.float32)


def tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The cores themselves, by the names that they have on their way; {} for a model that has none."""
    found = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Core))
    return {f"{name.removesuffix('.default')}.core.weight": layer.core.weight for name, layer in found}


def plain(model: PeftModel) -> dict[str, torch.Tensor]:
    """The state of an adapter of cores as that of a LoRA adapter: A, and B = P·R, by the names of parameters."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for part in ("lora_A", "lora_B"):
                found[f"{name}.{part}.default.weight"] = getattr(layer, part)["default"].weight.detach()
    return found


def solved(model: PeftModel, adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The cores of a LoRA adapter that was saved from such a model.

    Raises:
        ValueError: it has other factors, so that no core makes it.
    """
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        ours, basis = (layer.lora_A["default"].weight, layer.lora_B["default"].basis)
        first, second = (adapter.get(f"{name}.{part}.weight") for part in ("lora_A", "lora_B"))
        fits = first is not None and first.shape == tuple(ours.shape) and np.allclose(first, ours.cpu(), atol=1e-4)
        core = np.linalg.lstsq(basis.double().cpu().numpy(), second.astype(float), rcond=None)[0] if fits else 0
        if not fits or np.linalg.norm(basis.cpu().numpy() @ core - second) > 1e-3 * np.linalg.norm(second):
            raise ValueError(f"no core makes this adapter: {name.removeprefix('base_model.model.')} has other factors")
        found[f"{name}.lora_B.core.weight"] = core.astype(np.float32)
    return found


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    found = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    return {name.removeprefix("base_model.model."): layer for name, layer in found}


def _as_stored(model: PeftModel, where: str | None) -> dict[str, torch.nn.Module]:
    """The layers by name, with their weights as they are stored: the model's own, or those of a second copy."""
    own = {name: layer.get_base_layer() for name, layer in _layers(model).items()}
    if where and any(layer.weight.dtype != torch.float32 for layer in own.values()):
        shape = hub.from_pretrained(AutoConfig, where)
        if getattr(shape, "quantization_config", None):
            raise ValueError(
                "LoRA-XS needs the singular vectors of whole weights, and this model is stored in few bits"
            )
        if any(layer.weight.dtype != shape.dtype for layer in own.values()):
            copy = hub.from_pretrained(AutoModelForCausalLM, where, dtype="auto")
            return {name: layer for name, layer in copy.named_modules() if name in own}
    for name, layer in own.items():
        if not layer.weight.is_floating_point():
            raise ValueError(f"LoRA-XS needs the singular vectors of whole weights, and {name} is held in few bits")
    return own
