"""The model card of a release: what the model is, what it was trained on, how well it does, and how to load it."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from boldforge.launch.figure_names import call_figure, show_interval, show_number, tested_figures


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
    environment.filters.update(figure=show_number, interval=show_interval)
    # Older adapters do not name the task among their figures.
    adapted = {"task": task.get("task"), **task.get("figures", {})}
    figures = adapted.get("figures", {})
    return environment.get_template("model_card.md.j2").render(
        config=config,
        data=config["data"],
        model=config["model"],
        training=config.get("training", {}),
        summary=summary,
        task=task,
        answer=_answer(task),
        predicted=_predicted(task),
        simulated=adapted.get("simulated"),
        planted=describe_simulated(adapted),
        measured_by=adapted.get("measured_by", "by a procedure that is not recorded"),
        # One count for all: a cross-validation, whose adapter is trained on everyone once the folds are measured.
        cross_validated="n" in adapted.get("subjects", {}),
        overlap=describe_overlap(adapted),
        rows=adapted.get("rows", "subjects"),
        n_tested=figures.get("n"),
        n_positive=figures.get("n_positive"),
        n_subjects=count_subjects(adapted.get("subjects", {}), adapted.get("inner_folds", 1)),
        tested=[row for row in tested_figures(adapted) if row["value"] is not None],
        # Of few people there is none; an older adapter has recorded none.
        missing="none" if "intervals" in adapted else "not recorded",
        compared_by=call_figure(adapted.get("compared_by", ""), adapted),
        baselines=_baselines(adapted),
        # An older sweep's sentence is the only verdict there is.
        sentence=adapted.get("sentence") if adapted.get("verdict") else None,
        verdict=adapted.get("verdict") or adapted.get("sentence"),
    )


def _answer(task: Mapping[str, Any]) -> str:
    """Say what the adapter's task tells apart; task as ``task.json`` holds it."""
    classes = [str(name) for name in task.get("classes", ())]
    if task.get("task") == "reidentify":
        return "whose brain it is"
    if task.get("task") == "retrieval":
        return f"which of {len(classes)} images was shown"
    return f"{', '.join(classes[:-1])} or {classes[-1]}" if len(classes) > 1 else "a number"


def _predicted(task: Mapping[str, Any]) -> str:
    """Say what ``model.predict`` gives for the adapter's task."""
    name, classes = task.get("task"), task.get("classes", ())
    outputs = task.get("head", {}).get("outputs", 1)
    if name == "reidentify":
        return f"gives [clips, {outputs}], unit vectors to compare by cosine"
    if name == "retrieval":
        return f"gives [clips, {len(classes)}], the cosine with each image"
    if outputs > 1:
        return f"gives [clips, {outputs}], probabilities in the order of model.classifier.task.classes"
    return f"scores {classes[-1]}" if classes else f"predicts {name}"


def describe_simulated(results: Mapping[str, Any]) -> str:
    """Say what a result on simulated subjects is worth; empty where they are people or it is not recorded."""
    if not results.get("simulated"):
        return ""
    if results.get("task") == "adhd":
        return (
            "The subjects are simulated, with a difference between the groups planted in named regions unless the "
            "simulation left it out: the figures say whether the pipeline finds what was put there, nothing else."
        )
    return (
        "The subjects are simulated: the figures show that the pipeline works and say nothing about people. boldforge "
        "simulate plants a difference between patients and controls and nothing else, so for any other question the "
        "right answer is chance, but for what goes with the diagnosis."
    )


def _baselines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what stands beside the model in the figure by which they are compared; empty where nothing does."""
    key = results.get("compared_by")
    return [
        {
            "says": entry["says"],
            "value": entry["figures"][key],
            "interval": entry["intervals"].get(key),
            "difference": entry["model_minus_baseline"]["difference"],
            "p": entry["model_minus_baseline"]["p"],
        }
        for entry in (results.get("baselines") or {}).values()
    ]


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
    if results.get("settings", {}).get("images"):
        return "The network was pretrained on other images; whether the same people are in some was not checked."
    return "The encoder was pretrained on other shards; whether some of the same people are in them was not checked."


def count_subjects(subjects: Mapping[str, Any], inner_folds: int = 1) -> int:
    """Return how many subjects an adapter saw or was tested on: counted in all, or per part of a split.

    Of several inner folds those who validate are among those who train.
    """
    if "n" in subjects:
        return int(subjects["n"])
    return sum(int(part["n"]) for name, part in subjects.items() if inner_folds == 1 or name != "validation")
