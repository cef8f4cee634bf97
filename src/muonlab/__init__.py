"""muonlab: Muon as a drop-in optimizer, and a laboratory for optimizers of language models.

Names are imported when they are used: the optimizer needs torch alone, the laboratory what `muonlab[lab]` installs.
"""

from typing import TYPE_CHECKING

from muonlab.lazy import lazily

if TYPE_CHECKING:
    from muonlab.optim import Lion, Muon, SophiaG, orthogonalize

_MODULES = {
    "Lion": "muonlab.optim",
    "Muon": "muonlab.optim",
    "SophiaG": "muonlab.optim",
    "orthogonalize": "muonlab.optim",
}
__getattr__, __dir__ = lazily(__name__, _MODULES)

__version__ = "0.1.0"

__all__ = ["Lion", "Muon", "SophiaG", "__version__", "orthogonalize"]
