"""Which words of a hospital's cards one update gives away: read from its row space, or from tokens that got likelier.

The gradient of a LoRA layer's A is Bᵀ·G·Xᵀ, with G, shape (outputs, tokens), the gradient of its outputs and X, shape
(inputs, tokens), its inputs: its rows are sums of inputs. In the first layer an input depends on its token alone, so
whoever has the model can ask of every token whether it is in the span (for word embeddings, where a row moves for every
word that was there: Melis et al. 2019, arXiv:1805.04049; for the span of a linear layer: Petrov et al. 2024, DAGER,
arXiv:2405.15586).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import limits, models
from fedllm_helpers.adapters.records import Adapter

Named = tuple[np.ndarray, np.ndarray]  # token ids, best first, and their scores, each of shape (at most count,)
FLOOR = 1e-4  # of a token's probability: gains among tokens that hardly ever come next say nothing


class _Reached(Exception):
    """The layer's input is known, and the rest of the model need not run."""


def row_space(*updates: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """An orthonormal basis of what the rows of matrices span together, by SVD. Taught in notebook 05a.

    Args:
        updates: of A, each of shape (r, inputs), of layers that share one input.
        tolerance: directions with a smaller singular value, as a share of the matrix's largest, are left out.

    Returns:
        Shape (inputs, k), float64, k up to the sum of the ranks.

    Raises:
        ValueError: no matrices of one width, values that are not finite, or only zeros.
    """
    given = [np.asarray(update, dtype=np.float64) for update in updates]
    shapes = ", ".join(str(update.shape) for update in given) or "nothing"
    if not given or any(update.ndim != 2 for update in given) or len({update.shape[1] for update in given}) > 1:
        raise ValueError(f"updates of A: expected matrices (r, inputs) of one width, given are {shapes}")
    if not all(np.isfinite(update).all() for update in given):
        raise ValueError(f"updates of A of shape {shapes}: some values are not finite")
    rows = [_directions(update, tolerance) for update in given if update.any()]
    if not rows:
        raise ValueError(
            "updates of A are all zero: A is frozen, or B was zero at a single step, as it is where LoRA starts"
        )
    return _directions(np.concatenate(rows), tolerance).T


def _directions(matrix: np.ndarray, tolerance: float) -> np.ndarray:
    _, values, rows = np.linalg.svd(matrix, full_matrices=False)
    return rows[values > tolerance * values[0]]


def first_layers(model: PeftModel) -> list[str]:
    """Names of the LoRA layers whose input depends on the token alone: those that share the first such input.

    Found by running two tokens in both orders. In a Llama these are layer 0's q, k and v, behind its input norm.

    Raises:
        ValueError: there are none: positions are added to the embeddings, or layer 0 has no adapter behind its norm.
    """
    one, other = _candidates(model)[[0, -1]].tolist()
    with _inputs(_layers(model)) as seen, torch.no_grad(), models.autocast(model):
        model(input_ids=torch.tensor([[one, other], [other, one]], device=model.device), use_cache=False)
    alone = {name: x for name, x in seen.items() if x.is_floating_point() and x.shape[:-1] == (2, 2) and _same(x)}
    first = next(iter(alone.values()), None)
    if first is None:
        raise ValueError(
            f"{type(model.get_base_model()).__name__}: no LoRA layer reads an input that depends on the token alone: "
            "this takes adapters on q, k or v behind a norm of embeddings to which no positions are added"
        )
    return [name for name, x in alone.items() if x.shape == first.shape and torch.equal(x, first)]


def named(
    update: Adapter,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    known: Collection[int] = (),
) -> Named:
    """The tokens whose first-layer input lies most within the row space of an update of A. Taught in notebook 05a.

    It is exact for one step of SGD on fewer distinct tokens than the row space has dimensions, from an adapter whose B
    is not zero and without dropout. A token that is the last of its card is read by nobody, and leaves nothing.

    Args:
        update: what a hospital sent less what it got.
        model, tokenizer: of the federation; the model's own adapter does not matter.
        count: of tokens.
        known: token ids that are not asked about, such as those of the prompt.

    Returns:
        Token ids, best first, and the share of their input's squared length that lies in the row space, 0 to 1.

    Raises:
        ValueError: what :func:`row_space` and :func:`first_layers` refuse; or A is not in the update, as in LoRA-XS.
    """
    limits.whole("count", count)
    if not any(".lora_A." in key for key in update):
        raise ValueError("the update has no lora_A: cores of LoRA-XS, whose A is frozen, show no row space of inputs")
    layers = first_layers(model)
    absent = [name for name in layers if f"{name}.lora_A.weight" not in update]
    if absent:
        raise ValueError(f"the update is of another model or other layers: {absent[0]} is not in it")
    basis = row_space(*(update[f"{name}.lora_A.weight"] for name in layers))
    ids = _candidates(model, tokenizer, known)
    return _best(ids, _shares(model, layers[0], basis, ids), count)


def gained(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    updates: Sequence[Adapter],
    prompts: Sequence[str],
    count: int,
) -> list[Named]:
    """The tokens that each update makes likelier after public prompts than the other updates of its round do.

    Taught in notebook 05a.

    Args:
        model: with the adapter that the round began with, which it has afterwards, too.
        tokenizer: of the model.
        updates: of one round, one for each hospital.
        prompts: texts that the attacker chose, none of them a card.
        count: of tokens, fewer where fewer gain anything.

    Returns:
        For each update token ids, best first, and their gains in nats: log(p + 10⁻⁴) of the next token, averaged over
        prompts, less the mean of that over the other updates.

    Raises:
        ValueError: fewer than two updates, no prompts, or updates of another model.
    """
    limits.whole("count", count)
    if len(updates) < 2 or not prompts or isinstance(prompts, str):
        given = f"{len(updates)} updates and {len([prompts] if isinstance(prompts, str) else prompts)} prompts"
        raise ValueError(f"{given}: expected two updates or more, and a list of prompts")
    start, ids = models.get_adapter(model), _candidates(model, tokenizer)
    try:
        found = [_likely(model, tokenizer, _moved(start, update), prompts)[ids] for update in updates]
    finally:
        models.set_adapter(model, start)
    others = [np.mean(found[:k] + found[k + 1 :], axis=0) for k in range(len(found))]
    return [_best(ids, own - rest, count, above=0.0) for own, rest in zip(found, others, strict=True)]


def texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """Each token as it is read, without the space before it; a token that is only space is shown as it is stored."""
    return [tokenizer.decode([one]).strip() or str(tokenizer.convert_ids_to_tokens(one)) for one in map(int, ids)]


def _moved(start: Adapter, update: Adapter) -> Adapter:
    if start.keys() != update.keys():
        raise ValueError("an update is of another model or other layers than the adapter that the model has")
    return {key: value + update[key] for key, value in start.items()}


def _candidates(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, known: Collection[int] = ()
) -> np.ndarray:
    """Token ids that the model has and that a card can hold: no control tokens."""
    size = model.get_input_embeddings().weight.shape[0]
    if tokenizer is None:
        return np.arange(size)
    return np.setdiff1d(np.arange(min(size, len(tokenizer))), [*tokenizer.all_special_ids, *known])


def _best(ids: np.ndarray, scores: np.ndarray, count: int, above: float = -np.inf) -> Named:
    order = np.argsort(-scores, kind="stable")[:count]
    order = order[scores[order] > above]
    return ids[order], scores[order]


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


@contextmanager
def _inputs(layers: dict[str, LoraLayer], stop: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """What the layers read while the model runs, in the order in which they are called."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, _: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        """Keep a layer's input."""
        seen[name] = given[0].detach()
        if stop:
            raise _Reached

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        with suppress(_Reached):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _same(x: torch.Tensor) -> bool:
    """Whether two tokens, read in both orders, shape (2, 2, inputs), look alike wherever they stand."""
    return bool((x[0] - x[1].flip(0)).abs().max() <= 1e-5 * x.abs().max())


@torch.no_grad()
def _shares(model: PeftModel, layer: str, basis: np.ndarray, ids: np.ndarray, batch: int = 4096) -> np.ndarray:
    """Share of the squared length of each token's input to a layer that lies in the span of a basis."""
    found, own = [], {layer: _layers(model)[layer]}
    onto = torch.from_numpy(basis).to(model.device, torch.float32)
    for some in torch.from_numpy(ids).to(model.device).split(batch):
        with _inputs(own, stop=True) as seen, models.autocast(model):
            model(input_ids=some.unsqueeze(1), use_cache=False)
        x = seen[layer].squeeze(1).float()
        found.append((x @ onto).square().sum(1) / x.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny))
    return torch.cat(found).double().cpu().numpy()


@torch.no_grad()
def _likely(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, adapter: Adapter, prompts: Sequence[str]
) -> np.ndarray:
    """log(p + floor) of every next token, averaged over prompts, shape (vocabulary,); of a broken model log(floor)."""
    models.set_adapter(model, adapter)
    model.eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        with models.autocast(model):
            p = model(input_ids=ids, use_cache=False).logits[0, -1].float().softmax(-1)
        found.append((torch.nan_to_num(p, nan=0.0) + FLOOR).log())
    return torch.stack(found).mean(0).double().cpu().numpy()
