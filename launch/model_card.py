"""The model card of a release: what the model is, what it was trained on, how well it does, and how to load it."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

FIGURES = (
    "top1",
    "top5",
    "auc",
    "balanced_accuracy",
    "accuracy",
    "sensitivity",
    "specificity",
    "brier",
    "r2",
    "r",
    "mae",
)


def render_card(config: Mapping[str, Any], summary: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """Render the card as Markdown.

    Parameters
    ----------
    config
        The release's ``config.json``.
    summary
        ``summary.json`` of the pretraining run, empty where it is not at hand.
    task
        ``task.json`` of the adapter, empty where there is none.
    """
    environment = Environment(
        loader=PackageLoader("boldforge.launch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  (Markdown from our own numbers and validated recipe names, not HTML)
    )
    adapted = task.get("figures", {})
    figures = adapted.get("figures", {})
    return environment.get_template("model_card.md.j2").render(
        config=config,
        data=config["data"],
        model=config["model"],
        training=config.get("training", {}),
        summary=summary,
        task=task,
        simulated=adapted.get("simulated"),
        measured_by=adapted.get("measured_by", "by a procedure that is not recorded"),
        # One count for all: a cross-validation, whose adapter is trained on everyone once the folds are measured.
        cross_validated="n" in adapted.get("subjects", {}),
        overlap=describe_overlap(adapted),
        rows=adapted.get("rows", "subjects"),
        n_tested=figures.get("n"),
        n_positive=figures.get("n_positive"),
        n_subjects=count_subjects(adapted.get("subjects", {})),
        tested={name: figures[name] for name in FIGURES if isinstance(figures.get(name), int | float)},
    )


def describe_overlap(results: Mapping[str, Any]) -> str:
    """Say whether the encoder met the test subjects in pretraining; results as finetuning, sweep or adapter hold them.

    What is compared is the shards' content hash, so other shards may still hold some of the same people.
    """
    pretrained_on_these = results.get("pretrained_on_these_shards")
    if pretrained_on_these is None:
        return "Whether the encoder was pretrained on the test subjects' scans is not recorded."
    if pretrained_on_these:
        return (
            "The encoder was pretrained, without labels, on these same shards, test subjects included: on people whom "
            "it has never met the figures may be lower."
        )
    return "The encoder was pretrained on other shards; whether some of the same people are in them was not checked."


def count_subjects(subjects: Mapping[str, Any]) -> int:
    """Return how many subjects an adapter saw or was tested on: counted in all, or per part of a split."""
    if "n" in subjects:
        return int(subjects["n"])
    return sum(int(part["n"]) for part in subjects.values())
