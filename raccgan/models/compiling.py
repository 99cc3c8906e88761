"""torch.compile with its failure said in one line: that there is no C++ compiler one learns at the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from raccgan.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, what: str, **options: Any) -> Function:
    """The function through torch.compile, in one graph; the first call takes a while.

    Raises:
        InputError: at that call, where there is no C++ compiler; it names ``what`` does not compile.
    """
    generated = torch.compile(function, fullgraph=True, **options)

    def run(*arguments: Any) -> Any:
        try:
            return generated(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            # Its first paragraph, whose first line may be but the name of the back end that raised the second.
            reason = " ".join(str(error).strip().partition("\n\n")[0].split())
            raise InputError(f"{what} does not compile here: {reason}; without compiling it runs") from None

    return cast(Function, run)
