"""The `mien` command."""


def main() -> int:
    """Run one subcommand."""
    return 0
