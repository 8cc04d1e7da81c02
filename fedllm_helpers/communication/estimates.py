"""What is sent: bytes and seconds by a model's configuration alone, and the ledger of a real run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import limits
from fedllm_helpers.communication.codec import BITS

if TYPE_CHECKING:  # counting alone needs them: whoever sends does not wait for them
    import torch
    from transformers import PreTrainedConfig

SCALE_BYTES, UNIT_BYTES = 2, 4  # int8 and int4: a float16 for each row of an array, one float32 for all of them


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: of the base model with its adapter, and of the adapter alone; and the adapter's rows.

    Rows are counted along the shorter side of each of its arrays, as :mod:`compression` scales them.
    """

    total: int
    trainable: int
    rows: int

    @property
    def share(self) -> float:
        """Trainable part of the total, 0 to 1."""
        return self.trainable / self.total


def architecture(name: str) -> "PreTrainedConfig":
    """The shape of a model: from the package for those it knows, else from a folder or the hub. No weights.

    Raises:
        FileNotFoundError: no such folder, or no configuration in it.
        ConnectionError: the hub does not know the model, or cannot be reached.
        ValueError: the configuration leaves out its layers, width or vocabulary, which would be guessed.
    """
    from transformers import AutoConfig, PreTrainedConfig

    from fedllm_helpers import hub, models

    if name in known_architectures():
        return AutoConfig.for_model(**known_architectures()[name])
    where = models.locate(name)
    shape = hub.from_pretrained(AutoConfig, where)
    given = PreTrainedConfig.get_config_dict(where)[0]
    for key in () if "text_config" in given else ("vocab_size", "hidden_size", "num_hidden_layers"):
        if key not in given and shape.attribute_map.get(key) not in given:
            raise ValueError(f"{name}: its configuration does not say {key!r}")
    return shape


def known_architectures() -> dict[str, dict]:
    """The shapes that the package carries, by hub id; every other model's is read from its own configuration."""
    return OmegaConf.to_container(OmegaConf.load(str(files("fedllm_helpers") / "conf" / "architectures.yaml")))


def parameter_counts(name: str, lora: DictConfig) -> ParameterCounts:
    """Count parameters by configuration alone: the model is laid out without memory for its weights.

    Raises:
        ValueError: the configuration lacks what a language model needs.
    """
    return _parameter_counts(name, OmegaConf.to_yaml(lora))


@lru_cache(maxsize=256)
def _parameter_counts(name: str, lora: str) -> ParameterCounts:
    import torch
    from transformers import AutoModelForCausalLM

    from fedllm_helpers import models

    shape = architecture(name)
    with torch.device("meta"):
        try:
            base = AutoModelForCausalLM.from_config(shape)
        except Exception as error:  # whatever a model's own code makes of settings that are not its own
            said = str(error).splitlines()[0][:120]
            raise ValueError(f"{name}: its configuration is not that of a language model: {said}") from None
        model = models.add_adapter(base, OmegaConf.create(lora))
    trainable, total = model.get_nb_trainable_parameters()
    rows = sum(min(value.shape) for value in model.parameters() if value.requires_grad)
    return ParameterCounts(total, trainable, rows)


@dataclass(frozen=True)
class Cost:
    """What a federation sends: bytes and seconds of one transfer, and bytes of all of them (1 MB = 10⁶ bytes).

    ``model_…`` is for sending the whole model each time, ``adapter_…`` for the adapter alone, in which case every
    participant fetches the base model once (``base_download``).
    """

    model_bytes: int
    adapter_bytes: int
    model_seconds: float
    adapter_seconds: float
    transfers: int
    model_total: int
    adapter_total: int
    base_download: int

    @property
    def ratio(self) -> float:
        """How many times more the whole model is than its adapter."""
        return self.model_bytes / self.adapter_bytes


def estimate(
    model: str,
    lora: DictConfig,
    *,
    rounds: int,
    clients: int,
    participants: int | None = None,
    number_format: str = "fp32",
    base_format: str = "fp16",
    bandwidth: float = 20e6,
) -> Cost:
    """Bytes and seconds of a federation, by configuration alone. Taught in notebook 07.

    Args:
        model: a name in :func:`known_architectures`, a hub id, or a folder with a ``config.json``.
        lora: the adapter's settings, ``cfg.model.lora``.
        rounds, clients: rounds, and clients asked in each; every one receives once and sends once.
        participants: clients that fetch the base model; None: ``clients``.
        number_format: of what is sent: fp32, fp16, int8 or int4.
        base_format: of the base model as it is fetched.
        bandwidth: of a client's line, in bits per second.

    Raises:
        ValueError: an unknown format, a bandwidth that is not above 0, fewer than one round or client.
        ConnectionError: a model that neither the package nor the hub knows.
    """
    for name, value in (
        ("rounds", rounds),
        ("clients", clients),
        ("participants", clients if participants is None else participants),
    ):
        limits.whole(name, value)
    limits.number("bandwidth", bandwidth)
    if not isinstance(model, str):
        raise ValueError(f"model={model!r:.60}: expected a name, a hub id or a folder")
    if not isinstance(lora, DictConfig) or "peft_lora_r" not in lora:
        raise ValueError(f"lora={str(lora)[:60]}: expected the adapter's settings, config.load('cpu').model.lora")
    counts, fetching = parameter_counts(model, lora), clients if participants is None else participants
    whole = transfer_bytes(counts.total, number_format)
    adapter = transfer_bytes(counts.trainable, number_format, counts.rows)
    base, transfers = transfer_bytes(counts.total - counts.trainable, base_format), 2 * rounds * clients
    seconds = (8 * whole / bandwidth, 8 * adapter / bandwidth)
    return Cost(whole, adapter, *seconds, transfers, transfers * whole, transfers * adapter, fetching * base)


def transfer_bytes(values: int, number_format: str, rows: int = 0) -> int:
    """Bytes of so many numbers; int8 and int4 with ``rows`` scales.

    Raises:
        ValueError: an unknown format.
    """
    if not isinstance(number_format, str) or number_format not in BITS:
        raise ValueError(f"number format {number_format!r}: allowed are {', '.join(BITS)}")
    scales = rows * SCALE_BYTES + UNIT_BYTES if rows and BITS[number_format] < 16 else 0
    return math.ceil(values * BITS[number_format] / 8) + scales


def ledger(
    clients: pd.DataFrame,
    counts: ParameterCounts,
    up: str = "fp32",
    down: str = "fp32",
    values: Callable[[int, int, str], tuple[int, int]] | None = None,
) -> pd.DataFrame:
    """What really crossed, beside the formula, by round and direction.

    Args:
        clients: of :class:`simulation.FederatedRecord`; replies that were not used are left out.
        counts: of the model and its adapter.
        up, down: number formats of ``federation.compression``. Top-k has no formula: its mask depends on the values.
        values: of rules that do not send the whole adapter, :func:`chain.values`: numbers of adapter and
            edits in a message. Edits are in fp32; scales of int8 and int4 are left to the overhead. None: the adapter.

    Returns:
        Columns ``round``, ``direction``, ``messages``, ``bytes``, ``formula`` (bytes of the numbers alone) and
        ``overhead``, the share that keys, shapes, settings and figures add to it.
    """
    rows = []
    for number, part in clients.groupby("round"):
        for direction, number_format in (("down", down), ("up", up)):
            sent = part if direction == "down" else part[part["status"] == "used"]
            measured = int(sent[f"bytes_{direction}"].sum())
            formula = len(sent) * transfer_bytes(counts.trainable, number_format, counts.rows)
            if values:
                sizes = [values(number, client, direction) for client in sent["client"]]
                formula = sum(transfer_bytes(own, number_format) + 4 * edit for own, edit in sizes)
            rows.append(
                (number, direction, len(sent), measured, formula, measured / formula - 1 if formula else math.nan)
            )
    return pd.DataFrame(rows, columns=["round", "direction", "messages", "bytes", "formula", "overhead"])


def weight_bytes(model: "torch.nn.Module") -> int:
    """Bytes that a model's parameters and buffers take in memory; quantised ones as they are stored."""
    quantised = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    scales = sum(state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0) for state in quantised)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) + scales
