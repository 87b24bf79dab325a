"""Look pinned versions up for known vulnerabilities, and do not take silence for an answer: pip-audit says "No known
vulnerabilities found", with exit code 0, of packages that it could not look up.

Exit codes: 0 all are known and none is vulnerable, 1 some are vulnerable, 2 some could not be looked up.

    python infra/docker/audit.py .venv/bin/pip-audit constraints.txt      # what `make audit` does
"""

from __future__ import annotations

import json
import subprocess
import sys

OPTIONS = ("--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json")


def audit(program: str, requirements: str) -> int:
    """Prints what was found; returns the exit code."""
    done = subprocess.run(
        [program, "--requirement", requirements, *OPTIONS], capture_output=True, text=True, check=False
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2]
        print(f"NOT AUDITED: the index of vulnerabilities cannot be reached: {last}", file=sys.stderr)
        return 2
    vulnerable = [package for package in packages if package.get("vulns")]
    for package in vulnerable:
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no release yet"
            print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        print(
            f"NOT AUDITED: {len(skipped)} of {len(packages)} packages could not be looked up ({shown}): the index in "
            "use does not say what is vulnerable; audit where PyPI itself can be reached",
            file=sys.stderr,
        )
        return 1 if vulnerable else 2
    print(f"{len(packages)} packages looked up, {len(vulnerable)} of them vulnerable")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(audit(*sys.argv[1:]))
