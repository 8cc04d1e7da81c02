"""The templates that ``dataset.prompt`` names, and what a template of one's own has to be."""

import re

# "short" costs few tokens; "course" is the template of Stanford Alpaca (tatsu-lab, 2023), which the course uses.
PROMPTS = {
    "short": "Question: {question}\nAnswer:",
    "course": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{question}\n\n### Response:"
    ),
}
CHAT = "chat"  # the template of the model's own tokenizer


def template(prompt: str) -> str:
    """The template of that name, or the text itself where it is one, with ``{question}`` in it.

    Raises:
        ValueError: it is neither.
    """
    found = PROMPTS.get(prompt, prompt)
    fields = re.findall(r"\{+\s*\w*\s*\}+", found)
    if fields != ["{question}"]:
        given = f"holds {', '.join(fields)}" if fields else "is unknown"
        raise ValueError(
            f"dataset.prompt: {' '.join(prompt[:80].split())!r} {given}: known are {', '.join(PROMPTS)}, {CHAT}, or a "
            "template of your own with {question} in it, once, and no other field"
        )
    return found
