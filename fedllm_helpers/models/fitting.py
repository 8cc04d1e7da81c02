"""Do model, tokenizer and settings fit? Looked at once, when a model is loaded: one line before hours of training."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedllm_helpers import hub

logger = logging.getLogger(__name__)
OTHER_TASKS = re.compile("Classification|QuestionAnswering|MultipleChoice|MaskedLM|Reward")
FORM = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
FORMULA = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "use_qalora",
           "use_bdlora", "layer_replication", "alora_invocation_tokens")  # fmt: skip
OTHER_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")
SAMPLE = "Question: What is it?\nAnswer: It is"


def check_configuration(name: str, shape: PreTrainedConfig, seq_length: int, quantization: int | None) -> None:
    """Refuse by its configuration, before weights are read, what is no causal language model or too short for cards.

    Raises:
        ValueError: one line with the name, what it is, and what would be right.
    """
    kind, positions = shape.model_type, max_positions(shape)
    other = next((each for each in shape.architectures or () if OTHER_TASKS.search(each)), None)
    if shape.is_encoder_decoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what = "an encoder-decoder" if shape.is_encoder_decoder else "not a causal language model"
        raise ValueError(f"model {name!r} ({kind}) is {what}: set model.name to one that reads left to right")
    if other:
        raise ValueError(f"model {name!r} was made for another task ({other}): set model.name to a language model")
    if positions is not None and seq_length > positions:
        raise ValueError(
            f"train.seq_length={seq_length}: model {name!r} has {positions} positions, allowed are 1 to that"
        )
    if quantization is not None and getattr(shape, "quantization_config", None):
        raise ValueError(f"model.quantization={quantization}: model {name!r} is quantised already; set it to null")


def max_positions(shape: PreTrainedConfig) -> int | None:
    """Tokens that a model reads at most; None for one that sets no limit."""
    limit = getattr(shape.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None


def check_weights(name: str, base: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse weights that are not all there, which transformers would draw at random, or that are cut short.

    Args:
        name: of the model.
        base: as it was loaded.
        report: what ``from_pretrained(…, output_loading_info=True)`` says of it.

    Raises:
        ValueError: weights are absent, or more layers are stored than the configuration asks for.
    """
    if absent := sorted(report["missing_keys"]):
        raise ValueError(
            f"model {name!r} is not whole: {len(absent)} of its arrays are in no file, the first is {absent[0]!r}, "
            "and would be random; fetch the model again"
        )
    own = {re.sub(r"\d+", "#", key) for key in base.state_dict()}
    if deeper := sorted(key for key in report["unexpected_keys"] if re.sub(r"\d+", "#", key) in own):
        raise ValueError(f"model {name!r}: {deeper[0]!r} is stored, and its config.json has no such layer")


def check_tokenizer(name: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure of an end and a padding token, and that every text becomes tokens that the model has.

    An end token that the tokenizer lacks is taken from the model's generation settings; padding that it lacks, or that
    lies beyond the embeddings, is filled with the end token: the mask covers it.

    Raises:
        ValueError: there is no end token, no vocabulary, or one that is not the model's.
    """
    rows = base.get_input_embeddings().weight.shape[0]
    sample = tokenizer(SAMPLE)["input_ids"]
    if not set(sample) - {tokenizer.unk_token_id, *tokenizer.all_special_ids}:
        raise ValueError(f"model {name!r}: its tokenizer knows no words; are its files all there?")
    beyond = max(sample) >= rows or len(tokenizer) > rows
    if beyond and (tokens := _beyond(tokenizer, rows, sample)):
        raise ValueError(
            f"model {name!r}: {len(tokens)} of its tokenizer's {len(tokenizer)} tokens, such as {tokens[0]!r}, are "
            f"beyond the model's {rows} embeddings; it is another model's tokenizer"
        )
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= rows:
        tokenizer.eos_token = _end_token(name, base, tokenizer, rows)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def _beyond(tokenizer: PreTrainedTokenizerBase, rows: int, sample: list[int]) -> list[str]:
    """Tokens beyond the embeddings that a text can become: markers that no text contains may lie there (Gemma 3)."""
    markers = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - set(sample)
    return sorted(token for token, number in tokenizer.get_vocab().items() if number >= rows and number not in markers)


def _end_token(name: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> str:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for number in _ids(base.generation_config.eos_token_id) + _ids(base.config.get_text_config().eos_token_id):
        token = tokenizer.convert_ids_to_tokens(number) if number < min(rows, len(tokenizer)) else None
        if token and (number in special or re.fullmatch(r"[<\[].+[>\]]", token)):  # a class' default may be any word
            logger.warning("%s: its tokenizer names no end token; the model's own is taken, %r", name, token)
            return token
    raise ValueError(
        f"model {name!r}: neither its tokenizer nor its configuration names an end-of-text token that both have; "
        "set eos_token in its tokenizer_config.json"
    )


def end_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which an answer ends: the tokenizer's, and those of the model's generation settings."""
    return list(dict.fromkeys([*_ids(tokenizer.eos_token_id), *_ids(base.generation_config.eos_token_id)]))


def _ids(given: int | list[int] | None) -> list[int]:
    found = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in found):
        raise ValueError(f"the model's eos_token_id={given!r:.60}: expected a token's number, or a list of them")
    return found


def check_causal(name: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that reads ahead: it would see the answer on which it is trained and scored.

    The derivative of what it says at earlier positions with respect to the last token is exactly zero, or it looked.

    Raises:
        ValueError: it reads ahead, or its outputs are not finite in this number format.
    """
    ids = torch.tensor([(tokenizer(SAMPLE)["input_ids"] * 2)[:8]], device=base.device)
    seen: list[torch.Tensor] = []

    def watched(layer: torch.nn.Module, given: tuple, embedded: torch.Tensor) -> torch.Tensor:
        """Keep the embedded text, and let derivatives begin there."""
        seen.append(embedded.detach().requires_grad_())
        return seen[-1].clone()  # which a model may scale in place (CTRL)

    hook = base.get_input_embeddings().register_forward_hook(watched)
    try:
        with torch.enable_grad():
            logits = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
            earlier = logits[:, :-1].sum()
            read = torch.autograd.grad(earlier, seen[-1])[0].reshape(ids.shape[1], -1)[-1]  # one text, in either order
    except Exception as error:  # of its own code, or of the library that its number format needs
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"model {name!r} ({base.config.model_type}) cannot be computed here: {reason}") from error
    finally:
        hook.remove()
    if not torch.isfinite(logits).all():
        whole = all(torch.isfinite(each).all() for each in base.parameters() if each.is_floating_point())
        advice = "set model.dtype=float32" if whole else "some of its weights are none; fetch the model again"
        raise ValueError(f"model {name!r}: what it computes is not finite in {base.dtype}; {advice}")
    if not logits.std(-1).any():
        raise ValueError(f"model {name!r} says of all tokens the same: its weights are zeros; fetch the model again")
    if read.nan_to_num().any():
        raise ValueError(
            f"model {name!r} ({base.config.model_type}) reads ahead, as encoders do, and would see the answers it is "
            "scored on: set model.name to one that reads left to right"
        )


@torch.no_grad()
def check_padding(name: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    """Refuse a model that says something else of a text once a batch fills it up.

    Some count positions from the padding on (BART's decoder), some read it (RWKV).

    Raises:
        ValueError: it does so on this side; the line says whether the other would do.
    """
    if _bent(base, tokenizer, side):
        right = side == "left" and not _bent(base, tokenizer, "right")
        advice = "set train.padding_side=right" if right else "set another model.name"
        kind = base.config.model_type
        raise ValueError(f"train.padding_side={side}: it changes what model {name!r} ({kind}) says of a text; {advice}")


def _bent(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, side: str, gap: int = 4) -> bool:
    """Whether logits of a text in a padded batch differ from its own by more than rounding does."""
    long = (tokenizer(SAMPLE)["input_ids"] * 12)[: 8 + gap]
    text, where = torch.tensor(long[:8]), slice(gap, None) if side == "left" else slice(8)
    rows, mask = torch.tensor([long, [tokenizer.pad_token_id] * len(long)]), torch.zeros(2, len(long), dtype=torch.long)
    rows[1, where], mask[0], mask[1, where] = text, 1, 1
    batch = {"input_ids": rows, "attention_mask": mask, **positions(mask, side)}
    batch = {key: value.to(base.device) for key, value in batch.items()}
    text = text[None].to(base.device)
    alone = base(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits[0].float()
    off = (base(**batch, use_cache=False).logits[1, where].float() - alone).abs().mean() / alone.std()
    exact = base.dtype == torch.float32 and not getattr(base, "is_quantized", False)
    return bool(off > (1e-3 if exact else 0.1))


def positions(mask: torch.Tensor, side: str) -> dict[str, torch.Tensor]:
    """Positions for a batch that is padded on the left; on the right every model counts its own."""
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if side == "left" else {}


def greedy(base: PreTrainedModel) -> GenerationConfig:
    """Settings of a model for the likeliest answer alone: of its own, which may punish or forbid words, only the ends.

    Raises:
        ValueError: its end tokens are no numbers.
    """
    return GenerationConfig(eos_token_id=_ids(base.generation_config.eos_token_id) or None)


def form(shape: PreTrainedConfig) -> dict[str, Any]:
    """What of a configuration an adapter depends on; it is kept with the adapter, whose base model may move."""
    return {"model_type": shape.model_type, **{name: getattr(shape.get_text_config(), name, None) for name in FORM[1:]}}


def check_adapter(folder: str | Path, saved: PeftConfig, own: PeftConfig) -> None:
    """Refuse an adapter that another formula reads, or of another base model.

    Hub ids are compared by name; folders, which move, by their form.

    Raises:
        ValueError: one line with the setting that differs.
    """
    for key in FORMULA:
        if (given := getattr(saved, key, None)) != (here := getattr(own, key, None)):
            raise ValueError(f"{folder} does not fit: its {key} is {given}, here {here}")
    if (start := getattr(saved, "init_lora_weights", True)) in OTHER_BASES:
        raise ValueError(f"{folder} does not fit: init_lora_weights={start!r} changes the base model's own weights")
    there, here = saved.base_model_name_or_path, own.base_model_name_or_path
    if there == here:
        return
    kept = saved.auto_mapping or {}
    if "model_type" not in kept and there and (Path(there) / "config.json").is_file():
        kept = form(hub.from_pretrained(AutoConfig, there))
    ours = own.auto_mapping or {}
    differs = [name for name in FORM if name in kept and ours.get(name, kept[name]) != kept[name]]
    if differs or not (os.path.isabs(there or "/") or os.path.isabs(here)):
        what = f", and its {differs[0]} is {kept[differs[0]]}" if differs else ""
        raise ValueError(f"{folder} does not fit: its base model is {there}{what}; here it is {here}")
    logger.warning("%s: its base model was %s, here is %s, of the same form", folder, there, here)
