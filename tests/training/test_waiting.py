"""A training step queues work on the GPU and waits for none of it.

A CPU stands in for the GPU: an operation that would wait is refused, wherever its tensors are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.accelerator import Accelerator
from devices import each_device
from torch import Tensor, backends
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import SettingError
from aoft_deploy.training.batches import Loader, Part
from aoft_deploy.training.learner import Learner
from aoft_deploy.training.loop import TrainingLoop
from aoft_deploy.training.model import create_model
from aoft_deploy.training.precision import precision_on
from aoft_deploy.training.reporting import Reporter
from aoft_deploy.training.run_folder import RunFolder
from aoft_deploy.training.settings import LEARNING_RATES, TrainingSettings

SIZE, CLASSES, IMAGES = 16, 3, 4
SETTINGS = TrainingSettings(img_size=SIZE, batch_size=IMAGES, precision="fp32")
HALF = (0.5, 0.5, 0.5)

READS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero"}
"""Operators whose result the host needs."""

COPIES = {Tensor.cpu, Tensor.new_tensor, Tensor.numpy, torch.as_tensor, torch.tensor}
"""Functions that copy from or to the host, and wait for the copy."""


class _NoReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1] or ()
        )
        assert name not in READS and not masks, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class _NoCopies(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        assert func not in COPIES, f"{func} waits for a copy"
        is_batch = isinstance(args[0], Tensor) and not args[0].is_floating_point()
        if func is Tensor.to and is_batch and isinstance(args[1], torch.device):
            assert given.get("non_blocking"), "a copy to the device waits"
        return func(*args, **given)


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """Context manager: raise an error where the host would wait for the device."""
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("error")
        else:
            stack.enter_context(_NoCopies())
            stack.enter_context(_NoReads())  # type: ignore[no-untyped-call]
        yield


def learner(settings: TrainingSettings, device: str = "cpu") -> Learner:
    tuned = create_model(settings, CLASSES).to(device)
    accelerator = Accelerator(mixed_precision="no", cpu=device == "cpu")
    return Learner(accelerator, tuned, Preprocessing(SIZE, 1.0, HALF, HALF), settings, steps=100)


class _Parts:
    """Loader of some random parts of an epoch.

    The gradient is read at every 20th step, and the sums at the end of an epoch: nothing else may
    wait for the device.

    Args:
        steps: Steps, none of them a 20th.
        parts: Parts of a step.
        device: The device that no step waits for; None allows steps to wait.
    """

    def __init__(
        self, steps: Sequence[int], parts: int = 1, device: torch.device | None = None
    ) -> None:
        self.steps, self.count, self.device = steps, parts, device

    def epoch(self, number: int) -> Iterator[tuple[Part, Tensor, Tensor]]:
        with nullcontext() if self.device is None else nothing_waits(self.device):
            for step in self.steps:
                for part in range(self.count):
                    place = Part(0, step, part, tuple(range(IMAGES)), 1 / IMAGES)
                    yield place, *self._batch(step)

    def _batch(self, seed: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(seed)
        pixels = torch.from_numpy(rng.integers(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=np.uint8))
        labels = torch.from_numpy(rng.integers(0, CLASSES, IMAGES))
        if self.device is not None and self.device.type == "cuda":
            return pixels.pin_memory(), labels.pin_memory()
        return pixels, labels


def fit(ours: Learner, parts: _Parts) -> tuple[float, float, float]:
    return ours.fit(cast(Loader, parts), 0, lambda *_: None)


def evaluate(ours: Learner, parts: _Parts) -> tuple[float, float]:
    return ours.evaluate(cast(Loader, parts), lambda _: None)


CHANGES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in LEARNING_RATES},
    "mixup": {"mixup": 0.5},
    "cutmix": {"cutmix": 0.5},
    "accumulated": {"accumulate": 2, "label_smoothing": 0.1, "drop_path": 0.5},
    "bf16": {"precision": "bf16"},
    "without limit": {"clip_norm": 0.0},
}


@each_device
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_step_does_not_wait_for_the_device(changes: dict[str, Any], device: str) -> None:
    settings = replace(SETTINGS, **changes)
    ours = learner(settings, device)
    fit(ours, _Parts([1], settings.accumulate))  # a GPU's first step loads its libraries
    rate, loss, _ = fit(ours, _Parts(range(2, 5), settings.accumulate, ours.device))
    assert rate > 0
    assert loss > 0


@each_device
def test_an_evaluation_does_not_wait_for_the_device(device: str) -> None:
    ours = learner(SETTINGS, device)
    evaluate(ours, _Parts([1]))
    loss, accuracy = evaluate(ours, _Parts(range(3), device=ours.device))
    assert loss > 0
    assert 0 <= accuracy <= 1


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")]
)
def test_products_of_a_run_are_in_tf32_only_if_it_says_so(precision: str, expected: str) -> None:
    ours = learner(replace(SETTINGS, precision="fp32"))
    ours.precision = precision
    seen = []

    def look(*_: object) -> None:
        cudnn: Any = backends.cudnn
        seen.append([switch.fp32_precision for switch in (backends.cuda.matmul, cudnn.conv)])

    ours.model.register_forward_hook(look)
    weight: Any = ours.tuned.trained()["head.head.weight"]
    weight.register_hook(look)
    fit(ours, _Parts([1]))
    evaluate(ours, _Parts([1]))
    assert seen == [[expected, expected]] * 3


def test_images_of_training_and_evaluation_are_in_memory_that_a_gpu_copies_from(
    tmp_path: Path,
) -> None:
    images = load_task("shape", train=12, val=6, test=6)
    accelerator = Accelerator(mixed_precision="no")
    tuned = create_model(SETTINGS, len(images.classes))
    folder, reporter = RunFolder(tmp_path / "run"), Reporter(False)
    for kind in ("cpu", "cuda"):
        run = TrainingLoop(accelerator, tuned, images, folder, SETTINGS, 0, reporter)
        run.learner.device = torch.device(kind)
        for loader in (run.train_loader, run.val_loader):
            assert loader.loader.pin_memory is (kind == "cuda")


def test_tf32_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="`precision` is 'tf32', but the device cpu has no TF32"):
        precision_on(torch.device("cpu"), "tf32")
    for has_tf32 in (False, True):
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda has=has_tf32: has)
        if has_tf32:
            assert precision_on(torch.device("cuda"), "tf32") == "tf32"
        else:
            with pytest.raises(SettingError, match="the device cuda has no TF32"):
                precision_on(torch.device("cuda"), "tf32")
