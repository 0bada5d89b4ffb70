"""Install a wheel with its runtime dependencies alone, and run README's quickstart with it.

``python tests/runs/wheel_alone.py dist/scalora-0.1.0-py3-none-any.whl``; `make dist` does.
"""

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {"scalora", "miub"}
COMMANDS = ([], ["-m", "scalora", "--version"], ["-m", "miub", "--help"])
# A tiny model: more threads would only wait for each other.
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def check_contents(wheel: Path) -> None:
    """Raise a ValueError if the wheel holds anything but the two packages and its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    others = {top for top in tops - PACKAGES if not top.endswith(".dist-info")}
    if others or not tops >= PACKAGES:
        raise ValueError(f"{wheel.name} holds {sorted(tops)}; expected the packages alone.")


def quickstart() -> str:
    """Return README's quickstart, as the tests read it."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "examples"))
    import readme

    return readme.quickstart()


def main(wheel: Path) -> None:
    """Check the wheel's contents, install it alone, run the quickstart and the commands."""
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder, "bare")
        venv.create(bare, with_pip=True)
        python = bare / "bin" / "python"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # The tested versions: any newer torch would bring gigabytes of CUDA along.
        constraints = REPOSITORY / "constraints.txt"
        subprocess.run([*pip, "-c", constraints, wheel.resolve()], check=True)
        script = Path(folder, "quickstart.py")
        script.write_text(quickstart(), encoding="utf-8")
        for command in COMMANDS:
            # -I: neither this repository nor the user's site is on the path.
            subprocess.run(
                [python, "-I", *(command or [script])], check=True, cwd=folder, env=QUIET
            )
    print(f"{wheel.name}: installs and runs with its runtime dependencies alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
