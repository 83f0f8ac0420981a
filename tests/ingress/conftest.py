"""A tiny byte-level BPE tokenizer with a chat template, and servers of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from cluster.ingress.served_model import ServedModel, load_served_model
from core.config import IngressConfig
from tests.ingress.scripted import Script, ScriptedBackend, Server, tokens_script

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if messages[-1].content == 'refuse' %}{{ raise_exception('I refuse') }}{% endif %}"
    "{% if shout is defined and shout %}!{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, hello there", "Paris is the capital of France"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(CORPUS * 4, trainer)
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE})
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "max_position_embeddings": 512,
                "vocab_size": rust.get_vocab_size(),
                "eos_token_id": 0,
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> ServedModel:
    return load_served_model(checkpoint, name="tiny")


@pytest.fixture(scope="module")
def shared_server(model: ServedModel) -> Iterator[Server]:
    server = Server(model, IngressConfig(max_body_mib=0.25), ScriptedBackend(tokens_script([0])))
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """A server whose backend remembers nothing of earlier tests; nothing may still run when the test ends."""
    shared_server.backend.__init__(tokens_script([0]))  # type: ignore[misc]
    yield shared_server
    shared_server.wait_until(lambda: shared_server.metric("baton_running_generations") == 0)


@pytest.fixture
def make_server(model: ServedModel) -> Iterator[Callable[..., Server]]:
    """Makes servers of other configurations."""
    made: list[Server] = []

    def make(script: Script, **config: object) -> Server:
        made.append(Server(model, IngressConfig.model_validate(config), ScriptedBackend(script)))
        return made[-1]

    yield make
    for server in made:
        server.close()
