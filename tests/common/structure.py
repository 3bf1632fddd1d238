"""Check modeling/ with transformers' linter of model files: `python -m tests.common.structure`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# Rules that modeling/ does not follow, and why.
DECLINED = {
    "TRF057": "@auto_docstring replaces docstrings at import by generated ones; ours are written by hand, with shapes."
}


def findings(folder: str = "modeling") -> list[dict]:
    """What the linter finds in a folder of the repository: dictionaries with `path`, `line`, `rule` and `message`."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "findings.json"
        command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", "--output-json", str(report), folder]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if not report.is_file():
            raise RuntimeError(f"mlinter wrote no report: {result.stderr}")
        return json.loads(report.read_text(encoding="utf-8"))["findings"]


def main() -> int:
    found = findings()
    violations = [finding for finding in found if finding["rule"] not in DECLINED]
    for finding in violations:
        print(f"{finding['path']}:{finding['line']}: {finding['message']}")
    for rule, reason in DECLINED.items():
        print(f"declined: {rule} in {sum(finding['rule'] == rule for finding in found)} places. {reason}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
