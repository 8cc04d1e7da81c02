"""How a base model is laid out on its device: attention, bits per weight, and what libraries do there by default."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import BitsAndBytesConfig


def options(settings: DictConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` is given for the settings of a model, ``cfg.model``.

    On CUDA it also switches off cuDNN's attention, and with a quantization one logger's warnings: for the process.

    Raises:
        ValueError: a quantization is asked for, and bitsandbytes is not there.
    """
    # On a CPU, PyTorch's fused attention is slow backwards on short sequences: a step takes 1.2 to 1.3 times as long.
    given: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager" if device.type == "cpu" else "sdpa"}
    if device.type == "cuda":
        # cuDNN's attention, torch's first choice on an H100 and newer, gives gradients of NaN beside padding in batches
        # 64 tokens long, or 192, or 320 (pytorch issue 196678): there, one training in six of a federation ended so.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if settings.quantization is not None:
        if find_spec("bitsandbytes") is None:
            raise ValueError("model.quantization needs bitsandbytes: pip install it, or set null")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        given["quantization_config"] = BitsAndBytesConfig(
            **four if settings.quantization == 4 else {"load_in_8bit": True}
        )
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line per product in 8 bits
        given["device_map"] = {"": device}
    return given


def never_repacked(base: torch.nn.Module) -> torch.nn.Module:
    """Keep 4-bit weights as they were loaded.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 lays them out anew once they are scored: no gradient flows through that
    layout, and ``state_dict()``, which every copy of an adapter calls, undoes it by half.
    """
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return base
