"""`python -m tests`: lint, format, types and every test; the first that fails ends it."""

import subprocess
import sys

COMMANDS = [
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    ["pytest", "-q", "-n", "2", "--durations=10"],
]

for command in COMMANDS:
    print("$", *command, flush=True)
    code = subprocess.run([sys.executable, "-m", *command]).returncode
    if code:
        sys.exit(code)
