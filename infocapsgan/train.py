"""Trains a system: `python -m infocapsgan.train [SYSTEM] [options]`."""

import sys

from infocapsgan.data import DataError
from infocapsgan.engine.command_line import parse
from infocapsgan.engine.loop import train
from infocapsgan.engine.run_directory import RunError
from infocapsgan.engine.train_state import NonFiniteLossError


def main() -> None:
    """The command line."""
    system_class, settings = parse(sys.argv[1:])
    try:
        result = train(system_class, settings)
    except (DataError, RunError, ValueError) as error:
        sys.exit(f"error: {error}")
    except NonFiniteLossError as error:
        sys.exit(f"stopped: {error}")
    if result.line:
        print(result.line)


if __name__ == "__main__":
    main()
