from __future__ import annotations

import sys


def main() -> None:
    """The command `trainfw`."""
    if sys.argv[1:2] and sys.argv[1] in ("train", "eval", "generate"):
        from trainfw.backends import restart_with_huge_pages

        restart_with_huge_pages()
    from trainfw import cli

    cli.main()


if __name__ == "__main__":
    main()
