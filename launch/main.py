"""jaxvid-launch: start runs, here or elsewhere.

jaxvid-launch local [--workdir runs/local] [--videos DIR] [--fast]

jaxvid-launch preflight CONFIG [--topology v5p:4x4x4] [--search rows]
"""

import sys

import tyro

from launch.local import Local, local
from launch.preflight import Preflight, preflight

VERBS = {Local: local, Preflight: preflight}


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
