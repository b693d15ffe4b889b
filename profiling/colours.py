"""One colour for each stage and stream, the same in NVTX ranges, traces and reports; told apart by lightness too."""

COLOURS = {
    "stem": "#8a8f98", "stream 0": "#3b82c4", "stream 1": "#e08a1e", "stream 2": "#3f9e5a", "stream 3": "#b5a11b",
    "fusion": "#9059b8", "head": "#d1495b",
}  # fmt: skip
NEUTRAL = "#5c6470"
