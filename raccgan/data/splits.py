"""Splits of a source: which samples train, which calibrate the threshold, and which are tested.

Every protocol trains on normal images of the training part alone and tests on the test part, where every class that
is not normal is anomalous. The normal classes are named (``3 5``) or excluded (``!7`` means all but 7).
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from raccgan.data.samples import Sample, Source
from raccgan.errors import InputError

# One class (or several, for a class-conditional model) is normal; all but one are; or the source's layout says which.
# Where a source has no official split, "folder" tests every anomalous image; a test part without anomalies is allowed.
PROTOCOLS = ("one-vs-rest", "leave-one-out", "folder")

TRAIN_SHARE = 0.6  # share of each class that trains where a source brings no split of its own


@dataclass(frozen=True)
class Split:
    """The samples of one experiment. ``train`` and ``held_out`` are normal, and no sample is in two parts."""

    normal_classes: tuple[str, ...]  # order = condition index
    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]  # of the valid or training part, never trained on: calibrates the threshold
    test: tuple[Sample, ...]  # normal and anomalous
    spare: tuple[Sample, ...] = ()  # anomalous, of the training or valid part: neither trained on nor tested

    def is_anomalous(self, sample: Sample) -> bool:
        """True where the sample's class is none of the normal ones."""
        return sample.label not in self.normal_classes


def make_split(
    source: Source, protocol: str | None, normal: Sequence[str], *, held_out: float = 0.15, seed: int = 0
) -> Split:
    """Split a source by a protocol; None is the source's own.

    ``normal`` holds class names, or ``!name`` for all but that one; empty, it means the source's default. Of a class
    with images in the source's ``valid`` part, these are held out; of another, ``held_out`` is the share of the
    training images that is kept from training: at least one image is held out and at least one trains. ``seed`` chooses
    the held-out images, and nothing else. An InputError says that a protocol or class is unknown, that normal images
    are too few, or that the test part could not be evaluated.
    """
    protocol = protocol or source.default_protocol
    if protocol not in PROTOCOLS:
        raise InputError(f"no protocol called {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if not 0 < held_out < 1:
        raise InputError(f"the held-out share is {held_out}; it has to lie between 0 and 1, for example 0.15")
    classes = _normal_classes(source, protocol, normal)
    training: list[Sample] = []
    kept: list[Sample] = []
    for label in classes:
        members = [sample for sample in source.samples if sample.label == label and sample.split == "train"]
        valid = [sample for sample in source.samples if sample.label == label and sample.split == "valid"]
        if not members:
            raise InputError(f"{source.name} has no training image of the normal class {label!r}")
        if valid:
            kept += valid
            training += members
            continue
        if len(members) == 1:
            raise InputError(
                f"{source.name} has only one training image of the normal class {label!r}; "
                "at least two are needed, one to train on and one to calibrate the threshold"
            )
        to_train, held = hold_out(members, held_out, seed)
        training += to_train
        kept += held
    test = _test_samples(source, protocol, classes)
    tested = {sample.key for sample in test}
    others = (sample for sample in source.samples if sample.label not in classes)
    spare = tuple(sample for sample in others if sample.split != "test" and sample.key not in tested)
    return Split(classes, tuple(training), tuple(kept), tuple(test), spare)


def hold_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """The samples that train, and the share of them that is kept from it: at least one each, of two or more.

    A group is kept whole or not at all, unless all samples are of one.
    """
    groups = len({_group(sample) for sample in samples})
    chosen = _chosen(samples, share, f"held out {seed}", _group if groups > 1 else _key)
    return [s for s in samples if s.key not in chosen], [s for s in samples if s.key in chosen]


def hash_order(keys: Iterable[str], *, salt: str) -> list[str]:
    """The keys in an order that looks random and depends on the salt and on each key alone.

    A hash instead of a random generator: the same on every machine and library version, and a file added to a folder
    leaves the order of the others as it was.
    """
    return sorted(
        keys,
        key=lambda key: hashlib.blake2b(f"{salt}\0{key}".encode("utf-8", "backslashreplace"), digest_size=16).digest(),
    )


def split_by_class(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Give samples without an official split a fixed one: in each class 60% train, the rest test.

    It depends on nothing but the keys, and the groups. A class of two or more groups, or images without one, has at
    least one on either side; a class of one trains. A group that trains in one class trains in all.
    """
    by_class: dict[str, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    training: set[str] = set()
    for members in by_class.values():
        training |= _chosen(members, TRAIN_SHARE, "split by class", _group)
    groups = {sample.group for sample in samples if sample.group and sample.key in training}
    trains = [sample.key in training or sample.group in groups for sample in samples]
    return tuple(replace(s, split="train" if its else "test") for s, its in zip(samples, trains, strict=True))


def _key(sample: Sample) -> str:
    return sample.key


def _group(sample: Sample) -> str:
    return sample.group or sample.key


def _chosen(samples: Sequence[Sample], share: float, salt: str, unit: Callable[[Sample], str]) -> set[str]:
    """The keys of about a share of the samples, in whole units: at least one unit, and not the last one."""
    keys: dict[str, list[str]] = {}
    for sample in samples:
        keys.setdefault(unit(sample), []).append(sample.key)
    chosen: list[str] = []
    for name in hash_order(keys, salt=salt)[: max(1, len(keys) - 1)]:
        if len(chosen) >= _share(share, len(samples)):
            break
        chosen += keys[name]
    return set(chosen)


def names_of(text: str, classes: Sequence[str]) -> list[str]:
    """The classes that a text such as ``3,5`` or ``!7`` names; a name with a comma in it may stand in quotes."""
    whole = text.strip()
    if whole in classes or whole.removeprefix("!") in classes:
        return [whole]
    names = next(csv.reader([text], skipinitialspace=True), [])
    return [name if name in classes else name.strip() for name in names if name.strip()]


def text_of(names: Iterable[str]) -> str:
    """The text from which :func:`names_of` reads these names."""
    text, names = io.StringIO(), list(names)
    spaced = any(name != name.strip() for name in names)
    csv.writer(text, lineterminator="", quoting=csv.QUOTE_ALL if spaced else csv.QUOTE_MINIMAL).writerow(names)
    return text.getvalue()


def closest(name: str, known: Iterable[str], what: str = "classes") -> str:
    """The end of an error line about an unknown name: the closest known one, and all of them."""
    folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"; did you mean {folded[close[0]]!r}?" if close else ";"
    return f"{hint} the {what} are {_listed(list(folded.values()))}"


def _normal_classes(source: Source, protocol: str, named: Sequence[str]) -> tuple[str, ...]:
    """The normal classes in the source's order, whatever the order they were named in."""
    if not named and protocol == "leave-one-out":
        raise InputError(
            f"leave-one-out needs the class to leave out: say --normal '!{source.classes[-1]}' for all classes but "
            f"{source.classes[-1]!r}; the classes are {_listed(source.classes)}"
        )
    named = tuple(named) or source.default_normal
    if not named:
        raise InputError(
            f"{source.name} does not say which class is normal: name it, for example --normal {source.classes[0]}; "
            f"the classes are {_listed(source.classes)}"
        )
    # A class that is really called "!x" is meant by that name.
    excluded = {name[1:] for name in named if name.startswith("!") and name not in source.classes}
    if excluded and len(excluded) < len(set(named)):
        raise InputError(
            f"name the normal classes ({source.classes[0]}) or exclude some (!{source.classes[-1]}), not both"
        )
    for name in excluded or named:
        if name not in source.classes:
            raise InputError(f"{source.name} has no class {name!r}{closest(name, source.classes)}")
    classes = tuple(name for name in source.classes if (name not in excluded if excluded else name in named))
    if not classes:
        raise InputError(f"every class of {source.name} is excluded; at least one has to be normal")
    left = len(source.classes) - len(classes)
    if protocol == "leave-one-out" and left != 1:
        raise InputError(
            f"leave-one-out leaves exactly one class out, but {left} of {len(source.classes)} are not normal: "
            f"say for example --normal '!{source.classes[-1]}'"
        )
    if protocol == "one-vs-rest" and left == 0:
        raise InputError(
            f"all classes of {source.name} ({_listed(source.classes)}) are normal, so nothing is anomalous: "
            f"name fewer, for example --normal {source.classes[0]}"
        )
    return classes


def _share(share: float, count: int) -> int:
    """A share of a class: at least one sample, and not the last one."""
    return max(1, min(round(share * count), count - 1))


def _test_samples(source: Source, protocol: str, classes: tuple[str, ...]) -> list[Sample]:
    test = []
    trained = {sample.group for sample in source.samples if sample.split == "train" and sample.label in classes}
    for sample in source.samples:
        if sample.split == "test":
            test.append(sample)
        elif protocol == "folder" and not source.official_split and sample.label not in classes:
            test += [replace(sample, split="test")] if not sample.group or sample.group not in trained else []
    anomalous = sum(sample.label not in classes for sample in test)
    if not test:
        raise InputError(f"{source.name} has no test image")
    if protocol != "folder" and anomalous in (0, len(test)):
        missing = "anomalous" if anomalous == 0 else "normal"
        raise InputError(f"the test part of {source.name} has no {missing} image, so {protocol} cannot be evaluated")
    return test


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
