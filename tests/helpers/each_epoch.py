"""``flowdistill WORDS`` as a process of its own, with a checkpoint after every epoch: those of the tests take no ten seconds. With
``--ray`` its workers write one after every epoch, too.

python tests/helpers/each_epoch.py FOLDER WORD ...    # its number is added to FOLDER/rank.N, N being its rank under torchrun
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def work(*given: Any) -> Any:
    """In the place of ``ray_crew.work``; it travels to the workers by its content, for this file is no module of theirs."""
    from flowdistill.runner import execute
    from flowdistill.runner.remote import ray_crew

    execute.CHECKPOINT_SECONDS = 0.0
    return ray_crew.work(*given)


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    with open(folder / f"rank.{os.environ.get('RANK', 0)}", "a") as numbers:
        numbers.write(f"{os.getpid()}\n")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported, as the command line does it
    from flowdistill.__main__ import main
    from flowdistill.runner import execute

    execute.CHECKPOINT_SECONDS = 0.0
    if "--ray" in sys.argv:
        from flowdistill.runner.remote import ray_crew

        ray_crew.work = work
    main()
