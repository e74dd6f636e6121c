"""Pretrain: stream clips, hide tokens, reconstruct, step; from the last checkpoint if there is one.

Run it as ``boldforge pretrain --config RECIPE``, or under DeepSpeed's launcher as
``deepspeed --num_accelerators 2 --module boldforge.pretrain.train --config RECIPE key=value …``.
"""

import argparse
import errno
import logging
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from boldforge.configs import BoldForgeError, load_config
from boldforge.data_shards import ClipBatch
from boldforge.pretrain.checks import check_recipe
from boldforge.pretrain.config import PretrainConfig
from boldforge.pretrain.evaluate import counted_voxels
from boldforge.pretrain.loss import make_targets
from boldforge.pretrain.masking import sample_keys
from boldforge.pretrain.metrics import MetricsWriter
from boldforge.pretrain.ranks import accelerator_ready, join_ranks, on_first_rank
from boldforge.pretrain.region_errors import log_table, region_errors
from boldforge.pretrain.schedule import learning_rate

accelerator_ready()

from boldforge.pretrain.checkpoint import save_checkpoint  # noqa: E402  (imports deepspeed)
from boldforge.pretrain.results import finish_run  # noqa: E402
from boldforge.pretrain.run import Run, claim_folder, diverged, not_finite, start_run  # noqa: E402
from boldforge.pretrain.training_state import restore_moments  # noqa: E402

logger = logging.getLogger(__name__)


def train(config: PretrainConfig) -> Path:
    """Pretrain until ``config.steps``; called by every rank.

    Returns
    -------
    Path
        The run folder, with metrics, checkpoints, the exported weights and a held-out reconstruction.

    Raises
    ------
    BoldForgeError
        For data, recipes or checkpoints that cannot be used as asked.
    """
    rank, world_size = join_ranks()
    checked = check_recipe(config, world_size, rank)
    with ExitStack() as stack:
        standing = on_first_rank(lambda: claim_folder(config, checked, stack))
        if standing.finished:
            logger.info("%s: finished; nothing is left to do. Weights: %s", config.out, config.out / "export")
            return config.out
        run = start_run(config, checked, standing, rank, world_size)
        first = go_on(run)
        batches = iter(run.stream)
        metrics = stack.enter_context(MetricsWriter(config.out, first)) if rank == 0 else None
        for step in range(first, config.steps):
            started = time.perf_counter()
            batch = next(batches)
            row = training_step(run, batch, step)
            if not math.isfinite(row["loss"]):
                raise lost(run, batch, step)
            row["frames_per_second"] = config.batch_size * config.model.frames / (time.perf_counter() - started)
            done = step + 1
            if done % config.evaluate_every == 0 or done == config.steps:
                heldout = run.measure()
                row |= {"heldout_error": heldout.error, "heldout_baseline": heldout.baseline}
                if rank == 0:
                    log_table(config.out / "region_errors.tsv", done, region_errors(heldout, run.region_voxels))
            if metrics:
                metrics.write({"step": done, **row})
                logger.info("step %d/%d  %s", done, config.steps, "  ".join(f"{k} {v:.4g}" for k, v in row.items()))
            if done % config.checkpoint_every == 0 or done == config.steps:
                state = {"stream": run.stream.state_dict()}
                save_checkpoint(run.engine, config.out / "checkpoints", done, state, config.keep_checkpoints)
        finish_run(run)
    return config.out


def go_on(run: Run) -> int:
    """Go on where the newest checkpoint stopped, if there is one, and return the number of steps already done.

    The model was made with its weights; any number of ranks and any ZeRO stage can go on.
    """
    if run.resumed is None:
        return 0
    restore_moments(run.engine, run.resumed.folder)
    run.stream.load_state_dict(run.resumed.state["stream"])
    logger.info("going on from the checkpoint of step %d", run.resumed.step)
    return run.resumed.step


def training_step(run: Run, batch: ClipBatch, step: int) -> dict[str, float]:
    """Do one optimiser step on this rank's share of the batch.

    The loss is a mean over everything counted in the step, so it depends neither on how the batch is cut into
    micro-batches nor on how many ranks share it.

    Returns
    -------
    dict
        Loss over all ranks, its terms where it has several, learning rate and, where DeepSpeed computes it, the
        gradient norm.
    """
    config, engine = run.config, run.engine
    rate = learning_rate(config.optimizer, step, config.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    keys = clip_keys(run, batch, step)
    values_BTV, signal_BV, mask_BL, counted_BLP = hide(run, batch, step)
    size = config.micro_batch_size or len(values_BTV)
    parts = [slice(start, start + size) for start in range(0, len(values_BTV), size)]
    counted = run.total(torch.stack([run.objective.counts(counted_BLP[part]) for part in parts]).sum(0))
    losses = []
    for part in parts:
        target_BLP = make_targets(values_BTV[part], signal_BV[part], run.patch_voxels, config.loss.targets)
        # The prediction has no name here: it would outlive its backward pass by a forward pass.
        terms = run.objective(
            run.predict(values_BTV[part], mask_BL[part], keys[part]), target_BLP, counted_BLP[part], counted
        )
        # DeepSpeed takes the mean over micro-batches and ranks where the sum is wanted.
        engine.backward(terms["loss"] * (len(parts) * run.world_size))
        engine.step()
        losses.append(torch.stack(list(terms.values())).detach())
    loss, *several = run.total(torch.stack(losses).sum(0)).tolist()
    figures = {"loss": loss, "lr": rate}
    if len(several) > 1:
        figures |= {f"loss_{name}": value for name, value in zip(list(terms)[1:], several, strict=True)}
    norm = engine.get_global_grad_norm()
    return figures if norm is None else {**figures, "grad_norm": float(norm)}


def lost(run: Run, batch: ClipBatch, step: int) -> BoldForgeError:
    """Say why a step's loss is not a number; called by every rank, all of which say the same.

    The checkpoints before it are whole.
    """
    figure = f"step {step + 1}: the loss"
    finite_B = batch.dequantise().isfinite().flatten(1).all(dim=1)
    own = None if finite_B.all() else (int(batch.dataset[~finite_B][0]), int(batch.run[~finite_B][0]))
    # A rank sees its own share of the step only; the sentence about the learning rate would be wrong of another's.
    found: list[tuple[int, int] | None] = [None] * run.world_size
    dist.all_gather_object(found, own)
    for place in filter(None, found):
        return not_finite(figure, run.manifests[place[0]], place[1])
    return diverged(figure, run.config)


def clip_keys(run: Run, batch: ClipBatch, step: int) -> list[tuple[int, ...]]:
    """Name this rank's clips by their places in the stream; what is hidden and dropped of them follows."""
    clips = len(batch.run)
    return sample_keys(run.config.seed, step * run.config.batch_size + run.rank * clips, clips)


def hide(run: Run, batch: ClipBatch, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring this rank's clips to the device.

    Returns
    -------
    values_BTV float32, signal_BV bool, hidden tokens mask_BL and counted voxels_BLP, both bool. The mask stays on the
    CPU, where the tables of visible tokens are built.
    """
    mask_BL = run.sampler.sample(clip_keys(run, batch, step))
    signal_BV = batch.signal().to(run.device) | run.config.loss.background
    counted_BLP = counted_voxels(mask_BL.to(run.device), signal_BV, run.patch_voxels)
    return batch.dequantise(run.device, torch.float32), signal_BV, mask_BL, counted_BLP


def main(arguments: list[str] | None = None) -> int:
    """Run `train` from the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="boldforge.pretrain.train", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML recipe, e.g. configs/pretrain/tiny.yaml")
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. steps=100 model.embed_dim=64")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        train(load_config(PretrainConfig, options.config, options.overrides))
    except BoldForgeError as error:
        # The prefix lets `boldforge pretrain` find this sentence in the log that all ranks share.
        print(f"boldforge: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(
            f"boldforge: {error.filename or 'the run folder'}: {error.strerror}; mend it and start again.",
            file=sys.stderr,
        )
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
