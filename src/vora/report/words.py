"""Quantities in words."""


def duration(seconds: float) -> str:
    """How long, in the unit that fits: `40 seconds`, `12 minutes`, `5.3 hours`, `3.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"
