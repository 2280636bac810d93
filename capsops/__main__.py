"""`python -m capsops [info | check | bench]`: what serves here and why; prove it here; time it here."""

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, `info` by default, and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m capsops",
        description="What is installed and serves (info, the default), whether it is right on this machine"
        " (check), and how fast it is here (bench).",
    )
    commands = parser.add_subparsers(dest="command", metavar="{info,check,bench}")
    from capsops import bench, check, info

    for module in (info, check, bench):
        first, _, rest = (module.__doc__ or "").partition("\n\n")
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=first.partition(": ")[2],
            description=f"{first}\n\n{rest}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["info", *words]
    args = parser.parse_args(words)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
