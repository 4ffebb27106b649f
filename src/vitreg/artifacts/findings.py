"""What is found is told in sentences, and saved as a page with JSON beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from vitreg.common.disk import write_json


class Findings:
    """What `diagnose` and `compare` return.

    Attributes:
        verdict: the findings in sentences.
    """

    verdict: tuple[str, ...]
    _json_name: ClassVar[str]
    _shown: ClassVar[tuple[str, ...]]

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)
        return f"{type(self).__name__}({values}):\n  " + "\n  ".join(self.verdict[:2])

    def to_dict(self) -> dict[str, Any]:
        """The findings in JSON types."""
        raise NotImplementedError

    def _write_page(self, summary: dict[str, Any], path: Path) -> Path:
        raise NotImplementedError

    def save(self, folder: str | os.PathLike[str], *, command: str | None = None) -> Path:
        """Write `report.html`, and `diagnosis.json` or `comparison.json`, into a folder, which is made.

        Args:
            folder: where they go.
            command: makes the report again, as the page then says.

        Returns:
            The page's path.

        Raises:
            ValueError: the folder cannot be written.
        """
        summary = self.to_dict() | ({"command": command} if command else {})
        folder = Path(folder).expanduser()
        page = self._write_page(summary, folder / "report.html")
        write_json(folder / self._json_name, summary)
        return page
