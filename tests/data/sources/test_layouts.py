"""Layouts that people have: which images are of which class and part, which mask belongs to which, what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan.data.layouts import bare, split_of
from raccgan.data.samples import Source, files_of
from raccgan.data.sources.folder import load_folder
from raccgan.data.sources.registry import load_source
from raccgan.data.splits import make_split
from raccgan.errors import InputError

Tree = Callable[[str], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """``tree("train/good/0.png GT/bad/0.png ...")`` writes pictures, and masks where a name says so."""
    draw = np.random.default_rng(0)

    def write(names: str) -> Path:
        for name in names.split():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            words = name.casefold().replace("_", "/").replace(".", "/").split("/")
            if {"mask", "masks", "gt", "truth", "label", "bw"} & set(words) and "photo" not in words:
                mask = np.zeros((12, 16), np.uint8)
                mask[2:5, 3:9] = 0 if "empty" in words or "good" in words else 255
                Image.fromarray(mask).save(path)
            else:
                Image.fromarray(draw.integers(0, 256, (12, 16, 3)).astype(np.uint8)).save(path)
        return tmp_path

    return write


def understood(source: Source) -> dict[str, str]:
    """key -> part, label and the masks, such as ``test bad m/0.png``."""
    found = {}
    for sample in source.samples:
        root = str(sample.image).removesuffix(sample.key)
        masks = [str(path).removeprefix(root) for path in files_of(sample.mask)]
        found[sample.key] = " ".join([sample.split, sample.label, *masks])
    return found


TRAIN = "train/good/0.png train/good/1.png "


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(  # MVTec AD
            TRAIN + "test/good/0.png test/bad/0.png ground_truth/bad/0_mask.png",
            {"test/good/0.png": "test good", "test/bad/0.png": "test bad ground_truth/bad/0_mask.png"},
            id="mvtec",
        ),
        pytest.param(
            TRAIN + "test/good/0.png test/a/0.png test/b/0.png ground_truth/b/0_gt.bmp",
            {"test/a/0.png": "test a", "test/b/0.png": "test b ground_truth/b/0_gt.bmp"},
            id="a class without masks",
        ),
        pytest.param(
            TRAIN + "test/good/0.png test/a/1/0.png test/a/2/0.png ground_truth/a/2/0_mask.png",
            {"test/a/1/0.png": "test a", "test/a/2/0.png": "test a ground_truth/a/2/0_mask.png"},
            id="nested",
        ),
        pytest.param(  # MVTec LOCO: a folder of masks an image
            TRAIN + "validation/good/0.png test/good/000.png test/logical/000.png test/logical/001.png "
            "ground_truth/logical/000/000.png ground_truth/logical/000/001.png ground_truth/logical/001/000.png",
            {
                "validation/good/0.png": "valid good",
                "test/logical/000.png": "test logical "
                "ground_truth/logical/000/000.png ground_truth/logical/000/001.png",
                "test/logical/001.png": "test logical ground_truth/logical/001/000.png",
            },
            id="loco",
        ),
        pytest.param(  # MVTec AD 2
            TRAIN + "validation/good/0.png test_public/good/0.png test_public/bad/0.png test_private/0.png "
            "test_public/ground_truth/bad/0_mask.png test_private_mixed/0.png",
            {"test_public/bad/0.png": "test bad test_public/ground_truth/bad/0_mask.png"},
            id="ad2",
        ),
        pytest.param(  # the data of anomalib's tutorial
            "good/0.png good/1.png NG/crack/0.png NG/hole/0.png mask/crack/0.png mask/hole/0.png",
            {"NG/crack/0.png": "test NG mask/crack/0.png", "NG/hole/0.png": "train NG mask/hole/0.png"},
            id="toy",
        ),
        pytest.param(
            TRAIN + "test/good/0.png test/anomaly/0.png test/mask/0.png",
            {"test/anomaly/0.png": "test anomaly test/mask/0.png", "test/good/0.png": "test good"},
            id="mask beside the classes",
        ),
        pytest.param(
            "train/normal/images/0.jpg train/normal/images/1.jpg test/normal/images/0.jpg "
            "test/anomalous/images/0.jpg test/anomalous/masks/0.png",
            {"test/anomalous/images/0.jpg": "test anomalous test/anomalous/masks/0.png"},
            id="images and masks in a class",
        ),
        pytest.param(
            "images/train/good/0.png images/train/good/1.png images/test/good/0.png images/test/bad/0.png "
            "masks/test/bad/0.png",
            {"images/test/bad/0.png": "test bad masks/test/bad/0.png"},
            id="images and masks at the top",
        ),
        pytest.param(
            TRAIN + "test/good/0.png test/bad/0.png test/bad_mask/0.png",
            {"test/bad/0.png": "test bad test/bad_mask/0.png"},
            id="a folder of masks called after its class",
        ),
        pytest.param(
            TRAIN + "test/good/0.png test/bad/0.png test_masks/bad/0.png",
            {"test/bad/0.png": "test bad test_masks/bad/0.png"},
            id="a folder of masks called after its part",
        ),
        pytest.param(
            TRAIN + "test/good/0.png test/bad/0.jpg test/bad/0_GT.png",
            {"test/bad/0.jpg": "test bad test/bad/0_GT.png"},
            id="a mask beside its image",
        ),
        pytest.param(
            TRAIN
            + "test/good/0.png test/bad/s1/image.png test/bad/s1/mask.png test/bad/s2/image.png test/bad/s2/mask.png",
            {
                "test/bad/s1/image.png": "test bad test/bad/s1/mask.png",
                "test/bad/s2/image.png": "test bad test/bad/s2/mask.png",
            },
            id="a folder an image",
        ),
        pytest.param(
            TRAIN + "test/good/0.png test/bad/0.png ground_truth/bad/0_mask_1.png ground_truth/bad/0_mask_2.png",
            {"test/bad/0.png": "test bad ground_truth/bad/0_mask_1.png ground_truth/bad/0_mask_2.png"},
            id="masks with numbers",
        ),
        pytest.param(
            "good/train/0.png good/train/1.png good/test/0.png bad/test/0.png mask/bad/test/0.png",
            {"good/test/0.png": "test good", "bad/test/0.png": "test bad mask/bad/test/0.png"},
            id="parts in classes",
        ),
    ],
)
def test_images_and_their_masks(tree: Tree, names: str, expected: dict[str, str]) -> None:
    found = understood(load_folder(tree(names)))
    assert {key: found[key] for key in expected} == expected
    assert not any("mask" in key or "truth" in key for key in found), "no mask is an image"


def blank(path: Path) -> None:
    Image.new("L", (16, 12)).save(path)


@pytest.mark.parametrize(("suffix", "ending"), [("_GT", "png"), ("_label", "bmp")])
def test_pairs_in_one_folder_are_normal_where_the_mask_is_empty(tree: Tree, suffix: str, ending: str) -> None:
    """Kolektor's two sets: a folder a part, or a folder an item; every image has a mask beside it."""
    names = [f"{part}/{i}.jpg {part}/{i}{suffix}.{ending}" for part in ("train", "test") for i in range(4)]
    root = tree(" ".join(names))
    for name in ("train/0", "train/1", "train/2", "test/0"):
        blank(root / f"{name}{suffix}.{ending}")
    source = load_folder(root)
    good = {sample.key for sample in source.samples if sample.label == "good"}
    assert good == {"train/0.jpg", "train/1.jpg", "train/2.jpg", "test/0.jpg"}
    assert source.classes == ("anomalous", "good")
    split = make_split(source, None, ())
    assert (len(split.train + split.held_out), len(split.test), len(split.spare)) == (3, 4, 1)
    for part in ("train", "test"):
        (root / part).rename(root / f"kos-{part}")
    assert sorted(sample.label for sample in load_folder(root).samples) == ["anomalous"] * 4 + ["good"] * 4


def test_visa(tree: Tree) -> None:
    """Its list, with the folder of all categories or the list itself; and one category without it."""
    root = tree(
        " ".join(f"candle/Data/Images/Normal/{i}.JPG" for i in range(4))
        + " candle/Data/Images/Anomaly/0.JPG candle/Data/Masks/Anomaly/0.png fryum/Data/Images/Normal/0.JPG"
    )
    lines = [f"candle,{'test' if i == 3 else 'train'},normal,candle/Data/Images/Normal/{i}.JPG," for i in range(4)]
    lines += ["candle,test,anomaly,candle/Data/Images/Anomaly/0.JPG,candle/Data/Masks/Anomaly/0.png"]
    lines += ["fryum,train,normal,fryum/Data/Images/Normal/0.JPG,"]
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(["object,split,label,image,mask", *lines]))
    for dataset in (root, root / "split_csv" / "1cls.csv"):
        with pytest.raises(InputError, match="several categories: name one, for example --category candle"):
            load_source(str(dataset), Path("unused"))
        source = load_source(str(dataset), Path("unused"), category="candle")
        assert len(source.samples) == 5
        assert [str(sample.mask) for sample in source.samples if sample.label == "anomaly"] == [
            str(root / "candle/Data/Masks/Anomaly/0.png")
        ]
    own = load_folder(root / "candle")
    assert own.classes == ("Anomaly", "Normal")
    assert [sample.mask for sample in own.samples if sample.mask] == [root / "candle/Data/Masks/Anomaly/0.png"]


@pytest.mark.parametrize(
    ("train", "test", "valid"),
    [
        ("Train", "Test", "Val"), ("TRAIN", "TEST", "VALID"), ("training", "testing", "validation"),
        ("train_set", "test-set", "validation set"), ("trainset", "testset", "valset"), ("Train", "test", "valid"),
    ],
)  # fmt: skip
def test_names_of_parts(tree: Tree, train: str, test: str, valid: str) -> None:
    root = tree(TRAIN + "test/good/0.png test/bad/0.png valid/good/0.png valid/bad/0.png")
    for name, to in (("train", train), ("test", test), ("valid", valid)):
        (root / name).rename(root / f"moved {name}")
        (root / f"moved {name}").rename(root / to)
    source = load_folder(root)
    split = make_split(source, None, ())
    assert [len(part) for part in (split.train, split.held_out, split.test, split.spare)] == [2, 1, 2, 1]
    assert split.held_out[0].split == "valid", "a validation part of one's own is what the threshold comes from"
    assert split.spare[0].label == "bad"


@pytest.mark.parametrize(
    ("name", "part"),
    [("Training", "train"), ("test_public", "test"), ("VAL", "valid"), ("dev", "valid"), ("contest", None),
     ("trainer", None), ("good", None), ("test_private", None), ("", None)],
)  # fmt: skip
def test_part_by_name(name: str, part: str | None) -> None:
    assert split_of(name) == part


@pytest.mark.parametrize(
    ("name", "rest"),
    [("0_mask", "0"), ("0_GT", "0"), ("mask", ""), ("Ground Truth", ""), ("groundtruth", ""), ("mask_3", "3"),
     ("0_mask_1", "0"), ("0-gt2", "0"), ("mask_1", "1"), ("a.label", "a"),
     ("masked", "masked"), ("unmask", "unmask"), ("a_b", "a_b"), ("segment", "segment")],
)  # fmt: skip
def test_names_without_the_word_for_masks(name: str, rest: str) -> None:
    assert bare(name) == rest


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("Train/good/0.png train/good/0.png test/good/0.png", "has Train/ and train/, which mean the same"),
        ("train/Good/0.png test/good/0.png", "has the classes Good and good: give both the same spelling"),
        (
            TRAIN + "test/bad/7.png ground_truth/bad/x_mask.png",
            "ground_truth/bad has 1 masks, and none belongs to an image: call each like its image",
        ),
        (TRAIN + "test/a/0.png test/b/0.png mask/0.png", "mask/0.png may be the mask of test/a/0.png or of test/b/0.p"),
        ("good/0.png bad/0.png bad_bw_regions/0.png", "bad_bw_regions are black and white like masks"),
        ("validation/good/0.png bad/0.png", "has validation/ but no train/ and test/"),
        ("0.jpg 0_GT.png 1.jpg", r"1.jpg in .* has neither a class folder nor a mask \(1 such images\)"),
        ("a/b/train/good/0.png a/b/test/good/0.png", "a/b has test/ in it, so .*/a is no class: name .*/a/b as"),
        ("good/test/0.png good/0.png bad/0.png", "good has test/ in it, so .*/good is no class"),
        ("a/b/good/0.png a/b/bad/0.png c/0.png", "a/b has good/ in it, so .*/a is no class: name .*/a/b as"),
        ("good/0.png bad/0.png ground_truth/photo_0.png", "ground_truth has colour photographs, such as photo_0.png"),
        ("a/good/0.png a/bad/0.png b/good/0.png b/bad/0.png", "has several categories: name one, .* a, b"),
    ],
)
def test_what_is_refused(tree: Tree, names: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_folder(tree(names))
    assert "\n" not in str(caught.value)


def test_a_class_that_is_called_mask_is_a_class(tree: Tree) -> None:
    """Faces with and without a mask, in colour."""
    source = load_folder(tree("mask/photo_0.png mask/photo_1.png no_mask/photo_0.png no_mask/photo_1.png"))
    assert source.classes == ("mask", "no_mask")
    assert not any(sample.mask for sample in source.samples)


def test_a_defect_that_is_called_label_is_a_class(tree: Tree) -> None:
    source = load_folder(tree(TRAIN + "test/good/0.png test/label/photo_0.png"))
    assert source.classes == ("good", "label")


def test_linked_folders_of_classes_and_of_their_masks_are_followed(tree: Tree, tmp_path: Path) -> None:
    root = tree(TRAIN + "test/good/0.png")
    tree("elsewhere/photos/0.png elsewhere/mask/0.png")
    (root / "ground_truth").mkdir()
    (root / "test/bad").symlink_to(root / "elsewhere/photos")
    (root / "ground_truth/bad").symlink_to(root / "elsewhere/mask")
    (root / "Train").symlink_to(root / "train")
    assert understood(load_folder(root))["test/bad/0.png"] == "test bad ground_truth/bad/0.png"


def test_what_is_left_out_is_counted(tree: Tree) -> None:
    root = tree(
        TRAIN + "test/loose.png test/good/0.png test/bad/0.png test_private/0.png test_private/1.png extra/0.png"
    )
    tree("ground_truth/bad/0.png ground_truth/gone/5.png test/results/overlays/0.png")
    (root / "ground_truth/bad/0.json").write_text("")
    for name in ("summary.json", "scores.csv"):
        (root / "test/results" / name).write_text("")
    for name in ("a.heic", "b.heic", "none", "Thumbs.db", ".hidden"):
        (root / "train/good" / name).write_text("x")
    (root / "elsewhere").mkdir()
    (root / "train/good/linked").symlink_to(root / "elsewhere")
    source = load_folder(root)
    assert {reason: dict(counts) for reason, counts in source.left_out.items()} == {
        "linked folders, which are not followed": {"linked": 1},
        "files of other kinds": {".heic": 2, "no ending": 1, ".json": 1},
        "results of raccgan": {"results/": 1},
        "images beside the folders of classes": {"test/": 1},
        "images of a test part without labels": {"test_private/": 2},
        "images beside the parts": {"extra/": 1},
        "masks of no image": {"ground_truth/gone/5.png": 1},
    }
    assert len(source.samples) == 4


def test_results_written_beside_the_classes_are_no_class(tree: Tree) -> None:
    root = tree("good/0.png good/1.png bad/0.png overlays/0-0123456789ab.png detected/overlays/0-0123456789ab.png")
    for name in ("summary.json", "scores.csv", "detected/summary.json", "detected/scores.csv"):
        (root / name).write_text("")
    source = load_folder(root)
    assert source.classes == ("bad", "good")
    assert source.left_out == {"results of raccgan": {"detected/": 1, "overlays/": 1}}


@pytest.mark.parametrize("ending", ["jfif", "jpe", "pbm", "pnm", "MPO", "JPG"])
def test_other_endings(tree: Tree, ending: str) -> None:
    root = tree("normal/0.png")
    form = {"pbm": "PPM", "pnm": "PPM"}.get(ending, "JPEG")
    Image.new("1" if ending == "pbm" else "L", (8, 8)).save(root / f"normal/1.{ending}", form)
    assert len(load_folder(root).samples) == 2
