"""Incremental decoding joins to the whole decoding and never shows half a character."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from cluster.ingress.detokenizer import Detokenizer
from cluster.ingress.served_model import ServedModel

JAPANESE = "吾輩は猫である。名前はまだ無い。🐈‍⬛ ok"
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def pieces_of(model: ServedModel, token_ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    stream = model.tokenizer.detokenizer(prompt)
    return [stream.push(token) for token in token_ids] + [stream.finish()]


def test_characters_of_several_tokens_come_whole(model: ServedModel):
    ids = model.tokenizer.encode([JAPANESE], False)[0]
    assert len(ids) > 2 * len(JAPANESE)  # three byte tokens for most characters
    pieces = pieces_of(model, ids)
    assert "".join(pieces) == JAPANESE
    assert not any("\ufffd" in piece for piece in pieces)


@relaxed
@given(st.data())
def test_any_tokens_join_to_their_whole_decoding(model: ServedModel, data: st.DataObject):
    ids = data.draw(st.lists(st.integers(0, model.vocab_size - 1), max_size=60))
    assert "".join(pieces_of(model, ids)) == model.tokenizer.decode(ids)


@relaxed
@given(st.text(max_size=20), st.text(max_size=20))
def test_output_joins_the_prompt_before_it(model: ServedModel, prompt: str, output: str):
    ids = model.tokenizer.encode([prompt, output], False)
    assert "".join(pieces_of(model, ids[1], tuple(ids[0]))) == output


def test_an_endless_run_of_broken_bytes_is_shown_in_bounded_windows(model: ServedModel):
    broken = model.tokenizer.encode(["猫"], False)[0][0]
    decoded: list[int] = []
    stream = Detokenizer(lambda ids: decoded.append(len(ids)) or model.tokenizer.decode(ids), frozenset())
    text = "".join(stream.push(broken) for _ in range(500)) + stream.finish()
    assert text == "\ufffd" * 500
    assert max(decoded) <= 32


@pytest.mark.parametrize("num_broken", range(10, 36))
def test_a_character_after_a_broken_run_is_whole_wherever_the_windows_end(model: ServedModel, num_broken: int):
    cat = model.tokenizer.encode(["猫"], False)[0]
    assert "".join(pieces_of(model, [cat[0]] * num_broken + cat)) == "\ufffd" * num_broken + "猫"


def test_special_tokens_have_no_text_and_do_not_lengthen_the_window(model: ServedModel):
    assert pieces_of(model, [0, 0, *model.tokenizer.encode(["a"], False)[0], 0]) == ["", "", "a", "", ""]


@pytest.mark.parametrize("text", ["▁Hello▁world", "▁a▁▁b", "caf<0xC3><0xA9>▁x"])
def test_sentencepiece_spaces_and_byte_tokens(text: str):
    vocabulary = {
        "▁Hello": 0,
        "▁world": 1,
        "▁": 2,
        "a": 3,
        "b": 4,
        "caf": 5,
        "<0xC3>": 6,
        "<0xA9>": 7,
        "▁x": 8,
        "▁a": 9,
    }
    rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids, rest = [], text
    while rest:
        token = max((t for t in vocabulary if rest.startswith(t)), key=len)
        ids.append(vocabulary[token])
        rest = rest[len(token) :]
    stream = Detokenizer(rust.decode, frozenset())
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == rust.decode(ids)
    assert "\ufffd" not in "".join(pieces)
    if text.startswith("▁Hello"):  # after a prompt the leading space stays
        continued = Detokenizer(rust.decode, frozenset(), context=[0])
        assert continued.push(1) == " world"
