"""Reading of uploaded pictures: large photographs take little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from photographs import PHOTOGRAPHS, photograph
from PIL import Image

from aoft_demo.actions.pictures import MAX_STORED, read_picture
from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_deploy.data.images import read_image
from aoft_deploy.errors import ImageError

PICTURE = BUNDLED / "star.jpg"


def test_width_and_height_are_of_the_upright_photograph(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation of a phone held upright
    path = photograph(tmp_path / "photo.jpg", (6000, 4000), exif=exif)
    picture = read_picture(path, 32)
    assert (picture.width, picture.height) == (4000, 6000)
    assert picture.image.width < picture.image.height


def test_a_picture_below_the_limit_is_decoded_in_full(tmp_path: Path) -> None:
    path = photograph(tmp_path / "photo.jpg", (4000, 3000))
    assert read_picture(path, 32).image.tobytes() == read_image(path).tobytes()


def test_the_fraction_of_a_photograph_depends_on_the_models_input_size(tmp_path: Path) -> None:
    path = photograph(tmp_path / "photo.jpg", (6000, 4000))
    assert read_picture(path, 1500).image.size == (3000, 2000)
    assert read_picture(path, 224).image.size == (1500, 1000)


MEMORY = """
import sys
from pathlib import Path
from aoft_demo.actions.pictures import read_picture

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

small, large = map(Path, sys.argv[1:])
read_picture(small, 32)
before = peak()
read_picture(large, 32)
print(peak() - before)
"""


def test_a_photograph_of_fifty_megapixels_takes_little_memory(tmp_path: Path) -> None:
    large = photograph(tmp_path / "photo.jpg", PHOTOGRAPHS["50 MP"])
    command = [sys.executable, "-c", MEMORY, str(PICTURE), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60e6  # the full picture takes 150 MB


def test_too_large_pictures_and_unsupported_formats_are_refused(tmp_path: Path) -> None:
    Image.new("L", (6000, 4000)).save(tmp_path / "large.png", compress_level=1)
    with pytest.raises(ImageError, match=r"6000 x 4000 = 24,000,000 pixels, above the limit of 20"):
        read_picture(tmp_path / "large.png", 32)
    assert 10_000 * 8_000 > MAX_STORED
    Image.new("L", (10_000, 8_000)).save(tmp_path / "huge.jpg")
    with pytest.raises(ImageError, match=r"10000 x 8000 .* above the limit of 64,000,000"):
        read_picture(tmp_path / "huge.jpg", 32)
    for brand, name in ((b"heic", "HEIC"), (b"mif1", "HEIC"), (b"avif", "AVIF")):
        (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(40))
        with pytest.raises(ImageError, match=f"of the format {name}: convert it to one of JPEG"):
            read_picture(tmp_path / "photo.heic", 32)
