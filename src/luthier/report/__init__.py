"""The comparison of tunings: as JSON with a stable schema, as a terminal table and as a page."""
