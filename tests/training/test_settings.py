import json
from pathlib import Path
from typing import Any

import pytest

from aoft_deploy.errors import SettingError
from aoft_deploy.training.settings import LEARNING_RATES, TrainingSettings
from aoft_deploy.tuning.methods import get_method, method_names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "`epochs` is 0, but must be a whole number from 1"),
        ({"epochs": 1.5}, "`epochs` is 1.5, but must be a whole number from 1"),
        ({"batch_size": True}, "`batch_size` is True, but must be a whole number from 1"),
        ({"seed": -1}, "`seed` is -1, but must be a whole number from 0"),
        ({"lr": 0.0}, "`lr` is 0.0, but must be a number above 0"),
        ({"head_lr": float("nan")}, "`head_lr` is nan, but must be a number above 0"),
        ({"mixup": float("inf")}, "`mixup` is inf, but must be a number from 0"),
        ({"drop_path": 1.0}, "`drop_path` is 1.0, but must be a number from 0 below 1"),
        (
            {"warmup_epochs": 3, "epochs": 2},
            "`warmup_epochs` is 3, but must be at most `epochs`, 2",
        ),
        ({"stop_after": 0}, "`stop_after` is 0, but must be a whole number from 1"),
        (
            {"stop_after": 3, "epochs": 2, "warmup_epochs": 1},
            "`stop_after` is 3, but must be at most `epochs`, 2",
        ),
        (
            {"accumulate": 5, "batch_size": 4},
            "`accumulate` is 5, but must be at most `batch_size`, 4",
        ),
        (
            {"augment": "blur"},
            "`augment` is 'blur', but must be one of none, flip, affine, window, crop, rand",
        ),
        ({"precision": "fp16"}, "`precision` is 'fp16', but must be one of auto, fp32, tf32, bf16"),
        ({"train_on": "test"}, "`train_on` is 'test', but must be one of train, train"),
    ],
)
def test_a_value_outside_its_range_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TrainingSettings(**given)


def test_every_method_with_updates_has_a_learning_rate() -> None:
    updating = {n for n in method_names() if get_method(n).build is not None}
    assert set(LEARNING_RATES) == updating | {"full"}


def test_given_learning_rates_override_those_of_the_method() -> None:
    assert TrainingSettings(method="lora").peak_rates()[0] == LEARNING_RATES["lora"]
    assert TrainingSettings(method="lora", lr=0.5, head_lr=0.25).peak_rates() == (0.5, 0.25)


def test_a_run_does_all_epochs_or_the_requested_number() -> None:
    assert TrainingSettings(epochs=7).epochs_done == 7
    assert TrainingSettings(epochs=7, stop_after=3).epochs_done == 3


def test_the_json_form_has_the_rates_in_use_and_no_path() -> None:
    values = TrainingSettings(backbone_weights=Path("/somewhere")).to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["lr"] == LEARNING_RATES["aoft-lora-star"]
    assert "backbone_weights" not in values
