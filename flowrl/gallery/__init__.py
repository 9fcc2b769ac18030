"""Galleries: the same prompt and seed drawn by several models, side by side, with the rewards under every picture."""

from flowrl.gallery.page import Cell, Film, Frame, Table, write_gallery

__all__ = ["Cell", "Film", "Frame", "Table", "write_gallery"]
