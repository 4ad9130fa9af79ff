"""Copy a file at the file system's best.

Source: https://man7.org/linux/man-pages/man2/copy_file_range.2.html
"""

import errno
import os
import shutil
from pathlib import Path

# What file systems and kernels answer that cannot do it, rather than that something is wrong.
_CANNOT = {
    errno.EBADF,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ETXTBSY,
    errno.EXDEV,
}


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes: by sharing its blocks, else inside the kernel, else through memory.

    Blocks that are shared (btrfs, XFS, NFS) become the copy's own when it is changed.
    """
    if not _copy_in_kernel(source, target):
        shutil.copyfile(source, target)


def _copy_in_kernel(source: Path, target: Path) -> bool:
    if not hasattr(os, "copy_file_range"):
        return False
    with source.open("rb") as reader, target.open("wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        while left:
            try:
                count = os.copy_file_range(reader.fileno(), writer.fileno(), left)
            except OSError as reason:
                if reason.errno not in _CANNOT:
                    raise
                return False
            if not count:
                return False
            left -= count
    return True
