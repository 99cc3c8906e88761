"""Pulmonary sets in folders: their classes, and that no patient is in two parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan.data.samples import Sample, Source
from raccgan.data.sources.csv_list import load_csv
from raccgan.data.sources.pulmonary import RADIOGRAPHY, patient_of
from raccgan.data.sources.registry import load_source
from raccgan.data.splits import Split, hold_out, make_split, split_by_class
from raccgan.errors import InputError


def write(folder: Path, *names: str) -> None:
    draw = np.random.default_rng(len(names))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name)


def parts(split: Split) -> list[set[str]]:
    return [{s.group for s in part if s.group} for part in (split.train, split.held_out, split.test)]


@pytest.mark.parametrize(
    ("key", "patient"),
    [
        ("COVID/P012_7.png", "P012"),
        ("COVID/P012-003.png", "P012"),
        ("COVID/Covid (12).png", ""),
        ("Normal/images/Normal-123.png", ""),
        ("COVID/17.png", ""),
        ("COVID/case 4/slice 9.png", "case 4"),
        ("data/COVID/case 4/a/9.png", "case 4/a"),
        ("COVID/NORMAL2-IM-1427-0001.jpeg", "NORMAL2-IM-1427"),
        ("COVID/person1_bacteria_2.jpeg", "person1_bacteria"),
    ],
)
def test_the_patient_of_an_image(key: str, patient: str) -> None:
    label = "Normal" if key.startswith("Normal") else "COVID"
    assert patient_of(key, label) == patient


def test_ct_slices_are_split_by_patients(tmp_path: Path) -> None:
    for label in ("COVID", "non-COVID"):
        write(tmp_path / "lung_ct" / label, *(f"{label[0]}{p:02}_{i}.png" for p in range(8) for i in range(5)))
    source = load_source("lung-ct", tmp_path)
    assert source.name == "lung-ct"
    assert source.default_normal == ("non-COVID",)
    assert source.notes == ("16 patients, by folders and names",)
    split = make_split(source, None, ())
    train, held_out, test = parts(split)
    assert len(train | held_out | test) == 16
    assert not train & held_out
    assert not train & test
    assert not held_out & test
    assert {len(part) % 5 for part in (split.train, split.held_out)} == {0}
    assert len(split.test) == 40 + sum(not split.is_anomalous(sample) for sample in split.test)


def test_a_patient_with_slices_of_both_classes_is_not_tested_where_it_trains(tmp_path: Path) -> None:
    write(tmp_path / "normal", *(f"P{p}_{i}.png" for p in range(6) for i in range(3)))
    write(tmp_path / "ill", *(f"P{p}_{i}.png" for p in range(4, 10) for i in range(3)))
    split = make_split(load_source("lung-ct", tmp_path), None, ())
    train, held_out, test = parts(split)
    assert not (train | held_out) & test
    assert {sample.group for sample in split.spare} == (train | held_out) & {"P4", "P5"}


def test_the_radiography_database_without_its_masks_of_lungs(tmp_path: Path) -> None:
    for label in ("COVID", "Normal", "Viral Pneumonia"):
        for inside in ("images", "masks"):
            write(tmp_path / RADIOGRAPHY / label / inside, *(f"{label}-{i}.png" for i in range(6)))
    source = load_source("covid-xray", tmp_path)
    assert source.classes == ("COVID", "Normal", "Viral Pneumonia")
    assert source.default_normal == ("Normal",)
    assert len(source.samples) == 18
    assert not any(sample.mask or sample.group for sample in source.samples)
    assert source.notes == ("0 patients, by folders and names; 18 images tell none",)


@pytest.mark.parametrize(
    ("name", "message"),
    [("lung-ct", "no CT slices in .*lung_ct"), ("covid-xray", "no Normal/ and no COVID/ in .*Radiography Database")],
)
def test_what_is_missing_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_source(name, tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_patients_of_a_list_are_held_out_whole(tmp_path: Path) -> None:
    write(tmp_path, *(f"{i}.png" for i in range(24)))
    lines = [f"{i}.png,{'ill' if i > 20 else 'good'},{'test' if i > 19 else 'train'},p{i // 4}" for i in range(24)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split,patient_id", *lines]))
    source = load_csv(tmp_path)
    assert source.samples[5].group == "p1"
    for seed in range(5):
        split = make_split(source, None, ("good",), seed=seed)
        assert len(split.held_out) == 4
        assert len({sample.group for sample in split.held_out}) == 1


def test_without_groups_nothing_has_changed_and_one_group_is_divided() -> None:
    alone = [Sample(f"a/{i}", "a", "train", np.zeros((2, 2), np.uint8)) for i in range(10)]
    together = [Sample(s.key, "a", "train", s.image, group="one") for s in alone]
    assert [s.key for s in hold_out(alone, 0.3, 0)[1]] == [s.key for s in hold_out(together, 0.3, 0)[1]]
    assert {s.split for s in split_by_class(together)} == {"train"}
    source = Source("s", split_by_class(together), ("a",), 1, ("a",), "folder", official_split=False)
    with pytest.raises(InputError, match="no test image"):
        make_split(source, None, ())
