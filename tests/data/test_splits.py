import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raccgan.config import Config
from raccgan.data.samples import Sample, Source, SplitName
from raccgan.data.sources.registry import load_source
from raccgan.data.splits import PROTOCOLS, hash_order, make_split, names_of, split_by_class, text_of
from raccgan.errors import InputError
from raccgan.training.run import prepare


def a_source(train: dict[str, int], test: dict[str, int], **changes: object) -> Source:
    """A source with so many samples a class, their files never opened."""
    parts: list[tuple[SplitName, dict[str, int]]] = [("train", train), ("test", test)]
    samples = tuple(
        Sample(f"{split}/{label}/{index}", label, split, Path("nowhere"))
        for split, counts in parts
        for label, count in counts.items()
        for index in range(count)
    )
    classes = tuple(dict.fromkeys([*train, *test]))
    source = Source("toy", samples, classes, 1, (), "one-vs-rest")
    return replace(source, **changes)  # type: ignore[arg-type]


TOY = a_source({"a": 20, "b": 10, "c": 10}, {"a": 5, "b": 4, "c": 3})


def test_one_vs_rest() -> None:
    split = make_split(TOY, "one-vs-rest", ["a"])
    assert split.normal_classes == ("a",)
    assert (len(split.train), len(split.held_out), len(split.test)) == (17, 3, 12)
    assert {sample.label for sample in split.train + split.held_out} == {"a"}
    assert [split.is_anomalous(sample) for sample in split.test] == [sample.label != "a" for sample in split.test]


def test_several_normal_classes_take_the_order_of_the_source() -> None:
    split = make_split(TOY, None, ["c", "a", "c"])
    assert split.normal_classes == ("a", "c")
    assert {sample.label for sample in split.held_out} == {"a", "c"}


@pytest.mark.parametrize("normal", [["!b"], ["a", "c"], ["c", "a"]])
def test_leave_one_out(normal: list[str]) -> None:
    split = make_split(TOY, "leave-one-out", normal)
    assert split.normal_classes == ("a", "c")
    assert {sample.label for sample in split.test if split.is_anomalous(sample)} == {"b"}


def test_a_class_called_with_an_exclamation_mark_is_meant_by_its_name() -> None:
    source = a_source({"a": 3, "!a": 3}, {"a": 1, "!a": 1})
    assert make_split(source, None, ["!a"]).normal_classes == ("!a",)


def test_folder_takes_the_default_and_allows_no_anomaly() -> None:
    source = a_source({"good": 4}, {"good": 2}, default_normal=("good",), default_protocol="folder")
    split = make_split(source, None, ())
    assert split.normal_classes == ("good",)
    assert not any(split.is_anomalous(sample) for sample in split.test)


def test_abnormal_training_images_of_an_official_split_are_left_alone() -> None:
    split = make_split(TOY, "folder", ["a"])
    assert len(split.test) == 12


def test_folder_tests_every_anomaly_where_the_split_is_ours() -> None:
    split = make_split(replace(TOY, official_split=False), "folder", ["a"])
    assert sum(split.is_anomalous(sample) for sample in split.test) == 27
    assert sum(not split.is_anomalous(sample) for sample in split.test) == 5
    assert {sample.split for sample in split.test} == {"test"}
    assert not {sample.key for sample in split.test} & {sample.key for sample in split.train + split.held_out}


@pytest.mark.parametrize("protocol", ["one-vs-rest", "folder"])
@pytest.mark.parametrize("held_out", [0.001, 0.15, 0.5, 0.999])
def test_parts_are_disjoint_and_complete(protocol: str, held_out: float) -> None:
    split = make_split(TOY, protocol, ["a", "b"], held_out=held_out, seed=3)
    keys = [sample.key for part in (split.train, split.held_out, split.test) for sample in part]
    assert len(keys) == len(set(keys))
    normal = {sample.key for sample in TOY.samples if sample.split == "train" and sample.label in "ab"}
    assert {sample.key for sample in split.train + split.held_out} == normal
    for part in (split.train, split.held_out):
        assert {sample.label for sample in part} == {"a", "b"}


def test_the_seed_chooses_the_held_out_images_and_nothing_else() -> None:
    first, again, other = (make_split(TOY, None, ["a"], seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.held_out != other.held_out
    assert first.test == other.test


def test_held_out_images_of_a_class_do_not_depend_on_the_other_classes() -> None:
    alone = make_split(TOY, None, ["a"]).held_out
    among = make_split(TOY, None, ["a", "b"]).held_out
    assert alone == tuple(sample for sample in among if sample.label == "a")


def test_two_images_are_enough() -> None:
    split = make_split(a_source({"a": 2, "b": 1}, {"a": 1, "b": 1}), None, ["a"], held_out=0.9)
    assert (len(split.train), len(split.held_out)) == (1, 1)


def test_split_by_class_is_stratified_and_depends_on_the_keys_alone() -> None:
    samples = [replace(sample, split="train") for sample in TOY.samples]
    shuffled = random.Random(0).sample(samples, len(samples))
    given, mixed = split_by_class(samples), split_by_class(shuffled)
    assert {(s.key, s.split) for s in given} == {(s.key, s.split) for s in mixed}
    for label, total in (("a", 25), ("b", 14), ("c", 13)):
        assert sum(s.split == "train" for s in given if s.label == label) == round(0.6 * total)


@pytest.mark.parametrize(("count", "training"), [(1, 1), (2, 1), (3, 2)])
def test_split_by_class_of_few(count: int, training: int) -> None:
    samples = split_by_class(a_source({"a": count}, {}).samples)
    assert sum(sample.split == "train" for sample in samples) == training


def test_hash_order_is_frozen() -> None:
    """A change here would move images between training and test in every result that stands."""
    frozen = list("ecafbd")
    assert hash_order("abcdef", salt="s") == frozen
    assert hash_order("fedcba", salt="s") == frozen
    assert hash_order("abcdef", salt="t") != frozen


def test_digits_leak_nothing() -> None:
    source = load_source("digits", Path("unused"))
    split = make_split(source, None, ())
    assert split.normal_classes == ("0", "1", "2", "3", "4")
    parts = [split.train, split.held_out, split.test]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert not {s.key for s in parts[one]} & {s.key for s in parts[other]}
        assert not {s.image.tobytes() for s in parts[one]} & {s.image.tobytes() for s in parts[other]}  # type: ignore[union-attr]
    assert not any(split.is_anomalous(sample) for sample in split.train + split.held_out)
    assert len(split.test) == sum(sample.split == "test" for sample in source.samples)
    assert split == make_split(load_source("digits", Path("unused")), None, ())


@pytest.mark.parametrize(
    ("protocol", "normal", "message"),
    [
        ("one-vs-all", ["a"], "no protocol called 'one-vs-all'; there are " + ", ".join(PROTOCOLS)),
        (None, [], "toy does not say which class is normal: name it, for example --normal a; the classes are a, b, c"),
        (None, ["A"], "toy has no class 'A'; did you mean 'a'? the classes are a, b, c"),
        (None, ["zebra"], "toy has no class 'zebra'; the classes are a, b, c"),
        (None, ["!d"], "toy has no class 'd'; the classes are a, b, c"),
        (None, ["!a", "b"], "name the normal classes (a) or exclude some (!c), not both"),
        (None, ["!a", "!b", "!c"], "every class of toy is excluded; at least one has to be normal"),
        (None, ["a", "b", "c"], "all classes of toy (a, b, c) are normal, so nothing is anomalous: name fewer"),
        ("leave-one-out", [], "leave-one-out needs the class to leave out: say --normal '!c'"),
        (
            "leave-one-out",
            ["a"],
            "leaves exactly one class out, but 2 of 3 are not normal: say for example --normal '!c'",
        ),
        ("leave-one-out", ["a", "b", "c"], "leaves exactly one class out, but 0 of 3 are not normal"),
    ],
)
def test_what_cannot_be_named(protocol: str | None, normal: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_split(TOY, protocol, normal)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "protocol", "message"),
    [
        (a_source({"b": 3}, {"a": 2, "b": 1}), None, "toy has no training image of the normal class 'a'"),
        (
            a_source({"a": 1, "b": 3}, {"a": 2}),
            None,
            "toy has only one training image of the normal class 'a'; at least",
        ),
        (a_source({"a": 3, "b": 3}, {}), "folder", "toy has no test image"),
        (a_source({"a": 3, "b": 3}, {"a": 3}), None, "has no anomalous image, so one-vs-rest cannot be evaluated"),
        (a_source({"a": 3}, {"b": 3}), "leave-one-out", "has no normal image, so leave-one-out cannot be evaluated"),
    ],
)
def test_too_few_images(source: Source, protocol: str | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_split(source, protocol, ["a"])
    assert message in str(caught.value)


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_held_out_share_out_of_range(share: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        make_split(TOY, None, ["a"], held_out=share)


def test_long_class_lists_are_cut() -> None:
    many = a_source({str(i): 2 for i in range(50)}, {"0": 1})
    with pytest.raises(InputError, match="19 and 30 more"):
        make_split(many, None, ["x"])


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"],
        ["a, b", "c"],
        ["ok, checked"],
        ['say "a"', "b"],
        [" a ", "b"],
        ["!a", "b"],
        ["a;b"],
        ["größe"],
        ["1,5"],
    ],
)
def test_any_names_of_classes_are_read_back(names: list[str]) -> None:
    """What a run stores as its normal classes is what it is evaluated and resumed with."""
    assert names_of(text_of(names), names) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("3, 5", ["3", "5"]), ("!7", ["!7"]), ("", []), ("ok, checked", ["ok, checked"]),
        ("!ok, checked", ["!ok, checked"]),
        ('"ok, checked", 3', ["ok, checked", "3"]), ("a,,b,", ["a", "b"]),
    ],
)  # fmt: skip
def test_names_as_people_write_them(text: str, names: list[str]) -> None:
    assert names_of(text, ["3", "5", "7", "ok, checked"]) == names


def test_a_class_with_a_comma_is_evaluated_after_it_was_trained(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for label in ("a, b", "c", "bad"):
        for index in range(4):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.fromarray(pixels + index).save(tmp_path / label / f"{index}.png")
    run = prepare(Config(dataset=str(tmp_path), normal="!bad"), tmp_path, torch.device("cpu"))
    assert run.classes == ["a, b", "c"]
    again = prepare(run.config, tmp_path, torch.device("cpu"))
    assert (again.classes, again.split) == (run.classes, run.split)
