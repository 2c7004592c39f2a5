"""From the names that annotations give images to files in a folder."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmem.errors import DataError
from jaxmem.evaluation.knowledge.files import some

SUFFIXES = (".jpg", ".JPEG", ".jpeg", ".png", ".JPG", ".webp", ".gif")


@dataclasses.dataclass(frozen=True)
class Named:
    """An image that a row only names: file names to try in turn, with or without an ending."""

    names: tuple[str, ...]


class Pictures:
    """The images below a folder, by name.

    A file in the folder itself is found at once. Only when one is not, all subfolders are listed, once.

    Args:
      folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def source(self, image: Any, where: str, missing: list[str]) -> Any:
        """The path of a `Named` image, or the image itself; a name without a file is added to `missing`.

        Raises:
          DataError: two files have the name.
        """
        if not isinstance(image, Named):
            return image
        for name in image.names:
            if (found := self.find(name, where)) is not None:
                return found
        missing.append(f"{' or '.join(image.names)} ({where})")
        return None

    def find(self, name: str, where: str = "image") -> str | None:
        """The file of a name, with or without ending, in the folder or below it; None when there is none."""
        for suffix in ("", *SUFFIXES):
            if (path := self.folder / f"{name}{suffix}").is_file():
                return str(path)
        bare = Path(name).stem if Path(name).suffix in SUFFIXES else Path(name).name
        found = self._below.get(Path(name).name) or self._below.get(bare) or ()
        if len(found) > 1:
            raise DataError(
                f"{where}: image {name!r} could be {some(sorted(found))}; point to a folder with one of them"
            )
        return found[0] if found else None

    @functools.cached_property
    def _below(self) -> dict[str, list[str]]:
        """Paths in all subfolders by file name, and by file name without ending."""
        known: dict[str, list[str]] = {}
        endings = tuple(suffix.lower() for suffix in SUFFIXES)
        for parent, _, names in os.walk(self.folder):
            for name in names:
                if name.lower().endswith(endings):
                    path = os.path.join(parent, name)
                    known.setdefault(name, []).append(path)
                    known.setdefault(Path(name).stem, []).append(path)
        return known


def check(missing: Sequence[str], total: int, folder: Path) -> None:
    """Raises DataError when images are missing, naming them and their rows."""
    if missing:
        raise DataError(
            f"no file for {len(missing)} image(s) of {total} questions below {folder}: {some(missing)}; give the "
            f"folder that holds them (endings {', '.join(sorted({suffix.lower() for suffix in SUFFIXES}))})"
        )
