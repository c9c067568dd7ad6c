"""The command line, keeping a file for each fit of a codec that a process begins.

`python -m tests.fits FOLDER SECONDS COMMAND...`, started by torchrun or alone. Files are called rank-R.PID; a fit
takes SECONDS longer, so that it can be killed in the middle.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pipelines.extraction.fit


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    inner = pipelines.extraction.fit.sample_crops

    def kept(*args: Any, **options: Any) -> Any:
        (folder / f"rank-{os.environ.get('RANK', '0')}.{os.getpid()}").touch()
        time.sleep(seconds)
        return inner(*args, **options)

    pipelines.extraction.fit.sample_crops = kept
    sys.argv[1:3] = []
    import cli

    cli.main()


if __name__ == "__main__":
    main()
