"""erpe: do relative position encodings close the accuracy gap of linear attention, and what do they cost?"""

__version__ = "0.1.0"
