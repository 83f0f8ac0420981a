"""Reads the public-domain texts into prose documents and dialogues for the demo model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

WRAP_COLUMNS = 72
BLOCK_CHARS = 8_000
HOLD_OUT_EVERY = 20  # one block in twenty, 5 %, is for validation

CURLY_QUOTES = {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"}
TO_ASCII = str.maketrans({**CURLY_QUOTES, "_": None, "\r": None})  # underscores mark italics
FOOTNOTE_BLOCK = re.compile(r"\[(?:Footnote \d+|[A-Z]): [^\]]*\]")
FOOTNOTE_MARK = re.compile(r" ?\(?\[\w\]\)?")
PLAY_SPEAKER = re.compile(r"([A-Z][A-Za-z' ]+):\n")
PROSE_SPEECH = re.compile(r'"([^"]+)("|$)')


@dataclass(frozen=True)
class Source:
    """A text file and how its lines are to be understood."""

    file_name: str
    kind: Literal["play", "verse", "novel", "unmarked novel"]


@dataclass(frozen=True)
class Corpus:
    """Prose documents, and dialogues as lists of at least two speeches by alternating speakers."""

    documents: list[str]
    dialogues: list[list[str]]


SOURCES = (
    Source("tinyshakespeare.txt", "play"),
    Source("pride_and_prejudice_pg1342.txt", "novel"),
    Source("botchan_en.txt", "unmarked novel"),
    Source("sonnets.txt", "verse"),
)


def read_corpus(folder: Path) -> tuple[Corpus, Corpus]:
    """Return (training, validation); no block of text is in both, neither as prose nor as dialogue."""
    training, validation = Corpus([], []), Corpus([], [])
    for source in SOURCES:
        text = strip_licence((folder / source.file_name).read_text(encoding="utf-8")).translate(TO_ASCII)
        paragraphs = split_paragraphs(text, source)
        for index, block in enumerate(blocks_of(paragraphs)):
            corpus = validation if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2 else training
            corpus.documents.append("\n\n".join(block))
            corpus.dialogues.extend(play_dialogues(block) if source.kind == "play" else novel_dialogues(block))
    return training, validation


def strip_licence(text: str) -> str:
    """Drop the producer's note before an e-text and everything from its end notice on."""
    text = re.sub(r"\A\s*Produced by [^\n]*\n", "", text)
    text = re.sub(r"\A.*\*\*\* ?START OF [^\n]*\n", "", text, flags=re.DOTALL)
    return re.split(r"\n(?:\*\*\* ?END OF|End of (?:the )?Project Gutenberg|--\(THE END\)--)", text)[0].strip()


def split_paragraphs(text: str, source: Source) -> list[str]:
    """Split into paragraphs; those of novels become one line each, verse keeps its lines."""
    if source.kind == "unmarked novel":
        text = mark_paragraphs(FOOTNOTE_MARK.sub("", FOOTNOTE_BLOCK.sub("", text)))
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text)]
    if source.kind in ("novel", "unmarked novel"):
        paragraphs = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return [paragraph for paragraph in paragraphs if paragraph]


def mark_paragraphs(text: str) -> str:
    """Put an empty line wherever the next line's first word would still have fitted on this line."""
    lines = [line for line in text.splitlines() if line.strip()]
    marked = lines[:1]
    for line, following in pairwise(lines):
        if len(line) + 1 + len(following.split(maxsplit=1)[0]) < WRAP_COLUMNS - 1:
            marked.append("")
        marked.append(following)
    return "\n".join(marked)


def blocks_of(paragraphs: list[str]) -> Iterator[list[str]]:
    """Group paragraphs into blocks of about `BLOCK_CHARS` characters."""
    block: list[str] = []
    for paragraph in paragraphs:
        block.append(paragraph)
        if sum(map(len, block)) >= BLOCK_CHARS:
            yield block
            block = []
    if block:
        yield block


def play_dialogues(block: list[str]) -> list[list[str]]:
    """Each run of paragraphs `NAME:` + speech is one dialogue; the names are dropped."""
    return runs_of_speeches([PLAY_SPEAKER.sub("", part, count=1) if PLAY_SPEAKER.match(part) else "" for part in block])


def novel_dialogues(block: list[str]) -> list[list[str]]:
    """Each run of paragraphs that open with a quotation mark is one dialogue; only what is quoted is kept.

    A paragraph whose last quotation is not closed goes on in the next one: both are one speech.
    """
    speeches: list[str] = []
    speech_is_open = False
    for paragraph in block:
        quoted = PROSE_SPEECH.findall(paragraph) if paragraph.startswith('"') else []
        speech = re.sub(",$", ".", " ".join(words.strip() for words, _ in quoted))
        if speech_is_open and speech:
            speeches[-1] += " " + speech
        else:
            speeches.append(speech)
        speech_is_open = bool(quoted) and quoted[-1][1] == ""
    return runs_of_speeches(speeches)


def runs_of_speeches(speeches: list[str]) -> list[list[str]]:
    """Split at empty strings (paragraphs that are no speech) and keep runs of two or more."""
    runs: list[list[str]] = [[]]
    for speech in speeches:
        if speech:
            runs[-1].append(speech)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) >= 2]
