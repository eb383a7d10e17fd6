"""Write requirements*.lock: the versions installed here of all that the named extras need.

    .venv/bin/python tools/lock.py cpu export test > requirements.lock
    .venv/bin/python tools/lock.py plan > requirements-plan.lock

Walks the requirements of the installed project, so that packages which only happen to be installed
are left out. Local version suffixes (`+cpu`) are cut: which build is taken is pip's configuration.
"""

import sys
from importlib.metadata import distribution, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "medreason"
HEADER = """\
# Versions the project is tested with, for the extras: {extras}.
# Re-make it from the installed environment with `make lock`.
"""


def collect_names(root: str, extras: frozenset[str]) -> set[str]:
    """Names of all distributions that `root[extras]` needs on this machine, itself left out."""
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [(root, extras)]
    while queue:
        name, wanted = queue.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in (wanted or {""})):
                queue.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen} - {root}


def main(extras: list[str]) -> None:
    names = collect_names(PROJECT, frozenset(extras)) | {"setuptools"}
    print(HEADER.format(extras=", ".join(extras)), end="")
    for name in sorted(names):
        print(f"{name}=={version(name).partition('+')[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
