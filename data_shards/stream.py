"""Stream clips: the batch of a step is a pure function of (manifest, seed, step), at any number of ranks and workers.

`order` says which frames a sample is, `mixture` which dataset it comes from; here samples become batches.

Shape suffixes: B clips · T frames · V brain voxels.
"""

import hashlib
import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from boldforge.data_shards.batch import ClipBatch, ClipScales, SkippedClip
from boldforge.data_shards.buffers import BufferPool
from boldforge.data_shards.manifest import Manifest
from boldforge.data_shards.mixture import Mixture, Source, check_alike
from boldforge.data_shards.order import ClipOrder, Offsets
from boldforge.data_shards.permutation import mix
from boldforge.data_shards.reader import ShardReader
from boldforge.data_shards.splits import Segment, Segments, whole_runs
from boldforge.data_shards.tables import ShardError

logger = logging.getLogger(__name__)

# What a saved state says of the stream that it belongs to, in words.
_IDENTITY = {
    "manifest": "the dataset",
    "seed": "the seed",
    "clip_length": "the clip length",
    "sampling": "the choice of clips (segments, clips_per_run, offsets, weights)",
}


class ClipStream(IterableDataset[ClipBatch]):
    """A stream of clips; iterate over it, give it to a DataLoader with ``batch_size=None``, or ask for any `batch`.

    Parameters
    ----------
    data
        The dataset, or the sources of a mixture.
    clip_length
        Frames per clip (T).
    batch_size
        Clips per step over all ranks; rank r takes the r-th contiguous block of them.
    seed
        Chooses the order and the offsets.
    segments
        Frames to draw from, all of them by default; see `split_segments`. The sources of a mixture name their own.
    rank, world_size
        This process and how many there are.
    num_workers
        Threads that read ahead, whole steps each; 0 reads when asked. Reading, checksums and copies run outside
        Python's lock, so threads do what worker processes would, without pickling or forking a process that trains.
    clips_per_run, offsets
        See `ClipOrder`.
    epochs
        Stop after so many; None never stops.
    padding
        ``none``: batches run on into the next epoch, so that none is short. ``epoch``: the last batch of each epoch is
        filled with places that are not `ClipBatch.valid`. The last batch of all is always filled like that.
    damage
        What a clip that fails its checksum does: ``raise``, or ``skip``: its place is not valid and the clip is named
        and counted in `skipped`. That place is the same at any number of ranks, and no other clip moves.
    pin_memory
        Read straight into pinned memory, from which copies to a GPU run beside the computation.

    Raises
    ------
    ShardError
        If no segment holds a whole clip, one is not in the dataset, the batch is smaller than the number of ranks,
        datasets cannot be mixed, or a shard is missing.
    """

    def __init__(
        self,
        data: Manifest | Sequence[Source],
        clip_length: int,
        batch_size: int,
        seed: int,
        segments: Sequence[Segment] | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        *,
        clips_per_run: int | None = None,
        offsets: Offsets = "spare",
        epochs: int | None = None,
        padding: Literal["none", "epoch"] = "none",
        damage: Literal["raise", "skip"] = "raise",
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size or batch_size < world_size:
            raise ShardError(
                f"A batch of {batch_size} clips cannot be split over {world_size} ranks (this is rank {rank}); "
                "choose a batch size of at least the number of ranks."
            )
        for argument, value, allowed in (
            ("offsets", offsets, get_args(Offsets)),
            ("padding", padding, ("none", "epoch")),
            ("damage", damage, ("raise", "skip")),
        ):
            if value not in allowed:
                raise ShardError(f"{argument} must be one of {', '.join(allowed)}, found {value!r}.")
        if isinstance(data, str | Path):
            raise ShardError(f"{data}: is a path, expected an open dataset; pass load_manifest({str(data)!r}).")
        sources = (Source(data, segments),) if isinstance(data, Manifest) else tuple(data)
        if len(sources) != 1 and (epochs is not None or padding == "epoch"):
            raise ShardError("A mixture has no epochs of its own; leave epochs and padding out, and stop by steps.")
        check_alike([source.manifest for source in sources])
        self.manifest = sources[0].manifest
        self.clip_length = clip_length
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.step = 0
        self.skipped: Counter[SkippedClip] = Counter()
        self._sample = 0
        self._lanes = 1
        self._padding = padding
        self._damage = damage
        # Beside the computation, where there is a thread or a copy to a GPU to do it beside.
        self._early = pin_memory or num_workers > 0
        self._buffers = BufferPool(pin_memory, keep=num_workers + 2)
        self._slots = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._sources = sources
        self._orders = [_order(source, clip_length, seed, clips_per_run, offsets) for source in sources]
        self._mixture = _mixture(sources, self._orders)
        self._end = None if epochs is None else epochs * self.clips_per_epoch
        self._identity = _identity(sources, self._orders, self._mixture, seed, (clips_per_run, offsets))
        self._readers = self._open_readers(look=damage == "raise")

    @property
    def clips_per_epoch(self) -> int:
        """How many clips an epoch visits; of a mixture, the sum over its datasets."""
        return sum(order.clips_per_epoch for order in self._orders)

    def clip(self, sample: int) -> Segment:
        """Return which frames the stream's sample number `sample` is, counted over all ranks and epochs."""
        return self._place(sample)[1]

    def batch(self, step: int) -> ClipBatch:
        """Return this rank's share of a step, counted from the start with this stream's batch size.

        Raises
        ------
        ShardError
            If a shard is damaged and `damage` is ``raise``.
        """
        return self._read(self._readers, step, self._sample_at(0, step))

    def __iter__(self) -> Iterator[ClipBatch]:
        worker = get_worker_info()
        lanes = worker.num_workers if worker else 1
        # A DataLoader hands out its workers' batches in turn: worker w makes the steps w, w + lanes, … from here on. A
        # worker that goes on from its own state is already at its next step.
        ahead = worker.id if worker and self._lanes == 1 else 0
        if self._lanes not in (1, lanes):
            raise ShardError(
                f"This state is one of {self._lanes} worker processes' and {lanes} are running; save "
                "`stream.state_after(batch)`, which any number of ranks and workers can go on from."
            )
        sample = self._sample_at(self._sample, ahead)
        for batch in self._batches(self.step + ahead, sample, lanes):
            # Counted before it is handed out: a state taken while this batch is in use goes on with the next one.
            self.step = batch.step + lanes
            self._sample = self._sample_at(batch.until, lanes - 1)
            self._lanes = lanes
            if batch.skipped:
                self.skipped.update(batch.skipped)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, under 200 bytes as JSON: valid at any number of ranks and threads.

        In a DataLoader's worker process it is that worker's place, as torchdata's StatefulDataLoader wants it.
        """
        state = {"step": self.step, "sample": self._sample, **self._identity}
        return state if self._lanes == 1 else {**state, "lanes": self._lanes}

    def state_after(self, batch: ClipBatch) -> dict[str, Any]:
        """Return the state that goes on behind a batch, also where worker processes have read further already."""
        return {"step": batch.step + 1, "sample": batch.until, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: with exactly the samples that were not handed out before it.

        Raises
        ------
        ShardError
            If the state belongs to another dataset, seed, clip length or choice of clips: its place would mean other
            clips here.
        """
        for name, meaning in _IDENTITY.items():
            if state.get(name) != self._identity[name]:
                raise ShardError(
                    f"The saved stream differs in {meaning}: {name} is {state.get(name)!r}, here "
                    f"{self._identity[name]!r}; go on with the settings and the dataset that the checkpoint was made "
                    "with, or start a new run."
                )
        counts = [state.get("step"), state.get("sample"), state.get("lanes", 1)]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ShardError(f"The saved stream has no place to go on from (step {counts[0]!r}, sample {counts[1]!r}).")
        self.step, self._sample, self._lanes = state["step"], state["sample"], state.get("lanes", 1)

    def _place(self, sample: int) -> tuple[int, Segment]:
        dataset, sample = self._mixture.place(sample) if self._mixture else (0, sample)
        return dataset, self._orders[dataset].clip(sample)

    def _sample_at(self, sample: int, steps: int) -> int:
        """Return the first sample of the step that is `steps` behind the one that starts at `sample`."""
        if self._padding == "none":
            return sample + steps * self.batch_size
        epoch, done = divmod(sample, self.clips_per_epoch)
        left = -(-(self.clips_per_epoch - done) // self.batch_size)
        if steps < left:
            return sample + steps * self.batch_size
        more, within = divmod(steps - left, -(-self.clips_per_epoch // self.batch_size))
        return (epoch + 1 + more) * self.clips_per_epoch + within * self.batch_size

    def _batches(self, step: int, sample: int, lanes: int) -> Iterator[ClipBatch]:
        if self.num_workers == 0:
            while self._end is None or sample < self._end:
                yield self._read(self._readers, step, sample)
                step, sample = step + lanes, self._sample_at(sample, lanes)
            return
        # A reader serves one thread at a time, and consecutive steps use different ones.
        readers = [self._open_readers(look=False) for _ in range(self.num_workers)]
        ahead: deque[Future[ClipBatch]] = deque()
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="clips")
        try:
            while self._end is None or sample < self._end:
                if len(ahead) == self.num_workers:
                    yield ahead.popleft().result()
                ahead.append(pool.submit(self._read, readers[step // lanes % self.num_workers], step, sample))
                step, sample = step + lanes, self._sample_at(sample, lanes)
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _open_readers(self, look: bool) -> list[ShardReader]:
        return [ShardReader(source.manifest, look) for source in self._sources]

    def _read(self, readers: list[ShardReader], step: int, sample: int) -> ClipBatch:
        until = self._sample_at(sample, 1)
        if self._end is not None:
            until = min(until, self._end)
        b = len(self._slots)
        q = self._buffers.tensor((b, self.clip_length, self.manifest.n_voxels), self.manifest.recipe.dtype)
        q_BTV = q.numpy()
        where = np.full((3, b), -1, dtype=np.int64)
        scales: list[npt.NDArray[np.float32] | None] = [None] * b
        skipped = []
        for place, slot in enumerate(self._slots):
            try:
                if sample + slot < until:
                    dataset, clip = self._place(sample + slot)
                    scales[place] = readers[dataset].fill(clip.run, clip.start, q_BTV[place])
                    where[:, place] = dataset, clip.run, clip.start
                    continue
            except ShardError as error:
                if self._damage == "raise":
                    raise
                logger.warning("skipped a clip: %s", error)
                skipped.append(SkippedClip(dataset, clip.run, clip.start, str(error)))
            q_BTV[place] = 0
        parts = ClipScales(scales, self.manifest.n_voxels, self._buffers)
        if self._early:
            parts.both()
        which, run, start = (torch.from_numpy(row) for row in where)
        return ClipBatch(q, parts, run, start, which, run >= 0, step, until, tuple(skipped))


def _order(source: Source, clip_length: int, seed: int, clips_per_run: int | None, offsets: Offsets) -> ClipOrder:
    manifest = source.manifest
    segments = (whole_runs(manifest) if source.segments is None else _checked(source.segments, manifest)).table
    return ClipOrder(manifest.place, manifest.content_hash, segments, clip_length, seed, clips_per_run, offsets)


def _checked(segments: Sequence[Segment], manifest: Manifest) -> Segments:
    """Return segments that all lie within the dataset's runs."""
    found, n_frames = Segments(segments), manifest.index["n_frames"].astype(np.int64)
    run, start, stop = found.table.T
    known = (run >= 0) & (run < len(n_frames))
    sound = known & (start >= 0) & (start <= stop) & (stop <= n_frames[np.where(known, run, 0)])
    if not sound.all():
        worst = found[int(np.flatnonzero(~sound)[0])]
        raise ShardError(
            f"{manifest.place}: frames {worst.start} to {worst.stop} of run {worst.run} are not in the dataset, which "
            f"has {len(n_frames)} runs; take segments from split_segments of this manifest."
        )
    return found


def _mixture(sources: Sequence[Source], orders: Sequence[ClipOrder]) -> Mixture | None:
    if len(sources) == 1:
        return None
    stated = [source.weight is not None for source in sources]
    if any(stated) and not all(stated):
        raise ShardError("Some sources of the mixture have a weight and some have none; give all of them one, or none.")
    weights = [
        order.clips_per_epoch if source.weight is None else source.weight
        for source, order in zip(sources, orders, strict=True)
    ]
    return Mixture(weights, mix(*(order.key for order in orders)))


def _identity(
    sources: Sequence[Source], orders: Sequence[ClipOrder], mixture: Mixture | None, seed: int, choice: tuple[Any, ...]
) -> dict[str, Any]:
    manifests = "".join(source.manifest.content_hash for source in sources)
    sampling = hashlib.sha256(repr((choice, mixture and mixture.counts)).encode())
    for order in orders:
        sampling.update(order.segments.astype("<i8").tobytes())
    return {
        "manifest": hashlib.sha256(manifests.encode()).hexdigest()[:16],
        "seed": seed,
        "clip_length": orders[0].clip_length,
        "sampling": sampling.hexdigest()[:16],
    }
