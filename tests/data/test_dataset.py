import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from raccgan.data import dataset as dataset_module
from raccgan.data.dataset import ImageDataset, StepBatches
from raccgan.data.images.decode import decode
from raccgan.data.samples import Pixels, Sample
from raccgan.errors import InputError
from tests.kernels.compare import assert_each_close

Draw = Callable[..., Path]
SIZE = 6
ONE_IMAGE = 4 * SIZE * SIZE  # bytes of one grey image in the cache


@pytest.fixture
def samples(draw: Draw) -> list[Sample]:
    """Five files and two arrays, of different sizes and modes."""
    modes = ["L", "RGB", "RGBA", "L", "P"]
    files: list[Path] = [draw(f"{index}.png", mode=mode, size=(5 + index, 9)) for index, mode in enumerate(modes)]
    arrays = [np.full((4, 4), value, dtype=np.uint8) for value in (0, 255)]
    images: list[Path | Pixels] = [*files, *arrays]
    return [Sample(str(i), "ab"[i % 2], "train", image) for i, image in enumerate(images)]


@pytest.mark.parametrize("cache", [0, ONE_IMAGE - 1, 3 * ONE_IMAGE, 2 << 30])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_the_decoded_ones_with_any_cache(samples: list[Sample], cache: int, channels: int) -> None:
    dataset = ImageDataset(samples, classes=["b", "a"], size=SIZE, channels=channels, cache_bytes=cache)
    expected = torch.stack([torch.from_numpy(decode(sample.image, size=SIZE, channels=channels)) for sample in samples])
    for indices in ([0, 1, 2, 3, 4, 5, 6], [6, 0, 6, 3], [4], [], torch.tensor([2, 5])):
        for _ in range(2):
            assert_each_close(
                dataset.images(indices), expected[torch.as_tensor(indices, dtype=torch.int64)], rtol=0, atol=0
            )
    assert dataset.images([6]).dtype == torch.float32


def test_labels(samples: list[Sample]) -> None:
    dataset = ImageDataset(samples, classes=["x", "b"], size=SIZE, channels=1)
    assert dataset.labels.tolist() == [-1, 1, -1, 1, -1, 1, -1]
    assert dataset.labels.dtype == torch.int64


def test_images_are_copies(samples: list[Sample]) -> None:
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1)
    dataset.images([5]).fill_(7)
    assert (dataset.images([5]) == -1).all()


@pytest.mark.parametrize("index", [7, -8])
def test_places_out_of_range(samples: list[Sample], index: int) -> None:
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1)
    with pytest.raises(IndexError):
        dataset.images([0, index])


def test_each_file_is_decoded_once(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()

    def counting(image: Path, **how: object) -> np.ndarray:
        opened[image.name] += 1
        return decode(image, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset_module, "decode", counting)
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1)
    assert not opened
    assert not dataset.problems()
    for _ in range(3):
        dataset.images(range(7))
    assert opened == {f"{index}.png": 1 for index in range(5)}


def test_an_empty_dataset() -> None:
    dataset = ImageDataset([], classes=["a"], size=SIZE, channels=1)
    assert not dataset.problems()
    assert len(dataset) == 0
    assert dataset.images([]).shape == (0, 1, SIZE, SIZE)


@pytest.mark.parametrize("cache", [0, 2 << 30])
def test_the_first_bad_file_is_named_and_the_others_are_counted(
    samples: list[Sample], tmp_path: Path, cache: int
) -> None:
    steps: list[tuple[int, int]] = []
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1, cache_bytes=cache)
    assert not dataset.problems(lambda done, total: steps.append((done, total)))
    assert steps == [(done, 7) for done in range(1, 8)]

    (tmp_path / "3.png").write_bytes(b"no image")
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1, cache_bytes=cache)
    assert re.search(r"3.png is no image of a kind that is read here [^;]*$", str(dataset.refusal(dataset.problems())))
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "4.png").unlink()
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1, cache_bytes=cache)
    bad = dataset.problems()
    assert list(bad) == [1, 3, 4]
    said = str(dataset.refusal(bad))
    assert re.search(r"1.png is empty .* \(2 more of the 7 images cannot be used either\)", said)
    assert list(dataset.problems(share=[0, 2, 4, 6])) == [4]


def test_masks_are_read_too(draw: Draw, tmp_path: Path) -> None:
    sample = Sample("a", "a", "test", draw("a.png"), mask=tmp_path / "a_mask.png")
    bad = ImageDataset([sample], classes=["b"], size=SIZE, channels=1).problems()
    assert "a_mask.png" in bad[0]


def test_training_meets_a_bad_file_as_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"x")
    dataset = ImageDataset([Sample("a", "a", "train", tmp_path / "bad.png")], classes=["a"], size=SIZE, channels=1)
    with pytest.raises(InputError, match=r"bad.png"):
        dataset.images([0])


def batches(length: int, batch_size: int, seed: int, steps: int) -> list[list[int]]:
    order = StepBatches(length, batch_size, seed=seed)
    return [order.batch(step) for step in range(steps)]


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (10, 10), (7, 3), (3, 8), (1, 2), (5, 1)])
def test_epochs_are_permutations_and_batches_are_full(length: int, batch_size: int) -> None:
    found = batches(length, batch_size, 1, 3 * length)
    assert {len(batch) for batch in found} == {batch_size}
    flat = [index for batch in found for index in batch]
    for epoch in range(len(flat) // length):
        assert sorted(flat[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_a_batch_depends_on_its_step_alone() -> None:
    whole, other = batches(11, 4, 5, 20), StepBatches(11, 4, seed=5)
    assert [other.batch(step) for step in reversed(range(20))] == whole[::-1]
    assert [other.batch(step) for step in (7, 0, 19)] == [whole[7], whole[0], whole[19]]


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(order) for seed in (0, 1, -1, 2**40) for order in batches(50, 50, seed, 3)]
    assert len(set(orders)) == len(orders)


def test_the_order_does_not_depend_on_the_global_generators() -> None:
    torch.manual_seed(0)
    one = batches(20, 5, 0, 8)
    torch.manual_seed(1)
    np.random.seed(1)
    assert batches(20, 5, 0, 8) == one


def test_the_order_is_frozen() -> None:
    """A change here would break the resuming of runs that stand."""
    assert StepBatches(8, 8, seed=0).batch(1) == [7, 4, 5, 1, 6, 2, 0, 3]


@pytest.mark.parametrize(("length", "batch_size"), [(0, 4), (4, 0)])
def test_nothing_to_draw(length: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        StepBatches(length, batch_size, seed=0)
