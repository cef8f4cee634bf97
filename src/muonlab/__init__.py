"""muonlab: Muon as a drop-in optimizer, and a laboratory for optimizers of language models.

`import muonlab` imports torch and nothing else; the laboratory (`muonlab[lab]`) is imported when it is used.
"""

__version__ = "0.1.0"
