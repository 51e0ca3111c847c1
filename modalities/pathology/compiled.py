"""Ways to run a network: as it is, or compiled for the processor.

Compiling takes from seconds to more than a minute and pays for many tiles only, so that nobody gets
it unasked.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch

from modalities.pathology.encoder import MissingCompiler

if TYPE_CHECKING:
    from collections.abc import Callable

    from modalities.pathology.encoder import Compiler

    Run = Callable[[torch.Tensor, "Precision"], torch.Tensor]

Precision = Literal["fp32", "bf16", "fp16"]

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def runner(
    model: torch.nn.Module, device: torch.device, compiler: Compiler, *, size_px: int
) -> Run:
    """Give what runs ``model`` on normalised images, in a precision, to float32 features.

    Raises
    ------
    MissingCompiler
        If the compiler is not installed, or is not for this device.
    """
    if compiler == "none":
        return eager(model, device)
    if compiler == "inductor":
        return eager(torch.compile(model, dynamic=False), device)
    if importlib.util.find_spec("openvino") is None:
        raise MissingCompiler(
            "compiler: found no openvino, needed its package; install consilium[openvino], or "
            "leave --compile out"
        )
    if device.type != "cpu":
        raise MissingCompiler(
            f"compiler: found openvino for {device.type}, needed a processor; leave --compile out"
        )
    return _openvino(model, size_px)


def eager(model: Any, device: torch.device) -> Run:
    """Run a network as torch does, in lower precision where that is exact enough by itself."""

    def run(images: torch.Tensor, precision: Precision) -> torch.Tensor:
        half = _HALVES.get(precision)
        with torch.autocast(device.type, half, enabled=half is not None):
            features: torch.Tensor = model(images)
        return features.float()

    return run


def _openvino(model: torch.nn.Module, size_px: int) -> Run:
    # Where it finds this package, OpenVINO tells its maker of each use, and of errors with their
    # stacks, without asking.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    example = torch.zeros(2, 3, size_px, size_px)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and all that it reads
        graph = openvino.convert_model(
            model, example_input=example, input=[(-1, 3, size_px, size_px)]
        )
    core, kept = openvino.Core(), {}

    def run(images: torch.Tensor, precision: Precision) -> torch.Tensor:
        if precision not in kept:
            hints = {
                "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else precision,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
            }
            kept[precision] = core.compile_model(graph, "CPU", hints)
        found = kept[precision](images.contiguous().numpy())[0]
        return torch.from_numpy(found.copy())

    return run
