"""The file that a sweep writes: one record an architecture, saved as soon as it is there, so that it can resume."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from tqcompile.backend import source_digest
from tqcompile.sweep.build import Architecture
from tqcompile.sweep.examine import Settings

Record = dict[str, Any]


def versions() -> dict[str, str]:
    """What a record depends on: the packages, and the sources of this one that decide what a graph becomes."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "tqcompile": source_digest()}


class Records:
    """The records in `path`, which need not exist yet.

    Raises:
        ValueError: the file is there and holds something else.
    """

    def __init__(self, path: Path):
        self.path, self.versions = path, versions()
        self.found: dict[str, Record] = {}
        if path.exists():
            try:
                self.found = dict(json.loads(path.read_text())["architectures"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"--json {path}: no file of this command ({error!r}); name another one") from None

    def old(self, architecture: Architecture, settings: Settings) -> Record | None:
        """The record of these versions and this compiler, where there is one."""
        record = self.found.get(architecture.key)
        same = record is not None and (record["versions"], record["inner"]) == (self.versions, settings.inner)
        return record if same else None

    def put(self, architecture: Architecture, settings: Settings, record: Record) -> None:
        """Add a record, or replace the one there is, and save the file: at once or not at all."""
        self.found[architecture.key] = {**record, "versions": self.versions, "inner": settings.inner}
        rows = [f"{json.dumps(key)}: {json.dumps(self.found[key])}" for key in sorted(self.found)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text('{"architectures": {\n' + ",\n".join(rows) + "\n}}\n")
        os.replace(part, self.path)

    def of(self, architectures: list[Architecture]) -> list[Record]:
        """The records of these architectures that there are, in their order."""
        return [self.found[a.key] for a in architectures if a.key in self.found]
