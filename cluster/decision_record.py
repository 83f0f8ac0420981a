"""All that a global scheduler heard and decided, in a file: `baton replay` plays it to another policy.

A file is a line that says what it is, the scheduler's configuration, then one frame per event:

    | kind 1 byte | seconds since the record began 8 bytes | length 4 bytes | message, as on the wire |
"""

import errno
import logging
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from core.config import SchedulerConfig
from core.errors import ConfigurationError, InvalidParameter
from core.messages.to_scheduler import Deregister, Finish, Plan, Progress, Report, Reserve
from core.section import problems_in
from rpc.codec import decode, encode

logger = logging.getLogger(__name__)

Event = Report | Deregister | Reserve | Plan | Progress | Finish

_NAME = b"baton decisions "
MAGIC = _NAME + b"1\n"
MOST_FRAME_BYTES = 2**30
FLUSH_S = 1.0
_KINDS: tuple[type[Event], ...] = (Report, Deregister, Reserve, Plan, Progress, Finish)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_HEAD = struct.Struct("<BdI")


class DecisionRecorder:
    """Writes until the file is full, or its disk; what comes then is lost, and said once."""

    def __init__(self, path: Path, config: SchedulerConfig, most_bytes: int) -> None:
        """Raises ConfigurationError when the file cannot be written, unless for want of space."""
        self._path = path
        self._file: BinaryIO | None = None
        self._num_left = most_bytes
        self._began = self._flushed = time.monotonic()
        settings = config.model_dump_json().encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
            self._num_left -= self._file.write(MAGIC + struct.pack("<I", len(settings)) + settings)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise ConfigurationError(f"scheduler.record_dir: {path} cannot be written: {error}") from error
            self._give_up(error)

    def note(self, event: Event) -> None:
        """It happens now, before the scheduler knows of it; a plan once it is made."""
        if self._file is None:
            return
        now = time.monotonic()
        message = encode(event)
        frame = _HEAD.pack(_KINDS.index(type(event)), now - self._began, len(message)) + message
        self._num_left -= len(frame)
        if self._num_left <= 0:
            logger.warning("the record of decisions %s is full: nothing more is written", self._path)
            self.close()
            return
        try:
            self._file.write(frame)
            if now - self._flushed >= FLUSH_S:
                self._file.flush()
                self._flushed = now
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Nothing more comes."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A scheduler decides without a record, too."""
        logger.warning("the record of decisions %s ends here: %s", self._path, error)
        file, self._file = self._file, None
        with suppress(OSError):
            if file is not None:
                file.close()


def is_record(path: Path) -> bool:
    """Of whatever version. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_NAME)) == _NAME


def read_config(path: Path) -> SchedulerConfig:
    """That of the recorded scheduler. Raises ConfigurationError."""
    with _opened(path) as file:
        return _config(path, file)


def read_events(path: Path) -> Iterator[tuple[float, Event]]:
    """(seconds, event) in order, up to what a scheduler that died wrote whole. Raises ConfigurationError."""
    with _opened(path) as file:
        _config(path, file)
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            kind, seconds, length = _HEAD.unpack(head)
            if kind >= len(_KINDS) or length > MOST_FRAME_BYTES or not 0 <= seconds < inf:
                at = file.tell() - _HEAD.size
                raise ConfigurationError(
                    f"{path} holds what is no event at byte {at}: kind {kind} of {len(_KINDS)}, "
                    f"{length} bytes of at most {MOST_FRAME_BYTES}, {seconds:g} s"
                )
            message = file.read(length)
            if len(message) < length:
                return
            try:
                yield seconds, decode(_KINDS[kind], message)
            except InvalidParameter as error:
                raise ConfigurationError(f"{path} holds what is no event: {error}") from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error


def _config(path: Path, file: BinaryIO) -> SchedulerConfig:
    head = file.readline(64)
    if not head.startswith(_NAME):
        raise ConfigurationError(f"{path} is no record of decisions")
    if head != MAGIC:
        version = head.removeprefix(_NAME).strip().decode("ascii", "replace")
        raise ConfigurationError(f"{path} is a record of decisions of version {version!r}; version 1 is read here")
    try:
        (length,) = struct.unpack("<I", file.read(4))
        return SchedulerConfig.model_validate_json(file.read(min(length, MOST_FRAME_BYTES)))
    except ValidationError as error:
        problems = problems_in(error, "scheduler")
        raise ConfigurationError(f"{path} holds no scheduler configuration of this version: {problems}") from error
    except struct.error as error:
        raise ConfigurationError(f"{path} holds no scheduler configuration: {error}") from error
