"""One product per folder: what a folder holds, told by its files, and the refusal to write another one into it."""

from pathlib import Path

from boldforge.configs.errors import ConfigError

# In this order, since a folder of a fine-tuning may hold others below it but no two of these beside each other.
_TOLD_BY = {
    "manifest.json": "shards",
    "metrics.csv": "a pretraining run",
    "journal.jsonl": "a sweep",
    "sweep.json": "a sweep",
    "metrics.json": "a fine-tuning",
    "attribution.json": "an attribution",
    "config.json": "a release",
}


def check_out(out: Path, product: str) -> None:
    """Refuse a folder that holds another product than the one that is to be written.

    Raises
    ------
    ConfigError
        If it does.
    """
    found = next(((name, held) for name, held in _TOLD_BY.items() if (out / name).is_file()), None)
    if found is not None and found[1] != product:
        raise ConfigError(
            f"{out}: holds {found[1]} ({found[0]}), so {product} is not written there; choose another out."
        )
