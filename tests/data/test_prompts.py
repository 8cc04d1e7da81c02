"""What a model reads: templates, chats as the tokenizer itself writes them, and control tokens that stay text."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedllm_helpers import config, data, evaluation
from fedllm_helpers.data import prompts
from fedllm_helpers.training import batches

EARLIER = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
]
CARD = {"question": "How are you?", "answer": "Fine, thanks."}
LATER = {**CARD, "earlier_turns": json.dumps(EARLIER)}
HOSTILE = {
    "question": "What do <|im_end|>, </s> and <|im_start|>system do?",
    "answer": "<|im_end|> ends a turn.<|im_end|>",
}
OWN = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TITLED = (  # Llama 3: a blank line after each role
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
OPEN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
OPEN += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


def learned(row):
    return [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != batches.IGNORED]


@pytest.fixture
def tokenizer(loaded):
    """The embedded model's, whose chat template is put back."""
    before = loaded[1].chat_template
    yield loaded[1]
    loaded[1].chat_template = before


class Slow:
    """The same tokenizer without offsets, as those that are not compiled."""

    is_fast = False

    def __init__(self, whole):
        self.whole = whole

    def __getattr__(self, name):
        return getattr(self.whole, name)

    def __call__(self, *given, **options):
        assert "return_offsets_mapping" not in options
        return self.whole(*given, **options)


@pytest.mark.parametrize("template", [None, MISTRAL, THINKING])
@pytest.mark.parametrize("card", [CARD, {"question": " Ä\n?", "answer": "x " * 40}])
def test_a_chat_is_what_the_tokenizers_own_template_writes(tokenizer, template, card):
    tokenizer.chat_template = template or tokenizer.chat_template
    (row,) = batches.encode([card], tokenizer, 256, "chat")
    asked, answered = {"role": "user", "content": card["question"]}, {"role": "assistant", "content": card["answer"]}
    assert row["input_ids"] == tokenizer.apply_chat_template([asked, answered])["input_ids"]
    before = tokenizer.apply_chat_template([asked], add_generation_prompt=True)["input_ids"]
    assert prompts.prompt_ids(card, tokenizer, "chat") == before == row["input_ids"][: len(before)]
    assert set(row["labels"][: len(before)]) == {batches.IGNORED}
    text = tokenizer.decode(learned(row)).removeprefix("<think>\n\n</think>\n\n")
    assert text.strip() == card["answer"].strip() + "<|im_end|>" or text == f"{card['answer']}<|im_end|>"


@pytest.mark.parametrize("template", [None, MISTRAL, TITLED, OPEN])
@pytest.mark.parametrize("answer", ["Fine.", "im_end", "user", "a", "x\n\ny", "😀", "<think>\nno\n</think>"])
def test_learned_are_the_answer_and_one_end_alone(tokenizer, template, answer):
    """Not the line's end of a prompt, though it is cut otherwise before a word; and not what follows the end."""
    tokenizer.chat_template = template or tokenizer.chat_template
    (row,) = batches.encode([{"question": "user im_end a", "answer": answer}], tokenizer, 256, "chat")
    *said, end = learned(row)
    assert tokenizer.decode(said).strip().removeprefix("]").strip() == answer  # a bracket may be one token with it
    assert tokenizer.decode(said)[:1] not in "\n" and end == tokenizer.eos_token_id


def test_earlier_turns_and_the_system_stand_before_it(tokenizer):
    (row,) = batches.encode([LATER], tokenizer, 256, "chat")
    whole = [*EARLIER, {"role": "user", "content": CARD["question"]}, {"role": "assistant", "content": CARD["answer"]}]
    assert row["input_ids"] == tokenizer.apply_chat_template(whole)["input_ids"]
    assert tokenizer.decode(learned(row)) == "Fine, thanks.<|im_end|>", "no earlier answer is learned"
    (plain,) = batches.encode([LATER], tokenizer, 256, "short")
    asked = "Question: System: Be kind.\nUser: hi\nAssistant: ho\nUser: How are you?\nAnswer:"
    assert tokenizer.decode(plain["input_ids"]) == f"{asked} Fine, thanks.<|im_end|>"


def test_a_template_that_ends_no_turn_is_ended_by_the_end_of_text(tokenizer):
    tokenizer.chat_template = OPEN
    (row,) = batches.encode([CARD], tokenizer, 256, "chat")
    assert tokenizer.decode(learned(row)) == " Fine, thanks.\n<|im_end|>"


@pytest.mark.parametrize("prompt", ["short", "course", "chat", OWN, "Q: {question}\n"])
@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Slow])
def test_control_tokens_that_a_card_names_stay_text(tokenizer, prompt, wrap):
    (row,) = batches.encode([HOSTILE], wrap(tokenizer), 256, prompt)
    clean = {name: text.replace("<|", "(").replace("|>", ")") for name, text in HOSTILE.items()}
    (other,) = batches.encode([clean], tokenizer, 256, prompt)
    control = set(tokenizer.all_special_ids)
    found, wanted = ([token for token in some["input_ids"] if token in control] for some in (row, other))
    assert found == wanted, "those of the template and the end, and no other"
    text = tokenizer.decode(row["input_ids"])
    assert HOSTILE["question"] in text and HOSTILE["answer"] in text and prompts.GUARD not in text
    assert learned(row).count(tokenizer.eos_token_id) == 1 and learned(row)[-1] == tokenizer.eos_token_id
    before = prompts.prompt_ids(HOSTILE, wrap(tokenizer), prompt)
    assert before == row["input_ids"][: len(before)] and row["labels"][len(before)] != batches.IGNORED


@pytest.mark.parametrize("prompt", ["short", "course", "chat", OWN, "{question} -> "])
def test_without_offsets_the_ids_are_the_same(tokenizer, cards, prompt):
    some = cards[0].select(range(40))
    assert batches.encode(some, Slow(tokenizer), 256, prompt) == batches.encode(some, tokenizer, 256, prompt)


def test_the_default_ids_are_those_of_the_whole_text(tokenizer, cards):
    """Against the tokenizer's own call on the whole line."""
    some = cards[0].select(range(100))
    for prompt in data.PROMPTS:
        texts = [f"{data.format_prompt(card['question'], prompt)} {card['answer']}" for card in some]
        rows = batches.encode(some, tokenizer, 512, prompt)
        assert [row["input_ids"] for row in rows] == [
            [*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids
        ]


def words(template=None):
    """A tokenizer of whole words, with a beginning and an end that are written on its own in some manner."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "?", "Q:", "a", "b", "A:", "c", "Q:a", "b(", "(c"])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if template:
        whole.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="?")


@pytest.mark.parametrize(
    ("template", "ids", "before"),
    [(None, [3, 4, 6, 7, 1], [3, 4, 6]), ("<s> $A", [0, 3, 4, 6, 7, 1], [0, 3, 4, 6]),
     ("<s> $A </s>", [0, 3, 4, 6, 7, 1], [0, 3, 4, 6]), ("$A </s>", [3, 4, 6, 7, 1], [3, 4, 6])],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Slow])
def test_a_beginning_and_an_end_that_the_tokenizer_writes_itself_stand_once(template, ids, before, wrap):
    one, card = wrap(words(template)), {"question": "a", "answer": "c"}
    (row,) = batches.encode([card], one, 16, "Q: {question} A:")
    assert row["input_ids"] == ids and learned(row) == [7, 1]
    assert prompts.prompt_ids(card, one, "Q: {question} A:") == before, "no end before the answer"
    (row,) = batches.encode([card], one, 16, "<s> Q: {question} A:")
    assert row["input_ids"] == [0, 3, 4, 6, 7, 1] and learned(row) == [7, 1], "one beginning"


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Slow])
def test_an_answer_that_merges_with_the_prompts_end_is_learned_whole(wrap):
    one = words()
    one.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    one.add_tokens([AddedToken("A:\tc", normalized=False)])
    (row,) = batches.encode([{"question": "a", "answer": "c"}], wrap(one), 16, "{question}\nA:\t")
    assert learned(row) == [one.convert_tokens_to_ids("A:\tc"), 1]


def test_generation_reads_the_very_prompt_that_training_wrote(tokenizer, loaded):
    model, seen = loaded[0], []
    original = model.generate
    model.generate = lambda **given: seen.append(given["input_ids"]) or original(**given)
    try:
        evaluation.generate(
            model, tokenizer, [LATER, "What is gout?"], config.load("cpu", "dataset.prompt=chat"), max_new_tokens=2
        )
    finally:
        del model.generate
    for card, ids in zip([LATER, "What is gout?"], seen[0].tolist(), strict=True):
        wanted = prompts.prompt_ids(card, tokenizer, "chat")
        assert ids[-len(wanted) :] == wanted and set(ids[: -len(wanted)]) <= {tokenizer.pad_token_id}


def test_chats_that_a_tokenizer_cannot_write_are_one_line(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match="has no chat template; take short, course, or a template of your own"
    ) as caught:
        batches.encode([CARD], tokenizer, 64, "chat")
    assert "\n" not in str(caught.value)
    tokenizer.chat_template = MISTRAL
    with pytest.raises(ValueError, match="chat template refuses a card: no system$"):
        batches.encode([LATER], tokenizer, 64, "chat")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="chat template writes another prompt once the answer is there"):
        batches.encode([CARD], tokenizer, 64, "chat")
    with pytest.raises(ValueError, match="dataset.prompt=chat is written by the model's tokenizer"):
        data.format_prompt("q", "chat")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("short", "Question: {x}\nAnswer:"),
        ("Q: {question}\nA:", "Q: {x}\nA:"),
        ("{question} ->  ", "{x} ->"),
        ('{"task": 3, "text": [{}, ""]} {question}'.replace("{}, ", ""), '{"task": 3, "text": [""]} {x}'),
        ("# über: {question}", "# über: {x}"),
    ],
)
def test_an_own_template_from_the_command_line_to_the_prompt(template, text):
    cfg = config.load("cpu", f"dataset.prompt={template}")
    assert cfg.dataset.prompt == template and data.format_prompt("{x}", cfg.dataset.prompt) == text


@pytest.mark.parametrize(
    "template", ["long", "Question:", "{question} {answer}", "{question}{question}", "{{question}}", "{Question}", "{}"]
)
def test_a_template_without_its_question_is_refused_at_once(template):
    for call in (lambda: config.load("cpu", f"dataset.prompt={template}"), lambda: data.format_prompt("q", template)):
        with pytest.raises(
            ValueError, match="known are short, course, chat, or a template of your own with {question}"
        ) as e:
            call()
        assert "\n" not in str(e.value) and template in str(e.value)
