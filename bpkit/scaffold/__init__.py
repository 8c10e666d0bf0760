"""Makes the distribution of a new policy: `bpkit new`. The templates, real files, are in `templates/`.

Importing this imports no torch.
"""

from __future__ import annotations

from bpkit.scaffold.kinds import Kind
from bpkit.scaffold.names import Names, ScaffoldError
from bpkit.scaffold.render import render
from bpkit.scaffold.write import refuse_folder_in_use, write_folder

__all__ = ["Kind", "Names", "ScaffoldError", "refuse_folder_in_use", "render", "write_folder"]
