"""Stream clips: the batch of a step is a pure function of (manifest, seed, step), at any number of ranks and workers.

An epoch cuts every segment into non-overlapping clips, from an offset drawn per (epoch, segment), and visits them in
the order of a keyed permutation. Batches follow one another without regard to epochs, so none is short.

Shape suffixes: B clips · T frames · V brain voxels.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch

from boldforge.data_shards.manifest import Manifest, ShardError
from boldforge.data_shards.permutation import mix, permute
from boldforge.data_shards.reader import ShardReader
from boldforge.data_shards.splits import Segment, whole_runs


@dataclass(frozen=True)
class ClipBatch:
    """One rank's share of a step: q [b, T, V] integers, scale and mean [b, V] float32, run and start [b] int64."""

    q: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor
    run: torch.Tensor
    start: torch.Tensor
    step: int

    def dequantise(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return values_BTV, ``mean + q · scale``: integers travel to the device, the arithmetic is float32 there."""
        q, scale, mean = (part.to(device, non_blocking=True) for part in (self.q, self.scale, self.mean))
        return torch.addcmul(mean[:, None].float(), q.float(), scale[:, None]).to(dtype)

    def signal(self) -> torch.Tensor:
        """Return bool [b, V]: which voxels carry signal in their run; the others never count in a loss."""
        return self.scale > 0


class ClipStream:
    """An endless stream of clips; iterate over it, or ask for any step with `batch`.

    Parameters
    ----------
    manifest
        The dataset.
    clip_length
        Frames per clip (T).
    batch_size
        Clips per step over all ranks; rank r takes the r-th contiguous block of them.
    seed
        Chooses the order and the offsets.
    segments
        Frames to draw from, all of them by default; see `split_segments`.
    rank, world_size
        This process and how many there are.
    num_workers
        Threads that read ahead, whole steps each; 0 reads when asked. Reading, checksums and copies run outside
        Python's lock, so threads do what worker processes would, without pickling or forking a process that trains.

    Raises
    ------
    ShardError
        If no segment holds a whole clip, the batch is smaller than the number of ranks, or a shard is damaged.
    """

    def __init__(
        self,
        manifest: Manifest,
        clip_length: int,
        batch_size: int,
        seed: int,
        segments: Sequence[Segment] | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.manifest = manifest
        self.clip_length = clip_length
        self.batch_size = batch_size
        self.seed = seed
        self.segments = tuple(segments) if segments is not None else whole_runs(manifest)
        self.num_workers = num_workers
        self.step = 0
        if not 0 <= rank < world_size or batch_size < world_size:
            raise ShardError(
                f"A batch of {batch_size} clips cannot be split over {world_size} ranks (this is rank {rank}); "
                "choose a batch size of at least the number of ranks."
            )
        self._slots = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        lengths = np.array([segment.stop - segment.start for segment in self.segments], dtype=np.int64)
        self._spare = lengths % clip_length
        self._ends = np.cumsum(lengths // clip_length)
        if not len(lengths) or self._ends[-1] == 0:
            longest = int(lengths.max(initial=0))
            raise ShardError(
                f"{manifest.folder}: no run has {clip_length} frames in a row to draw from (the longest stretch is "
                f"{longest}); choose a shorter clip length or hold out less."
            )
        self._key = mix(int(manifest.content_hash[:16], 16), seed)
        self._reader = ShardReader(manifest)

    @property
    def clips_per_epoch(self) -> int:
        """How many clips the segments hold."""
        return int(self._ends[-1])

    def clip(self, sample: int) -> Segment:
        """Return which frames are the stream's sample number `sample`, counted over all ranks and epochs."""
        epoch, position = divmod(sample, self.clips_per_epoch)
        number = permute(position, self.clips_per_epoch, mix(self._key, epoch))
        index = int(np.searchsorted(self._ends, number, side="right"))
        within = number - (int(self._ends[index - 1]) if index else 0)
        offset = mix(self._key, epoch, index) % (int(self._spare[index]) + 1)
        run, first, _ = self.segments[index]
        start = first + offset + within * self.clip_length
        return Segment(run, start, start + self.clip_length)

    def batch(self, step: int) -> ClipBatch:
        """Return this rank's share of a step.

        Raises
        ------
        ShardError
            If a shard is damaged.
        """
        return self._read(self._reader, step)

    def _read(self, reader: ShardReader, step: int) -> ClipBatch:
        clips = [self.clip(step * self.batch_size + slot) for slot in self._slots]
        q = np.empty((len(clips), self.clip_length, self.manifest.n_voxels), dtype=self.manifest.dtype)
        parts = [reader.read(clip.run, clip.start, self.clip_length, out) for clip, out in zip(clips, q, strict=True)]
        return ClipBatch(
            q=torch.from_numpy(q),
            scale=torch.from_numpy(np.stack([part.scale for part in parts])),
            mean=torch.from_numpy(np.stack([part.mean for part in parts])),
            run=torch.tensor([clip.run for clip in clips]),
            start=torch.tensor([clip.start for clip in clips]),
            step=step,
        )

    def __iter__(self) -> Iterator[ClipBatch]:
        for batch in self._batches():
            # Counted before it is handed out: a state taken while this batch is in use goes on with the next one.
            self.step = batch.step + 1
            yield batch

    def _batches(self) -> Iterator[ClipBatch]:
        if self.num_workers == 0:
            while True:
                yield self.batch(self.step)
        # A reader serves one thread at a time.
        readers = [ShardReader(self.manifest) for _ in range(self.num_workers)]
        ahead: deque[Future[ClipBatch]] = deque()
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="clips")
        try:
            for step in count(self.step):
                # As many steps in flight as readers, and consecutive steps use different ones: none is shared.
                if len(ahead) == self.num_workers:
                    yield ahead.popleft().result()
                ahead.append(pool.submit(self._read, readers[step % self.num_workers], step))
        finally:
            pool.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, under 400 bytes as JSON: valid at any number of ranks and workers."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises
        ------
        ShardError
            If the state belongs to another dataset, seed, clip length, batch size or split: its step would mean other
            clips here.
        """
        mine = self._identity()
        different = [name for name in mine if state.get(name) != mine[name]]
        if different or not isinstance(state.get("step"), int):
            name = different[0] if different else "step"
            raise ShardError(
                f"The saved stream has {name} {state.get(name)!r}, this one has {mine.get(name)!r}; go on with the "
                "settings and the dataset that the checkpoint was made with, or start a new run."
            )
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        segments = hashlib.sha256(json.dumps(self.segments).encode()).hexdigest()[:16]
        return {
            "manifest_hash": self.manifest.content_hash,
            "seed": self.seed,
            "clip_length": self.clip_length,
            "batch_size": self.batch_size,
            "segments": segments,
        }
