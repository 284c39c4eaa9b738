"""What torch.save writes is a zip archive: is it whole, and no larger than it says?"""

from __future__ import annotations

import zipfile
from pathlib import Path


def check_archive(path: str | Path) -> None:
    """Refuse an archive that is damaged, or larger than its file once it is read: torch stores tensors as they are.

    Parts that overlap, or are compressed, could make terabytes of a small file. The checksums are looked at because
    torch does not: one damaged byte can be another step, or another weight.

    Raises
    ------
    ValueError
        With what is wrong; also ``zipfile.BadZipFile`` and ``OSError``, where it cannot be read as an archive.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        total, size = sum(part.file_size for part in parts), Path(path).stat().st_size
        if total > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError(f"{total} bytes in a file of {size}, or compressed parts")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is another")
