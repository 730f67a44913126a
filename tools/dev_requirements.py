"""Prints, one a line, what pyproject.toml wants installed: the package's dependencies and the named extras.

pip has no way to install a project's requirements without building the project.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + [requirement for name in sys.argv[1:] for requirement in extras[name]]))
