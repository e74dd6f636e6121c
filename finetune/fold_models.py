"""The model of every outer fold, kept with the subjects that it has not seen."""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from boldforge.configs import ConfigError
from boldforge.finetune.classifier import Classifier, read_task, save_adapter
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.results import write_json

FOLDER = "folds"


@dataclass(frozen=True)
class FoldModel:
    """A fold's adapter folder, its test subjects' pseudonyms, and their positions in the cohort once they are known."""

    number: int
    folder: Path
    people: tuple[str, ...] = ()
    test: tuple[int, ...] = ()

    def placed(self, cohort: Sequence[str]) -> "FoldModel":
        """Return the same with its subjects' positions among the cohort's pseudonyms."""
        return replace(self, test=tuple(i for i, name in enumerate(cohort) if name in set(self.people)))


def clear_folds(out: Path) -> None:
    """Remove the fold models of an earlier fine-tuning in the same folder."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def keep_fold(
    classifier: Classifier, out: Path, number: int, test: Collection[str], shards_hash: str, about: Mapping[str, Any]
) -> None:
    """Write a fold's model as an adapter folder ``folds/<number>``, with its test subjects' pseudonyms."""
    kept = {"fold": number, "test": sorted(test), "shards_hash": shards_hash}
    save_adapter(classifier, out / FOLDER / str(number), {**about, **kept})


def adopt_folds(
    adapters: Mapping[int, Path],
    out: Path,
    tests: Mapping[int, Collection[str]],
    shards_hash: str,
    about: Mapping[int, Mapping[str, Any]],
    scratch: Path,
) -> None:
    """Keep copies of adapter folders as fold models, as `keep_fold` writes them: all of them, or none.

    Parameters
    ----------
    adapters
        Each fold's, by number.
    out
        Of the results.
    tests, shards_hash, about
        As in `keep_fold`; about takes the place of what ``task.json`` says of the adapter.
    scratch
        An empty folder beside `out`.
    """
    for number, adapter in adapters.items():
        copy = shutil.copytree(adapter, scratch / FOLDER / str(number))
        kept = {"fold": number, "test": sorted(tests[number]), "shards_hash": shards_hash}
        write_json(copy / "task.json", read_task(copy) | {"figures": {**about[number], **kept}})
    clear_folds(out)
    (scratch / FOLDER).rename(out / FOLDER)


def read_folds(out: Path, shards_hash: str) -> list[FoldModel]:
    """Return the fold models beside the results of a fine-tuning or a nested sweep, by number.

    Raises
    ------
    FinetuneError
        If there are none, some are missing, or they were trained on other shards.
    """
    results = read_results(out)
    wanted = sorted({int(fold["fold"]) for fold in results["folds"]})
    again = "sweep" if "outer_folds" in results["settings"] else "finetune"
    mend = f"{again} again with this boldforge" + (" and keep_folds=true" if again == "finetune" else "")
    models = []
    for number in wanted:
        folder = out / FOLDER / str(number)
        if not folder.is_dir():
            raise FinetuneError(
                f"{folder}: no such folder, so which subjects this fold's model has not seen cannot be told; {mend}."
            )
        about = read_task(folder)["figures"]
        if about.get("shards_hash") != shards_hash:
            raise FinetuneError(
                f"{folder}: was trained on other shards than those given (content hash {about.get('shards_hash')}, not "
                f"{shards_hash}); give the fine-tuning's own with shards=FOLDER."
            )
        if not all(isinstance(name, str) for name in about["test"]):
            raise FinetuneError(
                f"{folder}: is of an older boldforge, which numbered its test subjects in another way; finetune again."
            )
        models.append(FoldModel(number, folder, tuple(about["test"])))
    return models


def read_results(out: Path) -> dict[str, Any]:
    """Read the ``metrics.json`` of a fine-tuning or a nested sweep.

    Raises
    ------
    ConfigError
        If it is missing or damaged.
    """
    path = out / "metrics.json"
    try:
        results = json.loads(path.read_text())
        if not isinstance(results, dict) or not {"settings", "folds"} <= results.keys():
            raise ValueError("no settings in it")
    except OSError:
        raise ConfigError(
            f"{path}: no such file; give the folder of a finished boldforge finetune or of a nested sweep."
        ) from None
    except ValueError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path}: is damaged ({problem}); remove it and finetune again.") from None
    return results
