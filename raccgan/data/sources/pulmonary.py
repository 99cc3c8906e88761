"""Pulmonary data sets in the folders that people have, split here: CT slices, and the COVID-19 Radiography Database.

No such set has an official split. Images of one patient are in one part, as far as folders and names tell patients.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from raccgan.data.layouts import NORMAL_NAMES
from raccgan.data.listing import subfolders
from raccgan.data.samples import Source, printable
from raccgan.data.sources.folder import is_split, load_folder
from raccgan.data.sources.reading import Reading
from raccgan.data.splits import split_by_class
from raccgan.errors import InputError

HEALTHY_CT = NORMAL_NAMES | {"non-covid", "noncovid", "ct_noncovid", "non_covid", "negative"}
RADIOGRAPHY = "COVID-19_Radiography_Dataset"
RADIOGRAPHY_CLASSES = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")


def load_lung_ct(root: Path) -> Source:
    """Load ``<class>/`` or ``<class>/<patient>/`` of slices from ``root/lung_ct``, or from ``root`` itself.

    Normal is the class of a usual name, such as ``normal`` or ``non-COVID``. An InputError says what is missing.
    """
    folder = root / "lung_ct" if (root / "lung_ct").is_dir() else root
    if not folder.is_dir():
        raise InputError(
            f"no CT slices in {printable(root)}: put one folder a class, such as COVID/ and non-COVID/, into "
            f"{printable(root / 'lung_ct')}"
        )
    source = load_folder(folder)
    normal = tuple(name for name in source.classes if name.casefold() in HEALTHY_CT)
    return _by_patient(
        replace(source, name="lung-ct", default_normal=normal, default_protocol="folder"), official=is_split(folder)
    )


def load_covid_xray(root: Path) -> Source:
    """Load the COVID-19 Radiography Database from ``root``, or from its own folder in it.

    Its classes hold ``images/`` and ``masks/``. The masks are of lungs, so they are not read. An InputError says what
    is missing.
    """
    folder = root / RADIOGRAPHY if (root / RADIOGRAPHY).is_dir() else root
    there = {path.name: path for path in subfolders(folder)} if folder.is_dir() else {}
    if missing := [name for name in ("Normal", "COVID") if name not in there]:
        raise InputError(
            f"no {' and no '.join(f'{name}/' for name in missing)} in {printable(folder)}: put the classes of the "
            f"COVID-19 Radiography Database, {', '.join(RADIOGRAPHY_CLASSES)}, into {printable(root / RADIOGRAPHY)}"
        )
    reading = Reading(folder)
    for name in RADIOGRAPHY_CLASSES:
        if name in there:
            images = there[name] / "images"
            reading.add(images if images.is_dir() else there[name], name, None)
    source = reading.source("covid-xray", official_split=False)
    return _by_patient(replace(source, default_normal=("Normal",), default_protocol="folder"), official=False)


def patient_of(key: str, label: str) -> str:
    """The patient of an image, by its path; empty where that tells none.

    The patient is the folder below that of the class, or the file's name without the number at its end where a number
    is left: ``P012`` of ``P012_7.png``, and none of ``Covid (12).png``, whose number is the image's own.
    """
    path = PurePosixPath(key)
    above = path.parts[:-1]
    below = above[len(above) - above[::-1].index(label) :] if label in above else ()
    if folders := [name for name in below if name != "images"]:
        return "/".join(folders)
    stem = re.sub(r"[\s_.-]*\(?\d+\)?$", "", path.stem)
    return stem if re.search(r"\d", stem) else ""


def _by_patient(source: Source, *, official: bool) -> Source:
    """The source with the patients of its images, split by them where it has no split of its own."""
    samples = tuple(replace(sample, group=patient_of(sample.key, sample.label)) for sample in source.samples)
    patients = {sample.group for sample in samples if sample.group}
    alone = sum(not sample.group for sample in samples)
    note = f"{len(patients)} patients, by folders and names" + (f"; {alone} images tell none" if alone else "")
    done = samples if official else split_by_class(samples)
    return replace(source, samples=done, notes=(*source.notes, note))
