"""The training step and loop, its optimizer, and checkpoints that resume to the same bits."""
