"""The verb ``import``: somebody else's checkpoint becomes a release, with every key that was used on the screen."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from boldforge.configs import BoldForgeError

app = typer.Typer(help="Turn somebody else's checkpoint into a release.", no_args_is_help=True, add_completion=False)


@app.callback()
def _verbs() -> None:
    """Keep ``neurostorm`` a word of its own: with a single command typer would leave it out."""


@app.command(epilog="Example: boldforge import neurostorm pt_neurostorm_mae_ratio0.5.ckpt --out releases/neurostorm")
def neurostorm(
    checkpoint: Annotated[Path, typer.Argument(help="Lightning checkpoint (.ckpt), autoencoder or encoder alone")],
    out: Annotated[Path, typer.Option(help="Folder for the release; must not exist yet")],
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help="Leave out the keys that begin with this, e.g. output_head; repeat for several"),
    ] = None,
    replace: Annotated[bool, typer.Option(help="Replace a release that is already there")] = False,
) -> None:
    """Take over a NeuroSTORM checkpoint; a key that is missing or left over is an error."""
    import_and_print(checkpoint, out, leave_out or [], replace, Console(markup=False))


def import_and_print(checkpoint: Path, out: Path, leave_out: list[str], replace: bool, console: Console) -> Path:
    """Import a NeuroSTORM checkpoint, print every hyperparameter and key that was used, and return the release.

    Raises
    ------
    BoldForgeError
        If the checkpoint cannot be taken over, or `out` is taken; nothing is written then.
    """
    from boldforge.launch.release import write_release
    from boldforge.pretrain.export import write_export
    from boldforge.pretrain.import_neurostorm import import_neurostorm

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if out.exists() and not replace:
        raise BoldForgeError(f"{out}: is already there; choose another --out, or add --replace.")
    imported = import_neurostorm(checkpoint, leave_out)
    say("hyperparameters used: " + ", ".join(f"{name}={value}" for name, value in imported.settings.items()))
    for key in imported.keys:
        say(f"{key.theirs} -> {key.ours} {list(key.shape)}")
    for theirs in imported.left_out:
        say(f"{theirs} -> left out")
    with tempfile.TemporaryDirectory(prefix="boldforge-import-") as staging:
        write_export(imported.weights, imported.config, Path(staging))
        write_release(staging, out, replace=replace)
    count = sum(tensor.numel() for name, tensor in imported.weights.items() if name != "brain_mask_bits")
    say(f"{len(imported.keys)} keys, {count:,} parameters; release written to {out}")
    return out
