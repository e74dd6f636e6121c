"""Plain models that a result stands beside: site, demographics, functional connectivity, images, embeddings.

They see the same subjects in the same folds as the adapted encoder: fitted on training subjects, their one setting
chosen on validation subjects, scored once on test subjects.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, softmax
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.decomposition import PCA, KernelPCA
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC, LinearSVR

from boldforge.data_shards import Manifest, ShardReader, atlas_on_grid, load_atlas
from boldforge.finetune.harmonise import ComBat
from boldforge.finetune.subjects import Subject
from boldforge.finetune.tasks import Task
from boldforge.finetune.tasks.base import Comparing, Kind, Matching

Floats = npt.NDArray[np.float64]
OnProgress = Callable[[int, int], None]

# From far too stiff to far too loose, in steps that matter.
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_MOST_COMPONENTS = 50
_FRAMES_AT_ONCE = 64
# Normalisations that subtract each voxel's mean over the run; see `boldforge.data_shards.normalise`.
_TAKES_MEANS = ("residual-z", "voxel-z", "percent-signal-change")


@dataclass(frozen=True)
class Baseline:
    """A kind of features, what to call them, and a kind of model."""

    features: str
    called: str
    model: str
    harmonised: bool = False

    def says(self, kind: Kind, column: str = "") -> str:
        """Describe it for a task of that kind, out of a phenotype column: what is asked for is never told from."""
        regression = {"linear": "ridge regression", "svm": "linear support vector regression"}
        classifiers = {"linear": "logistic regression", "svm": "linear SVM"}
        # As `_preparation` takes them.
        known = [name for name in ("site", "age", "sex") if name != column]
        called = f"{', '.join(known[:-1])} and {known[-1]}" if self.features == "demographics" else self.called
        called += " with sites harmonised by ComBat" if self.harmonised else ""
        if kind == "match":
            return f"{called}, compared as it is"
        return f"{called}, {(regression if kind == 'regression' else classifiers)[self.model]}"


_PLAIN: dict[str, Baseline] = {
    "site": Baseline("site", "site alone", "linear"),
    "demographics": Baseline("demographics", "site, age and sex", "linear"),
    "connectivity": Baseline("connectivity", "AAL3 functional connectivity", "linear"),
    "connectivity-svm": Baseline("connectivity", "AAL3 functional connectivity", "svm"),
    "volume": Baseline("volume", f"up to {_MOST_COMPONENTS} components of the volume", "linear"),
    "regions": Baseline("regions", "mean of every AAL3 region", "linear"),
    "mean-image": Baseline("image", "every voxel of the mean image", "linear"),
    "image": Baseline("image", f"up to {_MOST_COMPONENTS} components of the mean and amplitude image", "linear"),
    "embedding": Baseline("embedding", "frozen encoder's embedding", "linear"),
}
# ComBat takes the sites' means and spreads out of what was measured, not out of what was asked.
BASELINES: Mapping[str, Baseline] = _PLAIN | {
    f"{name}+combat": replace(baseline, harmonised=True)
    for name, baseline in _PLAIN.items()
    if baseline.features not in ("site", "demographics")
}


def check_names(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the names of a recipe's baselines if all of them are known.

    Raises
    ------
    ValueError
        If one is not.
    """
    unknown = [name for name in names or () if name not in BASELINES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a baseline; expected some of {', '.join(BASELINES)}")
    return names


def subject_features(
    reader: ShardReader,
    subjects: Sequence[Subject],
    kinds: Sequence[str],
    on_progress: OnProgress | None = None,
    clip_length: int = 0,
) -> dict[str, npt.NDArray[Any]]:
    """Compute the features of every subject, reading each run once.

    Parameters
    ----------
    reader
        Of the shards.
    subjects
        Whose features.
    kinds
        Of ``site``, ``demographics``, ``connectivity``, ``regions`` and ``image``.
    on_progress
        Called with subjects done and subjects in all.
    clip_length
        T, frames, of parts of subjects.

    Returns
    -------
    dict
        Kind to an array with one row per subject. ``connectivity``: Fisher z of the correlations between the mean time
        courses of the AAL3 regions on the grid, mean over the subject's runs. ``regions``: their means over time.
        ``image``: every voxel's mean (0 where normalisation took it away), then every voxel's standard deviation over
        time, mean over runs. Of a part of a subject only the frames of its clips count.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    regions = _region_means(reader.manifest) if {"connectivity", "regions"} & set(kinds) else None
    for number, subject in enumerate(subjects):
        phenotype = reader.manifest.runs[subject.runs[0]].phenotype
        if "site" in kinds:
            found["site"].append([subject.site or ""])
        if "demographics" in kinds:
            age, sex = phenotype.get("age"), phenotype.get("sex")
            found["demographics"].append(
                [subject.site or "", str(sex or ""), age if isinstance(age, int | float) else np.nan]
            )
        if {"connectivity", "regions", "image"} & set(kinds):
            whole = [(0, reader.manifest.runs[run].n_frames) for run in subject.runs]
            spans = [(start, clip_length) for start in subject.starts] or whole
            runs = subject.runs * len(spans) if subject.starts else subject.runs
            per_run = [_run_features(reader, run, regions, *span) for run, span in zip(runs, spans, strict=True)]
            for kind, values in zip(("connectivity", "regions", "image"), zip(*per_run, strict=True), strict=True):
                if kind in kinds:
                    found[kind].append(np.mean(values, axis=0))
        if on_progress:
            on_progress(number + 1, len(subjects))
    if "image" in kinds and reader.manifest.recipe.normalisation in _TAKES_MEANS:
        # Of a part of a run the means are its own; of a whole run nothing but rounding, which standardising would
        # make a pattern of.
        for subject, row in zip(subjects, found["image"], strict=True):
            if not subject.starts:
                row[: row.size // 2] = 0
    kept_as_they_are = ("site", "demographics")
    return {
        kind: np.array(rows, dtype=object if kind in kept_as_they_are else np.float64) for kind, rows in found.items()
    }


def tells_apart(name: str, features: npt.NDArray[Any]) -> bool:
    """Whether what a baseline reads differs between rows at all; else no fit of it can be better than chance."""
    if name.removesuffix("+combat") == "mean-image":
        features = _mean_half(features)
    return any(bool(np.any(row != features[0])) for row in features)


def baseline_scores(
    name: str,
    task: Task,
    features: npt.NDArray[Any],
    labels: Sequence[float],
    train: Sequence[int],
    validation: Sequence[int],
    test: Sequence[int],
    sites: Sequence[str | None] = (),
    anew: bool = False,
) -> tuple[Floats, Floats]:
    """Fit one baseline on a fold.

    Parameters
    ----------
    name
        A key of `BASELINES`.
    task
        Decides between classes and numbers, and the figure that is maximised.
    features
        One row per subject, of the baseline's kind.
    labels
        One per subject.
    train, validation, test
        Positions of subjects. The regularisation is the one with the highest validation figure.
    sites
        One per subject, for harmonised baselines: site effects are estimated from the training subjects alone.
    anew
        Fit the chosen model once more, on training and validation subjects together, before the test.

    Returns
    -------
    validation_scores, test_scores
        As the task's own scores: [N], for several classes [N, K].
    """
    truth = np.asarray(labels)
    if BASELINES[name].harmonised:
        features = ComBat(features[list(train)], [sites[i] for i in train]).apply(features, sites)
    if isinstance(task, Comparing):
        # Nothing is fitted but the features' scale: recordings are compared as they are.
        scaler = StandardScaler().fit(features[list(train)])
        checked, tested = (
            task.settle(truth[list(part)], scaler.transform(features[list(part)])) for part in (validation, test)
        )
        return checked, tested
    targets = (
        task.tensors["candidates"].double().numpy()[truth.astype(np.int64)] if isinstance(task, Matching) else truth
    )
    best: tuple[float, Floats, Floats, float] | None = None
    # What comes before the model does not depend on its strength, and the components of images take long.
    before = _preparation(name, task, len(train)).fit(features[list(train)])
    rows = {
        part: before.transform(features[list(of)])
        for part, of in (("train", train), ("val", validation), ("test", test))
    }
    for strength in _STRENGTHS:
        model = _model(name, task, strength)
        model.fit(rows["train"], targets[list(train)])
        checked = _scores(model, task, rows["val"])
        figure = task.headline(truth[list(validation)], checked)
        if best is None or figure > best[0]:
            best = (figure, checked, _scores(model, task, rows["test"]), strength)
    assert best is not None
    if not anew:
        return best[1], best[2]
    seen = [*train, *validation]
    whole = make_pipeline(_preparation(name, task, len(seen)), _model(name, task, best[3]))
    whole.fit(features[seen], targets[seen])
    return best[1], _scores(whole, task, features[list(test)])


def baseline_scores_over(
    name: str,
    task: Task,
    features: npt.NDArray[Any],
    labels: Sequence[float],
    splits: Sequence[tuple[Sequence[int], Sequence[int]]],
    test: Sequence[int],
    sites: Sequence[str | None] = (),
) -> tuple[Floats, Floats]:
    """Fit one baseline as a search over inner folds fits its winner: anew, on all who are not tested.

    Parameters
    ----------
    name, task, features, labels, test, sites
        As for `baseline_scores`; a task of classes or numbers.
    splits
        Training and validation subjects of every inner fold, as positions. The regularisation is the one with the
        highest mean of the validation figures.

    Returns
    -------
    validation_scores, test_scores
        As the task's own scores. The former of the validation subjects of all inner folds, one after the other, each by
        the model that was not fitted on them.
    """
    truth = np.asarray(labels)

    def harmonised(of: Sequence[int]) -> npt.NDArray[Any]:
        if not BASELINES[name].harmonised:
            return features
        return ComBat(features[list(of)], [sites[i] for i in of]).apply(features, sites)

    parts = []
    for train, validation in splits:
        own = harmonised(train)
        before = _preparation(name, task, len(train)).fit(own[list(train)])
        parts.append([before.transform(own[list(of)]) for of in (train, validation)])
    best: tuple[float, Floats, float] | None = None
    for strength in _STRENGTHS:
        checked, figures = [], []
        for (train, validation), (learned, held) in zip(splits, parts, strict=True):
            model = _model(name, task, strength).fit(learned, truth[list(train)])
            checked.append(_scores(model, task, held))
            figures.append(task.headline(truth[list(validation)], checked[-1]))
        figure = math.fsum(figures) / len(figures)
        if best is None or figure > best[0]:
            best = (figure, np.concatenate(checked), strength)
    assert best is not None
    seen = [i for part in splits[0] for i in part]
    own = harmonised(seen)
    whole = make_pipeline(_preparation(name, task, len(seen)), _model(name, task, best[2]))
    whole.fit(own[seen], truth[seen])
    return best[1], _scores(whole, task, own[list(test)])


def _scores(model: Any, task: Task, rows: npt.NDArray[Any]) -> Floats:
    if isinstance(task, Matching):
        return task.match(model.predict(rows))
    if task.kind == "regression":
        return np.asarray(model.predict(rows), dtype=np.float64)
    decision = model.decision_function(rows)
    if task.kind == "binary":
        return expit(decision)
    # Two of several classes in a fold give one decision; a class that is not in the fold gets no probability.
    known = softmax(decision if decision.ndim == 2 else np.stack([-decision, decision], axis=1) / 2, axis=1)
    scores = np.zeros((rows.shape[0], task.n_outputs))
    scores[:, model.classes_.astype(np.int64)] = known
    return scores


def _model(name: str, task: Task, strength: float) -> Any:
    svm = BASELINES[name].model == "svm"
    if isinstance(task, Matching):
        return Ridge(alpha=1 / strength)
    if task.kind == "regression":
        model = LinearSVR(C=strength, max_iter=20_000, random_state=0) if svm else Ridge(alpha=1 / strength)
        return TransformedTargetRegressor(model, transformer=StandardScaler())
    if svm:
        return LinearSVC(C=strength, class_weight="balanced", max_iter=20_000, random_state=0)
    return LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)


def _preparation(name: str, task: Task, n_train: int) -> Any:
    """Return what turns a baseline's features into numbers of about the same size."""
    features = BASELINES[name].features
    if features == "site":
        return OneHotEncoder(handle_unknown="ignore")
    if features == "demographics":
        # What is asked for must not be among what it is told from.
        numbers, names = [2] if task.column != "age" else [], [0, 1] if task.column != "sex" else [0]
        return make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), names),
            (make_pipeline(SimpleImputer(add_indicator=True, keep_empty_features=True), StandardScaler()), numbers),
        )
    if name.removesuffix("+combat") == "mean-image":
        return make_pipeline(FunctionTransformer(_mean_half), StandardScaler(), *_turned())
    if BASELINES[name].model == "svm":
        return make_pipeline(StandardScaler(), *_turned())
    if features in ("image", "volume"):
        components = PCA(min(_MOST_COMPONENTS, n_train - 1), random_state=0)
        return make_pipeline(StandardScaler(), components, StandardScaler())
    return StandardScaler()


def _turned() -> tuple[Any, ...]:
    """Return a rotation into the span of the training rows, where a linear model is the same and far cheaper."""
    return KernelPCA(kernel="linear", eigen_solver="dense"), FunctionTransformer(_at_least_one)


def _at_least_one(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return one column of zeros where nothing varied and no column is left."""
    return rows if rows.shape[1] else np.zeros((len(rows), 1))


def _mean_half(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return every voxel's mean out of means and deviations [N, 2 V]."""
    return images[:, : images.shape[1] // 2]


def _region_means(manifest: Manifest) -> npt.NDArray[np.float32]:
    """Return the matrix [V, R] that takes voxels to the means of the regions present on the grid."""
    labels_V = atlas_on_grid(load_atlas(), manifest.grid)[manifest.brain_mask()]
    regions = np.unique(labels_V[labels_V > 0])
    member = (labels_V[:, None] == regions[None, :]).astype(np.float32)
    return member / member.sum(axis=0)


def _run_features(
    reader: ShardReader, run: int, regions_VR: npt.NDArray[np.float32] | None, first: int, n_frames: int
) -> tuple[Floats, Floats, npt.NDArray[np.float32]]:
    """Return connectivity and region means (empty without regions) and image of a run's frames.

    A long run is never in memory whole.
    """
    courses = []
    total: Any = 0.0
    squares: Any = 0.0
    for start in range(first, first + n_frames, _FRAMES_AT_ONCE):
        clip = reader.read(run, start, min(_FRAMES_AT_ONCE, first + n_frames - start))
        values_TV = clip.mean + clip.q * clip.scale
        if regions_VR is not None:
            courses.append(values_TV @ regions_VR)
        total = total + values_TV.sum(axis=0, dtype=np.float64)
        squares = squares + np.einsum("tv,tv->v", values_TV, values_TV, dtype=np.float64)
    mean = total / n_frames
    amplitude = np.sqrt(np.maximum(squares / n_frames - mean**2, 0))
    image = np.concatenate([mean, amplitude]).astype(np.float32)
    if not courses:
        return np.empty(0), np.empty(0), image
    courses_TR = np.concatenate(courses)
    return _connectivity(courses_TR), courses_TR.mean(axis=0, dtype=np.float64), image


def _connectivity(courses_TR: npt.NDArray[Any]) -> Floats:
    """Return Fisher's z of the correlations of every pair of columns."""
    courses_TR = courses_TR.astype(np.float64)
    courses_TR -= courses_TR.mean(axis=0)
    length = np.sqrt((courses_TR**2).sum(axis=0))
    # A region outside the field of view has no course; its correlations are 0, as for one that shares nothing.
    unit = np.divide(courses_TR, length, out=np.zeros_like(courses_TR), where=length > 1e-8 * max(length.max(), 1e-30))
    correlation = unit.T @ unit
    upper = correlation[np.triu_indices(len(correlation), k=1)]
    return np.arctanh(np.clip(upper, -0.999999, 0.999999))
