from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import timm

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_deploy.training.augmentation import image_transform
from aoft_deploy.training.model import create_model, model_preprocessing
from aoft_deploy.training.paper_benchmarks.recipes import BACKBONE, RATES, get_recipe
from aoft_deploy.training.paper_benchmarks.tasks import BENCHMARKS, FGVC, VTAB
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.methods import method_names

NAMES = [f"{b.name}/{task.name}" for b in BENCHMARKS.values() for task in b.tasks]

# VTABConfig.py and FGVCConfig.py of the published RLRR code, in the order of that code:
# classes, learning rate, weight decay, drop path, flip
PUBLISHED = """
vtab/caltech101            102 1e-3 5e-5 .1 no
vtab/cifar                 100 3e-3 5e-5 .1 no
vtab/dtd                    47 2e-3 5e-5 .1 yes
vtab/oxford_flowers102     102 3e-3 5e-2 .3 no
vtab/oxford_iiit_pet        37 1e-3 5e-5 .1 yes
vtab/svhn                   10 5e-3 5e-5 .3 no
vtab/sun397                397 1e-3 5e-5 .1 no
vtab/patch_camelyon          2 3e-3 5e-2 .3 yes
vtab/eurosat                10 1e-3 5e-5 .1 yes
vtab/resisc45               45 3e-3 5e-5 0 no
vtab/diabetic_retinopathy    5 5e-3 5e-5 .1 yes
vtab/clevr_count             8 5e-3 5e-5 .5 yes
vtab/clevr_dist              6 1e-2 5e-5 .2 yes
vtab/dmlab                   6 5e-3 5e-5 .3 yes
vtab/kitti                   4 3e-3 5e-2 .3 yes
vtab/dsprites_loc           16 1e-2 5e-5 .1 no
vtab/dsprites_ori           16 5e-3 5e-5 .1 no
vtab/smallnorb_azi          18 5e-3 5e-2 .3 no
vtab/smallnorb_ele           9 1e-3 5e-5 .3 yes
fgvc/CUB_200_2011          200 3e-3 5e-2 .1 window
fgvc/NABirds               555 5e-4 5e-2 .3 window
fgvc/OxfordFlowers         102 3e-3 5e-2 .2 window
fgvc/StanfordCars          196 3e-3 5e-2 .2 window
fgvc/StanfordDogs          120 1e-4 5e-2 0 window
"""
ROWS = [line.split() for line in PUBLISHED.split("\n") if line]


def test_all_24_tasks_have_a_recipe() -> None:
    assert len(VTAB.tasks) + len(FGVC.tasks) == 24
    assert sorted(row[0] for row in ROWS) == sorted(NAMES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_rlrr_has_the_published_values(row: list[str]) -> None:
    name, classes, rate, decay, drop_path, flip = row
    recipe = get_recipe(name, {"method": "rlrr"})
    settings = recipe.at(recipe.rates[0])
    assert recipe.task.classes == int(classes)
    assert recipe.rates == (float(rate),)
    assert settings.peak_rates() == (float(rate), float(rate))
    assert (settings.weight_decay, settings.drop_path) == (float(decay), float(drop_path))
    assert settings.augment == {"no": "none", "yes": "flip", "window": "window"}[flip]
    assert (settings.epochs, settings.warmup_epochs, settings.batch_size) == (100, 10, 32)
    assert (settings.min_lr, settings.clip_norm, settings.backbone) == (1e-8, 0, BACKBONE)


def test_half_of_vtabs_tasks_are_mirrored() -> None:
    augments = [get_recipe(name).settings.augment for name in NAMES if name.startswith("vtab")]
    assert (augments.count("flip"), augments.count("none")) == (10, 9)


@pytest.mark.parametrize("method", [name for name in method_names() if name != "rlrr"])
@pytest.mark.parametrize("name", ["vtab/kitti", "fgvc/NABirds"])
def test_other_methods_differ_from_rlrr_in_their_rates_alone(name: str, method: str) -> None:
    recipe, rlrr = get_recipe(name, {"method": method}), get_recipe(name, {"method": "rlrr"})
    assert recipe.rates == RATES
    for field in fields(TrainingSettings):
        if field.name != "method":
            assert getattr(recipe.settings, field.name) == getattr(rlrr.settings, field.name)
    for rate in RATES:
        settings = recipe.at(rate)
        assert settings.head_lr == rate
        assert settings.lr == (None if method == "linear" else rate)


def test_what_is_given_wins() -> None:
    given: dict[str, Any] = {
        "method": "rlrr",
        "epochs": 5,
        "weight_decay": 0.5,
        "backbone": "aoft_vit_nano",
        "crop_mode": "center",
        "seed": 7,
    }
    settings = get_recipe("vtab/kitti", given).settings
    assert {name: getattr(settings, name) for name in given} == given
    assert settings.warmup_epochs == 0.5
    assert get_recipe("vtab/kitti", {"warmup_epochs": 3}).settings.warmup_epochs == 3


@pytest.mark.parametrize("method", ["rlrr", "lora"])
def test_a_given_rate_leaves_none_to_choose(method: str) -> None:
    recipe = get_recipe("vtab/kitti", {"method": method, "lr": 0.5})
    assert recipe.rates == (0.5,)
    assert recipe.at(0.5).peak_rates() == (0.5, 0.5)
    recipe = get_recipe("vtab/kitti", {"method": method, "lr": 0.5, "head_lr": 0.25})
    assert recipe.at(0.5).peak_rates() == (0.5, 0.25)
    recipe = get_recipe("vtab/kitti", {"method": method, "head_lr": 0.25})
    assert len(recipe.rates) == (1 if method == "rlrr" else len(RATES))
    assert recipe.at(0.125).peak_rates() == (0.125, 0.25)


def test_without_updates_the_classifiers_rate_decides() -> None:
    recipe = get_recipe("vtab/kitti", {"method": "linear", "head_lr": 0.25})
    assert recipe.rates == (0.25,)
    assert recipe.at(0.25).lr is None


def test_unknown_tasks_and_bad_values_are_refused() -> None:
    with pytest.raises(
        UnknownNameError, match=r"Unknown task of a benchmark 'vtab/kity'\. Did you"
    ):
        get_recipe("vtab/kity")
    with pytest.raises(SettingError, match="`epochs` is 0, but must be a whole number from 1"):
        get_recipe("vtab/kitti", {"epochs": 0})


def prepared(name: str, size: int) -> Preprocessing:
    given = {"backbone": "aoft_vit_nano", "img_size": size, "method": "linear"}
    settings = get_recipe(name, given).settings
    return model_preprocessing(create_model(settings, 2), settings)


def test_images_are_resized_as_in_the_published_code() -> None:
    vtab, fgvc = prepared("vtab/kitti", 224), prepared("fgvc/NABirds", 224)
    assert (vtab.crop_mode, vtab.crop_pct) == ("squash", 1.0)  # Resize((224, 224))
    assert (fgvc.crop_mode, fgvc.height / fgvc.crop_pct) == ("squash", 256)  # and CenterCrop(224)
    image_transform(get_recipe("fgvc/NABirds").settings.augment, fgvc)


def test_the_backbone_has_the_published_input() -> None:
    config = timm.get_pretrained_cfg(BACKBONE)
    assert config is not None
    assert config.input_size == (3, 224, 224)
    assert (config.mean, config.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert config.interpolation == "bicubic"
