"""muonlab: Muon as a drop-in optimizer, and a laboratory for optimizers of language models.

`import muonlab` imports torch and nothing else; the laboratory (`muonlab[lab]`) is imported when it is used.
"""

from muonlab.optim import Lion, Muon, SophiaG, orthogonalize

__version__ = "0.1.0"

__all__ = ["Lion", "Muon", "SophiaG", "__version__", "orthogonalize"]
