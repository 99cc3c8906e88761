from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from raccgan.data import dataset as dataset_module
from raccgan.data.dataset import ImageDataset, StepBatches
from raccgan.data.images.decode import decode
from raccgan.data.samples import Pixels, Sample
from raccgan.errors import InputError

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
            torch.testing.assert_close(
                dataset.images(indices), expected[torch.as_tensor(indices, dtype=torch.int64)], rtol=0, atol=0
            )
    image, label, index = dataset[-1]
    assert (image.dtype, label, index) == (torch.float32, 1, 6)
    assert torch.equal(image, expected[6])


def test_labels(samples: list[Sample]) -> None:
    dataset = ImageDataset(samples, classes=["x", "b"], size=SIZE, channels=1)
    assert dataset.labels.tolist() == [-1, 1, -1, 1, -1, 1, -1]
    assert dataset.labels.dtype == torch.int64
    assert [dataset[i][1] for i in range(7)] == dataset.labels.tolist()


def test_images_are_copies(samples: list[Sample]) -> None:
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1)
    dataset.images([5]).fill_(7)
    dataset[5][0].fill_(7)
    assert (dataset.images([5]) == -1).all()


@pytest.mark.parametrize("index", [7, -8])
def test_places_out_of_range(samples: list[Sample], index: int) -> None:
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1)
    with pytest.raises(IndexError):
        dataset[index]
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
    dataset.verify()
    for _ in range(3):
        dataset.images(range(7))
    assert opened == {f"{index}.png": 1 for index in range(5)}


def test_data_loader_gives_batches(samples: list[Sample]) -> None:
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=3)
    batches = StepBatches(len(dataset), 4, seed=0, stop_step=3)
    for (images, labels, places), expected in zip(DataLoader(dataset, batch_sampler=batches), batches, strict=True):
        assert images.shape == (4, 3, SIZE, SIZE)
        assert places.tolist() == expected
        assert torch.equal(labels, dataset.labels[places])
        assert torch.equal(images, dataset.images(places))


def test_an_empty_dataset() -> None:
    dataset = ImageDataset([], classes=["a"], size=SIZE, channels=1)
    dataset.verify()
    assert len(dataset) == 0
    assert dataset.images([]).shape == (0, 1, SIZE, SIZE)


@pytest.mark.parametrize("cache", [0, 2 << 30])
def test_verify_names_the_first_bad_file_and_counts_the_others(
    samples: list[Sample], tmp_path: Path, cache: int
) -> None:
    steps: list[tuple[int, int]] = []
    dataset = ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1, cache_bytes=cache)
    dataset.verify(lambda done, total: steps.append((done, total)))
    assert steps == [(done, 7) for done in range(1, 8)]

    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"3.png is no image of a kind that is read here .*$"):
        ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1, cache_bytes=cache).verify()
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "4.png").unlink()
    with pytest.raises(InputError, match=r"1.png is empty .* \(2 more of the 7 images cannot be used either\)"):
        ImageDataset(samples, classes=["a", "b"], size=SIZE, channels=1, cache_bytes=cache).verify()


def test_verify_reads_the_masks_too(draw: Draw, tmp_path: Path) -> None:
    sample = Sample("a", "a", "test", draw("a.png"), mask=tmp_path / "a_mask.png")
    with pytest.raises(InputError, match=r"a_mask.png"):
        ImageDataset([sample], classes=["b"], size=SIZE, channels=1).verify()


def test_training_meets_a_bad_file_as_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"x")
    dataset = ImageDataset([Sample("a", "a", "train", tmp_path / "bad.png")], classes=["a"], size=SIZE, channels=1)
    with pytest.raises(InputError, match=r"bad.png"):
        dataset[0]


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (10, 10), (7, 3), (3, 8), (1, 2), (5, 1)])
def test_epochs_are_permutations_and_batches_are_full(length: int, batch_size: int) -> None:
    steps = 3 * length
    batches = list(StepBatches(length, batch_size, seed=1, stop_step=steps))
    assert len(batches) == steps
    assert {len(batch) for batch in batches} == {batch_size}
    flat = [index for batch in batches for index in batch]
    for epoch in range(len(flat) // length):
        assert sorted(flat[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_resuming_gives_the_same_batches() -> None:
    whole = list(StepBatches(11, 4, seed=5, stop_step=20))
    for start in (0, 1, 3, 7, 19):
        assert list(StepBatches(11, 4, seed=5, start_step=start, stop_step=20)) == whole[start:]
    backwards = StepBatches(11, 4, seed=5, stop_step=20)
    assert [backwards.batch(step) for step in reversed(range(20))] == whole[::-1]
    assert list(backwards) == whole
    assert len(StepBatches(11, 4, seed=5, start_step=3, stop_step=20)) == 17


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return StepBatches(50, 50, seed=seed, stop_step=9).batch(number)

    orders = [epoch(seed, number) for seed in (0, 1, -1, 2**40) for number in range(3)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_does_not_depend_on_the_global_generators() -> None:
    torch.manual_seed(0)
    one = list(StepBatches(20, 5, seed=0, stop_step=8))
    torch.manual_seed(1)
    np.random.seed(1)
    assert list(StepBatches(20, 5, seed=0, stop_step=8)) == one


def test_the_order_is_frozen() -> None:
    """A change here would break the resuming of runs that stand."""
    assert StepBatches(8, 8, seed=0, stop_step=2).batch(1) == [7, 4, 5, 1, 6, 2, 0, 3]


@pytest.mark.parametrize(("length", "batch_size"), [(0, 4), (4, 0)])
def test_nothing_to_draw(length: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        StepBatches(length, batch_size, seed=0, stop_step=1)
