from dataclasses import replace

import pytest
import torch
from timm.layers.drop import DropPath
from torch import nn

from aoft_deploy.errors import SettingError
from aoft_deploy.training.model import create_model, model_preprocessing, only_depth_is_random
from aoft_deploy.training.settings import TrainingSettings

SMALL = TrainingSettings(img_size=16)


def test_only_stochastic_depth_is_random_in_training() -> None:
    settings = replace(SMALL, drop_path=0.5)
    tuned = create_model(settings, 3)
    tuned.add_module("frozen", nn.BatchNorm2d(3))
    only_depth_is_random(tuned)
    training = {type(module) for module in tuned.modules() if module.training}
    assert training == {DropPath}
    assert "drop_path_rate" not in tuned.identity.args


def test_a_fresh_classifier_depends_only_on_the_seed() -> None:
    torch.manual_seed(1)
    first = create_model(SMALL, 3).trained()
    torch.manual_seed(2)
    second = create_model(SMALL, 3).trained()
    other = create_model(replace(SMALL, seed=1), 3).trained()
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    assert not torch.equal(first["head.head.weight"], other["head.head.weight"])


def test_a_learning_rate_for_updates_that_do_not_exist_is_refused() -> None:
    with pytest.raises(SettingError, match="linear has no updates, so `lr` has no effect"):
        create_model(replace(SMALL, method="linear", lr=0.1), 3)


@pytest.mark.parametrize(("given", "size"), [(None, 64), (16, 16)])
def test_preprocessing_is_that_of_the_backbone_at_the_requested_size(
    given: int | None, size: int
) -> None:
    settings = replace(SMALL, img_size=given)
    preprocessing = model_preprocessing(create_model(settings, 3), settings)
    assert preprocessing.size == size
    assert preprocessing.mean == (0.5, 0.5, 0.5)
    assert (preprocessing.crop_mode, preprocessing.crop_pct) == ("center", 1.0)


def test_how_images_are_resized_can_be_changed() -> None:
    settings = replace(SMALL, crop_mode="squash", crop_pct=0.875)
    preprocessing = model_preprocessing(create_model(settings, 3), settings)
    assert (preprocessing.crop_mode, preprocessing.crop_pct) == ("squash", 0.875)
    wrong = replace(SMALL, crop_mode="stretch")
    with pytest.raises(
        SettingError, match="`crop_mode` is 'stretch', but must be one of border, center"
    ):
        model_preprocessing(create_model(wrong, 3), wrong)
    wrong = replace(SMALL, crop_pct=0.0)
    with pytest.raises(
        SettingError, match=r"`crop_pct` is 0\.0, but must be a number from 0\.1 to 2"
    ):
        model_preprocessing(create_model(wrong, 3), wrong)
