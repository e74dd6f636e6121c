"""Simulate a labelled cohort in the ADHD-200 Athena layout, with a group difference of known size and place.

The brain's shape, grey matter and region borders are those of the MNI152 template and AAL3; everything in time is drawn
at random. Nothing measured in these files says anything about people.

Shape suffixes: T frames · V brain voxels · R atlas regions.
"""

import csv
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.ndimage import gaussian_filter

from boldforge.configs import BoldForgeError, StrictModel
from boldforge.data_shards.atlas import atlas_on_grid, load_atlas
from boldforge.data_shards.grid import Grid, brain_mask, mask_centres
from boldforge.data_shards.layout_adhd200 import PHENOTYPE_COLUMNS, SIMULATION_FILE, SITE_NAMES
from boldforge.data_shards.nifti import SIMULATED_MARK
from boldforge.data_shards.resample import sampling_matrix

logger = logging.getLogger(__name__)

Values = npt.NDArray[np.float32]

PHENOTYPE_FILE = "ADHD200_preprocessed_phenotypics.tsv"
ATHENA_GRID = Grid("athena", (49, 58, 47), np.array([[-4.0, 0, 0, 96], [0, 4, 0, -132], [0, 0, 4, -70], [0, 0, 0, 1]]))
# Regions whose size or activity has been reported to differ in ADHD: striatum, cingulate, cerebellum.
DEFAULT_REGIONS = tuple(
    f"{name}_{side}"
    for name in (
        "Caudate", "Putamen", "Cingulate_Mid", "ACC_sub", "ACC_pre", "ACC_sup", "Cerebellum_Crus1", "Cerebellum_Crus2",
        "Cerebellum_6", "Cerebellum_8",
    )
    for side in ("L", "R")
)  # fmt: skip
# A region belongs to the first network one of whose prefixes its name starts with.
_NETWORKS = {
    "default": ("Frontal_Sup_Medial", "Frontal_Med_Orb", "Precuneus", "Cingulate_Post", "Angular", "Temporal_Mid"),
    "control": ("Frontal_Mid", "Frontal_Sup", "Frontal_Inf", "Parietal"),
    "salience": ("Insula", "Cingulate", "ACC", "SupraMarginal", "Rolandic"),
    "motor": ("Precentral", "Postcentral", "Paracentral", "Supp_Motor", "Heschl", "Temporal_Sup"),
    "visual": ("Calcarine", "Cuneus", "Lingual", "Occipital", "Fusiform"),
    "cerebellum": ("Cerebellum", "Vermis"),
    "subcortical": ("Caudate", "Putamen", "Pallidum", "Thal", "N_Acc", "VTA", "SN", "Red", "LC", "Raphe"),
    "limbic": ("",),
}
_BAND_HZ = (0.009, 0.08)  # what Athena's sfnwmrda files are filtered to
_RUN_IN = 12  # frames drawn and cut off, so that the filter's wrap-around joins nothing
_UNITS = 20  # whole units per standard deviation: 37 dB, far above the noise, in files that compress well
_FIRST_ID = 9_900_001


class SimulationError(BoldForgeError):
    """A cohort cannot be simulated as asked."""


class Site(StrictModel):
    """A simulated scanner."""

    name: str
    """One of the ADHD-200 sites, because the table gives sites by number."""
    tr: float = Field(gt=0.1, lt=10.0)
    """Seconds between frames."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on all values: scanners differ in gain."""
    noise: float = Field(default=1.0, ge=0)
    """Factor on the noise: scanners differ in signal-to-noise ratio."""


class SimulationConfig(StrictModel):
    """Size of the cohort and of the planted difference."""

    n_subjects: int = Field(default=40, ge=2, le=90_000)
    """People in all; one run each."""
    n_frames: int = Field(default=40, ge=8)
    """Frames per run, at the site's own repetition time."""
    effect: float = Field(default=1.0, ge=0.0)
    """In ADHD the signal of `regions` is (1 + effect) times as large; 0 plants nothing, the groups are then alike."""
    regions: tuple[str, ...] = DEFAULT_REGIONS
    """AAL3 names of the regions that carry the difference."""
    balance: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of ADHD, kept within every site, so that the site does not give the diagnosis away."""
    sites: tuple[Site, ...] = Field(
        default=(
            Site(name="NYU", tr=2.0),
            Site(name="Peking", tr=2.0, scale=1.6, noise=1.2),
            Site(name="KKI", tr=2.5, scale=0.7, noise=0.9),
        ),
        min_length=1,
    )
    """Subjects are dealt to the sites in turn."""
    coupling: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of a region's variance that it has in common with its network."""
    noise: float = Field(default=1.0, ge=0.0)
    """Standard deviation of the noise, where a region's signal has 1."""
    seed: int = Field(default=0, ge=0)
    """Same seed, same files."""


@dataclass(frozen=True, eq=False)
class _Anatomy:
    mask: npt.NDArray[np.bool_]
    grey_V: Values
    region_V: npt.NDArray[np.int64]  # position in names, -1 outside all regions
    names: tuple[str, ...]
    network_R: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Person:
    number: int
    site: Site
    adhd: bool

    @property
    def scan_id(self) -> str:
        return f"{_FIRST_ID + self.number:07d}"


def simulate_cohort(
    out: str | Path, config: SimulationConfig | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write a simulated cohort: ``<site>/sfnwmrda<ID>_session_1_rest_1.nii.gz`` and a phenotype table.

    Every voxel of a region carries the region's time course (band-limited, part of its variance shared with the
    region's network) times the local grey matter, plus spatially smooth noise; the mean over time is removed as in
    Athena's files.
    ``simulation.json`` says that the subjects are simulated and how; every file's header says it too, and a
    build marks its runs by that, wherever the files were moved to.

    Parameters
    ----------
    out
        A folder, made if missing; an earlier simulation in it is replaced.
    config
        Sizes and the planted difference; the defaults if None.
    on_progress
        Called with (subjects done, subjects in all).

    Returns
    -------
    The folder.

    Raises
    ------
    SimulationError
        If the folder holds scans or a phenotype table that were not simulated, or a site is not one of ADHD-200's.
    AtlasError
        If a region is not in AAL3.
    """
    out, config = Path(out), config or SimulationConfig()
    unknown = [site.name for site in config.sites if site.name not in SITE_NAMES.values()]
    if unknown:
        raise SimulationError(f"Unknown site {unknown[0]!r}; valid sites are {', '.join(SITE_NAMES.values())}.")
    anatomy = _anatomy()
    load_atlas("aal3").ids(list(config.regions))
    _clear(out)
    # First of all, so that not even an interrupted simulation can pass for real scans.
    notice = "SIMULATED: these files show no real people; they were generated by BoldForge."
    (out / SIMULATION_FILE).write_text(json.dumps({"notice": notice, **config.model_dump(mode="json")}, indent=1))
    people = _people(config)
    for done, person in enumerate(people):
        if on_progress is not None:
            on_progress(done, len(people))
        volume = np.rint(_UNITS * _volume(person, config, anatomy)).astype(np.int16)
        image = nib.Nifti1Image(volume, ATHENA_GRID.affine)
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = person.site.tr
        image.header["descrip"] = SIMULATED_MARK
        folder = out / person.site.name
        folder.mkdir(exist_ok=True)
        nib.save(image, folder / f"sfnwmrda{person.scan_id}_session_1_rest_1.nii.gz")
    _write_phenotypes(out / PHENOTYPE_FILE, people, config)
    if on_progress is not None:
        on_progress(len(people), len(people))
    return out


def _clear(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise SimulationError(f"{out}: is a file, expected a folder for the cohort.")
    old = sorted(out.rglob("*.nii*")) if out.exists() else []
    again = (out / SIMULATION_FILE).is_file()
    # Scans may have been put beside an earlier simulation; only its own are removed.
    foreign = [path for path in old if not (again and _is_simulated(path))]
    if foreign:
        raise SimulationError(
            f"{out}: holds scans that were not simulated ({foreign[0].name}, …); choose another folder."
        )
    if not again and (out / PHENOTYPE_FILE).exists():
        raise SimulationError(
            f"{out}: holds a {PHENOTYPE_FILE} that was not simulated, which would be replaced; choose another folder."
        )
    if old:
        logger.warning("%s: the %d scans of an earlier simulation are replaced.", out, len(old))
    for path in old:
        path.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _is_simulated(path: Path) -> bool:
    try:
        return bool(nib.Nifti1Image.from_filename(path).header["descrip"].item() == SIMULATED_MARK)
    except (EOFError, OSError, ValueError, nib.filebasedimages.ImageFileError, nib.wrapstruct.WrapStructError):
        # What a killed simulation was writing has no header yet, but has the name of one of its subjects.
        return re.fullmatch(r"sfnwmrda99\d{5}_session_1_rest_1\.nii\.gz", path.name) is not None


def _people(config: SimulationConfig) -> list[_Person]:
    rng = np.random.default_rng([config.seed, 1])
    people = []
    for index, site in enumerate(config.sites):
        numbers = range(index, config.n_subjects, len(config.sites))
        n_adhd = len(numbers) * config.balance
        # A fraction of a person is settled by a draw, so that odd sites do not all lean to one side.
        n_adhd = int(n_adhd) + int(rng.random() < n_adhd % 1)
        order = rng.permutation(len(numbers))
        people += [_Person(number, site, bool(order[i] < n_adhd)) for i, number in enumerate(numbers)]
    return sorted(people, key=lambda person: person.number)


def _anatomy() -> _Anatomy:
    from nilearn.datasets import load_mni152_gm_template

    mask = brain_mask(ATHENA_GRID)
    template = load_mni152_gm_template(resolution=2)
    smooth = gaussian_filter(np.asarray(template.dataobj, dtype=np.float32), 1.0)  # 2 mm voxels seen by 4 mm ones
    matrix = sampling_matrix(template.shape, template.affine, mask_centres(ATHENA_GRID, mask))
    atlas = load_atlas("aal3")
    labels = atlas_on_grid(atlas, ATHENA_GRID)[mask]
    ids = np.array(sorted(atlas.labels))
    names = tuple(atlas.labels[number] for number in ids)
    region = np.where(labels > 0, np.searchsorted(ids, labels), -1)
    networks = list(_NETWORKS.values())
    belongs = [next(i for i, prefixes in enumerate(networks) if name.startswith(prefixes)) for name in names]
    return _Anatomy(mask, matrix @ smooth.ravel(order="F"), region, names, np.array(belongs))


def _volume(person: _Person, config: SimulationConfig, anatomy: _Anatomy) -> Values:
    """Return one person's residuals, float32 [X, Y, Z, T]."""
    # Apart from the planted factor nothing here knows the group: with effect 0 the files do not depend on it.
    rng = np.random.default_rng([config.seed, 2, person.number])
    n_regions = len(anatomy.names)
    shared = _band_limited(rng.standard_normal((config.n_frames + _RUN_IN, len(_NETWORKS))), person.site.tr)
    own = _band_limited(rng.standard_normal((config.n_frames + _RUN_IN, n_regions)), person.site.tr)
    courses_TR = np.sqrt(config.coupling) * shared[:, anatomy.network_R] + np.sqrt(1 - config.coupling) * own
    amplitude_R = np.exp(0.15 * rng.standard_normal(n_regions))  # people differ
    if person.adhd:
        amplitude_R[np.isin(anatomy.names, config.regions)] *= 1 + config.effect
    carried = np.where(anatomy.region_V >= 0, 0.4 + 0.6 * anatomy.grey_V, 0)
    values_TV = (courses_TR * amplitude_R)[:, anatomy.region_V] * carried
    values_TV += config.noise * person.site.noise * _noise(rng, config.n_frames, person.site.tr, anatomy)
    values_TV = person.site.scale * (values_TV - values_TV.mean(axis=0))
    volume = np.zeros((*anatomy.mask.shape, config.n_frames), dtype=np.float32)
    volume[anatomy.mask] = values_TV.T
    return volume


def _noise(rng: np.random.Generator, n_frames: int, tr: float, anatomy: _Anatomy) -> Values:
    """Return band-limited noise of standard deviation 1, smooth in space (about 9 mm), float32 [T, V]."""
    white = rng.standard_normal((n_frames + _RUN_IN, *anatomy.mask.shape), dtype=np.float32)
    smooth = gaussian_filter(white, 1.0, axes=(1, 2, 3), truncate=3.0)
    noise = _band_limited(smooth[:, anatomy.mask], tr)
    return noise / noise.std()


def _band_limited(white: npt.NDArray[np.floating], tr: float) -> Values:
    """Keep the band of `_BAND_HZ` along the first axis, drop the run-in, scale to standard deviation 1 on average."""
    frequency = np.fft.rfftfreq(len(white), tr)
    kept = (frequency >= _BAND_HZ[0]) & (frequency <= _BAND_HZ[1])
    spectrum = np.fft.rfft(white, axis=0)
    spectrum[~kept] = 0
    filtered = np.fft.irfft(spectrum, len(white), axis=0)[_RUN_IN:].astype(np.float32)
    # White noise of variance 1 keeps two of n values per frequency bin.
    return filtered / np.float32(np.sqrt(2 * kept.sum() / len(white)))


def _write_phenotypes(path: Path, people: list[_Person], config: SimulationConfig) -> None:
    """Write the table with the real columns and, as in the real one, several codes for missing values."""
    rng = np.random.default_rng([config.seed, 3])
    numbers = {name: number for number, name in SITE_NAMES.items()}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, PHENOTYPE_COLUMNS, delimiter="\t", restval="-999", lineterminator="\n")
        writer.writeheader()
        for person in people:
            # Drawn whether used or not, so that a person's other values do not hang on the group.
            subtype, iq, missing = int(rng.integers(1, 4)), rng.normal(105, 13, size=3), rng.random(3) < 0.15
            writer.writerow(
                {
                    "ScanDir ID": person.scan_id,
                    "Site": numbers[person.site.name],
                    "Gender": "N/A" if missing[0] else int(rng.random() < 0.6),
                    "Age": f"{rng.uniform(7, 18):.2f}",
                    "Handedness": "" if missing[1] else int(rng.random() < 0.9),
                    "DX": subtype if person.adhd else 0,
                    "Secondary Dx": "",
                    "Verbal IQ": "-999" if missing[2] else f"{iq[0]:.0f}",
                    "Performance IQ": "-999" if missing[2] else f"{iq[1]:.0f}",
                    "Full4 IQ": "N/A" if missing[2] else f"{iq[2]:.0f}",
                    "Med Status": "pending",
                    "QC_Athena": 1,
                    "QC_NIAK": 1,
                }
            )
