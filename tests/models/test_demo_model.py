"""The bundled checkpoint: a folder transformers loads, small, that writes English of its books and ends its turns."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from models.demo_tokenizer import CHAT_TEMPLATE

DEMO = Path(__file__).parents[2] / "models" / "demo"
# words that occur three times or more in the training texts, one a line
CORPUS_WORDS = frozenset((Path(__file__).parent / "corpus_words.txt").read_text().split())
# from "Pride and Prejudice" and "King Richard II", out of the blocks held out from training
SENTENCES = (
    "You have sense, and we all expect you to use it. Your father would depend on your resolution and good conduct.",
    "Being so great, I have no need to beg. I'll beg one boon, And then be gone and trouble you no more.",
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def loss(model, ids: list[int]) -> float:
    """Mean cross-entropy of the next token, in nats."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


def write_text(model, ids: list[int], seed: int, max_new_tokens: int = 100, eos_token_id=None) -> list[int]:
    torch.manual_seed(seed)
    tokens = torch.tensor([ids])
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def share_of_known_words(text: str) -> float:
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) >= 40
    return sum(word in CORPUS_WORDS for word in words) / len(words)


def test_the_folder_is_small_and_complete(tokenizer, model):
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 16e6
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert isinstance(model, LlamaForCausalLM)
    assert len(tokenizer) == config["vocab_size"] == 4096
    for divided_by_two_ranks in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[divided_by_two_ranks] % 2 == 0


def test_both_ends_are_end_of_sequence_ids(tokenizer, model):
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert ends == [0, 2]
    assert model.generation_config.eos_token_id == ends
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_tokenizer_gives_any_text_back(tokenizer):
    for text in (*SENTENCES, "  two  spaces\n\ttab", "naïve 日本語 🚢 \x00", "it 's  'tis don 't ,  ."):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_chat_template_renders_every_role(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who calls?"},
        {"role": "assistant", "content": "Your mother."},
        {"role": "user", "content": "Madam, I am here."},
    ]
    turns = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho calls?<|im_end|>\n"
        "<|im_start|>assistant\nYour mother.<|im_end|>\n"
        "<|im_start|>user\nMadam, I am here.<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False) == turns
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == turns + "<|im_start|>assistant\n"
    assert tokenizer(prompt)["input_ids"].count(1) == 5  # each turn opens with one special token
    assert json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE


def test_sentences_are_likelier_than_their_words_shuffled(tokenizer, model):
    for sentence in SENTENCES:
        words = sentence.split()
        random.Random(0).shuffle(words)
        perplexity = math.exp(loss(model, tokenizer(sentence)["input_ids"]))
        shuffled = math.exp(loss(model, tokenizer(" ".join(words))["input_ids"]))
        assert perplexity < 200
        assert shuffled > 4 * perplexity


def test_it_writes_words_of_its_books(tokenizer, model):
    prompt = tokenizer("It is a truth universally acknowledged, that")["input_ids"]
    written = [token for seed in range(3) for token in write_text(model, prompt, seed)]
    assert share_of_known_words(tokenizer.decode(written, skip_special_tokens=True)) > 0.85


def test_the_loss_does_not_rise_towards_the_end_of_the_context(tokenizer, model):
    page = [token for sentence in SENTENCES * 60 for token in tokenizer(sentence + "\n\n")["input_ids"]][:2048]
    assert len(page) == 2048
    tokens = torch.tensor(page)
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    assert float(losses[1500:].mean()) < float(losses[:500].mean()) + 0.2


def test_most_chat_answers_end_their_turn(tokenizer, model):
    ended = 0
    for seed, question in enumerate(("Who are you?", "What news, my lord?", "Do you like to dance?", "Good night.")):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        answer = write_text(model, tokenizer(prompt)["input_ids"], seed, max_new_tokens=250, eos_token_id=[0, 2])
        ended += answer[-1] == 2
        assert len(answer) > 1
    assert ended >= 3
