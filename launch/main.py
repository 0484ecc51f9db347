"""jaxvid-launch: start runs, here or elsewhere.

jaxvid-launch local [--workdir runs/local] [--videos DIR] [--fast]
"""

import sys

import tyro

from launch.local import Local, local

VERBS = {Local: local}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `jaxvid-launch`."""
    command = tyro.extras.subcommand_cli_from_dict(
        {kind.__name__.lower(): kind for kind in VERBS},
        prog="jaxvid-launch",
        description=__doc__,
        args=sys.argv[1:] if argv is None else argv,
    )
    VERBS[type(command)](command)


if __name__ == "__main__":
    main()
