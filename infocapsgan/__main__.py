"""All commands in one: `infocapsgan COMMAND …`, or `python -m infocapsgan COMMAND …`."""

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
USAGE = "usage: infocapsgan COMMAND … | --help | --version"
HELP = "Capsule networks and GANs that learn classes without labels. The commands:"


def main() -> None:
    """The command line."""
    command, *words = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        sys.argv = [f"infocapsgan {command}", *words]
        importlib.import_module(f"infocapsgan.{command}").main()
    elif command == "--version":
        from capsops import __version__  # imports torch, which --help need not wait for

        print(f"infocapsgan {__version__}")
    elif command in ("-h", "--help"):
        print(USAGE, HELP, "\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items()), sep="\n\n")
        print("\n`infocapsgan COMMAND --help` lists the options of one.")
    else:
        print(f"{USAGE}\nCOMMAND: got {command}, takes one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
