"""``boldforge sweep``: a search with one test or, nested, one search per outer fold, whose tests are pooled."""

import json
import logging
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from boldforge.finetune.beside import beside_chosen
from boldforge.finetune.cohort import OnProgress
from boldforge.finetune.cross_validation import check_harmonised
from boldforge.finetune.fold_models import FOLDER, adopt_folds
from boldforge.finetune.metrics import roc_points
from boldforge.finetune.rank_sweep import OUTER, TESTED, SweepConfig, open_journal, search_once
from boldforge.finetune.results import Prediction, write_json, write_predictions
from boldforge.finetune.study import Study, open_study
from boldforge.finetune.summary import Scores, summarise
from boldforge.finetune.sweep_journal import SweepError, read_journal
from boldforge.finetune.tasks import describe_labels
from boldforge.finetune.threads import cpu_threads

logger = logging.getLogger(__name__)


def sweep(config: SweepConfig, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Search for an adapter and test what was chosen once; with ``outer_folds`` above 1, in so many folds.

    Parameters
    ----------
    config
        The recipe.
    on_progress
        Called with work done and the most there can be.

    Returns
    -------
    dict
        The content of ``sweep.json``, see `search_once`; of a nested search that of ``metrics.json``. There ``figures``
        pools the test subjects of all outer folds, with intervals, baselines in the same folds, permutations, sites and
        a verdict as for a cross-validation, and ``folds`` says what each search chose. Each search is kept whole below
        ``outer/``. A nested search that was killed goes on as every search does.

    Raises
    ------
    BoldForgeError
        As `search_once`.
    """
    # What is done here, beside the trials, has as many threads as each of them.
    with cpu_threads(config.cpus):
        return _sweep(config, on_progress)


def _sweep(config: SweepConfig, on_progress: OnProgress | None) -> dict[str, Any]:
    _check_gpus(config)
    study = open_study(config)
    if not config.gpus and torch.cuda.is_available():
        logger.warning("There is a GPU, but gpus=0 trains the trials on CPU threads; gpus=0.5 lets two share it.")
    check_harmonised(config.baselines)
    if config.outer_folds == 1:
        return search_once(study, None, on_progress)
    metrics = config.out / "metrics.json"
    with (
        study.claim_out("running a nested sweep") as scratch,
        closing(open_journal(study, config, results=metrics.name)) as journal,
    ):
        if any("finished" in record for record in journal.records):
            logger.info("%s: this nested sweep is finished; its results are those in the folder.", config.out)
            results: dict[str, Any] = json.loads(metrics.read_text())
            if not (config.out / FOLDER).is_dir():  # of a boldforge that kept none
                _keep_winners(study, config, results, scratch)
        else:
            searches = [_search_fold(study, config, number, on_progress) for number in range(config.outer_folds)]
            results = _pool(study, config, searches, scratch)
            _keep_winners(study, config, results, scratch)
            journal.append({"finished": True})
        # In the order of the subjects' names, which is nobody's business once they are pooled.
        for left in (config.out / OUTER).glob(f"*/{TESTED}"):
            left.unlink()
        return results


def _check_gpus(config: SweepConfig) -> None:
    """Refuse GPUs that are not there before anything is written; Ray knows of its own."""
    if config.gpus and config.driver == "serial" and not torch.cuda.is_available():
        raise SweepError(f"There is no GPU here, but gpus is {config.gpus:g}; set gpus=0 to train on CPU threads.")


def _fold_folder(config: SweepConfig, number: int) -> Path:
    return config.out / OUTER / str(number + 1)


def _search_fold(study: Study, config: SweepConfig, number: int, on_progress: OnProgress | None) -> dict[str, Any]:
    """Run the whole search of one outer fold, or what is left of it."""
    folder = _fold_folder(config, number)
    finished = any("finished" in record for record in read_journal(folder / "journal.jsonl"))
    if finished and not (folder / TESTED).is_file():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alone = config.model_copy(update={"out": folder, "outer_folds": 1, "baselines": None})

    def report(done: int, total: int) -> None:
        if on_progress:
            on_progress(number * total + done, config.outer_folds * total)

    found = search_once(replace(study, config=alone), number, report)
    logger.info("outer fold %d of %d: %s", number + 1, config.outer_folds, found["sentence"])
    return found


def _pool(study: Study, config: SweepConfig, searches: list[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """Measure the winners' scores of all outer folds together, and the baselines in the same folds."""
    subjects, binary = study.cohort.subjects, study.task.kind == "binary"
    model = Scores.empty(study.task, 1, len(subjects))
    beside = beside_chosen(study, study.folds[: config.outer_folds], config.baselines, scratch)
    of_fold: dict[int, int] = {}
    per_fold = []
    for number, (fold, found) in enumerate(zip(study.folds, searches, strict=False)):
        test = study.positions(fold.test)
        tested = json.loads((_fold_folder(config, number) / TESTED).read_text())
        model.put(0, test, tested["scores"], tested["threshold"])
        of_fold |= dict.fromkeys(test, number + 1)
        per_fold.append(_describe(number, found, study.task.selects_by))
    kept = sorted(of_fold)
    labels = [subjects[i].label for i in kept]
    model, others = model.select(kept), {name: scores.select(kept) for name, scores in beside.items()}
    tests = f"{config.outer_folds} of " if config.outer_folds < config.folds else ""
    deal = f"{tests}{config.folds}-fold nested cross-validation over subjects"
    inner = {"inner_folds": config.inner_folds} if config.inner_folds > 1 else {}
    results = {
        "task": study.task.name,
        "simulated": study.cohort.simulated,
        "pretrained_on_these_shards": study.pretrained_on_these_shards,
        "measured_by": f"{deal}, a search{f' over {config.inner_folds} inner folds' if inner else ''} in each fold",
        **inner,
        **summarise(model, others, labels, [subjects[i].site for i in kept], config.seed),
        "people": None,
        "roc": roc_points(labels, model.mean()) if binary else None,
        "folds": per_fold,
        "subjects": describe_labels(study.task, labels),
        "n_unlabelled": study.cohort.n_unlabelled,
        "n_too_short": study.cohort.n_too_short,
        "n_duplicates": study.cohort.n_duplicates,
        "n_repeated": study.cohort.n_repeated,
        "n_several_sites": study.cohort.n_several_sites,
        "settings": config.settings(),
        "made_from": study.made_from(),
    }
    predictions = [
        Prediction(subjects[i], score, line if binary else None, of_fold[i])
        for i, score, line in zip(kept, model.mean(), model.threshold_RN[0], strict=True)
    ]
    write_predictions(config.out / "predictions.tsv", predictions, study.task.classes, study.called)
    write_json(scratch / "metrics.json", results)
    (scratch / "metrics.json").replace(config.out / "metrics.json")
    return results


def _keep_winners(study: Study, config: SweepConfig, results: dict[str, Any], scratch: Path) -> None:
    """Keep each outer fold's winner as a fine-tuning keeps its folds' models, so that it can be attributed."""
    about = {fold["fold"]: {"simulated": results["simulated"], **fold} for fold in results["folds"]}
    adapters = {number: _fold_folder(config, number - 1) / "best" / "adapter" for number in about}
    if not all((adapter / "task.json").is_file() for adapter in adapters.values()):
        return  # somebody removed the searches of a finished sweep
    tests = {number: {study.called[name] for name in study.folds[number - 1].test} for number in about}
    adopt_folds(adapters, config.out, tests, study.manifest.content_hash, about, scratch)


def _describe(number: int, found: dict[str, Any], figure: str) -> dict[str, Any]:
    """Say what one outer fold's search chose, and how that did."""
    best = found["best"]
    return {
        "fold": number + 1,
        "chosen": best["name"],
        f"validation_{figure}": best[f"validation_{figure}"],
        "best_epoch": best["best_epoch"],
        "trials": len(found["trials"]),
        "trainable_parameters": best["trainable_parameters"],
        "figures": found["figures"],
        "threshold": found["threshold"],
        **{f"n_{part}": found["subjects"][part]["n"] for part in ("train", "validation", "test")},
    }
