"""A Flower app of somebody else: their models, training loop and ServerApp. Nothing of this package is in it."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LLAMA = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip


def build(family):
    """Their model: LoRA by PEFT on a small Llama, or on GPT-2's shape."""
    torch.manual_seed(5)
    base = LlamaForCausalLM(LlamaConfig(**LLAMA)) if family == "llama" else GPT2LMHeadModel(GPT2Config(**GPT2))
    targets = ["q_proj", "v_proj"] if family == "llama" else ["c_attn"]
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=family == "gpt2"))


def training(family, arrays, node, steps=2, moves=None, edit=None):
    """Their training loop: plain SGD on token ids of their own. ``edit`` is added to the base model's layers."""
    model = build(family)
    set_peft_model_state_dict(model, arrays)
    for name, parameter in model.named_parameters():
        parameter.requires_grad &= moves is None or any(part in name for part in moves)
    for layer, update in (edit or {}).items():
        weight = model.get_submodule(layer).get_base_layer().weight
        weight.data += torch.from_numpy(update.T if family == "gpt2" else update).float()
    ids = torch.randint(0, 97, (8, 12), generator=torch.Generator().manual_seed(node))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    return get_peft_model_state_dict(model), float(loss.detach())


def client(family="llama", mods=(), asks=lambda message: {}):
    """Their ClientApp; ``asks`` is the line that reads a rule's orders from the message."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        node = int(context.node_config["partition-id"])
        arrays, loss = training(family, message.content["arrays"].to_torch_state_dict(), node, **asks(message))
        metrics = MetricRecord({"num-examples": 10 * (node + 1), "loss": loss})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    return app


def server(strategy=None, family="llama", rounds=2, results=None):
    """Their ServerApp: Flower's own loop. What it comes to goes into ``results``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord(get_peft_model_state_dict(build(family)))
        chosen = FedAvg(fraction_evaluate=0.0) if strategy is None else strategy
        results.append(chosen.start(grid, start, num_rounds=rounds))

    return app
