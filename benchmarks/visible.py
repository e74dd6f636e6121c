"""What a training step saves where the encoder computes visible tokens only (model.encoder_sees: visible).

    python benchmarks/visible.py [--quick] [--json FILE]

One clip on 12 mm patches of the brain, four stages of 64 to 512 channels, float32, one thread: forward, backward and
AdamW; with a decoder that mirrors the encoder, and with one of a block per stage. Times are the shortest step's
processor time. Tables: the tokens that exist for the masks of the step and the scan paths over them, built anew at
every step.
"""

import argparse
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common.figures import machine, row, write

from boldforge.data_shards import brain_mask, get_grid, load_atlas
from boldforge.pretrain import (
    MaskConfig,
    MaskSampler,
    ModelConfig,
    NeuroStorm,
    RegionTokens,
    TokenGrid,
    model,
    region_tokens,
    visible,
)
from boldforge.pretrain.evaluate import counted_voxels
from boldforge.pretrain.loss import reconstruction_loss
from boldforge.pretrain.tokens import gather_patches

GRID = "mni4mm"
DECODERS = {"mirrored": (6, 2, 2), "light": (1, 1, 1)}
CASES = [("region", 0.5), ("region", 0.75), ("random", 0.5), ("random", 0.75)]
QUICK_CASES = CASES[::3]
spent_on_tables = [0.0]


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what a function takes to `spent_on_tables`."""

    def run(*arguments: Any) -> Any:
        start = time.process_time()
        result = function(*arguments)
        spent_on_tables[0] += time.process_time() - start
        return result

    return run


@cache
def cut(patch_size: tuple[int, int, int], frames: int, n_stages: int) -> tuple[TokenGrid, RegionTokens]:
    """Cut the grid into tokens, and say which regions each holds."""
    tokens = TokenGrid(brain_mask(get_grid(GRID)), patch_size, frames, n_stages)
    return tokens, region_tokens(load_atlas("aal3"), get_grid(GRID), tokens)


def measure(sees: str, decoder: str, strategy: str, ratio: float, frames: int, steps: int) -> dict[str, Any]:
    """Train a few steps, each with masks of its own.

    Returns
    -------
    ``seconds`` of the shortest step, ``tables`` of the same step, ``tokens`` that the encoder's stages compute.
    """
    torch.manual_seed(0)
    size: dict[str, Any] = {"embed_dim": 64, "last_window": (2, 2, 2, 4), "decoder_depths": DECODERS[decoder]}
    config = ModelConfig(frames=frames, encoder_sees=sees, **size)  # type: ignore[arg-type]
    tokens, regions = cut(config.patch_size(get_grid(GRID).voxel_size), frames, config.n_stages)
    sampler = MaskSampler(tokens, MaskConfig(strategy=strategy, ratio=ratio), regions)  # type: ignore[arg-type]
    network = NeuroStorm(config, tokens)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    values_BTV = torch.randn(1, frames, tokens.n_voxels)
    target_BLP = gather_patches(values_BTV, network.patch_voxels)
    signal_BV = torch.ones(1, tokens.n_voxels, dtype=torch.bool)
    found: list[tuple[float, float]] = []
    for step in range(steps + 1):
        hidden_BL = sampler.sample([(0, 0, step)])
        counted_BLP = counted_voxels(hidden_BL, signal_BV, network.patch_voxels)
        spent_on_tables[0] = 0.0
        start = time.process_time()
        reconstruction_loss(network(values_BTV, hidden_BL), target_BLP, counted_BLP).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((time.process_time() - start, spent_on_tables[0]))
    seconds, tables = min(found[1:])
    computed = [stage.n_tokens * frames for stage in tokens.stages]
    if sees == "visible":
        computed = [len(stage.row_N) for stage in visible.visible_tokens(hidden_BL, tokens, torch.device("cpu"))]
    return {"seconds": seconds, "tables": tables, "tokens": computed}


def main() -> None:
    """Print the table, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 frames, one step and two masks, not 20, two and four")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frames, steps = (4, 1) if arguments.quick else (20, 2)
    model.visible_tokens = timed(model.visible_tokens)  # type: ignore[attr-defined]
    visible.keep_tokens = timed(visible.keep_tokens)
    print(f"{frames} frames on {GRID}, one thread; {machine()}")
    print(f"{'decoder':<10}{'masks':<13}{'encoder sees':<13}{'s/step':>7}{'tables':>8}{'faster':>8}  tokens by stage")
    rows = []
    for decoder in DECODERS:
        whole = measure("all", decoder, "region", 0.5, frames, steps)
        print(f"{decoder:<10}{'any':<13}{'all':<13}{whole['seconds']:>7.2f}{'':>16}  {whole['tokens']}")
        for strategy, ratio in QUICK_CASES if arguments.quick else CASES:
            found = measure("visible", decoder, strategy, ratio, frames, steps)
            tables, faster = found["tables"] / found["seconds"], whole["seconds"] / found["seconds"]
            masks, figure = f"{strategy} {ratio:g}", f"{strategy}_{ratio:g}_{decoder}"
            line = f"{decoder:<10}{masks:<13}{'visible':<13}{found['seconds']:>7.2f}{tables:>8.2%}{faster:>8.2f}"
            print(f"{line}  {found['tokens']}")
            tokens = sum(found["tokens"]) / sum(whole["tokens"])
            rows += [
                row(f"visible_speedup_{figure}", faster, "ratio"),
                row(f"visible_tokens_{figure}", tokens, "ratio", None, "lower"),
                row(f"visible_tables_{figure}", tables, "of a step", 0.05, "lower"),
            ]
    write(arguments.json, rows, machine())


if __name__ == "__main__":
    main()
