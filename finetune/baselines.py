"""Plain models that every result stands beside: site, demographics, functional connectivity, images.

They see the same subjects in the same folds as the adapted encoder: fitted on training subjects, their one setting
chosen on validation subjects, scored once on test subjects.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, softmax
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC, LinearSVR

from boldforge.data_shards import Manifest, ShardReader, atlas_on_grid, load_atlas
from boldforge.finetune.cohort import Subject
from boldforge.finetune.tasks import Task
from boldforge.finetune.tasks.base import Kind

Floats = npt.NDArray[np.float64]
OnProgress = Callable[[int, int], None]

# From far too stiff to far too loose, in steps that matter.
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_MOST_COMPONENTS = 50
_FRAMES_AT_ONCE = 64


@dataclass(frozen=True)
class Baseline:
    """A kind of features, what to call them, and a kind of model."""

    features: str
    called: str
    model: str

    def says(self, kind: Kind) -> str:
        """Describe it for a task of that kind."""
        regression = {"linear": "ridge regression", "svm": "linear support vector regression"}
        classifiers = {"linear": "logistic regression", "svm": "linear SVM"}
        return f"{self.called}, {(regression if kind == 'regression' else classifiers)[self.model]}"


BASELINES: Mapping[str, Baseline] = {
    "site": Baseline("site", "site alone", "linear"),
    "demographics": Baseline("demographics", "site, age and sex", "linear"),
    "connectivity": Baseline("connectivity", "AAL3 functional connectivity", "linear"),
    "connectivity-svm": Baseline("connectivity", "AAL3 functional connectivity", "svm"),
    "image": Baseline("image", "50 components of the mean and amplitude image", "linear"),
}


def subject_features(
    reader: ShardReader, subjects: Sequence[Subject], kinds: Sequence[str], on_progress: OnProgress | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Compute the features of every subject, reading each run once.

    Parameters
    ----------
    reader
        Of the shards.
    subjects
        Whose features.
    kinds
        Of ``site``, ``demographics``, ``connectivity`` and ``image``.
    on_progress
        Called with subjects done and subjects in all.

    Returns
    -------
    dict
        Kind to an array with one row per subject. ``connectivity``: Fisher z of the correlations between the mean time
        courses of the AAL3 regions on the grid, mean over the subject's runs. ``image``: every voxel's mean, then every
        voxel's standard deviation over time, mean over runs.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    regions = _region_means(reader.manifest) if "connectivity" in kinds else None
    for number, subject in enumerate(subjects):
        phenotype = reader.manifest.runs[subject.runs[0]].phenotype
        if "site" in kinds:
            found["site"].append([subject.site or ""])
        if "demographics" in kinds:
            age, sex = phenotype.get("age"), phenotype.get("sex")
            found["demographics"].append([subject.site or "", str(sex or ""), np.nan if age is None else age])
        if "connectivity" in kinds or "image" in kinds:
            per_run = [_run_features(reader, run, regions) for run in subject.runs]
            for kind, values in zip(("connectivity", "image"), zip(*per_run, strict=True), strict=True):
                if kind in kinds:
                    found[kind].append(np.mean(values, axis=0))
        if on_progress:
            on_progress(number + 1, len(subjects))
    kept_as_they_are = ("site", "demographics")
    return {
        kind: np.array(rows, dtype=object if kind in kept_as_they_are else np.float64) for kind, rows in found.items()
    }


def baseline_scores(
    name: str,
    task: Task,
    features: npt.NDArray[Any],
    labels: Sequence[float],
    train: Sequence[int],
    validation: Sequence[int],
    test: Sequence[int],
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

    Returns
    -------
    validation_scores, test_scores
        As the task's own scores: [N], for several classes [N, K].
    """
    truth = np.asarray(labels)
    best: tuple[float, Floats, Floats] | None = None
    for strength in _STRENGTHS:
        model = _model(name, task, strength, len(train))
        model.fit(features[list(train)], truth[list(train)])
        checked = _scores(model, task, features[list(validation)])
        figure = task.headline(truth[list(validation)], checked)
        if best is None or figure > best[0]:
            best = (figure, checked, _scores(model, task, features[list(test)]))
    assert best is not None
    return best[1], best[2]


def _scores(model: Any, task: Task, rows: npt.NDArray[Any]) -> Floats:
    if task.kind == "regression":
        return np.asarray(model.predict(rows), dtype=np.float64)
    decision = model.decision_function(rows)
    if task.kind == "binary":
        return expit(decision)
    # Two of several classes in a fold give one decision; a class that is not in the fold gets no probability.
    known = softmax(decision if decision.ndim == 2 else np.stack([-decision, decision], axis=1) / 2, axis=1)
    scores = np.zeros((len(rows), task.n_outputs))
    scores[:, model.classes_.astype(np.int64)] = known
    return scores


def _model(name: str, task: Task, strength: float, n_train: int) -> Any:
    baseline = BASELINES[name]
    model: Any
    if task.kind == "regression":
        svm = baseline.model == "svm"
        model = LinearSVR(C=strength, max_iter=20_000, random_state=0) if svm else Ridge(alpha=1 / strength)
        model = TransformedTargetRegressor(model, transformer=StandardScaler())
    elif baseline.model == "svm":
        model = LinearSVC(C=strength, class_weight="balanced", max_iter=20_000, random_state=0)
    else:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)
    if baseline.features == "site":
        return make_pipeline(OneHotEncoder(handle_unknown="ignore"), model)
    if baseline.features == "demographics":
        # What is asked for must not be among what it is told from.
        numbers, names = [2] if task.column != "age" else [], [0, 1] if task.column != "sex" else [0]
        columns = make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), names),
            (make_pipeline(SimpleImputer(add_indicator=True, keep_empty_features=True), StandardScaler()), numbers),
        )
        return make_pipeline(columns, model)
    if baseline.features == "image":
        components = PCA(min(_MOST_COMPONENTS, n_train - 1), random_state=0)
        return make_pipeline(StandardScaler(), components, StandardScaler(), model)
    return make_pipeline(StandardScaler(), model)


def _region_means(manifest: Manifest) -> npt.NDArray[np.float32]:
    """Return the matrix [V, R] that takes voxels to the means of the regions present on the grid."""
    labels_V = atlas_on_grid(load_atlas(), manifest.grid)[manifest.brain_mask()]
    regions = np.unique(labels_V[labels_V > 0])
    member = (labels_V[:, None] == regions[None, :]).astype(np.float32)
    return member / member.sum(axis=0)


def _run_features(
    reader: ShardReader, run: int, regions_VR: npt.NDArray[np.float32] | None
) -> tuple[Floats, npt.NDArray[np.float32]]:
    """Return a run's connectivity (empty without regions) and its image; a long run is never in memory whole."""
    n_frames = reader.manifest.runs[run].n_frames
    courses = []
    total: Any = 0.0
    squares: Any = 0.0
    for start in range(0, n_frames, _FRAMES_AT_ONCE):
        clip = reader.read(run, start, min(_FRAMES_AT_ONCE, n_frames - start))
        values_TV = clip.mean + clip.q * clip.scale
        if regions_VR is not None:
            courses.append(values_TV @ regions_VR)
        total = total + values_TV.sum(axis=0, dtype=np.float64)
        squares = squares + np.einsum("tv,tv->v", values_TV, values_TV, dtype=np.float64)
    mean = total / n_frames
    amplitude = np.sqrt(np.maximum(squares / n_frames - mean**2, 0))
    image = np.concatenate([mean, amplitude]).astype(np.float32)
    return (_connectivity(np.concatenate(courses)) if courses else np.empty(0)), image


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
