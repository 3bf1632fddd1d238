"""Starts `mose`, also as `python -m modular_star_encoder`. Ctrl-C at the start or end prints no traceback."""

import signal
import sys


def main() -> int:
    """Run the `mose` command in `sys.argv` with `cli.main.main`, and return its exit status."""
    by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not if a shell lets it ignore Ctrl-C
    if by_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from modular_star_encoder.cli import main as cli

    if by_default:
        signal.signal(signal.SIGINT, cli.interrupt)
    try:
        return cli.main()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if by_default:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
