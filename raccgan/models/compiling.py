"""Calls torch.compile, and turns a failure to compile into one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from raccgan.errors import InputError
from raccgan.models.torch_internals import compile_errors

Function = TypeVar("Function", bound=Callable[..., Any])


class CompileError(InputError):
    """``what`` does not compile on this machine, for ``reason``: there is no C++ compiler, or it fails."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} does not compile here: {reason}; without compiling it runs")
        self.what, self.reason = what, reason


def compiled(function: Function, what: str, **options: Any) -> Function:
    """The function through torch.compile, in one graph; the first call compiles, in seconds to minutes.

    Args:
        what: names the function in the error.
        options: of torch.compile.

    Raises:
        CompileError: at the first call, with the first paragraph of PyTorch's reason.
    """
    generated = torch.compile(function, fullgraph=True, **options)

    def run(*arguments: Any) -> Any:
        try:
            return generated(*arguments)
        except compile_errors() as error:
            # A paragraph and not a line: the first line may only name the PyTorch backend that raised the second.
            raise CompileError(what, " ".join(str(error).strip().partition("\n\n")[0].split())) from None

    return cast(Function, run)
