"""Releases: a folder that other people can load, checked when it is written and again when it is read.

    config.json  model.safetensors  README.md (model card)  adapter/ (optional)

``config.json`` records the SHA-256 of every other file that is computed with, and what the model makes of a fixed clip.

Shape suffixes: B clips · T frames · V brain voxels · C channels.
"""

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import boldforge
from boldforge.configs import BoldForgeError
from boldforge.finetune import ADAPTER_FILES, Classifier, NeuroStormBackbone, load_adapter, read_task
from boldforge.finetune.backbone import Backbone, fit_to_data
from boldforge.finetune.classifier import base_differences
from boldforge.launch.model_card import render_card
from boldforge.pretrain import Pretrained, load_pretrained

_PROBE_SEED = 0
# Float32 on another processor, thread count or version of torch: a wrong file is off by far more.
_ROUNDING = 1e-3
_MOST_SHOWN = 8


class ReleaseError(BoldForgeError):
    """A release cannot be written or read as asked."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A release in memory.

    Attributes
    ----------
    backbone
        The pretrained encoder, without the adapter.
    classifier
        Encoder, adapter and head, None where the release has no adapter.
    config
        The folder's ``config.json``.
    """

    backbone: NeuroStormBackbone
    classifier: Classifier | None
    config: dict[str, Any]

    @property
    def network(self) -> torch.nn.Module:
        """The pretrained network itself, which peft takes: ``PeftModel.from_pretrained(model.network, ADAPTER)``.

        peft puts the adapter's layers into it in place, so that `embed` then gives adapted embeddings.
        """
        return self.backbone.network

    @torch.no_grad()
    def embed(self, values_BTV: Tensor | np.ndarray) -> Tensor:
        """Embed clips.

        Parameters
        ----------
        values_BTV
            float32 [B, T, V]: ``clip_length`` frames, one every ``tr`` seconds, of the brain voxels of ``grid``,
            normalised as ``normalisation`` says; all four are in ``config["data"]``. A batch of
            `ClipStream` gives them by ``batch.dequantise()``.

        Returns
        -------
        Tensor
            float32 [B, C].
        """
        return self.backbone.embed(self._checked(values_BTV, self.backbone))

    def predict(self, values_BTV: Tensor | np.ndarray) -> Tensor:
        """Return what the adapter says of each clip.

        Returns
        -------
        Tensor
            float32 [B]: of two classes the probability of the second; of a regression the number, in the column's
            unit. float32 [B, K]: of several classes the probability of each, in the order of
            ``classifier.task.classes``; of retrieval the cosine with every image, in that order; of re-identification
            an embedding of length 1, to be compared by cosine.

        Raises
        ------
        ReleaseError
            If the release has no adapter.
        """
        if self.classifier is None:
            raise ReleaseError(
                "This release has no adapter, so it can embed but not predict; make one with boldforge finetune or "
                "sweep, and release it with --adapter."
            )
        return self.classifier.predict(self._checked(values_BTV, self.classifier.backbone))

    def _checked(self, values_BTV: Tensor | np.ndarray, backbone: Backbone) -> Tensor:
        values = torch.as_tensor(values_BTV, dtype=torch.float32)
        frames, voxels = backbone.data["clip_length"], _voxels(backbone)
        any_length = self.backbone.any_length and values.ndim == 3 and values.shape[1] >= self.backbone.fewest_frames
        if values.ndim != 3 or values.shape[2] != voxels or (values.shape[1] != frames and not any_length):
            raise ReleaseError(
                f"The clips have shape {list(values.shape)}, expected [clips, {frames} frames, {voxels} "
                f"brain voxels of {backbone.data['grid']}]; shard the runs with this release's recipe."
            )
        return values


def from_pretrained(folder: str | Path, data: Mapping[str, Any] | None = None) -> LoadedModel:
    """Load a release (or an export) in evaluation mode on the CPU.

    Parameters
    ----------
    folder
        The release.
    data
        ``grid``, ``tr`` and ``clip_length`` of the clips to embed, where they are not those of pretraining; see
        `boldforge.finetune.load_backbone`. The adapter predicts on what it was trained on.

    Raises
    ------
    BoldForgeError
        If a file is missing, its hash is not the recorded one, or its format is another version's.
    """
    folder = Path(folder)
    pretrained = load_pretrained(folder)
    config, adapter = pretrained.config, folder / "adapter"
    for name, digest in config.get("adapter", {}).get("files", {}).items():
        _check_file(adapter / name, digest)
    classifier = None
    if adapter.is_dir():
        # An adapter changes its encoder in place, so it gets one of its own.
        twin = replace(pretrained, model=copy.deepcopy(pretrained.model))
        task, forced = read_task(adapter), bool(config.get("adapter", {}).get("forced_base"))
        fitted = fit_to_data(twin, task.get("data", {}))
        classifier = load_adapter(adapter, NeuroStormBackbone(fitted, task["pool"]), forced)
    # A release says how its tokens are pooled, so that another default in another version changes no embedding.
    pool = config.get("embedding", {}).get("pool")
    pretrained = fit_to_data(pretrained, data or {})
    backbone = NeuroStormBackbone(pretrained, pool) if pool else NeuroStormBackbone(pretrained)
    backbone.network.requires_grad_(False)
    return LoadedModel(backbone, classifier, config)


def write_release(
    pretrained: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    replace: bool = False,
    force_base: bool = False,
) -> Path:
    """Write a release: everything is checked, written beside its place, and moved there whole.

    No path, host name or subject identifier goes in.

    Parameters
    ----------
    pretrained
        A pretraining run folder, or an export (``config.json`` and ``model.safetensors``).
    out
        The release folder; must not exist, unless `replace` and it holds a release.
    adapter
        A folder that `boldforge.finetune.save_adapter` wrote, or one with it as ``adapter/``; trained on these weights.
    replace
        Replace a release that is already there.
    force_base
        Release an adapter even with weights it was not trained on; ``config.json`` and the card then say so.

    Raises
    ------
    BoldForgeError
        If something is missing, damaged or does not belong together, or `out` is taken.
    """
    pretrained, out = Path(pretrained), Path(out)
    export = pretrained / "export" if (pretrained / "export").is_dir() else pretrained
    _check_free(out, replace)
    loaded = load_pretrained(export)
    adapter = _adapter_folder(Path(adapter)) if adapter is not None else None
    if adapter is not None:
        _check_releasable(adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as partial:
        staged = Path(partial) / "release"
        staged.mkdir()
        shutil.copyfile(export / "model.safetensors", staged / "model.safetensors")
        config = _without_paths(loaded.config) | {"boldforge_version": boldforge.__version__}
        if adapter is not None:
            config["embedding"] = {"pool": read_task(adapter)["pool"]}
            _copy_adapter(adapter, staged / "adapter")
            config["adapter"] = {"files": {path.name: _sha256(path) for path in sorted((staged / "adapter").iterdir())}}
            forced = force_base and _is_other_base(loaded, adapter)
            config["adapter"] |= {"forced_base": True} if forced else {}
        _write_json(staged / "config.json", config)
        try:
            model = from_pretrained(staged)
        except BoldForgeError as error:
            # It is the user's adapter that does not fit, not the copy.
            raise ReleaseError(str(error).replace(str(staged / "adapter"), str(adapter))) from None
        config["embedding"] = {"pool": model.backbone.pool, "dim": model.backbone.dim}
        config["probe"] = probe(model)
        _write_json(staged / "config.json", config)
        summary = _read_json(export.parent / "summary.json") if export != pretrained else {}
        task = _read_json(staged / "adapter" / "task.json")
        (staged / "README.md").write_text(render_card(config, summary, task))
        if out.exists():
            shutil.rmtree(out)
        staged.rename(out)
    return out


def _is_other_base(pretrained: Pretrained, adapter: Path) -> bool:
    """Whether an adapter was trained on other weights, or on other input, than these."""
    task = read_task(adapter)
    fitted = fit_to_data(pretrained, task.get("data", {}))
    return bool(base_differences(task, NeuroStormBackbone(fitted, task["pool"])))


def probe(model: LoadedModel) -> dict[str, Any]:
    """Run a fixed random clip: a release that gives the same hash computes the same function, to the last bit.

    Returns
    -------
    dict
        ``seed``, ``shape`` [1, T, V], ``embedding_sha256`` of the float32 values, the first four of them for a reader
        whose machine rounds differently, the version of torch, and with an adapter its ``prediction``: a number, or a
        list of as many as it gives per clip.
    """
    clip = _probe_clip(model.backbone)
    threads = torch.get_num_threads()
    # The order of a sum, and so its last bit, may depend on how many threads share it.
    torch.set_num_threads(1)
    try:
        embedding = model.embed(clip).numpy()
        predicted = {}
        if model.classifier is not None:
            predicted["prediction"] = model.predict(_probe_clip(model.classifier.backbone))[0].tolist()
    finally:
        torch.set_num_threads(threads)
    return {
        "seed": _PROBE_SEED,
        "shape": list(clip.shape),
        "embedding_sha256": hashlib.sha256(embedding.tobytes()).hexdigest(),
        "first_values": [float(value) for value in embedding[0, :4]],
        "torch": torch.__version__,
        **predicted,
    }


def check_release(folder: Path, console: Console) -> int:
    """Read a release back, print what it is and whether it reproduces what it recorded; return the exit code.

    0 if it reproduces, to the last bit or but for rounding; 1 if it computes something else.

    Raises
    ------
    BoldForgeError
        As `from_pretrained`.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    model = from_pretrained(folder)
    data, recorded, computed = model.config["data"], model.config.get("probe"), probe(model)
    verified = "weights and adapter" if "adapter" in model.config else "weights"
    say(f"{folder}: {verified} verified, SHA-256 of the weights {model.backbone.weights_hash[:16]}…")
    say(
        f"Input: clips of {data['clip_length']} frames on {data['grid']} at {data['tr']} s, {data['normalisation']}; "
        f"embedding of {model.backbone.dim} values"
        + (f"; adapter for {model.classifier.task.name}." if model.classifier else "; no adapter.")
    )
    predicted = f", prediction {_shown(computed['prediction'])}" if "prediction" in computed else ""
    say(f"Embedding of the probe clip: {computed['embedding_sha256'][:16]}…{predicted}")
    if recorded is None:
        say("No embedding was recorded here (an export, not a release), so there is nothing to compare with.")
        return 0
    if all(computed.get(name) == value for name, value in recorded.items() if name != "torch"):
        say("It equals the recorded one, bit for bit.")
        return 0
    difference = _relative_difference(recorded, computed)
    machine = f"recorded with torch {recorded['torch']}, computed with {computed['torch']}"
    if difference <= _ROUNDING:
        say(
            f"It agrees with the recorded one to {difference:.1g}, not to the last bit: another processor or version "
            f"of torch rounds differently ({machine})."
        )
        return 0
    say(
        f"It differs from the recorded one by {difference:.2g}, more than rounding explains ({machine}), though the "
        "files are intact: the release must not be trusted on this machine."
    )
    return 1


def _shown(prediction: float | Sequence[float]) -> str:
    """Write a prediction, of a long one the first numbers."""
    numbers = prediction if isinstance(prediction, Sequence) else [prediction]
    end = f" … ({len(numbers)} numbers)" if len(numbers) > _MOST_SHOWN else ""
    return ", ".join(f"{number:.6f}" for number in numbers[:_MOST_SHOWN]) + end


def _relative_difference(recorded: Mapping[str, Any], computed: Mapping[str, Any]) -> float:
    """Return the largest difference of first values or prediction, relative to the largest of each."""
    if not recorded.keys() <= computed.keys() or recorded["shape"] != computed["shape"]:
        return float("inf")
    worst = 0.0
    for name in ("first_values", "prediction"):
        if name in recorded:
            expected, now = np.atleast_1d(recorded[name]), np.atleast_1d(computed[name])
            if expected.shape != now.shape:
                return float("inf")
            found = np.abs(expected - now).max() / np.abs(expected).max()
            worst = max(worst, float(found)) if np.isfinite(found) else float("inf")
    return worst


def _probe_clip(backbone: Backbone) -> np.ndarray:
    shape = (1, int(backbone.data["clip_length"]), _voxels(backbone))
    return np.random.default_rng(_PROBE_SEED).standard_normal(shape, dtype=np.float32)


def _voxels(backbone: Backbone) -> int:
    return int(backbone.network.token_grid.n_voxels)  # type: ignore[union-attr, arg-type]


def _check_free(out: Path, replace: bool) -> None:
    if not out.exists():
        return
    if not replace:
        raise ReleaseError(f"{out}: is already there; choose another --out, or add --replace.")
    if not ((out / "config.json").is_file() and (out / "model.safetensors").is_file()):
        raise ReleaseError(f"{out}: is there but holds no release, so it is not replaced; choose another --out.")


def _check_file(path: Path, digest: str) -> None:
    if not path.is_file():
        raise ReleaseError(f"{path}: no such file, though config.json lists it; fetch the release again.")
    found = _sha256(path)
    if found != digest:
        raise ReleaseError(
            f"{path}: SHA-256 is {found[:12]}…, config.json says {digest[:12]}…; the file is damaged or was exchanged, "
            "fetch it again."
        )


def _adapter_folder(folder: Path) -> Path:
    inner = folder / "adapter"
    return inner if inner.is_dir() else folder


def _check_releasable(adapter: Path) -> None:
    """Refuse a model that is one fold's, or one that was trained with a network of its own.

    Raises
    ------
    ReleaseError
        If it is.
    """
    task = read_task(adapter)
    network = task.get("network")
    if network is not None:
        raise ReleaseError(
            f"{adapter}: was trained with a network of its own ({network['kind']}), which no release of a pretrained "
            "encoder holds; in Python, load_classifier reads it."
        )
    figures = task.get("figures", {})
    for key, called in (("fold", "fold"), ("outer_fold", "outer fold")):
        if key in figures:
            raise ReleaseError(
                f"{adapter}: is the model of {called} {figures[key]}, kept to be asked about its test subjects by "
                "boldforge attribute; release a model of all subjects, such as the folder adapter of a fine-tuning."
            )


def _copy_adapter(source: Path, target: Path) -> None:
    target.mkdir()
    for name in ADAPTER_FILES:
        if not (source / name).is_file():
            continue
        if name.endswith(".json"):
            _write_json(target / name, _without_paths(_read_json(source / name)))
        else:
            shutil.copyfile(source / name, target / name)


def _without_paths(value: Any) -> Any:
    """Reduce every absolute path in a tree of settings to its last part: it would name the author's machine."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
