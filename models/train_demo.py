"""Trains the bundled demo model: `python -m models.train_demo --text DIR --out DIR --seed N`."""

import argparse
import copy
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from models.demo_text import Corpus, read_corpus
from models.demo_tokenizer import END_OF_TEXT, TURN_END, VOCAB_SIZE, train_tokenizer

MAX_POSITIONS = 2048
TOKENS_PER_STEP = 2048
WINDOW_CYCLE = (512, 512, 1024, 512, 512, 2048)  # long windows teach the rotations of long distances
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 60
EVALUATE_EVERY = 140

SYSTEM_MESSAGES = ("You are a helpful assistant.", "You are a character of an old book.", "Answer in good English.")
SYSTEM_MESSAGE_SHARE = 0.3
MAX_TURNS = 8


def model_config() -> LlamaConfig:
    """6.6 million parameters; heads, KV heads and the MLP width divide by two ranks."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=[0, 2],
        pad_token_id=0,
    )


def conversations(dialogue: list[str], rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Cut a dialogue at random into chats that end with the assistant.

    The first cut is one speech late half of the time, so that over the epochs each speech is asked and answered.
    """
    start = rng.randint(0, 1)
    while start + 2 <= len(dialogue):
        turns = min(2 * rng.randint(1, MAX_TURNS // 2), (len(dialogue) - start) // 2 * 2)
        chat = []
        if rng.random() < SYSTEM_MESSAGE_SHARE:
            chat.append({"role": "system", "content": rng.choice(SYSTEM_MESSAGES)})
        for offset, speech in enumerate(dialogue[start : start + turns]):
            chat.append({"role": "assistant" if offset % 2 else "user", "content": speech})
        yield chat
        start += turns


def token_stream(corpus: Corpus, tokenizer: Any, rng: random.Random) -> torch.Tensor:
    """One pass over the corpus, documents and chats shuffled, each ended by end-of-text: int64 [tokens]."""
    texts = [document + END_OF_TEXT for document in corpus.documents]
    for dialogue in corpus.dialogues:
        for chat in conversations(dialogue, rng):
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False) + END_OF_TEXT)
    rng.shuffle(texts)
    return torch.tensor([token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in ids])


def training_batches(corpus: Corpus, tokenizer: Any, seed: int) -> Iterator[torch.Tensor]:
    """Yield int64 [windows, window length] batches of `TOKENS_PER_STEP` tokens, epoch after epoch."""
    rng = random.Random(seed)
    stream, step = token_stream(corpus, tokenizer, rng), 0
    while True:
        if len(stream) < TOKENS_PER_STEP:
            stream = torch.cat([stream, token_stream(corpus, tokenizer, rng)])
        yield stream[:TOKENS_PER_STEP].view(-1, WINDOW_CYCLE[step % len(WINDOW_CYCLE)])
        stream, step = stream[TOKENS_PER_STEP:], step + 1


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to a fiftieth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def loss_per_token(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token in nats, 0-dim; `windows` is int64 [windows, window length]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: torch.Tensor, window: int = 512) -> float:
    """Mean loss over the held-out stream cut into windows."""
    windows = stream[: len(stream) // window * window].view(-1, window)
    batches = torch.split(windows, max(1, TOKENS_PER_STEP // window))
    return sum(float(loss_per_token(model, batch)) * len(batch) for batch in batches) / len(windows)


def train(training: Corpus, validation: Corpus, tokenizer: Any, steps: int, seed: int) -> LlamaForCausalLM:
    """Train for `steps` steps and return the model as it was when the validation loss was lowest."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    optimizer = optimizer_for(model)
    held_out = token_stream(validation, tokenizer, random.Random(seed))
    batches = training_batches(training, tokenizer, seed)
    best_loss, best_weights = math.inf, copy.deepcopy(model.state_dict())
    started, recent = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_per_token(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent += loss.item()
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            held_out_loss = validation_loss(model, held_out)
            since_last = step % EVALUATE_EVERY + 1
            seconds = time.monotonic() - started
            print(
                f"{step + 1:5d} train {recent / since_last:.3f} validation {held_out_loss:.3f} {seconds:5.0f} s",
                flush=True,
            )
            recent = 0.0
            if held_out_loss < best_loss:
                best_loss, best_weights = held_out_loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    for window in (512, 1024, MAX_POSITIONS):
        print(f"best checkpoint, windows of {window}: validation {validation_loss(model, held_out, window):.3f}")
    return model


def main() -> None:
    """Read the text, train tokenizer and model, write the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder with the four text files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo", help="checkpoint folder to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1400)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    training, validation = read_corpus(arguments.text)
    tokenizer = train_tokenizer(training.documents, arguments.out, MAX_POSITIONS)
    model = train(training, validation, tokenizer, arguments.steps, arguments.seed)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        eos_token_id=tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END]),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    model.bfloat16().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
