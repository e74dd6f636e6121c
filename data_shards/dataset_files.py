"""Files of a dataset: found without following links to folders, and never outside the dataset's own folder."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def files_named(folder: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    """Yield the files below a folder whose names match, sorted within each folder; hidden folders are passed over.

    Folders that are links are not entered: what they lead to may lie anywhere, and may lead back.
    """
    for place, folders, names in os.walk(folder, onerror=_warn):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if pattern.match(name):
                yield Path(place, name)


def _warn(error: OSError) -> None:
    log.warning("%s: cannot be listed (%s), so nothing in it is found; check its permissions.", error.filename, error)


def links_to_folders(folder: Path) -> Iterator[Path]:
    """Yield the links below a folder that lead to folders outside it."""
    for place, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(folders):
            path = Path(place, name)
            if path.is_symlink() and is_outside(path, folder):
                yield path


def is_outside(path: Path, root: Path) -> bool:
    """Say whether a path, its links followed, leaves a folder."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def why_refused(path: Path, root: Path) -> str | None:
    """Return why a dataset's file is not read, None where it is: it leads out of the dataset, or to nothing.

    Links inside, such as those of git-annex to ``.git/annex/objects``, are fine.
    """
    if is_outside(path, root):
        return (
            f"leads out of {root} to {os.path.realpath(path)}, so it is not read; copy the file in, or name a folder "
            "that holds both with --root."
        )
    if path.is_symlink() and not path.exists():
        return (
            f"is a link to {path.readlink()}, which is not there; fetch the content (with git-annex or DataLad: "
            "datalad get) or remove the link."
        )
    return None
