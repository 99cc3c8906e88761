"""Lines of results: kept, found again, summed up."""

from __future__ import annotations

import re
from multiprocessing import get_context
from pathlib import Path

import pytest
from PIL import Image

from raccgan.errors import InputError
from raccgan.experiment.results import HEADER, Figures, Results, draw, mean_of, summary
from raccgan.experiment.tables import BENCHMARKS, Trial, trials


def line_of(row: Trial, auroc: float, control: float = 0.5) -> Figures:
    key = dict(zip(("variant", "normal", "seed", "digest"), row.key, strict=True))
    figures = dict.fromkeys(HEADER, "0.5") | {"autoencoder": str(control), "nearest_neighbour": str(control)}
    return figures | key | {"auroc": str(auroc), "pixel_auroc": "", "train_seconds": "7"}


def test_lines_are_found_again_by_their_row(tmp_path: Path) -> None:
    results, wanted = Results(tmp_path / "results.csv"), trials("digits", normal=["3", "5"], seeds=[0, 1])
    assert results.of(wanted) == {}
    for row, auroc in zip(wanted[:3], (0.1, 0.2, 0.3), strict=True):
        results.add(line_of(row, auroc))
    assert {row: line["auroc"] for row, line in results.of(wanted).items()} == dict(
        zip(wanted[:3], ("0.1", "0.2", "0.3"), strict=True)
    )
    others = trials("digits", normal=["3", "5"], seeds=[0, 1], settings={"gan_steps": 1})
    assert results.of(others) == {}
    results.add(line_of(wanted[0], 0.9))
    assert results.of(wanted)[wanted[0]]["auroc"] == "0.9"


def test_a_table_from_before_a_kind_of_score_is_continued(tmp_path: Path) -> None:
    wanted = trials("digits", normal=["3"], seeds=[0, 1])
    older = line_of(wanted[0], 0.4)
    names = [name for name in HEADER if "defects" not in name]
    (tmp_path / "results.csv").write_text(f"{','.join(names)}\n{','.join(older[name] for name in names)}\n")
    results = Results(tmp_path / "results.csv")
    results.add(line_of(wanted[1], 0.6))
    found = results.of(wanted)
    assert [(line["auroc"], line["auroc_defects"]) for line in found.values()] == [("0.4", ""), ("0.6", "0.5")]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "chest-xray", "screw"])
def test_the_published_lines_are_of_todays_rows(name: str) -> None:
    """Another machine goes on from them; a setting that changed since would make them those of other rows."""
    published = Results(Path(__file__).parents[2] / "bench" / "results" / "experiments" / f"{name}.csv")
    lines = published.read()
    assert len(published.of(trials(name))) == len(lines) > 0


def _add(path: Path, seed: int) -> None:
    Results(path).add(line_of(trials("digits", normal=["3"], seeds=[seed])[0], seed / 10))


def test_several_processes_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    processes = [get_context("fork").Process(target=_add, args=(path, seed)) for seed in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(line["seed"] for line in Results(path).read()) == [str(seed) for seed in range(8)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "it has no column 'variant'"),
        (",".join(HEADER) + "\n1,2\n", "a line is longer or shorter than the first"),
        (",".join(HEADER) + '\n"1,2\n', "cannot read"),
    ],
)
def test_another_table_is_refused_and_left_as_it_is(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(text)
    (row,) = trials("digits", normal=["3"], seeds=[0])
    with pytest.raises(InputError, match=re.escape(said)):
        Results(path).add(line_of(row, 0.5))
    assert path.read_text() == text


def test_a_mean_is_over_the_classes_that_every_seed_has() -> None:
    wanted = trials("digits", normal=["3", "5", "7"], seeds=[0, 1])
    aurocs = dict(zip(wanted, (0.9, 0.8, 0.1, 0.7, 0.6), strict=False))  # 7 is not there with seed 1
    found = mean_of({row: line_of(row, auroc) for row, auroc in aurocs.items()}, "auroc", 10)
    assert found is not None
    assert (round(found.mean, 6), found.seeds, found.classes) == (0.75, 2, 2)
    assert found.deviation == pytest.approx(0.1414, abs=1e-4)  # of 0.85 and 0.65
    assert found.extent == "2 of 10 classes, 2 seeds"
    assert mean_of({}, "auroc", 10) is None


def test_the_summary_shows_what_lost_and_what_others_reached(tmp_path: Path) -> None:
    better, worse = trials("mnist", normal=["3", "5"], seeds=[0])
    known = {"default": {better: line_of(better, 0.95), worse: line_of(worse, 0.4)}, "no-attention": {}}
    said = summary("mnist", BENCHMARKS["mnist"], known)
    assert "| default                  | 0.675           |" in said
    assert "| no-attention             | not run yet" in said
    assert "5, seed 0: 0.4 against 0.5" in said
    assert "3, seed 0" not in said
    assert "| OCGAN                    | 0.975           |" in said
    draw(tmp_path / "summary.png", "mnist", BENCHMARKS["mnist"], known)
    assert Image.open(tmp_path / "summary.png").size[0] > 500
