"""BoldForge: distributed pretraining for functional MRI.

``boldforge.from_pretrained(folder)`` loads a release; every other part is imported by its own path,
for example ``from boldforge.data_shards import ClipStream``.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "from_pretrained"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds: `boldforge --help` and `boldforge.__version__` must not pay for it.
    if name == "from_pretrained":
        from boldforge.launch.release import from_pretrained

        return from_pretrained
    raise AttributeError(f"module 'boldforge' has no attribute {name!r}")
