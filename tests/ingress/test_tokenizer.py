"""Encoding, single tokens as bytes, chat templates and what goes wrong with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cluster.ingress.served_model import SamplingDefaults, ServedModel, load_served_model
from cluster.ingress.tokenizer import load_tokenizer
from cluster.settings import demo_model_path
from core.errors import ConfigurationError, InvalidParameter


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_texts_are_encoded_as_by_the_class_that_transformers_would_choose(name: str, tmp_path: Path):
    for path in demo_model_path().glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Hello  wörld! It's 1234567", "<|im_start|>user\nx<|im_end|>", "\n\n  y 猫 ", ""]
    for special in (True, False):
        assert ours.encode(texts, special) == [theirs(text, add_special_tokens=special).input_ids for text in texts]
    assert ours.eos_token_id == theirs.eos_token_id
    messages = [{"role": "user", "content": "hi"}]
    assert ours.render_chat(messages, {}) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_an_ingress_needs_no_torch():
    """It would cost every one of them seconds and 300 MB."""
    program = (
        "import sys; from pathlib import Path; import cluster.ingress.app, cluster.ingress.orchestrator;"
        "from cluster.ingress.served_model import load_served_model;"
        f"load_served_model(Path({str(demo_model_path())!r}));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def test_encoding_in_a_thread_is_encoding(model: ServedModel):
    texts = ["hello world", "猫"]
    assert await model.tokenizer.encode_in_thread(texts, False) == model.tokenizer.encode(texts, False)


def test_token_bytes_join_to_the_utf8_of_the_text(model: ServedModel):
    text = "hello 猫 é\n"
    ids = model.tokenizer.encode([text], False)[0]
    assert b"".join(map(model.tokenizer.token_bytes, ids)) == text.encode()
    assert model.tokenizer.token_bytes(0) == b"<|end|>"
    assert model.tokenizer.token_bytes(10**6) == b""


def test_a_conversation_is_rendered_for_the_assistants_turn(model: ServedModel):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    rendered = model.tokenizer.render_chat(messages, {})
    assert rendered == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert model.tokenizer.encode([rendered], False)[0][0] == 1  # <|system|> is one token
    assert model.tokenizer.render_chat(messages, {"shout": True}).endswith("!<|assistant|>")


def test_a_template_that_refuses_says_why(model: ServedModel):
    with pytest.raises(InvalidParameter, match="I refuse") as caught:
        model.tokenizer.render_chat([{"role": "user", "content": "refuse"}], {})
    assert caught.value.field == "messages"
    with pytest.raises(InvalidParameter, match="'chat_template' cannot be set"):
        model.tokenizer.render_chat([{"role": "user", "content": "x"}], {"chat_template": "{{ 1 }}"})


def edited(checkpoint: Path, folder: Path, name: str, **changes: object) -> Path:
    """A copy of the checkpoint in which `name` has other fields."""
    for path in checkpoint.iterdir():
        (folder / path.name).write_text(path.read_text())
    tree = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({k: v for k, v in (tree | changes).items() if v is not None}))
    return folder


def test_a_model_without_template_refuses_chat(checkpoint: Path, tmp_path: Path):
    tokenizer = load_tokenizer(edited(checkpoint, tmp_path, "tokenizer_config.json", chat_template=None))
    with pytest.raises(InvalidParameter, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "x"}], {})


def test_generation_config_sets_defaults_and_end_tokens(checkpoint: Path, tmp_path: Path):
    folder = edited(
        checkpoint,
        tmp_path,
        "generation_config.json",
        temperature=0.0,
        top_p=0.8,
        top_k=20,
        max_new_tokens=64,
        eos_token_id=[7, 9],
    )
    served = load_served_model(folder)
    assert served.defaults == SamplingDefaults(temperature=0.0, top_p=0.8, top_k=20, max_tokens=64)
    assert served.eos_token_ids == {0, 7, 9}
    assert (served.name, served.max_model_len) == (tmp_path.name, 512)


def test_without_generation_config_the_defaults_are_openais(model: ServedModel):
    assert model.defaults == SamplingDefaults(temperature=1.0, top_p=1.0, top_k=0, max_tokens=None)
    assert model.eos_token_ids == {0}


def test_what_cannot_be_served_is_said_at_start(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ConfigurationError, match="1000 exceeds the checkpoint's 512"):
        load_served_model(checkpoint, max_model_len=1000)
    with pytest.raises(ConfigurationError, match="no fast tokenizer"):
        load_served_model(tmp_path / "nothing")
    folder = edited(checkpoint, tmp_path, "config.json", max_position_embeddings=None)
    with pytest.raises(ConfigurationError, match="max_model_len"):
        load_served_model(folder)
    assert load_served_model(folder, max_model_len=99).max_model_len == 99
