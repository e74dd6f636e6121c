"""What is predicted. A task is one class, in a file of its own where it is more than a column; see `base.Task`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from boldforge.configs import count_of
from boldforge.data_shards import Manifest
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.events import EventsConfig
from boldforge.finetune.subjects import Cohort
from boldforge.finetune.tasks.base import Criterion, Phenotype, Task, describe_labels, named_classes
from boldforge.finetune.tasks.columns import Number, SeveralClasses, TwoClasses, as_text, check_column, check_numbers
from boldforge.finetune.tasks.diagnosis import AdhdDiagnosis
from boldforge.finetune.tasks.reidentification import Reidentification, open_reidentification
from boldforge.finetune.tasks.retrieval import ImageRetrieval, open_retrieval
from boldforge.finetune.tasks.states import TaskState, open_states

_NAMED: Mapping[str, Callable[[], Task]] = {
    "adhd": AdhdDiagnosis,
    "sex": lambda: TwoClasses("sex", "sex", ("F", "M"), ("female", "male")),
    "age": lambda: Number("age", "age"),
}
# Tasks whose rows are parts of subjects find these themselves; each gives its task and its rows.
_OPENED: Mapping[str, Callable[[Manifest, EventsConfig, int], tuple[Task, Cohort]]] = {
    "states": open_states,
    "retrieval": open_retrieval,
    "reidentify": open_reidentification,
}
OF_PARTS = tuple(_OPENED)
# By a trained head's classes and tensors.
_TRAINED: Mapping[str, Callable[[Sequence[str], Mapping[str, Tensor]], Task]] = {
    "states": lambda classes, tensors: TaskState(classes),
    "retrieval": ImageRetrieval,
    "reidentify": lambda classes, tensors: Reidentification(),
}
TASK_CHOICES = (
    "adhd (column diagnosis), sex, age; classify:COLUMN for the classes of any phenotype column, regress:COLUMN for "
    "its numbers; states for the conditions of a task, retrieval for the images that were shown (both: see events); "
    "reidentify for whose brain it is"
)
_MOST_CLASSES = 20
# With fewer than four subjects a class cannot be trained on, validated and tested.
_FEWEST_SUBJECTS = 4
_FEWEST_MEASURED = 5


def get_task(
    name: str,
    phenotypes: Iterable[Phenotype] | None = None,
    classes: Sequence[str] = (),
    tensors: Mapping[str, Tensor] | None = None,
    people: Iterable[str] | None = None,
) -> Task:
    """Return the task of that name.

    Parameters
    ----------
    name
        ``adhd``, ``sex``, ``age``, ``classify:COLUMN`` or ``regress:COLUMN``.
    phenotypes
        Of the dataset's runs: the task's column must be in one of them, and the classes of ``classify:COLUMN`` are the
        values that occur, in order.
    classes
        The classes that a trained head knows, in place of `phenotypes`.
    tensors
        What a trained task kept beside its adapter.
    people
        Whose each of the phenotypes is; None takes each for another subject's.

    Raises
    ------
    FinetuneError
        If there is no such task or no such column, a column of numbers holds a text, the column does not hold between
        2 and 20 classes, or two have the same name.
    """
    rows = None if phenotypes is None else list(phenotypes)
    task = _get_task(name, rows, classes, tensors, None if people is None else list(people))
    if rows is not None:
        check_column(task.column, rows)
        if isinstance(task, Number):
            check_numbers(task.column, rows)
    return task


def _get_task(
    name: str,
    phenotypes: Sequence[Phenotype] | None,
    classes: Sequence[str],
    tensors: Mapping[str, Tensor] | None,
    people: Sequence[str] | None,
) -> Task:
    if name in _NAMED:
        return _NAMED[name]()
    if name in _TRAINED and classes:
        return _TRAINED[name](classes, tensors or {})
    verb, _, column = name.partition(":")
    if verb == "regress" and column:
        return Number(name, column)
    if verb != "classify" or not column:
        raise FinetuneError(f"task is {name!r}, expected one of: {TASK_CHOICES}.")
    found: Sequence[str] = classes
    if not found:
        check_column(column, phenotypes or ())
        values = {phenotype.get(column) for phenotype in phenotypes or ()} - {None}
        numbers = sorted(value for value in values if not isinstance(value, str) and value is not None)
        texts = sorted(value for value in values if isinstance(value, str))
        found = [as_text(value) for value in numbers] + texts
        if twice := sorted({as_text(value) for value in numbers} & set(texts)):
            raise FinetuneError(
                f"phenotype column {column!r} holds {twice[0]!r} both as a number and as a text; write it in one way "
                "and shard again."
            )
        whose = people if people is not None else [str(row) for row in range(len(phenotypes or ()))]
        pairs = {(person, row.get(column)) for person, row in zip(whose, phenotypes or (), strict=True)}
        _check_classes(column, Counter(value for _, value in pairs))
    if not 2 <= len(found) <= _MOST_CLASSES:
        hint = f", or ask for regress:{column} if they are numbers" if len(found) > 1 else ""
        raise FinetuneError(
            f"phenotype column {column!r} holds {count_of(len(found), 'different value')}, expected 2 to "
            f"{_MOST_CLASSES} classes; name another column{hint}."
        )
    if len(found) == 2:
        return _TwoTexts(name, column, (found[0], found[1]))
    return SeveralClasses(name, column, found)


def _check_classes(column: str, subjects_of: Mapping[float | str | None, int]) -> None:
    """Refuse a column of measurements; subjects_of counts the subjects of every value."""
    values = [value for value in subjects_of if value is not None]
    rare = sum(subjects_of[value] < _FEWEST_SUBJECTS for value in values)
    if any(isinstance(value, str) for value in values) or len(values) < _FEWEST_MEASURED or 2 * rare <= len(values):
        return
    raise FinetuneError(
        f"phenotype column {column!r} holds {len(values)} different numbers, most of them in fewer than "
        f"{_FEWEST_SUBJECTS} subjects, which looks like a measurement and not like classes; use regress:{column}."
    )


def open_rows(name: str, manifest: Manifest, events: EventsConfig, clip_length: int) -> tuple[Task, Cohort] | None:
    """Open a task whose rows are parts of subjects, such as blocks; None for a task of whole subjects.

    Raises
    ------
    FinetuneError
        If the task finds no rows.
    """
    return _OPENED[name](manifest, events, clip_length) if name in _OPENED else None


class _TwoTexts(TwoClasses):
    """Two classes that are compared as texts, as several classes are."""

    def label(self, phenotype: Phenotype) -> float | None:
        value = phenotype.get(self.column)
        return super().label({self.column: None if value is None else as_text(value)})


__all__ = [
    "AdhdDiagnosis",
    "Criterion",
    "OF_PARTS",
    "TASK_CHOICES",
    "Task",
    "TaskState",
    "describe_labels",
    "get_task",
    "named_classes",
    "open_rows",
]
