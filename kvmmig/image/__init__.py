"""The image: a saved guest that can be mapped, each page of it at a fixed place of its own.

Sans I/O: a `Builder` says which bytes belong where, an `OpenImage` reads through a function that it is given.
The format is drawn at the top of `kvmmig.image.format`.
"""

from kvmmig.image.builder import Builder as Builder
from kvmmig.image.format import BLOCK_PAGES as BLOCK_PAGES
from kvmmig.image.format import HEAD_SIZE as HEAD_SIZE
from kvmmig.image.format import MAGIC as MAGIC
from kvmmig.image.format import MEMORY_AT as MEMORY_AT
from kvmmig.image.format import Header as Header
from kvmmig.image.format import Layout as Layout
from kvmmig.image.opened import OpenImage as OpenImage
from kvmmig.image.pieces import Piece as Piece
from kvmmig.image.pieces import PieceCursor as PieceCursor
