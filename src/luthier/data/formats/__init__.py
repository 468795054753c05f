"""One file per outside template format."""
