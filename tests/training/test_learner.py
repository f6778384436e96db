import numpy as np
import torch
from PIL import Image

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.training.learner import normalised
from aoft_deploy.training.precision import fast_bf16


def test_normalised_pixels_equal_preprocessing_bit_for_bit() -> None:
    preprocessing = Preprocessing(32, 0.9, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pixels = torch.from_numpy(preprocessing.pixels(image).transpose(2, 0, 1).copy())
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (preprocessing.mean, preprocessing.std))
    expected = torch.from_numpy(preprocessing(image))
    assert torch.equal(normalised(pixels, mean, std), expected)


def test_fast_bf16_is_known_for_the_processor() -> None:
    assert fast_bf16(torch.device("cpu")) in (True, False)
    assert not fast_bf16(torch.device("meta"))
