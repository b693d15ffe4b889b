"""One colour for each stage and stream: strong in NVTX ranges, traces and reports, told apart by lightness too, and
pale where words or hatches lie over it, as in figures.
"""

COLOURS = {
    "stem": "#8a8f98", "stream 0": "#3b82c4", "stream 1": "#e08a1e", "stream 2": "#3f9e5a", "stream 3": "#b5a11b",
    "fusion": "#9059b8", "head": "#d1495b",
}  # fmt: skip
PALE = {
    "stem": "#e4e4e4", "stream 0": "#bcdcf5", "stream 1": "#f9ddb1", "stream 2": "#cbe8c2", "stream 3": "#f3f3a8",
    "fusion": "#e3cdea", "head": "#f6c6c6",
}  # fmt: skip
NEUTRAL = "#5c6470"
