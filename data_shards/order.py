"""Which frames sample number i of a dataset is: a pure function of (manifest hash, seed, i), with no table of clips."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from boldforge.data_shards.permutation import mix, permute
from boldforge.data_shards.splits import Segment
from boldforge.data_shards.tables import ShardError

Offsets = Literal["spare", "full", "none"]


class ClipOrder:
    """An endless order of clips: epoch after epoch, each clip of an epoch once, in the order of a keyed permutation.

    A segment of L frames holds ``n = L // T`` clips of T frames that do not overlap. They start at an offset drawn per
    (epoch, segment), so that clips begin at other frames in every epoch.

    Parameters
    ----------
    name
        What an error calls the dataset.
    content_hash
        The manifest's; with the seed it chooses the order.
    segments
        int64 [S, 3]: run, first frame, end.
    clip_length
        T.
    seed
        Chooses the order and the offsets.
    clips_per_run
        At most so many of a segment's clips per epoch, drawn anew in every epoch; all of them by default. Evens out
        runs of different lengths.
    offsets
        ``spare``: from 0 to ``L - n · T``, the frames that the clips leave over. ``full``: from 0 to at least
        ``T - 1``, so that any frame can be at any place in a clip, for which n may be one smaller. ``none``: 0.

    Raises
    ------
    ShardError
        If no segment holds a whole clip.
    """

    def __init__(
        self,
        name: str,
        content_hash: str,
        segments: npt.NDArray[np.int64],
        clip_length: int,
        seed: int,
        clips_per_run: int | None = None,
        offsets: Offsets = "spare",
    ) -> None:
        if clip_length < 1 or (clips_per_run is not None and clips_per_run < 1):
            raise ShardError(
                f"clip_length and clips_per_run must be at least 1, got {clip_length} and {clips_per_run}."
            )
        self.clip_length = clip_length
        self.segments = segments
        self.key = mix(int(content_hash[:16], 16), seed)
        lengths = segments[:, 2] - segments[:, 1]
        self._fitting = lengths // clip_length
        if offsets == "full":
            self._fitting = np.minimum(self._fitting, np.maximum(1, (lengths + 1) // clip_length - 1))
        self._spare = (lengths - self._fitting * clip_length) * (offsets != "none")
        self._draws = clips_per_run is not None
        self._ends = np.cumsum(self._fitting if clips_per_run is None else np.minimum(self._fitting, clips_per_run))
        if not len(segments) or self._ends[-1] == 0:
            longest = int(lengths.max(initial=0))
            raise ShardError(
                f"{name}: no run has {clip_length} frames in a row to draw from (the longest stretch is "
                f"{longest}); choose a shorter clip length or hold out less."
            )

    @property
    def clips_per_epoch(self) -> int:
        """How many clips an epoch visits."""
        return int(self._ends[-1])

    def clip(self, sample: int) -> Segment:
        """Return which frames sample number `sample` is, counted over all epochs."""
        epoch, position = divmod(sample, self.clips_per_epoch)
        number = permute(position, self.clips_per_epoch, mix(self.key, epoch))
        index = int(self._ends.searchsorted(number, side="right"))
        within = number - (int(self._ends[index - 1]) if index else 0)
        if self._draws:
            within = permute(within, int(self._fitting[index]), mix(self.key, epoch, index, 1))
        offset = mix(self.key, epoch, index) % (int(self._spare[index]) + 1)
        run, first, _ = self.segments[index].tolist()
        start = first + offset + within * self.clip_length
        return Segment(run, start, start + self.clip_length)
