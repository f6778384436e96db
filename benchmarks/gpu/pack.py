"""Pack what a GPU machine without a network lacks, in two archives of at most 64 MiB.

    python -m benchmarks.gpu.pack --out DIR --capability 9.0

`docs/how-to/gpu.md` says what the machine must have and how to unpack the archives there.
onnxruntime-gpu alone is larger than 64 MiB, since its CUDA provider holds machine code for six
kinds of GPUs. The code for other GPUs is replaced by zeros: the library's layout does not change,
and zeros compress to nothing. The first archive has the Python packages and this project's entry
points, the second the CUDA provider.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import unpack_from
from typing import NamedTuple

from aoft_deploy import __version__
from aoft_deploy.errors import AoftError, OutputError, SettingError

__all__ = ["keep_capability", "main", "pack"]

ROOT = Path(__file__).parents[2]
LIMIT = 64 * 2**20
"""Largest archive, in bytes."""

ONNXRUNTIME = "onnxruntime-gpu"
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
DROPPED = ("onnxruntime/capi/libonnxruntime_providers_tensorrt.so",)

SERVER = ("starlette", "uvicorn", "httptools", "orjson", "python-multipart", "click", "h11")
PACKAGES = (*SERVER, "anyio", "idna")
"""Packages that aoft-serve needs, without those that come with PyTorch and timm."""

FATBIN, CUBIN = 0xBA55ED50, 2
"""First word of a block of GPU code, and the kind of an entry that is machine code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Download, cut and pack."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True, metavar="DIR")
    options.add_argument(
        "--capability", required=True, metavar="X.Y", help="the GPU's compute capability: 9.0 …"
    )
    options.add_argument(
        "--python", default="3.12", metavar="X.Y", help="the machine's Python (default: 3.12)"
    )
    options.add_argument(
        "--packages",
        nargs="+",
        default=list(PACKAGES),
        metavar="NAME",
        help=f"packages that the machine lacks (default: {' '.join(PACKAGES)})",
    )
    given = options.parse_args(argv)
    try:
        for path in pack(given.out, given.capability, given.python, given.packages):
            print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    except AoftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def pack(out: Path, capability: str, python: str, packages: Sequence[str]) -> Iterator[Path]:
    """Write both archives.

    Args:
        out: Folder for the archives.
        capability: Compute capability whose machine code is kept.
        python: The machine's version of Python.
        packages: Names of packages, each without its requirements.

    Raises:
        OutputError: An archive is too large.
        SettingError: The CUDA provider has no code for the capability.
        subprocess.CalledProcessError: pip cannot install a package.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        _install(site, python, [ONNXRUNTIME, *packages])
        for name in DROPPED:
            (site / name).unlink()
        provider = site / PROVIDER
        cut = keep_capability(provider.read_bytes(), capability)
        provider.unlink()
        _write_entry_points(site)
        names = sorted(path.name for path in site.iterdir())
        yield _archive(out / "packages.tar.xz", site, names)
        provider.write_bytes(cut)
        yield _archive(out / "cuda-provider.tar.xz", site, [PROVIDER])


def _install(site: Path, python: str, names: Sequence[str]) -> None:
    """Install packages for Linux on x86-64 into a folder."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 17, 12, 5)]
    words = ["--only-binary=:all:", "--no-deps", "--no-compile", "--python-version", python]
    words += [word for platform in platforms for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site)]
    subprocess.run([*command, *words, *names], check=True)


def _write_entry_points(site: Path) -> None:
    """Describe this project as installed, so that its exporters are found in a checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    folder = site / f"aoft_deploy-{__version__}.dist-info"
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: aoft-deploy\nVersion: {__version__}\n"
    (folder / "METADATA").write_text(text)
    groups = project["entry-points"].items()
    lines = [line for group, entries in groups for line in (f"[{group}]", *_lines(entries))]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _lines(entries: dict[str, str]) -> list[str]:
    return [f"{name} = {value}" for name, value in entries.items()]


def _archive(path: Path, folder: Path, names: Sequence[str]) -> Path:
    """Write files of a folder as one compressed archive.

    Raises:
        OutputError: It is larger than ``LIMIT``.
    """
    subprocess.run(["tar", "-cJf", path, "-C", folder, *names], check=True)
    size = path.stat().st_size
    if size > LIMIT:
        raise OutputError(f"{path} has {size:,} bytes, but at most {LIMIT:,} are allowed.")
    return path


class Entry(NamedTuple):
    """Code for one kind of GPU in a fatbin.

    Attributes:
        kind: ``CUBIN``, or 1 for PTX.
        capability: Compute capability times 10.
        start: Position of the code.
        size: Its size in bytes.
    """

    kind: int
    capability: int
    start: int
    size: int


def keep_capability(library: bytes, capability: str) -> bytearray:
    """A copy of a library with the code for other GPUs replaced by zeros.

    Blocks without machine code of this capability stay as they are.

    Args:
        library: A shared library with fatbins of CUDA's compiler.
        capability: Compute capability to keep, such as ``9.0``.

    Raises:
        SettingError: It is no number with a point, or no block has machine code for it.
    """
    if not re.fullmatch(r"\d+\.\d", capability):
        raise SettingError(f"Compute capability {capability!r}: give a number such as 9.0.")
    wanted, data = int(capability.replace(".", "")), bytearray(library)
    found = Counter[int]()
    for entries in _fatbins(library):
        found.update(entry.capability for entry in entries if entry.kind == CUBIN)
        kept = [entry for entry in entries if (entry.kind, entry.capability) == (CUBIN, wanted)]
        for entry in entries if kept else []:
            if entry not in kept:
                data[entry.start : entry.start + entry.size] = bytes(entry.size)
    if not found[wanted]:
        known = ", ".join(f"{c // 10}.{c % 10}" for c in sorted(found))
        raise SettingError(f"The CUDA provider has no code for {capability}, but for {known}.")
    return data


def _fatbins(library: bytes) -> Iterator[list[Entry]]:
    """The entries of each fatbin of a library.

    A fatbin begins with its first word, version, and the sizes of header and content; each entry
    with kind, version, the sizes of header and code, and further on the capability.
    """
    magic, at = FATBIN.to_bytes(4, "little"), 0
    while (at := library.find(magic, at, len(library) - 12)) >= 0:
        _, version, header, content = unpack_from("<IHHQ", library, at)
        start = at + header
        end = start + content
        if version != 1 or header != 16 or end > len(library):  # the word is part of something else
            at += 4
            continue
        entries = []
        while start + 32 <= end:
            kind, _, header, size = unpack_from("<HHIQ", library, start)
            (capability,) = unpack_from("<I", library, start + 28)
            if header < 32:
                break
            entries.append(Entry(kind, capability, start + header, size))
            start += header + size
        yield entries
        at = end


if __name__ == "__main__":
    raise SystemExit(main())
