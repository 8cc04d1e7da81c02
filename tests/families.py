"""Small models of many families with random weights, each in a folder with a small tokenizer, as people bring them."""

import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedllm_helpers import config
from fedllm_helpers.models import embedded

TEXT = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ENDS = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
         "patch_size": 14}  # fmt: skip
GPT2 = ENDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = ENDS | {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "max_position_embeddings": 64, "word_embed_proj_dim": 32}  # fmt: skip
BART = ENDS | {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
               "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip
DECODER = BART | {"is_decoder": True, "is_encoder_decoder": False, "pad_token_id": 3, "max_position_embeddings": 64}
T5 = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
GEMMA3 = {"text_config": TEXT | {"num_key_value_heads": 2, "head_dim": 8}, "vision_config": IMAGE,
          "mm_tokens_per_image": 4, "image_token_index": 390, "boi_token_index": 391,
          "eoi_token_index": 392}  # fmt: skip
FAMILIES = {  # class of the model, class of its configuration, settings
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "tied": ("LlamaForCausalLM", "LlamaConfig", TEXT | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "bloom": ("BloomForCausalLM", "BloomConfig", ENDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", ENDS | {"hidden_size": 32, "num_hidden_layers": 2}),
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA3),
    "decoder": ("BertLMHeadModel", "BertConfig", TEXT | {"is_decoder": True}),
    "bart decoder": ("BartForCausalLM", "BartConfig", DECODER),
    "roberta decoder": ("RobertaForCausalLM", "RobertaConfig", TEXT | {"is_decoder": True, "pad_token_id": 3}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", ENDS | {"hidden_size": 32, "num_hidden_layers": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "bert as decoder": ("BertLMHeadModel", "BertConfig", TEXT),
    "roberta as decoder": ("RobertaForCausalLM", "RobertaConfig", TEXT),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", ENDS | {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "classifier": ("LlamaForSequenceClassification", "LlamaConfig", TEXT | {"tie_word_embeddings": True}),
    "images": ("ViTModel", "ViTConfig", IMAGE),
}


def tokenizer(folder, **special):
    """A byte-level tokenizer of some 270 tokens: <unk> 0, <s> 1, </s> 2, <pad> 3."""
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    given = {"special_tokens": ["<unk>", "<s>", "</s>", "<pad>"], "initial_alphabet": plain.pre_tokenizer.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=280, show_progress=False, **given)
    plain.train_from_iterator(["Question: What is it? Answer: It is a thing."] * 5, trainer)
    given = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", **special}
    PreTrainedTokenizerFast(tokenizer_object=plain, **given).save_pretrained(folder)


def make(folder, family, settings=None, **special):
    """A folder with a model of :data:`FAMILIES` and a tokenizer."""
    model, shape, given = FAMILIES[family]
    torch.manual_seed(0)
    shape = getattr(transformers, shape)(**given | (settings or {}))
    getattr(transformers, model)(shape).save_pretrained(folder)
    tokenizer(folder, **special)
    return folder


def change(folder, name, **values):
    """Change a JSON file of a folder; None takes a key out."""
    found = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def settings(folder, *overrides):
    """The cpu preset for such a folder, in whole numbers and two steps."""
    return config.load("cpu", f"model.name={folder}", "train.seq_length=48", "model.dtype=float32", "model.device=cpu",
                       "train.training_arguments.max_steps=2", *overrides)  # fmt: skip


CARDS = [{"question": f"What is {i}?", "answer": "It is a thing. " + "so " * i} for i in range(6)]


def write_model(folder, seed):
    """A language model of one thin layer, with random weights and the real tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=49152, num_key_value_heads=2, **sizes)
    ).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(embedded.fetch()).save_pretrained(folder)
