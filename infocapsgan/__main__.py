"""All commands in one: `infocapsgan COMMAND …`, or `python -m infocapsgan COMMAND …`."""

import argparse
import importlib
import sys

COMMANDS = {
    "train": "trains a system and writes a run directory",
    "evaluate": "measures a trained system",
    "visualize": "makes pictures and animations of what a run has learned",
    "sweep": "trains a system with several seeds and sums up their results",
    "predict": "says which classes images belong to",
    "export": "writes a trained system as ONNX",
}
"""Each is the module infocapsgan.COMMAND, whose main() reads sys.argv."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="infocapsgan",
        usage="infocapsgan COMMAND … | --help | --version",
        description="Capsule networks and GANs that learn classes without labels. The commands:\n\n"
        + "".join(f"  {name:12}{sentence}\n" for name, sentence in COMMANDS.items())
        + "\n`infocapsgan COMMAND --help` lists the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    called = parser.parse_args()
    if called.version:
        from capsops import __version__  # imports torch, which --help need not wait for

        print(f"infocapsgan {__version__}")
    elif called.command is None:
        parser.print_help()
    elif called.command not in COMMANDS:
        parser.error(f"COMMAND: got {called.command}, takes one of {', '.join(COMMANDS)}")
    else:
        sys.argv = [f"infocapsgan {called.command}", *called.words]
        importlib.import_module(f"infocapsgan.{called.command}").main()


if __name__ == "__main__":
    main()
