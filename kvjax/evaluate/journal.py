"""A file of finished pieces of work, one JSON object a line: what a long run is resumed from."""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """The records of a JSONL file by their `key`; the last of a key counts.

    A record is written whole, in one call, and is on the disk before `append` returns. What a crash may leave is a last
    line without its end: it is cut off when the file is opened, and its work done again.

    Attributes:
      records: by key.
      notes: what was wrong with the file, a line each.
    """

    def __init__(self, path: Any):
        self.path = Path(path)
        self.records: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, TypeError, KeyError):
                self.notes.append(f"{self.path.name}: line {number} is damaged and ignored")
        if whole < len(content):
            os.truncate(self.path, whole)
            self.notes.append(f"{self.path.name}: the last line was cut off; its work is done again")

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record, which has a `key`."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if (written := os.write(file, line)) != len(line):
                raise OSError(f"`{self.path}`: only {written} of {len(line)} bytes could be written; is the disk full?")
            os.fsync(file)
        finally:
            os.close(file)
        self.records[record["key"]] = record
