"""LoRA-XS in a model: an r × r core between two frozen factors is all that a layer trains. Taught in notebook 04.

With the singular value decomposition W = U·S·Vᵀ of a layer's weight, shape (outputs, inputs), the update is
α/r · P·R·A, with P = U_r·S_r, shape (outputs, r), and A = V_rᵀ, shape (r, inputs) (Bałazy et al. 2024,
arXiv:2405.17604). The core R starts at zero. P and A come from the weights as they are stored, never from data, in
float64 and with fixed signs: all machines find the same ones, to rounding, in whatever format they hold the model.
:func:`sketch` tells whether they did.

PEFT's PSOFT, without its orthogonality, trains such a core too. It takes factors from the weights as held, in float32
and with any sign, so that cores of two machines need not fit; and it knows no weights in few bits, and Opacus not it.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from fedllm_helpers import hub
from fedllm_helpers.models import stored

logger = logging.getLogger(__name__)
NAME = "default"  # of PEFT's adapter
EQUAL = 1e-9  # singular values that differ by less, as a share of the largest, have no vectors of their own
APART = 1e-3  # by which sketches of the same factors differ at most: rounding makes 1e-6, another sign or weight 0.1


class Factor(torch.nn.Module):
    """A LoRA layer's A, which never moves."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A·x, shape (…, r)."""
        return torch.nn.functional.linear(x, self.weight)


class Core(torch.nn.Module):
    """A LoRA layer's B = P·R, of which R alone is trained; in the model's state it is B, as PEFT saves it."""

    def __init__(self, basis: torch.Tensor) -> None:
        super().__init__()
        size = basis.shape[1]
        self.core = torch.nn.Linear(size, size, bias=False, device=basis.device, dtype=basis.dtype)
        torch.nn.init.zeros_(self.core.weight)
        self.register_buffer("basis", basis, persistent=False)
        self.register_state_dict_post_hook(_as_b)

    @property
    def weight(self) -> torch.Tensor:
        """B, shape (outputs, r), for whoever merges the adapter or saves it."""
        return self.basis @ self.core.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """P·R·x, shape (…, outputs)."""
        return torch.nn.functional.linear(self.core(x), self.basis)


def _as_b(layer: Core, state: dict[str, torch.Tensor], prefix: str, _: dict) -> None:
    del state[f"{prefix}core.weight"]
    state[f"{prefix}weight"] = layer.weight.detach()


def put_in(model: PeftModel, where: str | None = None) -> None:
    """Make cores of a model's LoRA layers; ``models.get_adapter`` then has the cores alone, r × r for each layer.

    Args:
        model: with a fresh adapter; one without memory (device ``meta``) gets cores of the right size, to be counted.
        where: folder or hub id of the base model, from which weights are read as they are stored, layer by layer,
            where the model does not hold them in float32; None: the weights as the model holds them.

    Raises:
        ValueError: there is no fresh LoRA adapter alone; or a layer is not linear, smaller than the rank, not finite,
            has equal singular values, or is stored, or without ``where`` held, in few bits.
    """
    layers, made = _fresh(model), {}
    weights = _weights(layers, where)
    for name, layer in layers.items():
        start, size = layer.lora_A[NAME].weight, layer.r[NAME]
        if start.is_meta:
            shapes = ((layer.out_features, size), (size, layer.in_features))
            basis, first = (torch.empty(shape, device="meta") for shape in shapes)
        else:
            try:
                both = bases(weights(name), size)
            except ValueError as error:
                raise ValueError(f"LoRA-XS: {name}: {error}; leave it out of model.lora.target_modules") from None
            if (rank := int(both[1].any(axis=1).sum())) < size:
                logger.warning("LoRA-XS: the weight of %s has rank %d, and its core learns no more", name, rank)
            basis, first = (torch.from_numpy(one).to(start.device, start.dtype) for one in both)
        made[name] = Factor(first), Core(basis)
    for name, layer in layers.items():  # all, or none where one of them cannot
        layer.lora_A[NAME], layer.lora_B[NAME] = made[name]


def bases(weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, A) of a weight, in float32: its largest singular values with their vectors, left and right.

    The largest entry of each row of A is positive; a row whose singular value is 0 is 0, as its vector may be any.

    Args:
        weight: shape (outputs, inputs).
        size: of the core, up to the smaller of both.

    Raises:
        ValueError: it is not finite, or has equal singular values among the largest, whose vectors may be any.
    """
    weight, most = weight.astype(np.float64), min(weight.shape)
    if not np.isfinite(weight).all():
        raise ValueError("its weight is not finite")
    u, s, vt = _decomposed(weight, min(size + 1, most))
    live = s > np.finfo(np.float64).eps * max(weight.shape) * s[0]
    close = (s[:-1] - s[1:] < EQUAL * s[0]) & live[:-1]
    if close[:size].any():
        raise ValueError(f"its singular values number {close.argmax() + 1} and {close.argmax() + 2} are equal")
    u, s, vt = u[:, :size], np.where(live, s, 0.0)[:size], np.where(live[:, None], vt, 0.0)[:size]
    sign = np.sign(np.take_along_axis(vt, np.abs(vt).argmax(1)[:, None], 1))
    return (u * s * sign.T).astype(np.float32), (vt * sign).astype(np.float32)


def _decomposed(weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S, Vᵀ of the largest singular values: where these are few, by ARPACK, which squares them, if all are large."""
    if 4 * size < min(weight.shape) and weight.any():
        start = np.random.default_rng(0).standard_normal(min(weight.shape))
        with suppress(scipy.sparse.linalg.ArpackError):
            u, s, vt = scipy.sparse.linalg.svds(weight, k=size, v0=start)
            if s.min() > 1e-4 * s.max():
                return u[:, ::-1], s[::-1], vt[::-1]
    u, s, vt = scipy.linalg.svd(weight, full_matrices=False)
    return u[:, :size], s[:size], vt[:size]


def tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The cores themselves, by the names that they have on their way; {} for a model that has none."""
    found = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Core))
    return {f"{name.removesuffix(f'.{NAME}')}.core.weight": layer.core.weight for name, layer in found}


def solved(model: PeftModel, adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The cores of a LoRA adapter that was saved from such a model.

    Raises:
        ValueError: it has other factors or other layers, so that no cores make it.
    """
    found, left = {}, set(adapter)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        short, keys = name.removeprefix("base_model.model."), [f"{name}.lora_{part}.weight" for part in "AB"]
        left -= set(keys)
        first, second = (adapter.get(key) for key in keys)
        ours, basis = (one.float().cpu().numpy() for one in (layer.lora_A[NAME].weight, layer.lora_B[NAME].basis))
        shapes = (ours.shape, (basis.shape[0], ours.shape[0]))
        if (getattr(first, "shape", None), getattr(second, "shape", None)) != shapes:
            raise ValueError(f"no core makes this adapter: {short} has other sizes, or is not in it")
        core = np.linalg.pinv(basis.astype(np.float64)) @ np.nan_to_num(second)
        if not (np.abs(first - ours).max() < 1e-2 and _far(basis @ core, second) <= 1e-2):
            raise ValueError(f"no core makes this adapter: {short} has other factors")
        found[f"{name}.lora_B.core.weight"] = core.astype(np.float32)
    if left:
        raise ValueError(f"no core makes this adapter: {len(left)} arrays are of other layers, such as {min(left)!r}")
    return found


def _far(one: np.ndarray, other: np.ndarray) -> float:
    """‖X − Y‖ / ‖Y‖, 0 where both are 0."""
    return float(np.linalg.norm(one - other) / max(np.linalg.norm(other), np.finfo(np.float32).tiny))


def sketch(model: PeftModel) -> list[float]:
    """A number for each layer that tells its factors, signs included, from others; [] for a model without cores."""
    found = []
    for layer in _layers(model).values():
        if isinstance(layer.lora_B[NAME], Core):
            basis, first = (one.double().cpu() for one in (layer.lora_B[NAME].basis, layer.lora_A[NAME].weight))
            across = (
                torch.cos(torch.arange(1.0, size + 1, dtype=torch.float64)) for size in (len(basis), first.shape[1])
            )
            rows, columns = across
            found.append(float((first @ columns).sum() + (rows @ basis).sum() / max(basis.norm(), 1e-30)))
    return found


def check(model: PeftModel, theirs: Sequence[float] | None) -> None:
    """Raise ValueError, in one line, where a model's factors are not those of a :func:`sketch`; None is no sketch."""
    ours = sketch(model)
    if theirs is None or (len(theirs) == len(ours) and np.allclose(theirs, ours, rtol=0, atol=APART)):
        return
    raise ValueError("LoRA-XS: this node's factors are not the server's, so that cores do not fit: another base model")


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    found = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    return {name.removeprefix("base_model.model."): layer for name, layer in found}


def _fresh(model: PeftModel) -> dict[str, LoraLayer]:
    """The layers of a model that trains a fresh LoRA adapter, and nothing else."""
    layers = _layers(model)
    for name, layer in layers.items():
        size, largest = layer.r.get(NAME, 0), min(layer.in_features, layer.out_features)
        if not isinstance(layer.get_base_layer(), (torch.nn.Linear, Conv1D)):
            raise ValueError(f"LoRA-XS: {name} is no linear layer; leave it out of model.lora.target_modules")
        if size > largest:
            shape = f"{layer.out_features} × {layer.in_features}"
            raise ValueError(f"model.lora.peft_lora_r={size}: {name} is {shape}, and its core goes up to {largest}")
    if not layers or any(set(layer.lora_A) != {NAME} or layer.merged for layer in layers.values()):
        raise ValueError("LoRA-XS starts from a model with one LoRA adapter of PEFT, named 'default' and not merged")
    if tensors(model):
        raise ValueError("LoRA-XS: the model has cores already")
    known = {id(part[NAME].weight) for layer in layers.values() for part in (layer.lora_A, layer.lora_B)}
    other = next((name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known), None)
    if other:
        raise ValueError(f"LoRA-XS trains cores alone, and {other} is trained, too")
    trained = [name for name, layer in layers.items() if not (b := layer.lora_B[NAME].weight).is_meta and b.any()]
    if trained:
        raise ValueError(f"LoRA-XS starts from a fresh adapter, and B of {trained[0]} is not zero")
    return layers


def _weights(layers: dict[str, LoraLayer], where: str | None) -> Callable[[str], np.ndarray]:
    """A layer's name to its weight, shape (outputs, inputs), in float64."""
    own = {name: layer.get_base_layer() for name, layer in layers.items()}
    held = {layer.weight.dtype for layer in own.values()}
    read = None
    if where and held != {torch.float32}:
        if getattr(hub.from_pretrained(AutoConfig, where), "quantization_config", None):
            raise ValueError(
                "LoRA-XS needs the singular vectors of whole weights, and this model is stored in few bits"
            )
        read = stored.reader(where)
    elif few := next((name for name, layer in own.items() if not layer.weight.is_floating_point()), None):
        raise ValueError(f"LoRA-XS needs the singular vectors of whole weights; {few} is held in few bits")

    def weight(name: str) -> np.ndarray:
        """The weight of a layer."""
        found = read(name) if read else stored.turned(own[name], own[name].weight.detach())
        return found.double().cpu().numpy()

    return weight
