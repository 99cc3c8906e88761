"""torchvision's datasets can be imported whatever its compiled half does; each case in a process of its own."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def run(script: str, path: Path | None = None) -> str:
    head = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run([sys.executable, "-c", head + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_datasets_import_twice() -> None:
    script = (
        "from raccgan.data.sources.torchvision_import import import_torchvision_datasets as get\n"
        "import torch; print(get() is get(), get().MNIST.__name__, torch.zeros(1).item())"
    )
    someone_tried_before = "try: import torchvision\nexcept RuntimeError: pass\n"
    assert run(someone_tried_before + script) == "True MNIST 0.0"


FAKE = """
from pathlib import Path
from raccgan.data.sources.torchvision_import import import_torchvision_datasets as get
from raccgan.errors import InputError
try:
    print(get().word)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("", "fine"),
        ("import torch\ntorch.library.register_fake('torchvision::nms')(lambda *a: None)", "fine"),
        ("raise RuntimeError('another trouble')", "torchvision cannot be imported (another trouble): install one that"),
        ("import no_such_package_at_all", "this dataset is read with torchvision, which is not installed"),
    ],
)
def test_compiled_half_loads_or_not(tmp_path: Path, init: str, said: str) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(init)
    (tmp_path / "torchvision/datasets.py").write_text("word = 'fine'")
    assert said in run(FAKE, tmp_path)
