"""Imports torchvision, also where its compiled half does not load."""

from __future__ import annotations

import importlib
from types import ModuleType

from raccgan.errors import InputError

_library = None  # keeps the declarations alive


def import_torchvision_datasets() -> ModuleType:
    """Import ``torchvision.datasets``.

    Beside some builds of torch, torchvision's operators cannot be loaded, and its import ends with ``operator
    torchvision::nms does not exist``, although the datasets need no operator. Declared, not implemented, they let the
    import through; calling one is still an error.

    Raises:
        InputError: torchvision is not installed, or fails to import for another reason.
    """
    try:
        return importlib.import_module("torchvision.datasets")
    except ImportError:
        raise InputError("this dataset is read with torchvision, which is not installed: install torchvision") from None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise InputError(f"torchvision cannot be imported ({error}): install one that fits this torch") from None
    _declare_operators()
    return importlib.import_module("torchvision.datasets")


def _declare_operators() -> None:
    global _library
    import torch

    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
