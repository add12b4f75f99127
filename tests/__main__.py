"""`python -m tests [--all]`: lint, format, types and tests, with --all the long ones too; what fails ends it."""

import subprocess
import sys

COMMANDS = [
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    ["pytest", "-q", "-n", "2", "--durations=10", *([] if "--all" in sys.argv[1:] else ["-m", "not long"])],
]

for command in COMMANDS:
    print("$", *command, flush=True)
    code = subprocess.run([sys.executable, "-m", *command]).returncode
    if code:
        sys.exit(code)
