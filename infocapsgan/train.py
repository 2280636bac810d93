"""Trains a system: `python -m infocapsgan.train [SYSTEM] [options]`, in Python `infocapsgan.train(…)`."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from infocapsgan.data import DataError
from infocapsgan.engine.command_line import parse, resumed
from infocapsgan.engine.loaded_run import LoadedRun, load
from infocapsgan.engine.loop import train as train_from_settings
from infocapsgan.engine.run_directory import RunError
from infocapsgan.engine.train_state import NonFiniteLossError
from infocapsgan.systems import SYSTEMS


def main() -> None:
    """The command line."""
    system_class, settings = parse(sys.argv[1:])
    try:
        result = train_from_settings(system_class, settings)
    except (DataError, RunError, ValueError) as error:
        sys.exit(f"error: {error}")
    except NonFiniteLossError as error:
        sys.exit(f"stopped: {error}")
    if result.line:
        print(result.line)


def train(system: str = "infocapsgan", **options: Any) -> LoadedRun:
    """Trains a system and returns its run, loaded.

        run = infocapsgan.train("infogan", dataset="mnist", max_steps=500)
        run = infocapsgan.train(resume=run.path, max_steps=1000)

    Args:
        system: capsnet, capsulegan, dcgan, encoder, infocapsgan, infogan or mimic.
        options: those of the command line, with underscores: see `python -m infocapsgan.train SYSTEM --help`.
            Beside `resume`, a run directory, only epochs, max_steps and data_dir; `system` is then ignored.

    Raises:
        TypeError, ValueError: there is no such option or system, or a value is not one that an option takes.
        DataError, RunError, NonFiniteLossError: as the command line prints them.
    """
    if "resume" in options:
        system_class, settings = resumed(Path(options.pop("resume")), **options)
    elif system in SYSTEMS:
        system_class = SYSTEMS[system]
        settings = system_class.configure(**options)
    else:
        raise ValueError(f"system: got {system!r}, takes one of {', '.join(SYSTEMS)}")
    result = train_from_settings(system_class, settings)
    return load(result.path, device=settings.device)


class CallableModule(ModuleType):
    """This module, when called, trains: its name in the package is that of the function as well."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = CallableModule

if __name__ == "__main__":
    main()
