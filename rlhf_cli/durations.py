"""Durations as people read them."""


def format_clock(seconds: float) -> str:
    """Format seconds as a clock does: 0:04, 12:05, 1:20:00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def format_duration(seconds: float) -> str:
    """Format seconds for people: 4.2 s, 3 min 05 s, 1 h 20 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
