"""Folders of labelled pictures, in the layouts that people have them in."""
