"""Processes that end at any of their writes: killed there, or told that the disk is full.

A script runs in a process of its own, which forks for each of its file-system calls: the n-th child
runs it in a folder of its own, ``str(n)``, up to its n-th call. Calls are what Python tells its
audit hooks (opening for writing, making, renaming), and syncing and swapping; a process can also be
killed at a removal, which needs no space.
Libraries write past those hooks, so a limit on the size of files stops each write in the middle.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

Ending = Literal["kill", "full"]

_RUNNER = """
import errno, os, resource, shutil, signal, sys, traceback
from pathlib import Path

WRITES = {"os.mkdir", "os.rename", "os.chmod", "os.truncate", "os.link", "os.symlink"}
REMOVALS = {"os.remove", "os.rmdir"}
left = None


def end():
    global left
    left = None
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def count():
    global left
    if left is not None:
        left -= 1
        if left < 0:
            end()


def audit(event, arguments):
    writes = event in WRITES or (event in REMOVALS and ending == "kill")
    if event == "open":
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes:
        count()


def counted(function):
    def call(*arguments):
        count()
        return function(*arguments)
    return call


def run(number, size):
    global left
    os.makedirs(str(number), exist_ok=True)
    folder = Path(root, str(number))
    scope = globals() | {"folder": folder}
    exec(prepare, scope)
    if size is None:
        left = number
    else:
        if ending == "kill":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        exec(script, scope)
    except Exception as error:
        left = None
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        (folder / "error").write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0 if size is None and left is not None else 2


def forked(number, size=None):
    pid = os.fork()
    if not pid:
        code = 3
        try:
            code = run(number, size)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


root, ending, imports, prepare, script, sizes = sys.argv[1:]
exec(imports)
os.fsync = counted(os.fsync)
import safeweights_peft.files as files
files._exchange = counted(files._exchange)
sys.addaudithook(audit)
number = 0
while (code := forked(number)) != 0:
    if code == 3:
        raise SystemExit(f"the script failed at call {number}")
    number += 1
shutil.rmtree(Path(root, str(number)))
for size in map(int, sizes.split()):
    if forked(number, size) == 3:
        raise SystemExit(f"the script failed at size {size}")
    number += 1
"""


def end_at_every_write(
    root: Path, ending: Ending, imports: str, prepare: str, script: str, sizes: range
) -> list[Path]:
    """Run a script again and again, ended at its first write, then at its second, and so on.

    Args:
        root: Where the folders appear.
        ending: "kill" ends the process; "full" makes the one write fail, for want of space.
        imports: Code that is run once.
        prepare: Code that fills ``folder``; nothing happens to it.
        script: The code that is ended.
        sizes: After all calls, sizes in bytes at which a file stops growing.

    Returns:
        The folders; in each one that lasted to its error, ``error`` tells it.
    """
    sizes_text = " ".join(map(str, sizes))
    command = [sys.executable, "-c", _RUNNER, root, ending, imports, prepare, script, sizes_text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [root / name for name in sorted(filter(str.isdigit, os.listdir(root)), key=int)]
