"""Export one checkpoint, or many, as one verified artefact with a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names

if TYPE_CHECKING:
    from aoft_deploy.export.fastest import export_fastest
    from aoft_deploy.export.fleet import export_fleet
    from aoft_deploy.export.merged import export_each, export_merged
    from aoft_deploy.export.options import VerifyOptions
    from aoft_deploy.export.publishing import Exported

__all__ = [
    "Exported",
    "VerifyOptions",
    "export_each",
    "export_fastest",
    "export_fleet",
    "export_merged",
]

_HOMES = {
    "Exported": "publishing",
    "VerifyOptions": "options",
    "export_each": "merged",
    "export_fastest": "fastest",
    "export_fleet": "fleet",
    "export_merged": "merged",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
